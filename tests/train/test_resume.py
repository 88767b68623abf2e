"""A training that was stopped anywhere and went on ends with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import stop
from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import SpecError, VerificationError
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.store.hashing import sha256_of
from jobs.store.local import LocalStore
from jobs.train import loop, progress, trainer
from jobs.train.checkpoints import MARKER, Checkpoints, filled
from tests.conftest import BASE, ROOT

DATA = ROOT / "examples" / "demo" / "data" / "persona.jsonl"
STEPS = 7


def spec(checkpoints: dict[str, Any] | None = None, **train: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "test",
            "model": {"base": str(BASE), "max_seq_length": 128},
            "data": {"train": {"source": str(DATA), "limit": 24}, "eval": 0.2},
            "lora": {"rank": 4, "dropout": train.pop("dropout", 0.0)},
            "train": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, **train},
            "checkpoints": checkpoints or {},
        }
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(spec().data, Recipe(TokenizerFiles(BASE), "responses", 128, "drop", 3407), folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stop, "_state", stop._State())
    yield


def go(
    tokenizer: ChatTokenizer,
    data: Path,
    folder: Path,
    wanted: Spec,
    remote: LocalStore | None = None,
    **checkpoints: Any,
) -> tuple[dict[str, Any], str]:
    """One process's part; the result, and the adapter's sha256."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    kept = Checkpoints(folder / "checkpoints", {"what": "a test"}, remote, **checkpoints)
    try:
        result = loop.train(wanted, BASE, tokenizer, data, out, kept, Observer("json"))
    finally:
        assert kept.wait(30)
    return result, sha256_of(out / "adapter" / "adapter_model.safetensors")


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str, step: int) -> None:
    """Tell the process to stop, as a signal would, when a step's hook is reached."""
    real = getattr(progress.Progress, where)

    def hook(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            stop._state.signal = 15
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(progress.Progress, where, hook)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "eight-bit": {"optimizer": "adamw_8bit", "dropout": 0.1},
    "packing": {"packing": True, "batch_size": 2, "dropout": 0.1},
    "evaluating": {"eval_every": 2, "dropout": 0.1},
    "cosine over epochs": {"max_steps": None, "epochs": 2, "schedule": "cosine", "dropout": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_gone_on_with_on_an_empty_disk_gives_the_same_bits(
    tokenizer: ChatTokenizer,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    wanted = spec(**CASES[case])
    whole, expected = go(tokenizer, prepared, tmp_path / "whole", wanted)
    remote = LocalStore(tmp_path / "store")
    steps = whole["steps"]
    places = [
        ("on_step_end", 1),
        ("on_step_begin", 2),
        ("on_step_end", 5),
        ("on_step_end", steps),
    ]
    done: tuple[dict[str, Any], str] | None = None
    reached = []
    for number, (where, step) in enumerate(places):
        with monkeypatch.context() as patch:
            patch.setattr(stop, "_state", stop._State())
            stop_at(patch, where, step)
            with pytest.raises(stop.Stop):
                go(tokenizer, prepared, tmp_path / f"machine-{number}", wanted, remote)
        names = [e.key.split("/")[1] for e in remote.entries() if e.key.endswith(MARKER)]
        reached.append(max(int(name.rpartition("-")[2]) for name in names))
    # No step is lost beyond the one in progress: where it is of several batches, between those.
    assert reached == [1, 2 if case == "packing" else 3, 5, steps]
    done = go(tokenizer, prepared, tmp_path / "last", wanted, remote)
    assert done[1] == expected
    for name in ("steps", "train_loss", "eval_loss", "eval_loss_before"):
        assert done[0][name] == whole[name], name
    times = ("tokens_per_second",)
    plain = [{k: v for k, v in e.items() if k not in times} for e in whole["history"]]
    assert [{k: v for k, v in e.items() if k not in times} for e in done[0]["history"]] == plain


def test_stopped_within_a_step_only_that_step_is_done_again(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(packing=True, batch_size=3, dropout=0.1, max_steps=4)
    _, expected = go(tokenizer, prepared, tmp_path / "whole", wanted)
    with monkeypatch.context() as patch:
        real = trainer.Trainer.compute_loss

        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                stop._state.signal = 15  # in the first part of the third step
            return real(self, *args, **kwargs)

        patch.setattr(trainer.Trainer, "compute_loss", compute_loss)
        with pytest.raises(stop.Stop):
            go(tokenizer, prepared, tmp_path / "a", wanted)
    assert [p.parent.name for p in (tmp_path / "a" / "checkpoints").rglob(MARKER)] == [
        "checkpoint-2"
    ]
    monkeypatch.setattr(stop, "_state", stop._State())
    assert go(tokenizer, prepared, tmp_path / "a", wanted)[1] == expected


def test_stopped_while_evaluating_the_evaluation_is_done_again(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(eval_every=2, dropout=0.1)
    whole, expected = go(tokenizer, prepared, tmp_path / "whole", wanted)
    real = trainer.Trainer.evaluate
    with monkeypatch.context() as patch:

        def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
            stop._state.signal = 15 if self.state.global_step == 4 else None
            return real(self, *args, **kwargs)

        patch.setattr(trainer.Trainer, "evaluate", evaluate)
        with pytest.raises(stop.Stop):
            go(tokenizer, prepared, tmp_path / "a", wanted)
    monkeypatch.setattr(stop, "_state", stop._State())
    result, digest = go(tokenizer, prepared, tmp_path / "a", wanted)
    assert digest == expected
    evals = [(e["step"], e["eval_loss"]) for e in result["history"] if "eval_loss" in e]
    assert evals == [(e["step"], e["eval_loss"]) for e in whole["history"] if "eval_loss" in e]


def test_data_workers_change_nothing(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = spec(dropout=0.2, max_steps=3)
    _, expected = go(tokenizer, prepared, tmp_path / "none", wanted)
    real: Callable[..., Any] = trainer.arguments_of

    def two_workers(*args: Any) -> Any:
        arguments = real(*args)
        arguments.dataloader_num_workers = 2
        return arguments

    monkeypatch.setattr(loop, "arguments_of", two_workers)
    assert go(tokenizer, prepared, tmp_path / "two", wanted)[1] == expected


def test_checkpoints_are_read_without_running_code_of_theirs(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    go(tokenizer, prepared, tmp_path, spec({"every_steps": 3}, optimizer="adamw_8bit"), keep=9)
    folder = tmp_path / "checkpoints" / "checkpoint-3"
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)
    assert {path.suffix for path in folder.iterdir()} <= {".pt", ".json", ".safetensors", ".jinja", ".model"}  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    wanted = spec({"every_steps": 2, "keep": 5}, dropout=0.1)
    _, expected = go(tokenizer, prepared, tmp_path, wanted, keep=5)
    folder = tmp_path / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-7"]
    (folder / "checkpoint-7" / MARKER).unlink()  # half-written
    with (folder / "checkpoint-6" / "optimizer.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    (folder / "checkpoint-4" / "adapter_model.safetensors").unlink()
    kept = Checkpoints(folder, {"what": "a test"})
    found = kept.newest()
    assert found is not None
    assert found.name == "checkpoint-2"
    assert go(tokenizer, prepared, tmp_path, wanted, keep=5)[1] == expected


def test_only_the_newest_are_kept_here_and_in_the_store(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    remote = LocalStore(tmp_path / "store")
    go(tokenizer, prepared, tmp_path / "a", spec({"every_steps": 1}), remote)
    here = {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()}
    there = {entry.key.split("/")[1] for entry in remote.entries()}
    assert here == {"checkpoint-6", "checkpoint-7"}
    assert "checkpoint-7" in there  # what comes too quickly is left out
    assert len(there) <= 2


def test_a_changed_spec_says_what_changed_or_begins_anew(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    go(tokenizer, prepared, tmp_path, spec())
    before = {"train": {"learning_rate": 1e-3, "seed": 1}, "base": "a"}
    for folder in (tmp_path / "checkpoints").iterdir():
        marker = json.loads((folder / MARKER).read_text())
        unfinished = {**marker, "inputs": before, "finished": False}
        (folder / MARKER).write_text(json.dumps(unfinished))
    now = {"train": {"learning_rate": 2e-3, "seed": 1}, "base": "a"}
    with pytest.raises(SpecError, match=r"train\.learning_rate: 0\.001, 0\.002") as caught:
        Checkpoints(tmp_path / "checkpoints", now).newest()
    assert "seed" not in caught.value.message
    assert Checkpoints(tmp_path / "checkpoints", now, if_changed="restart").newest() is None
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_checkpoint_says_whether_its_training_has_come_to_its_end(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    go(tokenizer, prepared, tmp_path, spec({"every_steps": 3}), keep=9)
    found = {
        folder.name: json.loads((folder / MARKER).read_text())["finished"]
        for folder in (tmp_path / "checkpoints").iterdir()
    }
    assert found == {"checkpoint-3": False, "checkpoint-6": False, "checkpoint-7": True}


def kept(folder: Path, step: int, inputs: dict[str, Any], **finished: bool) -> None:
    """A checkpoint of some training, without any training."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    Checkpoints(folder.parent, inputs, keep=9).commit(folder, step, **finished)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in a store"])
def test_those_of_a_training_that_had_come_to_its_end_do_not_stand_in_the_way(
    tmp_path: Path, elsewhere: bool
) -> None:
    place = tmp_path / "store" / "checkpoints" if elsewhere else tmp_path / "here"
    kept(place, 40, {"train": {"epochs": 3}, "data": "aaa"})
    kept(place, 60, {"train": {"epochs": 3}, "data": "aaa"}, finished=True)
    told: list[str] = []
    remote = LocalStore(tmp_path / "store") if elsewhere else None
    now = {"train": {"epochs": 5}, "data": "bbb"}
    assert Checkpoints(tmp_path / "here", now, remote, tell=told.append).newest() is None
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert len(told) == 1
    assert "begins anew" in told[0]
    assert "end at step 60" in told[0]
    assert "train.epochs: 3, 5" in told[0]
    assert "data: other conversations, chat template or settings of data" in told[0]
    assert "aaa" not in told[0]


def test_a_finished_training_keeps_its_own_checkpoint(tmp_path: Path) -> None:
    kept(tmp_path, 60, {"a": 1}, finished=True)
    found = Checkpoints(tmp_path, {"a": 1}).newest()
    assert found is not None
    assert found.name == "checkpoint-60"


@pytest.mark.parametrize("finished", [{"finished": False}, None], ids=["unfinished", "an older lorajob's"])  # fmt: skip
def test_those_of_an_unfinished_training_still_do(
    tmp_path: Path, finished: dict[str, bool] | None
) -> None:
    kept(tmp_path, 60, {"data": "aaa", "base": "b"}, **(finished or {}))
    if finished is None:
        marker = json.loads((tmp_path / "checkpoint-60" / MARKER).read_text())
        del marker["finished"]
        (tmp_path / "checkpoint-60" / MARKER).write_text(json.dumps(marker))
    # Another that is finished says nothing of this one.
    kept(tmp_path, 80, {"data": "ccc", "base": "b"}, finished=True)
    with pytest.raises(SpecError, match="checkpoint of step 60") as caught:
        Checkpoints(tmp_path, {"data": "bbb", "base": "b"}).newest()
    assert "data: other conversations, chat template or settings of data" in caught.value.message
    assert "base" not in caught.value.message
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_last_good_checkpoint(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.Trainer.training_step

    def step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, model, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(trainer.Trainer, "training_step", step)
    with pytest.raises(VerificationError, match="step 4 the loss is nan"):
        go(tokenizer, prepared, tmp_path, spec({"every_steps": 1}))
    found = Checkpoints(tmp_path / "checkpoints", {"what": "a test"}).newest()
    assert found is not None
    assert found.name == "checkpoint-3"


def test_a_store_that_fails_does_not_stop_the_training(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be")
    told: list[str] = []
    remote = LocalStore(blocked)
    result, _ = go(tokenizer, prepared, tmp_path / "a", spec(), remote, tell=told.append)
    assert result["steps"] == STEPS
    assert told
    assert "could not be kept in the store" in told[0]


def test_a_checkpoint_of_an_older_lorajob_lacks_fields_that_had_their_defaults() -> None:
    defaults = {"train": {"seed": 1, "new": None}, "lora": {"dora": False}}
    older = {"base": "b", "train": {"seed": 2}, "lora": {}}
    assert filled(older, defaults) == {
        "base": "b", "train": {"seed": 2, "new": None}, "lora": {"dora": False},
    }  # fmt: skip
    assert older == {"base": "b", "train": {"seed": 2}, "lora": {}}
