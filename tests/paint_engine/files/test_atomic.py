"""Files and directories of a run are whole or absent, whatever fails while they are written."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import paint_engine
from paint_engine.files import (
    WriteFailed,
    append_lines,
    json_line,
    make_unfinished,
    new_directory,
    open_jsonl,
    publish_directory,
    read_jsonl,
    write_atomic,
    write_json,
    write_link,
    writing,
)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 100 bytes. Not a fixture: pytest's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"a": 1})
    write_json(file, {"b": "é"})
    assert json.loads(file.read_text()) == {"b": "é"}
    write_atomic(file, "ü\n")
    assert file.read_bytes() == b"\xc3\xbc\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_earlier_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_atomic(file, "before")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_atomic(file, 200 * "x")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_lines_are_appended_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_jsonl(path) as file:
        append_lines(file, json_line({"step": 1}))
        with full_disk(), pytest.raises(OSError, match="File too large"):
            append_lines(file, json_line({"step": 2, "text": 90 * "x"}))
        append_lines(file, json_line({"step": 3}))
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with open_jsonl(path) as file:
        append_lines(file, json_line({"step": 2}))
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_value_without_a_json_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"^'loss' of step 3 cannot be written as JSON"):
        json_line({"step": 3, "loss": float("nan")})
    with pytest.raises(ValueError, match=r"^'text' cannot be written as JSON"):
        json_line({"text": b"x"})


@pytest.mark.parametrize("write", ["safetensors", "tokenizers"])
def test_a_library_that_gives_the_reason_as_text_fails_alike(write: str, tmp_path: Path) -> None:
    """Both are written in Rust; tokenizers raises a plain Exception."""
    path = tmp_path / "file"
    failed = pytest.raises(WriteFailed, match=r"file could not be .*File too large")
    with full_disk(), failed, writing(path):
        if write == "safetensors":
            save_file({"w": torch.zeros(1000)}, path)
        else:
            words = {f"word-{i}": i for i in range(100)}
            Tokenizer(WordLevel(words, "word-0")).save(str(path))
    with pytest.raises(KeyError), writing(path):
        raise KeyError("of something else")


@pytest.mark.parametrize("both", [False, True])
def test_a_command_goes_on_without_its_output(both: bool, tmp_path: Path) -> None:
    """A log on a full disk, to the end of the process."""
    program = (
        "import sys\n"
        "from paint_engine.files import command_output\n"
        "with command_output():\n"
        "    print('lost')\n"
        "    print(5000 * 'x', flush=True)\n"
        "    sys.stderr.writelines(['a warning\\n'])\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=full if both else subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, (tmp_path / "done").exists()) == (0, True)
    assert both or done.stderr.splitlines() == [
        "note: the output is lost from here on (No space left on device)",
        "a warning",
    ]


def test_a_link_is_replaced(tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        write_link(tmp_path / "best", name)
        assert (tmp_path / "best").readlink() == Path(name)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_directory_appears_with_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    # As a killed process leaves it.
    (make_unfinished(target) / "left-over").touch()
    with new_directory(target) as beside:
        assert list(beside.iterdir()) == []
        (beside / "below").mkdir()
        (beside / "below" / "file").write_text("x")
        assert list(target.iterdir()) == []
    assert (target / "below" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(OSError, match="not empty"):
        publish_directory_over(target)


def test_what_a_living_process_writes_is_not_left_over(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_directory(target) as first:
        (first / "file").write_text("first")
        with new_directory(target) as second:
            (second / "other").write_text("second")
            assert (first / "file").read_text() == "first"
        (target / "other").unlink()
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def publish_directory_over(target: Path) -> None:
    publish_directory(make_unfinished(target), target)


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_directory_that_could_not_be_filled_is_removed(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    with pytest.raises(failure), new_directory(tmp_path / "out") as beside:
        (beside / "file").touch()
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_writes_files() -> None:
    """Others use these functions: hand-written copies of them differ in what a crash leaves, and in
    which links they follow."""
    package = Path(str(paint_engine.__file__)).parent
    words = r"os\.(fsync|replace|open)\b|\.unfinished\"|\.write_(text|bytes)\(|open\([^)]*\"[wax]"
    found = {
        f"{file.parent.name}/{file.name}"
        for file in package.rglob("*.py")
        if re.search(words, file.read_text())
    }
    # The lock is one file that two processes must not both create, and the null device is no file.
    allowed = {"files/lock.py", "files/output.py"}
    ours = {"files/atomic.py", "files/jsonl.py", "files/links.py"}
    assert ours <= found <= ours | allowed
