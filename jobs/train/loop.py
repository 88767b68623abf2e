"""The training loop: TRL's trainer on our batches and labels."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from jobs import stop
from jobs.data.labels import IGNORE
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DoesNotFitError, SpecError, VerificationError
from jobs.observe.events import Observer
from jobs.spec import Checkpoints as Settings
from jobs.spec import Spec, Train
from jobs.store.local import disk_error
from jobs.train.batches import FlatBatch, Item, PadBatch, StepBatch
from jobs.train.checkpoints import MARKER, PREFIX, Checkpoints
from jobs.train.engine import (
    add_lora,
    load_hf_tokenizer,
    load_model,
    quantized_modules,
    train_in_float32,
)
from jobs.train.engines import is_unsloth
from jobs.train.fit import Plan, find_plan, is_out_of_memory, whole
from jobs.train.loss import evaluate, trained_logits
from jobs.train.rows import lengths_of, load_rows, pack_rows
from jobs.train.runtime import device_name

KEPT = "progress.json"  # of a checkpoint: what has been seen so far
SMALLER_PLANS = 3  # how often memory may run out before the run ends
PROBES = 4  # conversations whose logits are kept, for verification to compare against


# unsloth rewrites TRL's trainer, which would put its own collator in place of ours: with it the
# plain one of transformers is the loop, and the loss is unsloth's kernel's.
Base: Any = transformers.Trainer if is_unsloth() else SFTTrainer
Arguments: Any = TrainingArguments if is_unsloth() else SFTConfig


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

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would look for them in a batch of its own form

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        with logits_wanted():
            loss, tokens = evaluate(
                self.model, self.eval_batches(), self.args.device, between=stop.check
            )
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": float(tokens)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def eval_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The held-out rows, in parts that fit as training's do."""
        for step in self.get_eval_dataloader():
            yield from step["parts"]

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
        # random generators: `_Progress.on_step_begin` makes it from the step.
        for name in ("training_args.bin", "rng_state.pth", "README.md"):
            (folder / name).unlink(missing_ok=True)
        self.progress.keep(folder)
        self.checkpoints.commit(folder, self.state.global_step)

    progress: _Progress
    checkpoints: Checkpoints


class _Progress(TrainerCallback):  # type: ignore[misc]
    """What happens between the steps: randomness, events, checkpoints, and being stopped."""

    def __init__(self, observer: Observer, settings: Settings, seed: int, tokens: int) -> None:
        self.history: list[dict[str, float]] = []
        self.eval_loss_before: float | None = None
        self._observer = observer
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
        self._context = self._observer.ticker("training", state.max_steps)
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
        self._observer.event("checkpoint", step=state.global_step)
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
            self._observer.event("eval", **entry)
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
            self._observer.event("train_step", of=state.max_steps, **entry)
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
    train_rows = load_rows(data / "train.arrow")
    eval_rows = load_rows(data / "eval.arrow")
    assert train_rows is not None
    if spec.train.packing:
        train_rows = pack_rows(train_rows, spec.model.max_seq_length)
    lengths: list[int] = lengths_of(train_rows).tolist()
    progress = _Progress(observer, spec.checkpoints, spec.train.seed, sum(lengths))
    if found:
        progress.take_up(found)
        observer.event("resumed", checkpoint=found.name)
    hf_tokenizer = load_hf_tokenizer(base, tokenizer)
    base_model = load(base, spec, device)
    in_4bit = quantized_modules(base_model)
    # The folder, not its name on the Hub: peft would ask there at every checkpoint.
    model = with_lora(base_model, spec, str(base))
    collate = choose_collate(model, spec, tokenizer, device, observer)
    if not found:
        # A packed row is a part by itself where attention's cost grows with the square of a part.
        limit = spec.model.max_seq_length
        progress.plan = Plan(limit if spec.train.packing else whole(lengths, spec.train.batch_size))

    def trainer_of(plan: Plan) -> Trainer:
        trainer = Trainer(
            model=model,
            args=_arguments(
                spec.train, checkpoints.folder, len(train_rows), eval_rows is not None, device
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=hf_tokenizer,
            data_collator=StepBatch(collate, plan.tokens),
            callbacks=[progress],
        )
        trainer.progress, trainer.checkpoints, progress.trainer = progress, checkpoints, trainer
        for callback in ("ProgressCallback", "PrinterCallback"):
            trainer.callback_handler.callbacks = [
                each
                for each in trainer.callback_handler.callbacks
                if type(each).__name__ != callback
            ]
        train_in_float32(model)
        set_checkpointing(model, plan.checkpointing)
        return trainer

    trainer = trainer_of(progress.plan)
    if device == "cuda" and not found:
        progress.plan = fit(trainer, train_rows, lengths, spec)
        observer.event("plan", **progress.plan.as_json())
        trainer = trainer_of(progress.plan)
    if eval_rows and not found:
        with logits_wanted():
            progress.eval_loss_before = round(
                evaluate(model, trainer.eval_batches(), trainer.args.device, stop.check)[0], 6
            )
    trainer = _run(trainer, trainer_of, found, train_rows, lengths)
    if eval_rows and not progress.evaluated(trainer.state.global_step):
        trainer.evaluate()
    model.eval()
    model.save_pretrained(out / "adapter")
    probe_rows = eval_rows if eval_rows else train_rows
    with logits_wanted():
        _keep_probe(
            model, probe_rows, PadBatch(tokenizer.pad_id), out / "probe.safetensors", device
        )
    losses = [entry["loss"] for entry in progress.history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in progress.history if "eval_loss" in entry]
    speeds = [e["tokens_per_second"] for e in progress.history if "tokens_per_second" in e]
    return {
        "steps": trainer.state.global_step,
        "train_loss": round(sum(losses) / len(losses), 6),
        "eval_loss_before": progress.eval_loss_before,
        "eval_loss": evals[-1] if evals else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_second": speeds[-1] if speeds else None,
        "device": device,
        "plan": progress.plan.as_json(),
        "quantized_modules": in_4bit,
        "history": progress.history,
    }


def _run(
    trainer: Trainer,
    trainer_of: Callable[[Plan], Trainer],
    found: Path | None,
    rows: Dataset,
    lengths: list[int],
) -> Trainer:
    """Train to the end, from a checkpoint where there is one; returns the trainer that got there.

    Where memory runs out, the step is taken in smaller parts, from where training had got to.
    """
    progress = trainer.progress
    longest = max(lengths)
    for smaller in range(SMALLER_PLANS + 1):
        try:
            if not found or smaller:
                try_part(trainer, rows, lengths, progress.plan.tokens)
            _train_from(trainer, found)
            return trainer
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
        plan = progress.plan.smaller(longest)
        if plan is None or smaller == SMALLER_PLANS:
            raise DoesNotFitError(
                f"memory runs out with {progress.plan.tokens} tokens at a time, and the longest row "
                f"has {longest}: {why}",
                f"lower model.max_seq_length below {longest}, load the base in 4bit, lower lora.rank, "
                "or take a device with more memory",
            )
        progress._observer.warn(
            f"memory ran out with {progress.plan.tokens} tokens at a time; going on with {plan.tokens}"
        )
        step = trainer.state.global_step
        if step and step != _step_of(found):
            trainer._save_checkpoint(trainer.model, None)
            found = trainer.checkpoints.newest()
        progress.plan = plan
        trainer.optimizer = trainer.lr_scheduler = None
        free_memory()
        trainer = trainer_of(plan)
    raise AssertionError


def try_part(trainer: Trainer, rows: Dataset, lengths: list[int], tokens: int) -> None:
    """Take the longest rows, up to so many tokens, through the model forward and back, and forget it.

    What does not fit then fails now, and not hours later at the batch that happens to be longest.
    Raises what the allocator raises.
    """
    chosen: list[int] = []
    size = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if chosen and size + lengths[row] > tokens:
            break
        chosen.append(row)
        size += lengths[row]
    items = [dict(rows[row]) for row in chosen]
    while size + max(lengths) <= tokens and len(items) < trainer.args.per_device_train_batch_size:
        items.append(items[0])  # fewer rows than tokens: some twice
        size += len(items[0]["input_ids"])
    part = trainer.data_collator.collate(items)
    model = trainer.model
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), trainer.compute_loss_context_manager():
            trainer.compute_loss(model, trainer._prepare_inputs(part)).backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def fit(trainer: Trainer, rows: Dataset, lengths: list[int], spec: Spec) -> Plan:
    """The fastest plan for this GPU, by trying: see `jobs.train.fit`."""
    model = trainer.model
    total = torch.cuda.get_device_properties(0).total_memory
    if spec.limits.gpu_memory_gib:
        total = min(total, int(spec.limits.gpu_memory_gib * 2**30))
        torch.cuda.set_per_process_memory_fraction(
            total / torch.cuda.get_device_properties(0).total_memory
        )
    free_memory()
    others = (
        torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    )
    # Gradients and AdamW's two states are not there yet when a plan is tried.
    states: int = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)

    def peak(plan: Plan) -> int:
        set_checkpointing(model, plan.checkpointing)
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        try_part(trainer, rows, lengths, plan.tokens)
        taken: int = torch.cuda.max_memory_allocated()
        return int(taken + states)

    plan = find_plan(
        whole(lengths, spec.train.batch_size), max(lengths), total - max(0, others), peak
    )
    free_memory()
    return plan


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load(folder: Path, spec: Spec, device: str) -> Any:
    """The base model, by the engine that was started."""
    if is_unsloth():
        from jobs.train import engine_unsloth

        return engine_unsloth.load_model(
            folder, spec.model.load_in, device, spec.model.max_seq_length
        )
    return load_model(folder, spec.model.load_in, device)


def with_lora(model: Any, spec: Spec, base: str) -> Any:
    if is_unsloth():
        from jobs.train import engine_unsloth

        return engine_unsloth.add_lora(model, spec.lora, base, spec.train.seed)
    return add_lora(model, spec.lora, base)


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Whether activations are made again in the backward pass."""
    if is_unsloth():
        from jobs.train import engine_unsloth

        engine_unsloth.set_checkpointing(model, wanted)
    elif wanted:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def logits_wanted() -> AbstractContextManager[None]:
    """Within, the model gives logits; unsloth else computes the loss without ever holding them."""
    if is_unsloth():
        from jobs.train import engine_unsloth

        return engine_unsloth.with_logits()
    return nullcontext()


def choose_collate(
    model: Any, spec: Spec, tokenizer: ChatTokenizer, device: str, observer: Observer
) -> PadBatch | FlatBatch:
    """Rows laid end to end without padding, where the model keeps conversations apart; on a CPU
    only for packed ones, because nothing is gained there."""
    if not spec.train.packing and device == "cpu":
        return PadBatch(tokenizer.pad_id)
    flat = FlatBatch(lengths=is_unsloth())
    if is_unsloth():
        from jobs.train import engine_unsloth

        kernel = engine_unsloth.use_varlen_kernel()
        observer.event("kernel", attention=kernel)
        if kernel.startswith("SDPA") and device == "cuda":
            observer.warn(f"attention runs slower than it could: {kernel}")
    with logits_wanted():
        apart = _is_isolated(model, flat)
    if apart:
        return flat
    if spec.train.packing:
        raise SpecError(
            "train.packing: with this base model's architecture packed conversations see each other",
            "set train.packing to false",
        )
    observer.warn("this architecture mixes conversations that are laid end to end: padding them")
    return PadBatch(tokenizer.pad_id)


def _step_of(folder: Path | None) -> int:
    return int(folder.name.removeprefix(PREFIX)) if folder else 0


def _train_from(trainer: Trainer, found: Path | None) -> None:
    state = TrainerState.load_from_json(str(found / "trainer_state.json")) if found else None
    if found and state and state.global_step >= state.max_steps:
        # Only what came after training is missing; transformers would do one more step.
        trainer._load_from_checkpoint(str(found))
        trainer.state = state
        return
    try:
        # Within a step nothing may be interrupted: the weights would be half of one step and half
        # of the next. `stop.check` stands where everything is consistent.
        with stop.deferred():
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    except stop.Stop:
        step = trainer.state.global_step
        marker = trainer.checkpoints.folder / f"{PREFIX}{step}" / MARKER
        if step and not marker.exists():
            trainer._save_checkpoint(trainer.model, None)
        raise


def _arguments(train: Train, folder: Path, rows: int, evaluates: bool, device: str) -> Any:
    steps = train.max_steps or max(1, math.ceil(rows / train.batch_size * train.epochs))
    warmup = train.warmup if train.warmup >= 1 else math.ceil(train.warmup * steps)
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    arguments: dict[str, Any] = (
        {}
        if is_unsloth()
        else {
            # The head's logits are computed for trained tokens only, some at a time: same mathematics.
            "loss_type": "chunked_nll",
            # The data is ready: TRL must neither prepare, cut, pack nor mask anything.
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
            "packing": False,
        }
    )
    return Arguments(
        **arguments,
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule
        if train.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=int(warmup),
        weight_decay=train.weight_decay,
        optim={"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}[train.optimizer],
        max_grad_norm=train.max_grad_norm,
        # By steps also where it is once per epoch: so it comes before the checkpoint of its step.
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_every or math.ceil(rows / train.batch_size),
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


@torch.no_grad()
def _is_isolated(model: Any, flat: FlatBatch) -> bool:
    """Whether conversations that are laid end to end do not see each other.

    Several architectures of transformers 5.17 (among them opt, bloom, mpt, mamba, gpt_oss) mix the
    conversations of a row without a warning, so it is tried: another first conversation must not
    change what the model says in the second.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    second = []
    for first in (range(1, 9), range(9, 17)):
        items: list[Item] = [
            {"input_ids": list(ids), "labels": list(ids)} for ids in (first, range(17, 25))
        ]
        batch = {name: tensor.to(device) for name, tensor in flat(items).items()}
        second.append(trained_logits(model, batch)[0][-7:])
    model.train(was_training)
    return torch.equal(*second)


@torch.no_grad()
def _keep_probe(
    model: PeftModel, rows: Dataset, collate: PadBatch, path: Path, device: str
) -> None:
    """Keep some conversations with the logits that training ended with."""
    items = [dict(rows[index]) for index in range(min(PROBES, len(rows)))]
    batch = collate(items)  # type: ignore[arg-type]
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    logits, targets = trained_logits(model, on_device)
    assert IGNORE not in targets
    save_file({**batch, "logits": logits.cpu().contiguous()}, path)
