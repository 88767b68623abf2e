"""How fast and how full conversations are packed, beside TRL's packing and plain first fit.

.venv/bin/python -m bench.packing        writes bench/results/packing.md
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import trl
from numpy.typing import NDArray

from jobs.data.pack import fill, pack

RESULT = Path(__file__).parent / "results" / "packing.md"
CAPACITY = 2048
MILLION = 1_000_000
FEW = 20_000  # for what takes time that grows with the square
Lengths = NDArray[np.int64]
draw = np.random.default_rng(3407)


def distributions() -> dict[str, Lengths]:
    drawn = {
        "log-normal": draw.lognormal(5.1, 0.9, MILLION),
        "geometric": draw.geometric(1 / 250, MILLION),
        "uniform, 1 to 2048": draw.integers(1, CAPACITY + 1, MILLION),
    }
    return {name: np.clip(lengths, 1, CAPACITY).astype(np.int64) for name, lengths in drawn.items()}


def ours(lengths: Lengths) -> tuple[float, int]:
    start = time.perf_counter()
    rows = pack(lengths, CAPACITY)
    seconds = time.perf_counter() - start
    order = np.concatenate(rows)
    assert (np.bincount(order, minlength=len(lengths)) == 1).all()
    assert fill(lengths, rows, CAPACITY) == lengths.sum() / (len(rows) * CAPACITY)
    return seconds, len(rows)


def trls(batch_size: int) -> Callable[[Lengths], tuple[float, int]]:
    """TRL packs the tokens with it; a token is one byte here, to make little of that."""

    def measure(lengths: Lengths) -> tuple[float, int]:
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = pa.LargeListArray.from_arrays(ends, np.zeros(ends[-1], dtype=np.int8))
        dataset = datasets.Dataset(pa.table({"input_ids": ids}))
        start = time.perf_counter()
        rows = trl.pack_dataset(
            dataset,
            CAPACITY,
            strategy="bfd",
            map_kwargs={"batch_size": batch_size, "keep_in_memory": True},
        )
        return time.perf_counter() - start, len(rows)

    return measure


def first_fit_decreasing(lengths: Lengths) -> tuple[float, int]:
    start = time.perf_counter()
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for row, space in enumerate(spaces):
            if space >= length:
                spaces[row] -= length
                break
        else:
            spaces.append(CAPACITY - length)
    return time.perf_counter() - start, len(spaces)


METHODS: tuple[tuple[str, int, Callable[[Lengths], tuple[float, int]]], ...] = (
    ("**`jobs.data.pack`**", MILLION, ours),
    ("TRL `bfd`, 1000 at a time (its default)", MILLION, trls(1000)),
    ("TRL `bfd`, all at once", MILLION, trls(MILLION)),
    ("`jobs.data.pack`", FEW, ours),
    ("first-fit decreasing, plain Python", FEW, first_fit_decreasing),
)


def main() -> None:
    datasets.disable_progress_bars()
    rows = []
    for name, all_lengths in distributions().items():
        for method, count, measure in METHODS:
            lengths = all_lengths[:count]
            seconds, made = measure(lengths)
            full = lengths.sum() / (made * CAPACITY)
            rows.append(
                f"| {name} | {lengths.mean():.0f} | {method} | {count:,} | {seconds:.2f} | {made:,} | {full:.3%} |"
            )
            print(rows[-1], flush=True)
    lines = [
        "# Packing",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, one core of {os.cpu_count()}, {platform.machine()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, trl {trl.__version__}: "
        "`python -m bench.packing`",
        "",
        f"Rows of {CAPACITY} tokens. TRL's time includes its moving of the tokens, of one byte each here.",
        "",
        "| lengths | mean | method | conversations | seconds | rows | full |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
