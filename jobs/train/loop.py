"""The training: from the base model and labelled rows to the adapter."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerState, set_seed

from jobs import stop
from jobs.data.labels import IGNORE
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DoesNotFitError
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.train.batches import PadBatch, StepBatch
from jobs.train.checkpoints import MARKER, PREFIX, Checkpoints
from jobs.train.engine_transformers import load_hf_tokenizer, quantized_modules, train_in_float32
from jobs.train.engines import engine
from jobs.train.figures import gpu_figures, in_words
from jobs.train.fit import Plan, is_out_of_memory, whole
from jobs.train.isolation import choose_collate
from jobs.train.loss import on_device, trained_logits
from jobs.train.progress import Progress
from jobs.train.retention import is_cheap, load_retained, result_of, warn_of_forgetting
from jobs.train.rows import lengths_of, load_epoch, load_rows, pack_rows
from jobs.train.runtime import device_name
from jobs.train.trainer import Trainer, arguments_of
from jobs.train.trial import (
    fit,
    free_memory,
    memory_for_training,
    try_part,
    unpack_if_there_is_room,
)

SMALLER_PLANS = 3  # how often memory may run out before the run ends
PROBES = 4  # conversations whose logits are kept, for verification to compare against,
PROBED = 256  # and how many of their trained tokens


def train(
    spec: Spec,
    base: Path,
    tokenizer: ChatTokenizer,
    data: Path,
    out: Path,
    checkpoints: Checkpoints,
    observer: Observer,
) -> dict[str, Any]:
    """Train and write `out/adapter` and `out/probe.safetensors`; returns metrics as JSON.

    `data` is what `prepare` wrote. Goes on with the newest of the `checkpoints`. Told to stop, it
    keeps what was reached as one more and raises `Stop`. Raises DoesNotFitError when memory runs
    out, VerificationError when training diverges.
    """
    device = device_name()
    set_seed(spec.train.seed)
    found = checkpoints.newest()  # before anything is loaded: the spec may have changed
    train_rows = conversations = load_epoch(data)
    eval_rows = load_rows(data / "eval.arrow")
    retained = load_retained(data)
    if spec.train.packing:
        train_rows = pack_rows(train_rows, spec.model.max_seq_length)
    lengths: list[int] = lengths_of(train_rows).tolist()
    progress = Progress(observer, spec, sum(lengths), retained)
    if found:
        progress.take_up(found)
        observer.event("resumed", checkpoint=found.name)
    hf_tokenizer = load_hf_tokenizer(base, tokenizer)
    gc.freeze()  # all that was imported lives to the end: no need to look through it again
    left = memory_for_training(spec) if device == "cuda" else 0
    base_model = engine().load(base, spec.model, device)
    in_4bit = quantized_modules(base_model)
    weights = base_model.num_parameters()  # knows how many stand in a byte
    unpacked = device == "cuda" and unpack_if_there_is_room(base_model, spec, lengths, left)
    model = engine().add_lora(base_model, spec, base)
    collate = choose_collate(model, spec, tokenizer, device, observer)
    if not found:
        # A packed row is a part by itself where attention's cost grows with the square of a part.
        limit = spec.model.max_seq_length
        progress.plan = Plan(limit if spec.train.packing else whole(lengths, spec.train.batch_size))

    def trainer_of(plan: Plan) -> Trainer:
        trainer = Trainer(
            model=model,
            args=arguments_of(
                spec.train, checkpoints.folder, len(train_rows), eval_rows is not None, device
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=hf_tokenizer,
            data_collator=StepBatch(collate, plan.tokens),
            callbacks=[progress],
        )
        trainer.progress, trainer.checkpoints, progress.trainer = progress, checkpoints, trainer
        trainer.group_by_length = spec.train.group_by_length
        between = trainer.args.eval_steps * spec.train.batch_size / len(train_rows)
        trainer.retention_between = is_cheap(retained, between * sum(lengths))
        for callback in ("ProgressCallback", "PrinterCallback"):
            trainer.callback_handler.callbacks = [
                each
                for each in trainer.callback_handler.callbacks
                if type(each).__name__ != callback
            ]
        train_in_float32(model)
        engine().set_checkpointing(model, plan.checkpointing)
        return trainer

    trainer = trainer_of(progress.plan)
    if device == "cuda" and not found:
        progress.plan = fit(trainer, train_rows, lengths, spec, left, unpacked)
        observer.event("plan", **progress.plan.as_json(), unpacked=unpacked)
        trainer = trainer_of(progress.plan)
    gc.collect()
    gc.freeze()  # the model, too: a full collection takes a third of a second, and came every few steps
    trainer, ended = _run(trainer, trainer_of, found, train_rows, lengths, tried=device == "cuda")
    steps = trainer.state.global_step
    stopped_early = steps < trainer.state.max_steps
    retention = result_of(retained, progress.retention_before, ended.retention)
    warn_of_forgetting(retention, spec.data.retention_limit, bool(spec.data.replay), observer)
    model.eval()
    model.save_pretrained(out / "adapter")
    probe_rows = eval_rows or conversations
    with engine().with_logits():
        _keep_probe(
            model, probe_rows, PadBatch(tokenizer.pad_id), out / "probe.safetensors", device,
            progress.plan.tokens,
        )  # fmt: skip
    losses = [entry["loss"] for entry in progress.history if "loss" in entry]
    exported = progress.evaluation(ended.step)
    speeds = [e["tokens_per_second"] for e in progress.history if "tokens_per_second" in e]
    speed = speeds[-1] if speeds else None
    gpu = None
    if device == "cuda":
        gpu = gpu_figures(weights, speed, progress.seconds)
        observer.event("gpu", text=in_words(gpu), **gpu)
    return {
        "steps": steps,
        "max_steps": trainer.state.max_steps,
        "stopped_early": stopped_early,
        "best_step": ended.step if spec.train.keeps_best else None,
        "train_loss": round(sum(losses) / len(losses), 6),
        "eval_loss_before": progress.eval_loss_before,
        "eval_loss": exported["eval_loss"] if exported else None,
        "retention": retention,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_second": speed,
        "device": device,
        "gpu": gpu,
        "plan": progress.plan.as_json() | {"unpacked": unpacked},
        "quantized_modules": in_4bit,
        "history": progress.history,
    }


@dataclass(frozen=True)
class Ended:
    """What the training ended with: the step whose weights the model has, and what it retained."""

    step: int
    retention: list[float]


def _run(
    trainer: Trainer,
    trainer_of: Callable[[Plan], Trainer],
    found: Path | None,
    rows: Dataset,
    lengths: list[int],
    tried: bool,
) -> tuple[Trainer, Ended]:
    """Train to the end, from a checkpoint where there is one, and measure before, in between and
    after; returns the trainer that got there.

    `tried` says that the plan has been seen to fit. Where memory runs out, in training or measuring,
    it goes on in smaller parts from where it had got to.
    """
    progress = trainer.progress
    longest = max(lengths)
    for smaller in range(SMALLER_PLANS + 1):
        try:
            if smaller or not (found or tried):
                try_part(trainer, rows, lengths, progress.plan.tokens)
            if not progress.has_begun:
                _measure_before(trainer)
            _train_from(trainer, found)
            return trainer, _end(trainer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
        plan = progress.plan.smaller(longest)
        if plan is None or smaller == SMALLER_PLANS:
            measured = trainer.measured
            most = longest if measured is None else int(lengths_of(measured).max())
            raise DoesNotFitError(
                f"memory runs out {'training' if measured is None else 'evaluating'} with "
                f"{progress.plan.tokens} tokens at a time, and the longest row has {most}: {why}",
                f"lower model.max_seq_length below {most}, load the base in 4bit, lower lora.rank, "
                "or take a device with more memory",
            )
        progress.observer.warn(
            f"memory ran out with {progress.plan.tokens} tokens at a time; going on with {plan.tokens}"
        )
        step = trainer.state.global_step
        if step and step != _step_of(found):
            if not _is_kept(trainer):
                trainer._save_checkpoint(trainer.model, None)
            found = trainer.checkpoints.newest()
        progress.plan = plan
        trainer.optimizer = trainer.lr_scheduler = None
        free_memory()
        trainer = trainer_of(plan)
    raise AssertionError


def _measure_before(trainer: Trainer) -> None:
    loss = None
    if trainer.eval_dataset is not None:
        loss = round(trainer.measure(trainer.eval_dataset)[0], 6)
    trainer.progress.begun(loss, trainer.measure_retention())


def _end(trainer: Trainer) -> Ended:
    """Measure what is left to measure, and settle which weights are exported."""
    progress, last = trainer.progress, trainer.state.global_step
    if trainer.eval_dataset is not None and not progress.evaluation(last):
        trainer.evaluate()
    step = progress.put_best_back(last)
    if last < trainer.state.max_steps:
        progress.observer.event(
            "stopped_early", step=last, of=trainer.state.max_steps, best_step=step
        )
    losses: list[float] | None = (progress.evaluation(step) or {}).get("retention")
    if losses is None:
        losses = trainer.measure_retention()
        progress.tell_retention(step, losses)
    return Ended(step, losses)


def _step_of(folder: Path | None) -> int:
    return int(folder.name.removeprefix(PREFIX)) if folder else 0


def _train_from(trainer: Trainer, found: Path | None) -> None:
    if found and _is_at_the_end(trainer, found):
        return  # only what came after training is missing; transformers would do one more step
    started = time.monotonic()
    try:
        # Within a step nothing may be interrupted: the weights would be half of one step and half
        # of the next. `stop.check` stands where everything is consistent.
        with stop.deferred():
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    except stop.Stop:
        if trainer.state.global_step and not _is_kept(trainer):
            trainer._save_checkpoint(trainer.model, None)
        raise
    finally:
        trainer.progress.seconds += time.monotonic() - started


def _is_at_the_end(trainer: Trainer, found: Path) -> bool:
    """Whether the checkpoint is the training's last one; the trainer is then as it was there.

    An evaluation that was stopped in the middle is done again first: it may be the one that ends it.
    """
    progress, arguments = trainer.progress, trainer.args
    state = TrainerState.load_from_json(str(found / "trainer_state.json"))
    due = arguments.eval_strategy != "no" and state.global_step % int(arguments.eval_steps) == 0
    missing = due and not progress.evaluation(state.global_step)
    ended = state.global_step >= state.max_steps
    if missing or ended or progress.is_exhausted:
        trainer._load_from_checkpoint(str(found))
        trainer.state = state
    if missing:
        trainer.evaluate()
    return ended or progress.is_exhausted


def _is_kept(trainer: Trainer) -> bool:
    """Whether there is a whole checkpoint of where the trainer is."""
    name = f"{PREFIX}{trainer.state.global_step}"
    return (trainer.checkpoints.folder / name / MARKER).exists()


@torch.no_grad()
def _keep_probe(
    model: PeftModel, rows: Dataset, collate: PadBatch, path: Path, device: str, tokens: int
) -> None:
    """Keep some conversations with the logits that training ended with: as many as are no more than
    so many tokens, which are known to fit."""
    items = [dict(rows[index]) for index in range(min(PROBES, len(rows)))]
    while len(items) > 1 and len(items) * max(len(i["input_ids"]) for i in items) > tokens:
        items.pop()
    batch = collate(items)  # type: ignore[arg-type]
    logits, targets = trained_logits(model, on_device(batch, device), PROBED)
    assert IGNORE not in targets
    save_file({**batch, "logits": logits.cpu().contiguous()}, path)
