"""Repositories on the Hugging Face Hub as a store: one to read from, or those that a run goes to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from jobs.errors import AccessError
from jobs.spec import HubTarget
from jobs.store.base import Advance, Entry
from jobs.store.hashing import FileEntry
from jobs.store.hub_client import is_offline
from jobs.store.hub_layout import (
    PARTS,
    Part,
    keys_of,
    layout,
    listed_files,
    part_manifest,
    run_manifest,
)
from jobs.store.hub_publish import Publication
from jobs.store.hub_repository import Kind, Repository, Tree, git_id
from jobs.store.hub_transfer import Bar, Meter, Step, run_all
from jobs.store.local import PARTIAL, disk_error
from jobs.store.manifest import NAME
from jobs.store.places import HubPlace
from jobs.store.retry import Retries

THREADS = 8  # files at a time


class HubStore:
    """Made by `of_place` to read one repository, by `of_target` to publish a run to up to three.

    Keys of a place are paths in its repository. Keys of a target are those of the run's folder,
    wherever a file stands in the repositories (`hub_layout`).
    """

    def __init__(
        self, url: str, repositories: Mapping[Part, Repository], inside: str, private: bool
    ) -> None:
        self.url = url
        self._repositories = repositories
        self._main = repositories["main"]
        self._inside = inside
        self._private = private

    @classmethod
    def of_place(cls, place: HubPlace, retries: Retries) -> HubStore:
        repository = Repository(place.kind, place.repository, place.revision, retries)
        prefix = "datasets/" if place.kind == "dataset" else ""
        url = f"hf://{prefix}{_named(repository)}" + (f"/{place.inside}" if place.inside else "")
        return cls(url, {"main": repository}, place.inside, private=True)

    @classmethod
    def of_target(cls, target: HubTarget, retries: Retries) -> HubStore:
        def repository(text: str, kind: Kind = "model") -> Repository:
            id, _, revision = text.partition("@")
            return Repository(kind, id, revision or None, retries)

        places: dict[Part, str | None]
        places = {"adapter": target.adapter, "gguf": target.gguf, "main": target.hub}
        repositories = {part: repository(text) for part, text in places.items() if text}
        names = {(found.id.lower(), found.revision) for found in repositories.values()}
        if len(names) < len(repositories):
            raise AccessError(
                f"publish: {target.hub} and its adapter or GGUF are to go to the same repository",
                "leave out adapter: or gguf: to have them in folders of it",
            )
        return cls(f"hf://{target.hub}", repositories, "", target.private)

    # --- reading

    def resolve(self) -> str:
        """The commit that the revision means: asked for once, the same for all that follows."""
        return self._main.commit

    @property
    def commit(self) -> str:
        return self.resolve()

    def prove_readable(self) -> None:
        for repository in self._repositories.values():
            repository.prove_readable()
        if self._inside and not self.entries():
            raise AccessError(
                f"{self._main.name} has nothing called {self._inside}",
                f"look at {self._main.about.page}",
            )

    def entries(self) -> list[Entry]:
        return sorted(
            (
                Entry(key, repository.files[path].size, repository.files[path].identity)
                for key, (repository, path) in self._places().items()
            ),
            key=lambda entry: entry.key,
        )

    def fetch(self, entries: Sequence[Entry], folder: Path, advance: Advance) -> None:
        """Bring files into the Hub's cache, and link to them from `folder`.

        A base model may be as large as the disk is: it is there once, where every other tool on the
        machine finds it too. A link, and not a hard one, because the cache and the run are often on
        two file systems. Where the cache is emptied later, the next call fetches and links again.
        """
        places = self._places()

        def step(entry: Entry, stop: Event) -> None:
            repository, path = places[entry.key]
            meter = Meter(entry.size, advance)
            _link(repository.download(path, partial(Bar, meter, stop)), folder / entry.key)
            meter.finish()

        largest_first = sorted(entries, key=lambda entry: -entry.size)
        run_all([partial(step, entry) for entry in largest_first], THREADS)

    def _places(self) -> dict[str, tuple[Repository, str]]:
        """Where each key stands."""
        found: dict[str, tuple[Repository, str]] = {}
        for part, repository in self._repositories.items():
            if len(self._repositories) == 1 and not self._is_target:
                keys = {path: path for path in repository.files if self._is_inside(path)}
            else:
                keys = keys_of(part, repository.files)
            found |= {key: (repository, path) for path, key in keys.items()}
        return found
