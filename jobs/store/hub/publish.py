"""A run's files into one repository of the Hub, by one commit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from huggingface_hub import CommitOperationAdd

from jobs.errors import AccessError
from jobs.store.base import Advance
from jobs.store.hashing import FileEntry, sha256_of
from jobs.store.hub.errors import Overtaken
from jobs.store.hub.layout import Part, keys_of, listed_files
from jobs.store.hub.repository import Blob, Repository, Tree, git_id
from jobs.store.hub.transfer import Addition, Meter, run_all
from jobs.store.manifest import NAME

THREADS = 5  # files at a time
LARGE = 2**20  # bytes from which a file is sent and retried by itself, before the commit
UNSEEN = 16 * 2**20  # bytes up to which the Hub may take a file without looking at its sha256


def as_json(value: Any) -> bytes:
    """As the run writes its own manifest."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass
class Publication:
    repository: Repository
    part: Part
    folder: Path  # the run's
    listed: dict[str, FileEntry]  # path in the repository -> file of the run
    manifest: bytes
    title: str
    private: bool
    meters: dict[str, Meter] = field(default_factory=dict)  # by path

    def bring(self, stale: set[str], counted: set[str], advance: Advance) -> None:
        """Make the repository hold the listed files and the manifest, and none of the `stale` keys
        or of what its present manifest lists besides. `counted` are the keys that advance."""
        repository = self.repository
        tree = repository.look()
        if not isinstance(tree, Tree):
            if not self.listed and self.part != "main":
                return
            repository.create(self.private)
            tree = self._look()
        for path, file in self.listed.items():
            self.meters[path] = Meter(file["size"] if file["path"] in counted else 0, advance)
        self._commit(tree, stale)
        for meter in self.meters.values():
            meter.finish()

    def _commit(self, tree: Tree, stale: set[str]) -> None:
        additions = self._additions(tree)

        def upload(addition: Addition, stop: Event) -> None:
            addition.stop = stop
            what = f"sending {addition.path_in_repo} to"
            self.repository.call(what, lambda: self.repository.upload([addition]))

        large = sorted((a for a in additions if a.size >= LARGE), key=lambda a: -a.size)
        run_all([partial(upload, addition) for addition in large], THREADS)
        for addition in additions:
            addition.stop = Event()

        def attempt() -> None:
            nonlocal tree, additions
            # The answer to an earlier try may be all that was lost: look before trying again.
            now = self._look()
            superfluous = self._superfluous(now, stale)
            if self._is_there(now) and not superfluous:
                return
            if now.commit != tree.commit:  # what the client has noted about the files is old
                tree, additions = now, self._additions(now)
            with_manifest = [*additions, CommitOperationAdd(NAME, self.manifest)]
            self.repository.upload(with_manifest)
            # On top of `now` or not at all, so that it cannot happen twice.
            self.repository.send_commit(now, with_manifest, sorted(superfluous), self.title)
            if not self._is_there(self._look()):
                raise Overtaken

        self.repository.call("committing to", attempt)

    def _look(self) -> Tree:
        tree = self.repository.look()
        if not isinstance(tree, Tree):
            raise AccessError(
                f"{self.repository.name} has gone away while it was published to",
                "see who else works on it, and start the same run again",
            )
        return tree

    def _is_there(self, tree: Tree) -> bool:
        manifest = tree.files.get(NAME)
        return (
            manifest is not None
            and manifest.git == git_id(self.manifest)
            and all(self._holds(tree.files.get(path), file) for path, file in self.listed.items())
        )

    def _holds(self, blob: Blob | None, file: FileEntry) -> bool:
        if blob is None or blob.size != file["size"]:
            return False
        if blob.sha256:
            return blob.sha256 == file["sha256"]
        source = self.folder / file["path"]
        return not source.exists() or blob.git == git_id(source)

    def _superfluous(self, tree: Tree, stale: set[str]) -> set[str]:
        """Files of an earlier run: nothing else there is ours to remove."""
        before: Any = None
        if NAME in tree.files:
            before = self.repository.read_json(NAME, tree)
        gone = {str(file["path"]) for file in listed_files(before)}
        gone |= {path for path, key in keys_of(self.part, tree.files).items() if key in stale}
        return (gone & set(tree.files)) - set(self.listed) - {NAME}

    def _additions(self, tree: Tree) -> list[Addition]:
        """What the repository lacks."""
        found = []
        for path, file in self.listed.items():
            if self._holds(tree.files.get(path), file):
                continue
            source = self.folder / file["path"]
            if not source.is_file():
                raise AccessError(f"{source} is gone", "leave the run's folder alone while it runs")
            if file["size"] < UNSEEN and sha256_of(source) != file["sha256"]:
                raise AccessError(
                    f"{source} is another one than {NAME} lists",
                    "leave the run's folder alone while it runs, and start the same run again",
                )
            found.append(Addition(path, source, file, self.meters[path]))
        return found
