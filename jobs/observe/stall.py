"""A run that gets nowhere ends: no progress for longer than a limit, and it is over.

A GPU that waits for a lock costs what one that trains does, and nobody watches a batch job. The
stacks of all threads are kept first: without them nobody could tell what it waited for.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from jobs.errors import ServiceError
from jobs.secrets import redact

PROC = Path("/proc")
LAST_WORDS = 2.0  # seconds for each thing that is told at the end: it may hang on what all hangs on


class Stalled(ServiceError):
    """No progress for longer than the limit. It is told, never raised: nobody could catch it."""

    title = "no progress"


class StallWatch:
    """Ends the process with code 10 when no `beat` came for `limit` seconds.

    `log` gets the stacks, and may be set anew at any time; `tell` gets a Stalled, from a thread of
    its own, to write the termination message from.

    Only time in which the process ran is counted. One that was stopped, or frozen with its
    container, has as much time left as before. What cannot be seen is native code that hangs
    without letting go of the interpreter's lock: no thread of Python runs then, nor does this one.
    """

    def __init__(self, limit: float, log: Path, tell: Callable[[Stalled], None]) -> None:
        if not limit > 0:
            raise ValueError(f"a limit of {limit} seconds")
        self.limit, self.log, self._tell = limit, log, tell
        self._every = min(0.2, limit / 20)
        self._longest = min(1.0, limit / 4)  # that one round may count for
        self._note = ""
        self._beaten = False
        self._paused = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._beaten = True
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def beat(self, note: str = "") -> None:
        """Something was done. `note` says what goes on now; without one, the last holds."""
        # Two assignments, each whole by itself: no lock, so it may stand in the innermost loop.
        if note:
            self._note = note
        self._beaten = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is counted; after it the limit begins anew."""
        with self._lock:
            self._paused += 1
        try:
            yield
        finally:
            self._beaten = True
            with self._lock:
                self._paused -= 1

    def _watch(self) -> None:
        """Count the time between rounds until a beat. A round that comes late was not let run, so
        others may not have been either: it counts for little, and two in time must agree."""
        counted, agreed = 0.0, 0
        last = time.monotonic()
        while not self._stop.wait(self._every):
            now = time.monotonic()
            passed, last = now - last, now
            if self._beaten or self._paused:
                self._beaten = False
                counted, agreed = 0.0, 0
                continue
            counted += min(passed, self._longest)
            in_time = passed <= self._longest
            agreed = agreed + 1 if in_time and counted >= self.limit else 0
            if agreed == 2:
                self._end()

    def _end(self) -> None:
        doing = f" (the last it said: {self._note})" if self._note else ""
        error = Stalled(
            f"no progress for {self.limit:g} seconds{doing}",
            f"{self.log} has the stacks of all threads, which say what it waited for; start it "
            "again to go on from what is safe, and raise the limit if this takes so long",
        )
        # Each in a thread that may be left behind: it may need a lock that is never let go, a pipe
        # that nobody reads, a disk that is gone. Standard error last, for it is the likeliest.
        for say in (self._dump, lambda: self._tell(error), lambda: _complain(error)):
            with suppress(Exception):  # no thread can be started
                speaker = threading.Thread(target=_quietly, args=(say,), daemon=True)
                speaker.start()
                speaker.join(LAST_WORDS)
        kill_children()
        os._exit(Stalled.exit_code)

    def _dump(self) -> None:
        """The stacks of all threads, to the log; where it cannot be written, to standard error."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            file = 2
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        about = f"{when} no progress for {self.limit:g} seconds; last: {self._note or '(nothing)'}"
        os.write(file, redact(about).encode("utf-8", "replace") + b"\n")
        faulthandler.dump_traceback(file, all_threads=True)
        names = [f"0x{t.ident or 0:016x} {t.name}\n" for t in threading.enumerate()]
        os.write(file, "".join(["threads:\n", *names, "\n"]).encode("utf-8", "replace"))


def _complain(error: Stalled) -> None:
    # Not through sys.stderr: a thread that hangs while it prints holds its lock.
    text = redact(f"lorajob: {error.title}\n{error}\n")
    os.write(2, text.encode("utf-8", "replace"))


def _quietly(say: Callable[[], None]) -> None:
    with suppress(Exception):  # the next has to be said all the same
        say()


def kill_children() -> None:
    """Kill every process that this one started, and those that they did; others of its group stay.

    They are stopped before: one that runs could start another while they are being found.
    """
    stopped: set[int] = set()
    for _ in range(10):
        found = _descendants(os.getpid()) - stopped
        if not found:
            break
        _signal(found, signal.SIGSTOP)
        stopped |= found
    _signal(stopped, signal.SIGKILL)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(OSError):  # gone by itself, or become another user's
            os.kill(pid, number)


def _descendants(pid: int) -> set[int]:
    """From /proc; where there is none, nothing is found."""
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for folder in PROC.iterdir():
            if folder.name.isdecimal():
                with suppress(OSError, ValueError, IndexError):
                    # PID (NAME) STATE PARENT ...; the name may hold anything, brackets too.
                    fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                    children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        new = set(children.get(ahead.pop(), ())) - found
        found |= new
        ahead += new
    return found - {pid}
