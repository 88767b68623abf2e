"""How files come into the double of the Hub: preupload, LFS batch, storage, commit."""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.servers.hub_model import (
    LFS_LINE,
    PIECE,
    Blob,
    Commit,
    Refusal,
    Repo,
    Upload,
    Uploaded,
    card_faults,
    hash_file,
    is_ignored,
    is_lfs,
    lfs_blob,
)
from tests.servers.hub_routes import (
    API,
    REVISION,
    WEB,
    Answer,
    Call,
    StorageRefusal,
    as_json,
    ranged,
    route,
)

if TYPE_CHECKING:
    from tests.servers.hub import Hub


@route("POST", f"{API}/preupload/{REVISION}")
def post_preupload(call: Call) -> Answer:
    wanted = call.json()
    repo, _ = call.writable()
    commit = repo.commit(call.revision())
    attributes = text_of(call.hub, commit.files, ".gitattributes")
    ignore = wanted.get("gitIgnore")
    if ignore is None:
        ignore = text_of(call.hub, commit.files, ".gitignore")
    files = []
    for entry in wanted["files"]:
        path, known = entry["path"], commit.files.get(entry["path"])
        sample = base64.b64decode(entry["sample"])
        lfs = is_lfs(path, entry["size"], sample, attributes)
        files.append(
            {
                "path": path,
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": is_ignored(path, ignore),
                **({"oid": known.etag} if known else {}),
            }
        )
    return as_json({"files": files, "commitOid": commit.oid})


def text_of(hub: Hub, files: dict[str, Blob], path: str) -> str:
    blob = files.get(path)
    return hub.blob_path(blob.sha256).read_text("utf-8", "replace") if blob else ""


@route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
def post_batch(call: Call) -> Answer:
    wanted = call.json()
    repo, _ = call.writable()
    if wanted["operation"] != "upload" or wanted.get("hash_algo", "sha256") != "sha256":
        raise Refusal(422, "only uploads by sha256 are served")
    objects, by_parts = [], False
    for entry in wanted["objects"]:
        oid, size = entry["oid"], entry["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        objects.append(answer)
        if oid in repo.objects:
            continue
        upload = secrets.token_hex(8)
        with call.hub.lock:
            call.hub.uploads[upload] = Upload(repo, oid)
        where = f"/lfs-uploads/{upload}"
        action: dict[str, Any] = {}
        if size > call.hub.part_size and "multipart" in wanted["transfers"]:
            by_parts = True
            count = -(-size // call.hub.part_size)
            action["href"] = call.sign(
                "POST", call.hub_url, "/api/complete_multipart", upload=upload
            )
            action["header"] = {"chunk_size": str(call.hub.part_size)} | {
                f"{number:05}": call.sign("PUT", call.storage_url, where, partNumber=str(number))
                for number in range(1, count + 1)
            }
        else:
            action["href"] = call.sign("PUT", call.storage_url, where)
        verify = f"{call.hub_url}/{repo.path}.git/info/lfs/objects/verify"
        answer |= {"authenticated": True, "actions": {"upload": action, "verify": {"href": verify}}}
    body = {"transfer": "multipart" if by_parts else "basic", "objects": objects}
    return as_json(body, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("POST", "/api/complete_multipart")
def post_complete(call: Call) -> Answer:
    """No token comes with this one: the URL's signature is the right to do it."""
    call.signed()
    wanted = call.json()
    upload = call.hub.uploads[call.one("upload")]
    parts = [(part["partNumber"], part["etag"].strip('"')) for part in wanted["parts"]]
    if wanted["oid"] != upload.oid or parts != sorted(upload.parts.items()):
        raise Refusal(400, "One or more of the specified parts could not be found.")
    if upload.complete:  # asked again, because the answer was lost
        return as_json({})
    whole = call.hub.fresh_path()
    with whole.open("wb") as target:
        for number, _ in parts:
            with part_path(call.hub, call.one("upload"), number).open("rb") as part:
                shutil.copyfileobj(part, target, PIECE)
    sha256, size = hash_file(whole)
    with call.hub.lock:
        upload.complete = True
        await_check(upload, Uploaded(whole, sha256, size))
    for number, _ in parts:
        part_path(call.hub, call.one("upload"), number).unlink(missing_ok=True)
    return as_json({})


def part_path(hub: Hub, upload: str, number: int) -> Path:
    return hub.folder / "uploads" / f"{upload}.{number}"


def await_check(upload: Upload, came: Uploaded) -> None:
    before = upload.repo.waiting.pop(upload.oid, None)
    if before is not None:
        before.path.unlink(missing_ok=True)
    upload.repo.waiting[upload.oid] = came


def accept(hub: Hub, repo: Repo, oid: str, size: int | None) -> bool:
    """Take an uploaded object over if it is what its name says. True: the repository has it."""
    with hub.lock:
        if oid not in repo.objects and (came := repo.waiting.pop(oid, None)) is not None:
            if came.sha256 == oid and size in (None, came.size):
                came.path.replace(hub.blob_path(oid))
                repo.objects[oid] = came.size
            else:
                came.path.unlink(missing_ok=True)
        return oid in repo.objects and size in (None, repo.objects[oid])


@route("POST", rf"{WEB}\.git/info/lfs/objects/verify")
def post_verify(call: Call) -> Answer:
    wanted = call.json()
    repo, _ = call.writable()
    known = wanted["oid"] in repo.objects or wanted["oid"] in repo.waiting
    if not accept(call.hub, repo, wanted["oid"], wanted["size"]):
        if not known:
            raise Refusal(404, f"Object {wanted['oid']} does not exist")
        raise Refusal(
            422, f"Object {wanted['oid']} does not have the size and sha256 it was named by"
        )
    return as_json({})


@route("POST", f"{API}/commit/{REVISION}")
def post_commit(call: Call) -> Answer:
    body = call.hub.fresh_path()
    try:
        call.receive(body)
        repo, token = call.writable()
        header, changes = read_commit(call.hub, body)
    finally:
        body.unlink()
    with call.hub.lock:
        branch = call.revision()
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = header.get("parentCommit")
        if parent is not None and not repo.branches[branch].startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = changed(call.hub, repo, repo.commit(branch), changes)
        title, message = header["summary"], header.get("description", "")
        commit = call.hub.commit(repo, branch, files, title, message, token.user)
    url = f"{call.hub_url}/{repo.path}/commit/{commit.oid}"
    return as_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


Change = tuple[str, dict[str, Any]]


def read_commit(hub: Hub, body: Path) -> tuple[dict[str, Any], list[Change]]:
    """The header and the operations, one line at a time; contents go to disk at once."""
    header: dict[str, Any] = {}
    changes: list[Change] = []
    with body.open("rb") as lines:
        for number, line in enumerate(filter(None, map(bytes.strip, lines))):
            try:
                item = json.loads(line)
                kind, value = item["key"], item["value"]
            except (ValueError, KeyError):
                raise Refusal(400, f"line {number + 1} is not an operation") from None
            if number == 0:
                if kind != "header" or not value.get("summary"):
                    raise Refusal(400, "the first line must be a header with a summary")
                header = value
                continue
            path = value["path"].rstrip("/")
            if not path or path.startswith("/") or {"..", ".", ".git", ""} & set(path.split("/")):
                raise Refusal(400, f"Invalid path: {value['path']}")
            if kind == "file":
                content = base64.b64decode(value["content"], validate=True)
                if is_lfs("", len(content), content, ""):
                    raise Refusal(
                        400,
                        f"Your push was rejected because {path} is binary or over 10 MiB: use LFS",
                    )
                if path == "README.md" and (errors := card_faults(content.decode())[0]):
                    raise Refusal(400, f"Invalid metadata in README.md: {errors[0]}")
                value = {"path": path, "blob": hub.keep(content, lfs=False)}
            elif kind not in ("lfsFile", "deletedFile", "deletedFolder"):
                raise Refusal(400, f"unknown operation: {kind}")
            changes.append((kind, value | {"path": path}))
    return header, changes


def changed(hub: Hub, repo: Repo, parent: Commit, changes: list[Change]) -> dict[str, Blob]:
    """The files after these operations."""
    files = dict(parent.files)
    unlisted = []
    for kind, value in changes:
        path = value["path"]
        if kind == "file":
            files[path] = value["blob"]
        elif kind == "lfsFile":
            if not accept(hub, repo, value["oid"], value.get("size")):
                raise Refusal(
                    400,
                    "Your push was rejected because an LFS pointer pointed to a file that does not"
                    f" exist. Offending file: - {path}",
                )
            files[path] = lfs_blob(value["oid"], repo.objects[value["oid"]])
            unlisted.append(path)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            inside = [name for name in files if name.startswith(f"{path}/")]
            if not inside:
                raise Refusal(404, "A folder with this name doesn't exist", "EntryNotFound")
            for name in inside:
                del files[name]
    attributes = text_of(hub, files, ".gitattributes")
    named = attributes
    for path in unlisted:  # git would take it for text
        if not is_lfs(path, 1, b"", named):
            named += f"{path} {LFS_LINE}\n"
    if named != attributes:
        files[".gitattributes"] = hub.keep(named.encode(), lfs=False)
    return files


# The storage


def storage(call: Call) -> Answer:
    """S3 behind signed URLs: a token does not belong here, and a body needs its length."""
    if "authorization" in call.request.headers:
        call.hub.leaks.append(call.request.line)
        raise StorageRefusal(
            400, "InvalidArgument", "Only one auth mechanism allowed at a time is the signature."
        )
    call.signed()
    if call.request.method == "GET" and (found := re.fullmatch(r"/lfs/(\w{64})", call.path)):
        headers = {"ETag": f'"{found[1]}"'}
        headers["Content-Disposition"] = f'inline; filename="{call.one("filename")}";'
        return ranged(call, found[1], headers)
    upload = re.fullmatch(r"/lfs-uploads/(\w+)", call.path)
    if call.request.method != "PUT" or upload is None or upload[1] not in call.hub.uploads:
        raise StorageRefusal(404, "NoSuchKey", "The specified key does not exist.")
    into = call.hub.uploads[upload[1]]
    coming = call.hub.fresh_path()
    try:
        sha256, md5 = call.receive(coming)
        if number := int(call.one("partNumber", "0")):
            coming.replace(part_path(call.hub, upload[1], number))
            with call.hub.lock:
                into.parts[number] = md5
        else:
            kept = call.hub.fresh_path()
            coming.replace(kept)
            with call.hub.lock:
                await_check(into, Uploaded(kept, sha256, kept.stat().st_size))
    finally:
        coming.unlink(missing_ok=True)
    return Answer(headers={"ETag": f'"{md5}"'})
