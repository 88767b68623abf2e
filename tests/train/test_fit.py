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
from jobs.train import loop
from jobs.train.checkpoints import Checkpoints
from jobs.train.fit import Plan, is_out_of_memory
from tests.conftest import ROOT
from tests.train.test_resume import fresh_signals, go, prepared, spec  # noqa: F401


def test_smaller_plans_cover_the_same_step() -> None:
    plan: Plan | None = Plan.whole(12, packing=False)
    seen = []
    while plan:
        seen.append((plan.rows, plan.accumulate))
        plan = plan.smaller()
    assert seen == [(12, 1), (6, 2), (3, 4), (1, 12)]
    assert Plan.whole(8, packing=True) == Plan(1, 8)
    assert Plan(7, 1).smaller() == Plan(1, 7)


def test_every_plan_gives_the_same_losses_and_the_same_adapter_within_rounding(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = spec(batch_size=8, max_steps=4)
    found = {}
    for rows in (8, 4, 2, 1):
        plan = Plan(rows, 8 // rows)
        monkeypatch.setattr(Plan, "whole", lambda *arguments, plan=plan: plan)
        result, _ = go(tokenizer, prepared, tmp_path / str(rows), wanted)
        assert result["plan"] == {"rows": rows, "accumulate": 8 // rows}
        losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
        path = tmp_path / str(rows) / "out" / "adapter" / "adapter_model.safetensors"
        found[rows] = losses, load_file(path)
    losses, weights = found[8]
    for other_losses, other in (found[4], found[2], found[1]):
        assert other_losses == pytest.approx(losses, abs=2e-5)
        for name, weight in weights.items():
            assert (other[name] - weight).abs().max() < 2e-4, name


def refuse_above(monkeypatch: pytest.MonkeyPatch, rows: int, from_step: int = 0) -> list[int]:
    """A device on which more rows at a time do not fit, from a step on. The rows tried."""
    tried: list[int] = []
    real = loop.Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        at_once = len(inputs["input_ids"])
        if at_once not in tried:
            tried.append(at_once)
        if at_once > rows and self.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, model, inputs, *args, **kw)

    monkeypatch.setattr(loop.Trainer, "compute_loss", compute_loss)
    return tried


def test_what_does_not_fit_is_known_before_the_first_step_and_taken_in_smaller_parts(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = spec(batch_size=8, max_steps=3)
    whole, _ = go(tokenizer, prepared, tmp_path / "whole", wanted)
    tried = refuse_above(monkeypatch, 2)
    result, _ = go(tokenizer, prepared, tmp_path / "small", wanted)
    assert tried[:3] == [8, 4, 2]  # and fewer at the end of an epoch
    assert result["plan"] == {"rows": 2, "accumulate": 4}
    assert result["train_loss"] == pytest.approx(whole["train_loss"], abs=2e-5)


def test_memory_that_runs_out_later_costs_no_step(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = spec(batch_size=4, max_steps=5, dropout=0.0)
    whole, _ = go(tokenizer, prepared, tmp_path / "whole", wanted)
    refuse_above(monkeypatch, 2, from_step=3)
    result, _ = go(tokenizer, prepared, tmp_path / "small", wanted)
    assert result["plan"] == {"rows": 2, "accumulate": 2}
    steps = [entry["step"] for entry in result["history"] if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5]
    assert result["train_loss"] == pytest.approx(whole["train_loss"], abs=2e-5)


def test_after_three_times_it_says_what_would_help(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = refuse_above(monkeypatch, 0)
    with pytest.raises(DoesNotFitError, match=r"with 1 rows of up to \d+ tokens") as caught:
        go(tokenizer, prepared, tmp_path, spec(batch_size=8))
    assert tried == [8, 4, 2, 1]
    assert "max_seq_length" in str(caught.value.hint)


def test_a_resume_keeps_the_plan(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = spec({"every_steps": 2}, batch_size=4, max_steps=5, dropout=0.1)
    with monkeypatch.context() as patch:
        refuse_above(patch, 2)
        _, expected = go(tokenizer, prepared, tmp_path, wanted)
    found = Checkpoints(tmp_path / "checkpoints", {"what": "a test"}).newest()
    assert found is not None
    (found / "complete.json").unlink()  # the last one: go on from the one before
    result, digest = go(tokenizer, prepared, tmp_path, wanted)
    assert result["plan"] == {"rows": 2, "accumulate": 2}
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
