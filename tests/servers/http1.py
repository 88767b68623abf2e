"""HTTP/1.1 as far as a proxy needs it: where a message ends, and nothing of what is in it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

BUFFER = 1 << 18
MAX_HEAD = 1 << 16


class Disconnected(ConnectionError):
    """The other side ended the connection in the middle of a message."""


class Reader:
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

    def head(self) -> Head | None:
        """The start line and headers of the next message; None when the connection has ended."""
        head = bytearray()
        while piece := self.peek():
            before = len(head)
            head += piece
            end = head.find(b"\r\n\r\n", max(0, before - 3))
            if end >= 0:
                self.take(end + 4 - before)
                start, *lines = head[:end].decode("latin-1").split("\r\n")
                return Head(start, lines)
            self.take(len(piece))
            if len(head) > MAX_HEAD:
                raise Disconnected("headers without an end")
        if head:
            raise Disconnected("ended within the headers")
        return None


@dataclass(frozen=True)
class Head:
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
class Body:
    """A body on its way: raw pieces, each with the bytes of content in it.

    With chunked transfer the pieces hold the framing as well, and the length is None.
    """

    pieces: Iterator[tuple[memoryview, int]]
    length: int | None
    ends_connection: bool = False  # neither a length nor chunks: only the close tells the end

    @property
    def is_empty(self) -> bool:
        return self.length == 0

    def drain(self, count: Callable[[int], object] = lambda content: None) -> None:
        """Read what is left; `count` hears how much content each piece brings."""
        for _, content in self.pieces:
            count(content)


def _sized(reader: Reader, length: int) -> Iterator[tuple[memoryview, int]]:
    while length:
        piece = reader.peek()[:length]
        if not piece:
            raise Disconnected("ended within the body")
        reader.take(len(piece))
        length -= len(piece)
        yield piece, len(piece)


def _chunked(reader: Reader) -> Iterator[tuple[memoryview, int]]:
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


def _until_end(reader: Reader) -> Iterator[tuple[memoryview, int]]:
    while piece := reader.peek():
        reader.take(len(piece))
        yield piece, len(piece)


def request_body(head: Head, reader: Reader) -> Body:
    if "chunked" in head.get("transfer-encoding").lower():
        return Body(_chunked(reader), None)
    length = int(head.get("content-length") or 0)
    return Body(_sized(reader, length), length)


def answer_body(head: Head, reader: Reader, method: str, status: int) -> Body:
    if method == "HEAD" or status in (204, 304):
        return Body(iter(()), 0)
    if "chunked" in head.get("transfer-encoding").lower():
        return Body(_chunked(reader), None)
    if length := head.get("content-length"):
        return Body(_sized(reader, int(length)), int(length))
    return Body(_until_end(reader), None, ends_connection=True)


def final_answer(reader: Reader) -> tuple[Head, int]:
    while True:
        head = reader.head()
        if not head:
            raise Disconnected("no answer")
        status = int(head.start.split(" ")[1])
        if status >= 200:  # what comes before it was answered by the proxy
            return head, status


def client_head(head: Head, keep_alive: bool) -> bytes:
    """The answer's headers for the client, whose connection is not the one to upstream."""
    rest = head.start.partition(" ")[2]
    return head.encode(
        f"HTTP/1.1 {rest}",
        without=("connection", "keep-alive"),
        extra=() if keep_alive else ("Connection: close",),
    )


def reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN: what a client sees when the other machine dies."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def close_gently(sock: socket.socket) -> None:
    """Close after an early answer, reading on for a while: unread bytes would turn it into a reset."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(1)
        while sock.recv(BUFFER):
            pass


def listen() -> list[socket.socket]:
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
