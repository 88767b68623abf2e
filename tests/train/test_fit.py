"""The plan never changes the mathematics, and memory that runs out makes it smaller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DoesNotFitError
from jobs.train import loop, trainer
from jobs.train.checkpoints import Checkpoints
from jobs.train.fit import ENOUGH, Plan, find_plan, is_out_of_memory
from tests.conftest import ROOT
from tests.train.test_resume import fresh_signals, go, prepared, spec  # noqa: F401


def test_smaller_plans_go_down_to_the_longest_row() -> None:
    plan: Plan | None = Plan(1000)
    seen = []
    while plan:
        seen.append(plan.tokens)
        plan = plan.smaller(longest=120)
    assert seen == [1000, 500, 250, 125, 120]


@pytest.mark.parametrize("off", [None, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("free", [2, 5, 9, 12, 20, 40, 80, 140])
def test_the_plan_fits_and_hardly_a_larger_one_would(free: int, off: float | None) -> None:
    """A card on which 5.6 GiB are taken before the first token, and keeping activations costs nine
    times what making them again does; the cost of a token is no straight line at first."""
    gib = 2**30

    def cost(tokens: float, checkpointing: bool) -> float:
        each = 0.00045 if checkpointing else 0.0040
        return 5.6 + max(0.8, each * tokens) + 0.2

    tried = []

    def peak(plan: Plan) -> int:
        tried.append(plan)
        took = cost(plan.tokens, plan.checkpointing)
        if took > free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return int(took * gib)

    def reckon(plan: Plan) -> int:
        assert off is not None
        return int(cost(plan.tokens, plan.checkpointing) * off * gib)

    plan = find_plan(100_000, 2048, free * gib, peak, reckon if off else None)
    assert len(tried) <= (3 if off == 1.0 else 12)
    if free <= 5:
        assert plan == Plan(2048, checkpointing=True)  # what is tried first says that it does not
        return
    taken = cost(plan.tokens, plan.checkpointing)
    assert taken <= free
    if plan.tokens < ENOUGH:
        assert cost(1.05 * plan.tokens + 2 * 512, plan.checkpointing) > 0.93 * free
    assert plan.checkpointing == (free < 15)


def test_every_plan_gives_the_same_losses_and_the_same_adapter_within_rounding(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(batch_size=8, max_steps=4)
    found = []
    for tokens in (10_000, 300, 150, 1):
        monkeypatch.setattr(loop, "whole", lambda *arguments, tokens=tokens: tokens)
        result, _ = go(tokenizer, prepared, tmp_path / str(tokens), wanted)
        assert result["plan"] == {"tokens": tokens, "checkpointing": False, "unpacked": False}
        losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
        path = tmp_path / str(tokens) / "out" / "adapter" / "adapter_model.safetensors"
        found.append((losses, load_file(path)))
    losses, weights = found[0]
    for other_losses, other in found[1:]:
        assert other_losses == pytest.approx(losses, abs=2e-5)
        for name, weight in weights.items():
            assert (other[name] - weight).abs().max() < 2e-4, name


def refuse_above(monkeypatch: pytest.MonkeyPatch, tokens: int, from_step: int = 0) -> list[int]:
    """A device on which more tokens at a time do not fit, from a step on. Those tried and refused."""
    refused: list[int] = []
    real = trainer.Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        at_once = inputs["input_ids"].numel()
        if at_once > tokens and self.state.global_step >= from_step:
            refused.append(at_once)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, model, inputs, *args, **kw)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", compute_loss)
    return refused


def test_what_does_not_fit_is_known_before_the_first_step_and_taken_in_smaller_parts(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(batch_size=8, max_steps=3)
    whole, _ = go(tokenizer, prepared, tmp_path / "whole", wanted)
    most = whole["plan"]["tokens"]
    refused = refuse_above(monkeypatch, most // 3)
    result, _ = go(tokenizer, prepared, tmp_path / "small", wanted)
    assert result["plan"]["tokens"] == most // 4
    assert len(refused) == 2
    assert result["train_loss"] == pytest.approx(whole["train_loss"], abs=2e-5)


def test_memory_that_runs_out_later_costs_no_step(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(batch_size=4, max_steps=5, dropout=0.0)
    whole, _ = go(tokenizer, prepared, tmp_path / "whole", wanted)
    refused = refuse_above(monkeypatch, whole["plan"]["tokens"] // 2, from_step=3)
    result, _ = go(tokenizer, prepared, tmp_path / "small", wanted)
    assert refused
    assert result["plan"]["tokens"] < whole["plan"]["tokens"]
    steps = [entry["step"] for entry in result["history"] if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5]
    assert result["train_loss"] == pytest.approx(whole["train_loss"], abs=2e-5)


def test_after_three_times_it_says_what_would_help(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refuse_above(monkeypatch, 0)
    with pytest.raises(
        DoesNotFitError, match=r"tokens at a time, and the longest row has \d+"
    ) as caught:
        go(tokenizer, prepared, tmp_path, spec(batch_size=8))
    assert len(refused) == 4
    assert "max_seq_length" in str(caught.value.hint)


def test_a_resume_keeps_the_plan(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec({"every_steps": 2}, batch_size=4, max_steps=5, dropout=0.1)
    with monkeypatch.context() as patch:
        refuse_above(patch, 140)
        first, expected = go(tokenizer, prepared, tmp_path, wanted)
    found = Checkpoints(tmp_path / "checkpoints", {"what": "a test"}).newest()
    assert found is not None
    (found / "complete.json").unlink()  # the last one: go on from the one before
    result, digest = go(tokenizer, prepared, tmp_path, wanted)
    assert result["plan"] == first["plan"]
    assert result["plan"]["tokens"] <= 140
    assert digest == expected


CHILD = """
import resource, sys, torch
from jobs.train.fit import is_out_of_memory
torch.ones(10)
used = int(open('/proc/self/statm').read().split()[5]) * 4096  # data and stack
resource.setrlimit(resource.RLIMIT_DATA, (used + 200 * 2**20, resource.RLIM_INFINITY))
torch.ones(20 * 2**20)
try:
    torch.ones(400 * 2**20)
except Exception as error:
    print(type(error).__name__, is_out_of_memory(error))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")  # noqa: PTH110
def test_an_allocator_that_really_refuses_is_understood() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[1:] == ["True"], json.dumps([done.stdout, done.stderr[-500:]])
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
