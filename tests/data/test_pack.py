"""Packing: nothing lost, nothing doubled, nothing cut, and little space left over."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jobs.data.pack import fill, pack

CAPACITY = 2048
MILLION = 1_000_000


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """How full each row is, by the definition: each length to the fullest row that takes it."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, used in enumerate(rows) if used + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 70))
def test_the_rows_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = pack(array, capacity)
    assert sorted(np.concatenate([*rows, np.array([], np.int64)]).tolist()) == [
        *range(len(lengths))
    ]
    assert sorted(int(array[row].sum()) for row in rows) == plain_best_fit(lengths, capacity)
    assert all((np.diff(row) > 0).all() for row in rows)
    assert all((a == b).all() for a, b in zip(rows, pack(array, capacity), strict=True))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_length_that_fits_no_row_is_refused(dtype: Any) -> None:
    assert [row.tolist() for row in pack(np.array([10, 3, 7], dtype), 10)] == [[0], [1, 2]]
    with pytest.raises(ValueError, match="from 1 to 10, and are 2 to 11"):
        pack(np.array([2, 11], dtype), 10)
    with pytest.raises(ValueError, match="are 0 to 3"):
        pack(np.array([0, 3], dtype), 10)


def drawn(name: str) -> NDArray[np.int64]:
    draw = np.random.default_rng(3407)
    lengths: NDArray[Any]
    if name == "log-normal":
        lengths = draw.lognormal(5.1, 0.9, MILLION)
    elif name == "geometric":
        lengths = draw.geometric(1 / 250, MILLION)
    elif name == "uniform":
        lengths = draw.integers(1, CAPACITY + 1, MILLION)
    else:
        half = MILLION // 2
        lengths = np.concatenate([draw.normal(80, 20, half), draw.normal(600, 90, half)])
    return np.clip(lengths, 1, CAPACITY).astype(np.int64)


@pytest.mark.parametrize("name", ["log-normal", "geometric", "uniform", "two humps"])
def test_a_million_lengths_take_seconds_and_fill_the_rows(name: str) -> None:
    lengths = drawn(name)
    start = time.process_time()
    rows = pack(lengths, CAPACITY)
    assert time.process_time() - start < 10
    order = np.concatenate(rows)
    assert (np.bincount(order, minlength=MILLION) == 1).all()
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    assert np.add.reduceat(lengths[order], starts).max() <= CAPACITY
    assert fill(lengths, rows, CAPACITY) > 0.98
