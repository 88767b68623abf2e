"""The watch over progress: it ends what hangs, and nothing else. In real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.observe.stall import StallWatch
from tests.conftest import ROOT

LIMIT = 1.0

BEGIN = """
import os, subprocess, sys, threading, time
from pathlib import Path
from jobs.observe.stall import StallWatch
from jobs.observe.termination import outcome_of, write_termination

folder, limit = Path(sys.argv[1]), float(sys.argv[2])
log = folder / "logs" / "stacks.txt"

def tell(error):
    write_termination(outcome_of(error, stage="train", log=watch.log))

def ready(text=""):
    print("ready", text, flush=True)

watch = StallWatch(limit, log, tell)
"""


class Child:
    """A process that runs some lines under a watch, in a process group of its own."""

    def __init__(self, folder: Path, body: str, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BEGIN + textwrap.dedent(body), str(folder), str(limit)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "LORAJOB_TERMINATION_LOG": str(folder / "message")},
                process_group=0,
            )  # fmt: skip
        assert self.process.stdout
        self.said = self.process.stdout.readline().split()[1:]
        self.since = time.monotonic()

    def wait(self) -> tuple[int, float]:
        """The code, and the seconds from `ready` to the end."""
        code = self.process.wait(30)
        return code, time.monotonic() - self.since

    def assert_stalled(self, slack: float = 1.0) -> None:
        code, seconds = self.wait()
        assert code == 10, self.stderr
        assert self.limit <= seconds + 0.2 and seconds < self.limit + slack

    @property
    def log(self) -> str:
        path = self.folder / "logs" / "stacks.txt"
        return path.read_text() if path.exists() else ""

    @property
    def stderr(self) -> str:
        return self.errors.read_text()


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    children: list[Child] = []

    def start(body: str, limit: float = LIMIT) -> Child:
        children.append(Child(tmp_path, body, limit))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        with child.process:
            pass


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def gone(pid: int) -> bool:
    """Whether it is, or soon will be: who was killed needs a moment to die."""
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


SLEEPS = """
    def sleeps_in_c():
        time.sleep(600)
    with watch:
        watch.beat("step 7 of 9")
        ready()
        sleeps_in_c()
"""
LOCK = """
    def waits_for_itself():
        lock = threading.Lock()
        with lock, lock:
            pass
    with watch:
        watch.beat("step 7 of 9")
        ready()
        waits_for_itself()
"""
TWO_LOCKS = """
    one, other = threading.Lock(), threading.Lock()
    def takes_one_then_other(first, second):
        with first:
            time.sleep(0.3)
            with second:
                pass
    with watch:
        watch.beat("step 7 of 9")
        threads = [threading.Thread(target=takes_one_then_other, args=pair)
                   for pair in ((one, other), (other, one))]
        for thread in threads:
            thread.start()
        ready()
        threads[0].join()
"""


@pytest.mark.parametrize(
    ("body", "function"),
    [
        (SLEEPS, "sleeps_in_c"),
        (LOCK, "waits_for_itself"),
        (TWO_LOCKS, "takes_one_then_other"),
    ],
)
def test_what_hangs_is_ended_with_its_stacks_kept(
    start: Start, body: str, function: str, tmp_path: Path
) -> None:
    child = start(body)
    child.assert_stalled()
    assert f"in {function}" in child.log
    assert "in <module>" in child.log, "the main thread's too"
    assert "MainThread" in child.log and "stall-watch" in child.log
    assert "lorajob: no progress" in child.stderr and "step 7 of 9" in child.stderr
    assert str(tmp_path / "logs" / "stacks.txt") in child.stderr
    message = json.loads((tmp_path / "message").read_text())
    assert (message["code"], message["title"], message["stage"]) == (10, "no progress", "train")
    assert "1 seconds" in message["message"] and "step 7 of 9" in message["message"]
    assert message["what_to_do"] and message["log"] == str(tmp_path / "logs" / "stacks.txt")


def test_one_that_never_beat_is_ended_too(start: Start) -> None:
    child = start("with watch:\n    ready()\n    time.sleep(600)", 0.5)
    child.assert_stalled()
    assert "(nothing)" in child.log


def test_a_note_shows_no_secret(start: Start) -> None:
    secret = "9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"
    child = start(
        f'with watch:\n    watch.beat("fetching hf_{secret}")\n    ready()\n    time.sleep(600)',
        0.5,
    )
    child.assert_stalled()
    for text in (child.log, child.stderr, (child.folder / "message").read_text()):
        assert "fetching ***" in text and secret not in text


@pytest.mark.parametrize("where", ["the main thread", "another thread"])
def test_what_beats_goes_on(start: Start, where: str) -> None:
    child = start(
        f"""
        def beats():
            for step in range(30):
                watch.beat()
                time.sleep(0.1)
        with watch:
            ready()
            if {where!r} == "another thread":
                thread = threading.Thread(target=beats)
                thread.start()
                thread.join()
            else:
                beats()
        sys.exit(7)
        """
    )
    assert child.wait()[0] == 7
    assert child.log == child.stderr == ""


def test_a_busy_thread_does_not_hide_one_that_hangs(start: Start) -> None:
    child = start("""
        def works():
            while True:
                sum(range(1000))
        with watch:
            threading.Thread(target=works, daemon=True).start()
            ready()
            threading.Event().wait()
    """)
    child.assert_stalled(slack=2.0)  # they share one interpreter


BEATS_NOW_AND_THEN = """
    with watch:
        watch.beat()
        ready()
        for _ in range(5):
            for _ in range(5):  # one long sleep would be over at waking
                time.sleep(0.06 * limit)
            watch.beat()
    sys.exit(7)
"""


@pytest.mark.parametrize("after", [0.0, 0.1, 0.7])
def test_one_that_was_stopped_for_longer_than_the_limit_goes_on(start: Start, after: float) -> None:
    child = start(BEATS_NOW_AND_THEN)
    time.sleep(after * LIMIT)
    child.process.send_signal(signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    child.process.send_signal(signal.SIGCONT)
    assert child.wait()[0] == 7, child.stderr
    assert child.log == ""


def test_one_stopped_again_and_again_goes_on(start: Start) -> None:
    child = start(BEATS_NOW_AND_THEN)
    for _ in range(4):
        child.process.send_signal(signal.SIGSTOP)
        time.sleep(1.2 * LIMIT)
        child.process.send_signal(signal.SIGCONT)
        time.sleep(0.1 * LIMIT)
    assert child.wait()[0] == 7, child.stderr


def test_one_that_hangs_is_ended_after_it_was_stopped_too(start: Start) -> None:
    child = start(SLEEPS)
    child.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    child.process.send_signal(signal.SIGCONT)
    child.since = time.monotonic()
    code, seconds = child.wait()
    assert code == 10 and 0.4 < seconds < 2.0, "as much time as it had left"


def test_its_children_are_gone_and_others_are_not(start: Start) -> None:
    child = start("""
        shell = "sleep 600 & echo $!; while :; do /bin/sleep 0.02; done"
        below = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True)
        grandchild = below.stdout.readline().strip()
        # One that ignores signals, in a group of its own, with a name that is hard to read.
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); " \\
               "open('/proc/self/comm', 'w').write(') S 1 (x'); time.sleep(600)"
        apart = subprocess.Popen([sys.executable, "-c", code], start_new_session=True,
                                 stdout=subprocess.PIPE)
        apart.stdout.readline()
        with watch:
            ready(f"{below.pid} {grandchild} {apart.pid}")
            below.wait()
    """)
    pids = [int(text) for text in child.said]
    neighbour = subprocess.Popen(["sleep", "600"], process_group=child.process.pid)
    try:
        assert len(pids) == 3 and all(map(alive, pids))
        child.assert_stalled()
        assert all(map(gone, pids))
        assert neighbour.poll() is None and alive(neighbour.pid)
    finally:
        neighbour.kill()
        neighbour.wait()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_counted_while_paused(start: Start) -> None:
    child = start(
        """
        with watch:
            with watch.paused():
                with watch.paused():
                    time.sleep(1.5 * limit)
                time.sleep(1.5 * limit)
            time.sleep(0.5 * limit)
            watch.beat("after the pause")
            ready()
            time.sleep(600)
        """,
    )
    assert child.said == []
    child.assert_stalled()
    assert "after the pause" in child.log


def test_a_log_that_cannot_be_written_leaves_the_stacks_on_stderr(start: Start) -> None:
    child = start(
        """
        log.parent.write_text("a file where the folder should be")
        with watch:
            ready()
            time.sleep(600)
    """,
        0.5,
    )
    child.assert_stalled()
    assert "in <module>" in child.stderr and "lorajob: no progress" in child.stderr


@pytest.mark.parametrize(
    "tell", ["threading.Event().wait()", "1 / 0", "sys.exit(3)", "threading.Thread.start = None"]
)
def test_a_message_that_fails_or_hangs_does_not_keep_it(start: Start, tell: str) -> None:
    child = start(
        f"""
        def tell(error):
            {tell}
        watch = StallWatch(limit, log, tell)
        with watch:
            ready()
            time.sleep(600)
    """,
        0.5,
    )
    child.assert_stalled(slack=3.5)
    assert "in <module>" in child.log


def test_a_pipe_that_nobody_reads_does_not_keep_it(start: Start) -> None:
    """The stalled thread holds the lock of standard error, and more cannot be written there."""
    child = start("""
        reads, writes = os.pipe()
        os.dup2(writes, 2)
        def prints_too_much():
            print("x" * 10**6, file=sys.stderr)
        with watch:
            ready()
            prints_too_much()
    """)
    child.assert_stalled(slack=3.5)
    assert "in prints_too_much" in child.log
    assert json.loads((child.folder / "message").read_text())["code"] == 10


def test_the_log_may_change_and_is_added_to(start: Start) -> None:
    child = start(
        """
        with watch:
            watch.log = folder / "other.txt"
            watch.log.write_text("of the run before\\n")
            ready()
            time.sleep(600)
    """,
        0.5,
    )
    child.assert_stalled()
    text = (child.folder / "other.txt").read_text()
    assert text.startswith("of the run before\n") and "in <module>" in text
    assert child.log == ""


def test_after_it_nothing_is_left_of_it(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    watch = StallWatch(0.3, tmp_path / "log", lambda error: None)
    for _ in range(2):  # it may be used again
        with watch:
            assert len(set(threading.enumerate()) - before) == 1
            watch.beat()
        assert set(threading.enumerate()) == before
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert set(threading.enumerate()) == before
    time.sleep(0.6)  # longer than the limit
    assert list(tmp_path.iterdir()) == []


def test_it_ends_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with StallWatch(3600, tmp_path / "log", lambda error: None):
        pass
    assert time.monotonic() - start < 0.1 + 0.4


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_is_more_than_nothing(limit: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit"):
        StallWatch(limit, tmp_path / "log", lambda error: None)
