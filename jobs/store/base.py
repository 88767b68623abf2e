"""The one interface over every place that files come from and go to: a folder, S3, the Hub.

Key: a file's name below the store's place, with forward slashes, like `gguf/demo-Q8_0.gguf`. A key
is either absent or complete: nothing half-written is ever seen under it.

Every method raises AccessError where trying again would not help (refused, not there, a wrong
setting), ServiceError where the network or the service failed for longer than the retries, and
DoesNotFitError where this machine's disk is full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from jobs.store.hashing import FileEntry

Advance = Callable[[int], None]  # called with bytes as they are done; from any thread


def no_advance(count: int) -> None:
    """For who does not show how far it is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that a store has."""

    key: str
    size: int  # bytes
    identity: str  # another one whenever the bytes are others: "sha256:...", "etag:...", "git:..."


class Store(Protocol):
    url: str  # as people know the place; never with a secret in it

    def prove_readable(self) -> None:
        """Look whether the place is there and can be read."""

    def prove_writable(self, keep: bool) -> None:
        """Write and remove a probe. What has to be created for it (a folder, a repository) stays
        there where `keep` says so, and is removed again where not."""

    def entries(self) -> list[Entry]:
        """Every file there, sorted by key."""

    def fetch(self, entries: Sequence[Entry], folder: Path, advance: Advance) -> None:
        """Bring files to `folder`, each below its key and each whole, where they are not yet.

        What an earlier call that broke off has left there is gone on with.
        """

    def held(self, files: Sequence[FileEntry]) -> set[str]:
        """The keys of those files that are there with exactly these bytes."""

    def read_json(self, key: str) -> Any:
        """What a JSON file there says, or None where there is none or it is no JSON."""

    def send_ahead(self, folder: Path, files: Sequence[FileEntry], stopped: Event) -> None:
        """Send the bytes of large files from below `folder`, so that `replace` finds them there.

        Nobody sees anything of it before that. Ends soon where it is `stopped`; what has arrived by
        then counts all the same.
        """

    def forget_ahead(self) -> None:
        """Give back what was sent ahead and will not be part of any `replace`."""

    def replace(
        self, folder: Path, files: Sequence[FileEntry], stale: set[str], last: str, advance: Advance
    ) -> None:
        """Send files from below `folder`, remove the `stale` keys, and make `last` the last.

        Whoever sees `last` (a file in `folder` too, not among `files`) sees all the others. An
        older `last` is removed before anything else changes, unless everything changes at once.
        """


class KeyStore(Store, Protocol):
    """A store whose files are sent and removed one by one: a folder or S3, where checkpoints go."""

    def put(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        advance: Advance,
        prefix: str = "",
        threads: int = 1,
    ) -> None:
        """Send files from below `folder` to the same paths behind `prefix`, each whole."""

    def delete(self, keys: set[str]) -> None:
        """Remove keys; one that is not there is no error."""
