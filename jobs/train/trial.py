"""Trying what fits: the longest rows forward and back, before the first step."""

from __future__ import annotations

import gc

import torch
from datasets import Dataset

from jobs.spec import Spec
from jobs.train.engines import engine
from jobs.train.fit import Plan, find_plan, whole
from jobs.train.trainer import Trainer


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
        engine().set_checkpointing(model, plan.checkpointing)
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
