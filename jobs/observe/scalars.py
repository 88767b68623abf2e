"""The curves of a training, as trackers know them: names and values by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30

# From an event's field to the curve's name, and what it is divided by.
CURVES = {
    "loss": ("train/loss", 1),
    "eval_loss": ("eval/loss", 1),
    "learning_rate": ("train/learning_rate", 1),
    "grad_norm": ("train/grad_norm", 1),
    "epoch": ("train/epoch", 1),
    "tokens_per_second": ("speed/tokens_per_second", 1),
    "gpu_memory_bytes": ("memory/gpu_gib", GIB),
    "memory_bytes": ("memory/process_gib", GIB),
}
EVENTS = ("train_step", "eval", "retention")


def scalars(fields: dict[str, Any]) -> dict[str, float]:
    """The curves' values in one of the EVENTS, or in an entry of the history."""
    if "source" in fields:  # the loss on what the model should still know
        return {f"retention/{fields['source']}": float(fields["loss"])}
    return {
        name: float(fields[field]) / unit
        for field, (name, unit) in CURVES.items()
        if isinstance(fields.get(field), int | float)
    }


def step_of(checkpoint: str) -> int:
    """checkpoint-120 is of step 120."""
    return int(checkpoint.rpartition("-")[2])


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint says was seen before it; nothing where it cannot be read."""
    try:
        history = json.loads((checkpoint / "progress.json").read_text("utf-8"))["history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [entry for entry in history if isinstance(entry, dict) and "step" in entry]
