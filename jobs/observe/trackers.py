"""Weights & Biases and MLflow, where a run asks for them.

Each lives in a thread of its own with a queue: one that is slow, hangs or fails costs the run nothing
but a warning. Their packages are the user's to install; addresses and credentials are their own
environment variables, never the spec's.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jobs import stop
from jobs.observe.scalars import EVENTS, history_of, scalars

ENOUGH = 15.0  # seconds that a tracker has at the end to send what is left,
STOPPED = 3.0  # and where the run has been told to stop


class NotReady(Exception):
    """It is not installed, or has not been told where to go."""


class Tracker(Protocol):
    def start(self, name: str, config: dict[str, Any], before: str | None) -> str:
        """Begin a run, or go on with the one called `before`; returns what it is called."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self, code: int) -> None: ...


class WandB:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, name: str, config: dict[str, Any], before: str | None) -> str:
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        if not offline and not os.environ.get("WANDB_API_KEY"):
            raise NotReady("set WANDB_API_KEY, or WANDB_MODE=offline")
        try:
            import wandb
        except ImportError:
            raise NotReady("it is not installed: pip install wandb") from None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "lorajob",
            name=name,
            config=config,
            id=before,
            resume="allow" if before else None,
            dir=str(self._folder),
            # Its own lines would stand between the run's JSON lines.
            settings=wandb.Settings(silent=True, console="off"),
        )
        return str(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)


class MLflow:
    def start(self, name: str, config: dict[str, Any], before: str | None) -> str:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise NotReady("set MLFLOW_TRACKING_URI")
        try:
            import mlflow
            from mlflow.entities import Metric, Param
        except ImportError:
            raise NotReady("it is not installed: pip install mlflow-skinny") from None
        self._metric = Metric
        self._client = mlflow.MlflowClient()
        if before:
            self._client.update_run(before, status="RUNNING")
            self._id = before
            return before
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lorajob"
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = str(self._client.create_run(place, run_name=name).info.run_id)
        params = [Param(key, value[:500]) for key, value in flat(config).items()]
        for start in range(0, len(params), 100):  # as many as it takes at a time
            self._client.log_batch(self._id, params=params[start : start + 100])
        return self._id

    def log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, code: int) -> None:
        status = {0: "FINISHED", 20: "KILLED"}.get(code, "FAILED")
        self._client.set_terminated(self._id, status=status)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"epochs": 1}} as {"train.epochs": "1"}; what is unset is left out."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found


class Tracking:
    """Hands a tracker the curves, beginning with the first step of training."""

    def __init__(
        self, kind: str, tracker: Tracker, name: str, config: dict[str, Any], logs: Path,
        checkpoints: Path, warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._kind, self._tracker, self._name, self._config = kind, tracker, name, config
        self._id = logs / f"{kind}.id"  # which run of the tracker's this is, to go on with it
        self._checkpoints, self._warn = checkpoints, warn
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._from: Path | None = None
        self._code = 1  # unless the run says how it ended
        self._failed = False

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        if event == "resumed":
            self._from = self._checkpoints / fields["checkpoint"]
        elif event in EVENTS:
            if self._thread is None:
                self._begin()
            values, step = scalars(fields), fields["step"]
            self._queue.put(lambda: self._tracker.log(values, step))
        elif event == "run_done":
            self._code = 0
        elif event in ("run_failed", "run_stopped"):
            self._code = fields["code"]

    def close(self) -> None:
        if self._thread is None:
            return
        code = self._code
        self._queue.put(lambda: self._tracker.finish(code))
        self._queue.put(_end)
        self._thread.join(STOPPED if stop.asked() else ENOUGH)
        if self._thread.is_alive() and not self._failed:
            self._warn(f"{self._kind} takes too long and is not waited for")

    def _begin(self) -> None:
        came_from = self._from

        def start() -> None:
            before = None
            with suppress(OSError):
                before = self._id.read_text("utf-8") if came_from else None
            ours = self._tracker.start(self._name, self._config, before)
            self._id.parent.mkdir(parents=True, exist_ok=True)
            self._id.write_text(ours, "utf-8")
            if came_from and not before:
                for entry in history_of(came_from):
                    self._tracker.log(scalars(entry), entry["step"])

        self._queue.put(start)
        self._thread = threading.Thread(target=self._work, name=self._kind, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (do := self._queue.get()) is not _end:
            if self._failed:
                continue
            try:
                do()
            except Exception as error:
                self._failed = True
                self._warn(f"{self._kind} gets nothing of this run: {error}")


def _end() -> None:
    """Stands in the queue after the last thing to do."""
