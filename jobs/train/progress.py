"""What happens between the steps: randomness, events, checkpoints, and being stopped."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jobs import stop
from jobs.errors import VerificationError
from jobs.observe.events import Observer
from jobs.spec import Checkpoints as Settings
from jobs.train.fit import Plan

if TYPE_CHECKING:
    from jobs.train.trainer import Trainer

KEPT = "progress.json"  # of a checkpoint: what has been seen so far


class Progress(TrainerCallback):  # type: ignore[misc]
    """Is called by the trainer, and keeps what it has seen."""

    def __init__(self, observer: Observer, settings: Settings, seed: int, tokens: int) -> None:
        self.history: list[dict[str, float]] = []
        self.eval_loss_before: float | None = None
        self.observer = observer
        self._settings = settings
        self._seed = seed
        self._tokens_per_epoch = tokens
        self._ticker: Any = None
        self._context: Any = None
        self._eval_note = ""
        self._began_at = 0.0  # epochs done before this process
        self.trainer: Trainer
        self.plan: Plan

    # --- what a checkpoint keeps of it

    def keep(self, folder: Path) -> None:
        kept = {
            "history": self.history,
            "eval_loss_before": self.eval_loss_before,
            "plan": self.plan.as_json(),
        }
        (folder / KEPT).write_text(json.dumps(kept), "utf-8")
        self._saved = time.monotonic()

    def take_up(self, folder: Path) -> None:
        kept = json.loads((folder / KEPT).read_text("utf-8"))
        self.history, self.eval_loss_before = kept["history"], kept["eval_loss_before"]
        self.plan = Plan(**kept["plan"])

    def evaluated(self, step: int) -> bool:
        return any(entry["step"] == step and "eval_loss" in entry for entry in self.history)

    # --- called by the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = self._saved = time.monotonic()
        self._began_at = state.epoch or 0.0
        self._context = self.observer.ticker("training", state.max_steps)
        self._ticker = self._context.__enter__()
        self._ticker.advance(state.global_step)
        due = args.eval_strategy != "no" and state.global_step % int(args.eval_steps) == 0
        if state.global_step and due and not self.evaluated(state.global_step):
            self.trainer.evaluate()  # which was stopped in the middle

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Dropout depends on the seed and the step alone, not on what was drawn before: so it is the
        # same after a resume, with evaluations in between, and however the data are loaded.
        torch.manual_seed(self._seed + (state.global_step << 32))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        every = self._settings.every_steps
        minutes = (time.monotonic() - self._saved) / 60
        last = state.global_step >= state.max_steps
        due = minutes >= self._settings.every_minutes
        due = due or bool(every and state.global_step % every == 0)
        # The last one too: what comes after training may be stopped as well.
        control.should_save = due or last or stop.asked()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.observer.event("checkpoint", step=state.global_step)
        stop.check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            entry = {"step": state.global_step, "eval_loss": round(logs["eval_loss"], 6)}
            self._eval_note = f" eval {entry['eval_loss']:.3f}"
            self.observer.event("eval", **entry)
        elif "loss" in logs:
            loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise VerificationError(
                    f"training has diverged: at step {state.global_step} the loss is {loss} and the "
                    f"gradient's norm {grad_norm}; the last checkpoint before it is kept",
                    "lower train.learning_rate, or look at the data of the last steps",
                )
            seconds = time.monotonic() - self._start
            done = ((state.epoch or 0.0) - self._began_at) * self._tokens_per_epoch
            entry = {
                "step": state.global_step,
                "epoch": round(state.epoch or 0.0, 3),
                "loss": round(loss, 6),
                "learning_rate": logs.get("learning_rate", 0.0),
                "grad_norm": round(grad_norm, 4),
                "tokens_per_second": round(done / seconds, 1),
            }
            self.observer.event("train_step", of=state.max_steps, **entry)
            self._ticker.advance(
                1, f"loss {loss:.3f}{self._eval_note}  {entry['tokens_per_second']:.0f} tok/s"
            )
        else:
            return
        self.history.append(entry)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context.__exit__(None, None, None)
