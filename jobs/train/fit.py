"""How a step's batch goes through the device: at once, or in parts that fit its memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Plan:
    """A step's rows in `accumulate` micro-batches of `rows` each.

    The loss is normalised over the step's trained tokens, whatever the plan: it changes rounding
    and nothing else.
    """

    rows: int
    accumulate: int

    @classmethod
    def whole(cls, batch_size: int, packing: bool) -> Self:
        # A packed row is a batch by itself: attention's cost grows with the square of what is laid
        # end to end.
        return cls(1, batch_size) if packing else cls(batch_size, 1)

    def smaller(self) -> Plan | None:
        """The next one that takes less memory, or None: half the rows, or fewer where those do not
        divide the step's."""
        total = self.rows * self.accumulate
        rows = next((n for n in range(self.rows // 2, 0, -1) if total % n == 0), 0)
        return Plan(rows, total // rows) if rows else None

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a class for it, a CPU's allocator only words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def try_longest(trainer: Any, rows: Any, lengths: Any, plan: Plan) -> None:
    """Take the longest micro-batch through the model, forward and back, and forget about it.

    What does not fit then fails now, and not hours later at the batch that happens to be longest.
    Raises what the allocator raises.
    """
    longest = sorted(range(len(lengths)), key=lambda row: -int(lengths[row]))[: plan.rows]
    batch = trainer.data_collator([dict(rows[row]) for row in longest])
    inputs = trainer._prepare_inputs(batch)
    model = trainer.model
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            trainer.compute_loss(model, inputs).backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
