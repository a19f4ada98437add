"""Commands import folders, folders import what they share, and no two folders import each other."""

import ast
from pathlib import Path

from bench.measure import ROOT

BENCH = ROOT / "bench"
FOLDERS = {path.parent.name for path in BENCH.glob("*/__init__.py")}
SHARED = {"figures", "losses", "measure", "tables"}
# The GPU check repeats a part of the comparison and of the step. A cluster's step is predicted from
# the counted loss and from rollouts as the step's benchmark has them.
MAY_IMPORT = {
    "cluster": {"floor", "kernels", "step"},
    "floor": {"kernels"},
    "gpu": {"kernels", "step"},
    "kernels": set(),
    "paper": set(),
    "soak": set(),
    "step": set(),
}


def imported(path: Path) -> set[str]:
    """The folders and top-level modules of bench that a file imports."""
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


def test_every_folder_describes_itself_in_two_lines() -> None:
    assert set(MAY_IMPORT) == FOLDERS
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse((BENCH / folder / "__init__.py").read_text()))
        assert text is not None and len([line for line in text.splitlines() if line]) == 2


def test_folders_import_what_is_shared_and_no_folder_that_imports_them() -> None:
    for folder, others in MAY_IMPORT.items():
        for path in (BENCH / folder).glob("*.py"):
            assert imported(path) <= SHARED | others | {folder}, path


def test_what_is_shared_imports_neither_folders_nor_commands() -> None:
    for name in SHARED:
        assert imported(BENCH / f"{name}.py") <= SHARED, name
