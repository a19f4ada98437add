"""JSON and TOML of a run are read by declared types, or refused by file, place and value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.files import (
    BadFile,
    FileMissing,
    Record,
    checked,
    read_json,
    read_json_if_there,
    read_tables,
)


class Inner(Record):
    steps: list[int]


class Outer(Record):
    name: str
    inner: Inner
    share: float = 0.5


@dataclass(frozen=True)
class Row:
    name: str
    share: float | None = None


def test_what_fits_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json_if_there(file, Outer) is None
    file.write_text('{"name": "\\ud800", "inner": {"steps": [1]}, "later": true}')
    found = read_json(file, Outer)
    assert (found.name, found.inner.steps, found.share) == ("\ud800", [1], 0.5)
    assert checked(Row, {"name": "a", "share": 1}, "x") == Row("a", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "a"}', r"a\.json: inner: got nothing; needs"),
        ('{"name": 3, "inner": {"steps": []}}', r"a\.json: name: got 3; needs: a valid string"),
        (
            '{"name": "a", "inner": {"steps": [1, "2"]}}',
            r"inner\.steps\.1: got '2'; needs: a valid",
        ),
        ('{"name": "a", "inner": {"steps": [true]}}', r"inner\.steps\.0: got True"),
        ('{"name": "a", "inner": {"steps": []}, "share": 1e999}', "share: got inf"),
        ('{"name": NaN}', "NaN has no JSON form"),
        ('{"name": "a"', "not valid JSON"),
        (100_000 * "[", "nested too deeply"),
        (f"{65 * '['}{65 * ']'}", "nested too deeply, with more than 64 levels"),
        (f"{64 * '['}{64 * ']'}", r"the whole: got \[\[\[\[\[\[\[\.\.\.\]"),
        ("[]", r"the whole: got \[\]"),
        ("9" * 5000, "not valid JSON"),
        ("\x00", "not valid JSON"),
    ],
)
def test_what_does_not_fit_is_named(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(BadFile, match=said):
        read_json(file, Outer)


@pytest.mark.parametrize("row", [{}, {"name": "a", "other": 1}, {"name": None}, [], "a", None])
def test_a_dataclass_takes_its_fields_alone(row: Any) -> None:
    with pytest.raises(BadFile, match=r"^lines:3: .*; needs"):
        checked(Row, row, "lines:3")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_message(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("any") / "a.json"
    file.write_bytes(content)
    with pytest.raises(BadFile, match=r"a\.json"):
        read_json(file, Outer)


def test_tables_come_back_and_a_link_is_followed_where_it_may_be(tmp_path: Path) -> None:
    file, link = tmp_path / "a.toml", tmp_path / "b.toml"
    link.symlink_to(file)
    with pytest.raises(FileMissing, match=r"a\.toml could not be read"):
        read_tables(file)
    file.write_text('[train]\nseed = 1\n[run]\ndir = "é"\n', encoding="utf-8")
    expected = {"train": {"seed": 1}, "run": {"dir": "é"}}
    assert read_tables(file) == read_tables(link, follow_link=True) == expected
    with pytest.raises(BadFile, match=r"b\.toml is a symbolic link to .*a\.toml"):
        read_tables(link)


@pytest.mark.parametrize(
    ("content", "came"),
    [
        (b"[train]\nseed = \n", "line 2"),
        (b"dir = '\xe9'\n", "can't decode byte 0xe9"),
        (b"x = " + 100_000 * b"[", "nested too deeply"),
        (b"[" + 2_999 * b"a." + b"a]\n", "nested too deeply"),
        (b"x = [{" + 2_999 * b"a." + b"a = 1}]\n", "nested too deeply"),
    ],
)
def test_what_is_no_toml_is_named(content: bytes, came: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    said = rf"a\.toml: not valid TOML \(.*{came}.*\); needs lines such as .*; mend it$"
    with pytest.raises(BadFile, match=said):
        read_tables(file, remedy="mend it")
