from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from jobs.data.labels import IGNORE
from jobs.data.tokenizer import ChatTokenizer
from jobs.spec import Spec, Train
from jobs.train import attention
from jobs.train.batches import FlatBatch, Item, PadBatch, StepBatch
from jobs.train.engine_transformers import add_lora, load_hf_tokenizer, load_model
from jobs.train.trainer import Trainer, arguments_of
from tests.conftest import BASE
from tests.train.test_isolation import made, packed


def test_labels_arrive_as_they_were_made_and_padding_is_never_trained() -> None:
    items: list[Item] = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]},
        {"input_ids": list(range(1, 10)), "labels": [IGNORE] * 8 + [9]},
    ]
    batch = PadBatch(pad_id=7)(items)  # a pad id that is also a trained token
    assert batch["input_ids"].shape == (2, 16)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        assert batch["input_ids"][row, :size].tolist() == item["input_ids"]
        assert batch["labels"][row, :size].tolist() == item["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (16 - size)
        assert (batch["labels"][row, size:] == IGNORE).all()


def test_conversations_lie_end_to_end_and_none_is_trained_on_its_neighbours_end() -> None:
    items: list[Item] = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, IGNORE]},
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, IGNORE], "seq_lengths": [1, 3]},
        {"input_ids": [8, 9], "labels": [IGNORE, 9]},
    ]
    batch = FlatBatch()(items)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 1, 2, 3, 4, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 2, 0, 1]],
        "labels": [[IGNORE, 6, IGNORE, IGNORE, IGNORE, 3, IGNORE, IGNORE, 9]],
    }


def test_rows_whose_conversations_are_not_known_are_refused() -> None:
    wrong: Item = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [1, 3]}
    with pytest.raises(ValueError, match=r"3 tokens and 3 labels .* \[1, 3\]"):
        FlatBatch()([wrong])
    with pytest.raises(ValueError, match="cannot be padded"):
        PadBatch(0)([wrong])


def whole_spec() -> Spec:
    return Spec.model_validate(
        {
            "name": "t",
            "model": {"base": str(BASE)},
            "data": {"train": "x.jsonl"},
            "lora": {"rank": 4},
        }
    )


def losses(
    tokenizer: ChatTokenizer, items: list[Item], collate: Any, size: int, out: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What three steps of training log, and the weights after them."""
    spec = Train(batch_size=size, max_steps=3, learning_rate=1e-3)
    arguments = arguments_of(spec, out, len(items), False, "cpu")
    arguments.train_sampling_strategy = "sequential"  # so packed rows meet the same conversations
    set_seed(0)
    model = add_lora(load_model(BASE, "16bit", "cpu"), whole_spec(), BASE)
    if isinstance(collate, FlatBatch) and collate.told == "boundaries":
        attention.attend_apart(model.get_base_model())
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(cast(Any, items)),
        processing_class=load_hf_tokenizer(BASE, tokenizer),
        data_collator=StepBatch(collate, 10_000),
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return logged, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_training_on_flat_batches_is_training_on_padded_ones(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    items = made([23, 1, 40, 2, 17, 64, 9, 30, 12, 5, 50, 3])
    rows = [packed(items[start : start + 2]) for start in range(0, 12, 2)]
    padded, weights = losses(tokenizer, items, PadBatch(tokenizer.pad_id), 4, tmp_path)
    assert len(padded) == 3
    assert len(set(padded)) == 3
    told = FlatBatch(told="boundaries")
    for flat_items, size, collate in (
        (items, 4, FlatBatch()),
        (rows, 2, FlatBatch()),
        (rows, 2, told),
    ):
        flat, flat_weights = losses(tokenizer, flat_items, collate, size, tmp_path)
        assert flat == pytest.approx(padded, abs=1e-4)
        for name, weight in weights.items():
            assert (flat_weights[name] - weight).abs().max() <= 1e-4, name


def test_a_steps_rows_go_through_in_parts_that_hold_each_of_them_once() -> None:
    items = made([23, 1, 40, 2, 17, 64, 9, 30, 12, 5, 50, 3])
    trained = sum(sum(label != IGNORE for label in item["labels"][1:]) for item in items)
    for collate in (PadBatch(0), FlatBatch()):
        for most in (1, 40, 64, 100, 1000):
            step = StepBatch(collate, most)
            parts = step.split(items)
            assert sorted(len(i["input_ids"]) for part in parts for i in part) == sorted(
                len(item["input_ids"]) for item in items
            )
            for part in parts:
                size = sum(len(item["input_ids"]) for item in part)
                if isinstance(collate, PadBatch):
                    size = len(part) * max(len(item["input_ids"]) for item in part)
                assert size <= most or len(part) == 1
            batch = step(items)
            assert len(batch["parts"]) == len(parts)
            assert batch["trained"] == trained


def test_the_lengths_of_what_is_laid_end_to_end_are_told_where_they_are_wanted() -> None:
    items = made([3, 5])
    assert "packed_seq_lengths" not in FlatBatch()(items)
    batch = FlatBatch(told="lengths")([packed(items), *made([4])])
    assert batch["packed_seq_lengths"].tolist() == [3, 5, 4]
    assert batch["packed_seq_lengths"].dtype == torch.int32
