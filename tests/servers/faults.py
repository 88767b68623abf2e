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

import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from tests.servers.fault_plan import DEFAULT_FAULTS, FAULTS, Fault, FaultPlan, Record
from tests.servers.http1 import (
    Body,
    Disconnected,
    Head,
    Reader,
    answer_body,
    client_head,
    close_gently,
    final_answer,
    has_ipv6_loopback,
    listen,
    request_body,
    reset,
)

__all__ = [
    "DEFAULT_FAULTS", "FAULTS", "Fault", "FaultProxy", "Record", "has_ipv6_loopback", "running_proxy",
]  # fmt: skip

TRUNCATED_FROM = 1024  # shorter bodies often arrive whole with their headers
UPSTREAM_TIMEOUT = 120.0

S3_CODES = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown", 400: "ExpiredToken"}


@dataclass
class _Request:
    client: socket.socket
    head: Head
    method: str
    body: Body
    record: Record
    keep_alive: bool

    @property
    def expects_continue(self) -> bool:
        return self.head.get("expect").lower() == "100-continue"

    @property
    def is_s3(self) -> bool:
        signed = self.head.get("authorization").startswith("AWS4-HMAC")
        return signed or "x-amz-signature=" in self.record.target.lower()


@dataclass(kw_only=True)
class FaultProxy(FaultPlan):
    """The running proxy: its addresses, its settings, its log."""

    upstream: str
    stall_s: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        address = urlsplit(self.upstream)
        if address.scheme != "http" or not address.hostname:
            raise ValueError(f"upstream must be http://HOST:PORT, not {self.upstream!r}")
        self._upstream = (address.hostname, address.port or 80)
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self._listeners = listen()
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
        reader = Reader(client)
        try:
            while (head := reader.head()) and self._exchange(client, reader, head):
                pass
        except (OSError, ValueError):
            pass  # the client has gone or does not speak HTTP
        finally:
            client.close()
            with self._lock:
                del self._connections[client]

    def _exchange(self, client: socket.socket, reader: Reader, head: Head) -> bool:
        """One request and its answer; whether the connection can be used for another."""
        method, target, version = head.start.split(" ")
        body = request_body(head, reader)
        record, decision = self.begin(method, target, head.get("range"), has_body=not body.is_empty)
        keep_alive = version == "HTTP/1.1" and "close" not in head.get("connection").lower()
        request = _Request(client, head, method, body, record, keep_alive)

        fault = decision.fault
        if fault in ("reset_before", "stall", "expired") or (fault and fault.startswith("status_")):
            self.inject(record, fault)
        if fault == "reset_before":
            reset(client)
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
            body.drain(record.receive)
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
        reader = Reader(upstream)
        try:
            head, status = final_answer(reader)
        except (OSError, ValueError):
            reset(client)  # upstream died on it: so does this
            return False
        record.upstream_status = status
        body = answer_body(head, reader, request.method, status)

        if fault == "truncate" and self._truncate(request, head, body):
            return False
        if fault:  # reset_after, or a body too short to be truncated
            body.drain()
            self.inject(record, "reset_after")
            reset(client)
            return False

        keep_alive = request.keep_alive and not body.ends_connection
        record.status = status
        client.sendall(client_head(head, keep_alive))
        try:
            for piece, content in body.pieces:
                record.sent += content
                client.sendall(piece)
        except Disconnected:
            reset(client)
            return False
        return keep_alive

    def _truncate(self, request: _Request, head: Head, body: Body) -> bool:
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
        self.inject(record, "truncate")
        record.status = int(head.start.split(" ")[1])
        client.sendall(client_head(head, keep_alive=False))
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
            reset(client)  # a plain close would pass for the end
        else:
            client.close()
        body.drain()
        return True

    def _cut_upload(self, request: _Request, upstream: socket.socket) -> None:
        """Pass on half of the body, or of what comes first if its length is not known."""
        self.inject(request.record, "upload_cut")
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
        reset(upstream)
        reset(request.client)

    def _stall(self, client: socket.socket, reader: Reader) -> None:
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
            request.body.drain(request.record.receive)
        keep_alive = request.keep_alive and not unread
        reason = HTTPStatus(status).phrase
        if request.is_s3 and status in S3_CODES:
            kind, code = "application/xml", S3_CODES[status]
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{reason}, said the fault proxy.</Message><RequestId>fault</RequestId></Error>'
        else:
            kind, text = "text/plain", f"{reason}, said the fault proxy.\n"
        head = Head(
            f"HTTP/1.1 {status} {reason}",
            [f"Content-Type: {kind}", f"Content-Length: {len(text)}", *extra],
        )
        request.record.status = status
        answer = client_head(head, keep_alive)
        if request.method != "HEAD":
            request.record.sent += len(text)
            answer += text.encode()
        request.client.sendall(answer)
        if unread:
            close_gently(request.client)
        return keep_alive


@contextmanager
def running_proxy(
    upstream: str, rate: float = 0.2, seed: int = 0, kinds: Sequence[Fault] = DEFAULT_FAULTS
) -> Iterator[FaultProxy]:
    """A proxy in front of `upstream` that fails a request with probability `rate`."""
    proxy = FaultProxy(upstream=upstream, rate=rate, seed=seed, kinds=kinds)
    try:
        yield proxy
    finally:
        proxy.close()
