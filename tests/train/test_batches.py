from __future__ import annotations

import torch

from jobs.data.labels import IGNORE
from jobs.train.batches import Item, PadBatch


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
