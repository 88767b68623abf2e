"""Files of a bucket or of the Hub that are brought here when they are needed, and kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from jobs.errors import DoesNotFitError
from jobs.store.base import Advance, Entry, Store, no_advance
from jobs.store.cache import cache_folder
from jobs.store.hashing import key_of
from jobs.store.local import disk_error, existing


@dataclass(frozen=True)
class Remote:
    """Some files of a store, as they were when it was listed."""

    store: Store
    entries: tuple[Entry, ...]

    @property
    def identity(self) -> str:
        """Another one whenever a file or its content is another."""
        return key_of([[entry.key, entry.identity] for entry in self.entries])

    @property
    def folder(self) -> Path:
        """Where the files are brought to. Other contents get another folder."""
        name = self.store.url.rstrip("/").rpartition("/")[2].partition("@")[0] or "files"
        return cache_folder() / "fetched" / f"{name[:40]}-{self.identity[:16]}"

    def missing(self) -> list[Entry]:
        """Those that are not here yet: a file is under its name only when it is whole."""
        return [entry for entry in self.entries if not (self.folder / entry.key).exists()]

    def bring(self, entries: Sequence[Entry] | None = None, advance: Advance = no_advance) -> Path:
        """The folder, with these files in it, or with all.

        Runs that share the cache wait for each other. Raises DoesNotFitError before anything is
        fetched where the disk has no room for it.
        """
        entries = self.entries if entries is None else entries
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from None
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            wanted = [entry for entry in entries if not (folder / entry.key).exists()]
            require_room(folder, sum(entry.size for entry in wanted), self.store.url)
            self.store.fetch(wanted, folder, advance)
        return folder


def require_room(folder: Path, size: int, what: str) -> None:
    """Raises DoesNotFitError where the disk of `folder` has not `size` bytes free."""
    free = shutil.disk_usage(existing(folder)).free
    if size > free:
        raise DoesNotFitError(
            f"{what} takes {size / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are free",
            "free some, or set LORAJOB_CACHE to a larger disk",
        )
