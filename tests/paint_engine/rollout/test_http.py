"""Keys and addresses: what is sent to whom, and what is never shown."""

import shlex
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from paint_engine.config.sections import RolloutSection
from paint_engine.keys import read_key
from paint_engine.rollout.choose import server_notes
from paint_engine.rollout.http import Server, quoted
from paint_engine.rollout.vllm_server import serve_command

SECRET = "sk-s3cret-of-the-server"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("", None), (" \n", None), (SECRET, SECRET), (f" {SECRET}\r\n", SECRET)],
)
def test_the_key_is_stripped(
    value: str | None, expected: str | None, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_API_KEY", value)
    assert read_key() == expected
    Server(server.url).request("GET", "/v1/models", timeout_s=5)
    sent = server.headers[-1].get("Authorization")
    assert sent == (None if expected is None else f"Bearer {SECRET}")


@pytest.mark.parametrize("mark", ["\n", "\r\nX-Injected: 1", " ", "é", "\x7f"])
def test_a_key_that_http_cannot_send_is_refused_and_not_shown(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", f"s3cret{mark}s3cret")
    for use in (read_key, lambda: Server("http://node7"), lambda: server_notes(section("node7"))):
        with pytest.raises(ValueError, match=r"VLLM_API_KEY .* needs visible ASCII") as raised:
            use()
        assert "s3cret" not in repr(raised.value)


def section(host: str, scheme: str = "http") -> RolloutSection:
    return RolloutSection(url=(f"{scheme}://{host}:8000",))


def test_a_key_that_goes_over_a_network_openly_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    (note,) = server_notes(section("node7"))
    assert "VLLM_API_KEY goes unencrypted to http://node7:8000" in note and SECRET not in note
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "[::1]"):
        assert server_notes(section(host)) == []
    assert server_notes(section("node7", "https")) == server_notes(RolloutSection()) == []
    monkeypatch.delenv("VLLM_API_KEY")
    assert server_notes(section("node7")) == []


def test_a_redirect_gets_no_key(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    server.fault = "redirect"
    request = {"max_tokens": 1, "stop_token_ids": [], "seed": 0, "top_k": -1, "prompt": [1]}
    request["logprobs"] = None
    status, _ = Server(server.url).send("POST", "/v1/completions", request, timeout_s=5)
    assert status == 307 and len(server.headers) == 1


def test_quotes_are_cut_and_clean() -> None:
    assert quoted("plain") == quoted(b"plain") == "plain"
    assert quoted(b"\x1b[31mred\xff\n") == "\\x1b[31mred\ufffd\\n"
    for text in ("x" * 10**6, "\x1b" * 10**6, "\u202e" * 301, "é" * 301):
        for whole in (text, text.encode()):
            assert len(quoted(whole)) == 303 and quoted(whole).isprintable()


def test_a_key_that_a_server_repeats_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    assert quoted(f"no such key: Bearer {SECRET}!") == "no such key: Bearer (VLLM_API_KEY)!"
    for before in range(280, 310):
        assert "s3cret" not in quoted("x" * before + SECRET)


@pytest.mark.parametrize(
    ("url", "flags"),
    [
        ("http://localhost:8000", "--host 127.0.0.1 --port 8000"),
        ("http://[::1]:9", "--host ::1 --port 9"),
        ("http://node7", "--host node7 --port 80"),
        ("https://node7", "--host node7 --port 443"),
    ],
)
def test_the_command_binds_an_address_and_needs_a_key(
    url: str, flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    path = f"{tmp_path}/a model; rm x"
    command = serve_command(url, path, 16)
    assert flags in command and SECRET not in command
    assert ("--ssl-certfile" in command) == url.startswith("https")
    words = shlex.split(command)
    assert words[:2] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "VLLM_API_KEY=${VLLM_API_KEY:?}"]
    assert words[2:5] == ["vllm", "serve", path]
    assert "--max-lora-rank 16 --logprobs-mode processed_logprobs" in command


def test_the_deadline_bounds_all_addresses_of_a_host_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        # Its queue is full then, and the system leaves further connections without an answer.
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", deaf.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **kind: [address] * 4)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"^no whole reply within 1 s$"):
            Server("http://node7").request("GET", "/v1/models", timeout_s=1.0)
        # 4 s with a timeout for each address.
        assert time.monotonic() - began < 3.0
