"""Requests to a server whose replies are not trusted: bounded in bytes and in time, and quoted only
cut and cleaned."""

import http.client
import io
import ipaddress
import json
import reprlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from paint_engine.files import one_line
from paint_engine.keys import SERVER_KEY, read_key

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
# Interval between checks of a server that is starting.
_POLL_S = 1.0

T = TypeVar("T")


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
        whole = whole.replace(key, f"({SERVER_KEY})")
    clean = one_line(whole[: _MAX_QUOTED_CHARS + 1])
    return clean if len(clean) <= _MAX_QUOTED_CHARS else f"{clean[:_MAX_QUOTED_CHARS]}..."


class _Shown(reprlib.Repr):
    """Takes the key out of texts and numbers before it shortens them: of a key that is cut, a part
    would be left."""

    def repr_str(self, x: str, level: int) -> str:
        return repr(quoted(x))

    def repr_int(self, x: int, level: int) -> str:
        # Python writes no number of more than 4,300 digits.
        return quoted(repr(x)) if x.bit_length() < 10_000 else "a number of thousands of digits"

    def repr_float(self, x: float, level: int) -> str:
        return quoted(repr(x))


def shown_value(value: object) -> str:
    """Returns the start of a value of a server's reply, as `quoted` does of a text."""
    return quoted(value if isinstance(value, str | bytes) else _Shown().repr(value))


def is_sent_openly(url: str) -> bool:
    """Returns whether what is sent to a server can be read by others on the network."""
    parts = urlsplit(url)
    is_local = parts.hostname == "localhost"
    with suppress(ValueError):
        is_local = ipaddress.ip_address(parts.hostname or "").is_loopback
    return parts.scheme == "http" and not is_local


class Requests:
    """Running requests that can be aborted together, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._parts: list[Requests] = []
        self._over = False

    @property
    def is_over(self) -> bool:
        """Whether these requests were aborted."""
        return self._over

    def part(self) -> "Requests":
        """Returns requests that can be aborted by themselves, and are aborted with these."""
        part = Requests()
        with self._lock:
            part._over = self._over
            self._parts.append(part)
        return part

    @contextmanager
    def tracked(self, connection: socket.socket) -> Iterator[None]:
        """Returns a context in which the connection waits for its answer. Raises OSError once these
        requests are aborted."""
        with self._lock:
            if self._over:
                raise ConnectionAbortedError("this request was aborted")
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(connection)

    def abort(self) -> None:
        """Ends all of these requests, and any later ones, with an OSError."""
        with self._lock:
            self._over = True
            for part in self._parts:
                part.abort()
            for connection in self._open:
                # The server may have closed it first.
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def ask_at_once(
    ask: Callable[[int], T], num_asked: int, num_at_once: int, requests: Requests
) -> Generator[tuple[int, T]]:
    """Yields an index from 0 to num_asked - 1 with what `ask` returns for it, as they come.

    requests: those of `ask`, which are aborted at the end. To be closed, so that the others end
        with the first failure: nobody needs their answers then.
    """
    pool = ThreadPoolExecutor(num_at_once, thread_name_prefix="completions")
    try:
        places = {pool.submit(ask, index): index for index in range(num_asked)}
        for future in as_completed(places):
            yield places[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        requests.abort()


class _Incoming(io.RawIOBase):
    """What comes over a connection: so many bytes at most, until a deadline.

    A socket's own timeout bounds each packet, so a byte a second would never exceed it.
    """

    def __init__(self, connection: socket.socket, deadline: float, num_bytes: int) -> None:
        self._socket = connection
        self._deadline = deadline
        self._num_left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._num_left:
            raise BadReply("the reply is longer than anything that was asked for")
        self._socket.settimeout(_time_left(self._deadline))
        count = self._socket.recv_into(memoryview(buffer)[: self._num_left])
        self._num_left -= count
        return count


class _BoundedSocket:
    """A connection as http.client uses it."""

    def __init__(self, connection: socket.socket, deadline: float, num_bytes: int) -> None:
        self._socket = connection
        self._deadline = deadline
        self._incoming = _Incoming(connection, deadline, num_bytes)

    def sendall(self, data: bytes) -> None:
        # With TLS, `sendall` would wait for the whole timeout at each packet.
        rest = memoryview(data)
        while rest:
            self._socket.settimeout(_time_left(self._deadline))
            rest = rest[self._socket.send(rest) :]

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


def _connect_to_any(addresses: list[Any], deadline: float) -> socket.socket:
    """Returns a connection to the first address that answers.

    addresses: of `socket.getaddrinfo`. `socket.create_connection` would give each the whole time.
    """
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_time_left(deadline))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


class Server:
    """JSON over HTTP with one connection per request. It can be used from several threads.

    url: as one of `rollout.url`, which is checked with the configuration.

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
        requests: Requests | None = None,
    ) -> tuple[int, bytes]:
        """Returns status and body; of an error's body, the start.

        timeout_s: bounds the whole exchange, from connecting to the body's last byte. The lookup of
            the host's name has the system's own bound.
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
            try:
                opened = self._connect(deadline, stack)
                stack.enter_context((requests or Requests()).tracked(opened))
                connection.sock = _BoundedSocket(opened, deadline, max_bytes + _HEAD_BYTES)
                connection.request(method, self._path + path, data, self._headers)
                response = connection.getresponse()
                return response.status, _read_body(response, max_bytes)
            except TimeoutError as error:
                raise TimeoutError(f"no whole reply within {timeout_s:g} s") from error

    def _connect(self, deadline: float, stack: ExitStack) -> socket.socket:
        addresses = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        deadline = min(deadline, time.monotonic() + _CONNECT_TIMEOUT_S)
        plain = stack.enter_context(_connect_to_any(addresses, deadline))
        if self._tls is None:
            return plain
        # Unlike reading, a handshake has the socket's timeout as a whole.
        plain.settimeout(_time_left(deadline))
        return stack.enter_context(self._tls.wrap_socket(plain, server_hostname=self._host))

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, **bounds: Any
    ) -> bytes:
        """Returns the body of a success. Raises Refused for any other status; see `send`."""
        status, content = self.send(method, path, body, **bounds)
        if status != 200:
            raise Refused(status, content)
        return content

    def is_healthy(self, timeout_s: float) -> bool:
        """Returns whether the server answers and its engine is alive."""
        try:
            return self.send("GET", "/health", timeout_s=timeout_s)[0] == 200
        except (OSError, http.client.HTTPException, BadReply):
            return False


def returns_in_time(
    is_healthy: Callable[[float], bool], deadline: float, ping_timeout_s: float
) -> bool:
    """Waits for a server to be healthy, and returns whether it is before the deadline of
    `time.monotonic`.

    is_healthy: asks it, for at most so many seconds.
    """
    while (left := deadline - time.monotonic()) > 0:
        if is_healthy(min(left, ping_timeout_s)):
            return True
        time.sleep(min(left, _POLL_S))
    return False


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
