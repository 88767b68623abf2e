"""The loss as evaluation and verification measure it: exact sums over trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast

from jobs.data.labels import IGNORE

ROWS = 1024  # of logits at a time,
BYTES = 512 * 2**20  # and no more of them in float32 than this: 1024 over 128 thousand tokens


def trained_logits(
    model: torch.nn.Module, batch: dict[str, Any], limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict each trained token, and those tokens: (tokens, vocab) and (tokens,).

    `batch` is as PadBatch or FlatBatch made it; of its trained tokens the first `limit` count. The
    logits are float32. The token at position t is predicted at t - 1.
    """
    parts = list(in_chunks(model, batch, limit or batch["labels"].numel(), limit))
    return torch.cat([logits for logits, _ in parts]), torch.cat([tokens for _, tokens in parts])


def in_chunks(
    model: Any, batch: dict[str, Any], rows: int, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same, `rows` at a time: what a model's head makes of a whole batch would be the largest
    tensor there is.

    The head is applied only where it is wanted, by the model's own code: its backbone is made to
    return those positions alone, and then to stand in with the rest of what it has computed.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE
    targets = targets[trained][:limit]
    if not targets.numel():
        return
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal.base_model
    states: list[torch.Tensor] = []

    def first_rows(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0]
        states.append(hidden[:, :-1][trained][:limit][None])
        return type(output)(last_hidden_state=states[0][:, :rows])

    training = as_in_training(model)
    hook = backbone.register_forward_hook(first_rows)
    try:
        # With a cache transformers does not keep a FlatBatch's conversations apart.
        with training:
            logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    yield logits[0].float(), targets[:rows]
    for start in range(rows, len(targets), rows):
        part = states[0][:, start : start + rows]
        output = BaseModelOutputWithPast(last_hidden_state=part)
        own = backbone.__dict__.get("forward")
        backbone.forward = lambda *args, output=output, **kwargs: output
        try:
            places = torch.zeros(part.shape[:2], dtype=torch.int64, device=part.device)
            with training:
                logits = causal(input_ids=places, use_cache=False).logits
        finally:
            del backbone.forward
            if own:
                backbone.forward = own
        yield logits[0].float(), targets[start : start + rows]


def as_in_training(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Within, a model that is trained whole in part multiplies in 16 bit, as its trainer has it do.

    What is trained is held in 32 bit. LoRA's layers take and give what the frozen ones do, but
    embeddings, norms and biases would give those 32 bit, which they cannot multiply with their 16.
    """
    held = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if not held or held[0].dtype == torch.float32:
        return nullcontext()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and parameter.dtype == torch.float32:
            return torch.autocast(held[0].device.type, dtype=held[0].dtype)
    return nullcontext()


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
    rows = rows_at_once(model)
    total, count = 0.0, 0
    for batch in batches:
        for logits, targets in in_chunks(model, on_device(batch, device), rows):
            total += cross_entropy(logits, targets, reduction="sum").item()
            count += targets.numel()
        between()
    model.train(was_training)
    return (total / count if count else float("nan")), count


def rows_at_once(model: Any) -> int:
    """How many tokens' logits are held at a time, whatever the vocabulary."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, min(ROWS, BYTES // (4 * vocabulary)))


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors there; what else is told stays as it is."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
