"""What the double of the Hub answers to questions: accounts, repositories, listings, downloads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

from tests.servers.hub_model import (
    PIECE,
    Commit,
    Refusal,
    Repo,
    RepoType,
    Token,
    can_create,
    can_read,
    can_write,
    card_faults,
    front_matter,
    history,
    is_let_in,
    pointer,
    whoami,
)

if TYPE_CHECKING:
    from tests.servers.hub import Hub

URL_LIFETIME_S = 3600


# Requests and answers


@dataclass
class Request:
    """One request as it came in; `sent` and `status` are filled in while it is answered."""

    method: str
    path: str  # with its query
    host: Literal["hub", "storage"]
    user: str | None
    headers: dict[str, str]  # names in lower case
    received: int = 0  # bytes of body
    sent: int = 0
    status: int | None = None  # None: no answer was given
    planted: bool = False  # a failure of `fail_next`

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class StorageRefusal(Exception):
    """An answer that says no, as S3 words it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Broken(Exception):
    """The client went away."""


@dataclass
class Answer:
    body: bytes | tuple[Path, int, int] = b""  # or a file, first byte, number of bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body[2]


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    kind = {"Content-Type": "application/json"}
    return Answer(json.dumps(value).encode(), status, kind | dict(headers or {}))


def refused(
    host: str, status: int, message: str, code: str | None = None, more: Mapping[str, Any] = {}
) -> Answer:
    if host == "storage":
        body = f"<Error><Code>InternalError</Code><Message>{message}</Message></Error>"
        return Answer(body.encode(), status, {"Content-Type": "application/xml"})
    extra = {name: value for name, value in more.items() if name != "headers"}
    answer = as_json({"error": message, **extra}, status, {"X-Error-Message": message})
    if code:
        answer.headers["X-Error-Code"] = code
    return answer


class Call:
    """A request being answered: what the routes get."""

    def __init__(
        self, hub: Hub, request: Request, token: Token | None, body: BufferedIOBase
    ) -> None:
        self.hub, self.request, self.token, self._body = hub, request, token, body
        parts = urlsplit(request.path)
        self.path = parts.path  # still quoted: a revision may hold a quoted slash
        self.query = parse_qs(parts.query)
        self.args: dict[str, str] = {}
        port = request.headers.get("host", "").rpartition(":")[2]
        self.hub_url = f"http://127.0.0.1:{port}"
        self.storage_url = f"http://localhost:{port}"
        self.length = int(request.headers.get("content-length", 0))

    def one(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def pieces(self) -> Iterator[bytes]:
        while self.request.received < self.length:
            piece = self._body.read(min(PIECE, self.length - self.request.received))
            if not piece:
                raise Broken
            self.request.received += len(piece)
            yield piece

    def data(self) -> bytes:
        return b"".join(self.pieces())

    def json(self) -> Any:
        try:
            return json.loads(self.data())
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None

    def receive(self, path: Path) -> tuple[str, str]:
        """Stream the body into a file; its sha256 and its MD5."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with path.open("wb") as file:
            for piece in self.pieces():
                sha256.update(piece)
                md5.update(piece)
                file.write(piece)
        return sha256.hexdigest(), md5.hexdigest()

    # Access

    def signed_in(self) -> Token:
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        return self.token

    def repo(self) -> Repo:
        """The repository that the path names, if the caller may see it."""
        kind = self.args.get("kind") or "models"
        repo = self.hub.repos.get((kind.rstrip("/").removesuffix("s"), unquote(self.args["id"])))
        if repo is not None and can_read(self.token, repo):
            return repo
        if self.token is None:
            # The client knows this 401 by an https:// URL; here the code has to tell it.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self) -> tuple[Repo, Token]:
        if self.one("create_pr"):
            raise Refusal(501, "the double serves no pull requests")
        repo, token = self.repo(), self.signed_in()
        if token.role == "read":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not can_write(token, repo):
            raise Refusal(
                403,
                "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
            )
        return repo, token

    def open_repo(self) -> Repo:
        """The repository, if the caller may have its files as well."""
        repo = self.repo()
        if is_let_in(self.token, repo):
            return repo
        name = f"{repo.repo_type} {repo.repo_id}"
        if self.token is None:
            raise Refusal(
                401,
                f"Access to {name} is restricted. You must have access to it and be"
                " authenticated to access it. Please log in.",
                "GatedRepo",
            )
        raise Refusal(
            403,
            f"Access to {name} is restricted and you are not in the authorized list. Visit"
            f" {self.hub_url}/{repo.path} to ask for access.",
            "GatedRepo",
        )

    def revision(self) -> str:
        return unquote(self.args.get("revision") or "main")

    def sign(self, method: str, base: str, path: str, **query: str) -> str:
        query["Expires"] = str(int(time.time()) + URL_LIFETIME_S)
        parts = [f"{name}={query[name]}" for name in sorted(query)]
        query["Signature"] = self.hub.signature(method, path, *parts)
        return f"{base}{path}?{urlencode(query)}"

    def signed(self) -> None:
        """The URL is one that the Hub gave out, unchanged, for this method, and not too old."""
        query = {name: values[0] for name, values in self.query.items()}
        given = query.pop("Signature", "")
        parts = [f"{name}={query[name]}" for name in sorted(query)]
        wanted = self.hub.signature(self.request.method, self.path, *parts)
        if not hmac.compare_digest(given, wanted):
            raise StorageRefusal(403, "SignatureDoesNotMatch", "The signature does not match.")
        if int(query["Expires"]) < time.time():
            raise StorageRefusal(403, "AccessDenied", "Request has expired")


Route = Callable[[Call], Answer]
ROUTES: list[tuple[re.Pattern[str], Route]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"


def route(methods: str, path: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((re.compile(f"(?:{methods}) {path}"), function))
        return function

    return add


# Account


@route("GET", "/api/whoami-v2")
def get_whoami(call: Call) -> Answer:
    return as_json(whoami(call.signed_in()))


@route("POST", "/api/validate-yaml")
def post_validate_yaml(call: Call) -> Answer:
    errors, warnings = card_faults(call.json()["content"])
    found = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return as_json(found, 400 if errors else 200)


# Repositories


@route("POST", "/api/repos/create")
def post_create(call: Call) -> Answer:
    wanted, token = call.json(), call.signed_in()
    owner = wanted.get("organization") or token.user
    repo_type: RepoType = wanted.get("type") or "model"
    repo_id = f"{owner}/{wanted['name']}"
    if not can_create(token, owner):
        raise Refusal(
            403,
            f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"',
        )
    with call.hub.lock:
        known = call.hub.repos.get((repo_type, repo_id))
        if known is None:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            repo = call.hub.new_repo(repo_id, repo_type, private, False, token.user)
        else:
            repo = known
    url = f"{call.hub_url}/{repo.path}"
    if known is not None:
        # The client reads `url` from this answer too, when told that it may exist.
        raise Refusal(409, f"You already created this {repo_type} repo", url=url)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    wanted, token = call.json(), call.signed_in()
    repo_type = wanted.get("type") or "model"
    repo_id = f"{wanted.get('organization') or token.user}/{wanted['name']}"
    call.args = {"kind": f"{repo_type}s", "id": repo_id}
    call.writable()
    with call.hub.lock:
        del call.hub.repos[repo_type, repo_id]
    return Answer(b"OK", headers={"Content-Type": "text/plain"})


@route("GET", f"{API}(?:/revision/{REVISION})?")
def get_info(call: Call) -> Answer:
    repo = call.repo()
    commit = repo.commit(call.revision())
    with_blobs = call.one("blobs").lower() in ("true", "1")
    siblings = []
    for path, blob in sorted(commit.files.items()):
        entry: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            entry |= {"size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                entry["lfs"] = {
                    "sha256": blob.sha256,
                    "size": blob.size,
                    "pointerSize": len(pointer(blob.sha256, blob.size)),
                }
        siblings.append(entry)
    info: dict[str, Any] = {
        "_id": hashlib.sha1(repo.path.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "author": repo.owner,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
        "usedStorage": sum(repo.objects.values()),
    }
    if repo.repo_type == "model":
        info["modelId"] = repo.repo_id
    if card := commit.files.get("README.md"):
        with contextlib.suppress(yaml.YAMLError, OSError):
            text = call.hub.blob_path(card.sha256).read_text("utf-8", "replace")
            info["cardData"] = front_matter(text) or {}
    if wanted := call.query.get("expand"):
        info = {name: info[name] for name in ("_id", "id", *wanted) if name in info}
    return as_json(info)


@route("GET", f"{API}/auth-check(?P<write>/write)?")
def get_auth_check(call: Call) -> Answer:
    if call.args.get("write"):
        call.writable()
    else:
        call.open_repo()
    return as_json({})


@route("GET", f"{API}/refs")
def get_refs(call: Call) -> Answer:
    repo = call.repo()

    def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
            for name, oid in refs.items()
        ]

    return as_json(
        {
            "branches": listed(repo.branches, "heads"),
            "converts": [],
            "tags": listed(repo.tags, "tags"),
            **({"pullRequests": []} if call.one("include_prs") else {}),
        }
    )


@route("POST|DELETE", f"{API}/branch/{REVISION}")
def change_branch(call: Call) -> Answer:
    body = call.json() if call.request.method == "POST" else None
    (repo, _), name = call.writable(), call.revision()
    with call.hub.lock:
        if body is None:
            if name == "main" or name not in repo.branches:
                raise Refusal(400 if name == "main" else 404, f"Cannot delete branch {name}")
            del repo.branches[name]
        else:
            if name.startswith("refs/"):
                raise Refusal(400, f"Invalid reference for a branch: {name}")
            if name in repo.branches:
                raise Refusal(409, f"Reference refs/heads/{name} already exists")
            repo.branches[name] = repo.commit(body.get("startingPoint", "main")).oid
    return Answer()


@route("POST|DELETE", f"{API}/tag/{REVISION}")
def change_tag(call: Call) -> Answer:
    body = call.json() if call.request.method == "POST" else None
    repo, _ = call.writable()
    with call.hub.lock:
        if body is None:
            if repo.tags.pop(call.revision(), None) is None:
                raise Refusal(404, f"Invalid rev id: {call.revision()}", "RevisionNotFound")
        elif body["tag"] in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {body['tag']}")
        else:
            repo.tags[body["tag"]] = repo.commit(call.revision()).oid
    return Answer()


# Listings


def paged(call: Call, entries: list[dict[str, Any]]) -> Answer:
    start = int(base64.urlsafe_b64decode(call.one("cursor")) if call.one("cursor") else 0)
    end = start + call.hub.page_size
    headers = {}
    if end < len(entries):
        cursor = base64.urlsafe_b64encode(str(end).encode()).decode()
        query = {**{name: values[0] for name, values in call.query.items()}, "cursor": cursor}
        headers["Link"] = f'<{call.hub_url}{call.path}?{urlencode(query)}>; rel="next"'
    return as_json(entries[start:end], headers=headers)


def last_change(repo: Repo, start: Commit, path: str) -> dict[str, str]:
    def found(commit: Commit) -> list[tuple[str, str]]:
        return [
            (name, blob.oid)
            for name, blob in commit.files.items()
            if name == path or name.startswith(f"{path}/")
        ]

    last = start
    for commit in history(repo, start.oid):
        if found(commit) != found(start):
            break
        last = commit
    return {"id": last.oid, "title": last.title, "date": last.date}


def file_entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    blob = commit.files[path]
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size}
    if blob.lfs:
        size = len(pointer(blob.sha256, blob.size))
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
    entry["path"] = path
    if expand:
        entry["lastCommit"] = last_change(repo, commit, path)
        entry["securityFileStatus"] = {
            "status": "safe",
            "avScan": {"virusFound": False, "virusNames": None},
            "pickleImportScan": None,
        }
    return entry


def folder_entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    content = [
        f"{name} {blob.oid}" for name, blob in commit.files.items() if name.startswith(f"{path}/")
    ]
    oid = hashlib.sha1("\n".join(sorted(content)).encode()).hexdigest()
    entry: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if expand:
        entry["lastCommit"] = last_change(repo, commit, path)
    return entry


def folders_of(commit: Commit) -> set[str]:
    found: set[str] = set()
    for path in commit.files:
        steps = path.split("/")
        found.update("/".join(steps[:end]) for end in range(1, len(steps)))
    return found


@route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
def get_tree(call: Call) -> Answer:
    repo = call.repo()
    commit, top = repo.commit(call.revision()), unquote(call.args.get("path") or "").strip("/")
    folders = folders_of(commit)
    if top and top not in folders:
        raise Refusal(404, f'{top} does not exist on "{call.revision()}"', "EntryNotFound")
    recursive = call.one("recursive").lower() in ("true", "1")
    expand = call.one("expand").lower() in ("true", "1")
    prefix = f"{top}/" if top else ""

    def below(path: str) -> bool:
        return path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])

    return paged(
        call,
        [folder_entry(repo, commit, path, expand) for path in sorted(folders) if below(path)]
        + [file_entry(repo, commit, path, expand) for path in sorted(commit.files) if below(path)],
    )


@route("POST", f"{API}/paths-info/{REVISION}")
def post_paths_info(call: Call) -> Answer:
    form = parse_qs(call.data().decode())
    repo = call.repo()
    commit = repo.commit(call.revision())
    folders, expand = folders_of(commit), form.get("expand", [""])[0].lower() == "true"
    entries = []
    for path in (path.strip("/") for path in form.get("paths", [])):
        if path in commit.files:
            entries.append(file_entry(repo, commit, path, expand))
        elif path in folders:
            entries.append(folder_entry(repo, commit, path, expand))
    return as_json(entries)


@route("GET", f"{API}/commits/{REVISION}")
def get_commits(call: Call) -> Answer:
    entries = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": "/avatars/0.svg"}],
            "date": commit.date,
        }
        for commit in history(call.repo(), call.revision())
    ]
    return paged(call, entries)


# Downloads


@route("GET|HEAD", f"{WEB}/resolve/{REVISION}/(?P<path>.+)")
def get_resolve(call: Call) -> Answer:
    """Always a redirect: to the storage, or to an address that holds the commit."""
    repo = call.open_repo()
    commit, path = repo.commit(call.revision()), unquote(call.args["path"])
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(
            404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.oid}
        )
    headers = {"X-Repo-Commit": commit.oid, "X-Linked-Etag": f'"{blob.etag}"'}
    headers |= {"X-Linked-Size": str(blob.size)}
    if blob.lfs:
        name = path.rsplit("/", 1)[-1]
        location = call.sign("GET", call.storage_url, f"/lfs/{blob.sha256}", filename=name)
        return Answer(b"", 302, headers | {"Location": location})
    location = f"/api/resolve-cache/{repo.repo_type}s/{repo.repo_id}/{commit.oid}/{quote(path)}"
    return Answer(b"", 307, headers | {"ETag": f'"{blob.etag}"', "Location": location})


@route(
    "GET|HEAD", r"/api/resolve-cache/(?P<kind>\w+)/(?P<id>[^/]+/[^/]+)/(?P<oid>\w+)/(?P<path>.+)"
)
def get_resolved(call: Call) -> Answer:
    commit = call.open_repo().commit(call.args["oid"])
    blob = commit.files[unquote(call.args["path"])]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    return ranged(call, blob.sha256, headers)


def ranged(call: Call, sha256: str, headers: dict[str, str]) -> Answer:
    """A content, or the part of it that `Range` asks for."""
    path = call.hub.blob_path(sha256)
    size = path.stat().st_size
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Answer((path, 0, size), 200, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Answer((path, start, end - start), 206, headers)
