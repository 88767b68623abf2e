"""A prefix of an S3 bucket as a store."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from jobs.errors import AccessError
from jobs.spec import S3, S3Options
from jobs.store.base import Advance, Entry, no_advance
from jobs.store.hashing import FileEntry, sha256_of
from jobs.store.pieces import Pace, Step, run_steps
from jobs.store.places import S3Place
from jobs.store.retry import Retries
from jobs.store.s3.client import THREADS, Client, code_of
from jobs.store.s3.download import Download
from jobs.store.s3.upload import SHA256, Upload, part_size

THREADS_AHEAD = 4  # parts at a time, while the processors make the next files


class S3Store:
    def __init__(self, place: S3Place, settings: S3, retries: Retries) -> None:
        self.url = f"s3://{place.bucket}/{place.key}".rstrip("/")
        self.bucket = place.bucket
        self.prefix = f"{place.key}/" if place.key else ""
        self.options = settings.buckets.get(place.bucket) or S3Options.model_validate(
            settings.model_dump(exclude={"buckets"})
        )
        self.retries = retries
        self.client = Client(place.bucket, self.options)
        self._ahead: dict[str, Upload] = {}  # by key

    # --- reading

    def prove_readable(self) -> None:
        if next(self._listed(self.prefix, most=1), None) is None:
            raise AccessError(f"there is nothing at {self.url}", "check the address")

    def entry(self, key: str) -> Entry | None:
        """One file, or None where it is not there."""
        listed = self._listed(self.prefix + key, most=1)
        found = next((entry for entry in listed if entry.key == self.prefix + key), None)
        return found and Entry(key, found.size, found.identity)

    def entries(self) -> list[Entry]:
        return sorted(
            (
                Entry(entry.key.removeprefix(self.prefix), entry.size, entry.identity)
                for entry in self._listed(self.prefix)
                if not entry.key.endswith("/")  # what consoles make to show an empty folder
            ),
            key=lambda entry: entry.key,
        )

    def fetch(self, entries: Sequence[Entry], folder: Path, advance: Advance) -> None:
        ordered = sorted(entries, key=lambda entry: -entry.size)
        in_parts = [entry for entry in ordered if entry.size > part_size(entry.size)]
        begun: list[Download] = []
        pace = Pace()

        def counted(count: int) -> None:
            pace.add(count)
            advance(count)

        def steps(entries: Sequence[Entry], tell: Advance) -> Iterator[Step]:
            for entry in entries:
                key, target = self.prefix + entry.key, folder / entry.key
                download = Download(self.client, self.retries, key, entry, target, tell)
                begun.append(download)
                yield from download.steps()

        try:
            run_steps(steps(in_parts, counted), THREADS, pace)
        except Exception:
            # Not for a stop, which leaves threads behind: they would write to what has been closed,
            # or to another file that has its descriptor by then.
            for download in begun:
                download.close()
            raise
        begun.clear()
        run_steps(steps(ordered[len(in_parts) :], advance), THREADS)

    def held(self, files: Sequence[FileEntry]) -> set[str]:
        there = {entry.key: entry.size for entry in self.entries()}
        found: set[str] = set()

        def look(file: FileEntry) -> None:
            if self.sha256(file["path"]) == file["sha256"]:
                found.add(file["path"])

        likely = (f for f in files if there.get(f["path"]) == f["size"])
        run_steps((partial(look, file) for file in likely), THREADS)
        return found

    def sha256(self, key: str) -> str | None:
        """What the object says its content hashes to, where it was written by lorajob."""
        try:
            said = self._call(f"{self.url}/{key}", "head_object", Key=self.prefix + key)
        except AccessError:
            return None
        found: str | None = said["Metadata"].get(SHA256)
        return found

    def read_json(self, key: str) -> Any:
        def read() -> bytes | None:
            try:
                found = self.client.s3.get_object(Bucket=self.bucket, Key=self.prefix + key)
            except Exception as error:
                if code_of(error) in ("NoSuchKey", "404"):
                    return None
                raise
            return found["Body"].read()

        what = f"{self.url}/{key}"
        text = self.retries.call(what, read, self.client.judge(what))
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return None

    def _listed(self, prefix: str, most: int = 1000) -> Iterator[Entry]:
        """What is below a prefix, with whole keys."""
        token: dict[str, str] = {}
        while True:
            page = self._call(self.url, "list_objects_v2", Prefix=prefix, MaxKeys=most, **token)
            for found in page.get("Contents", []):
                yield Entry(found["Key"], found["Size"], f"etag:{found['ETag'].strip(chr(34))}")
            if not page.get("IsTruncated") or most < 1000:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    # --- writing

    def prove_writable(self, keep: bool) -> None:
        # Nothing has to be created: lorajob makes no buckets.
        probe = f".lorajob-probe-{uuid.uuid4().hex}"
        what = f"{self.url} cannot be written"
        self._call(what, "put_object", Key=self.prefix + probe, Body=b"lorajob", **self.extra())
        self._call(what, "delete_object", Key=self.prefix + probe)

    def replace(
        self, folder: Path, files: Sequence[FileEntry], stale: set[str], last: str, advance: Advance
    ) -> None:
        self.delete({last})
        self.delete(stale)
        self.put(folder, files, advance)
        path = folder / last
        self.put(folder, [{"path": last, "size": path.stat().st_size, "sha256": sha256_of(path)}], advance)  # fmt: skip

    def put(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        advance: Advance,
        prefix: str = "",
        threads: int = THREADS,
    ) -> None:
        """Send files from below `folder`, several and several parts of each at a time."""

        def steps() -> Iterator[Step]:
            for file in sorted(files, key=lambda file: -file["size"]):
                key = self.prefix + prefix + file["path"]
                ahead = self._ahead.pop(key, None)
                if ahead and ahead.sha256 == file["sha256"]:
                    upload, upload.advance = ahead, advance
                else:
                    upload = self._upload(key, folder, file, advance)
                yield from upload.steps()

        run_steps(steps(), threads)

    def send_ahead(self, folder: Path, files: Sequence[FileEntry], stopped: Event) -> None:
        """As uploads in parts that are not completed: S3 shows nothing of them."""
        there = self.held(files)

        def unless_stopped(step: Step) -> None:
            if not stopped.is_set():
                step()

        def steps() -> Iterator[Step]:
            for file in files:
                if file["path"] in there:
                    continue
                key = self.prefix + file["path"]
                self._ahead[key] = upload = self._upload(key, folder, file, no_advance)
                for step in upload.steps_ahead():
                    if stopped.is_set():
                        return
                    yield partial(unless_stopped, step)

        run_steps(steps(), THREADS_AHEAD)

    def forget_ahead(self) -> None:
        while self._ahead:
            self._ahead.popitem()[1].forget()

    def _upload(self, key: str, folder: Path, file: FileEntry, advance: Advance) -> Upload:
        path = folder / file["path"]
        return Upload(self.client, self.retries, key, path, file, self.extra(), advance)

    def delete(self, keys: set[str]) -> None:
        """Remove keys; one that is not there is no error."""
        for key in sorted(keys):
            self._call(f"{self.url}/{key}", "delete_object", Key=self.prefix + key)

    def extra(self) -> dict[str, str]:
        """What the spec wants of everything that is written."""
        options = self.options
        wanted = {
            "ServerSideEncryption": options.encryption,
            "SSEKMSKeyId": options.kms_key,
            "StorageClass": options.storage_class,
        }
        return {name: value for name, value in wanted.items() if value}

    def _call(self, what: str, method: str, **arguments: Any) -> Any:
        return self.retries.call(
            what,
            lambda: getattr(self.client.s3, method)(Bucket=self.bucket, **arguments),
            self.client.judge(what),
        )
