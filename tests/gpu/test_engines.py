"""unsloth trains what transformers trains, on a GPU, in 4 bit and in 16: same batches, same labels,
losses within what bfloat16 rounds off.

No fixtures here, so that `tests.gpu.run` can run the same functions without pytest.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.train import parity
from tests.train.parity import ENGINES

LOADED = ("4bit", "16bit")
LIMIT = 240  # seconds for one engine's trainings
LOSSES = 0.01  # of the loss
# Of the logits' length: bfloat16 keeps 8 bits, and the two engines round in different places.
LOGITS = 0.02


def why_not() -> str | None:
    """Why there is nothing to test here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: these compare the engines' GPU kernels"
    return parity.missing()


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lorajob-parity-")


@cache
def trained(load_in: str) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What each engine's trainings told, and where they are; once for all tests."""
    work = Path(_folder().name) / load_in
    return work, {engine: parity.trained(engine, work, load_in, LIMIT) for engine in ENGINES}


def test_both_engines_have_the_same_losses() -> None:
    for load_in in LOADED:
        _, found = trained(load_in)
        parity.require_same_losses(found, "8x1", LOSSES, parity.STEPS)
        parity.require_same_losses(found, "packed", LOSSES, 3)
        for engine in ENGINES:
            parity.require_learning(found[engine], 0.8)


def test_how_a_step_is_split_changes_nothing() -> None:
    for load_in in LOADED:
        _, found = trained(load_in)
        for engine in ENGINES:
            parity.require_same_whatever_the_plan(found[engine], LOSSES)


def test_the_model_gets_our_batches_laid_end_to_end() -> None:
    for load_in in LOADED:
        work, found = trained(load_in)
        for engine in ENGINES:
            parity.require_what_was_made_arrives(found[engine], parity.items_of(work))
            for training in ("8x1", "packed"):
                parts = found[engine][training]["parts"]
                assert all(len(part["input_ids"]) == 1 and "position_ids" in part for part in parts)


def test_each_engine_reads_the_others_adapter() -> None:
    for load_in in LOADED:
        work, _ = trained(load_in)
        for engine in ENGINES:
            parity.require_readable(parity.read(engine, work, load_in, LIMIT), LOGITS)


def test_attention_is_by_a_flash_kernel() -> None:
    from jobs.train.attention import no_varlen_kernel

    if no_varlen_kernel():
        return  # an older card
    for load_in in LOADED:
        _, found = trained(load_in)
        for engine in ENGINES:
            assert "varlen" in found[engine]["8x1"]["kernels"][-1], found[engine]["8x1"]["kernels"]
