"""Publishing: every file of the manifest to a target, the manifest last.

Who sees a manifest sees everything it lists: the old one is removed before the first file that
changes, and the new one is written after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.store.base import Store
from jobs.store.hashing import FileEntry, sha256_of
from jobs.store.manifest import NAME


def publish(
    folder: Path, files: list[FileEntry], store: Store, advance: Callable[[], None]
) -> dict[str, int]:
    """Bring `store` to hold exactly the manifest's files; returns how many were sent and kept.

    Files of an earlier run at the same place that are no longer part of it are removed, so that a
    changed spec leaves no stale GGUF beside the new ones.
    """
    manifest = folder / NAME
    size, sha256 = manifest.stat().st_size, sha256_of(manifest)
    missing = [f for f in files if not store.has(f["path"], f["size"], f["sha256"])]
    if not missing and store.has(NAME, size, sha256):
        return {"sent": 0, "kept": len(files)}
    stale = _listed_before(store) - {f["path"] for f in files}
    store.delete(NAME)
    for key in sorted(stale):
        store.delete(key)
    for file in files:
        if file in missing:
            store.put(folder / file["path"], file["path"])
        advance()
    store.put(manifest, NAME)
    return {"sent": len(missing), "kept": len(files) - len(missing)}


def _listed_before(store: Store) -> set[str]:
    """The files that the manifest already there lists; nothing else there is ours to remove."""
    before = store.read_json(NAME)
    files = before.get("files") if isinstance(before, dict) else None
    if not isinstance(files, list):
        return set()
    return {str(f["path"]) for f in files if isinstance(f, dict) and "path" in f}
