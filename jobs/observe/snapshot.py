"""The run as its last events left it: what the live view and the metrics show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Moved = Literal["", "sent", "fetched"]

# In the order in which a run goes through them.
STAGES = (
    "preflight", "data", "train", "adapter", "merge", "gguf", "verify", "publish", "ended",
)  # fmt: skip


@dataclass
class Snapshot:
    """Hears every event and every tick. Written by the run, read by other threads at any moment, so
    each value is replaced whole."""

    clock: Callable[[], float] = time.monotonic
    name: str = ""
    version: str = ""
    stage: str = STAGES[0]
    step_done: int = 0
    step_total: int | None = None
    """How far the step is that has a bar now: rows, bytes, files; of training, optimizer steps."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last step of training, by the names of the event's fields."""
    eval_loss: float | None = None
    retention: dict[str, float] = field(default_factory=dict)
    """The last loss on each source of what the model should still know."""
    warnings: int = 0
    moved: dict[str, int] = field(default_factory=lambda: {"sent": 0, "fetched": 0})
    exit_code: int | None = None
    retries: Callable[[], int] = lambda: 0
    """How often services were tried again."""

    def __post_init__(self) -> None:
        self.last_sign = self.clock()
        self._safe_since: float | None = None
        self._first: tuple[float, int] | None = None  # when the first step of this start was done
        self._latest = 0.0

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        now = self.last_sign = self.clock()
        match event:
            case "run_start":
                self.name, self.version = fields["name"], fields["version"]
            case "stage_start":
                self.stage = fields["stage"]
                self.step_done, self.step_total = 0, None
                self._safe_since = now if self.stage == "train" else None
            case "stage_done" | "stage_failed":
                self._safe_since = None
            case "train_step":
                self.figures = {k: v for k, v in fields.items() if isinstance(v, int | float)}
                self._first = self._first or (now, fields["step"])
                self._latest = now
            case "eval":
                self.eval_loss = fields["eval_loss"]
            case "retention":
                self.retention = self.retention | {str(fields["source"]): fields["loss"]}
            case "checkpoint" if self._safe_since is not None:
                self._safe_since = now
            case "warning" | "library_warning" | "publish_failed":
                self.warnings += 1
            case "run_done" | "run_failed" | "run_stopped":
                self.stage, self.exit_code = "ended", fields.get("code", 0)

    def tick(self, done: int, total: int | None, count: int, moved: Moved) -> None:
        self.last_sign = self.clock()
        self.step_done, self.step_total = done, total
        if moved:
            self.moved[moved] += count
        if moved == "sent":
            self.stage = "publish"

    @property
    def figures_shown(self) -> bool:
        """Whether the live view has figures of training to show."""
        return self.stage == "train" and bool(self.figures)

    @property
    def progress(self) -> float | None:
        """Of the present step of the work, from 0 to 1; None where its length is not known."""
        if not self.step_total:
            return None
        return min(1.0, self.step_done / self.step_total)

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds of training that would be lost now; None where nothing is being trained."""
        return None if self._safe_since is None else self.clock() - self._safe_since

    @property
    def idle(self) -> float:
        """Seconds since anything happened."""
        return self.clock() - self.last_sign

    @property
    def seconds_left(self) -> float | None:
        """Of training, going by the steps of this start; None before the second of them."""
        if self.stage != "train" or self._first is None or "of" not in self.figures:
            return None
        began, first = self._first
        steps = int(self.figures["step"]) - first
        if steps < 1:
            return None
        a_step = (self._latest - began) / steps
        left = (int(self.figures["of"]) - int(self.figures["step"])) * a_step
        return max(0.0, left - (self.clock() - self._latest))
