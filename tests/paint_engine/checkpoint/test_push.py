"""Adapters pushed to a stand-in for the hub on this machine, and runs that cannot push."""

import base64
import json
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants

from paint_engine.checkpoint.directory import mark_best
from paint_engine.checkpoint.push import push_adapter
from paint_engine.config.command_line import load_config
from paint_engine.config.sections import ModelSection

Main = Callable[[Sequence[str]], int]
REPO = "someone/my.adapter"
TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """Takes new repositories and commits with files in them. `status` answers commits."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[list[dict[str, Any]]]
    commits: ClassVar[list[dict[str, bytes]]]
    messages: ClassVar[list[str]]
    tokens: ClassVar[set[str | None]]
    status: ClassVar[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        here = f"http://{self.headers['Host']}/{REPO}"
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer(200, {"url": here, "name": REPO, "id": "1"})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path == f"/api/models/{REPO}/commit/main":
            if self.status == 200:
                self.take(body)
            url = f"{here}/commit/{'0' * 40}"
            self.answer(
                self.status, {"commitUrl": url, "commitOid": "0" * 40, "error": "no\nright"}
            )
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.answer(404, {"error": self.path})

    def take(self, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            else:
                assert line["key"] == "file" and line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits.append(files)

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repositories, Hub.commits, Hub.messages, Hub.tokens, Hub.status = [], [], [], set(), 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pushing(command: list[str]) -> list[str]:
    return [*command, "--train.num_steps", "2", "--run.push_to_hub", REPO]


def test_a_run_pushes_its_adapter_with_a_card(
    hub: type[Hub],
    pushing: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(pushing) == 0
    (repository,) = hub.repositories
    assert (repository["name"], repository["organization"]) == ("my.adapter", "someone")
    assert repository.get("private") is True or repository.get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"} and hub.messages == ["Adapter after 2 steps"]
    (files,) = hub.commits
    # The only evaluated checkpoint is the last, so that no other is the best.
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    last = tmp_path / "run" / "checkpoints" / "step-2"
    assert files["adapter_model.safetensors"] == (last / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    card, summary = files["README.md"].decode(), tmp_path / "run" / "summary.json"
    after = json.loads(summary.read_text())["avg_at_k_after"]
    assert card.startswith("---\nlibrary_name: peft\n") and "| recipe | paint |" in card
    assert f"| Avg@2 after | {after:.1%} of 3 held-out problems |" in card
    printed = " ".join(capsys.readouterr().out.split())
    assert "pushed the adapter to http" in printed
    # The token is nowhere in what the run leaves.
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_another_best_checkpoint_is_pushed_beside_the_last(
    hub: type[Hub], command: list[str], run_main: Main, tmp_path: Path, model_dir: Path
) -> None:
    own = ["--train.num_steps", "2", "--checkpoint.every", "1", "--eval.enabled", "false"]
    assert run_main([*command, *own]) == 0
    run_dir = tmp_path / "run"
    mark_best(run_dir, 1)
    base = ModelSection(name_or_path=str(model_dir))
    assert push_adapter(run_dir, base, REPO, "A run", {}).startswith("pushed the adapter to http")
    (files,) = hub.commits
    for folder, step in (("", 2), ("best/", 1)):
        kept = run_dir / "checkpoints" / f"step-{step}" / "adapter_model.safetensors"
        assert files[f"{folder}adapter_model.safetensors"] == kept.read_bytes()
    assert "`best/` has the adapter after 1 steps" in files["README.md"].decode()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_push_leaves_the_run_whole_and_says_how_to_push(
    status: int,
    hub: type[Hub],
    pushing: list[str],
    run_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.status = status
    assert run_main(pushing) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"note: the adapter was not pushed to {REPO}: " in printed and str(status) in printed
    assert "the run is finished and saved; push it with: python -m paint_engine.export" in printed
    assert TOKEN not in printed
    assert (tmp_path / "run" / "summary.json").is_file() and hub.commits == []


def test_without_an_answer_the_run_ends_all_the_same(
    hub: type[Hub],
    command: list[str],
    run_main: Main,
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ["--train.num_steps", "1", "--eval.enabled", "false"]
    assert run_main([*command, *own]) == 0
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = push_adapter(
        tmp_path / "run", ModelSection(name_or_path=str(model_dir)), REPO, "A run", {}
    )
    assert line.startswith(f"note: the adapter was not pushed to {REPO}: ConnectError")
    by_hand = line.partition("push it with: ")[2]
    export, _, upload = by_hand.partition(" && ")
    assert shlex.split(upload) == ["hf", "upload", "--private", REPO, "run-adapter"]
    assert shlex.split(export)[3:] == [str(tmp_path / "run"), "run-adapter", "--form", "adapter"]


@pytest.mark.parametrize(
    ("variable", "message"),
    [("HF_TOKEN", "no token of the Hugging Face Hub"), ("offline", "with HF_HUB_OFFLINE set")],
)
def test_a_run_that_could_not_push_is_refused_at_the_start(
    variable: str,
    message: str,
    hub: type[Hub],
    pushing: list[str],
    run_main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", variable == "offline")
    if variable == "HF_TOKEN":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert run_main(pushing) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"error: run.push_to_hub: got {REPO}" in printed and message in printed
    assert not (tmp_path / "run" / "config.toml").exists() and hub.repositories == []


@pytest.mark.parametrize(
    "name",
    [
        *("adapter", "a/b/c", "/b", "a/", "a b/c", "a/b.git", "a/b--c", ".a/b", "a/b-"),
        *("a/é", "a/../b", "https://huggingface.co/a/b", "a/" + "b" * 95, "a/b\n"),
    ],
)
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.push_to_hub: .*needs .* as user/name"):
        load_config(["--run.push_to_hub", name])


def test_only_adapters_are_pushed() -> None:
    with pytest.raises(ValueError, match=r"run\.push_to_hub: got a/b with lora\.enabled false"):
        load_config(["--run.push_to_hub", "a/b", "--lora.enabled", "false"])
    assert load_config(["--run.push_to_hub", "a/b-c_D.1"]).config.run.push_to_hub == "a/b-c_D.1"
    assert load_config([]).config.run.push_to_hub is None
