"""A folder as a store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from jobs.errors import AccessError, DoesNotFitError
from jobs.store.hashing import sha256_of

PARTIAL = ".partial-"
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or this user's share of it


class LocalStore:
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.url = str(folder)

    def prove_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{PARTIAL}{uuid.uuid4().hex}"
            probe.write_bytes(b"lorajob")
            probe.unlink()
        except OSError as error:
            if error.errno in FULL:
                raise disk_error(error, self.folder) from None
            raise AccessError(
                f"the folder {self.folder} cannot be written: {error.strerror}",
                "give this user the right to write there, or name another folder",
            ) from None

    def has(self, key: str, size: int, sha256: str) -> bool:
        path = self._path(key)
        return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256

    def read_json(self, key: str) -> Any:
        try:
            return json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, source: Path, key: str) -> None:
        target = self._path(key)
        partial = target.with_name(f"{PARTIAL}{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise disk_error(error, target) from None

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass  # what the key calls a folder is a file: the key is not there
        except OSError as error:
            raise disk_error(error, path) from None

    def keys(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith(PARTIAL)
        )

    def _path(self, key: str) -> Path:
        """The key's file. Raises AccessError where the key leads out of the folder."""
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise AccessError(f"{key!r} is no file in {self.folder}", "look at its manifest.json")
        return self.folder / key


def disk_error(error: OSError, path: Path) -> AccessError | DoesNotFitError:
    """What a failed write means: a full disk, or no right to write."""
    if error.errno in FULL:
        free = shutil.disk_usage(_existing(path)).free
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


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
