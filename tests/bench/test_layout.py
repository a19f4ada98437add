"""Commands import rooms, rooms import what they share, and no two rooms import each other."""

import ast
from pathlib import Path

from bench.measure import ROOT

BENCH = ROOT / "bench"
ROOMS = {path.parent.name for path in BENCH.glob("*/__init__.py")}
SHARED = {"figures", "losses", "measure", "tables"}
# The GPU check repeats a part of the comparison and of the step.
MAY_IMPORT = {"gpu": {"kernels", "step"}, "kernels": set(), "paper": set(), "step": set()}


def imported(path: Path) -> set[str]:
    """The rooms and top-level modules of bench that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, path
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("bench.")}
    return found


def test_every_room_says_in_two_lines_what_lives_there() -> None:
    assert set(MAY_IMPORT) == ROOMS
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((BENCH / room / "__init__.py").read_text()))
        assert text is not None and len([line for line in text.splitlines() if line]) == 2


def test_rooms_import_what_is_shared_and_no_room_that_imports_them() -> None:
    for room, others in MAY_IMPORT.items():
        for path in (BENCH / room).glob("*.py"):
            assert imported(path) <= SHARED | others | {room}, path


def test_what_is_shared_imports_neither_rooms_nor_commands() -> None:
    for name in SHARED:
        assert imported(BENCH / f"{name}.py") <= SHARED, name
