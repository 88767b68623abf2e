"""What has to be settled before torch is imported, and once it is: threads, seeds, device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


def settle_threads() -> int:
    """Set the number of threads and how they wait; to be called before torch is imported.

    One thread a core that this process may use, unless OMP_NUM_THREADS says otherwise. Waiting
    threads sleep: OpenMP's spinning makes small steps many times slower where cores are shared.
    A run gives the same bits only with the same number, so it is kept in the manifest.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(cores or 1))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return int(os.environ["OMP_NUM_THREADS"])


def settle_gpu(root: Path = Path("/")) -> int:
    """Let CUDA see one GPU where it would see several; to be called before torch is imported.

    A run trains on one. Given more, transformers' trainer would split each batch over them, and the
    batch size would not be what the spec says. Returns how many there were; `root` is where /dev is.
    """
    named = os.environ.get(VISIBLE)
    if named is not None:
        seen = [name.strip() for name in named.split(",") if name.strip()]
    else:
        seen = sorted(p.name[6:] for p in (root / "dev").glob("nvidia*") if p.name[6:].isdigit())
    if len(seen) > 1:
        os.environ[VISIBLE] = "0" if named is None else seen[0]
    return len(seen)


def quiet_libraries() -> None:
    """No bars and no advice from libraries: what a run says, lorajob says."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> Any:
    """float32 on a CPU, where it is exact and fast enough; on a GPU bfloat16 where it has it."""
    import torch

    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def has_bf16() -> bool:
    """Whether the GPU has bfloat16; torch also says yes where it only imitates it, at a crawl."""
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
