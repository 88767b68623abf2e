"""Examples -> batches. The labels arrive as they were made: nothing here may change one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import torch

from jobs.data.labels import IGNORE

# Kernels work in blocks of 8; a little padding costs less than an odd length.
MULTIPLE = 8


class Item(TypedDict):
    """A conversation, or a packed row of several laid end to end: then `seq_lengths` are theirs.

    The name is TRL's: its trainer keeps that column, even with `remove_unused_columns`.
    """

    input_ids: list[int]
    labels: list[int]
    seq_lengths: NotRequired[list[int]]


@dataclass(frozen=True)
class PadBatch:
    """Pads a list of examples on the right to one length; padding is masked and never trained.

    Each example is one conversation: a packed row is for FlatBatch, and a ValueError here.
    Returns int64 tensors input_ids, attention_mask and labels of shape (examples, length).
    """

    pad_id: int

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        if any("seq_lengths" in item for item in items):
            raise ValueError("packed rows cannot be padded: their conversations would not be apart")
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


@dataclass(frozen=True)
class FlatBatch:
    """Lays conversations end to end in one row, with no padding; packed rows may be among them.

    Returns int64 tensors of shape (1, total tokens): input_ids; position_ids, which begin at 0 with
    each conversation; labels, in which each conversation's first token is IGNORE, because what
    would predict it is the end of the conversation before.

    The position_ids are what keeps conversations apart: from them transformers makes a mask in
    which no token sees another conversation. It does so only without an attention_mask and without
    a cache, and FlashAttention only for a single row; so there is no mask here, and one row.
    """

    told: Literal["nothing", "lengths", "boundaries"] = "nothing"
    """What the model is told of the conversations besides positions: their lengths, as unsloth
    takes them, or where each begins, as transformers' flash kernels do."""

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        positions = []
        for item in items:
            sizes = item.get("seq_lengths", [len(item["input_ids"])])
            if not sum(sizes) == len(item["input_ids"]) == len(item["labels"]):
                raise ValueError(
                    f"a row of {len(item['input_ids'])} tokens and {len(item['labels'])} labels "
                    f"cannot hold conversations of {sizes}"
                )
            positions += [torch.arange(size) for size in sizes]
        position_ids = torch.cat(positions)
        labels = torch.tensor([label for item in items for label in item["labels"]])
        labels[position_ids == 0] = IGNORE
        input_ids = torch.tensor([token for item in items for token in item["input_ids"]])
        batch: dict[str, Any] = {
            "input_ids": input_ids[None],
            "position_ids": position_ids[None],
            "labels": labels[None],
        }
        lengths = torch.tensor([len(position) for position in positions], dtype=torch.int32)
        if self.told == "lengths":
            batch["packed_seq_lengths"] = lengths
        elif self.told == "boundaries":
            ends = lengths.cumsum(0, dtype=torch.int32)
            bounds = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
            longest = int(lengths.max())
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch


@dataclass(frozen=True)
class StepBatch:
    """The rows of a whole optimizer step, in parts of up to `max_tokens` tokens each.

    A row longer than that is a part by itself. Returns {"parts": [batch, ...]}, each as `collate`
    makes it, and the number of tokens that the step trains.
    """

    collate: PadBatch | FlatBatch
    max_tokens: int

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        parts = [self.collate(part) for part in self.split(items)]
        trained = sum(int((part["labels"][:, 1:] != IGNORE).sum()) for part in parts)
        return {"parts": parts, "trained": trained}

    def split(self, items: list[Item]) -> list[list[Item]]:
        """Whole rows, in their order, in as few parts as can be, and these about equal: a small one
        takes nearly as long as a large one. Padded rows are sorted first, so that like goes with
        like."""
        if isinstance(self.collate, PadBatch):
            items = sorted(items, key=lambda item: len(item["input_ids"]))
        parts = self._filled(items, self.max_tokens)
        least, most = 1, self.max_tokens
        while least < most:  # the smallest that does with as many parts
            middle = (least + most) // 2
            fewer = self._filled(items, middle)
            if len(fewer) <= len(parts):
                parts, most = fewer, middle
            else:
                least = middle + 1
        return parts

    def _filled(self, items: list[Item], most: int) -> list[list[Item]]:
        """Parts of up to so many tokens, each filled before the next."""
        padded = isinstance(self.collate, PadBatch)
        parts: list[list[Item]] = []
        size = 0
        for item in items:
            length = len(item["input_ids"])
            grown = (len(parts[-1]) + 1) * length if padded and parts else size + length
            if parts and grown <= most:
                parts[-1].append(item)
                size += length
            else:
                parts.append([item])
                size = length
        return parts
