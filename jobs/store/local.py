"""A folder as a store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from jobs.errors import AccessError, DoesNotFitError
from jobs.store.hashing import sha256_of

PARTIAL = ".partial-"


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
            raise AccessError(
                f"the folder {self.folder} cannot be written: {error.strerror}",
                "give this user the right to write there, or name another folder",
            ) from None

    def has(self, key: str, size: int, sha256: str) -> bool:
        path = self.folder / key
        return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256

    def read_json(self, key: str) -> Any:
        try:
            return json.loads((self.folder / key).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, source: Path, key: str) -> None:
        target = self.folder / key
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
        path = self.folder / key
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise AccessError(f"{key} is outside {self.folder}", "look at its manifest.json")
        path.unlink(missing_ok=True)

    def keys(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith(PARTIAL)
        )


def disk_error(error: OSError, path: Path) -> AccessError | DoesNotFitError:
    """What a failed write means: a full disk, or no right to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path)).free
        return DoesNotFitError(
            f"the disk is full: writing {path} failed with {free / 2**20:.0f} MiB free",
            "free some space and start the same run again: it goes on with the stage it was in",
        )
    return AccessError(
        f"{path} cannot be written: {error.strerror}", "check the folder's rights and owner"
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
