"""The terminal's view of a run, and what a pipe gets in its place."""

from __future__ import annotations

import io
import json
import logging
import mmap
import re

import pytest
from rich.console import Console

from jobs.observe.events import Observer
from jobs.observe.live import LiveView, duration, figures_line
from jobs.observe.snapshot import Snapshot
from jobs.observe.usage import STATM

STEP = {"step": 5, "of": 20, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5,
        "tokens_per_second": 12345.6}  # fmt: skip
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def drawn(snapshot: Snapshot, width: int) -> list[str]:
    """The lines of the view at one moment."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view = LiveView(console, snapshot)
    view.bars.add_task("training", total=20, completed=5, note="", unit="")
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return ESCAPES.sub("", console.file.getvalue()).rstrip("\n").split("\n")


def training() -> Snapshot:
    snapshot = Snapshot()
    snapshot.hear("stage_start", {"stage": "train"})
    snapshot.hear("train_step", STEP | {"memory_bytes": 3 * 2**30})
    return snapshot


def test_training_has_its_figures_below_the_bar() -> None:
    bar, figures = drawn(training(), 120)
    assert "training" in bar
    assert "5/20" in bar
    for text in ("loss 1.2500", "lr 2.00e-04", "tok/s 12,346", "memory 3.0 GiB"):
        assert text in figures
    assert "eval" not in figures


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_view_has_two_lines_on_every_terminal(width: int) -> None:
    """One that grew and shrank would make what is above it jump."""
    lines = drawn(training(), width)
    assert len(lines) == 2
    assert all(len(line.rstrip()) <= width for line in lines)


def test_the_figures_stand_still_while_they_change() -> None:
    snapshot = training()
    snapshot.hear("eval", {"step": 5, "eval_loss": 12.0})
    before = figures_line(snapshot).plain
    snapshot.hear("train_step", STEP | {"step": 6, "loss": 0.0421, "grad_norm": 12.5,
                                        "tokens_per_second": 87.0, "memory_bytes": 2**30})  # fmt: skip
    snapshot.hear("eval", {"step": 6, "eval_loss": 0.5})
    after = figures_line(snapshot).plain
    for name in ("eval", "lr", "grad", "tok/s", "memory"):
        assert before.index(name) == after.index(name), name


def test_a_gpus_memory_is_shown_with_all_there_is() -> None:
    snapshot = training()
    snapshot.hear("train_step", STEP | {"gpu_memory_bytes": 2**33, "gpu_memory_total_bytes": 2**36})
    assert "GPU 8.0 of 64.0 GiB" in figures_line(snapshot).plain


def test_a_step_has_its_note_beside_its_bar() -> None:
    stream = io.StringIO()
    with Observer("terminal", stream) as observer:
        assert observer.bars
        with observer.ticker("verifying", 3) as ticker:
            ticker.advance(note="q8_0")
            assert observer.bars.tasks[0].fields["note"] == "q8_0"
        assert not observer.bars.tasks


def test_a_training_that_is_stopped_early_says_so_on_a_terminal() -> None:
    stream = io.StringIO()
    with Observer("terminal", stream) as observer:
        observer.event("stopped_early", step=40, of=90, best_step=30)
    assert "stopped at step 40 of 90" in stream.getvalue()


def test_a_pipe_gets_json_lines_and_no_escapes() -> None:
    stream = io.StringIO()
    with Observer("auto", stream) as observer:
        observer.event("stage_start", stage="train")
        with observer.ticker("training", 20) as ticker:
            observer.event("train_step", **STEP)
            ticker.advance()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["stage_start", "train_step"]
    assert "\x1b" not in stream.getvalue()
    assert events[1]["loss"] == 1.25


@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")
def test_every_step_says_how_much_memory_is_in_use() -> None:
    stream = io.StringIO()
    with Observer("json", stream) as observer:
        observer.event("train_step", **STEP)
        # Pages that are new to the process: an allocator may have as much left over from before.
        with mmap.mmap(-1, 64 * 2**20) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            observer.event("train_step", **STEP)
    first, second = (json.loads(line)["memory_bytes"] for line in stream.getvalue().splitlines())
    assert second - first == pytest.approx(64 * 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (100000, "1 d 3 h")],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_logging_is_given_back_as_it_was() -> None:
    root, stream, handler = logging.getLogger(), io.StringIO(), logging.NullHandler()
    root.addHandler(handler)
    before = root.handlers[:], root.level
    try:
        with Observer("json", stream):
            logging.getLogger("library").warning("during")
        assert (root.handlers, root.level) == before
        logging.getLogger("library").warning("after")
    finally:
        root.removeHandler(handler)
    (event,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (event["event"], event["text"]) == ("library_warning", "during")


class Deaf:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.closed = False

    def hear(self, event: str, fields: dict[str, object]) -> None:
        self.heard.append(event)
        raise RuntimeError("no more of this")

    def close(self) -> None:
        self.closed = True


def test_a_listener_that_fails_is_left_out_with_one_warning() -> None:
    stream, deaf = io.StringIO(), Deaf()
    with Observer("json", stream) as observer:
        observer.add(deaf)
        observer.event("run_start", name="x", version="1")
        observer.event("engine", engine="transformers")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["run_start", "warning", "engine"]
    assert "no more of this" in events[1]["text"]
    assert deaf.heard == ["run_start"]


def test_a_line_printed_after_training_has_no_figures_below_it() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with LiveView(console, training()) as view:
        task = view.bars.add_task("training", total=20, note="", unit="")
        console.print("during")
        view.bars.remove_task(task)
        console.print("after")
    assert isinstance(console.file, io.StringIO)
    during, after = console.file.getvalue().split("after")
    assert "loss 1.2500" in during
    assert "loss" not in after
