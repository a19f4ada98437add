"""Requests to a server whose replies are not trusted: bounded in bytes and in time, and quoted only
cut and cleaned."""

import http.client
import io
import ipaddress
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from paint_engine.files import one_line

KEY_VARIABLE = "VLLM_API_KEY"
"""the environment variable with the server's key; vLLM reads the same one"""
MAX_BODY_BYTES = 1 << 20
"""of a reply that is not a completion's"""
# For connecting, TLS included.
_CONNECT_TIMEOUT_S = 10.0
# Beside the body: status line, headers, and the frames of a body in chunks.
_HEAD_BYTES = 1 << 16
# What is read of an error's body, which is at most quoted.
_ERROR_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 16
_MAX_QUOTED_CHARS = 300


class BadReply(Exception):
    """A reply that is not what the protocol says."""


class Refused(Exception):
    """A reply with an error status."""

    def __init__(self, status: int, body: bytes) -> None:
        redirects = " (a redirect, which is not followed)" if 300 <= status < 400 else ""
        super().__init__(f"status {status}{redirects}: {quoted(body)}")
        self.status = status


def quoted(text: str | bytes) -> str:
    """Returns the start of a server's text, without control characters, and without the key, which
    a server may repeat."""
    # A character has up to four bytes.
    start = text[: 4 * _MAX_QUOTED_CHARS + 4]
    whole = start.decode(errors="replace") if isinstance(start, bytes) else start
    if key := read_key():
        whole = whole.replace(key, f"({KEY_VARIABLE})")
    clean = one_line(whole[: _MAX_QUOTED_CHARS + 1])
    return clean if len(clean) <= _MAX_QUOTED_CHARS else f"{clean[:_MAX_QUOTED_CHARS]}..."


def read_key() -> str | None:
    """Returns the server's key from the environment, without surrounding whitespace; None if there
    is none. Raises ValueError, which does not show it, for a key that HTTP cannot send."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= char <= "~" for char in key):
        raise ValueError(
            f"{KEY_VARIABLE} (its value is not shown) has a space, a line break or a character "
            "outside ASCII within it; needs visible ASCII characters alone; set it again"
        )
    return key or None


def is_sent_openly(url: str) -> bool:
    """Returns whether what is sent to a server can be read by others on the network."""
    parts = urlsplit(url)
    is_local = parts.hostname == "localhost"
    with suppress(ValueError):
        is_local = ipaddress.ip_address(parts.hostname or "").is_loopback
    return parts.scheme == "http" and not is_local


class Calls:
    """Running requests that can be aborted together, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: set[socket.socket] = set()
        self._over = False

    @contextmanager
    def counted(self, line: socket.socket) -> Iterator[None]:
        """Returns a context in which the connection waits for its answer. Raises OSError once these
        calls are aborted."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("this request was aborted")
            self._lines.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._lines.remove(line)

    def hang_up(self) -> None:
        """Ends all of these requests, and any later ones, with an OSError."""
        with self._lock:
            self._over = True
            for line in self._lines:
                # The server may have closed the connection first.
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)


class _Incoming(io.RawIOBase):
    """What comes over a connection: so many bytes at most, until a deadline.

    A socket's own timeout bounds each packet, so a byte a second would never exceed it.
    """

    def __init__(self, line: socket.socket, deadline: float, num_bytes: int) -> None:
        self._line = line
        self._deadline = deadline
        self._num_left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._num_left:
            raise BadReply("the reply is longer than anything that was asked for")
        self._line.settimeout(_time_left(self._deadline))
        count = self._line.recv_into(memoryview(buffer)[: self._num_left])
        self._num_left -= count
        return count


class _BoundedLine:
    """A connection as http.client uses it."""

    def __init__(self, line: socket.socket, deadline: float, num_bytes: int) -> None:
        self._line = line
        self._deadline = deadline
        self._incoming = _Incoming(line, deadline, num_bytes)

    def sendall(self, data: bytes) -> None:
        self._line.settimeout(_time_left(self._deadline))
        self._line.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(self._incoming, _BLOCK_BYTES)

    def close(self) -> None:
        """Does nothing: whoever opened the connection closes it, after the reply has been read."""


def _time_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Server:
    """JSON over HTTP with one connection per request. It can be used from several threads.

    url: as `rollout.url`, which is checked with the configuration.

    Raises ValueError for a key that HTTP cannot send.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._headers = {"Content-Type": "application/json"}
        if key := read_key():
            self._headers["Authorization"] = f"Bearer {key}"

    def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float,
        max_bytes: int = MAX_BODY_BYTES,
        calls: Calls | None = None,
    ) -> tuple[int, bytes]:
        """Returns status and body; of an error's body, the start.

        timeout_s: bounds the whole exchange, from connecting to the body's last byte.
        max_bytes: bounds the body of a success.

        Raises OSError or HTTPException if there is no whole reply in time, and BadReply for a
        longer one. Redirects are not followed: another server would get the key.
        """
        deadline = time.monotonic() + timeout_s
        data = None if body is None else json.dumps(body).encode()
        # The request bypasses proxies of the environment: the server is one of the run's own
        # machines.
        connection = http.client.HTTPConnection(self._host, self._port)
        with ExitStack() as stack:
            line = self._connect(min(timeout_s, _CONNECT_TIMEOUT_S), stack)
            stack.enter_context((calls or Calls()).counted(line))
            connection.sock = _BoundedLine(line, deadline, max_bytes + _HEAD_BYTES)
            try:
                connection.request(method, self._path + path, data, self._headers)
                response = connection.getresponse()
                return response.status, _read_body(response, max_bytes)
            except TimeoutError as error:
                raise TimeoutError(f"no whole reply within {timeout_s:g} s") from error

    def _connect(self, timeout_s: float, stack: ExitStack) -> socket.socket:
        plain = socket.create_connection((self._host, self._port), timeout_s)
        stack.enter_context(plain)
        if self._tls is None:
            return plain
        # Unlike reading, a handshake has the socket's timeout as a whole.
        return stack.enter_context(self._tls.wrap_socket(plain, server_hostname=self._host))

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, **bounds: Any
    ) -> bytes:
        """Returns the body of a success. Raises Refused for any other status; see `send`."""
        status, content = self.send(method, path, body, **bounds)
        if status != 200:
            raise Refused(status, content)
        return content


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Returns the body of a success, and the start of an error's."""
    succeeded = response.status == 200
    if succeeded and (response.length or 0) > max_bytes:
        raise BadReply(f"the reply has {response.length} bytes; needs at most {max_bytes}")
    blocks, num_left = [], max_bytes + 1 if succeeded else _ERROR_BYTES
    try:
        # In blocks, since http.client allocates at once what a header or a chunk announces.
        while num_left and (block := response.read(min(_BLOCK_BYTES, num_left))):
            blocks.append(block)
            num_left -= len(block)
    except ValueError as error:
        raise BadReply(f"the reply's chunks are not HTTP's ({quoted(str(error))})") from error
    if succeeded and not num_left:
        raise BadReply(f"the reply has more than {max_bytes} bytes")
    if succeeded and response.length:
        raise ConnectionError(f"the reply ended {response.length} bytes early")
    return b"".join(blocks)
