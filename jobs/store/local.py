"""A folder as a store."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from threading import Event
from typing import Any

from jobs.errors import AccessError, DoesNotFitError
from jobs.store.base import Advance, Entry, no_advance
from jobs.store.hashing import FileEntry, sha256_of

PARTIAL = ".partial-"
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or this user's share of it
KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2), linux/falloc.h


class LocalStore:
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.url = str(folder)

    def prove_readable(self) -> None:
        if not self.folder.is_dir():
            raise AccessError(f"there is no folder {self.folder}", "check its name")

    def prove_writable(self, keep: bool) -> None:
        made: list[Path] = []
        try:
            for folder in (self.folder, *self.folder.parents):
                if folder.exists():
                    break
                made.append(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{PARTIAL}{uuid.uuid4().hex}"
            probe.write_bytes(b"lorajob")
            probe.unlink()
            for folder in [] if keep else made:
                folder.rmdir()
        except OSError as error:
            if error.errno in FULL:
                raise disk_error(error, self.folder) from None
            raise AccessError(
                f"the folder {self.folder} cannot be written: {error.strerror}",
                "give this user the right to write there, or name another folder",
            ) from None

    def entries(self) -> list[Entry]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.name.startswith(PARTIAL):
                stat = path.stat()
                identity = f"written:{stat.st_mtime_ns}:{stat.st_size}"
                found.append(
                    Entry(path.relative_to(self.folder).as_posix(), stat.st_size, identity)
                )
        return found

    def fetch(self, entries: Sequence[Entry], folder: Path, advance: Advance) -> None:
        for entry in entries:
            target = folder / entry.key
            if not target.exists():
                copy_whole(self._path(entry.key), target)
            advance(entry.size)

    def held(self, files: Sequence[FileEntry]) -> set[str]:
        return {file["path"] for file in files if self._has(file)}

    def _has(self, file: FileEntry) -> bool:
        path = self._path(file["path"])
        same_size = path.is_file() and path.stat().st_size == file["size"]
        return same_size and sha256_of(path) == file["sha256"]

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def send_ahead(self, folder: Path, files: Sequence[FileEntry], stopped: Event) -> None:
        pass  # a disk to another is fast enough, and has no place that nobody sees

    def forget_ahead(self) -> None:
        pass

    def replace(
        self, folder: Path, files: Sequence[FileEntry], stale: set[str], last: str, advance: Advance
    ) -> None:
        self.delete({last})
        self.delete(stale)
        self.put(folder, files, advance)
        size = (folder / last).stat().st_size
        self.put(folder, [{"path": last, "size": size, "sha256": ""}], no_advance)

    def put(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        advance: Advance,
        prefix: str = "",
        threads: int = 1,
    ) -> None:
        for file in files:
            copy_whole(folder / file["path"], self._path(prefix + file["path"]))
            advance(file["size"])

    def delete(self, keys: set[str]) -> None:
        for key in sorted(keys):
            self._delete(self._path(key))

    def _delete(self, path: Path) -> None:
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return  # the latter: what the key calls a folder is a file, so the key is not there
        except OSError as error:
            raise disk_error(error, path) from None
        # Keys have no folders: those that were made for this one go with it.
        with contextlib.suppress(OSError):  # the first that is not empty
            for folder in path.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def _path(self, key: str) -> Path:
        """The key's file. Raises AccessError where the key leads out of the folder."""
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise AccessError(f"{key!r} is no file in {self.folder}", "look at its manifest.json")
        return self.folder / key


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is either as it was or all of the new one."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise disk_error(error, target) from None


def reserve(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, with the room for it taken now where the file system can.

    Then a full disk is known at the beginning, and writing costs less. Not `os.posix_fallocate`: where
    the file system cannot, that one writes to each of its blocks. Raises OSError for a full disk.
    """
    os.truncate(descriptor, size)
    fallocate = getattr(_libc(), "fallocate", None)
    failed = fallocate and fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    if failed and (number := ctypes.get_errno()) in FULL:
        raise OSError(number, os.strerror(number))


def punch(descriptor: int, start: int, size: int) -> bool:
    """Give the disk back the room that a part of a file takes, which reads as zeros from then on. False
    where the file system cannot."""
    fallocate = getattr(_libc(), "fallocate", None)
    if fallocate is None:
        return False
    mode = KEEP_SIZE | PUNCH_HOLE
    return not fallocate(descriptor, mode, ctypes.c_int64(start), ctypes.c_int64(size))


def can_punch(folder: Path) -> bool:
    """Whether the file system of a folder that is there can do that."""
    try:
        with NamedTemporaryFile(dir=folder, prefix=PARTIAL) as file:
            file.write(bytes(2**16))
            file.flush()
            return punch(file.fileno(), 0, 2**16)
    except OSError:
        return False


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def disk_error(error: OSError, path: Path) -> AccessError | DoesNotFitError:
    """What a failed write means: a full disk, or no right to write."""
    if error.errno in FULL:
        free = shutil.disk_usage(existing(path)).free
        return DoesNotFitError(
            f"the disk is full: writing {path} failed with {free / 2**20:.0f} MiB free",
            "free some space and start the same run again: it goes on with the stage it was in",
        )
    if isinstance(error, FileNotFoundError):
        return AccessError(
            f"{error.filename or path} is gone", "leave the run's folder alone while it runs"
        )
    return AccessError(
        f"{path} cannot be written: {error.strerror}", "check the folder's rights and owner"
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    while not path.exists():
        path = path.parent
    return path
