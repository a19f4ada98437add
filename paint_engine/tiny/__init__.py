"""The laptop's problem domain: generated word problems, their tokenizer, and the pretraining of a
small base model and of a stronger teacher for it."""

from pathlib import Path

TINY_BASE = Path(__file__).parent / "base"
TINY_TEACHER = Path(__file__).parent / "teacher"
BUNDLED = {"tiny": TINY_BASE, "tiny-teacher": TINY_TEACHER}
"""directories of the bundled models, by the names that configurations call them"""
