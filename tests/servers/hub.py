"""A double of the Hugging Face Hub for the unmodified `huggingface_hub` client.

One server, two names of loopback: `http://127.0.0.1:PORT` is the Hub, `http://localhost:PORT` its
LFS storage. The client drops its token only towards another host name, so two ports would not do;
the double notes every token that reaches the storage all the same (`Hub.leaks`).

It answers what the client asks with Xet switched off (`HF_HUB_DISABLE_XET=1`). Contents lie on disk
and are streamed; repositories, commits and tokens live in memory behind one lock.

URLs in answers name the port that the request asked for, not the port the server listens on, so a
proxy in front of the double sees the storage's traffic too.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import shutil
import socket
import struct
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal

from tests.servers.hub_model import (
    GITATTRIBUTES,
    PIECE,
    Blob,
    Commit,
    Refusal,
    Repo,
    RepoType,
    Role,
    Token,
    Upload,
    git_oid,
    hash_file,
    history,
    is_lfs,
    lfs_blob,
    now,
)
from tests.servers.hub_routes import (
    ROUTES,
    Answer,
    Broken,
    Call,
    Request,
    StorageRefusal,
    refused,
)
from tests.servers.hub_uploads import storage

How = Literal["answer", "reset", "lost", "cut", "short", "flipped"]

CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets the connection


@dataclass
class Failure:
    left: int
    status: int
    headers: dict[str, str]
    match: re.Pattern[str]
    how: How


class Hub:
    """The double, as a test sees it. Made by `running_hub`."""

    def __init__(self, folder: Path, part_size: int, page_size: int) -> None:
        self.folder = folder
        self.part_size = part_size  # larger LFS objects are sent in parts of this size
        self.page_size = page_size  # entries in one page of a listing
        self.port = 0
        self.leaks: list[str] = []  # requests that brought a token to the storage
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, Token] = {}
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.RLock()
        self._requests: list[Request] = []
        self._failures: list[Failure] = []
        self._secret = secrets.token_bytes(16)
        for name in ("blobs", "uploads"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    # What tests call

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order they came."""
        with self.lock:
            return list(self._requests)

    def seen(self, match: str) -> list[Request]:
        """The requests whose `METHOD path` the pattern is found in."""
        return [request for request in self.requests if re.search(match, request.line)]

    def forget_requests(self) -> None:
        with self.lock:
            self._requests.clear()

    def environment(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """For a child process: this Hub, one token (the first added), a cache of its own."""
        value = token or next(iter(self.tokens), None)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            **({"HF_TOKEN": value} if value else {}),
        }

    def add_token(
        self,
        token: str,
        user: str,
        role: Role = "write",
        orgs: Mapping[str, str] | Sequence[str] = (),
        write_to: Sequence[str] = (),
        read_from: Sequence[str] = (),
    ) -> str:
        """Let `token` in as `user`. `orgs` are names, or names with the user's role there;
        `write_to` and `read_from` are the owners and repositories of a fine-grained token."""
        roles = dict(orgs) if isinstance(orgs, Mapping) else dict.fromkeys(orgs, "write")
        with self.lock:
            self.tokens[token] = Token(token, user, role, roles, tuple(write_to), tuple(read_from))
        return token

    def revoke(self, token: str) -> None:
        with self.lock:
            self.tokens.pop(token, None)

    def add_repo(
        self,
        repo_id: str,
        repo_type: RepoType = "model",
        files: Mapping[str, bytes | Path] | None = None,
        private: bool = False,
        gated: Literal["auto", "manual", False] = False,
    ) -> str:
        """Make a repository with these files, without a request. Answers with its commit."""
        repo = self.new_repo(repo_id, repo_type, private, gated, repo_id.split("/")[0])
        tree = dict(repo.commit("main").files)
        for path, content in (files or {}).items():
            data = content if isinstance(content, bytes) else None
            size = len(data) if data is not None else Path(str(content)).stat().st_size
            lfs = is_lfs(path, size, data or b"", GITATTRIBUTES)
            blob = self.keep(content, lfs)
            if lfs:
                repo.objects[blob.sha256] = blob.size
            tree[path] = blob
        return self.commit(repo, "main", tree, "Add files", "", repo.creator).oid

    def grant(self, repo_id: str, user: str, repo_type: RepoType = "model") -> None:
        """Let a user into a gated repository."""
        self.repos[repo_type, repo_id].granted.add(user)

    def files(
        self, repo_id: str, repo_type: RepoType = "model", revision: str = "main"
    ) -> dict[str, Blob]:
        """path -> content (`sha256`, `size`, `lfs`); the Hub's own .gitattributes is left out."""
        with self.lock:
            files = self.repos[repo_type, repo_id].commit(revision).files
        return {path: blob for path, blob in files.items() if path != ".gitattributes"}

    def read(
        self, repo_id: str, path: str, repo_type: RepoType = "model", revision: str = "main"
    ) -> bytes:
        blob = self.repos[repo_type, repo_id].commit(revision).files[path]
        return self.blob_path(blob.sha256).read_bytes()

    def commits(
        self, repo_id: str, repo_type: RepoType = "model", revision: str = "main"
    ) -> list[Commit]:
        """Newest first; the last one is the Hub's own."""
        with self.lock:
            return list(history(self.repos[repo_type, repo_id], revision))

    def fail_next(
        self,
        n: int = 1,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        match: str = "",
        how: How = "answer",
    ) -> None:
        """Fail the next `n` requests whose `METHOD path?query` the pattern is found in.

        answer   `status` and `headers`; the request's body is read, nothing is done
        reset    the connection is reset, nothing is done
        lost     it is done, and the connection reset in place of the answer
        cut      half of the answer's body, then the connection is closed
        short    half of the answer's body, announced as if it were all
        flipped  the whole body, one bit of it wrong
        """
        with self.lock:
            failure = Failure(n, status, dict(headers or {}), re.compile(match), how)
            self._failures.append(failure)

    def planted_left(self) -> int:
        """How many planted failures have not happened."""
        with self.lock:
            return sum(failure.left for failure in self._failures)

    # What the handlers use

    def note(self, request: Request) -> None:
        with self.lock:
            self._requests.append(request)

    def failure_for(self, request: Request) -> Failure | None:
        with self.lock:
            for failure in self._failures:
                if failure.left and failure.match.search(request.line):
                    failure.left -= 1
                    request.planted = True
                    return failure
        return None

    def blob_path(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def fresh_path(self) -> Path:
        return self.folder / "uploads" / secrets.token_hex(8)

    def signature(self, *parts: str) -> str:
        return hmac.new(self._secret, "\n".join(parts).encode(), "sha256").hexdigest()

    def keep(self, content: bytes | Path, lfs: bool) -> Blob:
        """Take a content into the store."""
        if isinstance(content, bytes):
            sha256, size = hashlib.sha256(content).hexdigest(), len(content)
        else:
            sha256, size = hash_file(content)
        path = self.blob_path(sha256)
        if not path.exists():
            partial = self.fresh_path()
            if isinstance(content, bytes):
                partial.write_bytes(content)
            else:
                shutil.copyfile(content, partial)
            partial.replace(path)
        if lfs:
            return lfs_blob(sha256, size)
        return Blob(git_oid(path.read_bytes()), sha256, size, lfs=False)

    def new_repo(
        self,
        repo_id: str,
        repo_type: RepoType,
        private: bool,
        gated: Literal["auto", "manual", False],
        creator: str,
    ) -> Repo:
        with self.lock:
            repo = Repo(repo_id, repo_type, private, gated, creator, now())
            self.repos[repo_type, repo_id] = repo
            attributes = self.keep(GITATTRIBUTES.encode(), lfs=False)
            self.commit(repo, "main", {".gitattributes": attributes}, "initial commit", "", creator)
            return repo

    def commit(
        self, repo: Repo, branch: str, files: dict[str, Blob], title: str, message: str, author: str
    ) -> Commit:
        with self.lock:
            parent, date = repo.branches.get(branch), now()
            tree = sorted((path, blob.oid) for path, blob in files.items())
            seed = json.dumps([parent, tree, title, message, date, len(repo.commits)])
            oid = hashlib.sha1(seed.encode()).hexdigest()
            commit = Commit(oid, parent, files, title, message, author, date)
            repo.commits[oid] = commit
            repo.branches[branch] = oid
            return commit


# HTTP


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    hub: ClassVar[Hub]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, Broken):
            super().handle()

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        name = headers.get("host", "").rsplit(":", 1)[0]
        token = self.hub.tokens.get(headers.get("authorization", "").removeprefix("Bearer "))
        request = Request(
            method=self.command,
            path=self.path,
            host="storage" if name == "localhost" else "hub",
            user=token.user if token else None,
            headers=headers | ({"authorization": "***"} if "authorization" in headers else {}),
        )
        self.hub.note(request)
        call = Call(self.hub, request, token, self.rfile)
        failure = self.hub.failure_for(request)
        how = failure.how if failure else None
        if how == "reset":
            return self.reset()
        if failure and how == "answer":
            answer = refused(request.host, failure.status, "planted failure")
            answer.headers |= failure.headers
        else:
            answer = self.routed(call)
        for _ in call.pieces():  # what is left of the body would be taken for the next request
            pass
        if how == "lost":
            return self.reset()
        return self.send(request, answer, how)

    def routed(self, call: Call) -> Answer:
        request = call.request
        try:
            if "transfer-encoding" in request.headers:
                self.close_connection = True
                if request.host == "storage":
                    raise StorageRefusal(501, "NotImplemented", "Transfer-Encoding: chunked")
                raise Refusal(411, "Length Required")
            if request.host == "storage":
                return storage(call)
            if "authorization" in request.headers and call.token is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for pattern, function in ROUTES:
                if found := pattern.fullmatch(f"{request.method} {call.path}"):
                    call.args = {k: v for k, v in found.groupdict().items() if v is not None}
                    return function(call)
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except StorageRefusal as no:
            body = f"<Error><Code>{no.code}</Code><Message>{no.message}</Message></Error>"
            return Answer(body.encode(), no.status, {"Content-Type": "application/xml"})
        except Refusal as no:
            answer = refused("hub", no.status, no.message, no.code, no.more)
            answer.headers |= no.more.get("headers", {})
            return answer

    def send(self, request: Request, answer: Answer, how: How | None) -> None:
        length = answer.length
        going = length // 2 if how in ("cut", "short") else length
        announced = going if how == "short" else length
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command == "HEAD":
            return
        request.sent = going  # the client may have it all before this thread goes on
        if isinstance(answer.body, bytes):
            self.wfile.write(answer.body[:going])
        else:
            self.send_file(request, answer.body[0], answer.body[1], going, flip=how == "flipped")
        self.close_connection |= how == "cut"

    def send_file(self, request: Request, path: Path, start: int, going: int, flip: bool) -> None:
        with path.open("rb") as file:
            file.seek(start)
            try:
                if flip and going:
                    self.wfile.write(bytes([file.read(1)[0] ^ 1]))
                if rest := start + going - file.tell():
                    self.connection.sendfile(file, file.tell(), rest)
            except OSError:
                request.sent = file.tell() - start
                raise

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSED)
        self.close_connection = True
        self.rfile.close()  # it holds the socket open
        self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
        self.open: set[socket.socket] = set()
        self.bugs: list[str] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A bug in the double must not look like a network that failed: see `running_hub`."""
        self.bugs.append(traceback.format_exc())


@contextlib.contextmanager
def running_hub(folder: Path, part_size: int = PIECE, page_size: int = 4) -> Iterator[Hub]:
    """The double on a port of its own; its contents go below `folder`.

    `part_size` is what an LFS object may have to be sent in one piece, and the size of the pieces
    otherwise; `page_size` is small so that a listing of a few files has several pages.
    """
    hub = Hub(folder, part_size, page_size)
    server = Server(hub)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        for connection in list(server.open):  # or kept-alive connections would still be answered
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
        assert not server.bugs, "\n".join(server.bugs)
