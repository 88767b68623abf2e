"""What a run says while it runs: an event is a name with fields.

A terminal gets bars and short lines; a pipe gets one JSON object a line; and the run's folder
always gets the JSON lines in logs/run.jsonl. All three show the same events, and none of them shows
a secret (`jobs.secrets`).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import structlog
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from jobs.observe.live import LiveView
from jobs.observe.snapshot import Moved, Snapshot
from jobs.observe.usage import memory
from jobs.reached import Reached
from jobs.secrets import redact, redact_tree

LogFormat = Literal["auto", "json", "terminal"]
Unit = Literal["", "bytes"]

QUIET_SECONDS = 5.0  # in a pipe, a long step that has no events of its own reports this often


class Listener(Protocol):
    """Hears what the observer is told, as it goes into the log: without secrets."""

    def hear(self, event: str, fields: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Nothing more will come."""


class Ticker:
    """Progress of one step: `advance` as things get done, with what is worth showing beside it."""

    def __init__(
        self, observer: Observer, name: str, total: int | None, unit: Unit, moved: Moved
    ) -> None:
        self._observer, self._name, self._total = observer, redact(name), total
        self._unit, self._moved = unit, moved
        self._lock = threading.Lock()  # transfers advance from several threads
        self._done = 0
        self._last = time.monotonic()
        self._task: TaskID | None = None
        if observer.bars:
            self._task = observer.bars.add_task(self._name, total=total, note="", unit=unit)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._observer.beat(self._name)
        with self._lock:
            self._done += count
            self._observer.snapshot.tick(self._done, self._total, count, self._moved)
            due = time.monotonic() - self._last >= QUIET_SECONDS
            if due:
                self._last = time.monotonic()
        if self._observer.bars and self._task is not None:
            self._observer.bars.update(self._task, advance=count, note=redact(note))
        elif due:
            unit = {"unit": self._unit} if self._unit else {}
            self._observer.event(
                "progress", step=self._name, done=self._done, total=self._total, **unit
            )

    def at(self, done: int, total: int) -> None:
        """Where the step is, for one that only learns its length as it goes."""
        self._total = total
        if self._observer.bars and self._task is not None:
            self._observer.bars.update(self._task, total=total)
        self.advance(done - self._done)

    def close(self) -> None:
        if self._observer.bars and self._task is not None:
            self._observer.bars.remove_task(self._task)


class Observer:
    """Shows events on `stream` (standard output) and keeps them in a file once it has one."""

    def __init__(
        self,
        log_format: LogFormat = "auto",
        stream: IO[str] | None = None,
        quiet: bool = False,
        reached: Reached | None = None,
    ) -> None:
        self.reached = reached or Reached()
        self.beat: Callable[[str], None] = lambda note: None
        """Hears of everything that shows that the run goes on."""
        self._stream = stream or sys.stdout
        self._quiet = quiet  # bars on a terminal, and nothing else
        terminal = log_format == "terminal" or (log_format == "auto" and self._stream.isatty())
        self.console = Console(file=self._stream, highlight=False) if terminal else None
        self.bars: Progress | None = None
        self.snapshot = Snapshot()
        self._live: LiveView | None = None
        self._listeners: list[Listener] = []
        self._file: IO[str] | None = None
        self._logging_before: tuple[list[logging.Handler], int] = [], logging.WARNING
        self._json = structlog.wrap_logger(
            _Lines(self),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )

    def __enter__(self) -> Self:
        if self.console:
            self._live = LiveView(self.console, self.snapshot).__enter__()
            self.bars = self._live.bars
        self._take_over_logging()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for listener in self._listeners:
            with suppress(Exception):  # it has heard all there is, and the run is over
                listener.close()
        self._listeners.clear()
        if self._live:
            self._live.__exit__()
            self._live = self.bars = None
        self._give_back_logging()
        if self._file:
            self._file.close()
            self._file = None

    def keep_in(self, path: Path) -> None:
        """From now on append every event to this file too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def add(self, listener: Listener) -> None:
        """From now on tell it every event too; it is closed with the observer."""
        self._listeners.append(listener)

    def event(self, event: str, **fields: Any) -> None:
        self.beat(event)
        if event == "stage_start":
            self.reached.stage = fields["stage"]
        elif event == "train_step":
            self.reached.step = fields["step"]
            fields |= memory()
        fields = redact_tree(fields)
        self.snapshot.hear(event, fields)
        self._json.info(event, **fields)
        if self.console and not self._quiet:
            line = _TERMINAL.get(event)
            if line is not None:
                # Once more: one field may complete what began in another.
                self.console.print(redact(line.format_map(_Fields(fields))), soft_wrap=True)
        for listener in [*self._listeners]:
            try:
                listener.hear(event, fields)
            except Exception as error:
                # Whoever watches a run must not be what ends it.
                self._listeners.remove(listener)
                self.warn(f"{type(listener).__name__} hears no more of this run: {error}")

    def warn(self, text: str) -> None:
        self.event("warning", text=text)

    def notice(self, text: str) -> None:
        """A line for a person, said also where the observer is quiet: why nothing seems to go on."""
        text = redact(text)
        if self.console:
            self.console.print(Text.assemble(("  waiting   ", "yellow"), text), soft_wrap=True)
        else:
            self._stream.write(f"waiting: {text}\n")
            self._stream.flush()

    def line(self, text: str) -> None:
        """A JSON line, already redacted and rendered: to the file, and to a stream that is no terminal."""
        if self._file:
            self._file.write(text + "\n")
        if not self.console and not self._quiet:
            self._stream.write(text + "\n")
            self._stream.flush()

    @contextmanager
    def ticker(
        self, name: str, total: int | None = None, unit: Unit = "", moved: Moved = ""
    ) -> Iterator[Ticker]:
        """`moved` says which way bytes go, for those who count them."""
        ticker = Ticker(self, name, total, unit, moved)
        try:
            yield ticker
        finally:
            ticker.close()

    def _take_over_logging(self) -> None:
        """Warnings of libraries become events; their chatter below that is left out."""
        root = logging.getLogger()
        self._logging_before = root.handlers[:], root.level
        root.handlers[:] = [_ToEvents(self)]
        root.setLevel(logging.WARNING)
        logging.captureWarnings(True)

    def _give_back_logging(self) -> None:
        """What is said from now on is no part of this run, and its stream may be closed."""
        logging.captureWarnings(False)
        root = logging.getLogger()
        root.handlers[:], level = self._logging_before
        root.setLevel(level)


class _Lines:
    """The sink that structlog writes rendered lines to."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def info(self, text: str) -> None:
        self._observer.line(text)


class _ToEvents(logging.Handler):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and not text.startswith(_KNOWN_NOISE):
            self._observer.event("library_warning", source=record.name, text=text.strip())


# Said by libraries at every run, about choices that are ours and tested.
_KNOWN_NOISE = (
    "Failed to load CPU gemm_4bit_forward from kernels-community",  # a faster kernel to download
)


class _Fields(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


# The events a person wants to see, in rich's markup; the others are for the log alone.
_TERMINAL = {
    "run_start": "[bold]lorajob[/bold] {version}: [bold]{name}[/bold] in {folder}",
    "stage_done": "  [green]done[/green]     {stage:<8} {seconds:6.1f} s  {note}",
    "stage_skipped": "  [dim]as before {stage:<8}           {note}[/dim]",
    "stopped_early": "  [dim]the held-out loss falls no more: stopped at step {step} of {of}[/dim]",
    "already_published": "  [green]nothing to do[/green]: the same run has published everything to {where}",
    "gpu": "  [dim]{text}[/dim]",
    "library_warning": "  [dim]{source}: {text}[/dim]",
    "warning": "  [yellow]warning[/yellow]  {text}",
    "publish_failed": "  [red]failed[/red]   publishing to {target}: {error}",
    "run_done": "[bold green]done[/bold green] in {seconds:.0f} s",
}
