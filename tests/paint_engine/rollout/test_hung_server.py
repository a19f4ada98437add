"""Servers that take requests and never answer: every wait has an end."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from paint_engine.distributed import World
from paint_engine.rollout import vllm_server as rollout_server
from paint_engine.rollout.engine import EngineDied, SamplingParams
from paint_engine.rollout.vllm_server import ServerEngine

Prompts = Sequence[tuple[int, ...]]
# A completion of this prompt is refused, even where all others hang.
REFUSED = (2, 2)


class _Server(ThreadingHTTPServer):
    """Fit for rollouts until `hangs` is set; then no answer comes before `released` is."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.hangs, self.released = threading.Event(), threading.Event()
        self.num_hanging = threading.Semaphore(0)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _reply(self, body: dict[str, Any], status: int = 200) -> None:
        if self.server.hangs.is_set() and status == 200:
            self.server.num_hanging.release()
            self.server.released.wait()
            # Whoever asked has hung up.
            self.close_connection = True
            return
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        card = {"id": self.server.model, "root": self.server.model, "parent": None}
        self._reply({"data": [card]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        length = request.get("max_tokens", 0)
        completion = {
            "prompt_token_ids": request.get("prompt"),
            "token_ids": [3] * length,
            "logprobs": {"token_logprobs": [0.0] * length},
            "finish_reason": "length",
        }
        refused = request.get("prompt") == list(REFUSED)
        self._reply({"choices": [completion]}, 400 if refused else 200)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(model_dir: Path) -> Iterator[_Server]:
    with _Server(str(model_dir)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def params() -> SamplingParams:
    return SamplingParams(0.8, 1.0, -1, 24, (), 340)


@pytest.fixture
def engine(
    server: _Server,
    lora_model: PeftModel,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ServerEngine]:
    monkeypatch.setattr(rollout_server, "_CONTROL_TIMEOUT_S", 0.5)
    engine = ServerEngine(
        [f"http://127.0.0.1:{server.server_port}"],
        lora_model,
        str(model_dir),
        World(0, 1, 0, torch.device("cpu")),
        max_sequences=4,
        adapter_dir=str(tmp_path),
        restart_timeout_s=2.0,
    )
    engine.sync(0)
    yield engine
    engine.close()


def wait_for_threads_to_end() -> None:
    """Those of a pool that still waited would keep the process from ending."""
    deadline = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t.name.startswith("completions")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_closing(engine: ServerEngine, server: _Server, tmp_path: Path) -> None:
    server.hangs.set()
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_one_that_does_not_come_back(engine: ServerEngine, server: _Server) -> None:
    assert engine.can_restart
    server.hangs.set()
    began = time.monotonic()
    with pytest.raises(EngineDied, match="has not returned within 2 s"):
        engine.restart()
    assert 2 <= time.monotonic() - began < 3


def test_an_adapter_that_is_not_read(
    engine: ServerEngine, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`restart` bounds the loading as it does the wait before."""
    server.hangs.set()
    monkeypatch.setattr(engine, "_is_healthy", lambda timeout_s: True)
    began = time.monotonic()
    with pytest.raises(EngineDied, match="TimeoutError"):
        engine.restart()
    assert 1.5 < time.monotonic() - began < 3
    monkeypatch.setattr(rollout_server, "_LOAD_TIMEOUT_S", 0.5)
    with pytest.raises(EngineDied, match="TimeoutError"):
        engine.sync(1)


def test_the_wait_for_an_answer_grows_with_its_length(
    engine: ServerEngine, server: _Server, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_server, "_ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(rollout_server, "_TOKEN_TIMEOUT_S", 0.05)
    assert len(engine.generate([(1,)] * 9, range(9), params)) == 9
    server.hangs.set()
    for max_new_tokens, bound in ((4, 0.4), (40, 2.2)):
        began = time.monotonic()
        with pytest.raises(EngineDied, match=r"is gone \(TimeoutError"):
            engine.generate([(1,)] * 9, range(9), replace(params, max_new_tokens=max_new_tokens))
        assert bound <= time.monotonic() - began < bound + 1
        wait_for_threads_to_end()


def test_closing_while_another_thread_waits_for_answers(
    engine: ServerEngine, server: _Server, params: SamplingParams
) -> None:
    server.hangs.set()
    with ThreadPoolExecutor(1) as pool:
        sampled = pool.submit(engine.generate, [(1,)] * 9, range(9), params)
        for _ in range(4):
            assert server.num_hanging.acquire(timeout=5)
        began = time.monotonic()
        engine.close()
        with pytest.raises(EngineDied, match="is gone"):
            sampled.result(timeout=5)
        assert time.monotonic() - began < 3
    wait_for_threads_to_end()
    # As when the thread that samples ahead had not yet begun.
    with pytest.raises(EngineDied, match="was aborted"):
        engine.generate([(1,)], [0], params)


def test_after_one_failure_nobody_waits_for_the_others(
    engine: ServerEngine, server: _Server, params: SamplingParams
) -> None:
    server.hangs.set()
    with pytest.raises(EngineDied, match="status 400"):
        engine.generate([REFUSED, (1,), (1,)], range(3), params)
    wait_for_threads_to_end()
