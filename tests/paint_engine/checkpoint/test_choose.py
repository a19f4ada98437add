"""What a checkpoint's run has recorded; choosing one is in test_export.py."""

import json
from pathlib import Path

import pytest

from paint_engine.checkpoint.choose import find_base, recorded_base, recorded_section
from paint_engine.config.sections import ModelSection
from paint_engine.files import BadFile


def section_of(run_dir: Path) -> ModelSection | None:
    return recorded_section(run_dir / "checkpoints" / "step-1", "model", ModelSection)


def test_a_section_comes_back_with_its_defaults(tmp_path: Path) -> None:
    assert section_of(tmp_path) is None
    (tmp_path / "config.toml").write_text("[train]\nseed = 1\n")
    assert section_of(tmp_path) == ModelSection()
    (tmp_path / "config.toml").write_text('[model]\nname_or_path = "a/b"\n')
    assert section_of(tmp_path) == ModelSection(name_or_path="a/b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model = 3\n", r"config\.toml: \[model\]: the whole: got 3; needs"),
        ("[model]\ndtype = 3\n", r"config\.toml: \[model\]: dtype: got 3; needs"),
        ("[[model]]\n", r"config\.toml: \[model\]: the whole: got \[\{\}\]; needs"),
        (
            '[model]\nname_or_path = ""\n',
            r"name_or_path: got ''; needs: String should have at least",
        ),
        (
            f'[model]\nname_or_path = "/{5000 * "a"}"\n',
            r"name_or_path: got '/a{50,60}\.\.\.; needs",
        ),
        (f"[model]\n{'a.' * 3000}a = 1\n", "nested too deeply"),
        ("[model\n", r"config\.toml: not valid TOML"),
    ],
)
def test_a_section_that_no_run_writes_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(content)
    with pytest.raises(BadFile, match=rf"{said}.*restore it from a copy$"):
        section_of(tmp_path)


@pytest.mark.parametrize("name", ["/" + 3500 * "a", "a\0b"])
def test_an_adapter_without_a_run_cannot_name_what_no_file_system_takes(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    with pytest.raises(
        BadFile, match=r"adapter_config\.json: name_or_path: got .*; needs: at most"
    ):
        recorded_base(tmp_path)
    with pytest.raises(BadFile, match=r"--model, --revision: name_or_path: got .*; check them"):
        find_base(tmp_path, name)
