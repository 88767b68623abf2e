"""One repository on the Hub as it is now: what it holds, and commits to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    constants,
    get_session,
    hf_hub_url,
)
from huggingface_hub import errors as hub
from huggingface_hub.hf_api import DatasetInfo, ModelInfo
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from jobs import __version__
from jobs.errors import AccessError, LorajobError
from jobs.store.hub.client import Account, hub_api
from jobs.store.hub.errors import About, Damaged, Overtaken, judge
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
            revision=self.branch,
            token=self.account.phrase,
        )

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    def call(self, what: str, do: Callable[[], T]) -> T:
        return self.retries.call(f"{what} {self.name}", do, self.judge)

    def judge(self, error: BaseException) -> Again | LorajobError | None:
        return judge(error, self.about)

    def look(self) -> Tree | Literal["no repository", "no branch"]:
        """What the branch holds now."""

        def ask() -> Tree | Literal["no repository", "no branch"]:
            try:
                info = self.api.repo_info(
                    self.id, repo_type=self.kind, revision=self.revision, files_metadata=True
                )
                assert isinstance(info, ModelInfo | DatasetInfo)
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

    def read(self, path: str, tree: Tree) -> bytes:
        """A small file's content."""
        url = hf_hub_url(
            self.id, path, repo_type=self.kind, revision=tree.commit, endpoint=self.api.endpoint
        )

        def ask() -> bytes:
            response = get_session().get(url, headers=self.headers())
            hf_raise_for_status(response)
            if not tree.files[path].sha256 and git_id(response.content) != tree.files[path].git:
                raise Damaged(path)
            return response.content

        return self.call(f"reading {path} of", ask)

    def read_json(self, path: str, tree: Tree | None = None) -> Any:
        """What a JSON file says, or None where there is none or it is no JSON."""
        there = tree or self.look()
        if not isinstance(there, Tree) or path not in there.files:
            return None
        try:
            return json.loads(self.read(path, there))
        except (ValueError, RecursionError):
            return None

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
        if self.branch != constants.DEFAULT_REVISION:
            self.call(
                f"making the branch {self.revision} of",
                lambda: self.api.create_branch(
                    self.id, repo_type=self.kind, branch=self.branch, exist_ok=True
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

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
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
        self,
        parent: Tree,
        additions: Sequence[CommitOperationAdd],
        deletions: list[str],
        message: str,
    ) -> None:
        """One commit on top of `parent`. Raises Overtaken where the branch has moved on."""
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]
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

    def headers(self) -> dict[str, str]:
        return build_hf_headers(library_name="lorajob", library_version=__version__)
