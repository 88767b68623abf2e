"""Labelling by all cores: in this process at first, in others beside it when there are many rows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from jobs.data.chunks import Chunk, Labeller, Recipe
from jobs.data.read import Row
from jobs.data.tokenizer import ChatTokenizer
from jobs.secrets import guard_process
from jobs.spec import RecordFormat

Submit = Callable[[list[Row], RecordFormat, dict[str, str]], "Future[Chunk] | Chunk"]

CHUNK = 256  # rows that one process labels at a time
POOL_FROM = 8 * CHUNK  # fewer rows are done before other processes have started


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_of_process: Labeller | None = None


def _start_process(recipe: Recipe) -> None:
    global _of_process  # noqa: PLW0603 - a process of the pool has one labeller
    guard_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
    _of_process = Labeller(recipe)


def _in_process(values: list[Any], form: RecordFormat, columns: dict[str, str]) -> Chunk:
    assert _of_process is not None
    return _of_process.chunk(values, form, columns, keep=False)


@contextmanager
def labelling(recipe: Recipe, tokenizer: ChatTokenizer | None) -> Iterator[Submit]:
    """A function that labels rows: here at first, in processes of its own when there are many."""
    here = Labeller(recipe, tokenizer)
    pool: ProcessPoolExecutor | None = None
    seen = 0

    def submit(
        rows: list[Row], form: RecordFormat, columns: dict[str, str]
    ) -> Future[Chunk] | Chunk:
        nonlocal pool, seen
        values = [row.value for row in rows]
        seen += len(rows)
        if seen <= POOL_FROM or cores() == 1:
            return here.chunk(values, form, columns, keep=True)
        if pool is None:
            # Spawned, not forked: torch's threads would not survive a fork.
            pool = ProcessPoolExecutor(
                cores(), get_context("spawn"), initializer=_start_process, initargs=(recipe,)
            )
        return pool.submit(_in_process, values, form, columns)

    try:
        yield submit
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
