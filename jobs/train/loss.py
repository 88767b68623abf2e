"""The loss as evaluation and verification measure it: exact sums over trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from jobs.data.labels import IGNORE


def trained_logits(
    model: torch.nn.Module, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict each trained token, and those tokens: (tokens, vocab) and (tokens,).

    `batch` is as PadBatch or FlatBatch made it. The logits are float32. The token at position t is
    predicted at t - 1.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # With a cache transformers does not keep a FlatBatch's conversations apart.
    logits = model(**inputs, use_cache=False).logits
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE
    return logits[:, :-1][trained].float(), targets[trained]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Mean loss in nats per trained token over all batches, and the number of those tokens.

    Each token counts the same, whatever the batch it is in. The model's mode is kept. `between` is
    called after each batch, and may raise.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        logits, targets = trained_logits(model, on_device(batch, device))
        total += cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
        between()
    model.train(was_training)
    return (total / count if count else float("nan")), count


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors there; what else is told stays as it is."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
