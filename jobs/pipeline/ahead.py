"""Sending what is made while the rest is being made: a run with a GPU that only uploads wastes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

from jobs.errors import LorajobError, VerificationError
from jobs.stages import Done
from jobs.store.base import Store
from jobs.store.hashing import FileEntry
from jobs.store.lease import Lease


class Ahead:
    """Sends the large files of stages to each target, on a thread for each.

    Nobody sees anything of it: publishing, which comes after verification, makes it visible and
    sends what is missing. So a failure here is none of the run's: publishing will meet it again, and
    tell of it.
    """

    def __init__(self, folder: Path, stores: Sequence[Store], lease: Lease) -> None:
        self._folder, self._lease, self._stores = folder, lease, stores
        self._stopped = Event()
        self._files: list[FileEntry] = []
        self._queues = [SimpleQueue[list[FileEntry] | None]() for _ in stores]
        self._threads = [
            Thread(target=self._send, args=each, name="ahead", daemon=True)
            for each in zip(stores, self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, done: Done) -> None:
        """Send the files of a stage, and those of earlier ones that another start had done. Where
        nothing is left to be made publishing comes at once, and nothing goes ahead."""
        self._files += done.files
        if not done.skipped:
            for queue in self._queues:
                queue.put(self._files)
            self._files = []

    def stop(self) -> None:
        """Begin nothing more; what is under way ends soon."""
        self._stopped.set()
        for queue in self._queues:
            queue.put(None)

    def wait(self) -> None:
        """Returns when nothing is being sent any more."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def forget(self) -> None:
        """Give back what was sent, because it will not be published."""
        self.wait()
        for store in self._stores:
            try:
                store.forget_ahead()
            except LorajobError:
                continue  # it costs some room there; what the run has to tell is worse

    def _send(self, store: Store, queue: SimpleQueue[list[FileEntry] | None]) -> None:
        while (files := queue.get()) is not None and not self._stopped.is_set():
            try:
                self._lease.require()
                store.send_ahead(self._folder, files, self._stopped)
            except Exception:  # of any kind: publishing does the same again, and tells
                return


@contextmanager
def sending_ahead(folder: Path, stores: Sequence[Store], lease: Lease) -> Iterator[Ahead]:
    """Within, stages are sent as they are added; after it nothing is.

    What was sent of a run that is found to be wrong is given back. Where a run ends otherwise it
    stays, for the next start goes on with it.
    """
    ahead = Ahead(folder, stores, lease)
    try:
        yield ahead
    except VerificationError:
        ahead.forget()
        raise
    except BaseException:
        ahead.stop()
        raise
    ahead.wait()
