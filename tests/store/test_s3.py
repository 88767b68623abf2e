"""A bucket's prefix as a store: complete or not at all, and nothing sent or fetched twice."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import subprocess
import sys
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from jobs.errors import AccessError, DoesNotFitError, ServiceError
from jobs.spec import S3
from jobs.store.base import no_advance
from jobs.store.hashing import FileEntry, file_entries
from jobs.store.places import S3Place
from jobs.store.retry import Retries
from jobs.store.s3 import S3Store
from jobs.store.s3 import download as s3_download
from jobs.store.s3 import upload as s3_upload
from jobs.store.s3.direct import sign
from tests.servers.faults import running_proxy
from tests.servers.fixtures import ceph, moto  # noqa: F401
from tests.servers.s3 import S3Server

PART = 5 << 20  # the least that S3 takes for a part that is not the last
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(params=["moto", "ceph"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART", PART)


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server.new_bucket()


def store(
    bucket: str, prefix: str = "runs/a", retries: Retries | None = None, **s3: object
) -> S3Store:
    settings = S3.model_validate(s3)
    return S3Store(
        S3Place(bucket, prefix), settings, retries or Retries(wait=0.01, give_up_after=20)
    )


def make(folder: Path, seed: int = 0, **sizes: int) -> list[FileEntry]:
    """Files with these sizes in bytes, and the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.Random(f"{seed}{name}").randbytes(size))
    return file_entries(folder)


def fetched(place: S3Store, folder: Path) -> list[FileEntry]:
    place.fetch(place.entries(), folder, no_advance)
    return file_entries(folder)


def test_what_was_sent_comes_back(bucket: str, tmp_path: Path) -> None:
    files = make(tmp_path / "out", empty=0, small=1000, gguf__large=2 * PART + 17, exact=PART)
    place = store(bucket)
    seen: list[int] = []
    place.put(tmp_path / "out", files, seen.append)
    assert sum(seen) == sum(file["size"] for file in files)
    assert [entry.key for entry in place.entries()] == [file["path"] for file in files]
    assert fetched(place, tmp_path / "in") == files
    assert place.held(files) == {file["path"] for file in files}
    other = [{**file, "sha256": "0" * 64} for file in files]
    assert place.held(other) == set()  # type: ignore[arg-type]


def test_two_thousand_keys_are_listed(bucket: str, tmp_path: Path) -> None:
    make(tmp_path, **{f"f{number}": 1 for number in range(1100)})
    place = store(bucket)
    place.put(tmp_path, file_entries(tmp_path), no_advance)
    assert len(place.entries()) == 1100


def test_a_prefix_is_a_folder_and_not_a_beginning(bucket: str, tmp_path: Path) -> None:
    files = make(tmp_path, a=3)
    store(bucket, "runs/a").put(tmp_path, files, no_advance)
    store(bucket, "runs/ab").put(tmp_path, files, no_advance)
    assert [entry.key for entry in store(bucket, "runs").entries()] == ["a/a", "ab/a"]
    assert [entry.key for entry in store(bucket, "runs/a").entries()] == ["a"]
    assert store(bucket, "runs").entry("a") is None
    assert store(bucket, "runs").entry("ab/a") is not None


def test_the_last_is_written_last_and_removed_first(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f for f in make(tmp_path, a=10, b=10, manifest=5) if f["path"] != "manifest"]
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        place = store(bucket)
        place.put(tmp_path, make(tmp_path, manifest=4, old=4), no_advance)
        before = len(proxy.log)
        place.replace(tmp_path, files, {"old"}, "manifest", no_advance)
        order = [f"{r.method} {r.target.rpartition('/')[2]}" for r in proxy.log[before:]]
    assert order[:2] == ["DELETE manifest", "DELETE old"]
    assert sorted(order[2:-1]) == ["PUT a", "PUT b"]
    assert order[-1] == "PUT manifest"


def test_an_upload_that_broke_off_is_gone_on_with(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path / "out", large=6 * PART)
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        proxy.fail("expired", match="partNumber=5", times=99)
        with pytest.raises(AccessError, match="expired"):
            store(bucket).put(tmp_path / "out", files, no_advance)
        proxy.resume()
        arrived = {part_of(r.target) for r in proxy.log if r.method == "PUT" and r.status == 200}
        assert arrived
        assert arrived < {1, 2, 3, 4, 5, 6}
        assert store(bucket).entries() == []  # nothing half-sent is seen
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store(bucket).put(tmp_path / "out", files, no_advance)
        sent = {part_of(r.target) for r in proxy.log if r.method == "PUT"}
        assert sent == {1, 2, 3, 4, 5, 6} - arrived
        assert fetched(store(bucket), tmp_path / "in") == files


def part_of(target: str) -> int:
    _, found, after = target.partition("partNumber=")
    return int(after.partition("&")[0]) if found else 0


def test_parts_of_another_file_are_not_gone_on_with(bucket: str, tmp_path: Path) -> None:
    place = store(bucket)
    old = make(tmp_path / "old", seed=1, large=3 * PART)
    upload = s3_upload.Upload(
        place.client, place.retries, "runs/a/large", tmp_path / "old" / "large", old[0], {}, no_advance
    )  # fmt: skip
    next(iter(upload.steps()))()  # one part, and then nothing more
    files = make(tmp_path / "new", seed=2, large=3 * PART)
    place.put(tmp_path / "new", files, no_advance)
    assert fetched(place, tmp_path / "in") == files
    assert not place.client.s3.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_an_upload_that_was_begun_for_another_file_is_sent_again(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of the other file that had come is as ours: only the sha256 at the end tells."""
    files = make(tmp_path / "new", large=3 * PART)
    body = bytearray((tmp_path / "new" / "large").read_bytes())
    body[-1] ^= 1
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "large").write_bytes(body)
    place = store(bucket)
    old = s3_upload.Upload(
        place.client, place.retries, "runs/a/large", tmp_path / "old" / "large",
        file_entries(tmp_path / "old")[0], {}, no_advance,
    )  # fmt: skip
    next(iter(old.steps()))()  # its first part
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        seen: list[int] = []
        store(bucket).put(tmp_path / "new", files, seen.append)
        sent = [part_of(r.target) for r in proxy.log if r.method == "PUT"]
    assert sorted(sent[:2]) == [2, 3]  # gone on with
    assert sorted(sent[2:]) == [1, 2, 3]  # and sent again
    assert sum(seen) == files[0]["size"]
    assert place.held(files) == {"large"}
    assert fetched(place, tmp_path / "in") == files
    assert not place.client.s3.list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize("key", ["a", "a b/c+ü~(1)*.bin", "x=1&y/%41"])
@pytest.mark.parametrize("token", [None, "a-token"])
@pytest.mark.parametrize("base", ["http://127.0.0.1:8000/bucket/", "https://b.s3.amazonaws.com/"])
def test_a_request_is_signed_with_the_sha256_that_is_known_of_its_body(
    monkeypatch: pytest.MonkeyPatch, key: str, token: str | None, base: str
) -> None:
    now = datetime.now(UTC)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: now)
    body, headers = b"some bytes", {"x-amz-meta-lorajob-sha256": "0  1 ", "Expect": "100-continue"}
    credentials = Credentials("AKIDEXAMPLE", "a/secret+key", token)
    url = f"{base}{quote(key, safe='/~')}?partNumber=3&uploadId=2~a%2Fb"
    whole = AWSRequest("PUT", url, dict(headers), body)
    whole.context["client_config"] = Config(s3={"payload_signing_enabled": True})
    S3SigV4Auth(credentials, "s3", "eu-west-1").add_auth(whole)
    known = hashlib.sha256(body).hexdigest()
    signed = sign("PUT", url, headers, credentials, "eu-west-1", known)
    assert signed == {name.lower(): value for name, value in whole.headers.items()}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_is_sent_has_one_checksum_that_the_server_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Over http that of the signature; over https, where nobody can change it, a CRC-32 is less work."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "some-value")
    files = make(tmp_path, file=1000)
    place = store("bucket", endpoint=f"{scheme}://s3.example.org", region="us-east-1")
    direct, sent = place.client.direct, list[Any]()

    def send(request: Any) -> Any:
        sent.append(request)
        return SimpleNamespace(status_code=200, headers={"ETag": "x"}, content=b"", raw=None)

    monkeypatch.setattr(direct, "_place", (f"{scheme}://s3.example.org/bucket/", "us-east-1"))
    monkeypatch.setattr(direct._session, "send", send)
    place.put(tmp_path, files, no_advance)
    [request] = sent
    assert request.url == f"{scheme}://s3.example.org/bucket/runs/a/file"
    crc = zlib.crc32((tmp_path / "file").read_bytes()).to_bytes(4, "big")
    assert request.headers["x-amz-meta-lorajob-sha256"] == files[0]["sha256"]
    if scheme == "https":
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert request.headers["x-amz-checksum-crc32"] == base64.b64encode(crc).decode()
    else:
        assert request.headers["x-amz-content-sha256"] == files[0]["sha256"]
        assert "x-amz-checksum-crc32" not in request.headers


@pytest.mark.parametrize("name", ["a b", "plus+and~tilde", "ünï", "x=1&y", "(1)*'!"])
def test_names_that_have_to_be_quoted(bucket: str, tmp_path: Path, name: str) -> None:
    files = make(tmp_path / "out", **{"first": 9, name: 99, f"{name}2": 5 * PART // 2})
    place = store(bucket)
    place.put(tmp_path / "out", files, no_advance)
    assert {entry.key for entry in place.entries()} == {file["path"] for file in files}
    assert fetched(place, tmp_path / "in") == files


@pytest.mark.parametrize("damaged", [False, True])
def test_a_download_that_broke_off_is_gone_on_with(
    server: S3Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: bool,
) -> None:
    monkeypatch.setattr(s3_download, "PARTS_A_REQUEST", 2)
    files = make(tmp_path / "out", large=8 * PART + 9)
    store(bucket).put(tmp_path / "out", files, no_advance)
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        place = store(bucket)
        real = s3_download.Download._get_parts

        def last_fails(self: s3_download.Download, start: int, end: int) -> None:
            if end == 8 * PART:
                raise ServiceError("planted")
            real(self, start, end)

        with monkeypatch.context() as planted:
            planted.setattr(s3_download.Download, "_get_parts", last_fails)
            with pytest.raises(ServiceError, match="planted"):
                place.fetch(place.entries(), tmp_path / "in", no_advance)
        assert not (tmp_path / "in" / "large").exists()
        noted = (tmp_path / "in" / ".partial-large.parts").read_text().splitlines()[1:]
        whole = int(noted[-1].split()[0])
        assert whole >= 2 * PART
        assert whole % PART == 0
        if damaged:  # on this disk: from there on nothing is taken for whole
            with (tmp_path / "in" / ".partial-large").open("r+b") as file:
                file.seek(PART + 5)
                file.write(b"?")
            whole = PART
        before, seen = proxy.bytes_down, list[int]()
        place.fetch(place.entries(), tmp_path / "in", seen.append)
        assert file_entries(tmp_path / "in") == files
        assert sum(seen) == files[0]["size"]
        assert abs(proxy.bytes_down - before - (files[0]["size"] - whole)) < PART / 10


def test_an_answer_that_breaks_off_is_gone_on_with_where_it_did(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path / "out", large=8 * PART)
    store(bucket).put(tmp_path / "out", files, no_advance)
    with running_proxy(server.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        proxy.fail("truncate", match="GET .*/large", times=2)
        assert fetched(store(bucket), tmp_path / "in") == files
        assert proxy.injected["truncate"] == 2
        # What had come is not asked for again, but for what a closed connection has thrown away:
        # anew each time, it would have been twice the file.
        assert proxy.bytes_down < 1.4 * files[0]["size"]


def test_an_object_that_changes_while_it_is_fetched_is_noticed(bucket: str, tmp_path: Path) -> None:
    place = store(bucket)
    place.put(tmp_path / "out", make(tmp_path / "out", seed=1, large=3 * PART), no_advance)
    listed = place.entries()
    place.put(tmp_path / "out", make(tmp_path / "out", seed=2, large=3 * PART), no_advance)
    with pytest.raises(ServiceError, match="changed at the same time"):
        place.fetch(listed, tmp_path / "in", no_advance)
    assert not (tmp_path / "in" / "large").exists()


@pytest.mark.parametrize("size", [1000, 3 * PART])
def test_content_that_is_not_what_was_written_is_refused(
    bucket: str, tmp_path: Path, size: int
) -> None:
    files = make(tmp_path / "out", file=size)
    wrong: list[FileEntry] = [{**files[0], "sha256": "0" * 64}]
    place = store(bucket, retries=Retries(wait=0.01, give_up_after=0.1))
    place.put(tmp_path / "out", wrong, no_advance)
    with pytest.raises(ServiceError, match=r"damaged|not what was sent"):
        place.fetch(place.entries(), tmp_path / "in", no_advance)
    assert not (tmp_path / "in" / "file").exists()


def test_every_fault_is_survived(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path / "out", a=10, b=5000, c__d=200_000, large=2 * PART + 99)
    for seed in range(6):
        with running_proxy(server.endpoint, rate=0.2, seed=seed) as proxy:
            proxy.stall_s = 0.2
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
            retries = Retries(wait=0.01, give_up_after=20)
            place = store(bucket, f"runs/{seed}", retries)
            place.replace(
                tmp_path / "out", [f for f in files if f["path"] != "a"], set(), "a", no_advance
            )
            assert fetched(place, tmp_path / str(seed)) == files
            assert place.held(files) == {file["path"] for file in files}
            place.delete({"a"})
            assert retries.count >= 1 or not proxy.injected
    assert server.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 6 * 3


CHILD = """
import sys
from pathlib import Path
from jobs.store.s3 import upload as s3_upload
s3_upload.PART = {part}
from jobs.spec import S3
from jobs.store.hashing import file_entries
from jobs.store.places import S3Place
from jobs.store.retry import Retries
from jobs.store.s3 import S3Store
folder = Path(sys.argv[1])
files = file_entries(folder)
store = S3Store(S3Place(sys.argv[2], "killed"), S3(), Retries())
missing = [f for f in files if f["path"] not in store.held(files)]
print("begins", flush=True)
store.put(folder, missing, lambda count: None)
print("done", flush=True)
"""


def test_killed_at_any_moment_and_started_again_sends_nothing_twice(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    files = make(tmp_path / "out", large=5 * PART, other=3 * PART, small=9)
    draw = random.Random(1)
    done = False
    with running_proxy(server.endpoint, rate=0) as proxy:
        environment = {**os.environ, **server.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        for _ in range(30):
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD.format(part=PART), str(tmp_path / "out"), bucket],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == "begins\n"
            time.sleep(draw.uniform(0, 0.15))
            child.kill()
            done = child.communicate()[0] == "done\n"
            if done:
                break
        if not done:
            place = store(bucket, "killed")
            place.put(tmp_path / "out", [f for f in files if f["path"] not in place.held(files)], no_advance)  # fmt: skip
        whole = [r for r in proxy.log if r.method == "PUT" and r.upstream_status == 200]
    for target in {r.target for r in whole if "partNumber" in r.target}:
        assert sum(r.target == target for r in whole) == 1  # no part that had arrived went twice
    assert fetched(store(bucket, "killed"), tmp_path / "in") == files


def test_what_will_never_help_is_said_at_once(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(place: S3Store) -> AccessError:
        start = time.monotonic()
        with pytest.raises(AccessError) as caught:
            place.prove_readable()
        assert time.monotonic() - start < 5
        assert server.secret_key not in str(caught.value) or server.secret_key == "test"
        return caught.value

    assert "no such bucket" in str(refused(store("bucket-that-is-not-there")))
    assert "nothing at s3://" in str(refused(store(bucket, "nowhere")))
    store(bucket).prove_writable(keep=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    if server.region != "us-east-1" or server.access_key != "test":  # moto takes any
        assert "does not accept the credentials" in str(refused(store(bucket)))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials" in str(refused(store(bucket)))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in str(refused(store(bucket)))


def test_a_server_that_stays_away_is_a_failed_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    place = store(
        "bucket", retries=Retries(wait=0.01, give_up_after=0.3), endpoint="http://127.0.0.1:9"
    )
    with pytest.raises(ServiceError, match=r"s3://bucket/runs/a failed \d+ times"):
        place.prove_readable()


def test_a_full_disk_is_said_and_nothing_is_left_half(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store(bucket)
    place.put(tmp_path / "out", make(tmp_path / "out", large=3 * PART), no_advance)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DoesNotFitError, match="large"):
        place.fetch(place.entries(), tmp_path / "in", no_advance)
    assert not (tmp_path / "in" / "large").exists()


def test_old_servers_get_md5_and_no_checksums_they_do_not_know(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(tmp_path / "out", small=100, large=2 * PART)
    place = store(bucket, checksums=False)
    headers: list[set[str]] = []
    place.client.s3.meta.events.register(
        "before-send.s3", lambda request, **_: headers.append({h.lower() for h in request.headers})
    )
    place.put(tmp_path / "out", files, no_advance)
    assert fetched(place, tmp_path / "in") == files
    assert not any(h.startswith("x-amz-checksum") for each in headers for h in each)
    assert sum("content-md5" in each for each in headers) == 3


def test_encryption_and_storage_class_are_asked_for(
    moto: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    bucket = moto.new_bucket()
    files = make(tmp_path, small=100, large=2 * PART)
    place = store(bucket, encryption="aws:kms", kms_key="a-key", storage_class="STANDARD_IA")
    place.put(tmp_path, files, no_advance)
    for file in files:
        said = place.client.s3.head_object(Bucket=bucket, Key=f"runs/a/{file['path']}")
        assert said["ServerSideEncryption"] == "aws:kms"
        assert said["SSEKMSKeyId"].endswith("a-key")
        assert said["StorageClass"] == "STANDARD_IA"


def test_a_bucket_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = {
        "endpoint": "https://a.example.org",
        "buckets": {"other": {"region": "eu-west-1"}},
    }
    assert store("one", **settings).client.s3.meta.endpoint_url == "https://a.example.org"
    other = store("other", **settings).client.s3.meta
    assert other.region_name == "eu-west-1"
    assert "amazonaws.com" in other.endpoint_url


def test_a_role_whose_credentials_ran_out_is_asked_again(
    moto: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a mounted credentials file does when it is renewed in the middle of a run."""
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = first\naws_secret_access_key = one\n")
    bucket = moto.new_bucket()
    with running_proxy(moto.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        place = store(bucket)
        place.prove_writable(keep=True)
        file.write_text("[default]\naws_access_key_id = second\naws_secret_access_key = two\n")
        proxy.fail("expired", match="PUT", times=1)
        place.prove_writable(keep=True)
        monkeypatch.setattr("jobs.store.s3.client.RENEWAL", 0.3)
        proxy.fail("expired", match="PUT", times=999)
        with pytest.raises(AccessError, match="expired"):
            place.prove_writable(keep=True)
