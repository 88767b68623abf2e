"""Repositories on the Hugging Face Hub as a store: one to read from, or those that a run goes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from jobs.errors import AccessError
from jobs.spec import HubTarget
from jobs.store.base import Advance, Entry, no_advance
from jobs.store.hashing import FileEntry
from jobs.store.hub.client import is_offline
from jobs.store.hub.layout import Part, keys_of, layout, part_manifest, run_manifest
from jobs.store.hub.publish import LARGE, Publication, as_json
from jobs.store.hub.repository import Repository, Tree
from jobs.store.hub.snapshot import Snapshot
from jobs.store.hub.transfer import Addition, Bar, Meter, run_all
from jobs.store.local import PARTIAL, disk_error
from jobs.store.manifest import NAME
from jobs.store.places import HubPlace
from jobs.store.retry import Retries

THREADS = 8  # files at a time


class HubStore:
    """Made by `of_place` to read one repository, by `of_target` to publish a run to up to three.

    Keys of a place are paths in its repository. Keys of a target are those of the run's folder,
    wherever a file stands in the repositories (`hub.layout`).
    """

    def __init__(
        self,
        url: str,
        repositories: Mapping[Part, Repository],
        inside: str | None,
        private: bool = True,
    ) -> None:
        self.url = url
        self._repositories = repositories
        self._main = repositories["main"]
        self._snapshot = Snapshot(self._main)  # of a place
        self._inside = inside  # what is meant of a place's repository; None for a target
        self._private = private

    @classmethod
    def of_place(cls, place: HubPlace, retries: Retries) -> HubStore:
        repository = Repository(place.kind, place.repository, place.revision, retries)
        prefix = "datasets/" if place.kind == "dataset" else ""
        named = place.repository + (f"@{place.revision}" if place.revision else "")
        inside = f"/{place.inside}" if place.inside else ""
        return cls(f"hf://{prefix}{named}{inside}", {"main": repository}, place.inside)

    @classmethod
    def of_target(cls, target: HubTarget, retries: Retries) -> HubStore:
        places: dict[Part, str | None]
        places = {"adapter": target.adapter, "gguf": target.gguf, "main": target.hub}
        repositories = {}
        for part, text in places.items():
            if text:
                id, _, revision = text.partition("@")
                repositories[part] = Repository("model", id, revision or None, retries)
        different = {(found.id.lower(), found.branch) for found in repositories.values()}
        if len(different) < len(repositories):
            raise AccessError(
                f"publish: {target.hub} and its adapter or GGUF are to go to the same repository",
                "leave out adapter: or gguf: to have them in folders of it",
            )
        return cls(f"hf://{target.hub}", repositories, None, target.private)

    # --- reading

    def resolve(self) -> str:
        """The commit that the revision means: asked for once, the same for all that follows."""
        return self._snapshot.commit

    @property
    def commit(self) -> str:
        return self.resolve()

    def prove_readable(self) -> None:
        for repository in self._repositories.values():
            snapshot = self._snapshot if repository is self._main else Snapshot(repository)
            snapshot.prove_readable()
        if self._inside and not self.entries():
            raise AccessError(
                f"{self._main.name} has nothing called {self._inside}",
                f"look at {self._main.about.page}",
            )

    def entries(self) -> list[Entry]:
        found = []
        for key, (snapshot, path) in sorted(self._places().items()):
            blob = snapshot.files[path]
            found.append(Entry(key, blob.size, blob.identity))
        return found

    def fetch(self, entries: Sequence[Entry], folder: Path, advance: Advance) -> None:
        """Bring files into the Hub's cache, and link to them from `folder`.

        A base model may be as large as the disk is: it is there once, where every other tool on the
        machine finds it too. It is no hard link, because the cache and the run are often on two
        file systems. Where the cache was emptied, the next call fetches and links again.
        """
        places = self._places()

        def step(entry: Entry, stop: Event) -> None:
            snapshot, path = places[entry.key]
            meter = Meter(entry.size, advance)
            _link(snapshot.download(path, partial(Bar, meter, stop)), folder / entry.key)
            meter.finish()

        largest_first = sorted(entries, key=lambda entry: -entry.size)
        run_all([partial(step, entry) for entry in largest_first], THREADS)

    def _places(self) -> dict[str, tuple[Snapshot, str]]:
        """Where each key stands."""
        if self._inside is not None:
            paths = [path for path in self._snapshot.files if is_inside(path, self._inside)]
            return {path: (self._snapshot, path) for path in paths}
        found: dict[str, tuple[Snapshot, str]] = {}
        for part, repository in self._repositories.items():
            if isinstance(repository.look(), Tree):
                snapshot = Snapshot(repository)  # a new one: publishing makes new commits
                keys = keys_of(part, snapshot.files)
                found |= {key: (snapshot, path) for path, key in keys.items()}
        return found

    # --- writing

    def prove_writable(self, keep: bool) -> None:
        """Look whether the token may write, or make, each repository.

        With `keep` false a repository goes again that this call has made and that is still empty:
        a check must leave nothing behind, and must never remove what is somebody's. Where an answer
        was lost on the way, and it is not certain who made it, it stays.
        """
        self._prove_token()
        for repository in self._repositories.values():
            there = repository.look()
            made = False
            if there == "no repository" or (there == "no branch" and keep):
                made = repository.create(self._private)
                branch = repository.revision
            else:
                branch = None if there == "no branch" else repository.revision
            try:
                repository.prove_writable(branch)
            finally:
                if made and not keep:
                    repository.delete_if_empty()

    def _prove_token(self) -> None:
        if is_offline():
            raise AccessError(
                f"{self.url} cannot be published to: HF_HUB_OFFLINE is set",
                "unset HF_HUB_OFFLINE, or take the target out of publish:",
            )
        account, tokens = self._main.account, f"{self._main.about.endpoint}/settings/tokens"
        if not account.is_given():
            raise AccessError(
                f"{self.url} cannot be published to: no token was given",
                f"make one that may write at {tokens} and set HF_TOKEN to it",
            )
        said = self._main.call("asking who writes to", account.whoami)
        access = said.get("auth", {}).get("accessToken") or {}
        if access.get("role") == "read":
            raise AccessError(
                f"{self.url} cannot be published to: the token given, that of {said.get('name')}, "
                "may only read",
                f"make one that may write at {tokens} and set HF_TOKEN to it",
            )

    def held(self, files: Sequence[FileEntry]) -> set[str]:
        entry_of = {file["path"]: file for file in files}
        found: set[str] = set()
        for part, paths in layout(entry_of, self._repositories).items():
            repository = self._repositories[part]
            tree = repository.look()
            if not isinstance(tree, Tree):
                continue
            for path, key in paths.items():
                blob, file = tree.files.get(path), entry_of[key]
                if blob is None or blob.size != file["size"]:
                    continue
                # The Hub says the sha256 of large files only. The others are small: they are read.
                sha256 = blob.sha256 or _sha256(repository.read(path, tree))
                if sha256 == file["sha256"]:
                    found.add(key)
        if NAME in entry_of and _sha256(as_json(self.read_json(NAME))) == entry_of[NAME]["sha256"]:
            found.add(NAME)
        return found

    def read_json(self, key: str) -> Any:
        """Of a target, `manifest.json` is the run's, put together from those of its repositories."""
        if self._inside is not None:
            return self._main.read_json(key)
        if key == NAME:
            parts = {part: found.read_json(NAME) for part, found in self._repositories.items()}
            return run_manifest(parts)
        for part, repository in self._repositories.items():
            tree = repository.look()
            keys = keys_of(part, tree.files) if isinstance(tree, Tree) else {}
            for path in (path for path, named in keys.items() if named == key):
                return repository.read_json(path)
        return None

    def send_ahead(self, folder: Path, files: Sequence[FileEntry], stopped: Event) -> None:
        """As large files that no commit names yet: the Hub finds them by their sha256 when one does."""
        entry_of = {file["path"]: file for file in files}
        for part, paths in layout(entry_of, self._repositories).items():
            repository = self._repositories[part]
            tree = repository.look()
            if not isinstance(tree, Tree):
                continue
            there = {blob.sha256 for blob in tree.files.values()}
            for path, key in paths.items():
                file = entry_of[key]
                if file["size"] < LARGE or file["sha256"] in there:
                    continue
                addition = Addition(path, folder / key, file, Meter(0, no_advance))
                addition.stop = stopped
                what = f"sending {path} ahead to"
                try:
                    repository.call(what, partial(repository.upload, [addition]))
                except Exception:
                    if not stopped.is_set():
                        raise
                    return  # the client wraps what ends its reading in errors of its own

    def forget_ahead(self) -> None:
        pass  # what no commit names, the Hub removes by itself

    def replace(
        self, folder: Path, files: Sequence[FileEntry], stale: set[str], last: str, advance: Advance
    ) -> None:
        """One commit for each repository, with everything: nobody sees a half. The main one is the
        last, because its manifest says that the run is published."""
        manifest = json.loads((folder / last).read_text("utf-8"))
        entry_of: dict[str, FileEntry] = {file["path"]: file for file in manifest["files"]}
        counted = {file["path"] for file in files}
        for part, paths in layout(entry_of, self._repositories).items():
            repository = self._repositories[part]
            named = part_manifest(manifest, paths, repository.id)
            Publication(
                repository=repository,
                part=part,
                folder=folder,
                listed={path: entry_of[key] for path, key in paths.items()},
                manifest=as_json(named),
                title=f"Publish {manifest.get('name', 'a run')}",
                private=self._private,
            ).bring(stale, counted, advance)


def is_inside(path: str, inside: str) -> bool:
    """Whether a path is what a place means: all, a file, all below a folder, or what a glob finds.

    A `*` does not cross a slash, as in a shell; `**` does.
    """
    if not inside or path == inside or path.startswith(f"{inside}/"):
        return True
    if "**" in inside:
        return fnmatchcase(path, inside) or fnmatchcase(path, inside.replace("**/", ""))
    steps, wanted = path.split("/"), inside.split("/")
    return len(steps) == len(wanted) and all(map(fnmatchcase, steps, wanted))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        if target.is_symlink() and target.readlink() == source:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_link = target.with_name(f"{PARTIAL}{target.name}")
        partial_link.unlink(missing_ok=True)
        partial_link.symlink_to(source)
        partial_link.replace(target)
    except OSError as error:
        raise disk_error(error, target) from None
