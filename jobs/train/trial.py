"""Trying what fits: the longest rows forward and back, before the first step."""

from __future__ import annotations

import gc
from typing import Any

import torch
from datasets import Dataset

from jobs.spec import Spec
from jobs.train.engines import engine, engine_name
from jobs.train.fit import Plan, find_plan, whole
from jobs.train.memory import GIB, holds_unpacked, reckon
from jobs.train.memory import unpacked as as_unpacked
from jobs.train.shape import Shape, read_shape
from jobs.train.trainer import Trainer
from jobs.train.unpack import unpack


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
        # The trainer itself has the model multiply in 16 bit only once it trains.
        with torch.random.fork_rng(), trainer.accelerator.autocast():
            trainer.compute_loss(model, trainer._prepare_inputs(part)).backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def memory_for_training(spec: Spec) -> int:
    """Bytes of the GPU that torch's allocator may take, all together; it is held to them.

    What other programs have, and what this one has outside of the allocator, is left out.
    """
    there = torch.cuda.get_device_properties(0).total_memory
    limit = spec.limits.gpu_memory_gib
    total = min(there, int(limit * GIB)) if limit else there
    torch.zeros(1, device="cuda")  # so that what CUDA itself takes is taken
    free, all_of_it = torch.cuda.mem_get_info()
    others = all_of_it - free - torch.cuda.memory_reserved()
    left = total - max(0, others)
    torch.cuda.set_per_process_memory_fraction(left / there)
    return left


def unpack_if_there_is_room(model: Any, spec: Spec, lengths: list[int], left: int) -> bool:
    """Hold a 4-bit base unpacked, where the GPU has room for that and everything else."""
    shape = _shape_of(model)
    most, longest = whole(lengths, spec.train.batch_size), max(lengths)
    name = engine_name()
    if shape is None or not holds_unpacked(shape, spec, most, longest, left, name, left):
        return False
    return unpack(model) > 0


def fit(
    trainer: Trainer, rows: Dataset, lengths: list[int], spec: Spec, left: int, unpacked: bool
) -> Plan:
    """The fastest plan within `left` bytes, by trying: see `jobs.train.fit`."""
    model = trainer.model
    # Gradients and AdamW's two states are not there yet when a plan is tried.
    states: int = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)

    def peak(plan: Plan) -> int:
        engine().set_checkpointing(model, plan.checkpointing)
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        try_part(trainer, rows, lengths, plan.tokens)
        return int(torch.cuda.max_memory_allocated()) + states

    shape, longest = _shape_of(model), max(lengths)
    reckoned = None
    if shape:
        held = as_unpacked(spec) if unpacked else spec

        def reckoned(plan: Plan) -> int:
            return reckon(shape, held, plan, longest, engine_name(), left).allocated

    plan = find_plan(whole(lengths, spec.train.batch_size), longest, left, peak, reckoned)
    free_memory()
    return plan


def _shape_of(model: Any) -> Shape | None:
    """The shape that memory is reckoned from, if it can be."""
    return read_shape(model.config.to_dict())


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
