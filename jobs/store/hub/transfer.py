"""Several files at a time, to and from the Hub's client, counting bytes on the way."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from jobs.store.base import Advance
from jobs.store.hashing import FileEntry

Step = Callable[[threading.Event], None]


class Stopped(Exception):
    """Another file failed, so this one is not gone on with."""


def run_all(steps: Sequence[Step], threads: int) -> None:
    """Do all steps. After the first error, or an interruption, those under way stop soon: a step
    watches the event that it is given."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, "hub") as pool:
        try:
            for future in as_completed([pool.submit(step, stop) for step in steps]):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Meter:
    """How much of one file is done. However often its bytes are sent, each counts once."""

    def __init__(self, size: int, advance: Advance) -> None:
        self.size, self._advance, self._done = size, advance, 0

    def at(self, position: int) -> None:
        position = min(position, self.size)
        if position > self._done:
            self._advance(position - self._done)
            self._done = position

    def finish(self) -> None:
        self.at(self.size)


class Bar:
    """A download's progress, in the shape of the bar that the client expects."""

    def __init__(self, meter: Meter, stop: threading.Event, initial: int = 0, **look: Any) -> None:
        self.n, self.total = initial, meter.size
        self._meter, self._stop, self._thread = meter, stop, threading.get_ident()

    def update(self, count: float | None = 1) -> None:
        # Xet's downloads call from a thread of their own, which no exception of ours may reach.
        if self._stop.is_set() and threading.get_ident() == self._thread:
            raise Stopped
        self.n += int(count or 0)
        self._meter.at(self.n)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Addition(CommitOperationAdd):
    """A file to send, whose bytes are counted as they go."""

    def __init__(self, path: str, source: Path, file: FileEntry, meter: Meter) -> None:
        super().__init__(path, source)
        self.upload_info.sha256 = bytes.fromhex(file["sha256"])  # or it is read once more for it
        self.size = file["size"]
        self.meter = meter
        self.stop = threading.Event()

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
        with _Watched(self) as file:
            yield file


class _Watched(io.BufferedReader):
    def __init__(self, addition: Addition) -> None:
        super().__init__(io.FileIO(str(addition.path_or_fileobj)))
        self._addition = addition

    def read(self, size: int | None = -1, /) -> bytes:
        if self._addition.stop.is_set():
            raise Stopped
        piece = super().read(size)
        self._addition.meter.at(self.tell())
        return piece
