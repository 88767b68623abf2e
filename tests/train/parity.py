"""The same training by each engine, in a process of its own: unsloth changes what it is beside.

    python3 -m tests.train.parity JSON          one process: several trainings, or reading adapters

What the tests of a CPU and those of a GPU share. `trained` and `read` start such processes;
each training tells its losses, how many tokens each step trained, the batches that the trainer got
and what of them arrived in the model.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BASE = ROOT / "examples" / "demo" / "base"
DATA = ROOT / "examples" / "demo" / "data" / "persona.jsonl"
LENGTH = 256
BATCH = 8
STEPS = 30
ENGINES = ("transformers", "unsloth")

# What a batch may hold besides its rows' tokens; each must arrive as it was made.
CARRIED = ("input_ids", "labels", "position_ids", "attention_mask", "packed_seq_lengths")

# What the tests ask of each engine. `at_once`: rows that go through the model at a time.
TRAININGS: tuple[dict[str, Any], ...] = (
    {"name": "8x1", "at_once": 8, "steps": STEPS, "watch": 2},
    {"name": "2x4", "at_once": 2, "steps": 5, "watch": 2},
    {"name": "1x8", "at_once": 1, "steps": 5},
    {"name": "made-again", "at_once": 8, "steps": 5, "checkpointing": True},
    {"name": "packed", "at_once": 8, "steps": 3, "packing": True, "watch": 2},
)


def missing() -> str | None:
    """Why the engines cannot be compared here."""
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed: there is no second engine to compare with"
    return None


# --- asked by the tests


def trained(engine: str, work: Path, load_in: str, limit: float) -> dict[str, Any]:
    """Each of TRAININGS by that engine; its adapters are below `work/engine/NAME/adapter`."""
    return in_a_process(
        {"engine": engine, "out": str(work / engine), "load_in": load_in, "trainings": TRAININGS},
        limit,
    )


def read(engine: str, work: Path, load_in: str, limit: float) -> dict[str, Any]:
    """By that engine, the adapter of every engine: how far its logits are from those that the
    training ended with."""
    folders = {name: str(work / name / TRAININGS[0]["name"]) for name in ENGINES}
    return in_a_process(
        {"engine": engine, "out": str(work / engine), "load_in": load_in, "read": folders}, limit
    )


def in_a_process(
    asked: dict[str, Any], limit: float, module: str = "tests.train.parity"
) -> dict[str, Any]:
    """What `python3 -m module` finds, with the engine `asked` for, in so many seconds. What it writes
    is below `asked["out"]`. Raises AssertionError with the end of what it said."""
    out = Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(out / "compiled"),
    }
    result = out / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps({**asked, "result": str(result)})],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{asked['engine']}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


# --- what the tests hold


def require_same_losses(
    found: dict[str, dict[str, Any]], training: str, tolerance: float, steps: int
) -> None:
    """Both engines' losses, step by step; and that there is something to compare."""
    first, second = (found[engine][training] for engine in ENGINES)
    assert first["trained"] == second["trained"]
    assert len(first["losses"]) == len(second["losses"]) == steps
    assert_near(first["losses"], second["losses"], tolerance)


def require_same_whatever_the_plan(found: dict[str, Any], tolerance: float) -> None:
    """Rows one at a time, two at a time and all at once, with activations kept or made again: the
    same losses, of the same tokens."""
    whole, pairs, single, again = (found[name] for name in ("8x1", "2x4", "1x8", "made-again"))
    assert [len(step) for step in whole["rows"]] == [1] * len(whole["rows"])
    assert pairs["rows"][0] == [2] * 4
    assert single["rows"][0] == [1] * 8
    for other in (pairs, single, again):
        steps = len(other["losses"])
        assert other["trained"] == whole["trained"][:steps]
        assert_near(other["losses"], whole["losses"][:steps], tolerance)


def require_learning(found: dict[str, Any], share: float) -> None:
    losses = found["8x1"]["losses"]
    assert losses[-1] < share * losses[0], losses


def require_what_was_made_arrives(found: dict[str, Any], items: list[Any]) -> None:
    """In the model's forward: our batches, token by token, label by label, and nothing else."""
    made = {tuple(item["input_ids"]): item["labels"] for item in items}
    for training in (name for name in found if found[name]["parts"]):
        parts, arrived = found[training]["parts"], found[training]["arrived"]
        assert len(parts) == len(arrived) > 0
        for part, inputs in zip(parts, arrived, strict=True):
            for name in CARRIED:
                if name in part:
                    assert inputs.get(name) == part[name], (training, name)
            assert inputs.get("attention_mask") is None or "attention_mask" in part
            for ids, labels in conversations(part):
                # What would predict a first token is another conversation's end, if anything.
                assert labels[1:] == made[tuple(ids)][1:]
                assert any(label != -100 for label in labels)


def require_readable(read: dict[str, Any], tolerance: float) -> None:
    """Either engine's adapter gives the logits that its training ended with, in this one too."""
    for trainer in ENGINES:
        untrained = read["untrained"][trainer]
        assert untrained > 20 * tolerance, f"the adapter makes no difference: {untrained}"
        assert read[trainer] <= tolerance, f"of {trainer}: {read[trainer]} off"


def conversations(part: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The rows of a batch, without padding; of one laid end to end, where positions begin anew."""
    found = []
    for row, (ids, labels) in enumerate(zip(part["input_ids"], part["labels"], strict=True)):
        if "attention_mask" in part:
            size = sum(part["attention_mask"][row])
            found.append((ids[:size], labels[:size]))
            continue
        starts = [at for at, position in enumerate(part["position_ids"][row]) if position == 0]
        ends = [*starts[1:], len(ids)]
        found += [(ids[a:b], labels[a:b]) for a, b in zip(starts, ends, strict=True)]
    return found


def assert_near(found: list[float], expected: list[float], tolerance: float) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        assert abs(one - other) <= tolerance * abs(other), f"step {step}: {one} and {other}"


def items_of(work: Path) -> list[Any]:
    """The rows that were trained, as they are on disk."""
    from jobs.train.rows import load_rows

    rows = load_rows(work / ENGINES[0] / "rows" / "train.arrow")
    assert rows is not None
    return list(rows)


# --- in the process


def asked_with_engine() -> dict[str, Any]:
    """What this process was asked for; its engine is started, which has to come before all else."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    from jobs.train.engines import start_engine
    from jobs.train.runtime import settle_threads

    settle_threads()
    start_engine(asked["engine"])
    from jobs.train.runtime import quiet_libraries

    quiet_libraries()
    return asked


def main() -> None:
    asked = asked_with_engine()
    found = _read(asked) if "read" in asked else _train(asked)
    Path(asked["result"]).write_text(json.dumps(found), "utf-8")


def _spec(asked: dict[str, Any], training: dict[str, Any]) -> Any:
    from jobs.spec import Spec

    return Spec.model_validate(
        {
            "name": "parity",
            "model": {"base": str(BASE), "max_seq_length": LENGTH, "load_in": asked["load_in"]},
            "data": {"train": str(DATA), "eval": 0.05},
            "lora": {"rank": 8, "alpha": 16},
            "train": {
                "max_steps": training["steps"], "batch_size": BATCH, "learning_rate": 1e-3,
                "warmup": 2, "schedule": "constant", "packing": training.get("packing", False), "seed": 7,
                "engine": asked["engine"],
            },
        }
    )  # fmt: skip


def _train(asked: dict[str, Any]) -> dict[str, Any]:
    from bench.ours import prepared
    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.train import loop
    from jobs.train.checkpoints import Checkpoints
    from jobs.train.trainer import Trainer

    out = Path(asked["out"])
    files = TokenizerFiles(BASE)
    rows = prepared(_spec(asked, asked["trainings"][0]), BASE, out / "rows")
    found: dict[str, Any] = {}
    for training in asked["trainings"]:
        folder = out / training["name"]
        folder.mkdir()
        seen: dict[str, Any] = {"parts": [], "arrived": [], "trained": [], "rows": []}
        undo = _watch(Trainer, training, seen)
        said = io.StringIO()
        try:
            result = loop.train(
                _spec(asked, training), BASE, files.load(), rows, folder,
                Checkpoints(out / f"checkpoints-{training['name']}", {}),
                Observer("json", stream=said),
            )  # fmt: skip
        finally:
            undo()
        losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
        events = [json.loads(line) for line in said.getvalue().splitlines()]
        kernels = [event["attention"] for event in events if event["event"] == "kernel"]
        found[training["name"]] = {**seen, "losses": losses, "kernels": kernels}
    return found


def _watch(trainer_class: Any, training: dict[str, Any], seen: dict[str, Any]) -> Any:
    """Give the trainer so many rows at a time, and note what it gets and what the model gets.

    The one place that knows how the trainer is made. Returns what undoes it.
    """
    from jobs.train.batches import StepBatch
    from jobs.train.engines import engine

    split, train = StepBatch.split, trainer_class.train
    step = trainer_class.training_step
    at_once, watch = training["at_once"], training.get("watch", 0)

    def by_rows(self: Any, items: list[Any]) -> list[list[Any]]:
        return [items[at : at + at_once] for at in range(0, len(items), at_once)]

    @functools.wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.accelerator.unwrap_model(self.model).get_base_model()
        forward = inner.forward

        @functools.wraps(forward)
        def noting(*given: Any, **named: Any) -> Any:
            if len(seen["trained"]) <= watch and inner.training:
                inputs = {**dict(zip(("input_ids", "attention_mask", "position_ids"), given, strict=False)), **named}  # fmt: skip
                seen["arrived"].append(_lists(inputs))
            return forward(*given, **named)

        inner.forward = noting
        if training.get("checkpointing"):
            engine().set_checkpointing(self.model, True)
        try:
            return train(self, *args, **kwargs)
        finally:
            inner.forward = forward

    @functools.wraps(step)
    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen["trained"].append(inputs["trained"])
        seen["rows"].append([len(conversations(_lists(part))) for part in inputs["parts"]])
        if len(seen["trained"]) <= watch:
            seen["parts"] += [_lists(part) for part in inputs["parts"]]
        return step(self, model, inputs, *args, **kwargs)

    StepBatch.split = by_rows  # type: ignore[method-assign]
    trainer_class.train, trainer_class.training_step = watched, training_step

    def undo() -> None:
        StepBatch.split = split  # type: ignore[method-assign]
        trainer_class.train, trainer_class.training_step = train, step

    return undo


def _lists(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name].tolist() for name in CARRIED if inputs.get(name) is not None}


def _read(asked: dict[str, Any]) -> dict[str, Any]:
    """Logits of adapters that this engine or the other trained, against those of their training."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from jobs.train.engines import engine
    from jobs.train.runtime import device_name

    spec = _spec(asked, TRAININGS[0])
    device = device_name()
    model = engine().add_lora(engine().load(BASE, spec.model, device), spec, BASE)
    model.eval()
    folders = asked["read"].items()
    found: dict[str, Any] = {
        "untrained": {name: _difference(model, folder, device) for name, folder in folders}
    }
    for name, folder in folders:
        loaded = set_peft_model_state_dict(
            model, load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        )
        assert not loaded.unexpected_keys
        found[name] = _difference(model, folder, device)
    return found


def _difference(model: Any, folder: str, device: str) -> float:
    """The root of the mean square of what the logits differ by, over that of the logits."""
    import torch
    from safetensors.torch import load_file

    from jobs.train.engines import engine
    from jobs.train.loss import trained_logits

    probe = {name: tensor.to(device) for name, tensor in load_file(Path(folder) / "probe.safetensors").items()}  # fmt: skip
    expected = probe.pop("logits")
    with torch.no_grad(), engine().with_logits():
        logits, _ = trained_logits(model, probe)
    return float((logits - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
