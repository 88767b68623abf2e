"""What a terminal shows of a run that goes on: bars, and the figures of training below them.

Drawn in place a few times a second whatever happens meanwhile; the figures change once a second, in
columns that stay where they are, so that a person can read them.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from jobs.observe.snapshot import Snapshot

DRAWN = 4  # times a second
FIGURES_EVERY = 1.0  # seconds
GIB = 2**30


class LiveView:
    """Bars to add tasks to, with what `snapshot` knows of training below."""

    def __init__(self, console: Console, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._figures = Text()
        self._figured = 0.0
        self.bars = Progress(
            TextColumn(
                "  {task.description}",
                table_column=Column(no_wrap=True, overflow="ellipsis", max_width=36),
            ),
            BarColumn(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console,
            # A step of a large model may take a minute; what is older than this says nothing.
            speed_estimate_period=900,
        )
        self._live = Live(self, console=console, refresh_per_second=DRAWN, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._live.stop()

    def __rich__(self) -> RenderableType:
        # Asked anew also where a line is printed above: what is over is not drawn once more.
        if not self.bars.tasks:
            return Text()
        if not self._snapshot.figures_shown:
            return self.bars
        now = time.monotonic()
        if now - self._figured >= FIGURES_EVERY:
            self._figures, self._figured = figures_line(self._snapshot), now
        return Group(self.bars, self._figures)


def figures_line(snapshot: Snapshot) -> Text:
    """Loss, learning rate, speed and memory, each in a place of its own."""
    figures = snapshot.figures
    said = [("loss", f"{figures['loss']:<7.4f}")]
    if snapshot.eval_loss is not None:
        said.append(("eval", f"{snapshot.eval_loss:<7.4f}"))
    said += [
        ("lr", f"{figures['learning_rate']:<8.2e}"),
        ("grad", f"{figures['grad_norm']:<6.2f}"),
        ("tok/s", f"{figures['tokens_per_second']:<8,.0f}"),
    ]
    if "gpu_memory_bytes" in figures:
        used, total = figures["gpu_memory_bytes"] / GIB, figures["gpu_memory_total_bytes"] / GIB
        said.append(("GPU", f"{used:.1f} of {total:.1f} GiB"))
    elif "memory_bytes" in figures:
        said.append(("memory", f"{figures['memory_bytes'] / GIB:.1f} GiB"))
    line = Text("  ", no_wrap=True, overflow="ellipsis")
    for name, value in said:
        line.append(f"{name} ", "dim").append(f"{value} ")
    return line


class _Amount(ProgressColumn):
    """How much is done, of how much: things, or bytes."""

    def render(self, task: Task) -> Text:
        total = task.total
        if task.fields.get("unit") == "bytes":
            done = decimal(int(task.completed))
            return Text(f"{done} of {decimal(int(total))}" if total else done)
        return Text(f"{int(task.completed)}/{'?' if total is None else int(total)}")


class _Left(ProgressColumn):
    """The time left, once it can be told."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.time_remaining is None:
            return Text("")
        return Text(f"{duration(task.time_remaining)} left", "cyan")


def duration(seconds: float) -> str:
    """In the two largest units: 42 s, 3 min 05 s, 2 h 10 min, 1 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
