"""One object of S3 to a file: whole or not at all, in parts that a second try goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from jobs.errors import ServiceError
from jobs.store.base import Advance, Entry
from jobs.store.local import PARTIAL, disk_error, reserve
from jobs.store.pieces import Step
from jobs.store.retry import Again, Retries
from jobs.store.s3.client import Client
from jobs.store.s3.direct import UNASKED, end_reading, hurry, read_into
from jobs.store.s3.in_order import PIECE, InOrder, hashed_so_far
from jobs.store.s3.upload import SHA256, part_size

# Parts that one request asks for. Each request costs the server a search for what it is about; but
# with many streams, what lies ahead of the hash is lost where the process ends.
PARTS_A_REQUEST = 8


class Damaged(Exception):
    """What arrived is not what was sent."""


class Download:
    """Brings one object. `steps` may run on several threads; the last to end makes it visible.

    It is hashed while it arrives. Beside the unfinished file stands a list of how far that came, with
    the sha256 of all before it, so that only what is known to be whole is gone on with.
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
        self._left = 0  # requests
        self._hash: InOrder | None = None
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
        at = self._begin()
        each = PARTS_A_REQUEST * part_size(self.size)
        starts = range(at, self.size, each)
        self._left = len(starts)
        if not starts:
            yield self._check_and_finish
        for start in starts:
            yield partial(self._get_parts, start, min(start + each, self.size))

    def close(self) -> None:
        """For one that did not end: what is there stays, to be gone on with."""
        hash, self._hash = self._hash, None  # with its buffers
        if hash:
            hash.close()
        for file in (self._file, self._journal):
            if file:
                with contextlib.suppress(OSError):  # a full disk, which has been told of
                    file.close()

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
            if isinstance(error, Damaged):
                return Again(str(error) or "what arrived was damaged")
            return known(error)

        return self.retries.call(self.what, do, judge)

    # --- parts

    def _begin(self) -> int:
        """Open the unfinished file; returns how far it is whole."""
        try:
            lines = self._list()
            self._file = self.partial.open("r+b" if lines else "w+b")
            descriptor = self._file.fileno()
            at, hash = hashed_so_far(descriptor, lines)
            reserve(descriptor, self.size)
            self._journal = self.list.open("w", encoding="utf-8", buffering=1)
            self._journal.write(json.dumps(self._about()) + "\n")
            for place, said in lines:
                if place <= at:
                    self._journal.write(f"{place} {said}\n")
        except OSError as error:
            raise disk_error(error, self.target) from None
        self._hash = InOrder(descriptor, self.size, at, hash, part_size(self.size), self._reached)
        self.advance(at)
        return at

    def _about(self) -> dict[str, Any]:
        return {"etag": self.etag, "size": self.size, "part": part_size(self.size)}

    def _list(self) -> list[tuple[int, str]]:
        """What an earlier try has noted of this very object."""
        found: list[tuple[int, str]] = []
        if not self.partial.exists():
            return found
        try:
            lines = self.list.read_text("utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self._about():
                return found
            for line in lines[1:]:
                place, said = line.split()
                found.append((int(place), said))
        except (OSError, ValueError):  # the last line may be half of one
            pass
        return found

    def _reached(self, place: int, said: str) -> None:
        assert self._journal is not None
        self._journal.write(f"{place} {said}\n")

    def _get_parts(self, start: int, end: int) -> None:
        """Some parts that follow each other, with one request; another goes on where one broke off."""
        assert self._file is not None
        assert self._hash is not None
        descriptor, hash = self._file.fileno(), self._hash
        at, buffer = start, memoryview(bytearray(PIECE))

        def get() -> None:
            nonlocal at, buffer
            body = self._get(Range=f"bytes={at}-{end - 1}")["Body"]
            try:
                while count := read_into(body, buffer):
                    if at + count > end:
                        raise Damaged
                    self._write(descriptor, buffer[:count], at)
                    buffer, at = hash.wrote(at, count, buffer), at + count
                    self.advance(count)
            finally:
                end_reading(body)
            if at != end:
                raise Damaged("the answer broke off")

        self._tried(get)
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

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
        assert self._hash is not None
        try:
            digest = self._hash.digest()
        except OSError as error:
            raise disk_error(error, self.target) from None
        self.close()
        if self._sha256 and digest != self._sha256:
            self.partial.unlink()
            self.list.unlink()
            raise ServiceError(
                f"{self.what}: what arrived is not what was sent", "start the same run again"
            )
        self.partial.replace(self.target)
        self.list.unlink()
