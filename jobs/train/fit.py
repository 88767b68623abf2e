"""How a step goes through the device: as many tokens at a time as run fastest within its memory.

Without torch, so that `check` can ask for a plan where there is no GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# More tokens at a time than this make no card faster: on an H200 an 8B model reaches 16.0 thousand
# tokens a second with 8,192 and 16.4 with 16,384 as with 32,768 (bench/results/train.md).
ENOUGH = 20_480
# With fewer than these, keeping activations is no faster than making them again with more at a time
# (the same source: 11.1 thousand a second with 2,048 kept, 11.3 with 8,192 made again).
WORTH_KEEPING = 2_048
STEP = 512  # plans are multiples of this, so that a few bytes more or less change none
FIRST = 1024  # tokens of the first try where nothing is known
CLOSE = 0.04  # a plan with so many more tokens is no faster
TRIES = 8  # each takes a second or two
MARGIN = 0.94  # of the free memory; the rest is for fragments and what kernels take for a moment


@dataclass(frozen=True)
class Plan:
    """A step's rows go through in parts of up to `tokens` tokens.

    The loss is normalised over the step's trained tokens, whatever the plan: it changes rounding
    and nothing else.
    """

    tokens: int
    checkpointing: bool = False
    """Whether activations are made again in the backward pass, to save memory."""

    def smaller(self, longest: int) -> Plan | None:
        """The next one that takes less memory, or None: half the tokens, at last one row."""
        if self.tokens > longest:
            return Plan(max(self.tokens // 2, longest), self.checkpointing)
        return None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def whole(lengths: list[int], batch_size: int) -> int:
    """The most tokens that a step can have, padding included."""
    return max(lengths) * batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA has a class for it, a CPU's allocator only words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def find_plan(
    most: int,
    longest: int,
    free: int,
    peak: Callable[[Plan], int],
    reckon: Callable[[Plan], int] | None = None,
) -> Plan:
    """The plan that runs fastest within `free` bytes.

    `most` tokens are in the largest step and `longest` in the longest row; `peak` tries a plan and
    says how many bytes it took, and may raise what `is_out_of_memory` knows. `reckon` says about
    how many it will be, so that fewer have to be tried.
    """
    most = min(most, max(ENOUGH, longest))
    for checkpointing in (False, True):
        tokens = _tokens_for(most, free, checkpointing, peak, reckon)
        if tokens >= most or tokens >= max(longest, WORTH_KEEPING):
            return Plan(min(tokens, most), checkpointing)
    return Plan(max(longest, STEP), checkpointing=True)


def _tokens_for(
    most: int,
    free: int,
    checkpointing: bool,
    peak: Callable[[Plan], int],
    reckon: Callable[[Plan], int] | None,
) -> int:
    """The most tokens that fit, or 0, found by trying.

    What a token takes is known by reckoning, or else by two small tries, and corrected by each try.
    """
    limit = MARGIN * free
    each: float | None = None  # bytes that one more token takes
    wanted = FIRST
    if reckon:
        sizes = range(STEP, most + 1, STEP)
        count = bisect_right(sizes, limit, key=lambda tokens: reckon(Plan(tokens, checkpointing)))
        wanted = max(FIRST, count * STEP)
        half, all_of_it = (reckon(Plan(n, checkpointing)) for n in (wanted // 2, wanted))
        each = max(1.0, (all_of_it - half) / (wanted - wanted // 2))
        if wanted < WORTH_KEEPING // 2 and not checkpointing:
            return 0  # far from worth it: to try would be in vain
    fits, fitted = 0, 0
    over: int | None = None  # the least that was found too much
    refused = 0
    for _ in range(TRIES):
        wanted = max(STEP, min(wanted, most))
        taken = _tried(Plan(wanted, checkpointing), peak)
        if taken is None or taken > limit:
            over = wanted
            if over <= FIRST:
                break
            refused += 1
            # Refused before it was measured: back by an eighth, if it was reckoned to fit.
            back = over // 8 if each and refused == 1 else over // 2
            if taken and each:
                back = int((taken - limit) / each)
            back = _rounded(back) + STEP
            wanted = max(FIRST, over - back)
            if fits >= wanted:
                wanted = _rounded((fits + over) // 2)
        else:
            if fits:
                each = max(1.0, (taken - fitted) / (wanted - fits))
            fits, fitted = wanted, taken
            wanted += _rounded(int((limit - fitted) / each)) if each else 2 * FIRST
        if over is not None and wanted >= over:
            wanted = _rounded((fits + over) // 2)
        if fits >= most or wanted <= fits or (over is not None and over - fits <= STEP):
            break
        if fits and wanted - fits < CLOSE * fits:
            break  # a few more tokens are not worth another try
    return fits


def _tried(plan: Plan, peak: Callable[[Plan], int]) -> int | None:
    try:
        return peak(plan)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _rounded(tokens: int) -> int:
    return tokens // STEP * STEP
