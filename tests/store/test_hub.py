"""The Hub as a store, through its unmodified client, against a double that speaks its protocol."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as client_errors

from jobs.errors import AccessError, DoesNotFitError, LorajobError, ServiceError
from jobs.spec import HubTarget
from jobs.store.base import no_advance
from jobs.store.hashing import FileEntry, file_entries
from jobs.store.hub import HubStore
from jobs.store.hub.client import _Body
from jobs.store.hub.errors import About, asked_wait, judge
from jobs.store.hub.layout import Part, keys_of, layout, part_manifest, run_manifest
from jobs.store.hub.publish import as_json
from jobs.store.hub.store import is_inside
from jobs.store.places import HubPlace
from jobs.store.publish import publish
from jobs.store.retry import Again, Retries
from tests.servers.faults import running_proxy
from tests.servers.hub import Hub

pytest_plugins = ["tests.servers.hub_fixtures"]

ROOT = Path(__file__).parents[2]
TOKEN = "hf_ada"  # of the fixture's user
SECRET = "hf_planted_secret_0123456789"  # no token of a user here must ever be seen


@pytest.fixture(autouse=True)
def _at_the_double(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(hub.endpoint, monkeypatch)
    assert TOKEN in hub.tokens
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The client's own pauses after a reset are whole seconds.
    short = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 100)})
    monkeypatch.setattr("huggingface_hub.utils._http.time", short)
    monkeypatch.setattr("huggingface_hub.file_download.time", short)


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads HF_ENDPOINT when it is imported, and that has happened."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def quick(**more: Any) -> Retries:
    return Retries(wait=0.01, **more)


def place(
    repository: str = "acme/base",
    revision: str | None = None,
    inside: str = "",
    kind: Literal["model", "dataset"] = "model",
    retries: Retries | None = None,
) -> HubStore:
    return HubStore.of_place(HubPlace(kind, repository, revision, inside), retries or quick())


def target(retries: Retries | None = None, **more: Any) -> HubStore:
    return HubStore.of_target(HubTarget(**{"hub": "acme/bot", **more}), retries or quick())


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


WEIGHTS = some_bytes(2_500_000)
BASE = {"config.json": b"{}\n", "model.safetensors": WEIGHTS, "sub/notes.txt": b"some notes\n"}

RUN = {
    "adapter/adapter_config.json": b'{"r": 16}\n',
    "adapter/adapter_model.safetensors": some_bytes(70_000, 1),
    "gguf/bot-Q8_0.gguf": b"GGUF\0" + some_bytes(1_500_000, 2),
    "report/answers.txt": b"hello\n",
    "logs/llama.log": b"log\n",
}
MERGED = {"merged/config.json": b"{}\n", "merged/model.safetensors": some_bytes(2_300_000, 3)}


def make_run(folder: Path, contents: dict[str, bytes]) -> list[FileEntry]:
    """A run's folder with exactly these files, and the manifest over them."""
    for old in file_entries(folder):
        (folder / old["path"]).unlink()
    for key, content in contents.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)
    files = file_entries(folder)
    (folder / "manifest.json").write_bytes(as_json({"name": "bot", "files": files, "seed": 7}))
    return files


def send(folder: Path, files: list[FileEntry], store: HubStore) -> dict[str, int]:
    return publish(folder, files, store, no_advance)


def fetched(store: HubStore, folder: Path) -> dict[str, bytes]:
    store.fetch(store.entries(), folder, no_advance)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sent_bytes(hub: Hub) -> int:
    return sum(request.received for request in hub.seen("^PUT /lfs-uploads"))


def require_complete(hub: Hub, repository: str) -> dict[str, Any]:
    """The manifest there, all of whose files are there with their sha256."""
    manifest = json.loads(hub.read(repository, "manifest.json"))
    there = hub.files(repository)
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    assert {path: there[path].sha256 for path in listed} == listed
    assert isinstance(manifest, dict)
    return manifest


# --- where files stand


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("apart", [[], ["adapter"], ["gguf"], ["adapter", "gguf"]])
def test_keys_and_paths_are_the_same_there_and_back(merged: bool, apart: list[Part]) -> None:
    keys = set(RUN) | (set(MERGED) if merged else set())
    parts = layout([*keys, "manifest.json"], apart)
    assert set(parts) == {*apart, "main"}
    back: dict[str, str] = {}
    for part, paths in parts.items():
        assert keys_of(part, [*paths, "manifest.json"])["manifest.json"].endswith("manifest.json")
        assert keys_of(part, paths) == paths
        back |= {key: path for path, key in paths.items()}
    assert set(back) == keys
    files = [{"path": key, "size": 1, "sha256": "0"} for key in sorted(keys)]
    manifest = {"name": "bot", "files": files, "seed": 7}
    split: dict[Part, Any] = {
        part: part_manifest(manifest, paths, f"acme/{part}") for part, paths in parts.items()
    }
    assert run_manifest(split) == manifest


def test_the_merged_model_stands_at_the_root_or_else_the_adapter() -> None:
    assert layout([*RUN, *MERGED], [])["main"]["model.safetensors"] == "merged/model.safetensors"
    assert layout([*RUN, *MERGED], [])["main"]["adapter/adapter_config.json"]
    assert layout(RUN, [])["main"]["adapter_config.json"] == "adapter/adapter_config.json"
    assert "adapter_config.json" not in layout(RUN, ["adapter"])["main"]


def test_two_files_of_one_name_are_never_mixed_up() -> None:
    with pytest.raises(AssertionError):
        layout(["merged/gguf/a", "gguf/a"], [])
    with pytest.raises(AssertionError):
        layout(["merged/manifest.json"], [])


@pytest.mark.parametrize("manifest", [None, 5, [], {}, {"files": 5}])
def test_what_is_no_manifest_is_none(manifest: Any) -> None:
    assert run_manifest({"main": manifest}) is None


@pytest.mark.parametrize(
    ("inside", "means"),
    [
        ("", ["a.txt", "d/a.txt", "d/e/a.txt"]),
        ("a.txt", ["a.txt"]),
        ("d", ["d/a.txt", "d/e/a.txt"]),
        ("*.txt", ["a.txt"]),
        ("d/*", ["d/a.txt"]),
        ("**/*.txt", ["a.txt", "d/a.txt", "d/e/a.txt"]),
        ("none", []),
    ],
)
def test_what_a_place_means_inside_a_repository(inside: str, means: list[str]) -> None:
    paths = ["a.txt", "d/a.txt", "d/e/a.txt"]
    assert [path for path in paths if is_inside(path, inside)] == means


# --- reading


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("revision", [None, "main", "v1", "commit"])
def test_a_branch_a_tag_and_a_commit_are_read(
    hub: Hub, tmp_path: Path, kind: Literal["model", "dataset"], revision: str | None
) -> None:  # fmt: skip
    first = hub.add_repo("acme/base", kind, BASE)
    hub.repos[kind, "acme/base"].tags["v1"] = first
    hub.commit(hub.repos[kind, "acme/base"], "main", {}, "empty", "", "ada")
    store = place(revision=first if revision == "commit" else revision, kind=kind)
    store.prove_readable()
    if revision in (None, "main"):
        assert store.entries() == []
        assert store.commit != first
        return
    assert store.commit == store.resolve() == first
    sizes = {entry.key: entry.size for entry in store.entries()}
    assert sizes == {key: len(content) for key, content in BASE.items()}
    identity = {entry.key: entry.identity.partition(":")[0] for entry in store.entries()}
    assert identity == {"config.json": "git", "model.safetensors": "sha256", "sub/notes.txt": "git"}
    assert fetched(store, tmp_path / "out") == BASE


def test_a_repository_that_moves_on_is_read_as_it_was_looked_up(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/base", files=BASE)
    store = place()
    entries = store.entries()
    newer = {"config.json": hub.keep(b"newer", lfs=False)}
    hub.commit(hub.repos["model", "acme/base"], "main", newer, "newer", "", "ada")
    store.fetch(entries, tmp_path, no_advance)
    assert (tmp_path / "config.json").read_bytes() == BASE["config.json"]
    assert place().commit != store.commit


def test_files_are_on_the_disk_once_and_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/base", files=BASE)
    done: list[int] = []
    store = place()
    store.fetch(store.entries(), tmp_path / "one", done.append)
    assert sum(done) == sum(map(len, BASE.values()))
    assert len(done) > len(BASE)  # not only at each file's end
    hub.forget_requests()
    assert fetched(place(revision=store.commit), tmp_path / "two") == BASE
    assert hub.requests == []
    real = {(tmp_path / name / "model.safetensors").resolve() for name in ("one", "two")}
    assert len(real) == 1
    assert real.pop().is_relative_to(constants.HF_HUB_CACHE)


def test_only_what_the_place_means_is_listed(hub: Hub) -> None:
    hub.add_repo("acme/base", files=BASE)
    assert [entry.key for entry in place(inside="sub").entries()] == ["sub/notes.txt"]
    with pytest.raises(AccessError, match=r"has nothing called nowhere/\*"):
        place(inside="nowhere/*").prove_readable()


def test_a_private_repository_is_read_with_the_right_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub.add_repo("acme/base", files=BASE, private=True)
    assert fetched(place(), tmp_path / "out") == BASE
    hub.add_token(SECRET, "eve")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(AccessError) as refused:
        place().prove_readable()
    require_says(refused.value, "there is no model acme/base", "or it is private", "that of eve")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessError) as refused:
        place().prove_readable()
    require_says(refused.value, "or it is private", "no token was given", "set HF_TOKEN")


def test_what_is_not_there_is_said(hub: Hub) -> None:
    with pytest.raises(AccessError) as refused:
        place("acme/nothing", kind="dataset").entries()
    require_says(refused.value, "there is no data set acme/nothing", "that of ada")
    hub.add_repo("acme/base", files=BASE)
    with pytest.raises(AccessError) as refused:
        place(revision="v9").entries()
    require_says(refused.value, "has no revision v9", f"{hub.endpoint}/acme/base")


def test_a_gated_repository_says_where_to_ask(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("meta/base", files=BASE, gated="manual")
    with pytest.raises(AccessError) as refused:
        place("meta/base").prove_readable()
    require_says(refused.value, "is gated", "that of ada", f"at {hub.endpoint}/meta/base", "accept")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessError) as refused:
        place("meta/base").prove_readable()
    require_says(refused.value, "is gated", "no token was given")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.grant("meta/base", "ada")
    place("meta/base").prove_readable()


def test_a_token_that_ran_out_is_told_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("acme/base", files=BASE)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(AccessError) as refused:
        place().entries()
    require_says(refused.value, "takes the token for no valid one", "/settings/tokens")
    with pytest.raises(AccessError, match="takes the token for no valid one"):
        target().prove_writable(keep=False)


@pytest.mark.parametrize("token", [SECRET + "\x0bx", SECRET + "\u20ac"])
def test_a_token_that_is_none_is_not_quoted(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(AccessError) as refused:
        place().entries()
    require_says(refused.value, "characters", "HF_TOKEN")


def test_an_endpoint_with_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(f"http://eve:{SECRET}@127.0.0.1:9", monkeypatch)
    with pytest.raises(AccessError) as refused:
        place()
    require_says(refused.value, "HF_ENDPOINT")


def require_says(error: LorajobError, *parts: str) -> None:
    text = str(error)
    assert [part for part in parts if part not in text] == [], text
    assert SECRET not in text
    assert TOKEN not in text


@pytest.mark.parametrize("how", ["flipped", "cut", "reset"])
@pytest.mark.parametrize("path", ["/lfs/", "resolve-cache.*config.json"])
def test_a_broken_download_is_mended(hub: Hub, tmp_path: Path, how: Any, path: str) -> None:
    hub.add_repo("acme/base", files=BASE)
    hub.fail_next(2, match=f"^GET .*{path}", how=how)
    retries = quick()
    done: list[int] = []
    store = place(retries=retries)
    store.fetch(store.entries(), tmp_path, done.append)
    for key, content in BASE.items():
        assert (tmp_path / key).read_bytes() == content
    assert hub.planted_left() == 0
    assert sum(done) == sum(map(len, BASE.values()))
    if how == "flipped":
        assert retries.reasons == {"a file arrived with wrong bytes": 2}


def test_a_file_that_always_arrives_wrong_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/base", files=BASE)
    hub.fail_next(1000, match="^GET .*/lfs/", how="flipped")
    with pytest.raises(ServiceError, match=r"model.safetensors arrived with wrong bytes 5 times"):
        fetched(place(), tmp_path)
    cached = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]
    assert [path for path in cached if path.stat().st_size == len(WEIGHTS)] == []


def test_what_the_cache_has_wrong_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/base", files=BASE)
    out = tmp_path / "out"
    fetched(place(), out)
    real = (out / "model.safetensors").resolve()
    real.write_bytes(b"X" + WEIGHTS[1:])
    assert fetched(place(), out) == BASE
    real.unlink()  # and where somebody emptied the cache
    assert fetched(place(), out) == BASE


def test_a_body_that_is_reset_ended_early() -> None:
    class Reset(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            yield b"half"
            raise httpx.ReadError("reset")

    body = iter(_Body(Reset()))
    assert next(body) == b"half"
    with pytest.raises(httpx.RemoteProtocolError):  # which the client takes up where it stopped
        next(body)


def test_offline_the_cache_is_enough(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub.add_repo("acme/base", files=BASE)
    commit = place(revision="main").commit
    fetched(place(), tmp_path / "filling")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget_requests()
    for revision in (None, "main", commit):
        store = place(revision=revision)
        store.prove_readable()
        assert store.commit == commit
        assert fetched(store, tmp_path / str(revision)) == BASE
    assert hub.requests == []
    with pytest.raises(AccessError, match="HF_HUB_OFFLINE is set"):
        target().prove_writable(keep=False)


def test_offline_what_is_missing_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub.add_repo("acme/base", files=BASE)
    store = place()
    store.fetch([e for e in store.entries() if e.key != "model.safetensors"], tmp_path, no_advance)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (lambda s: s.prove_readable(), lambda s: fetched(s, tmp_path / "out")):
        with pytest.raises(AccessError) as refused:
            act(place())
        require_says(
            refused.value, "model.safetensors is not in the cache", "hf download acme/base"
        )
    with pytest.raises(AccessError) as refused:
        place("acme/never", "v1", kind="dataset").entries()
    require_says(refused.value, "v1 is not in the cache", "--repo-type dataset --revision v1")


def test_offline_a_cache_that_another_tool_filled_is_enough(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from huggingface_hub import hf_hub_download

    hub.add_repo("acme/base", files=BASE)
    for path in BASE:
        hf_hub_download("acme/base", path, endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched(place(), tmp_path / "out") == BASE


def test_a_pinned_commit_in_the_cache_needs_no_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub.add_repo("acme/base", files=BASE)
    commit = place().commit
    fetched(place(), tmp_path / "filling")
    point_at("http://127.0.0.1:9", monkeypatch)  # nobody answers there
    assert fetched(place(revision=commit), tmp_path / "out") == BASE
    with pytest.raises(ServiceError, match=r"looking up model acme/base failed .* cannot be reach"):
        place(retries=quick(give_up_after=0.05)).entries()


# --- what errors mean


ABOUT = About("model acme/base", "https://hub/acme/base", "https://hub", "main", lambda: "no token")


def answer(status: int, host: str = "hub", text: str = "", **headers: str) -> httpx.Response:
    request = httpx.Request("GET", f"https://{host}/x?Signature={SECRET}")
    return httpx.Response(status, headers=headers, text=text, request=request)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520])
def test_states_that_pass_are_tried_again(status: int) -> None:
    error = client_errors.HfHubHTTPError("no", response=answer(status, **{"retry-after": "7"}))
    wrapped = RuntimeError("while uploading")
    wrapped.__cause__ = error
    assert judge(wrapped, ABOUT) == Again(f"answered {status}", 7.0)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 413, 422, 501, 507])
def test_refusals_end_it(status: int) -> None:
    error = client_errors.HfHubHTTPError("no", response=answer(status), server_message="quota")
    meaning = judge(error, ABOUT)
    assert isinstance(meaning, AccessError)
    assert meaning.hint


@pytest.mark.parametrize(
    "error",
    [
        httpx.ReadTimeout("t"), httpx.ConnectTimeout("t"), httpx.ConnectError("name resolution"),
        httpx.ReadError("reset"), httpx.WriteError("reset"), httpx.RemoteProtocolError("short"),
        httpx.ProxyError("down"), ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError(),
        json.JSONDecodeError("cut", "{", 1), OSError("Consistency check failed: 1 and 2"),
        RuntimeError("Cannot send a request, as the client has been closed."),
    ],
    ids=repr,
)  # fmt: skip
def test_a_network_that_fails_is_tried_again(error: Exception) -> None:
    assert isinstance(judge(error, ABOUT), Again)


def test_what_no_try_can_mend_ends_it() -> None:
    for error, kind in (
        (OSError(errno.ENOSPC, "full", "/tmp/x"), DoesNotFitError),
        (PermissionError(errno.EACCES, "no", "/tmp/x"), AccessError),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), AccessError),
        (httpx.UnsupportedProtocol("ftp"), AccessError),
        (client_errors.HFValidationError("a/b/c"), AccessError),
        (ValueError("LFS batch API returned errors:\n`storage limit reached"), AccessError),
    ):
        assert isinstance(judge(error, ABOUT), kind), error
    assert judge(KeyError("a bug"), ABOUT) is None


def test_the_storage_is_not_quoted_and_its_old_addresses_are_made_anew() -> None:
    expired = answer(403, "storage", f"<Message>Request has expired {SECRET}</Message>")
    denied = answer(403, "storage", f"<StringToSign>{SECRET}</StringToSign>")
    said = {"server_message": SECRET}
    meaning = judge(client_errors.HfHubHTTPError("no", response=expired, **said), ABOUT)
    assert isinstance(meaning, Again)
    meaning = judge(client_errors.HfHubHTTPError("no", response=denied, **said), ABOUT)
    assert isinstance(meaning, AccessError)
    assert SECRET not in str(meaning)


def test_how_long_a_service_asks_to_wait() -> None:
    assert asked_wait({"retry-after": "12"}) == 12
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert 35 < (asked_wait({"retry-after": soon}) or 0) < 41
    assert asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked_wait({"ratelimit": '"api";r=0;t=55'}) == 56
    assert asked_wait({"ratelimit": '"api";r=9;t=55'}) is None
    assert asked_wait({"retry-after": "soon"}) is None
    assert asked_wait({}) is None


def test_a_retry_after_is_waited_for(hub: Hub) -> None:
    hub.add_repo("acme/base", files=BASE)
    hub.fail_next(1, 429, {"Retry-After": "1"}, match="^GET /api/models/acme/base")
    retries = quick()
    start = time.monotonic()
    place(retries=retries).entries()
    assert time.monotonic() - start >= 1
    assert retries.reasons == {"answered 429": 1}


def test_a_wait_that_is_too_long_is_refused_at_once(hub: Hub) -> None:
    hub.add_repo("acme/base", files=BASE)
    hub.fail_next(1, 503, {"Retry-After": "3600"}, match="^GET /api/models/acme/base")
    start = time.monotonic()
    with pytest.raises(ServiceError, match="answered 503"):
        place().entries()
    assert time.monotonic() - start < 5


# --- the right to write


def test_a_check_leaves_nothing_behind(hub: Hub) -> None:
    before = set(hub.repos)
    target(adapter="acme/bot-lora", gguf="acme/bot-gguf@v2").prove_writable(keep=False)
    assert set(hub.repos) == before
    assert hub.seen("^POST /api/models/acme/bot-gguf/preupload/v2")
    assert hub.seen("commit") == []


def test_a_check_never_removes_what_was_there(hub: Hub) -> None:
    hub.add_repo("acme/bot")
    hub.add_repo("acme/bot-lora", files={"mine.txt": b"mine"})
    target(hub="acme/bot@v1", adapter="acme/bot-lora").prove_writable(keep=False)
    assert {("model", "acme/bot"), ("model", "acme/bot-lora")} <= set(hub.repos)
    assert list(hub.repos["model", "acme/bot"].branches) == ["main"]


def test_what_is_to_be_kept_is_made_private(hub: Hub) -> None:
    target(hub="acme/bot@v1").prove_writable(keep=True)
    repo = hub.repos["model", "acme/bot"]
    assert repo.private
    assert set(repo.branches) == {"main", "v1"}
    target(hub="acme/open", private=False).prove_writable(keep=True)
    assert not hub.repos["model", "acme/open"].private


def test_a_token_that_may_not_write_is_found_before_training(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    hub.add_repo("acme/bot", files={"mine.txt": b"mine"})
    hub.add_token(SECRET, "eve", role="read", orgs=["acme"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(AccessError) as refused:
        target().prove_writable(keep=False)
    require_says(refused.value, "that of eve, may only read", "/settings/tokens")
    hub.add_token(SECRET, "eve", role="fineGrained", orgs=["acme"], read_from=["acme"])
    with pytest.raises(AccessError) as refused:
        target().prove_writable(keep=False)
    require_says(refused.value, "model acme/bot: the Hub refuses this", "that of eve")
    hub.add_token(SECRET, "eve", role="fineGrained", orgs=["acme"], write_to=["acme/bot"])
    target().prove_writable(keep=False)
    with pytest.raises(AccessError) as refused:
        target(hub="other/bot").prove_writable(keep=False)
    require_says(refused.value, "model other/bot: the Hub refuses this", "that of eve")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessError, match="no token was given"):
        target().prove_writable(keep=False)


def test_one_repository_cannot_be_two() -> None:
    with pytest.raises(AccessError, match="to the same repository"):
        target(adapter="Acme/bot@main")


# --- publishing


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("adapter", [None, "acme/bot-lora"])
@pytest.mark.parametrize("gguf", [None, "acme/bot-gguf"])
def test_a_run_stands_where_tools_look_for_it(
    hub: Hub, tmp_path: Path, merged: bool, adapter: str | None, gguf: str | None
) -> None:  # fmt: skip
    run = RUN | (MERGED if merged else {})
    files = make_run(tmp_path / "run", run)
    store = target(adapter=adapter, gguf=gguf)
    done: list[int] = []
    assert publish(tmp_path / "run", files, store, done.append) == {"sent": len(run), "kept": 0}
    assert sum(done) == sum(map(len, run.values()))

    main = {"report/answers.txt", "logs/llama.log", "manifest.json"}
    main |= {"config.json", "model.safetensors"} if merged else set()
    adapter_files = {"adapter_config.json", "adapter_model.safetensors"}
    if adapter:
        assert set(hub.files(adapter)) == adapter_files | {"manifest.json"}
    else:
        main |= {f"adapter/{name}" for name in adapter_files} if merged else adapter_files
    if gguf:
        assert set(hub.files(gguf)) == {"bot-Q8_0.gguf", "manifest.json"}
    else:
        main |= {"gguf/bot-Q8_0.gguf"}
    assert set(hub.files("acme/bot")) == main

    repositories = [name for name in (adapter, gguf, "acme/bot") if name]
    for repository in repositories:
        manifest = require_complete(hub, repository)
        assert manifest["repository"] == repository
        assert manifest["seed"] == 7
        listed = {file["path"] for file in manifest["files"]} | {"manifest.json"}
        assert listed == set(hub.files(repository))
        assert len(hub.commits(repository)) == 2  # the Hub's own and one more
        assert hub.repos["model", repository].private
    assert store.read_json("manifest.json") == json.loads(
        (tmp_path / "run" / "manifest.json").read_text()
    )
    assert {e.key for e in store.entries() if not e.key.endswith("manifest.json")} == set(run)

    hub.forget_requests()  # and again
    assert send(tmp_path / "run", files, target(adapter=adapter, gguf=gguf)) == {
        "sent": 0, "kept": len(run),
    }  # fmt: skip
    assert {request.method for request in hub.requests} == {"GET"}


def test_what_was_published_can_be_fetched_as_a_run(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN | MERGED)
    send(tmp_path / "run", files, target(adapter="acme/bot-lora"))
    store = target(adapter="acme/bot-lora")
    wanted = [entry for entry in store.entries() if entry.key in RUN | MERGED]
    store.fetch(wanted, tmp_path / "back", no_advance)
    for key, content in (RUN | MERGED).items():
        assert (tmp_path / "back" / key).read_bytes() == content
    assert store.read_json("adapter/adapter_config.json") == {"r": 16}
    assert store.read_json("report/answers.txt") is None
    assert store.read_json("nothing.json") is None


def test_a_changed_run_sends_what_changed_and_leaves_no_old_files(hub: Hub, tmp_path: Path) -> None:
    send(tmp_path / "run", make_run(tmp_path / "run", RUN), target())
    repo = hub.repos["model", "acme/bot"]
    foreign = {"gguf/mine.txt": hub.keep(b"mine", lfs=False)}
    hub.commit(repo, "main", {**repo.commit("main").files, **foreign}, "mine", "", "ada")
    hub.forget_requests()
    changed = {key: content for key, content in RUN.items() if not key.startswith("report/")}
    changed |= MERGED  # now the adapter moves out of the root
    files = make_run(tmp_path / "run", changed)
    held = target().held(files)
    assert held == {"gguf/bot-Q8_0.gguf", "logs/llama.log"}
    send(tmp_path / "run", files, target())
    assert set(hub.files("acme/bot")) == {
        "config.json", "model.safetensors", "adapter/adapter_config.json", "logs/llama.log",
        "adapter/adapter_model.safetensors", "gguf/bot-Q8_0.gguf", "gguf/mine.txt", "manifest.json",
    }  # fmt: skip
    require_complete(hub, "acme/bot")
    assert sent_bytes(hub) == len(MERGED["merged/model.safetensors"])


def test_a_small_file_that_somebody_changed_is_mended(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN)
    send(tmp_path / "run", files, target())
    repo = hub.repos["model", "acme/bot"]
    other = {"report/answers.txt": hub.keep(b"HELLO\n", lfs=False)}  # of the same size
    hub.commit(repo, "main", {**repo.commit("main").files, **other}, "mine", "", "ada")
    assert send(tmp_path / "run", files, target()) == {"sent": 1, "kept": len(RUN) - 1}
    require_complete(hub, "acme/bot")


def test_large_files_go_ahead_unseen_and_are_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path, {**RUN, **MERGED})
    store = target(gguf="acme/bot-gguf")
    store.prove_writable(keep=True)
    store.send_ahead(tmp_path, files, Event())
    large = {file["path"]: file["size"] for file in files if file["size"] > 2**20}
    assert sorted(large) == ["gguf/bot-Q8_0.gguf", "merged/model.safetensors"]
    assert sent_bytes(hub) == sum(large.values())
    assert store.entries() == []
    send(tmp_path, files, store)
    small = sum(f["size"] for f in files if f["path"].endswith("adapter_model.safetensors"))
    assert sent_bytes(hub) == sum(large.values()) + small
    require_complete(hub, "acme/bot")
    store.send_ahead(tmp_path, files, Event())  # all is there
    assert sent_bytes(hub) == sum(large.values()) + small


def test_what_is_stopped_ahead_is_sent_by_publishing(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path, {**RUN, **MERGED})
    store, stopped = target(), Event()
    store.prove_writable(keep=True)
    stopped.set()
    store.send_ahead(tmp_path, files, stopped)
    send(tmp_path, files, store)
    require_complete(hub, "acme/bot")


def test_what_the_repository_ignores_is_sent_all_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/bot", files={".gitignore": b"*.log\n*.gguf\n"})
    send(tmp_path / "run", make_run(tmp_path / "run", RUN), target())
    require_complete(hub, "acme/bot")
    assert {"logs/llama.log", "gguf/bot-Q8_0.gguf"} <= set(hub.files("acme/bot"))


def test_a_file_that_is_no_longer_what_the_manifest_lists_is_not_sent(
    hub: Hub, tmp_path: Path
) -> None:  # fmt: skip
    run = RUN | {"report/large.txt": b"text " * 300_000}  # what is no binary goes no other way
    for key in ("report/answers.txt", "report/large.txt", "gguf/bot-Q8_0.gguf"):
        files = make_run(tmp_path / "run", run)
        path = tmp_path / "run" / key
        path.write_bytes(b"X" + path.read_bytes()[1:])
        with pytest.raises(AccessError):
            send(tmp_path / "run", files, target())
        assert "manifest.json" not in hub.files("acme/bot")


def test_a_manifest_that_arrives_wrong_is_read_again(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN)
    send(tmp_path / "run", files, target())
    for how in ("short", "flipped"):
        hub.fail_next(1, match="^GET /api/resolve-cache.*manifest.json", how=how)
        assert target().held(files) == set(RUN)
        assert target().read_json("manifest.json")["seed"] == 7
    assert hub.planted_left() == 0


def test_a_token_revoked_in_the_middle_is_a_refusal(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN)
    hub.fail_next(1, 401, match="^POST .*/objects/batch")
    with pytest.raises(AccessError, match="takes the token for no valid one"):
        send(tmp_path / "run", files, target())
    assert hub.files("acme/bot") == {}


def test_a_refusal_in_the_middle_shows_nothing_and_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN | MERGED)
    hub.fail_next(1, 403, match="^POST .*/commit/")
    with pytest.raises(AccessError, match="model acme/bot: the Hub refuses this"):
        send(tmp_path / "run", files, target())
    assert hub.files("acme/bot") == {}
    assert sent_bytes(hub) > 3_000_000
    hub.forget_requests()
    send(tmp_path / "run", files, target())
    require_complete(hub, "acme/bot")
    assert sent_bytes(hub) == 0


def test_the_main_repository_is_the_last(hub: Hub, tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", RUN | MERGED)
    hub.fail_next(1, 403, match="^POST .*/bot-gguf/commit/")
    store = target(adapter="acme/bot-lora", gguf="acme/bot-gguf")
    with pytest.raises(AccessError):
        send(tmp_path / "run", files, store)
    require_complete(hub, "acme/bot-lora")
    assert ("model", "acme/bot") not in hub.repos
    assert store.read_json("manifest.json") is None
    send(tmp_path / "run", files, store)
    assert len(hub.commits("acme/bot-lora")) == 2


@pytest.mark.parametrize("how", ["lost", "reset", "answer"])
def test_a_commit_happens_once_whatever_becomes_of_its_answer(
    hub: Hub, tmp_path: Path, how: Any
) -> None:  # fmt: skip
    files = make_run(tmp_path / "run", RUN)
    hub.fail_next(1, 504, match="^POST .*/commit/", how=how)
    retries = quick()
    send(tmp_path / "run", files, target(retries))
    assert retries.count == 1
    assert len(hub.commits("acme/bot")) == 2
    require_complete(hub, "acme/bot")
    assert len(hub.seen("^POST .*/commit/")) == (1 if how == "lost" else 2)


def test_who_commits_at_the_same_time_loses_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from jobs.store.hub.repository import Repository

    send_commit, rest = Repository.send_commit, [1]

    def late(self: Repository, *arguments: Any) -> None:
        if rest:
            rest.pop()
            repo = hub.repos["model", "acme/bot"]
            mine = {"mine.txt": hub.keep(b"mine", lfs=False)}
            hub.commit(repo, "main", {**repo.commit("main").files, **mine}, "mine", "", "bob")
        send_commit(self, *arguments)

    monkeypatch.setattr(Repository, "send_commit", late)
    retries = quick()
    send(tmp_path / "run", make_run(tmp_path / "run", RUN), target(retries))
    assert retries.reasons == {"the repository was changed meanwhile": 1}
    assert hub.read("acme/bot", "mine.txt") == b"mine"
    require_complete(hub, "acme/bot")


CHILD = """
import sys
from pathlib import Path
from jobs.spec import HubTarget
from jobs.store.base import no_advance
from jobs.store.hashing import file_entries
from jobs.store.hub import HubStore
from jobs.store.publish import publish
from jobs.store.retry import Retries
folder = Path(sys.argv[1])
files = [file for file in file_entries(folder) if file["path"] != "manifest.json"]
publish(folder, files, HubStore.of_target(HubTarget(hub="acme/bot"), Retries()), no_advance)
"""


def test_after_a_kill_only_what_had_not_arrived_is_sent(hub: Hub, tmp_path: Path) -> None:
    shards = {f"merged/model-{i:02}.safetensors": some_bytes(1_600_000, i) for i in range(16)}
    files = make_run(tmp_path / "run", RUN | shards)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, **hub.environment(TOKEN, tmp_path / "child")},
    )  # fmt: skip
    while not any(request.status == 200 for request in hub.seen("objects/verify")):
        assert child.poll() is None, "it ended before a file had arrived"
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.2)  # what was on its way
    arrived = set(hub.repos["model", "acme/bot"].objects)
    assert hub.files("acme/bot") == {}
    hub.forget_requests()
    send(tmp_path / "run", files, target())
    require_complete(hub, "acme/bot")
    large = {file["sha256"]: file["size"] for file in files if file["path"].endswith(("s", "f"))}
    missing = {sha256: size for sha256, size in large.items() if sha256 not in arrived}
    assert 0 < len(missing) < len(large)
    assert sent_bytes(hub) == sum(missing.values())


def test_through_a_network_that_fails_one_request_in_five(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    files = make_run(tmp_path / "run", RUN | MERGED)
    injected = 0
    for seed in range(4):
        with running_proxy(hub.endpoint, rate=0.2, seed=seed) as proxy:
            proxy.stall_s = 0.1
            point_at(proxy.endpoint, monkeypatch)
            up = target(hub=f"acme/run{seed}", gguf=f"acme/run{seed}-gguf")
            up.prove_writable(keep=True)
            send(tmp_path / "run", files, up)
            for repository in (f"acme/run{seed}", f"acme/run{seed}-gguf"):
                require_complete(hub, repository)
                assert len(hub.commits(repository)) == 2
            down = fetched(place(f"acme/run{seed}"), tmp_path / f"down{seed}")
            assert down["model.safetensors"] == MERGED["merged/model.safetensors"]
            injected += sum(proxy.injected.values())
    assert injected > 40


def test_no_token_and_no_signed_address_is_logged(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    hub.add_token(SECRET, "eve", orgs=["acme"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.fail_next(2, 503, match="^PUT /lfs-uploads")
    hub.fail_next(2, match="^PUT /lfs-uploads", how="reset")
    hub.fail_next(1, match="^GET .*/lfs/", how="cut")
    told: list[str] = []
    store = target(quick(tell=told.append))
    send(tmp_path / "run", make_run(tmp_path / "run", RUN | MERGED), store)
    fetched(place("acme/bot"), tmp_path / "out")
    assert hub.planted_left() == 0
    out = capfd.readouterr()
    seen = "\n".join((caplog.text, out.out, out.err, *told))
    assert SECRET not in seen
    assert "Signature" not in seen


def test_the_client_says_who_it_is(hub: Hub) -> None:
    hub.add_repo("acme/base", files=BASE)
    place().prove_readable()
    agents = {request.headers["user-agent"].split(";")[0] for request in hub.seen("acme/base")}
    assert {agent.partition("/")[0] for agent in agents} == {"lorajob"}
