"""Conversations in one row know nothing of each other: logits, gradients and losses show it.

All of it is about transformers' behaviour with the model as the engine loads it, so an update that
stopped keeping conversations apart fails here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from jobs.data.labels import IGNORE
from jobs.train.batches import FlatBatch, Item, PadBatch
from jobs.train.engine_transformers import load_model
from jobs.train.loss import evaluate, trained_logits
from tests.conftest import BASE

SIZES = [23, 1, 40, 2, 17, 64]
CPU = torch.device("cpu")


def made(sizes: list[int], seed: int = 0) -> list[Item]:
    """Conversations of random tokens, of which about half are trained, some first ones too."""
    generator = torch.Generator().manual_seed(seed)
    items: list[Item] = []
    for size in sizes:
        ids = torch.randint(3, 2046, (size,), generator=generator)
        labels = torch.where(torch.rand(size, generator=generator) < 0.5, ids, IGNORE)
        items.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return items


def packed(items: list[Item]) -> Item:
    return {
        "input_ids": [token for item in items for token in item["input_ids"]],
        "labels": [label for item in items for label in item["labels"]],
        "seq_lengths": [len(item["input_ids"]) for item in items],
    }


@pytest.fixture(scope="module")
def model() -> Any:
    model = load_model(BASE, "16bit", "cpu")
    assert model.config._attn_implementation == "sdpa"  # what all of this is about
    return model


def logits_of(model: Any, items: list[Item], **changes: Any) -> list[torch.Tensor]:
    """Each conversation's logits, from one flat row."""
    batch = FlatBatch()(items)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        logits = model(**{**inputs, "use_cache": False, **changes}).logits[0]
    return list(logits.split([len(item["input_ids"]) for item in items]))


def alone(model: Any, item: Item) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([item["input_ids"]]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("training", [False, True])
def test_each_conversation_has_the_logits_that_it_has_alone(model: Any, training: bool) -> None:
    model.train(training)
    items = made(SIZES)
    for item, logits in zip(items, logits_of(model, items), strict=True):
        assert (logits - alone(model, item)).abs().max() <= 1e-4
    rows = [packed(items[:3]), items[3], packed(items[4:])]
    assert torch.equal(torch.cat(logits_of(model, rows)), torch.cat(logits_of(model, items)))


@pytest.mark.parametrize("training", [False, True])
def test_no_conversation_changes_anothers_logits(model: Any, training: bool) -> None:
    model.train(training)
    items, others = made(SIZES), made(SIZES, seed=1)
    before = logits_of(model, items)
    for changed in range(len(items)):
        after = logits_of(model, [*items[:changed], others[changed], *items[changed + 1 :]])
        for index in range(len(items)):
            assert torch.equal(after[index], before[index]) == (index != changed)


def test_what_would_undo_it(model: Any) -> None:
    model.eval()
    items = made(SIZES)
    total = sum(SIZES)
    first, *_, last = logits_of(model, items)
    for change in (
        {"position_ids": torch.arange(total)[None]},  # so these tests can fail
        {"attention_mask": torch.ones(1, total, dtype=torch.int64)},
        {"use_cache": True},
    ):
        changed_first, *_, changed_last = logits_of(model, items, **change)
        assert (changed_first - first).abs().max() <= 1e-4
        assert (changed_last - last).abs().max() > 0.1, change


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    logits, targets = trained_logits(model, batch)
    loss = cross_entropy(logits, targets, reduction="sum") / len(targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_those_of_padded_batches(model: Any, training: bool) -> None:
    model.train(training)
    items = made(SIZES)
    loss, expected = gradients(model, PadBatch(2047)(items))
    assert max(gradient.abs().max() for gradient in expected) > 0.1
    for rows in (items, [packed(items)], [packed(items[:3]), packed(items[3:])]):
        flat_loss, found = gradients(model, FlatBatch()(rows))
        assert flat_loss == pytest.approx(loss, abs=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5


def test_evaluation_measures_the_same_of_both(model: Any) -> None:
    items = made(SIZES)
    padded, tokens = evaluate(model, [PadBatch(2047)(items)], CPU)
    batches = [FlatBatch()(items[:2]), FlatBatch()([packed(items[2:5]), items[5]])]
    loss, count = evaluate(model, batches, CPU)
    assert count == tokens == sum(i != IGNORE for item in items for i in item["labels"][1:])
    assert loss == pytest.approx(padded, abs=1e-5)
