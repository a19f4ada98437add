"""Training and evaluation with a server that is faulty from some reply on: the run is saved, ends
with one message, and continues once the server is mended."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from paint_engine.files import read_jsonl
from paint_engine.rollout import vllm_server

Main = Callable[[Sequence[str]], int]
TWELVE = (
    *("NaN", "null", "wrong type", "id out of range", "too long", "too short", "missing key"),
    *("no JSON", "changed prompt", "300 MB", "slow drip", "5 MB error"),
)
# As in the fixture `command`.
TRAINING_TOKENS, EVALUATION_TOKENS = 12, 6


def places(server: Any, tmp_path: Path) -> list[str]:
    """What a command line has to name each time."""
    return ["--rollout.url", server.url, "--rollout.adapter_dir", str(tmp_path / "adapters")]


@pytest.fixture
def served(
    command: list[str], server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The arguments of a run with the server."""
    monkeypatch.setattr(vllm_server, "_ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(vllm_server, "_TOKEN_TIMEOUT_S", 0.0)
    (tmp_path / "adapters").mkdir()
    place = places(server, tmp_path)
    return [*command, "--rollout.engine", "vllm", "--rollout.max_sequences", "2", *place]


def fail(server: Any, fault: str | None, num_tokens: int, after: int) -> None:
    """The server is faulty after so many good completions of this length."""
    server.fault, server.num_good = fault, 0

    def applies(request: dict[str, Any]) -> bool:
        if request["max_tokens"] != num_tokens:
            return False
        server.num_good += 1
        return server.num_good > after

    server.applies = applies


def numbers(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(("seconds", "tokens_"))}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def check_ending(text: str, server: Any) -> None:
    """What a run says that the server has ended."""
    assert f"the rollout engine failed (the server at {server.url} " in text
    assert "; saved " in text and "resume with: " in text
    assert "Traceback" not in text and "error:" not in text
    assert all(line.isprintable() for line in text.splitlines())


def test_training_is_saved_and_continues(
    served: list[str],
    server: Any,
    run_main: Main,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_main([*served, "--run.dir", str(tmp_path / "undisturbed")]) == 0
    capfd.readouterr()
    # In the third step of four, of three rollouts each.
    fail(server, "null", TRAINING_TOKENS, after=7)
    assert run_main(served) == 1
    text = capfd.readouterr()
    check_ending(text.out, server)
    assert text.err.count("it is restarted once") == 1 and "Traceback" not in text.err
    assert "step-2" in text.out and server.num_faults >= 2
    # One wrong reply costs a restart.
    fail(server, "changed prompt", TRAINING_TOKENS, after=1)
    faulty, server.num_faults = server.applies, 0
    server.applies = lambda request: server.num_faults == 0 and faulty(request)
    assert run_main(["--resume", str(tmp_path / "run"), *places(server, tmp_path)]) == 0
    assert server.num_faults == 1 and "it is restarted once" in capfd.readouterr().err
    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")


def test_a_run_goes_on_when_one_of_its_servers_dies(
    served: list[str],
    server: Any,
    start_server: Callable[..., Any],
    kill_server: Callable[[Any], None],
    run_main: Main,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_main([*served, "--run.dir", str(tmp_path / "undisturbed")]) == 0
    second = start_server()
    urls = ["--rollout.url", f"{server.url},{second.url}"]

    def sampled(one: Any) -> int:
        asked = [body for path, body in one.asked if path.endswith("/completions")]
        return sum(body["max_tokens"] == TRAINING_TOKENS for body in asked)

    def third_step_is_reached(request: dict[str, Any]) -> bool:
        if sampled(second) < 4:
            return False
        kill_server(second)
        return True

    server.asked.clear()
    second.fault, second.applies = "dead", third_step_is_reached
    capfd.readouterr()
    assert run_main([*served, *urls]) == 0
    text = capfd.readouterr()
    assert text.err.count("its requests go to the other servers until it returns") == 1
    assert f"the server at {second.url} is gone" in text.err
    assert "restarted once" not in text.err and "Traceback" not in text.err
    # Four steps of three rollouts, in equal shares until the fourth request to the second server,
    # beside which the fifth may be under way.
    assert sampled(server) == 12 - 3 and sampled(second) in (4, 5)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")
    assert (
        str([server.url, second.url]).replace("'", '"')
        in (tmp_path / "run" / "config.toml").read_text()
    )


def test_finished_answers_of_an_evaluation_are_kept(
    served: list[str],
    server: Any,
    run_main: Main,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Three problems with two answers each, before training.
    fail(server, "slow drip", EVALUATION_TOKENS, after=3)
    assert run_main(served) == 1
    check_ending(capfd.readouterr().out, server)
    kept = [
        line
        for file in (tmp_path / "run" / "evaluations").glob("step-0*")
        for line in read_jsonl(file)
        if "sample_index" in line
    ]
    assert len(kept) >= 2
    asked: list[dict[str, Any]] = []
    server.fault, server.applies = "null", lambda request: asked.append(request)
    assert run_main(["--resume", str(tmp_path / "run"), *places(server, tmp_path)]) == 0
    answers = [request for request in asked if request["max_tokens"] == EVALUATION_TOKENS]
    # Those of step 0 that are left, and those after the last step.
    assert len(answers) == 6 - len(kept) + 6


def test_planted_keys_are_found_nowhere(served: list[str], server: Any, tmp_path: Path) -> None:
    keys = {name: f"s3cret-{name}" for name in ("VLLM_API_KEY", "WANDB_API_KEY", "HF_TOKEN")}
    settled = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WANDB_MODE": "offline"}
    # What W&B keeps outside the run's directory is searched too.
    for place in ("CACHE", "CONFIG", "DATA"):
        settled[f"WANDB_{place}_DIR"] = str(tmp_path / "wandb's" / place)
    # First a whole run with its report, then one that the server ends, repeating the key.
    for name, fault in (("whole", None), ("ended", "an echo of the headers")):
        fail(server, fault, TRAINING_TOKENS, after=4)
        settings = ["--run.dir", str(tmp_path / name), "--run.wandb_project", "paint"]
        with (tmp_path / f"{name}.txt").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "paint_engine.train", *served, *settings],
                env=os.environ | keys | settled,
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        printed = (tmp_path / f"{name}.txt").read_text()
        assert done.returncode == (0 if fault is None else 1), printed
    assert "Bearer (VLLM_API_KEY)" in printed
    (sent,) = {headers["Authorization"] for headers in server.headers}
    assert sent == "Bearer s3cret-VLLM_API_KEY"
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in left}
    assert {"config.toml", "versions.json", "report.html", "metrics.jsonl"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert [file for file in left if b"s3cret" in file.read_bytes()] == []


@pytest.mark.skipif(
    "PAINT_ALL_SERVERS" not in os.environ, reason="takes a minute; set PAINT_ALL_SERVERS"
)
@pytest.mark.parametrize("num_tokens", [TRAINING_TOKENS, EVALUATION_TOKENS])
@pytest.mark.parametrize("fault", TWELVE)
def test_each_of_the_twelve(
    fault: str,
    num_tokens: int,
    served: list[str],
    server: Any,
    run_main: Main,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """PAINT_ALL_SERVERS=1 pytest -s prints a table of seconds and of the memory that each adds."""
    fail(server, fault, num_tokens, after=1)
    process, peak, ended = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    began, before = time.monotonic(), process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = run_main([*served, "--train.num_steps", "1"])
    ended.set()
    watcher.join()
    seconds, added_mib = time.monotonic() - began, (peak - before) / 2**20
    text = capfd.readouterr().out
    last = next(line for line in text.splitlines() if "failed (" in line)
    with capfd.disabled():
        kind = "training" if num_tokens == TRAINING_TOKENS else "evaluation"
        print(
            f"| {fault} | {kind} | exit {code} | {seconds:.1f} s | {added_mib:.0f} MiB | {last} |"
        )
    assert code == 1 and seconds < 30
    check_ending(text, server)
