"""One file into S3: whole in one request, or in parts that a second try goes on with."""

from __future__ import annotations

import base64
import hashlib
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jobs.errors import LorajobError
from jobs.store.base import Advance, no_advance
from jobs.store.hashing import FileEntry
from jobs.store.local import disk_error
from jobs.store.pieces import Step
from jobs.store.retry import Retries
from jobs.store.s3.client import Client, code_of
from jobs.store.s3.direct import UNASKED

SHA256 = "lorajob-sha256"  # the metadata field that says what an object's content hashes to
# What a spec may want of everything that is written, as boto3 and as S3 call it.
HEADERS = {
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "StorageClass": "x-amz-storage-class",
}
Data = bytes | memoryview
PART = 12 << 20  # bytes of a part; each of THREADS has one in memory
MOST_PARTS = 10_000  # S3's limit


def part_size(size: int) -> int:
    """Bytes of each part but the last: always the same for a size, so that parts can be gone on with."""
    least = -(-size // MOST_PARTS)
    return max(PART, -(-least // 2**20) * 2**20)


class Upload:
    """Sends one file. `steps` may run on several threads; the last to end makes it visible.

    With `steps_ahead` its parts go before that, and `steps` is left with those that are missing.
    """

    def __init__(
        self,
        client: Client,
        retries: Retries,
        key: str,
        path: Path,
        file: FileEntry,
        extra: dict[str, str],
        advance: Advance,
    ) -> None:
        self.client, self.retries, self.key, self.path = client, retries, key, path
        self.size, self.sha256 = file["size"], file["sha256"]
        self.extra = extra
        self.advance = advance
        self.what = f"sending {file['path']} to s3://{client.bucket}/{key}"
        self.crc, self.md5 = client.crc, not client.options.checksums
        self._lock = threading.Lock()
        self._id = ""
        self._parts: dict[int, dict[str, Any]] = {}  # number (from 1) -> what the end has to name
        self._left = 0
        self._continued = False

    @property
    def has_parts(self) -> bool:
        return self.size > PART

    def steps(self) -> Iterator[Step]:
        if not self.has_parts:
            yield self._put_whole
            return
        numbers = self._begin()
        self._left = len(numbers)
        if not numbers:
            yield self._finish
        for number in numbers:
            yield partial(self._put_next, number)

    def steps_ahead(self) -> Iterator[Step]:
        """To send the parts, and no more; a file in one piece has none."""
        for number in self._begin() if self.has_parts else ():
            yield partial(self._put_part, number)

    def forget(self) -> None:
        """Give back the parts that were sent ahead."""
        if self._id:
            self._abort(self._id)

    def _call(self, method: str, **arguments: Any) -> Any:
        return self.retries.call(
            self.what,
            lambda: getattr(self.client.s3, method)(
                Bucket=self.client.bucket, Key=self.key, **arguments
            ),
            self.client.judge(self.what),
        )

    def _read(self, start: int, length: int) -> memoryview:
        """Some bytes of the file, good until this thread reads the next."""
        data = buffer_of(length)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                count = file.readinto(data)
                while count and count < length and (more := file.readinto(data[count:])):
                    count += more
        except OSError as error:
            raise disk_error(error, self.path) from None
        if count != length:
            raise disk_error(FileNotFoundError(2, "cut short", str(self.path)), self.path)
        return data

    def _put_whole(self) -> None:
        data = self._read(0, self.size)
        self.retries.call(self.what, lambda: self._put(data), self.client.judge(self.what))
        self.advance(self.size)

    def _put(self, data: Data) -> None:
        direct = self.client.direct
        if direct.ready and len(data) <= UNASKED and not self.md5:
            extra = {HEADERS[name]: value for name, value in self.extra.items()}
            sha256 = {f"x-amz-meta-{SHA256}": self.sha256}
            direct.put(self.key, data, {**sha256, **self._check_headers(data), **extra})
            return
        with direct.learning(self.key):
            self.client.s3.put_object(
                Bucket=self.client.bucket, Key=self.key, Body=bytes(data),
                Metadata={SHA256: self.sha256}, **self._check(data), **self.extra,  # type: ignore[arg-type]
            )  # fmt: skip

    def _check(self, data: Data) -> dict[str, str]:
        """The checksum by which the server notices what was damaged on the way."""
        if self.md5:
            return {"ContentMD5": base64.b64encode(_md5(data).digest()).decode()}
        # Ceph checks it only where the algorithm is named, too.
        return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": _crc32(data)} if self.crc else {}

    def _check_headers(self, data: Data) -> dict[str, str]:
        """The same, as `Direct` wants it."""
        if not self.crc:
            return {}
        return {"x-amz-sdk-checksum-algorithm": "CRC32", "x-amz-checksum-crc32": _crc32(data)}

    # --- parts

    def _begin(self) -> list[int]:
        """The parts that are still to be sent; finds an upload that broke off, or begins one."""
        if self._id:  # they were begun ahead
            return self._missing()
        for upload_id in self._begun():
            parts = self._arrived(upload_id)
            if parts:
                self._id, self._parts, self._continued = upload_id, parts, True
                return self._missing()
            # Of another file; or empty, and then nothing tells of which file it is.
            self._abort(upload_id)
        self._create()
        return self._missing()

    def _missing(self) -> list[int]:
        """The parts that have not arrived; those that have count as done."""
        for number in self._parts:
            self.advance(self._range(number)[1])
        return [number for number in self._numbers() if number not in self._parts]

    def _numbers(self) -> range:
        return range(1, -(-self.size // part_size(self.size)) + 1)

    def _create(self) -> None:
        # Every part goes the quicker way then, also the first ones.
        with self.client.direct.learning(self.key):
            made = self._call(
                "create_multipart_upload",
                Metadata={SHA256: self.sha256},
                **({"ChecksumAlgorithm": "CRC32"} if self.crc else {}),
                **self.extra,
            )
        self._id = made["UploadId"]

    def _abort(self, upload_id: str) -> None:
        """Give back what the parts of another file take up."""

        def abort() -> None:
            try:
                self.client.s3.abort_multipart_upload(
                    Bucket=self.client.bucket, Key=self.key, UploadId=upload_id
                )
            except Exception as error:
                if code_of(error) != "NoSuchUpload":
                    raise

        self.retries.call(self.what, abort, self.client.judge(self.what))

    def _begun(self) -> list[str]:
        """Uploads of this key that are not finished. Without the right to list them: none."""
        try:
            found = self.retries.call(
                self.what,
                lambda: self.client.s3.list_multipart_uploads(
                    Bucket=self.client.bucket, Prefix=self.key
                ),
                self.client.judge(self.what),
            )
        except LorajobError:
            return []
        return [u["UploadId"] for u in found.get("Uploads", []) if u["Key"] == self.key]

    def _arrived(self, upload_id: str) -> dict[int, dict[str, Any]] | None:
        """The parts that are there, or None where one is of another file."""
        found: dict[int, dict[str, Any]] = {}
        marker = 0
        while True:
            page = self._call("list_parts", UploadId=upload_id, PartNumberMarker=marker)
            for part in page.get("Parts", []):
                number = part["PartNumber"]
                start, length = self._range(number)
                if length <= 0 or part["Size"] != length:
                    return None
                data = self._read(start, length)
                if part.get("ChecksumCRC32", _crc32(data)) != _crc32(data):
                    return None
                etag = part["ETag"].strip('"')
                if not self.extra.get("ServerSideEncryption") and etag != _md5(data).hexdigest():
                    return None
                found[number] = self._named(number, part["ETag"], data)
            if not page.get("IsTruncated"):
                return found
            marker = page["NextPartNumberMarker"]

    def _range(self, number: int) -> tuple[int, int]:
        """Where a part begins and how long it is, in bytes."""
        each = part_size(self.size)
        start = (number - 1) * each
        return start, min(each, self.size - start)

    def _named(self, number: int, etag: str, data: Data) -> dict[str, Any]:
        check = {"ChecksumCRC32": _crc32(data)} if self.crc else {}
        return {"PartNumber": number, "ETag": etag, **check}

    def _put_part(self, number: int) -> None:
        start, length = self._range(number)
        data = self._read(start, length)
        etag = self.retries.call(
            self.what, lambda: self._send_part(number, data), self.client.judge(self.what)
        )
        self.advance(length)
        with self._lock:
            self._parts[number] = self._named(number, etag, data)

    def _put_next(self, number: int) -> None:
        self._put_part(number)
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def _send_part(self, number: int, data: Data) -> str:
        """The part's ETag."""
        direct = self.client.direct
        if direct.ready and not self.md5:
            query = f"?partNumber={number}&uploadId={quote(self._id, safe='')}"
            etag: str = direct.put(self.key, data, self._check_headers(data), query)["ETag"]
            return etag
        with direct.learning(self.key):
            sent = self.client.s3.upload_part(
                Bucket=self.client.bucket, Key=self.key, UploadId=self._id, PartNumber=number,
                Body=bytes(data), **self._check(data),  # type: ignore[arg-type]
            )  # fmt: skip
        return sent["ETag"]

    def _finish(self) -> None:
        """Make the object visible. An answer that was lost is found out about, not tried again."""

        def complete() -> None:
            try:
                self.client.s3.complete_multipart_upload(
                    Bucket=self.client.bucket, Key=self.key, UploadId=self._id,
                    MultipartUpload={"Parts": [self._parts[n] for n in sorted(self._parts)]},  # type: ignore[misc]
                )  # fmt: skip
            except Exception as error:
                if code_of(error) != "NoSuchUpload" or not self._is_there():
                    raise

        self.retries.call(self.what, complete, self.client.judge(self.what))
        if self._continued and not self._is_there():
            self._send_again()

    def _send_again(self) -> None:
        """For an upload that was begun for another file, of which only parts equal to ours had come.

        S3 shows only now, by the sha256 that it was begun with. It hardly ever happens, so that it
        may take its time: one part after the other.
        """
        self._create()
        self._continued, self._parts, self.advance = False, {}, no_advance
        for number in self._numbers():
            self._put_part(number)
        self._finish()

    def _is_there(self) -> bool:
        try:
            said = self._call("head_object")
        except LorajobError:
            return False
        return bool(
            said["ContentLength"] == self.size and said["Metadata"].get(SHA256) == self.sha256
        )


# One for each thread: memory that is given back and taken again costs more than to fill it.
_buffers = threading.local()


def buffer_of(length: int) -> memoryview:
    """This thread's buffer, which the next call takes again."""
    buffer: bytearray | None = getattr(_buffers, "kept", None)
    if buffer is None or len(buffer) < length:
        buffer = _buffers.kept = bytearray(length)
    return memoryview(buffer)[:length]


def _crc32(data: Data) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _md5(data: Data) -> Any:
    return hashlib.md5(data, usedforsecurity=False)
