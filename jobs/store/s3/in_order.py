"""The sha256 of a file whose pieces are written in any order, found out while they are."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

PIECE = (
    1 << 18
)  # bytes; what stays in a processor's cache from the one who receives to the one who hashes
LENT = (
    32  # pieces that are hashed from memory; what comes further ahead is read from the disk later
)


class InOrder:
    """Hashes on a thread of its own, so that whoever receives does not wait for it.

    Pieces follow each other without a gap or an overlap. One that arrives when its turn is near is
    hashed as it lies in memory; one that is far ahead is read again later, from the disk's cache.
    """

    def __init__(
        self,
        descriptor: int,
        size: int,
        at: int,
        hash: Any,
        every: int,
        reached: Callable[[int, str], None],
    ) -> None:
        """`hash` has seen the first `at` bytes. `reached` hears of each multiple of `every` that it
        gets to, and of the end, with the sha256 of all before it; from the hashing thread."""
        self._descriptor, self._size, self._at, self._hash = descriptor, size, at, hash
        self._every, self._reached = every, reached
        self._changed = threading.Condition()
        self._written: dict[int, int] = {}  # where a piece begins -> bytes
        self._near: dict[int, memoryview] = {}
        self._free = [memoryview(bytearray(PIECE)) for _ in range(LENT)]
        self._failed: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="hash", daemon=True)
        self._thread.start()

    def wrote(self, at: int, count: int, buffer: memoryview) -> memoryview:
        """A piece is on the disk, and still in the buffer. Returns the buffer for the next one."""
        with self._changed:
            self._written[at] = count
            if self._free and at - self._at < LENT * PIECE:
                self._near[at] = buffer
                buffer = self._free.pop()
            self._changed.notify()
        return buffer

    def digest(self) -> str:
        """The sha256 of all, once every piece was written. Raises what reading them raised."""
        self._thread.join()
        if self._failed:
            raise self._failed
        return str(self._hash.hexdigest())

    def close(self) -> None:
        """End without the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        again = memoryview(bytearray(PIECE))
        try:
            while self._at < self._size:
                with self._changed:
                    while self._at not in self._written and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    count = self._written.pop(self._at)
                    near = self._near.pop(self._at, None)
                if near is None:
                    read_whole(self._descriptor, again[:count], self._at)
                self._hash_on((again if near is None else near)[:count])
                with self._changed:
                    self._at += count
                    if near is not None:
                        self._free.append(near)
        except BaseException as error:
            self._failed = error

    def _hash_on(self, piece: memoryview) -> None:
        at = self._at
        while piece:
            count = min(len(piece), self._every - at % self._every)
            self._hash.update(piece[:count])
            at, piece = at + count, piece[count:]
            if not at % self._every or at == self._size:
                self._reached(at, self._hash.copy().hexdigest())


def read_whole(descriptor: int, buffer: memoryview, at: int) -> None:
    """Fill the buffer from the file. Raises OSError where the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], at)
        if not count:
            raise OSError(errno.EIO, "the file became shorter")
        buffer, at = buffer[count:], at + count


def hashed_so_far(descriptor: int, marks: list[tuple[int, str]]) -> tuple[int, Any]:
    """How far a file is as `marks` say (ascending places, each with the sha256 of all before it), and
    the hash of that much."""
    good, at, hash = 0, 0, hashlib.sha256()
    whole = hash.copy()
    buffer = memoryview(bytearray(PIECE))
    for mark, said in marks:
        while at < mark:
            count = min(PIECE, mark - at)
            try:
                read_whole(descriptor, buffer[:count], at)
            except OSError:
                return good, whole
            hash.update(buffer[:count])
            at += count
        if hash.hexdigest() != said:
            break
        good, whole = mark, hash.copy()
    return good, whole
