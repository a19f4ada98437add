"""What the commands print of others: rows, names, paths, and the words of a template. None of it
reaches the terminal as a control character, and no line break in it begins a line of ours."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paint_engine import evaluate, export
from paint_engine.files import is_hidden
from paint_engine.report.__main__ import main as report

Main = Callable[[Sequence[str]], int]
Printed = Callable[[], str]

NAME = "\x1b[2J\x1b]52;c;aGk=\x07\x9b1m\rb\u202ec\u2028d\nerror: forged"
SHOWN = r"\x1b[2J\x1b]52;c;aGk=\x07\x9b1m\rb\u202ec\u2028d"


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Printed:
    """All that was printed since the last call, which a terminal shows as it is."""

    def take() -> str:
        text = "".join(capfd.readouterr())
        assert [c for c in text if c != "\n" and is_hidden(c)] == []
        assert not any(line.startswith("error: forged") for line in text.split("\n"))
        return text

    return take


def rows_of(file: Path, count: int = 7) -> Path:
    """Rows in which every text is hostile."""
    rows = [
        {
            "id": f"{i}{NAME}",
            "problem": f"How many? {i} {NAME}",
            "solution": f"Count them. {NAME} It is \\boxed{{{i}}}.",
            "answer": f"{i}{NAME}",
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def hostile(command: list[str], model_dir: Path, tmp_path: Path) -> list[str]:
    """The arguments of a run with hostile rows, and names of data, model and directory."""
    work = tmp_path / NAME
    work.mkdir()
    shutil.copytree(model_dir, work / "model")
    rows = rows_of(work / "rows.jsonl")
    changed = {
        "--model.name_or_path": work / "model",
        "--data.path": rows,
        "--eval.path": rows_of(work / "held-out.jsonl", 2),
        "--run.dir": work / "run",
    }
    settings = dict(zip(command[::2], command[1::2], strict=True)) | changed
    return [part for key, value in settings.items() for part in (key, str(value))]


def test_a_run_and_what_is_made_of_it(
    hostile: list[str], run_main: Main, printed: Printed, tmp_path: Path
) -> None:
    work = tmp_path / NAME
    for flag in ("--print-config", "--dry-run"):
        assert run_main([*hostile, flag]) == 0
        assert r"\U0000009B1m" in printed()
    assert run_main(hostile) == 0
    assert f"/{SHOWN}\n    error: forged/run/report.html" in printed()
    assert run_main([*hostile, "--run.overwrite", "false"]) == 2
    assert "exists already; resume it with" in printed()

    report([str(work / "run")])
    assert "report.html" in printed()
    export.main([str(work / "run"), str(work / "exported"), "--form", "adapter"])
    assert "vllm serve" in printed()

    settings = ["--num-samples", "1", "--max-new-tokens", "4", "--device", "cpu"]
    benchmark = ["--benchmarks", str(work / "held-out.jsonl")]
    model = ["--model", str(work / "model")]
    for name, adapter in (("base", []), ("trained", ["--adapter", str(work / "run")])):
        output = ["--output", str(work / name)]
        evaluate.main([*model, *benchmark, *adapter, *settings, *output])
    evaluate.main(["compare", str(work / "base"), str(work / "trained")])
    assert "Avg@k in percent" in printed()


def test_a_refused_row(
    hostile: list[str], run_main: Main, printed: Printed, tmp_path: Path
) -> None:
    rows = tmp_path / NAME / "rows.jsonl"
    rows.write_text(json.dumps({NAME: NAME, "problem": NAME, "answer": ""}) + "\n")
    assert run_main([*hostile, "--dry-run"]) == 2
    assert SHOWN in printed()
    rows.write_text(f"{NAME}\n")
    assert run_main([*hostile, "--dry-run"]) == 2
    assert "malformed JSON" in printed()


def test_a_chat_template_s_own_words(
    hostile: list[str], run_main: Main, printed: Printed, tmp_path: Path
) -> None:
    template = f"{{{{ raise_exception({json.dumps(NAME)}) }}}}"
    (tmp_path / NAME / "model" / "chat_template.jinja").write_text(template)
    assert run_main([*hostile, "--dry-run"]) == 2
    assert f"refuses a conversation of user: {SHOWN}" in printed()


def test_the_names_of_tensors(
    hostile: list[str], run_main: Main, printed: Printed, tmp_path: Path
) -> None:
    file = tmp_path / NAME / "model" / "model.safetensors"
    save_file(load_file(file) | {NAME: torch.zeros(2)}, file, metadata={"format": "pt"})
    assert run_main([*hostile, "--dry-run"]) == 2
    assert SHOWN in printed()


def test_an_adapter_s_configuration(
    hostile: list[str], printed: Printed, tmp_path: Path, model_dir: Path
) -> None:
    adapter = tmp_path / NAME / "adapter"
    adapter.mkdir()
    config = {"peft_type": NAME, "base_model_name_or_path": NAME, NAME: NAME}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({NAME: torch.zeros(2)}, adapter / "adapter_model.safetensors")
    arguments = ["--model", str(model_dir), "--adapter", str(adapter), "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*arguments, "--benchmarks", str(tmp_path / NAME / "rows.jsonl")])
    assert "error: " in printed()
