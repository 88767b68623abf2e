"""One repository on the Hub: what it holds, its files through the cache, and commits to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    constants,
    get_cached_repo_tree,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from jobs import __version__
from jobs.errors import AccessError, LorajobError
from jobs.store.hashing import sha256_of
from jobs.store.hub_client import Account, hub_api, is_offline
from jobs.store.hub_errors import About, Damaged, Overtaken, judge
from jobs.store.hub_transfer import Addition
from jobs.store.retry import Again, Retries

Kind = Literal["model", "dataset"]

ITS_OWN = ".gitattributes"  # in each repository, put there by the Hub itself

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of a file."""

    size: int
    sha256: str | None  # of a large file
    git: str  # git's name for any other

    @property
    def identity(self) -> str:
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.git}"


@dataclass(frozen=True, slots=True)
class Tree:
    commit: str
    files: dict[str, Blob]


def git_id(content: bytes | Path) -> str:
    """git's name for a content."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    hashed = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        hashed.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    return hashed.hexdigest()


def has_identity(path: Path, size: int, identity: str) -> bool:
    """Whether a file has the content that a listing of the Hub says."""
    kind, _, wanted = identity.partition(":")
    if path.stat().st_size != size:
        return False
    return wanted == (sha256_of(path) if kind == "sha256" else git_id(path))


class Repository:
    def __init__(self, kind: Kind, id: str, revision: str | None, retries: Retries) -> None:
        self.kind, self.id, self.revision, self.retries = kind, id, revision, retries
        self.api = hub_api()
        self.account = Account(self.api)
        prefix = "" if kind == "model" else f"{kind}s/"
        self.name = ("model " if kind == "model" else "data set ") + id
        self.about = About(
            name=self.name,
            page=f"{self.api.endpoint}/{prefix}{id}",
            endpoint=self.api.endpoint,
            revision=revision or "main",
            token=self.account.phrase,
        )
        self._right: set[tuple[str, int, int]] = set()  # files in the cache that were looked at

    def call(self, what: str, do: Callable[[], T]) -> T:
        return self.retries.call(f"{what} {self.name}", do, self.judge)

    def judge(self, error: BaseException) -> Again | LorajobError | None:
        return judge(error, self.about)

    # --- reading through the cache

    @cached_property
    def commit(self) -> str:
        """The commit that the revision means, asked for once, so that all files are of one."""
        if self.revision and len(self.revision) == 40 and self._listed(self.revision) is not None:
            return self.revision  # commits never change, and this one's files are known
        if is_offline():
            try:
                return self.api.resolve_revision(
                    self.id, repo_type=self.kind, revision=self.revision, local_files_only=True
                ).resolved
            except hub.RevisionResolutionError:
                raise self._not_cached(f"revision {self.about.revision}") from None
        info = self.call(
            "looking up",
            lambda: self.api.repo_info(self.id, repo_type=self.kind, revision=self.revision),
        )
        assert info.sha
        self._remember(info.sha)
        return info.sha

    @cached_property
    def files(self) -> dict[str, Blob]:
        """What the commit holds. Fetched once, and kept in the cache: offline it is there."""
        listed = self._listed(self.commit)
        if listed is None and is_offline():
            return self._snapshot()
        if listed is None:
            self.call(
                "listing",
                # Nothing matches, so nothing but the listing is fetched and kept.
                lambda: self.api.snapshot_download(
                    self.id, repo_type=self.kind, revision=self.commit, allow_patterns=[]
                ),
            )
            listed = self._listed(self.commit)
        if listed is None:  # the cache cannot be written
            listed = self.call(
                "listing",
                lambda: list(
                    self.api.list_repo_tree(
                        self.id, repo_type=self.kind, revision=self.commit, recursive=True
                    )
                ),
            )
        return {
            file.path: Blob(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in listed
            if isinstance(file, RepoFile) and file.path != ITS_OWN
        }

    def prove_readable(self) -> None:
        """Ask for a file's head: a gated repository lists its files and refuses them."""
        missing = [path for path in self.files if self._cached(path) is None]
        if not missing:
            return
        if is_offline():
            raise self._not_cached(missing[0])
        path = min(missing, key=lambda path: self.files[path].size)
        url = hf_hub_url(
            self.id, path, repo_type=self.kind, revision=self.commit, endpoint=self.api.endpoint
        )
        self.call("asking for", lambda: get_hf_file_metadata(url, headers=self._headers()))

    def download(self, path: str, bar: Callable[..., Any]) -> Path:
        """A file in the cache, with the bytes that the Hub says it has: the client does not look."""
        size, identity = self.files[path].size, self.files[path].identity

        def fetch() -> Path:
            try:
                found = self.api.hf_hub_download(
                    self.id, path, repo_type=self.kind, revision=self.commit, tqdm_class=bar
                )  # fmt: skip
            except hub.LocalEntryNotFoundError as error:
                if error.__cause__ is None or is_offline():
                    raise self._not_cached(path) from None
                raise
            place = Path(os.path.abspath(found))  # noqa: PTH100 - links are not to be followed
            stat = place.stat()
            looked_at = (str(place), stat.st_size, stat.st_mtime_ns)
            if looked_at in self._right:
                return place
            if not has_identity(place, size, identity):
                if is_offline():
                    raise AccessError(
                        f"{self.name}: {path} in the cache has other bytes than the Hub's",
                        f"remove {place} and fetch it again where there is a network",
                    )
                _remove(place)
                raise Damaged(path)
            self._right.add(looked_at)
            return place

        return self.call(f"fetching {path} of", fetch)

    def _listed(self, commit: str) -> list[RepoFile] | None:
        try:
            return get_cached_repo_tree(self.id, repo_type=self.kind, revision=commit)
        except hub.CachedRepoTreeNotFoundError:
            return None

    def _snapshot(self) -> dict[str, Blob]:
        """What the cache has of the commit, where other tools filled it and kept no listing."""
        try:
            folder = Path(
                self.api.snapshot_download(
                    self.id, repo_type=self.kind, revision=self.commit, local_files_only=True
                )
            )
        except hub.LocalEntryNotFoundError:
            raise self._not_cached(f"commit {self.commit}") from None
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != ITS_OWN:
                etag = path.readlink().name if path.is_symlink() else git_id(path)
                sha256 = etag if len(etag) == 64 else None
                found[name] = Blob(path.stat().st_size, sha256, etag)
        return found

    def _cached(self, path: str) -> str | None:
        found = try_to_load_from_cache(
            self.id, path, repo_type=self.kind, revision=self.commit
        )  # fmt: skip
        return found if isinstance(found, str) else None

    def _remember(self, commit: str) -> None:
        """Keep in the cache what the revision means, as the client does where it is asked by name."""
        if commit == self.revision:
            return
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
            repo_id=self.id, repo_type=self.kind
        )
        path = folder / "refs" / self.about.revision
        with contextlib.suppress(OSError):  # a cache that cannot be written may still be read
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_name(f".{path.name}.{os.getpid()}")
            partial_path.write_text(commit)
            partial_path.replace(path)

    def _not_cached(self, what: str) -> AccessError:
        kind = "" if self.kind == "model" else f" --repo-type {self.kind}"
        revision = f" --revision {self.revision}" if self.revision else ""
        return AccessError(
            f"{self.name}: {what} is not in the cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE forbids to ask the Hub",
            f"fill the cache where there is a network: hf download {self.id}{kind}{revision}",
        )

    # --- writing

    def look(self) -> Tree | Literal["no repository", "no branch"]:
        """What the branch holds now."""

        def ask() -> Tree | Literal["no repository", "no branch"]:
            try:
                info = self.api.repo_info(
                    self.id, repo_type=self.kind, revision=self.revision, files_metadata=True
                )
            except hub.RevisionNotFoundError:
                return "no branch"
            except hub.GatedRepoError:
                raise
            except hub.RepositoryNotFoundError:
                return "no repository"
            files = {
                file.rfilename: Blob(
                    file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or ""
                )
                for file in info.siblings or []
                if file.rfilename != ITS_OWN
            }
            return Tree(info.sha or "", files)

        return self.call("looking at", ask)

    def read(self, path: str, commit: str) -> bytes:
        """A small file's content."""
        url = hf_hub_url(
            self.id, path, repo_type=self.kind, revision=commit, endpoint=self.api.endpoint
        )

        def ask() -> bytes:
            response = get_session().get(url, headers=self._headers())
            hf_raise_for_status(response)
            return response.content

        return self.call(f"reading {path} of", ask)

    def create(self, private: bool) -> bool:
        """Make the repository and the branch where they are missing. True: this made the repository,
        and knows it."""

        def ask() -> bool:
            try:
                self.api.create_repo(self.id, repo_type=self.kind, private=private)
            except hub.HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                return False
            return True

        made = self.call("creating", ask)
        if self.revision not in (None, "main"):
            self.call(
                f"making the branch {self.revision} of",
                lambda: self.api.create_branch(
                    self.id, repo_type=self.kind, branch=str(self.revision), exist_ok=True
                ),
            )
        return made

    def delete_if_empty(self) -> None:
        """Remove a repository that has no file of anybody's. A token may be refused it: it stays."""
        tree = Repository(self.kind, self.id, None, self.retries).look()
        if not isinstance(tree, Tree) or tree.files:
            return
        try:
            self.call(
                "removing",
                lambda: self.api.delete_repo(self.id, repo_type=self.kind, missing_ok=True),
            )
        except AccessError:
            self.retries.tell(f"{self.name} was made to try the token, and is left there empty")

    def prove_writable(self, branch: str | None) -> None:
        """Announce a small file, as before a commit: the Hub looks at the token, and does nothing."""
        probe = CommitOperationAdd("lorajob-probe.txt", b"lorajob\n")
        self.call(
            "asking to write to",
            lambda: self.api.preupload_lfs_files(
                self.id, [probe], repo_type=self.kind, revision=branch
            ),
        )

    def upload(self, additions: list[Addition]) -> None:
        """Send the large files among these, so that a commit can name them. What has arrived
        before, in this run or an earlier one, is not sent again."""
        self.api.preupload_lfs_files(
            self.id,
            additions,
            repo_type=self.kind,
            revision=self.revision,
            free_memory=False,
            gitignore_content="",  # or a .gitignore there could leave out what the manifest lists
        )

    def send_commit(
        self, parent: Tree, additions: list[Addition], deletions: list[str], message: str
    ) -> None:
        """One commit on top of `parent`. Raises Overtaken where the branch has moved on."""
        operations = [*additions, *(CommitOperationDelete(path) for path in deletions)]
        try:
            self.api.create_commit(
                self.id,
                operations,
                repo_type=self.kind,
                revision=self.revision,
                commit_message=message,
                parent_commit=parent.commit,
            )
        except hub.HfHubHTTPError as error:
            if error.response.status_code in (409, 412):
                raise Overtaken from None
            raise

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(library_name="lorajob", library_version=__version__)


def _remove(pointer: Path) -> None:
    """Remove a file from the cache: the name in the snapshot and what it leads to."""
    while pointer.is_symlink():
        target = pointer.parent / pointer.readlink()
        pointer.unlink()
        pointer = target
    pointer.unlink(missing_ok=True)
