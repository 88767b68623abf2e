"""What the double of the Hub keeps: repositories, commits, tokens, and the rules about them."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

RepoType = Literal["model", "dataset", "space"]
Role = Literal["read", "write", "fineGrained"]

PIECE = 1 << 20  # bodies are read and hashed in pieces of this size
LFS_OVER = 10_000_000  # larger files are LFS whatever their name

LFS_NAMES = re.findall(
    r"\S+",
    """7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle
    pkl pt pth rar safetensors tar tflite tgz wasm xz zip zst""",
)
LFS_LINE = "filter=lfs diff=lfs merge=lfs -text"
GITATTRIBUTES = "".join(f"*.{name} {LFS_LINE}\n" for name in LFS_NAMES)

LICENSES = re.findall(
    r"\S+",
    """afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-4.0 cc-by-nc-4.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m ecl-2.0
    epl-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 mit mpl-2.0 ms-pl ncsa odbl odc-by openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib""",
)


@dataclass(frozen=True)
class Blob:
    """One content of a file."""

    oid: str  # git's name: of the content, or of the LFS pointer that stands for it
    sha256: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, Blob]
    title: str
    message: str
    author: str
    date: str


@dataclass(frozen=True)
class Token:
    value: str
    user: str
    role: Role
    orgs: dict[str, str]  # name -> admin | write | contributor | read
    write_to: tuple[str, ...]  # fineGrained: owners and repositories
    read_from: tuple[str, ...]

    def scoped(self, names: tuple[str, ...], repo_id: str) -> bool:
        return repo_id in names or repo_id.split("/")[0] in names


@dataclass(frozen=True)
class Uploaded:
    """Bytes that came in under a promised hash, which nothing has looked at yet."""

    path: Path
    sha256: str
    size: int


@dataclass
class Upload:
    """What an upload URL stands for."""

    repo: Repo
    oid: str
    parts: dict[int, str] = field(default_factory=dict)  # number -> etag
    complete: bool = False


@dataclass
class Repo:
    repo_id: str
    repo_type: RepoType
    private: bool
    gated: Literal["auto", "manual", False]
    creator: str
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)  # LFS: sha256 -> size, checked
    waiting: dict[str, Uploaded] = field(default_factory=dict)  # LFS: not checked yet
    granted: set[str] = field(default_factory=set)  # users let in where it is gated

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def path(self) -> str:
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    def commit(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class Refusal(Exception):
    """An answer that says no, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


# Contents and names


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def hash_file(path: Path) -> tuple[str, int]:
    hashed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            hashed.update(piece)
            size += len(piece)
    return hashed.hexdigest(), size


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    ).encode()


def lfs_blob(sha256: str, size: int) -> Blob:
    return Blob(git_oid(pointer(sha256, size)), sha256, size, lfs=True)


def glob_matches(pattern: str, path: str) -> bool:
    """As in .gitignore and .gitattributes: without a slash it means a name in any folder."""
    anchored = "/" in pattern.rstrip("/")
    pattern = pattern.strip("/")
    if not anchored:
        return fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    wild = {"**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(
        wild.get(part, re.escape(part)) for part in re.split(r"(\*\*/|/\*\*|\*|\?)", pattern)
    )
    return re.fullmatch(regex, path) is not None


def is_ignored(path: str, gitignore: str) -> bool:
    """The last line that names the file or a folder above it decides."""
    steps = path.split("/")
    above = ["/".join(steps[: end + 1]) for end in range(len(steps))]
    ignored = False
    for line in gitignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = not pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        places = above[:-1] if pattern.endswith("/") else above
        if any(glob_matches(pattern, place) for place in places):
            ignored = wanted
    return ignored


def is_lfs(path: str, size: int, sample: bytes, gitattributes: str) -> bool:
    """By name, by size, or because it is no text: git on the Hub refuses binary files."""
    named = any(
        glob_matches(line.split()[0], path)
        for line in gitattributes.splitlines()
        if "filter=lfs" in line
    )
    return size > 0 and (named or size > LFS_OVER or b"\0" in sample[:512])


def front_matter(card: str) -> Any:
    found = re.match(r"\s*---\s*\n(.*?)\n?---\s*(\n|$)", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def card_faults(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README.md's metadata."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"metadata" must be of type object'], []
    errors = []
    licences = data.get("license", [])
    for licence in licences if isinstance(licences, list) else [licences]:
        if licence not in LICENSES:
            errors.append(f'"license" must be one of {", ".join(LICENSES)}')
    bases = data.get("base_model", [])
    for index, base in enumerate(bases if isinstance(bases, list) else [bases]):
        if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            where = f"base_model[{index}]" if isinstance(bases, list) else "base_model"
            errors.append(
                f'"{where}" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            )
    for name in ("tags", "datasets"):
        if not isinstance(data.get(name, []), list):
            errors.append(f'"{name}" must be an array')
    return errors, []


def history(repo: Repo, revision: str) -> Iterator[Commit]:
    commit: Commit | None = repo.commit(revision)
    while commit is not None:
        yield commit
        commit = repo.commits[commit.parent] if commit.parent else None


# Who may do what


def can_read(token: Token | None, repo: Repo) -> bool:
    if not repo.private:
        return True
    if token is None or repo.owner not in (token.user, *token.orgs):
        return False
    if token.role == "fineGrained":
        return token.scoped((*token.write_to, *token.read_from), repo.repo_id)
    return True


def can_write(token: Token, repo: Repo) -> bool:
    role = token.orgs.get(repo.owner)
    owns = repo.owner == token.user or role in ("admin", "write")
    owns = owns or (role == "contributor" and repo.creator == token.user)
    if token.role == "fineGrained":
        return owns and token.scoped(token.write_to, repo.repo_id)
    return owns and token.role == "write"


def can_create(token: Token, owner: str) -> bool:
    member = owner == token.user or token.orgs.get(owner) in ("admin", "write", "contributor")
    return member and (
        token.role == "write" or (token.role == "fineGrained" and owner in token.write_to)
    )


def is_let_in(token: Token | None, repo: Repo) -> bool:
    """To a gated repository's files."""
    if not repo.gated:
        return True
    return token is not None and (
        token.user in repo.granted or repo.owner in (token.user, *token.orgs)
    )


def whoami(token: Token) -> dict[str, Any]:
    access: dict[str, Any] = {
        "displayName": f"{token.user}-{token.role}",
        "role": token.role,
        "createdAt": "2026-01-01T00:00:00.000Z",
    }
    if token.role == "fineGrained":
        scoped = []
        for name in dict.fromkeys((*token.write_to, *token.read_from)):
            kind = "model" if "/" in name else "user" if name == token.user else "org"
            rights = ["repo.content.read"]
            rights += ["repo.write"] if name in token.write_to else []
            entity = {"_id": hashlib.sha1(name.encode()).hexdigest()[:24], "type": kind}
            scoped.append({"entity": {**entity, "name": name}, "permissions": rights})
        access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    return {
        "type": "user",
        "id": hashlib.sha1(token.user.encode()).hexdigest()[:24],
        "name": token.user,
        "fullname": token.user.title(),
        "isPro": False,
        "canPay": False,
        "periodEnd": None,
        "avatarUrl": "/avatars/0.svg",
        "orgs": [
            {
                "type": "org",
                "id": hashlib.sha1(name.encode()).hexdigest()[:24],
                "name": name,
                "fullname": name.title(),
                "isEnterprise": False,
                "canPay": False,
                "periodEnd": None,
                "avatarUrl": "/avatars/0.svg",
                "roleInOrg": role,
            }
            for name, role in token.orgs.items()
        ],
        "auth": {"type": "access_token", "accessToken": access},
    }
