"""One object of S3 to a file: whole or not at all, in parts that a second try goes on with."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from jobs.errors import ServiceError
from jobs.store.base import Advance, Entry
from jobs.store.local import PARTIAL, disk_error
from jobs.store.pieces import Step
from jobs.store.retry import Again, Retries
from jobs.store.s3.client import Client
from jobs.store.s3.direct import UNASKED, hurry, read_into
from jobs.store.s3.upload import SHA256, part_size

BUFFER = 1 << 20


class Damaged(Exception):
    """What arrived is not what was sent."""


class Download:
    """Brings one object. `steps` may run on several threads; the last to end makes it visible.

    Beside the unfinished file stands a list of its parts that are there, each with its CRC-32, so
    that only what is known to be whole is gone on with.
    """

    def __init__(
        self,
        client: Client,
        retries: Retries,
        key: str,
        entry: Entry,
        target: Path,
        advance: Advance,
    ) -> None:
        self.client, self.retries, self.key, self.target = client, retries, key, target
        self.size, self.advance = entry.size, advance
        self.etag = entry.identity.removeprefix("etag:")
        self.what = f"fetching s3://{client.bucket}/{key}"
        self.partial = target.with_name(f"{PARTIAL}{target.name}")
        self.list = target.with_name(f"{PARTIAL}{target.name}.parts")
        self._lock = threading.Lock()
        self._sha256: str | None = None
        self._done: set[int] = set()  # parts that are on this disk
        self._left = 0
        self._hash = hashlib.sha256()
        self._hashed = 0  # parts, from the first on, that `_hash` has seen
        self._hashing = False
        self._file: IO[bytes] | None = None
        self._journal: IO[str] | None = None

    def steps(self) -> Iterator[Step]:
        try:
            if self.target.is_file() and self.target.stat().st_size == self.size:
                self.advance(self.size)
                return
            self.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.target) from None
        if self.size <= part_size(self.size):
            yield self._get_whole
            return
        numbers = self._begin()
        self._left = len(numbers)
        if not numbers:
            yield self._check_and_finish
        for number in numbers:
            yield partial(self._get_part, number)

    def _get_whole(self) -> None:
        def get() -> bytes:
            data, said = self._small()
            if len(data) != self.size or (said and hashlib.sha256(data).hexdigest() != said):
                raise Damaged
            return data

        data = self._tried(get)
        try:
            self.partial.write_bytes(data)
            self.partial.replace(self.target)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise disk_error(error, self.target) from None
        self.advance(self.size)

    def _small(self) -> tuple[bytes, str | None]:
        """All of the object, and what it says its content hashes to."""
        direct = self.client.direct
        if direct.ready and self.size <= UNASKED and not direct.unchecked:
            headers, data = direct.get(self.key, {"If-Match": f'"{self.etag}"'})
            said = headers.get(f"x-amz-meta-{SHA256}")
            if said:
                return data, said
            direct.unchecked = True  # boto3 checks what other programs have left to check by
        with direct.learning(self.key):
            found = self._get()
        hurry(found["Body"]._raw_stream)
        return bytes(found["Body"].read()), found["Metadata"].get(SHA256)

    def _get(self, **arguments: Any) -> Any:
        """The object, if it still is the one that was listed."""
        found = self.client.s3.get_object(
            Bucket=self.client.bucket, Key=self.key, IfMatch=f'"{self.etag}"', **arguments
        )
        self._sha256 = found["Metadata"].get(SHA256)
        return found

    def _tried(self, do: Any) -> Any:
        known = self.client.judge(self.what)

        def judge(error: BaseException) -> Any:
            return Again("what arrived was damaged") if isinstance(error, Damaged) else known(error)

        return self.retries.call(self.what, do, judge)

    # --- parts

    def _begin(self) -> list[int]:
        """The parts that are still to be fetched; opens the unfinished file."""
        each = part_size(self.size)
        numbers = range(-(-self.size // each))
        try:
            there = self._there()
            if not there:
                self.partial.unlink(missing_ok=True)
                self.list.unlink(missing_ok=True)
            self._file = self.partial.open("r+b" if there else "w+b")
            os.truncate(self._file.fileno(), self.size)
            self._journal = self.list.open("a", encoding="utf-8", buffering=1)
            if not there:
                self._journal.write(json.dumps(self._about()) + "\n")
        except OSError as error:
            raise disk_error(error, self.target) from None
        self._done = there
        for number in sorted(there):
            self.advance(self._range(number)[1])
        return [number for number in numbers if number not in there]

    def _about(self) -> dict[str, Any]:
        return {"etag": self.etag, "size": self.size, "part": part_size(self.size)}

    def _there(self) -> set[int]:
        """The parts that an earlier try has fetched of this very object, by their checksums."""
        try:
            lines = self.list.read_text("utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self._about():
                return set()
            found = set()
            with self.partial.open("rb") as file:
                for line in lines[1:]:
                    number, crc = map(int, line.split())
                    start, length = self._range(number)
                    file.seek(start)
                    if zlib.crc32(file.read(length)) == crc:
                        found.add(number)
            return found
        except (OSError, ValueError):
            return set()

    def _range(self, number: int) -> tuple[int, int]:
        each = part_size(self.size)
        return number * each, min(each, self.size - number * each)

    def _get_part(self, number: int) -> None:
        start, length = self._range(number)
        assert self._file is not None
        assert self._journal is not None
        descriptor = self._file.fileno()

        def get() -> int:
            body = self._get(Range=f"bytes={start}-{start + length - 1}")["Body"]
            at, crc = start, 0
            buffer = memoryview(bytearray(BUFFER))
            for chunk in read_into(body, buffer):
                if at + len(chunk) > start + length:
                    raise Damaged
                self._write(descriptor, chunk, at)
                at, crc = at + len(chunk), zlib.crc32(chunk, crc)
            if at != start + length:
                raise Damaged
            return crc

        crc = self._tried(get)
        with self._lock:
            self._journal.write(f"{number} {crc}\n")
            self._done.add(number)
        self._hash_on()
        with self._lock:
            self._left -= 1
            last = not self._left
        self.advance(length)
        if last:
            self._finish()

    def _hash_on(self) -> None:
        """Hash what is there without a gap, while other threads fetch: then little is left for the end.

        It is read from the disk's cache, as what is to be hashed is what was written. One thread at a
        time; another that comes meanwhile has its part seen to by the one that is at it.
        """
        assert self._file is not None
        with self._lock:
            if self._hashing or self._sha256 is None:
                return
            self._hashing = True
        buffer = memoryview(bytearray(BUFFER))
        try:
            while True:
                with self._lock:
                    if self._hashed not in self._done:
                        self._hashing = False
                        return
                at, left = self._range(self._hashed)
                while left:
                    count = os.preadv(self._file.fileno(), [buffer[:left]], at)
                    if not count:
                        raise OSError(errno.EIO, "the file became shorter")
                    self._hash.update(buffer[:count])
                    at, left = at + count, left - count
                self._hashed += 1
        except OSError as error:
            raise disk_error(error, self.target) from None

    def _write(self, descriptor: int, chunk: memoryview, at: int) -> None:
        try:
            while chunk:
                count = os.pwrite(descriptor, chunk, at)
                chunk, at = chunk[count:], at + count
        except OSError as error:
            raise disk_error(error, self.target) from None

    def _check_and_finish(self) -> None:
        """For who found all parts here: no answer has said yet what their content hashes to."""
        self._tried(self._ask)
        self._finish()

    def _ask(self) -> None:
        said = self.client.s3.head_object(
            Bucket=self.client.bucket, Key=self.key, IfMatch=f'"{self.etag}"'
        )
        self._sha256 = said["Metadata"].get(SHA256)

    def _finish(self) -> None:
        assert self._file is not None
        assert self._journal is not None
        self._hash_on()
        self._file.close()
        self._journal.close()
        if self._sha256 and self._hash.hexdigest() != self._sha256:
            self.partial.unlink()
            self.list.unlink()
            raise ServiceError(
                f"{self.what}: what arrived is not what was sent", "start the same run again"
            )
        self.partial.replace(self.target)
        self.list.unlink()
