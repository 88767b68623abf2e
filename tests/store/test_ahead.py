"""What is sent ahead is seen by nobody before it is published, and not sent again then."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from jobs.errors import AccessError, DoesNotFitError, VerificationError
from jobs.pipeline.ahead import sending_ahead
from jobs.stages import Done
from jobs.store.base import Store, no_advance
from jobs.store.hashing import FileEntry, file_entries
from jobs.store.lease import Lease
from jobs.store.local import LocalStore
from jobs.store.publish import publish
from jobs.store.retry import Retries
from jobs.store.s3 import S3Store
from tests.servers.faults import FaultProxy, running_proxy
from tests.servers.fixtures import ceph, moto  # noqa: F401
from tests.servers.s3 import S3Server
from tests.store.test_s3 import (  # noqa: F401
    PART,
    bucket,
    fetched,
    make,
    part_of,
    server,
    small_parts,
    store,
)


def make_run(folder: Path, **sizes: int) -> list[FileEntry]:
    files = make(folder, **sizes)
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return files


@contextmanager
def watched(server: S3Server) -> Iterator[FaultProxy]:
    """Stores that are made within go through the proxy."""
    with running_proxy(server.endpoint, rate=0) as proxy, pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


def parts_sent(proxy: FaultProxy) -> list[int]:
    sent = [part_of(r.target) for r in proxy.log if r.method == "PUT" and r.status == 200]
    return sorted(number for number in sent if number)


def unfinished(place: S3Store, name: str) -> int:
    found = place.client.s3.list_multipart_uploads(Bucket=name).get("Uploads")
    return len(found or [])


def test_parts_go_ahead_unseen_and_are_not_sent_again(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    files = make_run(tmp_path, merged__model=3 * PART + 5, adapter__small=1000, gguf__q4=2 * PART)
    with watched(server) as proxy:
        place = store(bucket)
        place.send_ahead(tmp_path, files[1:], Event())
        assert parts_sent(proxy) == [1, 1, 2, 2, 3, 4]
        assert store(bucket).entries() == []
        before = len(proxy.log)
        seen: list[int] = []
        assert publish(tmp_path, files, place, seen.append) == {"sent": 3, "kept": 0}
        sent = [r for r in proxy.log[before:] if r.method == "PUT"]
        assert sorted(r.target.rpartition("/")[2] for r in sent) == ["manifest.json", "small"]
    assert sum(seen) >= sum(file["size"] for file in files)  # and the manifest
    place = store(bucket)
    assert place.held(files) == {file["path"] for file in files}
    came = fetched(place, tmp_path.with_name("in"))
    assert [file for file in came if file["path"] != "manifest.json"] == files
    assert unfinished(place, bucket) == 0


def test_stopped_in_the_middle_publishing_sends_the_rest(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    files = make_run(tmp_path, model=9 * PART)
    stopped = Event()
    with watched(server) as proxy:
        place = store(bucket)
        send = place.client.direct.put

        def send_one(*args: object, **options: object) -> object:
            stopped.set()
            return send(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(place.client.direct, "put", send_one)
        place.send_ahead(tmp_path, files, stopped)
        ahead = parts_sent(proxy)
        assert 0 < len(ahead) < 9
        publish(tmp_path, files, place, no_advance)
        assert parts_sent(proxy) == list(range(1, 10))  # each once
    assert store(bucket).held(files) == {"model"}


def test_what_was_changed_since_is_sent_as_it_is_now(bucket: str, tmp_path: Path) -> None:
    place = store(bucket)
    place.send_ahead(tmp_path / "a", make(tmp_path / "a", seed=1, model=2 * PART), Event())
    files = make_run(tmp_path / "b", model=2 * PART)
    publish(tmp_path / "b", files, place, no_advance)
    assert place.held(files) == {"model"}
    assert unfinished(place, bucket) == 0


def test_what_is_there_already_is_not_sent_ahead(bucket: str, tmp_path: Path) -> None:
    files = make_run(tmp_path, model=2 * PART)
    publish(tmp_path, files, store(bucket), no_advance)
    place = store(bucket)
    place.send_ahead(tmp_path, files, Event())
    assert unfinished(place, bucket) == 0


# --- beside the stages of a run


@pytest.fixture
def at_moto(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    return moto


def done(folder: Path, name: str, skipped: bool = False) -> Done:
    files = [file for file in file_entries(folder) if file["path"].startswith(name)]
    return Done("key", files, {}, 0.0, skipped)


def wait_until(found: object) -> None:
    until = time.monotonic() + 20
    while not found():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_stages_go_to_every_target_while_others_are_made(
    at_moto: S3Server, tmp_path: Path
) -> None:  # fmt: skip
    files = make_run(tmp_path / "run", merged__a=2 * PART, gguf__b=2 * PART, old__c=2 * PART)
    names = at_moto.new_bucket(), at_moto.new_bucket()
    places = [store(name) for name in names]
    stores: list[Store] = [*places, LocalStore(tmp_path / "out")]
    with sending_ahead(tmp_path / "run", stores, Lease()) as ahead:
        ahead.add(done(tmp_path / "run", "merged"))
        for place, name in zip(places, names, strict=True):
            wait_until(lambda place=place, name=name: unfinished(place, name) == 1)
        ahead.add(done(tmp_path / "run", "old", skipped=True))
        time.sleep(0.3)
        assert unfinished(places[0], names[0]) == 1  # it may be all that there is
        ahead.add(done(tmp_path / "run", "gguf"))
        for place, name in zip(places, names, strict=True):
            wait_until(lambda place=place, name=name: unfinished(place, name) == 3)
    for target in stores:
        publish(tmp_path / "run", files, target, no_advance)
        assert target.held(files) == {file["path"] for file in files}
    for place, name in zip(places, names, strict=True):
        assert unfinished(place, name) == 0


@pytest.mark.parametrize(
    ("error", "left"), [(VerificationError("it babbles"), 0), (DoesNotFitError("disk full"), 1)]
)
def test_of_a_run_that_fails_nothing_is_seen_and_of_a_wrong_one_nothing_stays(
    at_moto: S3Server, tmp_path: Path, error: Exception, left: int
) -> None:  # fmt: skip
    make_run(tmp_path, merged__a=2 * PART)
    name = at_moto.new_bucket()
    place = store(name)
    with (
        pytest.raises(type(error)),
        sending_ahead(tmp_path, [place], Lease()) as ahead,
    ):
        ahead.add(done(tmp_path, "merged"))
        wait_until(lambda: unfinished(place, name) == 1)
        raise error
    assert unfinished(place, name) == left
    assert place.entries() == []


def test_a_target_that_cannot_be_reached_holds_nothing_up(
    at_moto: S3Server, tmp_path: Path
) -> None:  # fmt: skip
    files = make_run(tmp_path, merged__a=2 * PART)
    place = store("no-such-bucket-here", retries=Retries(wait=0.01, give_up_after=1))
    with sending_ahead(tmp_path, [place], Lease()) as ahead:
        ahead.add(done(tmp_path, "merged"))
    with pytest.raises(AccessError, match="no-such-bucket-here"):  # publishing is who tells of it
        publish(tmp_path, files, place, no_advance)
