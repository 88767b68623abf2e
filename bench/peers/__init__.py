"""What a user would run instead: notebooks as they stand, each a function that makes its trainer.

`trainer(base, texts, out, steps, batch_size)`; each module is imported in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def texts_of(rows: Path, base: Path) -> list[str]:
    """The conversations that lorajob trains, as the texts that its template makes of them."""
    from tokenizers import Tokenizer

    from jobs.train.rows import load_rows

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    loaded = load_rows(rows / "train.arrow")
    assert loaded is not None
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in loaded]


def is_unsloth() -> bool:
    return "unsloth" in sys.modules


def bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def common(out: Path, steps: int) -> dict[str, Any]:
    """The arguments that all notebooks have in common; on a CPU those that it can do."""
    import torch

    return {
        "warmup_steps": 5,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output_dir": str(out),
        "report_to": "none",
        "bf16": bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataset_text_field": "text",
    }
