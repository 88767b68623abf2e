"""Content hashes: of a file, of a folder, of anything that JSON can say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict


class FileEntry(TypedDict):
    path: str  # relative, with forward slashes
    size: int  # bytes
    sha256: str


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(value: Any) -> str:
    """The sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_entries(folder: Path, within: Path | None = None) -> list[FileEntry]:
    """Every file below `folder`, sorted by path, with size and sha256; paths relative to `within`."""
    return [
        {
            "path": path.relative_to(within or folder).as_posix(),
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
