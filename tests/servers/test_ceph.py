"""That the servers are what the store's tests need, each point tried on the server itself."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import random
import signal
import subprocess
import sys
import time
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.conftest import ROOT, hear_signals
from tests.servers import ceph as ceph_module
from tests.servers.s3 import S3Server

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

MIB = 2**20
STALE = '"00000000000000000000000000000000"'


@pytest.fixture
def s3(ceph: S3Server) -> S3Client:
    return ceph.client(retries={"max_attempts": 1})


@pytest.fixture
def bucket(ceph: S3Server) -> str:
    return ceph.new_bucket()


def refusal(call: Callable[..., Any], **arguments: Any) -> tuple[int, str]:
    """The status and the code that a call is refused with."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def outcome(call: Callable[..., Any], **arguments: Any) -> int:
    """The status that a call is answered with, refused or not."""
    try:
        return int(call(**arguments)["ResponseMetadata"]["HTTPStatusCode"])
    except ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def base64_of(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def md5(data: bytes) -> str:
    return base64_of(hashlib.md5(data).digest())


def sha256(data: bytes) -> str:
    return base64_of(hashlib.sha256(data).digest())


def crc32(data: bytes) -> str:
    return base64_of(zlib.crc32(data).to_bytes(4, "big"))


def read(s3: S3Client, bucket: str, key: str) -> bytes:
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def absent(s3: S3Client, bucket: str, key: str) -> bool:
    return outcome(s3.head_object, Bucket=bucket, Key=key) == 404


# Who may


def test_a_wrong_secret_is_refused(ceph: S3Server, bucket: str) -> None:
    wrong = S3Server(ceph.endpoint, ceph.access_key, "wrong", ceph.region).client()
    assert refusal(wrong.list_objects_v2, Bucket=bucket) == (403, "SignatureDoesNotMatch")


def test_an_unknown_access_key_is_refused(ceph: S3Server, bucket: str) -> None:
    wrong = S3Server(ceph.endpoint, "UNKNOWN", ceph.secret_key, ceph.region).client()
    assert refusal(wrong.list_objects_v2, Bucket=bucket) == (403, "InvalidAccessKeyId")


def test_what_is_not_there_is_named(s3: S3Client, bucket: str) -> None:
    assert refusal(s3.get_object, Bucket=bucket, Key="none") == (404, "NoSuchKey")
    assert refusal(s3.get_object, Bucket="no-such-bucket", Key="a") == (404, "NoSuchBucket")
    assert refusal(s3.put_object, Bucket="no-such-bucket", Key="a") == (404, "NoSuchBucket")


# What arrives is what was sent


def test_a_wrong_content_md5_is_refused(s3: S3Client, bucket: str) -> None:
    sent: dict[str, Any] = {"Bucket": bucket, "Key": "a", "Body": b"abc"}
    assert refusal(s3.put_object, **sent, ContentMD5=md5(b"x")) == (400, "BadDigest")
    assert absent(s3, bucket, "a")
    s3.put_object(**sent, ContentMD5=md5(b"abc"))
    assert read(s3, bucket, "a") == b"abc"


@pytest.mark.parametrize(("algorithm", "digest"), [("SHA256", sha256), ("CRC32", crc32)])
def test_a_wrong_checksum_is_refused_and_a_right_one_kept(
    s3: S3Client, bucket: str, algorithm: str, digest: Callable[[bytes], str]
) -> None:
    # The algorithm must be said too: a checksum whose algorithm is not named passes unchecked here.
    field = f"Checksum{algorithm}"
    sent: dict[str, Any] = {"Bucket": bucket, "Key": "a", "Body": b"abc"}
    sent["ChecksumAlgorithm"] = algorithm
    sent[field] = digest(b"x")
    assert refusal(s3.put_object, **sent) == (400, "BadDigest")
    assert absent(s3, bucket, "a")
    sent[field] = digest(b"abc")
    s3.put_object(**sent)
    head: dict[str, Any] = {**s3.head_object(Bucket=bucket, Key="a", ChecksumMode="ENABLED")}
    assert head[field] == digest(b"abc")


@pytest.mark.parametrize(("algorithm", "digest"), [("SHA256", sha256), ("CRC32", crc32)])
def test_a_wrong_checksum_of_a_part_is_refused(
    s3: S3Client, bucket: str, algorithm: Any, digest: Callable[[bytes], str]
) -> None:
    upload = s3.create_multipart_upload(Bucket=bucket, Key="a", ChecksumAlgorithm=algorithm)
    wrong = {f"Checksum{algorithm}": digest(b"x"), "ChecksumAlgorithm": algorithm}
    part = {"Bucket": bucket, "Key": "a", "UploadId": upload["UploadId"], "PartNumber": 1}
    assert refusal(s3.upload_part, **part, Body=b"abc", **wrong) == (400, "BadDigest")
    assert refusal(s3.upload_part, **part, Body=b"abc", ContentMD5=md5(b"x")) == (400, "BadDigest")


def test_a_body_that_changes_on_the_way_is_refused(ceph: S3Server, bucket: str) -> None:
    client = ceph.client(retries={"max_attempts": 1})

    def flip(request: Any, **_: Any) -> None:
        request.body = b"abd"

    client.meta.events.register("before-send.s3.PutObject", flip)
    status, code = refusal(client.put_object, Bucket=bucket, Key="a", Body=b"abc")
    assert (status, code) == (400, "XAmzContentSHA256Mismatch")
    assert absent(client, bucket, "a")


# Conditions


def test_a_key_is_written_once_with_if_none_match(s3: S3Client, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")
    second = refusal(s3.put_object, Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*")
    assert second == (412, "PreconditionFailed")
    assert read(s3, bucket, "a") == b"first"


def test_a_put_with_a_stale_etag_is_refused(s3: S3Client, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="a", Body=b"1")["ETag"]
    put: dict[str, Any] = {"Bucket": bucket, "Key": "a"}
    assert refusal(s3.put_object, **put, Body=b"2", IfMatch=STALE) == (412, "PreconditionFailed")
    assert read(s3, bucket, "a") == b"1"
    s3.put_object(Bucket=bucket, Key="a", Body=b"2", IfMatch=etag)
    assert read(s3, bucket, "a") == b"2"
    nothing = refusal(s3.put_object, Bucket=bucket, Key="none", Body=b"1", IfMatch=etag)
    assert nothing == (404, "NoSuchKey")


def test_a_delete_with_a_stale_etag_is_refused(s3: S3Client, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="a", Body=b"1")["ETag"]
    stale = refusal(s3.delete_object, Bucket=bucket, Key="a", IfMatch=STALE)
    assert stale == (412, "PreconditionFailed")
    batch = s3.delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": "a", "ETag": STALE}, {"Key": "none"}]}
    )
    assert [error["Code"] for error in batch["Errors"]] == ["PreconditionFailed"]
    assert read(s3, bucket, "a") == b"1"
    s3.delete_object(Bucket=bucket, Key="a", IfMatch=etag)
    assert absent(s3, bucket, "a")


def test_the_end_of_a_multipart_upload_takes_conditions(s3: S3Client, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="a", Body=b"1")["ETag"]
    upload: dict[str, Any] = {"Bucket": bucket, "Key": "a"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    part = s3.upload_part(**upload, PartNumber=1, Body=b"2")
    complete: dict[str, Any] = {
        **upload,
        "MultipartUpload": {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    }
    end = s3.complete_multipart_upload
    assert refusal(end, **complete, IfNoneMatch="*") == (412, "PreconditionFailed")
    assert refusal(end, **complete, IfMatch=STALE) == (412, "PreconditionFailed")
    assert read(s3, bucket, "a") == b"1"
    # A refused end leaves the upload: it can be ended again, and has to be aborted otherwise.
    end(**complete, IfMatch=etag)
    assert read(s3, bucket, "a") == b"2"


def test_of_writers_at_once_one_wins(ceph: S3Server, s3: S3Client, bucket: str) -> None:
    clients = [ceph.client(retries={"max_attempts": 1}) for _ in range(8)]
    with ThreadPoolExecutor(len(clients)) as pool:
        for attempt in range(5):
            key = f"once-{attempt}"

            def create(i: int, key: str = key) -> int:
                body = b"%d" % i
                return outcome(clients[i].put_object, Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")  # fmt: skip

            statuses = list(pool.map(create, range(8)))
            assert Counter(statuses)[200] == 1, statuses
            assert set(statuses) <= {200, 409, 412}
            assert read(s3, bucket, key) == b"%d" % statuses.index(200)

            etag = s3.head_object(Bucket=bucket, Key=key)["ETag"]

            def replace(i: int, key: str = key, etag: str = etag) -> int:
                body = b"replaced %d" % i
                return outcome(clients[i].put_object, Bucket=bucket, Key=key, Body=body, IfMatch=etag)  # fmt: skip

            statuses = list(pool.map(replace, range(8)))
            assert Counter(statuses)[200] == 1, statuses
            assert set(statuses) <= {200, 409, 412}  # 409: it changed while this one was written
            assert read(s3, bucket, key) == b"replaced %d" % statuses.index(200)


# Large files


def test_a_multipart_upload(s3: S3Client, bucket: str) -> None:
    data = random.Random(0).randbytes(5 * MIB + 1000)
    chunks = [data[: 5 * MIB], data[5 * MIB :]]
    upload_id = s3.create_multipart_upload(
        Bucket=bucket, Key="a", Metadata={"sha256": hashlib.sha256(data).hexdigest()}
    )["UploadId"]
    for number, chunk in enumerate(chunks, 1):
        s3.upload_part(Bucket=bucket, Key="a", UploadId=upload_id, PartNumber=number, Body=chunk)
    assert absent(s3, bucket, "a")  # nothing half-written is seen
    uploads = s3.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [(one["Key"], one["UploadId"]) for one in uploads] == [("a", upload_id)]
    listed = s3.list_parts(Bucket=bucket, Key="a", UploadId=upload_id)["Parts"]
    assert [(part["PartNumber"], part["Size"], part["ETag"]) for part in listed] == [
        (number, len(chunk), f'"{hashlib.md5(chunk).hexdigest()}"')
        for number, chunk in enumerate(chunks, 1)
    ]
    done = s3.complete_multipart_upload(
        Bucket=bucket, Key="a", UploadId=upload_id,
        MultipartUpload={"Parts": [{"PartNumber": p["PartNumber"], "ETag": p["ETag"]} for p in listed]},
    )  # fmt: skip
    digests = b"".join(hashlib.md5(chunk).digest() for chunk in chunks)
    assert done["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-2"'
    assert read(s3, bucket, "a") == data
    head = s3.head_object(Bucket=bucket, Key="a")
    assert head["Metadata"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_wrong_ends_of_a_multipart_upload_are_refused(s3: S3Client, bucket: str) -> None:
    upload: dict[str, Any] = {"Bucket": bucket, "Key": "a"}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    etag = s3.upload_part(**upload, PartNumber=1, Body=b"a")["ETag"]
    s3.upload_part(**upload, PartNumber=2, Body=b"a")

    def end(*parts: tuple[int, str]) -> tuple[int, str]:
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
        return refusal(s3.complete_multipart_upload, **upload, MultipartUpload={"Parts": listed})

    assert end((1, STALE)) == (400, "InvalidPart")
    assert end((1, etag), (2, etag)) == (400, "EntityTooSmall")
    s3.abort_multipart_upload(**upload)
    assert refusal(s3.upload_part, **upload, PartNumber=1, Body=b"a") == (404, "NoSuchUpload")


def test_a_wrong_checksum_of_the_whole_is_refused(s3: S3Client, bucket: str) -> None:
    upload: dict[str, Any] = {"Bucket": bucket, "Key": "a"}
    upload["UploadId"] = s3.create_multipart_upload(
        **upload, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT"
    )["UploadId"]
    part = s3.upload_part(**upload, PartNumber=1, Body=b"abc", ChecksumAlgorithm="CRC32")
    end: dict[str, Any] = {**upload, "ChecksumType": "FULL_OBJECT"}
    end["MultipartUpload"] = {
        "Parts": [
            {"PartNumber": 1, "ETag": part["ETag"], "ChecksumCRC32": part["ChecksumCRC32"]},
        ]
    }
    wrong = refusal(s3.complete_multipart_upload, **end, ChecksumCRC32=crc32(b"x"))
    assert wrong == (400, "BadDigest")
    s3.complete_multipart_upload(**end, ChecksumCRC32=crc32(b"abc"))
    assert read(s3, bucket, "a") == b"abc"


def test_ranges(s3: S3Client, bucket: str) -> None:
    data = bytes(range(256)) * 64
    etag = s3.put_object(Bucket=bucket, Key="a", Body=data)["ETag"]
    some = s3.get_object(Bucket=bucket, Key="a", Range="bytes=1000-1009", IfMatch=etag)
    assert some["ContentRange"] == f"bytes 1000-1009/{len(data)}"
    assert some["Body"].read() == data[1000:1010]
    rest = s3.get_object(Bucket=bucket, Key="a", Range=f"bytes={len(data) - 5}-")
    assert rest["Body"].read() == data[-5:]
    get = {"Bucket": bucket, "Key": "a"}
    assert refusal(s3.get_object, **get, Range="bytes=99999-") == (416, "InvalidRange")
    changed = refusal(s3.get_object, **get, Range="bytes=0-9", IfMatch=STALE)
    assert changed == (412, "PreconditionFailed")


def test_transfers_of_whole_files(s3: S3Client, bucket: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(1).randbytes(20 * MIB))  # more than one part
    s3.upload_file(str(source), bucket, "a/b c+ü.bin")
    s3.download_file(bucket, "a/b c+ü.bin", str(copy))
    assert copy.read_bytes() == source.read_bytes()
    listed = s3.list_objects_v2(Bucket=bucket, Prefix="a/")["Contents"]
    assert [(one["Key"], one["Size"]) for one in listed] == [("a/b c+ü.bin", 20 * MIB)]


# Presigned URLs


@pytest.mark.parametrize("version", ["s3v4", "s3"])
def test_presigned_urls(ceph: S3Server, bucket: str, version: str) -> None:
    s3 = ceph.client(signature_version=version)

    def request(method: str, url: str, body: bytes | None = None) -> tuple[int, bytes]:
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=10)
        connection.request(method, f"{parts.path}?{parts.query}", body)
        response = connection.getresponse()
        return response.status, response.read()

    put = s3.generate_presigned_url("put_object", {"Bucket": bucket, "Key": "a"})
    get = s3.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "a"}, ExpiresIn=2)
    assert request("PUT", put, b"abc")[0] == 200
    assert request("GET", get) == (200, b"abc")
    assert request("DELETE", get)[0] == 403
    assert request("GET", get.replace("/a?", "/b?"))[0] == 403
    time.sleep(3)
    assert request("GET", get)[0] == 403


# The server itself


def test_another_process_is_pointed_at_it_by_the_environment(ceph: S3Server, bucket: str) -> None:
    code = (
        "import boto3, sys; boto3.client('s3').put_object(Bucket=sys.argv[1], Key='a', Body=b'b')"
    )
    environment = {**os.environ, "AWS_SESSION_TOKEN": "another", **ceph.environment()}
    subprocess.run([sys.executable, "-c", code, bucket], check=True, env=environment)
    assert read(ceph.client(), bucket, "a") == b"b"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_it_never_outlives_who_started_it(
    ceph: S3Server, tmp_path: Path, ending: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.ceph"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
        preexec_fn=hear_signals,
    )  # fmt: skip
    assert process.stdout
    try:
        lines = [process.stdout.readline() for _ in ceph.environment()]
        values = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        endpoint = values["AWS_ENDPOINT_URL_S3"]
        assert ceph_module._answers(endpoint)
        running = daemons(tmp_path)
        assert sorted(running.values()) == ["ceph-mon", "ceph-osd", "radosgw"]
    finally:
        process.send_signal(ending)
        try:
            code = process.wait(60)
        finally:
            process.kill()  # else what does not hear it would run on
            process.wait()
            process.stdout.close()
    deadline = time.monotonic() + 30
    while daemons(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert daemons(tmp_path) == {}
    assert not ceph_module._answers(endpoint)
    if ending == signal.SIGINT:
        assert code == 0
        assert list(tmp_path.iterdir()) == []


def daemons(folder: Path) -> dict[int, str]:
    """The daemons whose data lie below `folder`: their mount tables name it."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            mounts = (process / "mountinfo").read_text()
            name = (process / "comm").read_text().strip()
            zombie = ") Z " in (process / "stat").read_text()
        except OSError:  # no process, or one that has just ended
            continue
        # A process between its mounts and its chroot has the mount, but not yet a daemon's name.
        if str(folder) in mounts and name in {"ceph-mon", "ceph-osd", "radosgw"} and not zombie:
            found[int(process.name)] = name
    return found


def test_a_start_that_fails_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ceph: S3Server
) -> None:
    broken = ceph_module.CONFIG.replace("osd_data = /mnt/osd", "osd_data = /none/osd")
    monkeypatch.setattr(ceph_module, "CONFIG", broken)
    with pytest.raises(RuntimeError, match=r"^ceph-osd failed: "), ceph_module.running_ceph(tmp_path):  # fmt: skip
        pytest.fail("it started")
    assert (tmp_path / "mon.a.log").exists()  # the monitor ran, and was ended
    assert daemons(tmp_path) == {}


def test_without_a_chroot_the_reason_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAJOB_CEPH", str(tmp_path))
    reason = ceph_module.why_not()
    assert reason
    assert ".ci/ceph" in reason
    (tmp_path / ceph_module.MARKER).touch()
    assert ceph_module.ceph_root() == tmp_path
    monkeypatch.delenv("LORAJOB_CEPH")
    monkeypatch.setenv("LORAJOB_CACHE", str(tmp_path))
    assert ceph_module.ceph_root() is None
    (tmp_path / "ceph").mkdir()
    (tmp_path / "ceph" / ceph_module.MARKER).touch()
    assert ceph_module.ceph_root() == tmp_path / "ceph"


@pytest.mark.parametrize(
    ("required", "outcomes"), [("", {"skipped": 1}), ("hub,ceph", {"errors": 1})]
)
def test_who_requires_ceph_gets_a_failure_instead_of_a_skip(
    tmp_path: Path, required: str, outcomes: dict[str, int]
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.servers.fixtures import ceph\n")
    (tmp_path / "test_it.py").write_text("def test_it(ceph): pass\n")
    report = tmp_path / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, "-c", "/dev/null",
         "-p", "no:cacheprovider", f"--junit-xml={report}", tmp_path],
        check=False, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LORAJOB_CEPH": str(tmp_path), "LORAJOB_REQUIRE": required},
    )  # fmt: skip
    text = report.read_text()
    for kind, count in outcomes.items():
        assert f'{kind}="{count}"' in text
    assert ".ci/ceph" in text


def test_moto_is_an_s3_server_too(moto: S3Server) -> None:
    bucket = moto.new_bucket()
    moto.client().put_object(Bucket=bucket, Key="a", Body=b"abc")
    assert read(moto.client(), bucket, "a") == b"abc"
