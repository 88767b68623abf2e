"""Early stopping, and the best weights: the same whether or not the training was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from jobs import stop
from jobs.data.tokenizer import ChatTokenizer
from jobs.spec import EarlyStopping, Spec
from jobs.store.local import LocalStore
from jobs.train import trainer
from jobs.train.best import best_of, is_exhausted
from jobs.train.checkpoints import MARKER
from tests.test_spec import tree
from tests.train.test_resume import fresh_signals, go, prepared, spec, stop_at  # noqa: F401

# What the evaluation after each step finds: the best is the second, and the fourth is the last.
LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.25, 5: 1.0}
STOPPING: dict[str, Any] = {"early_stopping": {"patience": 2}, "eval_every": 1, "dropout": 0.1}


def entries(*losses: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": n, "eval_loss": each} for n, each in enumerate(losses)]
    return [{"step": 0, "loss": 9.0}, *found]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "ends"),
    [
        ((), 1, 0.0, False),
        ((3.0,), 1, 0.0, False),
        ((3.0, 2.0, 1.0), 1, 0.0, False),
        ((3.0, 3.0), 1, 0.0, True),
        ((3.0, 3.1, 2.9, 3.0), 2, 0.0, False),
        ((3.0, 3.1, 2.9, 3.0, 2.95), 2, 0.0, True),
        ((3.0, 2.9, 2.8), 2, 0.5, True),
        ((3.0, 2.7, 2.4, 2.2), 2, 0.5, False),  # together they are enough
        ((3.0, float("nan"), float("nan")), 2, 0.0, True),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_lower_loss(
    losses: tuple[float, ...], patience: int, min_delta: float, ends: bool
) -> None:
    settings = EarlyStopping(patience=patience, min_delta=min_delta)
    assert is_exhausted(entries(*losses), settings) == ends


def test_the_best_is_the_first_of_the_lowest() -> None:
    found = best_of(entries(3.0, float("nan"), 2.0, 2.5, 2.0))
    assert found is not None
    assert found["step"] == 2
    assert best_of([{"step": 1, "loss": 1.0}]) is None


def test_both_go_by_held_out_data() -> None:
    trains: list[dict[str, Any]] = [{"early_stopping": {}}, {"keep_best": True}]
    for train in trains:
        with pytest.raises(ValidationError, match=r"set data\.eval"):
            Spec.model_validate(tree(train=train))
        with pytest.raises(ValidationError, match=r"set data\.eval"):
            Spec.model_validate(tree(train=train, data={"train": "x.jsonl", "eval": 0.0}))
        held = {"train": "x.jsonl", "eval": 0.1}
        assert Spec.model_validate(tree(train=train, data=held)).train.keeps_best
    last = {"early_stopping": {}, "keep_best": False}
    assert not Spec.model_validate(tree(train=last, data=held)).train.keeps_best
    assert not Spec.model_validate(tree(data=held)).train.keeps_best


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations take place, and what they find is in LOSSES."""
    real = trainer.Trainer.measure

    def measure(self: Any, rows: Any) -> tuple[float, int]:
        loss, tokens = real(self, rows)
        return LOSSES.get(self.state.global_step, loss), tokens

    monkeypatch.setattr(trainer.Trainer, "measure", measure)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_the_best_weights_are_exported_and_training_ends_early(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = spec({"every_steps": 1}, **STOPPING)
    result, _ = go(tokenizer, prepared, tmp_path / "a", wanted, keep=9)
    assert '"event": "stopped_early"' in capsys.readouterr().out
    found = {
        k: result[k] for k in ("steps", "max_steps", "stopped_early", "best_step", "eval_loss")
    }
    assert found == {"steps": 4, "max_steps": 7, "stopped_early": True, "best_step": 2, "eval_loss": 2.0}  # fmt: skip
    exported = adapter(tmp_path / "a" / "out" / "adapter")
    checkpoints = tmp_path / "a" / "checkpoints"
    finished = [
        json.loads((checkpoints / f"checkpoint-{step}" / "complete.json").read_text())["finished"]
        for step in (3, 4)
    ]
    assert finished == [False, True]
    assert same(exported, adapter(checkpoints / "checkpoint-2"))
    assert not same(exported, adapter(checkpoints / "checkpoint-4"))

    last = spec({"every_steps": 1}, **{**STOPPING, "keep_best": False})
    result, _ = go(tokenizer, prepared, tmp_path / "b", last, keep=9)
    assert (result["steps"], result["best_step"], result["eval_loss"]) == (4, None, 2.25)
    assert same(adapter(tmp_path / "b" / "out" / "adapter"), adapter(checkpoints / "checkpoint-4"))


def test_stopped_anywhere_it_ends_at_the_same_step_with_the_same_bits(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(**STOPPING)
    whole, expected = go(tokenizer, prepared, tmp_path / "whole", wanted)
    remote = LocalStore(tmp_path / "store")
    steps = []
    real = trainer.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step + 1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)

    def one(number: int) -> tuple[dict[str, Any], str]:
        # Of the checkpoints one is kept: that of the best step is gone when it is needed.
        monkeypatch.setattr(stop, "_state", stop._State())
        return go(tokenizer, prepared, tmp_path / f"{number}", wanted, remote, keep=1)

    with monkeypatch.context() as patch:
        stop_at(patch, "on_step_end", 3)
        with pytest.raises(stop.Stop):
            one(0)
    evaluate = trainer.Trainer.evaluate
    with monkeypatch.context() as patch:

        def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                stop._state.signal = 15  # in the evaluation that would end it
            return evaluate(self, *args, **kwargs)

        patch.setattr(trainer.Trainer, "evaluate", stopped)
        with pytest.raises(stop.Stop):
            one(1)
    names = {e.key.split("/")[1] for e in remote.entries() if e.key.endswith(MARKER)}
    assert names == {"checkpoint-4"}
    result, digest = one(2)
    assert digest == expected
    assert steps == [1, 2, 3, 4]  # each once, and none after the end
    for name in ("steps", "stopped_early", "best_step", "eval_loss", "train_loss"):
        assert result[name] == whole[name], name
    again, digest = one(3)  # from the checkpoint of the end, which needs no evaluation any more
    assert (digest, again["best_step"], len(steps)) == (expected, 2, 4)


def test_without_early_stopping_the_best_can_be_kept_as_well(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    wanted = spec({"every_steps": 1}, max_steps=4, eval_every=1, keep_best=True)
    result, _ = go(tokenizer, prepared, tmp_path, wanted, keep=9)
    assert (result["steps"], result["stopped_early"], result["best_step"]) == (4, False, 2)
    best = adapter(tmp_path / "checkpoints" / "checkpoint-2")
    assert same(adapter(tmp_path / "out" / "adapter"), best)
