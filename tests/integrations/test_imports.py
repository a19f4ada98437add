"""What importing the integrations needs, and what it says where TRL is absent."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import paint_engine.integrations

FOLDER = Path(paint_engine.integrations.__file__).parent


def test_the_package_imports_no_trainer() -> None:
    script = (
        "import sys, paint_engine.integrations.packed; "
        "print(sorted({'trl', 'transformers', 'peft', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["trl", "gkd"])
def test_a_missing_trl_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == "trl" else find_spec(wanted)
    )
    spec = importlib.util.spec_from_file_location(f"without_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'trl>=1\.16'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
