import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.files import read_jsonl, truncate_jsonl


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
