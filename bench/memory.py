"""What `check` reckons a training takes of a GPU's memory, against what it takes there.

    python3 -m bench.memory --tokenizer FOLDER --out FILE    FILE.md for reading, FILE.json with all
    python3 -m bench.memory --reckon --out FILE              FILE.md anew, of what FILE.json has

Random weights: memory depends on shapes alone. A process for each shape loads it once and trains two
optimizer steps of two parts each for every length and mode, with the job's own trainer, so that
gradients and the optimizer's states are there when the last part goes through. Measured is what
torch's allocator held at most (`max_memory_allocated`): reserved is more, by fragments that the
allocator gives back when memory gets short.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bench.shapes import SHAPES, make_base

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "memory"
CASES = ((1, 512), (1, 2048), (1, 8192), (8, 2048))  # rows of a part and their length
GIB = 2**30


def settings(base: Path, engine: str, load_in: str) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": {"base": str(base), "max_seq_length": 8192, "load_in": load_in, "chat_template": "llama-3.1"},
        "data": {"train": "none.jsonl"},
        "lora": {"rank": 16},
        "train": {"engine": engine},
    }  # fmt: skip


def measure(shape: str, base: Path, name: Literal["unsloth", "transformers"], load_in: str) -> None:
    """Every case of one shape in this process; a JSON object a line."""
    began = time.monotonic()
    from jobs.train.engines import engine, start_engine

    start_engine(name)
    import torch
    from datasets import Dataset

    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.spec import Spec
    from jobs.train.batches import StepBatch
    from jobs.train.engine_transformers import train_in_float32
    from jobs.train.isolation import choose_collate
    from jobs.train.runtime import device_name, quiet_libraries
    from jobs.train.trainer import Trainer, arguments_of
    from jobs.train.trial import free_memory

    quiet_libraries()
    device = device_name()
    spec = Spec.model_validate(settings(base, name, load_in))
    tokenizer = TokenizerFiles(base, "llama-3.1").load()
    found: dict[str, Any] = {
        "shape": shape, "engine": name, "load_in": load_in, "with": _versions(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else device,
        "card": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
    }  # fmt: skip
    bare = engine().load(base, spec.model, device)
    free_memory()
    found["loaded"] = torch.cuda.memory_allocated()
    model = engine().add_lora(bare, spec, base)
    train_in_float32(model)
    free_memory()
    found["with_lora"] = torch.cuda.memory_allocated()
    collate = choose_collate(model, spec, tokenizer, device, Observer("json", stream=io.StringIO()))
    found["collate"] = type(collate).__name__
    found["load_seconds"] = round(time.monotonic() - began, 1)

    class Measured(Trainer):
        peaks: dict[str, int]

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.note("between")  # what was highest since the last step is the optimizer's doing
            result = super().training_step(model, inputs, num_items_in_batch)
            self.note("first_step" if self.state.global_step == 0 else "last_step")
            return result

        def note(self, moment: str) -> None:
            for key, value in (
                (moment, torch.cuda.max_memory_allocated()),
                ("reserved", torch.cuda.max_memory_reserved()),
            ):
                self.peaks[key] = max(self.peaks.get(key, 0), value)
            torch.cuda.reset_peak_memory_stats()

    def run(rows: int, length: int, checkpointing: bool, scratch: Path) -> dict[str, Any]:
        # Not all of one length: unsloth takes such rows through another kernel.
        tokens = [torch.randint(1000, 9000, (length - i % 16,)).tolist() for i in range(2 * rows)]
        train = spec.train.model_copy(update={"batch_size": 2 * rows, "max_steps": 2})
        trainer = Measured(
            model=model,
            args=arguments_of(train, scratch, len(tokens), False, device),
            train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
            data_collator=StepBatch(collate, rows * length),
        )
        train_in_float32(model)
        engine().set_checkpointing(model, checkpointing)
        forward = model.__dict__.get("forward")
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        trainer.peaks = {"before": torch.cuda.memory_allocated()}
        try:
            trainer.train()
            trainer.note("between")
            free, total = torch.cuda.mem_get_info()
            return {
                **trainer.peaks,
                "after": torch.cuda.memory_allocated(),
                "context": total - free - torch.cuda.memory_reserved(),
                "used": _nvidia_smi_used(),
            }
        finally:
            # The next trainer wraps the model again.
            model.__dict__.pop("forward", None)
            if forward is not None:
                model.forward = forward
            trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
            model.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as scratch:
        for checkpointing in (False, True):
            for rows, length in CASES:
                case = {"rows": rows, "length": length, "checkpointing": checkpointing}
                started = time.monotonic()
                try:
                    figures = run(rows, length, checkpointing, Path(scratch))
                except torch.OutOfMemoryError as error:
                    figures = {"error": str(error).splitlines()[0]}
                seconds = round(time.monotonic() - started, 1)
                print(json.dumps({**found, **case, **figures, "seconds": seconds}), flush=True)


def _nvidia_smi_used() -> int | None:
    """Bytes in use on the first GPU, everything counted; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout.split()[0]) * 2**20
    return None


def _versions() -> str:
    versions = [f"{datetime.now(UTC):%Y-%m-%d}"]
    for package in ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join(versions)


def peak_of(case: dict[str, Any]) -> int:
    return int(max(case["first_step"], case["last_step"], case["between"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--reckon", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--engine", default="unsloth", choices=("unsloth", "transformers"))
    parser.add_argument("--load-in", default="4bit", choices=("4bit", "8bit", "16bit"))
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.base:
        measure(arguments.shapes[0], arguments.base, arguments.engine, arguments.load_in)
        return
    found: list[dict[str, Any]] = []
    if arguments.reckon:
        found = json.loads(arguments.out.with_suffix(".json").read_text("utf-8"))
        arguments.out.with_suffix(".md").write_text(report(found), "utf-8")
        return
    if arguments.tokenizer is None:
        parser.error("--tokenizer names a folder with Llama-3's tokenizer")
    with tempfile.TemporaryDirectory() as work:
        bases = {name: Path(work) / name for name in arguments.shapes}
        ready = {name: threading.Event() for name in bases}
        room = threading.Semaphore(2)  # no more of them on the disk at a time

        def make_all() -> None:  # beside the measuring, which leaves the processor idle
            for name, folder in bases.items():
                room.acquire()
                make_base(folder, arguments.tokenizer, SHAPES[name])
                ready[name].set()

        threading.Thread(target=make_all, daemon=True).start()
        for name, folder in bases.items():
            ready[name].wait()
            child = subprocess.Popen(
                [sys.executable, "-m", "bench.memory", "--tokenizer", str(arguments.tokenizer), "--base", str(folder),
                 "--shapes", name, "--engine", arguments.engine, "--load-in", arguments.load_in],
                cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert child.stdout
            for line in child.stdout:  # each figure is kept as it comes, whatever happens later
                if line.startswith('{"shape"'):
                    found.append(json.loads(line))
                    print(line, end="", flush=True)
                    write(found, arguments.out)
            child.wait()
            shutil.rmtree(folder)
            room.release()


def write(found: list[dict[str, Any]], out: Path) -> None:
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(report(found))


def estimate_of(case: dict[str, Any]) -> Any:
    """What `check` would say of this case."""
    from jobs.spec import Spec
    from jobs.train.fit import Plan
    from jobs.train.memory import reckon
    from jobs.train.shape import read_shape

    spec = Spec.model_validate(settings(Path("base"), case["engine"], case["load_in"]))
    shape = read_shape(SHAPES[case["shape"]])
    plan = Plan(case["rows"] * case["length"], case["checkpointing"])
    assert shape is not None
    return reckon(shape, spec, plan, case["length"], case["engine"], case["card"])


def report(found: list[dict[str, Any]]) -> str:
    lines = [
        "# Memory: reckoned and measured",
        "",
        f"{found[0]['with']}, {found[0]['gpu']}: "
        "`python3 -m bench.memory --tokenizer FOLDER --out FILE`",
        "",
        "Reckoned from config.json alone, as `check` does; measured is the most that torch's "
        "allocator held in two optimizer steps of two parts each, LoRA of rank 16 on all linear "
        "layers. The context is what the GPU holds besides.",
        "",
        "| shape | engine | rows x tokens | activations | reckoned GiB | measured GiB | off by | reserved GiB | context, reckoned | context |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in found:
        start = (
            f"| {case['shape']} {case['load_in']} | {case['engine']} | {case['rows']} x {case['length']:,} | "
            f"{'made again' if case['checkpointing'] else 'kept'} | "
        )
        if "error" in case:
            lines.append(f"{start}- | {case['error']} | | | | |")
            continue
        said, peak = estimate_of(case), peak_of(case)
        lines.append(
            f"{start}{said.allocated / GIB:.2f} | {peak / GIB:.2f} | {said.allocated / peak - 1:+.1%} | "
            f"{case['reserved'] / GIB:.2f} | {said.context / GIB:.2f} | {case['context'] / GIB:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
