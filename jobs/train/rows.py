"""The labelled examples on disk -> what the trainer iterates over, with labels made of the spans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from jobs.data.labels import labels_of
from jobs.data.pack import pack

LENGTH = "length"


def load_rows(path: Path) -> Dataset | None:
    """One of `prepare`'s files, memory-mapped: items of input_ids and labels; None where empty.

    Beside train.arrow, order.npy says which rows an epoch has where sources have weights.
    """
    rows = _load(path)
    return rows.with_transform(_with_labels) if len(rows) else None


def load_epoch(folder: Path) -> Dataset:
    """What an epoch trains: the training rows, and after them those of replay where there are such.
    The trainer shuffles them."""
    rows = _load(folder / "train.arrow")
    replay = folder / "replay.arrow"
    if replay.exists():
        rows = concatenate_datasets([rows, _load(replay)])
    return rows.with_transform(_with_labels)


def _load(path: Path) -> Dataset:
    rows = Dataset.from_file(str(path))
    order = path.with_name("order.npy")
    return rows.select(np.load(order)) if path.stem == "train" and order.exists() else rows


def _with_labels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    labels = [
        labels_of(ids, spans) for ids, spans in zip(batch["input_ids"], batch["spans"], strict=True)
    ]
    return {"input_ids": batch["input_ids"], "labels": labels}


def lengths_of(rows: Dataset) -> Any:
    """Tokens of each row, int64, without reading the tokens."""
    if LENGTH in rows.column_names:  # packed
        return np.asarray(rows.with_format(None)[LENGTH], dtype=np.int64)
    column = rows.with_format("arrow")[:]["input_ids"]
    return column.combine_chunks().value_lengths().to_numpy().astype(np.int64)


def pack_rows(rows: Dataset, capacity: int) -> Dataset:
    """Rows of up to `capacity` tokens, each of whole conversations; see jobs.train.batches.Item."""
    lengths = lengths_of(rows)
    bins = [members.tolist() for members in pack(lengths, capacity)]
    filled = [int(lengths[members].sum()) for members in bins]

    def laid_out(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        members = [rows[row] for row in batch["rows"]]
        return {
            "input_ids": [[t for ids in m["input_ids"] for t in ids] for m in members],
            "labels": [[t for labels in m["labels"] for t in labels] for m in members],
            "seq_lengths": [[len(ids) for ids in m["input_ids"]] for m in members],
        }

    return Dataset.from_dict({"rows": bins, LENGTH: filled}).with_transform(laid_out)
