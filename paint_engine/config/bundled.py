"""The models that are part of the package."""

from pathlib import Path

_TINY = Path(__file__).parents[1] / "tiny"
TINY_BASE = _TINY / "base"
TINY_TEACHER = _TINY / "teacher"
BUNDLED = {"tiny": TINY_BASE, "tiny-teacher": TINY_TEACHER}
"""directories by the names that configurations call them"""
