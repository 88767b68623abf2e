"""A training under the clock: when it got where, and how many tokens its optimizer steps had.

The same for lorajob's trainer and for those it is compared with: a whole step is what lies between
the ends of two optimizer steps, data loading and optimizer included, and only tokens that are not
padding count.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback


def tokens_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """How many tokens a batch holds that are not padding, left where they are: asking would make
    the device wait."""
    if "parts" in inputs:  # a whole step of lorajob's
        return [count for part in inputs["parts"] for count in tokens_of(part)]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return [mask.sum()]
    return [torch.tensor(inputs["input_ids"].numel())]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """Give it a trainer before training: it counts, and ends the training when it knows enough."""

    began: float
    """When the process was started, in seconds of the epoch."""
    warmup: int
    """Steps that do not count: kernels are compiled in them."""
    seconds: float
    """How long to measure; the training's own number of steps may end it before."""
    least: int = 4
    """Steps to measure at least."""
    callbacks: Sequence[TrainerCallback] = ()
    marks: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _pending: list[torch.Tensor] = field(default_factory=list)
    _reserved: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        reset = torch.cuda.reset_peak_memory_stats

        @functools.wraps(reset)
        def remembering(*args: Any, **kwargs: Any) -> None:
            self._reserved.append(torch.cuda.max_memory_reserved())
            reset(*args, **kwargs)

        # Others forget the highest mark while they look for a plan: it is kept here.
        torch.cuda.reset_peak_memory_stats = remembering

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.time() - self.began)

    def attach(self, trainer: Any) -> None:
        """Right before `trainer.train()`."""
        self.mark("ready")
        step = trainer.training_step

        @functools.wraps(step)
        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._pending += tokens_of(inputs)
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        for callback in (_Ticks(self), *self.callbacks):
            trainer.add_callback(callback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def step_ended(self) -> bool:
        """Note a step; whether enough is known."""
        synchronize()
        self.steps.append((time.time(), int(sum(int(count) for count in self._pending))))
        self._pending.clear()
        self.mark("first step")
        measured = len(self.steps) - self.warmup
        if measured < self.least:
            return False
        return self.steps[-1][0] - self.steps[self.warmup - 1][0] >= self.seconds

    def figures(self) -> dict[str, Any]:
        """What was measured, as JSON. Raises ValueError where nothing was, after the warm-up."""
        counted = self.steps[self.warmup :]
        if not counted:
            raise ValueError(f"{len(self.steps)} steps, {self.warmup} of them to warm up: too few")
        seconds = counted[-1][0] - self.steps[self.warmup - 1][0]
        tokens = sum(count for _, count in counted)
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_reserved() if gpu else 0
        return {
            "tokens_per_second": tokens / seconds,
            "seconds_a_step": seconds / len(counted),
            "tokens_a_step": tokens / len(counted),
            "steps": len(counted),
            "peak_gib": peak / 2**30,
            "peak_gib_with_search": max(peak, *self._reserved) / 2**30,
            "start_to_first_step": self.marks["first step"],
            "phases": phases(self.marks),
            "losses": self.losses,
            "gpu": torch.cuda.get_device_name() if gpu else "CPU",
        }


def phases(marks: dict[str, float]) -> dict[str, float]:
    """Seconds from each mark to the next, under the name of the later one."""
    ordered = sorted(marks.items(), key=lambda mark: mark[1])
    times = [0.0, *(at for _, at in ordered)]
    return {name: round(at - times[i], 2) for i, (name, at) in enumerate(ordered)}


class _Ticks(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._clock.step_ended():
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._clock.losses.append(float(logs["loss"]))
