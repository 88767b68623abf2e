"""One commit of a repository on the Hub, through the cache that all the Hub's tools share."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub
from huggingface_hub._tree_cache import read_tree_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from jobs.errors import AccessError, ServiceError
from jobs.store.hashing import sha256_of
from jobs.store.hub.client import is_offline
from jobs.store.hub.errors import Damaged
from jobs.store.hub.repository import ITS_OWN, Blob, Repository, git_id

DAMAGED_BEFORE_GIVING_UP = 5  # a file that arrives wrong each time is not fetched for ever


class Snapshot:
    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.api = repository.api
        self._right: set[tuple[str, int, int]] = set()  # files in the cache that were looked at
        self._wrong: Counter[str] = Counter()

    @cached_property
    def commit(self) -> str:
        """The commit that the revision means, asked for once, so that all files are of one."""
        revision = self.repository.revision
        if revision and len(revision) == 40 and self._listed(revision) is not None:
            return revision  # commits never change, and what this one holds is known
        if is_offline():
            try:
                found = self.api.resolve_revision(**self._of(revision), local_files_only=True)
            except hub.RevisionResolutionError:
                raise self._not_cached(f"revision {self.repository.branch}") from None
            return found.resolved
        info = self.repository.call("looking up", lambda: self.api.repo_info(**self._of(revision)))
        assert info.sha
        self._remember(info.sha)
        return info.sha

    @cached_property
    def files(self) -> dict[str, Blob]:
        """What the commit holds. Asked for once, and kept in the cache: offline it is there."""
        listed = self._listed(self.commit)
        if listed is None and is_offline():
            return self._found()
        if listed is None:
            # No file matches no pattern: the listing is all that is fetched and kept.
            self.repository.call(
                "listing",
                lambda: self.api.snapshot_download(**self._of(self.commit), allow_patterns=[]),
            )
            listed = self._listed(self.commit)
        if listed is None:  # the cache cannot be written
            tree = self.repository.call(
                "listing",
                lambda: list(self.api.list_repo_tree(**self._of(self.commit), recursive=True)),
            )
            listed = {
                file.path: Blob(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
                for file in tree
                if isinstance(file, RepoFile)
            }
        return {path: blob for path, blob in listed.items() if path != ITS_OWN}

    def prove_readable(self) -> None:
        """Ask for a file's head: a gated repository lists its files and refuses them."""
        missing = [path for path in self.files if not self._is_cached(path)]
        if not missing:
            return
        if is_offline():
            raise self._not_cached(missing[0])
        path = min(missing, key=lambda path: self.files[path].size)
        url = hf_hub_url(**self._of(self.commit), filename=path, endpoint=self.api.endpoint)
        headers = self.repository.headers()
        self.repository.call("asking for", lambda: get_hf_file_metadata(url, headers=headers))

    def download(self, path: str, bar: Callable[..., Any]) -> Path:
        """A file in the cache, with the bytes that the Hub lists: the client does not look at them.

        Neither does it when the file was there before, so each is looked at once by each process.
        """
        return self.repository.call(f"fetching {path} of", lambda: self._fetched(path, bar))

    def _fetched(self, path: str, bar: Callable[..., Any]) -> Path:
        blob = self.files[path]
        try:
            found = self.api.hf_hub_download(
                **self._of(self.commit), filename=path, tqdm_class=bar  # type: ignore[call-overload]
            )  # fmt: skip
        except hub.LocalEntryNotFoundError:
            if is_offline():
                raise self._not_cached(path) from None
            raise
        place = Path(os.path.abspath(found))  # noqa: PTH100 - links are not to be followed
        stat = place.stat()
        looked_at = (path, stat.st_size, stat.st_mtime_ns)
        if looked_at in self._right:
            return place
        if not has_identity(place, blob):
            if is_offline():
                raise AccessError(
                    f"{self.repository.name}: {path} in the cache has other bytes than the Hub's",
                    f"remove {place} and fetch it again where there is a network",
                )
            _remove(place)
            self._wrong[path] += 1
            if self._wrong[path] >= DAMAGED_BEFORE_GIVING_UP:
                raise ServiceError(
                    f"{self.repository.name}: {path} arrived with wrong bytes "
                    f"{DAMAGED_BEFORE_GIVING_UP} times",
                    "look at what stands between here and the Hub: a proxy, a mirror, the disk",
                )
            raise Damaged(path)
        self._right.add(looked_at)
        return place

    @property
    def _folder(self) -> Path:
        """The repository's in the cache."""
        name = repo_folder_name(repo_id=self.repository.id, repo_type=self.repository.kind)
        return Path(constants.HF_HUB_CACHE).absolute() / name

    def _of(self, revision: str | None) -> dict[str, Any]:
        kind: str = self.repository.kind
        return {"repo_id": self.repository.id, "repo_type": kind, "revision": revision}

    def _listed(self, commit: str) -> dict[str, Blob] | None:
        """What the cache's own listing says. The public function for it leaves the sha256 out."""
        listed = read_tree_cache(str(self._folder), commit)
        if listed is None:
            return None
        return {
            path: Blob(entry.size, entry.lfs_sha256, entry.blob_id)
            for path, entry in listed.items()
        }

    def _found(self) -> dict[str, Blob]:
        """What the cache has of the commit, where another tool filled it and kept no listing."""
        try:
            folder = Path(
                self.api.snapshot_download(**self._of(self.commit), local_files_only=True)
            )
        except hub.LocalEntryNotFoundError:
            raise self._not_cached(f"commit {self.commit}") from None
        files = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != ITS_OWN:
                # The link's target is called after what the Hub said of the content.
                etag = path.readlink().name if path.is_symlink() else git_id(path)
                files[name] = Blob(path.stat().st_size, etag if len(etag) == 64 else None, etag)
        return files

    def _is_cached(self, path: str) -> bool:
        return isinstance(try_to_load_from_cache(**self._of(self.commit), filename=path), str)

    def _remember(self, commit: str) -> None:
        """Keep in the cache what the revision means, as the client does when asked by name."""
        if commit == self.repository.revision:
            return
        path = self._folder / "refs" / self.repository.branch
        with contextlib.suppress(OSError):  # a cache that cannot be written may still be read
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_text(commit)
            partial.replace(path)

    def _not_cached(self, what: str) -> AccessError:
        repository = self.repository
        kind = "" if repository.kind == "model" else f" --repo-type {repository.kind}"
        revision = f" --revision {repository.revision}" if repository.revision else ""
        return AccessError(
            f"{repository.name}: {what} is not in the cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE forbids to ask the Hub",
            f"fill the cache where there is a network: hf download {repository.id}{kind}{revision}",
        )


def has_identity(path: Path, blob: Blob) -> bool:
    """Whether a file has the content that the Hub lists."""
    if path.stat().st_size != blob.size:
        return False
    return sha256_of(path) == blob.sha256 if blob.sha256 else git_id(path) == blob.git


def _remove(pointer: Path) -> None:
    """Remove a file from the cache: its name in the snapshot and what that leads to."""
    while pointer.is_symlink():
        target = pointer.parent / pointer.readlink()
        pointer.unlink()
        pointer = target
    pointer.unlink(missing_ok=True)
