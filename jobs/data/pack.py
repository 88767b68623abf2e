"""Conversations -> rows that are as full as they can be, without cutting any: best-fit decreasing.

The longest first, each to the row with the least space that still takes it. Lengths are whole
numbers up to the capacity, so the rows are held by the space they have left, and which spaces there
are is one integer's bits: the best fit is its lowest bit that is high enough.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.integer[Any]], capacity: int) -> list[NDArray[np.int64]]:
    """Rows as arrays of indices into `lengths` (int, shape (n,)); each index is in exactly one.

    No row's lengths add up to more than `capacity`. A row's indices ascend; the same lengths give
    the same rows. Raises ValueError where a length is over the capacity or under 1.
    """
    if len(lengths) == 0:
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(
            f"lengths must be from 1 to {capacity}, and are {lengths.min()} to {lengths.max()}"
        )
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows_with: list[list[int]] = [[] for _ in range(capacity)]  # rows by the space they have left
    spaces = 0  # bit s is set where rows_with[s] holds a row
    rows = 0
    row_of: list[int] = []
    for length in lengths[by_length].tolist():
        fits = spaces >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of.append(row)
        left = space - length
        if left:
            rows_with[left].append(row)
            spaces |= 1 << left
    of_index = np.empty(len(lengths), dtype=np.int64)
    of_index[by_length] = row_of
    ends = np.cumsum(np.bincount(of_index))
    order = np.argsort(of_index, kind="stable")
    return [order[start:end] for start, end in pairwise([0, *ends.tolist()])]


def fill(lengths: NDArray[np.integer[Any]], rows: list[NDArray[np.int64]], capacity: int) -> float:
    """The share of the rows' places that hold a token: in (0, 1]."""
    return int(lengths.sum()) / (len(rows) * capacity)
