"""The trainer: the library's loop on our batches and labels, in steps of parts that fit."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler

from jobs import stop
from jobs.spec import Train
from jobs.store.local import disk_error
from jobs.train.checkpoints import PREFIX, Checkpoints
from jobs.train.engines import engine
from jobs.train.loss import evaluate
from jobs.train.optimizer import OPTIMIZERS, AdamWTogether, optimizer_of
from jobs.train.progress import Progress
from jobs.train.rows import lengths_of
from jobs.train.runtime import has_bf16

Base: Any = engine().TRAINER


class Trainer(Base):  # type: ignore[misc]
    """The loop, with steps in parts that fit, and an evaluation in which each token counts the same.

    transformers averages the batches' means, in which a token of a short batch counts more.
    """

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and back through each part of a step; the mean loss over its trained tokens."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        tokens = torch.tensor(inputs["trained"], device=self.args.device)
        for number, part in enumerate(inputs["parts"]):
            if number:
                stop.check()  # nothing has changed since the last step but gradients
            with self.compute_loss_context_manager():
                loss = self.compute_loss(
                    model, self._prepare_inputs(part), num_items_in_batch=tokens
                )
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = lengths_of(self.train_dataset).tolist()
        return ByLength(self.args.train_batch_size, lengths, self.args.data_seed)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.args.optim == OPTIMIZERS["adamw_8bit"]:
            self.optimizer = AdamWTogether.like(super().create_optimizer(model))
        return super().create_optimizer(model)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would look for them in a batch of its own form

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        loss, tokens = self.measure(self.eval_dataset)
        metrics = {"eval_loss": loss, "eval_tokens": float(tokens)}
        if self.retention_between:
            # Before anything is told: where it is stopped in between, all of it is done again.
            losses = self.measure_retention()
            metrics |= {f"eval_retention_{number}": each for number, each in enumerate(losses)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def measure(self, rows: Dataset) -> tuple[float, int]:
        """The loss on some rows, in parts that fit as training's do, and how many tokens it is of."""
        self.measured = rows
        # Computed in the same precision before, in and after the training: accelerate wraps the
        # model only in it.
        with engine().with_logits(), self.accelerator.autocast():
            found = evaluate(self.model, self._parts(rows), self.args.device, self._between)
        self.measured = None
        return found

    def measure_retention(self) -> list[float]:
        return [round(self.measure(each.rows)[0], 6) for each in self.progress.retained]

    def _parts(self, rows: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        for step in self.get_eval_dataloader(rows):
            yield from step["parts"]

    def _between(self) -> None:
        stop.check()
        self.progress.observer.beat("evaluating")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one beside each checkpoint, about a model that nobody will see."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # Neither library says it with an OSError; torch's writer has no other failure than this.
            texts = (os.strerror(errno.ENOSPC), "inline_container")
            full = disk_error(OSError(errno.ENOSPC, ""), folder)
            shutil.rmtree(folder, ignore_errors=True)  # half of one only takes room
            if any(text in str(error) for text in texts):
                raise full from error
            raise
        # A pickle, and of no use: the arguments are made from the spec each time. And no state of
        # random generators: `Progress.on_step_begin` makes it from the step.
        for name in ("training_args.bin", "rng_state.pth", "README.md"):
            (folder / name).unlink(missing_ok=True)
        self.progress.keep(folder)
        last = self.state.global_step >= self.state.max_steps or self.progress.is_exhausted
        self.checkpoints.commit(folder, self.state.global_step, finished=last)

    optimizer: Any
    progress: Progress
    checkpoints: Checkpoints
    group_by_length: bool = False
    retention_between: bool = False
    """Whether each evaluation measures retention, too."""
    measured: Dataset | None = None
    """The rows that are just being measured."""


class ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Rows of like length together, in an order that depends on seed and epoch alone: so it is the
    same when a run is gone on with in a later epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)


def arguments_of(train: Train, folder: Path, rows: int, evaluates: bool, device: str) -> Any:
    epoch = math.ceil(rows / train.batch_size)  # steps
    steps = train.max_steps or math.ceil(epoch * train.epochs)
    warmup = int(train.warmup) if train.warmup >= 1 else math.ceil(train.warmup * steps)
    bf16 = device == "cuda" and has_bf16()
    return engine().ARGUMENTS(
        **engine().arguments(),
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule
        if train.schedule != "constant"
        else "constant_with_warmup",
        # The first step of a warm-up has a rate of 0: a training that is nothing else learns nothing.
        warmup_steps=min(warmup, steps - 1),
        weight_decay=train.weight_decay,
        optim=optimizer_of(train.optimizer, device),
        max_grad_norm=train.max_grad_norm,
        # By steps also where it is once per epoch: so it comes before the checkpoint of its step.
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_every or epoch,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN would be logged as 0
        save_strategy="no",
        report_to="none",
        seed=train.seed,
        data_seed=train.seed,
        bf16=bf16,
        fp16=device == "cuda" and not bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
