"""What a training took of its GPU: the figures that people look for afterwards."""

from __future__ import annotations

from typing import Any

import torch

SIDE = 8192  # of the square matrices whose product is timed: large enough to fill any card
PRODUCTS = 10


def gpu_figures(weights: int, tokens_per_second: float | None, seconds: float) -> dict[str, Any]:
    """Of the first GPU: its name and memory, the most that was reserved of it, and how much of what
    it can do was used.

    `weights` is the number of the frozen model's: a token takes about four operations for each of
    them, two in the forward pass and two for the gradients of activations; those of frozen weights
    are never taken, and what is made again counts nothing (Kaplan et al. 2020, section 2.1, of whose
    six operations these are four).
    """
    properties = torch.cuda.get_device_properties(0)
    reserved = torch.cuda.max_memory_reserved()
    rate = matrix_rate()
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "reserved_bytes": reserved,
        "share_of_memory": round(reserved / properties.total_memory, 4),
        "seconds": round(seconds, 1),
        "matrix_tflops": round(rate / 1e12, 1),
        "share_of_matrix_rate": round(4 * weights * (tokens_per_second or 0) / rate, 4),
    }


def in_words(gpu: dict[str, Any]) -> str:
    """The same for people, in a line."""
    return (
        f"{gpu['name']}: {gpu['reserved_bytes'] / 2**30:.1f} of {gpu['memory_bytes'] / 2**30:.1f} GiB "
        f"({gpu['share_of_memory']:.0%}), {gpu['seconds'] / 60:.1f} minutes, "
        f"{gpu['share_of_matrix_rate']:.0%} of the {gpu['matrix_tflops']:.0f} TFLOP/s that it does"
    )


def matrix_rate() -> float:
    """Operations a second of a product of two large 16-bit matrices, as the card does it now."""
    from jobs.train.runtime import compute_dtype

    torch.cuda.empty_cache()
    size = SIDE
    while size > 1024 and torch.cuda.mem_get_info()[0] < 4 * 2 * size**2:
        size //= 2
    left, right = (
        torch.randn(size, size, device="cuda", dtype=compute_dtype("cuda")) for _ in "ab"
    )
    out = left @ right
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=out)
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return 2 * size**3 * PRODUCTS / (milliseconds / 1000)
