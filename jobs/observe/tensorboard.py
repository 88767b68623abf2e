"""TensorBoard's files, in the run's logs/tensorboard: `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.observe.scalars import EVENTS, history_of, scalars, step_of


class TensorBoard:
    """Writes each step once, also where a run went on from a checkpoint before its last step."""

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._writer: Any = None
        self._from: Path | None = None

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        if event == "stage_start" and fields["stage"] == "train":
            self.close()
            self._from = None
        elif event == "resumed":
            self._from = self._checkpoints / fields["checkpoint"]
        elif event in EVENTS:
            if self._writer is None:
                self._open()
            self._write(fields)
        elif event in ("stage_done", "stage_failed"):
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> None:
        # With torch there already this takes a tenth of a second, and without it five: so not before
        # there is a training.
        from tensorboardX import SummaryWriter

        here = any(self._folder.glob("events.out.tfevents.*"))
        # TensorBoard leaves out what older files say of this step and later ones.
        after = step_of(self._from.name) + 1 if self._from else 0
        self._writer = SummaryWriter(
            str(self._folder), purge_step=after if here else None, flush_secs=5
        )
        for entry in history_of(self._from) if self._from and not here else []:
            self._write(entry)  # of another machine, whose files stayed there

    def _write(self, fields: dict[str, Any]) -> None:
        for name, value in scalars(fields).items():
            self._writer.add_scalar(name, value, fields["step"])
