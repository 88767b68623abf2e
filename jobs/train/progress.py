"""What happens between the steps: randomness, events, checkpoints, and being stopped."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jobs import stop
from jobs.errors import VerificationError
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.train import best
from jobs.train.fit import Plan
from jobs.train.retention import Retained

if TYPE_CHECKING:
    from jobs.train.trainer import Trainer

KEPT = "progress.json"  # of a checkpoint: what has been seen so far


class Progress(TrainerCallback):  # type: ignore[misc]
    """Is called by the trainer, and keeps what it has seen."""

    def __init__(
        self, observer: Observer, spec: Spec, tokens: int, retained: list[Retained]
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.eval_loss_before: float | None = None
        self.retention_before: list[float] = []  # of each source, as everywhere
        self.has_begun = False  # whether both are known
        self.seconds = 0.0  # of training, in this process
        self.observer = observer
        self.retained = retained
        self._settings = spec.checkpoints
        self._train = spec.train
        self._seed = spec.train.seed
        self._tokens_per_epoch = tokens
        self._best: dict[str, torch.Tensor] | None = None
        self._ticker: Any = None
        self._context: Any = None
        self._began_at = 0.0  # epochs done before this process
        self.trainer: Trainer
        self.plan: Plan

    # --- what a checkpoint keeps of it

    def keep(self, folder: Path) -> None:
        kept = {
            "history": self.history,
            "eval_loss_before": self.eval_loss_before,
            "retention_before": self.retention_before,
            "plan": self.plan.as_json(),
        }
        (folder / KEPT).write_text(json.dumps(kept), "utf-8")
        if self._best:
            # In each checkpoint, so that it is sent, checked and removed with it.
            save_file(self._best, folder / best.FILE)
        self._saved = time.monotonic()

    def take_up(self, folder: Path) -> None:
        kept = json.loads((folder / KEPT).read_text("utf-8"))
        self.history, self.eval_loss_before = kept["history"], kept["eval_loss_before"]
        self.retention_before = kept["retention_before"]
        self.has_begun = True
        self.plan = Plan(**kept["plan"])
        if (folder / best.FILE).exists():
            # Copies: the file may be written anew while its tensors are still in use.
            kept_best = load_file(folder / best.FILE)
            self._best = {name: weight.clone() for name, weight in kept_best.items()}

    def begun(self, eval_loss: float | None, retention: list[float]) -> None:
        """Hear of the losses before the first step."""
        self.eval_loss_before, self.retention_before = eval_loss, retention
        self.has_begun = True
        if eval_loss is not None:
            self.observer.event("eval", step=0, eval_loss=eval_loss)
        self.tell_retention(0, retention)

    def tell_retention(self, step: int, losses: list[float]) -> None:
        for each, before, loss in zip(self.retained, self.retention_before, losses, strict=True):
            self.observer.event(
                "retention", step=step, source=each.source, tokens=each.tokens, before=before,
                loss=loss,
            )  # fmt: skip

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """What the evaluation at a step found."""
        return next((e for e in self.history if e["step"] == step and "eval_loss" in e), None)

    # --- early stopping, and the best weights

    @property
    def is_exhausted(self) -> bool:
        """Whether early stopping ends the training here."""
        stopping = self._train.early_stopping
        return stopping is not None and best.is_exhausted(self.history, stopping)

    def put_best_back(self, step: int) -> int:
        """Give the model, which is that of `step`, the weights to export; returns their step."""
        found = best.best_of(self.history) if self._train.keeps_best else None
        if found is None or found["step"] == step:
            return step
        assert self._best is not None
        best.put_back(self.trainer.model, self._best)
        return int(found["step"])

    # --- called by the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = self._saved = time.monotonic()
        self._began_at = state.epoch or 0.0
        self._context = self.observer.ticker("training", state.max_steps)
        self._ticker = self._context.__enter__()
        self._ticker.advance(state.global_step)

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
            entry: dict[str, Any] = {
                "step": state.global_step,
                "eval_loss": round(logs["eval_loss"], 6),
            }
            self.observer.event("eval", **entry)
            if self.retained and "eval_retention_0" in logs:
                losses = [logs[f"eval_retention_{n}"] for n in range(len(self.retained))]
                entry["retention"] = losses
                self.tell_retention(state.global_step, losses)
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
            self._ticker.advance()
        else:
            return
        self.history.append(entry)
        if "eval_loss" in entry and self._train.keeps_best and best.best_of(self.history) is entry:
            self._best = best.weights_of(self.trainer.model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_exhausted:
            control.should_training_stop = True
            control.should_save = True  # what comes after training may be stopped as well

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context.__exit__(None, None, None)
