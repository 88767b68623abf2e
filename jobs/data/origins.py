"""The sources of a spec, found: on this disk, in a bucket, on the Hub; and pinned to what is there."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jobs.data.files import DataFile, choose_files, endings, matches, source_files
from jobs.errors import AccessError, DataError, SpecError, in_field
from jobs.spec import Data, Source
from jobs.store.base import Advance, Entry, Store, no_advance
from jobs.store.connect import Connections
from jobs.store.hashing import sha256_of
from jobs.store.places import HubPlace, LocalPlace, S3Place, WrongPlace, parse_place
from jobs.store.remote import Remote


@dataclass(frozen=True)
class Origin:
    """A source and the files behind it. Those that are elsewhere are fetched when they are read."""

    source: Source
    remote: Remote | None = None  # None for what is on this disk
    named: str = ""  # what the names of its files begin with for people
    commit: str | None = None  # of a data set on the Hub

    def contents(self) -> list[list[str]]:
        """The name and what identifies the content of each file; nothing is fetched for it."""
        if self.remote:
            return [[entry.key, entry.identity] for entry in self.remote.entries]
        return [[file.name, sha256_of(file.path)] for file in source_files(self.source)]

    def files(self, advance: Advance = no_advance) -> list[DataFile]:
        """The files, here."""
        if self.remote is None:
            return source_files(self.source)
        folder = self.remote.bring(advance=advance)
        return [
            DataFile(folder / entry.key, f"{self.named}/{entry.key}")
            for entry in self.remote.entries
        ]

    def missing_bytes(self) -> int:
        return sum(entry.size for entry in self.remote.missing()) if self.remote else 0


@dataclass(frozen=True)
class Origins:
    """All sources of a spec's data."""

    found: list[Origin]

    def files_of(self, source: Source) -> Sequence[DataFile]:
        return next(origin for origin in self.found if origin.source is source).files()


def find_origins(data: Data, connections: Connections) -> Origins:
    """Look where every source is. Raises AccessError where one is not there or cannot be read."""
    sides = {
        "data.train": data.train,
        "data.eval": data.eval,
        "data.retention": data.retention,
        "data.replay.sources": data.replay and data.replay.sources,
    }
    found = []
    for side, sources in sides.items():
        for source in sources if isinstance(sources, list) else []:
            with in_field(side):
                found.append(_find(source, connections))
    return Origins(found)


def _find(source: Source, connections: Connections) -> Origin:
    try:
        place = parse_place(source.source, hub_kind="dataset")
    except WrongPlace as error:
        raise SpecError(f"{error}", "name a file, a folder, s3://... or hf://...") from None
    if source.config is not None and not isinstance(place, HubPlace):
        raise SpecError(
            f"the source {source.source} is no data set of the Hub, and only those have a `config`",
            "leave `config` out",
        )
    match place:
        case LocalPlace():
            source_files(source)
            return Origin(source)
        case S3Place(bucket, key):
            root = _root(key)
            store: Store = connections.s3_store(S3Place(bucket, root))
            entries = _below(store, key[len(root) :].strip("/"), source)
            return Origin(source, Remote(store, tuple(entries)), store.url)
        case HubPlace():
            return _on_hub(source, place, connections)


def _root(key: str) -> str:
    """The folder that a key or a glob is in."""
    parts = key.split("/")[:-1]
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:fixed])


def _below(store: Store, name: str, source: Source) -> list[Entry]:
    """Of what a store has, the file, the folder or the glob `name`; "" for everything."""
    there = {entry.key: entry for entry in store.entries()}
    if name in there:
        if source.split is not None:
            raise SpecError(
                f"the source {source.source} is a file, and `split` picks files out of a folder",
                "leave `split` out, or name the folder",
            )
        if not endings(Path(name))[0]:
            raise DataError(f"{source.source}: such files are not read", "name data files")
        return [there[name]]
    if glob.has_magic(name):
        seen = [key for key in there if matches(key, name)]
    else:
        seen = [key for key in there if not name or key.startswith(f"{name}/")]
    if not seen:
        raise AccessError(f"there is nothing at {source.source}", "check the address")
    chosen = choose_files(source.source, map(Path, seen), Path(_root(f"{name}/")), source.split)
    return [there[PurePosixPath(path).as_posix()] for path in chosen]


def _on_hub(source: Source, place: HubPlace, connections: Connections) -> Origin:
    from jobs.store.hub import HubStore

    store = HubStore.of_place(place, connections.retries)
    if place.inside or place.kind == "model":
        if source.config is not None:
            raise SpecError(
                f"the source {source.source} names files, and `config` names some, too",
                "leave one of the two out",
            )
        entries = _below(store, place.inside, source)
    else:
        from jobs.data.hub_dataset import split_files

        names = split_files(place.repository, store.commit, source)
        there = {entry.key: entry for entry in store.entries()}
        entries = [there[name] for name in names]
    named = f"hf://{place.kind}s/{place.repository}"
    return Origin(source, Remote(store, tuple(entries)), named, store.commit)
