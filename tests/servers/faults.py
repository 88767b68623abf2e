"""A reverse proxy on loopback that breaks some of the requests that pass through it.

It stands in front of a test S3 server or a Hub double, so that a client's retries, resumed
transfers and error texts meet what a real network does:

    reset_before   the connection is reset before anything is answered; upstream never sees the request
    reset_after    upstream handles the whole request, then the connection is reset unanswered
    truncate       the answer's headers are whole, its body ends half-way
    stall          nothing is answered for `stall_s` seconds, then the connection closes
    status_429     an answer of the proxy's own, with `Retry-After: 0` or `1`
    status_500, status_503, status_504   the same; S3's XML where the request is signed as S3's are
    upload_cut     half of the request's body is read and passed on, then both sides are reset
    expired        the credentials are no longer good: ExpiredToken from S3, else 401; only on request

Which requests fail depends on the seed and on the request alone (what is asked for, and how many
times it was asked for before), not on the order in which threads happen to send them. The same
request is never failed more than `max_consecutive` times in a row, so a client with sane retries
always gets through.

Everything else passes unchanged, Host included because S3's signatures cover it, and streamed, so
that bodies of any size go through in constant memory.
"""

from __future__ import annotations

import random
import re
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal[
    "reset_before", "reset_after", "truncate", "stall", "status_429", "status_500", "status_503",
    "status_504", "upload_cut", "expired",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)
DEFAULT_FAULTS = tuple(fault for fault in FAULTS if fault != "expired")

BUFFER = 1 << 18
MAX_HEAD = 1 << 16
TRUNCATED_FROM = 1024  # shorter bodies often arrive whole with their headers
UPSTREAM_TIMEOUT = 120.0

# Parts of a query that a server or a clock makes up: they differ from run to run.
MADE_UP = re.compile(r"(uploadid|x-amz-\w+(-\w+)*)=", re.IGNORECASE)

S3_CODES = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown", 400: "ExpiredToken"}


class Disconnected(ConnectionError):
    """The other side ended the connection in the middle of a message."""


@dataclass
class Record:
    """One request as the proxy saw it. It is in the log from its arrival on, and grows."""

    method: str
    target: str  # path and query
    received: int = 0  # bytes of the request's body; what a stall swallows is not counted
    sent: int = 0  # bytes of the answer's body given to the client
    status: int | None = None  # what the client was answered; None for nothing
    upstream_status: int | None = None  # what upstream answered; None if it was not asked or broke
    fault: Fault | None = None


@dataclass
class _Planted:
    fault: Fault
    match: str
    left: int


@dataclass(frozen=True)
class _Decision:
    fault: Fault | None
    retry_after: int  # for status_429, drawn with the fault


# --- HTTP/1.1 as far as a proxy needs it -------------------------------------------------------


class _Reader:
    """Reads one side of a connection into a buffer that is used again and again."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def peek(self) -> memoryview:
        """What has arrived and was not taken; waits for more if there is none; empty at the end.

        The view holds until the next `peek`.
        """
        if self._start == self._end:
            self._start, self._end = 0, self._sock.recv_into(self._buffer)
        return self._view[self._start : self._end]

    def find_newline(self, at: int) -> int:
        """Where in the view of the last `peek` the next line ends, or -1."""
        found = self._buffer.find(b"\n", self._start + at, self._end)
        return found - self._start if found >= 0 else -1

    def take(self, count: int) -> None:
        self._start += count

    def head(self) -> _Head | None:
        """The start line and headers of the next message; None when the connection has ended."""
        head = bytearray()
        while piece := self.peek():
            before = len(head)
            head += piece
            end = head.find(b"\r\n\r\n", max(0, before - 3))
            if end >= 0:
                self.take(end + 4 - before)
                start, *lines = head[:end].decode("latin-1").split("\r\n")
                return _Head(start, lines)
            self.take(len(piece))
            if len(head) > MAX_HEAD:
                raise Disconnected("headers without an end")
        if head:
            raise Disconnected("ended within the headers")
        return None


@dataclass(frozen=True)
class _Head:
    start: str
    lines: list[str]  # as they came, so that what is signed stays as it was

    def get(self, name: str) -> str:
        """The header's value, or an empty string."""
        for line in self.lines:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return ""

    def encode(self, start: str, without: Sequence[str], extra: Sequence[str] = ()) -> bytes:
        kept = [line for line in self.lines if line.partition(":")[0].lower() not in without]
        return "\r\n".join([start, *kept, *extra, "", ""]).encode("latin-1")


@dataclass(frozen=True)
class _Body:
    """A body on its way: raw pieces, each with the bytes of content in it.

    With chunked transfer the pieces hold the framing as well, and the length is None.
    """

    pieces: Iterator[tuple[memoryview, int]]
    length: int | None
    ends_connection: bool = False  # neither a length nor chunks: only the close tells the end

    @property
    def is_empty(self) -> bool:
        return self.length == 0

    def drain(self, record: Record | None = None) -> None:
        for _, content in self.pieces:
            if record:
                record.received += content


def _sized(reader: _Reader, length: int) -> Iterator[tuple[memoryview, int]]:
    while length:
        piece = reader.peek()[:length]
        if not piece:
            raise Disconnected("ended within the body")
        reader.take(len(piece))
        length -= len(piece)
        yield piece, len(piece)


def _chunked(reader: _Reader) -> Iterator[tuple[memoryview, int]]:
    """Follow the chunks to know where the body ends; the bytes themselves pass as they are."""
    line = bytearray()  # a size or a trailer, which may lie across two pieces
    left = 0  # of the current chunk, its closing CRLF included
    in_trailers = ended = False
    while not ended:
        view = reader.peek()
        if not view:
            raise Disconnected("ended within a chunked body")
        at = content = 0
        while at < len(view) and not ended:
            if left:
                step = min(left, len(view) - at)
                content += max(0, min(step, left - 2))
                left -= step
                at += step
                continue
            newline = reader.find_newline(at)
            end = newline + 1 if newline >= 0 else len(view)
            line += view[at:end]
            at = end
            if newline < 0:
                continue
            text = bytes(line).strip()
            line.clear()
            if in_trailers:
                ended = not text
            elif size := int(text.partition(b";")[0], 16):
                left = size + 2
            else:
                in_trailers = True
        reader.take(at)
        yield view[:at], content


def _until_end(reader: _Reader) -> Iterator[tuple[memoryview, int]]:
    while piece := reader.peek():
        reader.take(len(piece))
        yield piece, len(piece)


def _request_body(head: _Head, reader: _Reader) -> _Body:
    if "chunked" in head.get("transfer-encoding").lower():
        return _Body(_chunked(reader), None)
    length = int(head.get("content-length") or 0)
    return _Body(_sized(reader, length), length)


def _answer_body(head: _Head, reader: _Reader, method: str, status: int) -> _Body:
    if method == "HEAD" or status in (204, 304):
        return _Body(iter(()), 0)
    if "chunked" in head.get("transfer-encoding").lower():
        return _Body(_chunked(reader), None)
    if length := head.get("content-length"):
        return _Body(_sized(reader, int(length)), int(length))
    return _Body(_until_end(reader), None, ends_connection=True)


def _reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN: what a client sees when the other machine dies."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- the proxy ---------------------------------------------------------------------------------


@dataclass
class _Request:
    client: socket.socket
    head: _Head
    method: str
    body: _Body
    record: Record
    keep_alive: bool

    @property
    def expects_continue(self) -> bool:
        return self.head.get("expect").lower() == "100-continue"

    @property
    def is_s3(self) -> bool:
        signed = self.head.get("authorization").startswith("AWS4-HMAC")
        return signed or "x-amz-signature=" in self.record.target.lower()


@dataclass
class FaultProxy:
    """The running proxy: its addresses, its settings (which may change at any time), its log."""

    upstream: str
    rate: float
    seed: int
    kinds: Sequence[Fault]
    match: str = ""
    """A regular expression: random faults hit only requests whose `METHOD /path?query` it finds."""
    stall_s: float = 3.0
    max_consecutive: int = 3
    """Planted faults do not keep to it; they count towards it."""
    injected: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        address = urlsplit(self.upstream)
        if address.scheme != "http" or not address.hostname:
            raise ValueError(f"upstream must be http://HOST:PORT, not {self.upstream!r}")
        self._upstream = (address.hostname, address.port or 80)
        self._lock = threading.Lock()
        self._log: list[Record] = []
        self._paused = False
        self._planted: list[_Planted] = []
        self._asked: Counter[str] = Counter()
        self._failed_in_a_row: Counter[str] = Counter()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self._listeners = _listen()
        self.port: int = self._listeners[0].getsockname()[1]
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def localhost(self) -> str:
        """The same proxy under another host name."""
        return f"http://localhost:{self.port}"

    @property
    def log(self) -> list[Record]:
        """All requests so far, in the order in which they arrived."""
        with self._lock:
            return list(self._log)

    @property
    def bytes_up(self) -> int:
        return sum(record.received for record in self.log)

    @property
    def bytes_down(self) -> int:
        return sum(record.sent for record in self.log)

    def pause(self) -> None:
        """Let everything through, planted faults too."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def fail(self, kind: Fault, match: str = "", times: int = 1) -> None:
        """Fail the next `times` requests that `match` finds, before any random fault.

        Several calls are worked off in their order. `upload_cut` waits for a request with a body.
        """
        with self._lock:
            self._planted.append(_Planted(kind, match, times))

    def close(self) -> None:
        self._closing.set()
        self._wake_writer.send(b"x")
        self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
        for sock in connections:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join(timeout=5)
        for sock in (*self._listeners, self._wake_reader, self._wake_writer):
            sock.close()

    # Which request fails, and how.

    def _begin(
        self, method: str, head: _Head, target: str, body: _Body
    ) -> tuple[Record, _Decision]:
        """Log the request and decide about it."""
        record = Record(method, target)
        what = f"{method} {target}"
        key = _identity(method, target, head.get("range"))
        with self._lock:
            self._log.append(record)
            if self._paused:
                return record, _Decision(None, 0)
            decision = self._planted_fault(what, body) or self._drawn_fault(what, key, body)
            if decision.fault:
                self._failed_in_a_row[key] += 1
            else:
                self._failed_in_a_row[key] = 0
        return record, decision

    def _planted_fault(self, what: str, body: _Body) -> _Decision | None:
        for planted in self._planted:
            if planted.fault == "upload_cut" and body.is_empty:
                continue
            if planted.left > 0 and re.search(planted.match, what):
                planted.left -= 1
                return _Decision(planted.fault, 0)
        return None

    def _drawn_fault(self, what: str, key: str, body: _Body) -> _Decision:
        if not re.search(self.match, what):
            return _Decision(None, 0)
        self._asked[key] += 1
        # A generator for each request, not one for all: threads then cannot change who is hit.
        draw = random.Random(f"{self.seed} {self._asked[key]} {key}")
        hit = draw.random() < self.rate
        kinds = [kind for kind in self.kinds if not (kind == "upload_cut" and body.is_empty)]
        if not hit or not kinds or self._failed_in_a_row[key] >= self.max_consecutive:
            return _Decision(None, 0)
        return _Decision(draw.choice(kinds), draw.randrange(2))

    def _inject(self, record: Record, fault: Fault) -> None:
        """Note a fault just before it is carried out, so that who meets it finds it counted."""
        with self._lock:
            record.fault = fault
            self.injected[fault] += 1

    # Connections.

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ, None)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            while not self._closing.is_set():
                for key, _ in selector.select():
                    if key.data is None:  # only woken up, to end
                        continue
                    with suppress(OSError):
                        client, _ = key.data.accept()
                        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                        with self._lock:
                            self._connections[client] = thread
                        thread.start()

    def _serve(self, client: socket.socket) -> None:
        reader = _Reader(client)
        try:
            while (head := reader.head()) and self._exchange(client, reader, head):
                pass
        except (OSError, ValueError):
            pass  # the client has gone or does not speak HTTP
        finally:
            client.close()
            with self._lock:
                del self._connections[client]

    def _exchange(self, client: socket.socket, reader: _Reader, head: _Head) -> bool:
        """One request and its answer; whether the connection can be used for another."""
        method, target, version = head.start.split(" ")
        body = _request_body(head, reader)
        record, decision = self._begin(method, head, target, body)
        keep_alive = version == "HTTP/1.1" and "close" not in head.get("connection").lower()
        request = _Request(client, head, method, body, record, keep_alive)

        fault = decision.fault
        if fault in ("reset_before", "stall", "expired") or (fault and fault.startswith("status_")):
            self._inject(record, fault)
        if fault == "reset_before":
            _reset(client)
            return False
        if fault == "stall":
            self._stall(client, reader)
            return False
        if fault == "expired":
            return self._refuse(request, 400 if request.is_s3 else 401)
        if fault and fault.startswith("status_"):
            status = int(fault.removeprefix("status_"))
            extra = [f"Retry-After: {decision.retry_after}"] if status == 429 else []
            return self._refuse(request, status, extra)

        if request.expects_continue:
            # Answered here, because the upload has to start before upstream is asked anything.
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            upstream = socket.create_connection(self._upstream, timeout=UPSTREAM_TIMEOUT)
        except OSError:
            body.drain(record)
            return self._refuse(request, 502)
        # A connection for each request: one kept open may be closed by upstream just as it is used
        # again, a fault that nobody has planted.
        with upstream:
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream.sendall(head.encode(head.start, without=("expect",)))
            if fault == "upload_cut":
                self._cut_upload(request, upstream)
                return False
            return self._forward(request, upstream, fault)

    def _forward(self, request: _Request, upstream: socket.socket, fault: Fault | None) -> bool:
        record, client = request.record, request.client
        upstream_takes_more = True
        for piece, content in request.body.pieces:
            record.received += content
            if upstream_takes_more:
                try:
                    upstream.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    upstream_takes_more = False  # it has answered already: a refusal, most likely
        reader = _Reader(upstream)
        try:
            head, status = _final_answer(reader)
        except (OSError, ValueError):
            _reset(client)  # upstream died on it: so does this
            return False
        record.upstream_status = status
        body = _answer_body(head, reader, request.method, status)

        if fault == "truncate" and self._truncate(request, head, body):
            return False
        if fault:  # reset_after, or a body too short to be truncated
            body.drain()
            self._inject(record, "reset_after")
            _reset(client)
            return False

        keep_alive = request.keep_alive and not body.ends_connection
        record.status = status
        client.sendall(_client_head(head, keep_alive))
        try:
            for piece, content in body.pieces:
                record.sent += content
                client.sendall(piece)
        except Disconnected:
            _reset(client)
            return False
        return keep_alive

    def _truncate(self, request: _Request, head: _Head, body: _Body) -> bool:
        """Send the headers and half of the body; False if the body is too short for it.

        Of a body that does not say its length, it is half of what comes first.
        """
        first = bytearray()
        content_seen = 0
        for piece, content in body.pieces:
            first += piece
            content_seen += content
            if content_seen > TRUNCATED_FROM:
                break
        if content_seen <= TRUNCATED_FROM:
            return False
        record, client = request.record, request.client
        self._inject(record, "truncate")
        record.status = int(head.start.split(" ")[1])
        client.sendall(_client_head(head, keep_alive=False))
        left = len(first) // 2 if body.length is None else body.length // 2
        record.sent += min(left, len(first))
        client.sendall(first[:left])
        left -= min(left, len(first))
        while left:
            piece, _ = next(body.pieces)
            record.sent += len(piece[:left])
            client.sendall(piece[:left])
            left -= len(piece[:left])
        if body.ends_connection:
            _reset(client)  # a plain close would pass for the end
        else:
            client.close()
        body.drain()
        return True

    def _cut_upload(self, request: _Request, upstream: socket.socket) -> None:
        """Pass on half of the body, or of what comes first if its length is not known."""
        self._inject(request.record, "upload_cut")
        left = None if request.body.length is None else request.body.length // 2
        for piece, content in request.body.pieces:
            if left is None:
                part = piece[: len(piece) // 2]
                request.record.received += content // 2
                upstream.sendall(part)
                break
            part = piece[:left]
            request.record.received += len(part)
            upstream.sendall(part)
            left -= len(part)
            if not left:
                break
        _reset(upstream)
        _reset(request.client)

    def _stall(self, client: socket.socket, reader: _Reader) -> None:
        """Read what comes and say nothing, until the time is over or the client has gone."""
        until = time.monotonic() + self.stall_s
        while not self._closing.is_set() and (left := until - time.monotonic()) > 0:
            client.settimeout(min(left, 0.1))
            with suppress(TimeoutError):
                piece = reader.peek()
                if not piece:
                    return
                reader.take(len(piece))

    def _refuse(self, request: _Request, status: int, extra: Sequence[str] = ()) -> bool:
        """Answer with an error of the proxy's own; whether the connection can be used again."""
        # Whoever waits for "100 Continue" sends no body after an error, as far as one can know.
        unread = request.expects_continue and not request.body.is_empty
        if not unread:
            request.body.drain(request.record)
        keep_alive = request.keep_alive and not unread
        reason = HTTPStatus(status).phrase
        if request.is_s3 and status in S3_CODES:
            kind, code = "application/xml", S3_CODES[status]
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{reason}, said the fault proxy.</Message><RequestId>fault</RequestId></Error>'
        else:
            kind, text = "text/plain", f"{reason}, said the fault proxy.\n"
        head = _Head(
            f"HTTP/1.1 {status} {reason}",
            [f"Content-Type: {kind}", f"Content-Length: {len(text)}", *extra],
        )
        request.record.status = status
        answer = _client_head(head, keep_alive)
        if request.method != "HEAD":
            request.record.sent += len(text)
            answer += text.encode()
        request.client.sendall(answer)
        if unread:
            _close_gently(request.client)
        return keep_alive


def _listen() -> list[socket.socket]:
    """Listen on 127.0.0.1, and on ::1 with the same port where there is one.

    `localhost` may mean either, and a client tries ::1 first: nobody else may listen there.
    """
    while True:
        listeners = [socket.create_server(("127.0.0.1", 0), backlog=128)]
        port = listeners[0].getsockname()[1]
        if not has_ipv6_loopback():
            return listeners
        try:
            listeners.append(
                socket.create_server(("::1", port), family=socket.AF_INET6, backlog=128)
            )
        except OSError:
            listeners[0].close()  # someone has this port there: take another
        else:
            return listeners


def has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _identity(method: str, target: str, byte_range: str) -> str:
    """What makes two requests the same one, tried again or repeated in another run."""
    path, _, query = target.partition("?")
    fixed = sorted(part for part in query.split("&") if part and not MADE_UP.match(part))
    return " ".join([method, path, *fixed, byte_range])


def _final_answer(reader: _Reader) -> tuple[_Head, int]:
    while True:
        head = reader.head()
        if not head:
            raise Disconnected("no answer")
        status = int(head.start.split(" ")[1])
        if status >= 200:  # what comes before it was answered by the proxy
            return head, status


def _client_head(head: _Head, keep_alive: bool) -> bytes:
    """The answer's headers for the client, whose connection is not the one to upstream."""
    rest = head.start.partition(" ")[2]
    return head.encode(
        f"HTTP/1.1 {rest}",
        without=("connection", "keep-alive"),
        extra=() if keep_alive else ("Connection: close",),
    )


def _close_gently(sock: socket.socket) -> None:
    """Close after an early answer, reading on for a while: unread bytes would turn it into a reset."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(1)
        while sock.recv(BUFFER):
            pass


@contextmanager
def running_proxy(
    upstream: str, rate: float = 0.2, seed: int = 0, kinds: Sequence[Fault] = DEFAULT_FAULTS
) -> Iterator[FaultProxy]:
    """A proxy in front of `upstream` that fails a request with probability `rate`."""
    proxy = FaultProxy(upstream, rate, seed, kinds)
    try:
        yield proxy
    finally:
        proxy.close()
