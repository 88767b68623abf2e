"""The double of the Hub, proven through the client as it is."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import warnings
from pathlib import Path

import httpx
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from tests.servers.hub import Hub, running_hub
from tests.servers.hub_fixtures import TOKEN, hub
from tests.servers.hub_model import PIECE, git_oid, is_ignored

__all__ = ["hub"]  # a fixture

BOT = "acme/bot"
COMMIT = r"POST /api/models/acme/bot/commit/"


def content(size: int, seed: int = 0) -> bytes:
    """Binary content."""
    return b"\0" + random.Random(seed).randbytes(size - 1)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def statuses(hub: Hub, match: str) -> list[int | None]:
    return [request.status for request in hub.seen(match)]


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def bot(hub: Hub) -> Hub:
    """The Hub with one model."""
    files = {"config.json": b"{}", "model.safetensors": content(100_000), "gguf/a.txt": b"a\n"}
    hub.add_repo(BOT, files=files)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to upload: two texts, a small and a large binary."""
    folder = tmp_path / "results"
    (folder / "gguf").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"files": []}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Bot\n")
    (folder / "adapter.safetensors").write_bytes(content(1000, 1))
    (folder / "gguf" / "bot-Q8_0.gguf").write_bytes(content(2 * PIECE + 500_000, 2))
    return folder


def download(hub: Hub, path: str, revision: str | None = None, token: str | bool = TOKEN) -> bytes:
    return Path(
        hf_hub_download(BOT, path, revision=revision, token=token, endpoint=hub.endpoint)
    ).read_bytes()


# Accounts and access


def test_whoami_says_the_tokens_role_and_rights(hub: Hub, api: HfApi) -> None:
    me = api.whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("ada", "write")
    assert [(org["name"], org["roleInOrg"]) for org in me["orgs"]] == [("acme", "write")]
    hub.add_token("hf_fine", "ada", "fineGrained", ["acme"], write_to=[BOT])
    [scope] = api.whoami("hf_fine")["auth"]["accessToken"]["fineGrained"]["scoped"]
    assert (scope["entity"]["type"], scope["entity"]["name"]) == ("model", BOT)
    assert "repo.write" in scope["permissions"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as refused:
        api.whoami("hf_wrong")
    assert refused.value.response.status_code == 401


def test_a_repository_is_made_once(hub: Hub, api: HfApi) -> None:
    url = api.create_repo(BOT, private=True)
    assert (url.repo_id, str(url)) == (BOT, f"{hub.endpoint}/{BOT}")
    assert hub.repos["model", BOT].private
    assert api.create_repo(BOT, exist_ok=True).repo_id == BOT
    with pytest.raises(HfHubHTTPError, match="already created") as refused:
        api.create_repo(BOT)
    assert refused.value.response.status_code == 409
    assert api.create_repo("bot", repo_type="dataset").repo_id == "ada/bot"
    assert api.repo_exists("ada/bot", repo_type="dataset")
    assert not api.repo_exists("ada/bot")
    assert api.list_repo_files(BOT) == [".gitattributes"]
    hub.add_token("hf_read", "ada", "read", ["acme"])
    with pytest.raises(HfUriError):  # 403, then a look: only HF_ENDPOINT's URLs can be parsed
        api.create_repo(BOT, exist_ok=True, token="hf_read")
    api.delete_repo(BOT)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(BOT)
    api.delete_repo(BOT, missing_ok=True)


def test_who_may_not_write_is_told_so(bot: Hub, api: HfApi) -> None:
    bot.add_token("hf_read", "ada", "read", ["acme"])
    bot.add_token("hf_eve", "eve")
    bot.add_token("hf_fine", "ada", "fineGrained", ["acme"], write_to=["acme/other"])
    for token, message in {
        "hf_read": "you must use a write token",
        "hf_eve": "create_pr=1",
        "hf_fine": "create_pr=1",
    }.items():
        for name in ("a.json", "a.safetensors"):
            with pytest.raises(HfHubHTTPError, match=message) as refused:
                api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=BOT, token=token)
            assert refused.value.response.status_code == 403
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            api.auth_check(BOT, write=True, token=token)
        with pytest.raises(HfHubHTTPError, match="rights to create a model under the namespace"):
            api.create_repo("acme/new", token=token)
    assert len(bot.commits(BOT)) == 2
    bot.add_token("hf_scoped", "ada", "fineGrained", ["acme"], write_to=["acme"])
    api.auth_check(BOT, write=True, token="hf_scoped")
    api.create_repo("acme/new", token="hf_scoped")


def test_a_private_repository_is_not_there_for_others(hub: Hub) -> None:
    hub.add_repo(BOT, files={"a": b"a"}, private=True)
    hub.add_token("hf_eve", "eve")
    eve, nobody = HfApi(hub.endpoint, "hf_eve"), HfApi(hub.endpoint, False)
    for api, status in ((eve, 404), (nobody, 401)):
        for ask in (api.model_info, api.auth_check, api.list_repo_files):
            with pytest.raises(RepositoryNotFoundError) as refused:
                ask(BOT)
            assert refused.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            download(hub, "a", token=api.token or False)
    assert download(hub, "a") == b"a"
    assert HfApi(hub.endpoint, TOKEN).model_info(BOT).private


def test_a_wrong_token_is_refused_even_where_none_is_needed(bot: Hub) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        HfApi(bot.endpoint, "hf_wrong").model_info(BOT)
    assert refused.value.response.status_code == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)
    assert HfApi(bot.endpoint, False).model_info(BOT).id == BOT


def test_a_gated_repository_shows_itself_but_not_its_files(hub: Hub) -> None:
    hub.add_repo(BOT, files={"a": b"a"}, gated="manual")
    hub.add_token("hf_eve", "eve")
    eve = HfApi(hub.endpoint, "hf_eve")
    assert eve.model_info(BOT).gated == "manual"
    with pytest.raises(GatedRepoError, match="not in the authorized list") as refused:
        download(hub, "a", token="hf_eve")
    assert refused.value.response.status_code == 403
    with pytest.raises(GatedRepoError):
        eve.auth_check(BOT)
    with pytest.raises(GatedRepoError) as refused:
        download(hub, "a", token=False)
    assert refused.value.response.status_code == 401
    hub.grant(BOT, "eve")
    eve.auth_check(BOT)
    assert download(hub, "a", token="hf_eve") == b"a"


def test_a_token_revoked_on_the_way(hub: Hub, api: HfApi, folder: Path) -> None:
    api.create_repo(BOT)
    hub.fail_next(status=401, match=r"/verify$")
    with pytest.raises(RuntimeError, match="Error while uploading") as failed:
        api.upload_folder(repo_id=BOT, folder_path=folder)
    assert isinstance(failed.value.__cause__, HfHubHTTPError)
    hub.revoke(TOKEN)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.upload_folder(repo_id=BOT, folder_path=folder)
    assert hub.files(BOT) == {}


# Looking


def test_listings_come_in_pages(hub: Hub, api: HfApi) -> None:
    files = {f"data/{index:02}.bin": content(50, index) for index in range(10)}
    hub.add_repo(BOT, files={**files, "README.md": b"# A\n"})
    entries = list(api.list_repo_tree(BOT, recursive=True, expand=True))
    assert len(hub.seen(f"/api/models/{BOT}/tree/main")) == 4  # 13 entries, 4 on a page
    folders = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
    listed = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    assert folders == ["data"]
    assert set(listed) == {".gitattributes", "README.md", *files}
    for path, data in files.items():
        lfs = listed[path].lfs
        assert lfs is not None and (lfs.sha256, lfs.size) == (sha256(data), 50)
        assert listed[path].size == 50
    assert listed["README.md"].lfs is None
    assert listed["README.md"].blob_id == git_oid(b"# A\n")
    last = listed["README.md"].last_commit
    assert last is not None and last.oid == hub.commits(BOT)[0].oid
    assert [entry.path for entry in api.list_repo_tree(BOT)] == [
        "data", ".gitattributes", "README.md",
    ]  # fmt: skip
    assert len(list(api.list_repo_tree(BOT, "data"))) == 10
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(BOT, "nothing"))
    assert len(api.list_repo_commits(BOT)) == 2


def test_what_is_known_of_a_repository_and_its_paths(bot: Hub, api: HfApi) -> None:
    info = api.model_info(BOT, files_metadata=True)
    assert info.sha == bot.commits(BOT)[0].oid
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert siblings["config.json"].size == 2
    assert siblings["config.json"].blob_id == git_oid(b"{}")
    lfs = siblings["model.safetensors"].lfs
    assert lfs is not None and lfs.sha256 == sha256(content(100_000))
    plain = api.model_info(BOT).siblings or []
    assert {sibling.size for sibling in plain} == {None}
    paths = api.get_paths_info(BOT, ["model.safetensors", "gguf", "nothing"], expand=True)
    assert [(type(entry), entry.path) for entry in paths] == [
        (RepoFile, "model.safetensors"), (RepoFolder, "gguf"),
    ]  # fmt: skip
    assert paths[0].last_commit is not None
    assert api.model_info(BOT, expand=["sha"]).sha == info.sha
    bot.add_repo("acme/rows", "dataset", {"train.jsonl": b"{}\n"})
    rows = api.dataset_info("acme/rows", files_metadata=True)
    assert [sibling.rfilename for sibling in rows.siblings or []] == [
        ".gitattributes", "train.jsonl",
    ]  # fmt: skip


def test_branches_tags_and_commits_are_revisions(bot: Hub, api: HfApi) -> None:
    first = bot.commits(BOT)[0].oid
    api.create_tag(BOT, tag="v1")
    api.create_branch(BOT, branch="next/one", revision="v1")
    edit = api.upload_file(
        path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=BOT, revision="next/one"
    )
    assert bot.read(BOT, "config.json") == b"{}"
    for revision, expected in {
        "v1": b"{}", "main": b"{}", first: b"{}", "next/one": b"[]", edit.oid: b"[]",
    }.items():  # fmt: skip
        assert download(bot, "config.json", revision) == expected
        assert api.model_info(BOT, revision=revision).sha == (
            first if expected == b"{}" else edit.oid
        )
    refs = api.list_repo_refs(BOT)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": first, "next/one": edit.oid,
    }  # fmt: skip
    assert [ref.name for ref in refs.tags] == ["v1"]
    with pytest.raises(HfHubHTTPError, match="exists"):
        api.create_tag(BOT, tag="v1")
    api.create_tag(BOT, tag="v1", exist_ok=True)
    api.create_branch(BOT, branch="next/one", exist_ok=True)
    api.delete_tag(BOT, tag="v1")
    api.delete_branch(BOT, branch="next/one")
    for revision in ("v1", "next/one", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(BOT, revision=revision)
    with pytest.raises(RevisionNotFoundError):
        download(bot, "config.json", "nothing")
    with pytest.raises(EntryNotFoundError):
        download(bot, "nothing")


# Downloads


def test_a_large_file_comes_from_the_storage_without_the_token(bot: Hub) -> None:
    assert download(bot, "model.safetensors") == content(100_000)
    [stored] = bot.seen("^GET /lfs/")
    assert stored.host == "storage"
    assert "authorization" not in stored.headers
    assert stored.sent == 100_000
    bot.forget_requests()
    assert download(bot, "model.safetensors") == content(100_000)
    assert [request.method for request in bot.requests] == ["HEAD"]  # it is in the cache


def test_a_snapshot_holds_what_was_asked_for(bot: Hub, tmp_path: Path) -> None:
    path = snapshot_download(
        BOT, endpoint=bot.endpoint, token=TOKEN, allow_patterns=["*.json", "gguf/*"]
    )
    found = {str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()}
    assert found == {"config.json", "gguf/a.txt"}
    target = tmp_path / "local"
    first = bot.commits(BOT)[0].oid
    snapshot_download(BOT, endpoint=bot.endpoint, token=TOKEN, revision=first, local_dir=target)
    assert (target / "model.safetensors").read_bytes() == content(100_000)
    assert (target / ".cache" / "huggingface" / "download").is_dir()


def test_a_part_of_a_file(bot: Hub) -> None:
    files = HfFileSystem(endpoint=bot.endpoint, token=TOKEN, skip_instance_cache=True)
    part = files.cat_file(f"{BOT}/model.safetensors", start=1000, end=3000)
    assert part == content(100_000)[1000:3000]
    assert bot.seen("^GET /lfs/")[0].headers["range"].startswith("bytes=1000-")
    link = httpx.head(f"{bot.endpoint}/{BOT}/resolve/main/model.safetensors")
    assert link.status_code == 302
    assert link.headers["X-Linked-Size"] == "100000"
    assert link.headers["X-Linked-Etag"] == f'"{sha256(content(100_000))}"'
    url = link.headers["Location"]
    assert httpx.get(url, headers={"Range": "bytes=-10"}).content == content(100_000)[-10:]
    over = httpx.get(url, headers={"Range": "bytes=100000-"})
    assert (over.status_code, over.headers["Content-Range"]) == (416, "bytes */100000")


def test_the_storage_takes_signed_urls_only(bot: Hub) -> None:
    link = httpx.head(f"{bot.endpoint}/{BOT}/resolve/main/model.safetensors").headers["Location"]
    assert httpx.get(link).status_code == 200
    assert httpx.get(link + "0").status_code == 403
    assert httpx.get(link.replace("Expires=", "Expires=9")).status_code == 403
    assert httpx.put(link, content=b"x").status_code == 403
    assert httpx.get(link, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 400
    assert len(bot.leaks) == 1
    bot.leaks.clear()
    assert httpx.put(link, content=iter([b"x"])).status_code == 501


# Uploads


def test_a_folder_with_texts_and_lfs_files(hub: Hub, api: HfApi, folder: Path) -> None:
    api.create_repo(BOT)
    commit = api.upload_folder(
        repo_id=BOT, folder_path=folder, path_in_repo="run", commit_message="Publish"
    )
    assert commit.oid == hub.commits(BOT)[0].oid
    assert hub.commits(BOT)[0].title == "Publish"
    local = {f"run/{p.relative_to(folder)}": p for p in folder.rglob("*") if p.is_file()}
    there = hub.files(BOT)
    assert {path: blob.sha256 for path, blob in there.items()} == {
        path: sha256(p.read_bytes()) for path, p in local.items()
    }
    assert {path for path, blob in there.items() if blob.lfs} == {
        "run/adapter.safetensors", "run/gguf/bot-Q8_0.gguf",
    }  # fmt: skip
    assert there["run/manifest.json"].oid == git_oid(b'{"files": []}')
    # One PUT for the small one; parts of the right sizes, in order, for the large one.
    parts = hub.seen(r"^PUT /lfs-uploads/\w+\?.*partNumber=")
    assert [request.received for request in parts] == [PIECE, PIECE, 500_000]
    whole = [request for request in hub.seen("^PUT ") if request not in parts]
    assert [request.received for request in whole] == [1000]
    assert {request.host for request in (*parts, *whole)} == {"storage"}
    assert len(hub.seen("^POST /api/complete_multipart")) == 1
    assert len(hub.seen("/info/lfs/objects/verify$")) == 2
    # What git would not know for LFS is named, as the Hub does it.
    assert b"run/gguf/bot-Q8_0.gguf filter=lfs" in hub.read(BOT, ".gitattributes")
    assert download(hub, "run/gguf/bot-Q8_0.gguf") == (folder / "gguf/bot-Q8_0.gguf").read_bytes()
    assert list((hub.folder / "uploads").iterdir()) == []


def test_what_is_there_is_not_sent_again(hub: Hub, api: HfApi, folder: Path) -> None:
    api.create_repo(BOT)
    api.upload_folder(repo_id=BOT, folder_path=folder)
    hub.forget_requests()
    again = api.upload_folder(repo_id=BOT, folder_path=folder)
    assert again.oid == hub.commits(BOT)[0].oid
    assert hub.seen("^PUT ") == [] == hub.seen(COMMIT)
    api.upload_file(path_or_fileobj=content(1000, 1), path_in_repo="copy.bin", repo_id=BOT)
    assert hub.seen("^PUT ") == []
    assert hub.read(BOT, "copy.bin") == content(1000, 1)
    # Another repository does not have the object.
    api.create_repo("acme/other")
    api.upload_file(path_or_fileobj=content(1000, 1), path_in_repo="a.bin", repo_id="acme/other")
    assert len(hub.seen("^PUT ")) == 1


@pytest.mark.parametrize("size", [1000, 2 * PIECE + 1])
def test_other_bytes_than_were_hashed_are_refused(
    hub: Hub, api: HfApi, tmp_path: Path, size: int
) -> None:
    api.create_repo(BOT)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(size))
    add = CommitOperationAdd("model.safetensors", path)
    assert add.upload_info.sha256.hex() == sha256(content(size))
    path.write_bytes(content(size, seed=1))  # changed after it was hashed
    with pytest.raises(RuntimeError, match="Error while uploading") as failed:
        api.create_commit(BOT, [add], commit_message="Add")
    assert "sha256" in str(failed.value.__cause__)
    assert hub.files(BOT) == {}
    assert list((hub.folder / "uploads").iterdir()) == []


def test_a_commit_that_names_a_missing_object_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo(BOT)
    add = CommitOperationAdd("model.safetensors", content(1000))
    add._upload_mode, add._is_uploaded, add._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match=r"does not exist. Offending file: - model"):
        api.create_commit(BOT, [add], commit_message="Add")
    assert hub.files(BOT) == {}


def test_a_commit_on_an_outdated_parent_is_refused(bot: Hub, api: HfApi) -> None:
    parent = bot.commits(BOT)[0].oid
    add = [CommitOperationAdd("a.txt", b"a")]
    api.create_commit(BOT, add, commit_message="A", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.upload_file(
            path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=BOT, parent_commit=parent
        )
    assert refused.value.response.status_code == 412
    assert "b.txt" not in bot.files(BOT)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b", repo_id=BOT, revision="nothing")


def test_deletions_and_copies(bot: Hub, api: HfApi) -> None:
    api.create_commit(
        BOT,
        [
            CommitOperationCopy("config.json", "copy/config.json"),
            CommitOperationCopy("model.safetensors", "copy/model.safetensors"),
            CommitOperationDelete("model.safetensors"),
            CommitOperationDelete("gguf/"),
        ],
        commit_message="Move",
    )
    files = bot.files(BOT)
    assert set(files) == {"config.json", "copy/config.json", "copy/model.safetensors"}
    assert files["copy/model.safetensors"].sha256 == sha256(content(100_000))
    assert bot.seen("^PUT ") == []
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("gguf", BOT)
    api.delete_folder("copy", BOT)
    assert set(bot.files(BOT)) == {"config.json"}


def test_ignored_files_stay_out(hub: Hub, api: HfApi, folder: Path) -> None:
    (folder / ".gitignore").write_text("*.gguf\n!keep.gguf\nlogs/\n")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.log").write_text("a")
    (folder / "keep.gguf").write_bytes(content(10))
    api.create_repo(BOT)
    api.upload_folder(repo_id=BOT, folder_path=folder)
    assert set(hub.files(BOT)) == {
        ".gitignore", "README.md", "adapter.safetensors", "keep.gguf", "manifest.json",
    }  # fmt: skip
    assert is_ignored("a/b/c.txt", "a/**/c.txt") and not is_ignored("a/b/c.txt", "/c.txt")


def test_a_model_card_is_looked_at_before_anything_is_sent(hub: Hub, api: HfApi) -> None:
    api.create_repo(BOT)
    for card, message in {
        "---\nlicense: mine\n---\n": '"license" must be one of',
        "---\nbase_model: /models/base\n---\n": '"base_model" with value "/models/base" is not',
        "---\na: [\n---\n": "invalid YAML",
    }.items():
        with pytest.raises(ValueError, match=message):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=BOT)
    assert hub.seen("preupload") == []
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# Bot\n", path_in_repo="README.md", repo_id=BOT)
    good = b"---\nlicense: llama3.2\nbase_model: unsloth/Llama-3.2-1B\ntags: [lora]\n---\n"
    api.upload_file(path_or_fileobj=good, path_in_repo="README.md", repo_id=BOT)
    data = api.model_info(BOT).card_data
    assert data is not None and data.base_model == "unsloth/Llama-3.2-1B"


def test_upload_large_folder_goes_on_where_it_ended(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.fail_next(status=403, match=COMMIT)

    def upload() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            api.upload_large_folder(
                BOT, folder, repo_type="model", num_workers=1, print_report=False
            )

    upload()  # a refused commit is tried again
    assert len(hub.files(BOT)) == 4
    assert statuses(hub, COMMIT) == [403, 200]
    notes = folder / ".cache" / "huggingface" / "upload"
    assert (notes / "gguf" / "bot-Q8_0.gguf.metadata").is_file()
    assert not [path for path in hub.files(BOT) if ".cache" in path]
    hub.forget_requests()
    upload()
    assert hub.seen("^PUT |preupload|/commit/") == []


# Failures


def test_a_commit_is_sent_once_whatever_happens(bot: Hub, api: HfApi) -> None:
    """Who builds on the client has to look whether a failed commit took place."""

    def upload(name: str) -> None:
        api.upload_file(path_or_fileobj=b"a", path_in_repo=name, repo_id=BOT)

    bot.fail_next(status=503, match=COMMIT)
    with pytest.raises(HfHubHTTPError) as failed:
        upload("a")
    assert failed.value.response.status_code == 503
    assert "a" not in bot.files(BOT)
    bot.fail_next(match=COMMIT, how="reset")
    with pytest.raises(httpx.TransportError):  # by the moment: ReadError, RemoteProtocolError
        upload("b")
    assert "b" not in bot.files(BOT)
    bot.fail_next(match=COMMIT, how="lost")
    with pytest.raises(httpx.NetworkError):
        upload("c")
    assert "c" in bot.files(BOT)  # the answer was lost, not the commit
    assert statuses(bot, COMMIT) == [503, None, None]
    assert bot.planted_left() == 0


def test_what_was_sent_before_a_failure_is_not_sent_again(
    hub: Hub, api: HfApi, folder: Path
) -> None:
    """Whole files, that is: the parts of an unfinished one are."""
    api.create_repo(BOT)
    hub.fail_next(status=403, match=r"^PUT .*partNumber=3")
    with pytest.raises(RuntimeError, match="gguf"):
        api.upload_folder(repo_id=BOT, folder_path=folder)
    hub.fail_next(status=500, match=COMMIT)
    hub.forget_requests()
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_folder(repo_id=BOT, folder_path=folder)
    assert [request.received for request in hub.seen("^PUT ")] == [PIECE, PIECE, 500_000]
    hub.forget_requests()
    api.upload_folder(repo_id=BOT, folder_path=folder)
    assert hub.seen("^PUT ") == []
    assert len(hub.files(BOT)) == 4


def test_a_part_that_fails_is_sent_again_alone(hub: Hub, api: HfApi, folder: Path) -> None:
    api.create_repo(BOT)
    hub.fail_next(how="lost", match="complete_multipart")
    hub.fail_next(status=500, match=r"^PUT .*partNumber=2")
    hub.fail_next(status=429, headers={"Retry-After": "0"}, match="preupload")
    api.upload_folder(repo_id=BOT, folder_path=folder, allow_patterns="*.gguf")
    parts = hub.seen(r"^PUT .*partNumber")
    assert [request.status for request in parts] == [200, 500, 200, 200]
    assert [request.received for request in parts] == [PIECE, PIECE, PIECE, 500_000]
    assert hub.read(BOT, "gguf/bot-Q8_0.gguf") == (folder / "gguf/bot-Q8_0.gguf").read_bytes()


def test_a_download_that_breaks_off_goes_on_from_there(bot: Hub) -> None:
    """From the last whole chunk, that is: a file of less than one is begun again."""
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    size = 2 * chunk + 100_000
    bot.add_repo(BOT, files={"large.bin": content(size)})
    bot.fail_next(how="cut", match="^GET /lfs/")
    assert sha256(download(bot, "large.bin")) == sha256(content(size))
    first, second = bot.seen("^GET /lfs/")
    assert second.headers["range"] == f"bytes={chunk}-"
    assert (first.sent, second.sent) == (chunk + 50_000, size - chunk)
    bot.add_repo(BOT, files={"small.bin": content(1000)})
    bot.forget_requests()
    bot.fail_next(how="cut", match="^GET /lfs/")
    assert download(bot, "small.bin") == content(1000)
    assert [request.sent for request in bot.seen("^GET /lfs/")] == [500, 1000]


def test_a_body_that_is_too_short_is_noticed_but_a_wrong_one_is_not(bot: Hub) -> None:
    """Who builds on the client has to hash what it downloads."""
    bot.fail_next(how="short", match="^GET /lfs/")
    with pytest.raises(OSError, match="Consistency check failed"):
        download(bot, "model.safetensors")
    bot.fail_next(how="flipped", match="^GET /lfs/")
    wrong = download(bot, "model.safetensors")
    assert len(wrong) == 100_000
    assert wrong != content(100_000)


def test_which_requests_of_a_download_are_tried_again(bot: Hub) -> None:
    bot.fail_next(status=503, match="^GET /lfs/")
    with pytest.raises(HfHubHTTPError, match="503"):
        download(bot, "model.safetensors")
    bot.fail_next(how="reset", match="^GET /lfs/")
    with pytest.raises(httpx.ReadError):
        download(bot, "model.safetensors")
    bot.fail_next(status=429, headers={"Retry-After": "0"}, match="^GET /lfs/")
    assert download(bot, "model.safetensors") == content(100_000)
    assert statuses(bot, "^GET /lfs/") == [503, None, 429, 200]
    bot.forget_requests()
    bot.fail_next(2, status=504, match="^HEAD ")
    assert download(bot, "config.json") == b"{}"
    assert statuses(bot, "^HEAD ")[:3] == [504, 504, 307]
    bot.fail_next(status=500, match="/api/models/acme/bot/revision/main")
    with pytest.raises(LocalEntryNotFoundError, match="500"):
        snapshot_download("acme/bot", endpoint=bot.endpoint, token=TOKEN, cache_dir=bot.folder)


# The double itself


def test_a_child_process_with_its_environment(bot: Hub) -> None:
    program = (
        "from huggingface_hub import HfApi, snapshot_download as s;"
        "print(HfApi().whoami()['name'], s('acme/bot'))"
    )
    env = {"PATH": "/usr/bin:/bin", **bot.environment()}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=env, capture_output=True, text=True
    )
    name, path = done.stdout.split()
    assert name == "ada"
    assert path.startswith(bot.environment()["HF_HOME"])
    assert (Path(path) / "model.safetensors").read_bytes() == content(100_000)


def test_urls_name_the_port_that_was_asked(bot: Hub, api: HfApi) -> None:
    """So that a proxy in front sees the storage's traffic as well."""
    ask = {"Host": "127.0.0.1:1", "Authorization": f"Bearer {TOKEN}"}
    file = httpx.head(f"{bot.endpoint}/{BOT}/resolve/main/model.safetensors", headers=ask)
    assert file.headers["Location"].startswith("http://localhost:1/")
    wanted = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "0", "size": 1}]}
    batch = httpx.post(
        f"{bot.endpoint}/{BOT}.git/info/lfs/objects/batch", headers=ask, json=wanted
    ).json()["objects"][0]["actions"]
    assert batch["upload"]["href"].startswith("http://localhost:1/")
    assert batch["verify"]["href"].startswith("http://127.0.0.1:1/")


def test_a_hub_that_is_gone_answers_nothing(tmp_path: Path) -> None:
    client = httpx.Client()
    with running_hub(tmp_path) as hub:
        address = f"{hub.endpoint}/api/validate-yaml"
        assert client.post(address, json={"content": ""}).status_code == 200
    with pytest.raises(httpx.TransportError):  # not over the connection that was kept, either
        client.post(address, json={"content": ""})
