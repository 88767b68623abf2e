"""Stages: named steps whose output is kept, and taken again when their inputs are the same.

A stage's record says: these inputs gave these files and this result. It is written after the
files are complete, so what is half-written is never taken for whole: a stage without a record, or
whose files are not as the record says, is done again from its beginning.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import stop
from jobs.errors import AccessError, LorajobError
from jobs.observe.events import Observer
from jobs.store.hashing import FileEntry, file_entries, key_of, sha256_of
from jobs.store.local import FULL, disk_error

RECORDS = ".work/stages"


@dataclass(frozen=True)
class Done:
    """A finished stage: what it made, what it found out, how long it took."""

    key: str
    files: list[FileEntry]  # paths relative to the run's folder
    result: dict[str, Any]
    seconds: float
    skipped: bool

    @property
    def content_key(self) -> str:
        """Identifies the output itself, for the stages that build on it."""
        return key_of([[entry["path"], entry["sha256"]] for entry in self.files])


@dataclass(frozen=True)
class Stages:
    folder: Path
    observer: Observer
    done: list[str] = field(default_factory=list)  # names of those whose output is there

    def run(
        self,
        name: str,
        inputs: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        output: str | None = None,
        note: Callable[[dict[str, Any]], str] = lambda result: "",
    ) -> Done:
        """Do a stage, or take what it left when it was done before with the same inputs.

        `work` gets an empty folder to write to, which becomes `output` below the run's folder
        when it is complete, and returns what the record keeps (as JSON).
        """
        stop.check()
        key = key_of({"stage": name, **inputs})
        record = self.folder / RECORDS / f"{name}.json"
        before = self._before(record, key)
        if before:
            self.observer.event("stage_skipped", stage=name, note=note(before.result))
            self.done.append(name)
            return before
        self.observer.event("stage_start", stage=name)
        start = time.monotonic()
        building = self.folder / f".building-{name}"
        try:
            record.unlink(missing_ok=True)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            result = json.loads(json.dumps(work(building)))  # the record's form, also this time
            files: list[FileEntry] = []
            if output:
                final = self.folder / output
                shutil.rmtree(final, ignore_errors=True)
                final.parent.mkdir(parents=True, exist_ok=True)
                building.replace(final)
                files = file_entries(final, within=self.folder)
            seconds = round(time.monotonic() - start, 2)
            done = Done(key, files, result, seconds, skipped=False)
            write_whole(record, {"key": key, "files": files, "result": result, "seconds": seconds})
        except Exception as error:
            told = _told(error, building)
            if (
                told is None
                and not building.exists()
                and not (self.folder / (output or "")).exists()
            ):
                told = AccessError(
                    f"{self.folder} was removed while the run used it", "start the run again"
                )
            self.observer.event("stage_failed", stage=name, error=str(told or error))
            if told is None or told is error:
                raise
            raise told from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        self.done.append(name)
        self.observer.event("stage_done", stage=name, seconds=seconds, note=note(result))
        return done

    def _before(self, record: Path, key: str) -> Done | None:
        try:
            kept = json.loads(record.read_text("utf-8"))
            done = Done(kept["key"], kept["files"], kept["result"], kept["seconds"], skipped=True)
            same = done.key == key and all(self._is_as(entry) for entry in done.files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return done if same else None

    def _is_as(self, entry: FileEntry) -> bool:
        path = self.folder / entry["path"]
        if not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return sha256_of(path) == entry["sha256"]


def _told(error: Exception, building: Path) -> LorajobError | None:
    """What a failure means to a person, or None where it is a bug."""
    if isinstance(error, LorajobError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return disk_error(error, Path(str(error.filename or building)))
    if os.strerror(errno.ENOSPC) in str(error):  # safetensors' own error is no OSError
        return disk_error(OSError(errno.ENOSPC, ""), building)
    return None


def write_whole(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one.

    Raises DoesNotFitError where the disk is full, AccessError where it cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise disk_error(error, path) from None
