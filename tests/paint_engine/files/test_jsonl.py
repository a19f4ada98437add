import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.files import (
    BadFile,
    append_lines,
    json_line,
    jsonl,
    open_jsonl,
    read_jsonl,
    truncate_jsonl,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 200))
def test_any_cut_of_the_file_keeps_the_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, num_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    records = [{"step": step, "text": "é" * step} for step in range(1, 7)]
    content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    path.write_bytes(content[:num_bytes])
    # A line that lacks nothing but its line break is whole.
    num_whole = (content[:num_bytes] + b"\n").count(b"}\n")
    truncate_jsonl(path, last_step=4)
    assert read_jsonl(path) == records[: min(4, num_whole)]
    assert path.read_bytes().endswith(b"\n") == (num_whole > 0)


@pytest.mark.parametrize(("line", "problem"), [("{oops", "not valid JSON"), ("[1]", "holds list")])
def test_broken_line_amid_the_file_is_an_error(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2 .*{problem}.*Remove or repair"):
        read_jsonl(path)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    rows=st.lists(st.tuples(st.integers(1, 6), st.text(max_size=30)), max_size=12),
    last_step=st.integers(0, 7),
    num_bytes=st.integers(0, 400),
    ending=st.sampled_from(["\n", "\n\n"]),
    block=st.integers(1, 50),
)
def test_truncating_from_the_end_agrees_with_filtering_all_lines(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, str]],
    last_step: int,
    num_bytes: int,
    ending: str,
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    lines = [json.dumps({"step": step, "text": text}) + ending for step, text in sorted(rows)]
    path.write_bytes("".join(lines).encode()[:num_bytes])
    kept = [row for row in read_jsonl(path) if row["step"] <= last_step]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_BLOCK_BYTES", block)
        truncate_jsonl(path, last_step)
        assert read_jsonl(path) == kept
        before = path.read_bytes()
        assert before.endswith(b"\n") or not kept
        open_jsonl(path).close()
        assert path.read_bytes() == before


@pytest.mark.parametrize("num_later", [0, 3])
def test_of_a_long_file_the_end_is_read(
    num_later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "samples.jsonl", 200_000_000
    tail = b"".join(json_line({"step": step, "text": 1000 * "x"}) for step in range(1, 11))
    with path.open("wb") as file:
        # A hole takes no room on the disk.
        file.truncate(size)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + tail)
    num_read, original = 0, os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal num_read
        num_read += length
        return original(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    tracemalloc.start()
    truncate_jsonl(path, 10 - num_later)
    with open_jsonl(path) as file:
        append_lines(file, json_line({"step": 11}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < num_read < 1_000_000 and peak < 2_000_000
    kept = sum(len(line) + 1 for line in tail.split(b"\n")[: 10 - num_later])
    assert path.stat().st_size == size + 1 + kept + len(json_line({"step": 11}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"loss": 1}', "step: got 'None'; needs the number of a step"),
        (b'{"step": "1"}', "step: got '1'"),
        (b'{"step": true}', "step: got 'True'"),
        (b'{"step": 1.5}', "step: got '1.5'"),
        (b'{"step": NaN}', "not valid JSON .NaN has no JSON form"),
        (100_000 * b"[", "nested too deeply"),
        (b"[1]", "holds list"),
        (b"\xff", "not valid JSON"),
        (b"x" * 2_000_000, "is longer than"),
    ],
)
def test_a_line_at_the_end_that_is_no_step_is_named_and_kept(
    line: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1_000_000)
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=said):
        truncate_jsonl(path, 1)
    assert path.read_bytes() == content
