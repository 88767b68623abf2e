"""Checkpoints: written whole, kept here and in the store, found again on another machine.

A checkpoint is a folder of files and, written after all of them, `complete.json`: what they hash to
and what the training is made from. One without it, or whose files are others, is passed over.
Nothing here knows what the files are; without torch.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import LorajobError, SpecError, bullet_list
from jobs.store.base import Entry, KeyStore, no_advance
from jobs.store.hashing import FileEntry, file_entries, sha256_of
from jobs.store.local import disk_error

MARKER = "complete.json"
PREFIX = "checkpoint-"  # the name of a folder is transformers', with the step behind it

# What two hashes mean to a person.
OTHER = {
    "base": "other weights, configuration or tokenizer",
    "data": "other conversations, chat template or settings of data",
}


@dataclass
class Checkpoints:
    """The checkpoints of one training, below `folder`, and below `checkpoints/` in `remote`.

    `inputs` is what the training is made from: only a checkpoint of the same is gone on with. An
    older lorajob's lacks the fields that it did not know: they had the `defaults`. Those of another
    training are left behind where that one had come to its end, else as `if_changed` says.
    `guard` raises where this process may not write to the store any more.
    """

    folder: Path
    inputs: dict[str, Any]
    remote: KeyStore | None = None
    keep: int = 2
    if_changed: str = "fail"
    tell: Callable[[str], None] = lambda text: None
    guard: Callable[[], None] = lambda: None
    defaults: dict[str, Any] = field(default_factory=dict)
    safe: str | None = None
    """What would be gone on with after this process: for people."""
    sent_bytes: int = 0
    _due: threading.Condition = field(default_factory=threading.Condition)
    _waiting: Path | None = None
    _sending: Path | None = None
    _thread: threading.Thread | None = None

    # --- finding

    def _made_from(self, marker: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint's training was made from, as this lorajob would say it."""
        return filled(marker.get("inputs", {}), self.defaults)

    def newest(self) -> Path | None:
        """The newest whole checkpoint of this training, here; fetched where it is elsewhere.

        Raises SpecError where there are only those of another training that has not come to its
        end, saying what has changed.
        """
        self.safe = None
        found: list[tuple[int, Path, str | None]]
        found = [(step, folder, None) for step, folder in self._here()]
        if self.remote:
            there = _names(self.remote.entries())
            found += [(step, self.folder / name, name) for step, name in there]
        others: list[dict[str, Any]] = []
        # Of the same step the one that is here first.
        for _, folder, name in sorted(found, key=lambda f: (-f[0], f[2] is not None)):
            marker = self._fetched(name, folder) if name else _marker(folder)
            if marker is None:
                continue
            if self._made_from(marker) == self.inputs:
                if self.remote and not any(each == folder.name for _, _, each in found):
                    self._send_soon(folder)  # the start that made it ended before it was sent
                else:
                    where = self.remote.url if self.remote else self.folder
                    self.safe = f"checkpoint of step {marker['step']} in {where}"
                return folder
            others.append(marker)
        if others:
            self._leave_behind(others)
        return None

    def _leave_behind(self, others: list[dict[str, Any]]) -> None:
        """Remove the checkpoints of another training, or raise SpecError where it may be wanted."""
        # Only the last checkpoint of a training says that it has come to its end.
        ended = [self._made_from(marker) for marker in others if marker.get("finished") is True]
        unfinished = [marker for marker in others if self._made_from(marker) not in ended]
        other = (unfinished or others)[0]
        changes = f"what has changed (there, now):\n{bullet_list(self._changes(other))}"
        if unfinished and self.if_changed == "fail":
            raise SpecError(
                f"the checkpoint of step {other.get('step')} is of another training; {changes}",
                "undo the change, give the run another name, or set checkpoints.if_changed to restart "
                "to leave the checkpoints behind",
            )
        if not unfinished:
            self.tell(
                f"training begins anew, and its checkpoints replace those of the training that had "
                f"come to its end at step {other.get('step')}; {changes}"
            )
        self.clear()

    def _changes(self, other: dict[str, Any]) -> list[str]:
        before, now = self._made_from(other), self.inputs
        return [
            f"{name}: {OTHER[name]}" if name in OTHER and name in before and name in now else line
            for line in differences(before, now)
            for name in [line.partition(":")[0]]
        ]

    def _here(self) -> list[tuple[int, Path]]:
        return [
            (step, path) for path in self.folder.glob(f"{PREFIX}*") if (step := _step(path.name))
        ]

    def _fetched(self, name: str, folder: Path) -> dict[str, Any] | None:
        """Bring a checkpoint here; its marker, or None where it is not whole."""
        assert self.remote
        marker = self.remote.read_json(f"checkpoints/{name}/{MARKER}")
        if not isinstance(marker, dict) or not isinstance(marker.get("files"), list):
            return None
        if self._made_from(marker) != self.inputs:
            return marker
        prefix = f"checkpoints/{name}/"
        wanted = {f"{prefix}{file['path']}" for file in marker["files"]}
        entries = [entry for entry in self.remote.entries() if entry.key in wanted]
        if len(entries) != len(wanted):
            return None
        fetched = self.folder / ".fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        self.remote.fetch(entries, fetched, no_advance)
        shutil.rmtree(folder, ignore_errors=True)
        (fetched / "checkpoints" / name).replace(folder)
        shutil.rmtree(fetched, ignore_errors=True)
        (folder / MARKER).write_text(json.dumps(marker), "utf-8")
        return _marker(folder)

    # --- keeping

    def commit(self, folder: Path, step: int, finished: bool = False) -> None:
        """Declare a folder a whole checkpoint, and send it in the background.

        `finished` says that the training takes no step after this one.
        Older ones are removed beyond `keep`. Where one is still being sent, this one is next, and
        those between are not sent at all.
        """
        files = file_entries(folder)
        marker = {"step": step, "finished": finished, "inputs": self.inputs, "files": files}
        partial = folder / f".partial-{MARKER}"
        try:
            partial.write_text(json.dumps(marker), "utf-8")
            partial.replace(folder / MARKER)
        except OSError as error:
            raise disk_error(error, folder) from None
        if self.remote:
            self._send_soon(folder)
        else:
            self.safe = f"checkpoint of step {step} in {self.folder}"
        self._prune_here()

    def _send_soon(self, folder: Path) -> None:
        with self._due:
            self._waiting = folder
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._send_all, name="checkpoints", daemon=True
                )
                self._thread.start()
            self._due.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether everything committed is in the store within so many seconds."""
        until = time.monotonic() + seconds
        with self._due:
            while self.remote and (self._waiting or self._sending):
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._due.wait(left)
        return True

    def clear(self) -> None:
        """Remove all of them, here and in the store: the run is done, or begins anew."""
        with self._due:
            self._waiting = None
            while self._sending:  # or it would be there again afterwards
                self._due.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.remote:
            ours = {e.key for e in self.remote.entries() if e.key.startswith("checkpoints/")}
            markers = {key for key in ours if key.endswith(f"/{MARKER}")}
            self.guard()
            self.remote.delete(markers)  # first, so that none is seen without its files
            self.remote.delete(ours - markers)

    def _send_all(self) -> None:
        while True:
            with self._due:
                while self._waiting is None:
                    self._due.wait()
                folder = self._sending = self._waiting
                self._waiting = None
            try:
                self._send(folder)
            except Exception as error:
                # The next one is tried again, and until then an older one is there.
                why = error.message if isinstance(error, LorajobError) else repr(error)
                self.tell(f"{folder.name} could not be kept in the store: {why}")
            finally:
                with self._due:
                    self._sending = None
                    self._due.notify_all()

    def _send(self, folder: Path) -> None:
        assert self.remote
        marker = _marker(folder, check=False)
        if marker is None:
            return
        files: list[FileEntry] = marker["files"]
        path = folder / MARKER
        last: FileEntry = {"path": MARKER, "size": path.stat().st_size, "sha256": sha256_of(path)}
        prefix = f"checkpoints/{folder.name}/"

        def sent(count: int) -> None:
            self.sent_bytes += count

        self.guard()
        self.remote.put(folder, files, sent, prefix=prefix, threads=2)
        self.guard()
        self.remote.put(folder, [last], sent, prefix=prefix, threads=1)
        self.safe = f"checkpoint of step {marker['step']} in {self.remote.url}"
        self._prune_there(self.remote)

    def _prune_here(self) -> None:
        whole = sorted((s, f) for s, f in self._here() if (f / MARKER).is_file())
        with self._due:
            # In a store that is slower than training none would ever get there, were the one that
            # is being sent removed for newer ones.
            kept = {folder for _, folder in whole[-self.keep :]} | {self._waiting, self._sending}
        for _, folder in whole:
            if folder not in kept:
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _prune_there(self, remote: KeyStore) -> None:
        entries = remote.entries()
        kept = {name for _, name in sorted(_names(entries))[-self.keep :]}
        old = {
            entry.key
            for entry in entries
            if entry.key.startswith(f"checkpoints/{PREFIX}") and entry.key.split("/")[1] not in kept
        }
        remote.delete({key for key in old if key.endswith(f"/{MARKER}")})
        remote.delete({key for key in old if not key.endswith(f"/{MARKER}")})


def kept_before(folder: Path, remote: KeyStore | None) -> str | None:
    """What an earlier start has left, for people: known before anything is read or fetched."""
    kept = Checkpoints(folder, {}, remote)
    if remote:
        steps, where = [step for step, _ in _names(remote.entries())], remote.url
    else:
        steps, where = [s for s, path in kept._here() if (path / MARKER).is_file()], str(folder)
    return f"checkpoint of step {max(steps)} in {where}" if steps else None


def _names(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    """The complete checkpoints among a store's files: their steps and the names of their folders."""
    names = {
        parts[1]
        for entry in entries
        if (parts := entry.key.split("/"))[0] == "checkpoints" and parts[-1] == MARKER
    }
    return [(step, name) for name in names if (step := _step(name))]


def _step(name: str) -> int:
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else 0


def _marker(folder: Path, check: bool = True) -> dict[str, Any] | None:
    """What a checkpoint says of itself, or None where it is not whole."""
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        files = marker["files"]
        whole = not check or all(
            (folder / f["path"]).stat().st_size == f["size"]
            and sha256_of(folder / f["path"]) == f["sha256"]
            for f in files
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if whole and isinstance(marker, dict) else None


def filled(inputs: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with a default wherever a field is missing."""
    missing = {name: value for name, value in defaults.items() if name not in inputs}
    deeper = {
        name: filled(value, defaults[name])
        for name, value in inputs.items()
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
    }
    return {**inputs, **deeper, **missing}


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """One line for each value that differs: "train.learning_rate: 0.0002, 0.0001"."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*there, *now})
            for line in differences(there.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if there == now:
        return []
    return [f"{name}: {json.dumps(there)}, {json.dumps(now)}"]
