"""A directory as a data set: nothing in it leads out of it."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from paint_engine.config.sections import ColumnsSection
from paint_engine.data.rows import LoadedProblems, load_problems

ROW = {"problem": "What is 1 + 1?", "solution": "It is \\boxed{2}.", "answer": "2"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def load(path: object) -> LoadedProblems:
    return load_problems(
        str(path),
        split="train",
        columns=ColumnsSection(),
        on_bad_row="stop",
        max_rows=None,
    )


def write_rows(file: Path, num: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(num * (json.dumps(ROW) + "\n"))


def card(configs: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  {configs}\n---\n# A data set\n"


@pytest.mark.parametrize(
    "configs",
    [
        "data_files: {url}/x.jsonl",
        "data_files: [a.jsonl, {url}/x.jsonl]",
        "data_files:\n  - split: train\n    path: {url}/x.jsonl",
        "data_files:\n  - split: train\n    path: [a.jsonl, 'zip://x::{url}/x.zip']",
        "data_files: /etc/passwd",
        "data_files: ../other/*.jsonl",
        "data_files: ~/x.jsonl",
        "data_files: hf://datasets/a/b/x.jsonl",
        "data_dir: {url}/x",
        "data_dir: ../other",
    ],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_names_nothing_outside(
    name: str, configs: str, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = server
    write_rows(tmp_path / "sub" / "a.jsonl")
    text = card(configs.format(url=url))
    text = text.split("---\n")[1] if name != "README.md" else text
    (tmp_path / "sub" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"--data\.path .*sub: {name} names .* below it; put"):
        load(tmp_path / "sub")
    assert asked == []


@pytest.mark.parametrize("spelled", ["sub", "./sub", "sub:default", "json", "./json", "json/"])
def test_every_spelling_of_a_directory_is_checked(
    spelled: str,
    server: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sub", "json"):
        write_rows(tmp_path / name / "a.jsonl")
        (tmp_path / name / "README.md").write_text(card(f"data_files: {server[0]}/x.jsonl"))
    with pytest.raises(ValueError, match=r"README\.md names|is the name of a file format"):
        load(spelled)
    assert server[1] == []
    (tmp_path / "json" / "README.md").unlink()
    if "/" in spelled and "json" in spelled:
        assert len(load(spelled).problems) == 2


@pytest.mark.parametrize("spelled", ["json", "JSON", "json:default", "parquet", "Pandas:x"])
def test_no_spelling_of_a_file_format_is_a_data_set(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.json")
    with pytest.raises(ValueError, match="is the name of a file format"):
        load(spelled)


@pytest.mark.parametrize(
    "text",
    [
        "---\n- [\n---\n",
        "---\nconfigs: !!python/object:os.system {}\n---\n",
        b"\xff\xfe".decode("latin1"),
    ],
)
def test_a_card_that_cannot_be_read_is_named_or_ignored(text: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "sub" / "a.jsonl")
    (tmp_path / "sub" / "README.md").write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"README\.md cannot be read \(.*; needs YAML"):
        load(tmp_path / "sub")


def test_real_directories_are_read(tmp_path: Path) -> None:
    plain, split, named = tmp_path / "plain", tmp_path / "split", tmp_path / "named"
    write_rows(plain / "a.jsonl", 3)
    write_rows(split / "train.jsonl", 2)
    write_rows(split / "test.jsonl", 5)
    (split / "README.md").write_text("# No head, and a rule\n\n---\n")
    write_rows(named / "data" / "one.jsonl", 4)
    write_rows(named / "other.jsonl", 1)
    head = "data_files:\n  - split: train\n    path: data/*.jsonl"
    (named / "README.md").write_text(card(head).replace("---\n", "---\nlicense: mit\n", 1))
    sizes = [len(load(directory).problems) for directory in (plain, split, named)]
    assert sizes == [3, 2, 4]


def test_a_column_that_names_files_to_open_is_left_out(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    """Of a Parquet file too, whose head may declare the types."""
    url, asked = server
    (tmp_path / "sub").mkdir()
    table = pyarrow.Table.from_pylist([ROW | {"picture": {"path": f"{url}/x.png", "bytes": None}}])
    text = {"dtype": "string", "_type": "Value"}
    features = {**dict.fromkeys(ROW, text), "picture": {"_type": "Image"}}
    head = {"huggingface": json.dumps({"info": {"features": features}})}
    table = table.replace_schema_metadata(head)
    pyarrow.parquet.write_table(table, tmp_path / "sub" / "a.parquet")
    assert load(tmp_path / "sub").problems[0].problem == ROW["problem"]
    assert asked == []


def test_a_path_below_an_unknown_user_is_no_file() -> None:
    with pytest.raises(ValueError, match=r"data\.path ~nosuchuser/x\.jsonl: there is no such file"):
        load("~nosuchuser/x.jsonl")
