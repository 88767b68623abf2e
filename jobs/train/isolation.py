"""Whether conversations that are laid end to end stay apart, and what is done if they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import SpecError
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.train.batches import FlatBatch, Item, PadBatch
from jobs.train.engines import engine
from jobs.train.loss import on_device, trained_logits


def choose_collate(
    model: Any, spec: Spec, tokenizer: ChatTokenizer, device: str, observer: Observer
) -> PadBatch | FlatBatch:
    """Rows laid end to end without padding, where the model keeps conversations apart; on a CPU
    only for packed ones, because nothing is gained there."""
    if not spec.train.packing and device == "cpu":
        return PadBatch(tokenizer.pad_id)
    flat, kernel, slow = engine().lay_out(model)
    observer.event("kernel", attention=kernel)
    if slow and device == "cuda":
        observer.warn(f"attention runs slower than it could ({kernel}): {slow}")
    with engine().with_logits():
        apart = is_isolated(model, flat)
    if apart:
        return flat
    if spec.train.packing:
        raise SpecError(
            "train.packing: with this base model's architecture packed conversations see each other",
            "set train.packing to false",
        )
    observer.warn("this architecture mixes conversations that are laid end to end: padding them")
    return PadBatch(tokenizer.pad_id)


@torch.no_grad()
def is_isolated(model: Any, flat: FlatBatch) -> bool:
    """Whether conversations that are laid end to end do not see each other.

    Several architectures of transformers 5.17 (among them opt, bloom, mpt, mamba, gpt_oss) mix the
    conversations of a row without a warning, so it is tried: another first conversation must not
    change what the model says in the second.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    second = []
    with _each_token_by_itself(model):
        for first in (range(1, 9), range(9, 17)):
            items: list[Item] = [
                {"input_ids": list(ids), "labels": list(ids)} for ids in (first, range(17, 25))
            ]
            batch = on_device(flat(items), device)
            second.append(trained_logits(model, batch)[0][-7:])
    model.train(was_training)
    return torch.equal(*second)


@contextmanager
def _each_token_by_itself(model: Any) -> Iterator[None]:
    """Within, 8-bit layers round each token by itself.

    LLM.int8 keeps those inputs in 16 bit that are large for any token of a batch, so what is rounded
    for one token depends on the others: that is no attention, and happens in padded rows as well.
    """
    states = [module.state for module in model.modules() if isinstance(module, Linear8bitLt)]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold
