"""Examples -> batches. The labels arrive as they were made: nothing here may change one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from jobs.data.labels import IGNORE

# Kernels work in blocks of 8; a little padding costs less than an odd length.
MULTIPLE = 8


class Item(TypedDict):
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class PadBatch:
    """Pads a list of examples on the right to one length; padding is masked and never trained.

    Returns int64 tensors input_ids, attention_mask and labels of shape (examples, length).
    """

    pad_id: int

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        length = -(-longest // MULTIPLE) * MULTIPLE
        shape = (len(items), length)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            input_ids[row, :size] = torch.tensor(item["input_ids"])
            labels[row, :size] = torch.tensor(item["labels"])
            attention_mask[row, :size] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
