"""Paths as arguments of the commands: what no file system takes is one message."""

import importlib
import sys

import pytest

LONG = 5000 * "a"
COMMANDS = {
    "train": [["--resume", LONG], ["--config", LONG], ["--resume", 300 * "b/" + "c"]],
    "report": [[LONG], ["a\0b"]],
    "export": [[LONG, "out"], ["run", LONG], ["run", "out", "--model", LONG]],
    "evaluate": [
        ["--model", LONG, "--benchmarks", "tiny"],
        ["--adapter", f"/{LONG}", "--benchmarks", "tiny"],
        ["--model", "tiny", "--benchmarks", "tiny", "--output", LONG],
        ["compare", LONG, "b"],
        ["compare", "a", LONG],
        ["compare", "a", "b", "--json", "\ud800"],
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(command, arguments) for command, lists in COMMANDS.items() for arguments in lists],
)
def test_a_path_that_no_file_system_takes_is_refused(
    command: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "paint_engine.report.__main__" if command == "report" else f"paint_engine.{command}"
    main = importlib.import_module(name).main
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = "".join(capsys.readouterr())
    assert ended.value.code == 2
    assert "as file systems need it" in printed or "needs valid Unicode" in printed
    assert "got '" in printed and len(printed) < 2000
