"""The stage of training, and what stands in its place where an adapter is given."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.pipeline.job import CHECKPOINTS, WORK, Job, code_key
from jobs.spec import Lora, Train
from jobs.stages import Done
from jobs.store.hashing import sha256_of
from jobs.store.lease import Lease
from jobs.train.checkpoints import Checkpoints

ENGINE_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo")


def train_stage(job: Job, data: Done, checkpoints: Checkpoints) -> Done:
    """Train the adapter, from the newest whole checkpoint on."""
    spec = job.spec

    def work(out: Path) -> dict[str, Any]:
        from jobs.train.engines import choose_engine, start_engine
        from jobs.train.runtime import device_name, quiet_libraries

        engine = choose_engine(spec.train.engine, device_name())
        start_engine(engine)
        from jobs.train.loop import train

        quiet_libraries()
        job.observer.event("engine", engine=engine)
        return train(
            spec,
            job.whole_base(),
            job.ready.tokenizer,
            job.data,
            out,
            checkpoints,
            job.observer,
        )

    packages = [p for p in ENGINE_PACKAGES if find_spec(p)]
    inputs = {
        "base": job.ready.base.content_key,
        "data": data.content_key,
        "load_in": spec.model.load_in,
        "lora": spec.lora.model_dump(mode="json"),
        "train": spec.train.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in packages},
        "code": code_key("train"),
        "threads": job.threads,
    }
    return job.stages.run("train", inputs, work, f"{WORK}/train", note=_train_note)


def given_stage(job: Job, data: Done, given: Path) -> Done:
    """An adapter that was there before, in the place of one that was trained."""
    from jobs.export.adapter import weights_and_config

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.adapter import take
        from jobs.train.runtime import device_name, quiet_libraries

        quiet_libraries()
        base = job.whole_base()
        return take(
            given, base, job.spec.model.load_in, job.ready.tokenizer, job.data, out,
            device_name(),
        )  # fmt: skip

    inputs = {
        "given": [sha256_of(path) for path in weights_and_config(given)],
        "base": job.ready.base.content_key,
        "load_in": job.spec.model.load_in,
        "data": data.content_key,
        "code": code_key("export"),
    }
    return job.stages.run(
        "given", inputs, work, f"{WORK}/train",
        note=lambda r: f"rank {r['lora']['rank']}, {r['parameters']} parameters",
    )  # fmt: skip


def checkpoints_of(job: Job, data: Done, lease: Lease) -> Checkpoints:
    """The checkpoints of this training. Versions and threads are no part of what it is made from: a
    run goes on with a newer lorajob, which may know more fields, and on a machine with other cores,
    though not to the same bits.
    """
    spec = job.spec
    return Checkpoints(
        folder=job.folder / CHECKPOINTS,
        inputs={
            "base": job.ready.base.content_key,
            "data": data.content_key,
            "load_in": spec.model.load_in,
            "max_seq_length": spec.model.max_seq_length,
            "lora": spec.lora.model_dump(mode="json"),
            "train": spec.train.model_dump(mode="json"),
        },
        defaults={
            "lora": Lora().model_dump(mode="json"),
            "train": Train().model_dump(mode="json"),
        },
        remote=job.ready.keeper,
        keep=spec.checkpoints.keep,
        if_changed=spec.checkpoints.if_changed,
        tell=job.observer.warn,
        guard=lease.require,
    )


def _train_note(result: dict[str, Any]) -> str:
    note = f"{result['steps']} steps, loss {result['train_loss']:.3f}"
    if result["eval_loss"] is not None:
        note += f", eval loss {result['eval_loss_before']:.3f} -> {result['eval_loss']:.3f}"
    if result["stopped_early"]:
        note += f", stopped early of {result['max_steps']}"
    if result["best_step"] is not None:
        note += f", those of step {result['best_step']} kept"
    for kept in result["retention"]:
        note += f", {kept['source']} {kept['before']:.3f} -> {kept['after']:.3f}"
    return note
