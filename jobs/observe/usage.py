"""How much memory is in use now: of the process, and of its GPU where there is one."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

STATM = Path("/proc/self/statm")  # sizes in pages, the second is what is resident


def memory() -> dict[str, int]:
    """`memory_bytes`, and on a GPU `gpu_memory_bytes` and `gpu_memory_total_bytes`.

    The GPU's figure is what is in use on the card, by whomever: that is what runs out.
    """
    found: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):  # no Linux
        found["memory_bytes"] = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # A module that nobody has imported holds no memory; one that has no context on the card yet must
    # not get one, which takes half a GiB, only to be asked.
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return found
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # the card is gone, which others will say better
        return found
    return found | {"gpu_memory_bytes": total - free, "gpu_memory_total_bytes": total}
