"""Runs that are killed, told to stop, or short of disk, wherever they are: each goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from bench import chaos
from bench.chaos import Child, Place, place
from jobs.store.base import Advance
from jobs.store.hashing import FileEntry, sha256_of
from jobs.store.local import LocalStore
from jobs.train.checkpoints import MARKER, Checkpoints
from tests import warm

SOON = 5.0  # seconds from the signal to the exit
ROWS = 6000  # so many that other processes label them
ADAPTER = "adapter/adapter_model.safetensors"
pytestmark = pytest.mark.slow

Event = dict[str, Any]
Start = Callable[..., AbstractContextManager[Child]]


def rows(path: Path, count: int, of: str = "") -> Path:
    with path.open("w") as file:
        for number in range(count):
            turns = [("user", f"{of}What is {number}?"), ("assistant", f"It is {number}. " * 6)]
            file.write(
                json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
                + "\n"
            )
    return path


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("stopping")
    with place(folder) as found:
        for name, count in (("many", ROWS), ("held", 60)):
            path = rows(folder / f"{name}.jsonl", count, of="" if name == "many" else "Well. ")
            found.server.client().upload_file(str(path), found.bucket, f"data/{name}.jsonl")
        yield found


def spec(where: Place, prefix: str, **more: Any) -> Path:
    return where.spec(
        prefix,
        data={
            "train": {"source": f"s3://{where.bucket}/data/many.jsonl"},
            "eval": [{"source": f"s3://{where.bucket}/data/held.jsonl"}],
        },
        lora={"rank": 4},
        train={"max_steps": 6, "eval_every": 3},
        checkpoints={"every_steps": 1},
        verify={"prompts": [{"ask": "What is 1?"}], "max_new_tokens": 24},
        **more,
    )


@pytest.fixture(scope="module")
def expected(where: Place) -> dict[str, str]:
    """What a run leaves that nobody touches."""
    with where.start(spec(where, "untouched")) as child:
        assert child.end() == 0, child.told()
    return where.results("untouched")


class Warm(warm.Process):
    """In the place of a Popen: a run that need not import the libraries."""

    def __init__(
        self, command: list[str], cwd: Path, env: dict[str, str], stderr: IO[bytes], **how: Any
    ) -> None:
        assert how["start_new_session"]
        reading, writing = os.pipe()
        with open(os.devnull) as nothing, open(writing, "wb") as out:  # noqa: PTH123 - a number
            files = [nothing.fileno(), out.fileno(), stderr.fileno()]
            super().__init__(command, files, env, cwd, own_session=True)
        self.stdout = open(reading, "rb")  # noqa: PTH123, SIM115 - a number, and the reader's


@pytest.fixture
def start(where: Place, expected: dict[str, str]) -> Start:
    """Starts a run as `where.start` does, and one that is `warm` without the seconds in which
    libraries are imported, and those in which llama.cpp is shown to split text as was found before."""
    known = next(where.folder.glob("cache-*/tokenizers"))

    @contextmanager
    def begin(
        wanted: Path, work: Path | None = None, cache: Path | None = None, is_warm: bool = True
    ) -> Iterator[Child]:
        with pytest.MonkeyPatch.context() as patch:
            if is_warm:
                cache = cache or where.folder / f"warm-{next(where.number)}"
                cache.mkdir(exist_ok=True)
                if not (cache / "tokenizers").exists():
                    (cache / "tokenizers").symlink_to(known)
                patch.setattr(chaos, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Warm}))  # fmt: skip
            child = where.start(wanted, work, cache)
        with child:
            yield child

    return begin


def a(name: str, **fields: Any) -> Callable[[Event], bool]:
    return lambda event: (
        event["event"] == name and all(event[key] == value for key, value in fields.items())
    )


def child_process(child: Child, words: str) -> None:
    """Wait until the run has a process of its own whose command line has these words."""
    until = time.monotonic() + 120
    while not any(words in line for line in child.left_over()):
        assert child.process.poll() is None, child.told()
        assert time.monotonic() < until, child.told()
        time.sleep(0.01)


def hears(child: Child) -> None:
    """Wait until it answers signals itself: that is the first thing it does."""
    bit = 1 << (signal.SIGTERM - 1)
    while True:
        assert child.process.poll() is None, child.told()
        status = Path(f"/proc/{child.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.002)


# Where it is stopped, in the order of a run: how it is seen to be there, and the stage it then names.
PLACES: list[tuple[str, str | None, Callable[[Child], Any]]] = [
    ("importing", None, hears),
    ("fetching", "data", lambda c: c.wait_for(a("stage_start", stage="data"))),
    ("tokenizing", "data", lambda c: child_process(c, "spawn_main")),
    ("in a step", "train", lambda c: c.wait_for(a("checkpoint", step=1))),
    ("evaluating", "train", lambda c: c.wait_for(a("train_step", step=3))),
    ("saving a checkpoint", "train", lambda c: c.wait_for(a("train_step", step=4))),
    ("merging", "merge", lambda c: c.wait_for(a("stage_start", stage="merge"))),
    ("converting", "gguf", lambda c: child_process(c, ".whole.gguf")),
    ("quantizing", "gguf", lambda c: child_process(c, "llama.worker")),
    ("verifying", "verify", lambda c: c.wait_for(a("stage_start", stage="verify"))),
    ("uploading", "verify", lambda c: c.wait_for(a("stage_done", stage="verify"))),
]
# Kubernetes tells the process alone; a terminal tells all that runs in it, so what matters there
# is where other processes run. A start takes seconds, so it is not tried everywhere.
ALONE = [name for name, _, _ in PLACES]
ALL = ["importing", "tokenizing", "evaluating", "converting", "quantizing"]
# Requests that are answered only after a while, so that there is time to stop the run in them.
SLOW = {"fetching": "GET .*data/many", "uploading": "PUT .*merged/model"}


@pytest.mark.parametrize(("number", "names"), [(signal.SIGTERM, ALONE), (signal.SIGINT, ALL)])
def test_told_to_stop_anywhere_it_ends_soon_and_the_next_start_goes_on(
    where: Place, start: Start, expected: dict[str, str], number: signal.Signals, names: list[str]
) -> None:
    prefix = f"told-{number.name.lower()}"
    wanted, work = spec(where, prefix), where.folder / prefix
    safe, wrong = False, []
    for name, aimed, be_there in PLACES:
        if name not in names:
            continue
        # Ordinary starts are told so as well: all that a terminal's signal goes to.
        is_warm = number == signal.SIGTERM and name != "importing"
        with (
            stalled(where, SLOW.get(name)) as wait,
            started(where, start, wanted, work, is_warm=is_warm) as child,
        ):
            be_there(child)
            wait(child)
            told_at = time.monotonic()
            child.send(number, group=number == signal.SIGINT)
            code, seconds = child.end(), time.monotonic() - told_at
            told = where.termination()
            # On a busy machine a short stage is over before the signal is there: the run is then in
            # the next, and has to say so.
            began = [event["stage"] for event in child.events if event["event"] == "stage_start"]
            assert aimed is None or aimed in began, child.told()
            stage = began[-1] if began else None
            safe = safe or any(event["event"] == "checkpoint" for event in child.events)
            right = 20 if safe else 128 + number
            found = (code, told["code"], told["stage"], bool(told["safe"]), child.left_over())
            if found != (right, right, stage, safe, []) or seconds > SOON:
                wrong.append((name, found, right, round(seconds, 1), told, child.told()))
    with started(where, start, wanted, work) as child:
        child.wait_for(a("run_done"))
        child.send(number)  # to end as stopped would have Kubernetes do all of it again
        assert child.end() == 0, child.told()
    assert where.termination()["code"] == 0
    assert where.results(prefix) == expected
    assert not wrong, "\n".join(map(str, wrong))


@contextmanager
def stalled(where: Place, match: str | None) -> Iterator[Callable[[Child], None]]:
    """The next such request is answered after a while; gives what waits until it was made."""
    before = where.proxy.injected["stall"]
    where.proxy.stall_s = 20.0
    if match:
        where.proxy.fail("stall", match=match)

    def wait(child: Child) -> None:
        while match and where.proxy.injected["stall"] == before:
            assert child.process.poll() is None, child.told()
            time.sleep(0.01)

    yield wait


@contextmanager
def started(
    where: Place, start: Start, wanted: Path, work: Path, is_warm: bool = True
) -> Iterator[Child]:
    """One start on this machine, which keeps its disk."""
    (where.folder / "termination.json").unlink(missing_ok=True)
    with start(wanted, work, where.folder / f"{wanted.stem}-cache", is_warm) as child:
        yield child


def test_killed_in_four_stages_each_start_on_an_empty_disk_ends_the_same(
    where: Place, start: Start, expected: dict[str, str]
) -> None:
    wanted = spec(where, "killed")
    for be_there in (
        lambda c: child_process(c, "spawn_main"),
        lambda c: c.wait_for(a("checkpoint", step=2)),
        lambda c: c.wait_for(a("stage_start", stage="merge")),
        lambda c: child_process(c, ".whole.gguf"),
    ):
        with start(wanted) as child:
            be_there(child)
            child.send(signal.SIGKILL, group=True)
            assert child.end() == -signal.SIGKILL
    with start(wanted, is_warm=False) as child:
        assert child.end() == 0, child.told()
        resumed = next(e["checkpoint"] for e in child.events if e["event"] == "resumed")
        assert resumed == "checkpoint-6"
        assert not [e for e in child.events if e["event"] == "train_step"]
    assert where.results("killed") == expected


def test_a_second_interrupt_ends_it_at_once(where: Place, start: Start) -> None:
    wanted = spec(where, "twice")
    with stalled(where, "PUT .*twice/checkpoints") as wait, start(wanted) as child:
        wait(child)
        child.send(signal.SIGINT)
        time.sleep(1)
        assert child.process.poll() is None  # the checkpoint is on its way, and waited for
        told_at = time.monotonic()
        child.send(signal.SIGINT)
        assert child.end() == 130
        assert time.monotonic() - told_at < 1


# --- disks that are full


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A disk of its own. Skips where none may be mounted."""
    folder.mkdir()
    size = f"size={int(megabytes * 1024)}k"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "lorajob-test", str(folder)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, megabytes: float) -> None:
    size = f"remount,size={int(megabytes * 1024)}k"
    subprocess.run(["mount", "-o", size, str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take what is free there, but for so many bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        taken = 0
        while (more := shutil.disk_usage(folder).free - leave) > 0:
            # The run beside it writes too, and may have taken what was free a moment ago.
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), taken, more)
                taken += more
    return filler


# What is done when the disk fills up, how that is seen, what is left free then, and a file or folder
# that the message must name.
FULL: list[tuple[str, Callable[[Child], Any], int, str]] = [
    ("data", lambda c: c.wait_for(a("stage_start", stage="data")), 200_000, ".building-data"),
    ("train", lambda c: c.wait_for(a("checkpoint", step=2)), 200_000, "checkpoint-"),
    ("train", lambda c: c.wait_for(a("checkpoint", step=4)), 500_000, "checkpoint-"),
    # Enough for what is left of training, and not for the merged model: a merge takes no time to be met in.
    ("merge", lambda c: c.wait_for(a("stage_start", stage="train")), 6_500_000, "merge"),
    ("gguf", lambda c: c.wait_for(a("stage_start", stage="gguf")), 2_000_000, ".whole.gguf"),
    # Enough for the conversion and what it predicts, 17.4 MB, and not for the first tensor of a type:
    # with each further one the conversion makes room.
    ("gguf", lambda c: c.wait_for(a("stage_start", stage="gguf")), 17_700_000, "Q8_0.gguf"),
]


def test_a_full_disk_is_told_and_with_more_room_the_same_start_goes_on(
    where: Place, start: Start, expected: dict[str, str], tmp_path: Path
) -> None:
    wanted = spec(where, "full", publish=[])
    with small_disk(tmp_path / "disk", 150) as disk:
        work = disk / "work"
        whole: set[str] = set()
        for stage, be_there, leave, named in FULL:
            held = SLOW["fetching"] if stage == "data" else None
            with stalled(where, held) as wait, started(where, start, wanted, work) as child:
                be_there(child)
                wait(child)
                where.proxy.stall_s = 1.0
                filler = fill(disk, leave)
                code = child.end()
            told = where.termination()
            assert (code, told["code"], told["stage"]) == (5, 5, stage), child.told()
            assert named in told["message"], told
            assert "free some" in told["what_to_do"]
            done = {event["stage"] for event in child.events if event["event"] == "stage_skipped"}
            assert done >= whole, "what was whole before stays"
            whole |= done
            filler.unlink()
            resize(disk, 151)
        with started(where, start, wanted, work) as child:
            assert child.end() == 0, child.told()
            skipped = {e["stage"] for e in child.events if e["event"] == "stage_skipped"}
            assert skipped == {"data", "train", "adapter", "merge"}
        made = work / "chaos"
        for path in (ADAPTER, "merged/model.safetensors", "gguf/chaos-Q8_0.gguf"):
            assert sha256_of(made / path) == expected[path]


# --- a store that is slower than training


class SlowStore(LocalStore):
    """Everything sent there waits until it may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def put(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        advance: Advance,
        prefix: str = "",
        threads: int = 1,
    ) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        super().put(folder, files, advance, prefix, threads)


def write(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(f"of step {step}")
    return path


@pytest.mark.parametrize("keep", [1, 2])
def test_what_is_being_sent_is_not_removed_for_newer_ones(tmp_path: Path, keep: int) -> None:
    store = SlowStore(tmp_path / "store")
    told: list[str] = []
    kept = Checkpoints(tmp_path / "here", {}, store, keep=keep, tell=told.append)
    kept.commit(write(kept.folder, 1), 1)
    assert store.begun.wait(10)
    for step in (2, 3, 4):
        kept.commit(write(kept.folder, step), step)
    store.go_on.set()
    assert kept.wait(10)
    assert told == []
    names = {entry.key.split("/")[1] for entry in store.entries() if entry.key.endswith(MARKER)}
    assert names == ({"checkpoint-1", "checkpoint-4"} if keep == 2 else {"checkpoint-4"})


def test_when_all_is_done_nothing_is_sent_after_it_was_removed(tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "store")
    kept = Checkpoints(tmp_path / "here", {}, store)
    kept.commit(write(kept.folder, 1), 1)
    assert store.begun.wait(10)
    threading.Timer(0.3, store.go_on.set).start()
    kept.clear()
    assert kept.wait(10)
    time.sleep(0.3)
    assert store.entries() == []


def test_one_that_was_not_sent_before_the_end_is_sent_by_the_next_start(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "here", {}).commit(write(tmp_path / "here", 3), 3)
    store = LocalStore(tmp_path / "store")
    kept = Checkpoints(tmp_path / "here", {}, store)
    assert kept.newest() == tmp_path / "here" / "checkpoint-3"
    assert kept.wait(10)
    assert kept.safe == f"checkpoint of step 3 in {store.url}"
    assert (store.folder / "checkpoints" / "checkpoint-3" / MARKER).is_file()
