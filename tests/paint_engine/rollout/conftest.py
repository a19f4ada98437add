"""A server that answers as vLLM's does, but for one fault that a test switches on."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Json = dict[str, Any]
MIB = 1 << 20
HUGE_BYTES = 300 * MIB
# What a terminal would obey: a red text, and a new title of the window.
ESCAPES = "\x1b[31m\x1b]0;title\x07"
DRIP_S = 0.02
# What is no fault of a reply: the process is gone.
DEAD = "dead"


class FakeServer(ThreadingHTTPServer):
    """Serves one model on loopback.

    fault: the name of a fault, or None. applies: whether a request for a completion gets it.
    loads_adapters: whether it was started for that. served: what /v1/models replies.
    headers: of every request. asked: the path and the body of each with one. num_faults: how often
    the fault was applied. num_sent: the bytes of bodies that it could send.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fault: str | None = None
        self.applies: Callable[[Json], bool] = lambda request: True
        self.loads_adapters = True
        card = {"id": model, "root": model, "parent": None}
        self.served = json.dumps({"object": "list", "data": [card]}).encode()
        self.headers: list[dict[str, str]] = []
        self.asked: list[tuple[str, Json]] = []
        self.num_faults = self.num_sent = 0
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def requests(self) -> list[Json]:
        """Those for completions."""
        return [body for path, body in self.asked if path.endswith("/completions")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may hang up at any time."""


def good_choice(request: Json) -> Json:
    """A choice that fits the request: its length and its end depend on the seed."""
    limit, stops, seed = request["max_tokens"], request["stop_token_ids"], request["seed"]
    length = 1 + seed % limit
    ends = stops and length < limit
    token_ids = [20 + (seed + place) % 50 for place in range(length if ends else limit)]
    if ends:
        token_ids[-1] = stops[0]
    # With one candidate it is certain.
    logprob = 0.0 if request["top_k"] == 1 else -0.5
    logprobs = {"token_logprobs": [logprob] * len(token_ids), "top_logprobs": []}
    return {
        "index": 0,
        "text": "",
        "prompt_token_ids": request["prompt"],
        "token_ids": token_ids,
        "logprobs": None if request["logprobs"] is None else logprobs,
        "finish_reason": "stop" if ends else "length",
        "stop_reason": stops[0] if ends else None,
    }


def _lengthen(choice: Json, count: int) -> None:
    choice["token_ids"] = [20] * count
    if choice["logprobs"] is not None:
        choice["logprobs"]["token_logprobs"] = [-0.5] * count
    choice["finish_reason"] = "length"


def _with_logprob(value: object) -> Callable[[Json, Json], None]:
    return lambda choice, request: choice["logprobs"]["token_logprobs"].__setitem__(0, value)


def _with_id(value: object) -> Callable[[Json, Json], None]:
    return lambda choice, request: choice["token_ids"].__setitem__(0, value)


def _with(**fields: object) -> Callable[[Json, Json], None]:
    return lambda choice, request: choice.update(fields)


# Faults of a choice, by name: the twelve's first, then more of their kinds.
CHOICES: dict[str, Callable[[Json, Json], None]] = {
    "NaN": _with_logprob(float("nan")),
    "null": _with_logprob(None),
    "wrong type": _with(token_ids="many"),
    "id out of range": _with_id(10**6),
    "too long": lambda choice, request: _lengthen(choice, request["max_tokens"] + 1),
    "too short": lambda choice, request: _lengthen(choice, request["max_tokens"] - 1),
    "missing key": lambda choice, request: choice.pop("logprobs"),
    "changed prompt": lambda choice, request: choice["prompt_token_ids"].append(1),
    "no tokens": lambda choice, request: _lengthen(choice, 0),
    "one log-probability less": lambda choice, request: choice["logprobs"]["token_logprobs"].pop(),
    "true for an id": _with_id(True),
    "a float for an id": _with_id(20.0),
    "a text for an id": _with_id("20"),
    "a negative id": _with_id(-1),
    "an id of 400 digits": _with_id(10**400),
    "a positive log-probability": _with_logprob(0.5),
    "minus infinity": _with_logprob(-float("inf")),
    "vLLM's minus infinity": _with_logprob(-9999.0),
    "a number beyond float": _with_logprob(10**400),
    "a text for a log-probability": _with_logprob("-0.5"),
    "null for token ids": _with(token_ids=None),
    "no token ids": lambda choice, request: choice.pop("token_ids"),
    "aborted": _with(finish_reason="abort"),
    "no finish reason": _with(finish_reason=None),
    "stopped by nothing": _with(finish_reason="stop", token_ids=[20], logprobs={
        "token_logprobs": [-0.5]
    }),
    "past a stop token": lambda choice, request: (
        _lengthen(choice, request["max_tokens"]),
        choice["token_ids"].__setitem__(0, request["stop_token_ids"][0]),
    ),
    "nested lists": _with(logprobs=[[[[]]]]),
}  # fmt: skip
# Right for a reply, but not for one of a single candidate.
RAW = "a low log-probability"
# Faults of the body, by name.
BODIES: dict[str, bytes] = {
    "no JSON": b"<html>" + ESCAPES.encode(),
    "nothing": b"",
    "a list": b"[]",
    "no choices": b'{"choices": []}',
    "two choices": b'{"choices": [{}, {}]}',
    "nested too deep": b"[" * 100_000,
    "no UTF-8": b'{"choices": "\xff"}',
    "a number of 5000 digits": b'{"choices": 1' + b"0" * 5000 + b"}",
    "an error with status 200": b'{"error": {"message": "out of memory"}}',
    "a million wrong types": b'{"choices": [' + b"null," * 200_000 + b"null]}",
}
# Faults of the exchange, which `_Handler` has.
EXCHANGES = (
    *("300 MB", "slow drip", "5 MB error", "slow headers", "endless chunks", "a chunk of 1 EB"),
    *("300 MB announced", "ends early", "redirect", "many headers", "tiny chunks", "no HTTP"),
    *("a negative chunk", "refused", "an echo of the headers"),
)
TWELVE = (
    *("NaN", "null", "wrong type", "id out of range", "too long", "too short", "missing key"),
    *("no JSON", "changed prompt", "300 MB", "slow drip", "5 MB error"),
)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self._write(body)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.num_sent += len(data)

    def _drip(self, data: bytes) -> None:
        """Sends a byte at a time, without an end."""
        while not self.server.released.wait(DRIP_S):
            self._write(data)

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        self._send(self.server.served)

    def do_POST(self) -> None:
        self.server.headers.append(dict(self.headers))
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, request))
        if not self.path.endswith("/completions"):
            self._send(b"Success: it is done.", 200 if self.server.loads_adapters else 404)
            return
        choice, fault = good_choice(request), self.server.fault
        if fault is not None and self.server.applies(request):
            self.server.num_faults += 1
            if fault in EXCHANGES or fault == DEAD:
                self._exchange(fault)
                return
            if fault in BODIES:
                self._send(BODIES[fault])
                return
            (CHOICES | {RAW: _with_logprob(-2.5)})[fault](choice, request)
        self._send(json.dumps({"choices": [choice], "usage": {}}).encode())

    def _exchange(self, fault: str) -> None:
        self.close_connection = True
        match fault:
            case "dead":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "300 MB":
                self._send(b"", Content_Length=str(HUGE_BYTES))
                for _ in range(HUGE_BYTES // MIB):
                    self._write(b" " * MIB)
            case "300 MB announced":
                self._send(b"{}", Content_Length=str(HUGE_BYTES))
                self.server.released.wait()
            case "slow drip":
                self._send(b"", Content_Length=str(MIB))
                self._drip(b" ")
            case "5 MB error":
                self._send((ESCAPES * (5 * MIB // len(ESCAPES))).encode(), 500)
            case "slow headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                self._drip(b"x")
            case "many headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for _ in range(4000):
                    self._write(b"X-Header: " + b"x" * 1000 + b"\r\n")
            case "endless chunks":
                self._send(b"", Transfer_Encoding="chunked")
                for _ in range(HUGE_BYTES // MIB):
                    self._write(b"%x\r\n" % MIB + b" " * MIB + b"\r\n")
            case "tiny chunks":
                self._send(b"", Transfer_Encoding="chunked")
                for _ in range(HUGE_BYTES // MIB):
                    self._write(b"1\r\n \r\n" * (MIB // 6))
            case "a chunk of 1 EB":
                self._send(b"%x\r\n{}" % 10**18, Transfer_Encoding="chunked")
            case "a negative chunk":
                self._send(b"-5\r\n{}", Transfer_Encoding="chunked")
            case "ends early":
                self._send(b'{"choices": ', Content_Length="1000")
            case "redirect":
                self._send(b"", 307, Location=f"{self.server.url}/v1/elsewhere")
            case "refused":
                self._send(b'{"error": {"message": "too many tokens"}}', 400)
            case "an echo of the headers":
                self._send(json.dumps(dict(self.headers)).encode(), 401)
            case "no HTTP":
                self._write(ESCAPES.encode() * 20 + b"\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """The server answers inside."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(model_dir: Path) -> Iterator[FakeServer]:
    with serving(FakeServer(str(model_dir))) as server:
        yield server


@pytest.fixture
def start_server(model_dir: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts another server by (port=a free one, model=the test's)."""
    with ExitStack() as stack:

        def start(port: int = 0, model: str = str(model_dir)) -> FakeServer:
            return stack.enter_context(serving(FakeServer(model, port)))

        yield start


@pytest.fixture(scope="session")
def kill_server() -> Callable[[FakeServer], None]:
    """Ends a server as SIGKILL does: its requests in progress get no answer, later ones no
    connection. Any thread may call it."""

    def kill(server: FakeServer) -> None:
        server.fault, server.applies = DEAD, lambda request: True
        server.shutdown()
        server.server_close()

    return kill


@pytest.fixture(scope="session")
def all_faults() -> tuple[str, ...]:
    """The names of all faults."""
    return (*CHOICES, *BODIES, *EXCHANGES)
