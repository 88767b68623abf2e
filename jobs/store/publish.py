"""Publishing: every file of the manifest to a target, the manifest last.

Who sees a manifest sees everything it lists. Each target stands on its own: one that fails keeps
none of the others from being served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from jobs.errors import LorajobError, ServiceError, bullet_list
from jobs.store.base import Advance, Store
from jobs.store.hashing import FileEntry, sha256_of
from jobs.store.manifest import NAME


def publish(
    folder: Path,
    files: list[FileEntry],
    store: Store,
    advance: Advance,
    removed: Callable[[list[str]], None] = lambda names: None,
) -> dict[str, int]:
    """Bring `store` to hold exactly the manifest's files; returns how many were sent and kept.

    Files of an earlier run at the same place that are no longer part of it are removed, so that a
    changed spec leaves no stale GGUF beside the new ones; `removed` hears of them.
    """
    path = folder / NAME
    manifest: FileEntry = {"path": NAME, "size": path.stat().st_size, "sha256": sha256_of(path)}
    held = store.held([*files, manifest])
    missing = [file for file in files if file["path"] not in held]
    advance(sum(file["size"] for file in files if file["path"] in held))
    if missing or NAME not in held:
        stale = _listed_before(store) - {file["path"] for file in files}
        store.replace(folder, missing, stale, NAME, advance)
        if stale:
            removed(sorted(stale))
    return {"sent": len(missing), "kept": len(files) - len(missing)}


def publish_to_all(
    stores: Iterable[Store],
    send: Callable[[Store], None],
    tell: Callable[[str, LorajobError], None],
) -> None:
    """`send` to each store, also where another failed. Raises ServiceError naming those that did.

    A refusal counts as a failed service here: the results are there, and the next start of the run
    sends what is missing.
    """
    failed: list[str] = []
    for store in stores:
        try:
            send(store)
        except LorajobError as error:
            tell(store.url, error)
            failed.append(
                f"{store.url}: {error.message}" + (f" ({error.hint})" if error.hint else "")
            )
    if failed:
        raise ServiceError(
            f"not everything could be published:\n{bullet_list(failed)}",
            "start the same run again: it does nothing but send what is missing",
        )


def _listed_before(store: Store) -> set[str]:
    """The files that the manifest already there lists; nothing else there is ours to remove."""
    before = store.read_json(NAME)
    files = before.get("files") if isinstance(before, dict) else None
    if not isinstance(files, list):
        return set()
    return {str(f["path"]) for f in files if isinstance(f, dict) and "path" in f}
