"""Where a training step's time goes on the GPU: its kernels, by the time they take.

    python3 -m bench.profile --tokenizer FOLDER --data FILE ... [--base FOLDER]

Two optimizer steps of `bench.train`'s 8B shape with 64 rows and with 8, one after the other in one
process, so that imports and compiling are paid once; `--batches 64@12` is with 64 rows within 12 GiB.
Prints markdown.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

STEPS = 2
ROWS = 15
NAME = 100  # characters of a kernel's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--base", type=Path, help="where the base is or is made, and kept")
    parser.add_argument("--batches", default="64,8", help="rows a step, and @ GiB; with commas")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count")
    parser.add_argument("--engine", choices=("unsloth", "transformers"), default="unsloth")
    parser.add_argument("--out", type=Path, help="the markdown goes there too")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from jobs.train.engines import start_engine
    from jobs.train.runtime import settle_threads

    settle_threads()
    start_engine(arguments.engine)
    from bench.train import prepare

    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorajob-bench-")))
        case = {
            "base": str((arguments.base or work / "base").resolve()),
            "data": [str(Path(path).resolve()) for path in arguments.data],
            "tokenizer": str(arguments.tokenizer.resolve()),
            "tiny": arguments.tiny,
            "work": str(work),
            "steps": arguments.warmup + STEPS,
            "engine": arguments.engine,
        }
        prepare(case)
        texts = []
        for named in arguments.batches.split(","):
            batch, _, gib = named.partition("@")
            limited = {"batch": int(batch), "gib": float(gib) if gib else None}
            texts.append(profile({**case, **limited}, arguments.warmup))
            print(texts[-1], flush=True)
            if arguments.out:
                arguments.out.write_text("\n".join(texts), "utf-8")


def profile(case: dict[str, Any], warmup: int) -> str:
    """The kernels of the steps after the warm-up, as a table."""
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    from bench.clock import Clock, synchronize
    from bench.ours import train
    from bench.train import spec_of

    gpu = torch.cuda.is_available()
    # Only kernels: what the host does would be many times as many events.
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    )
    seconds = [0.0, 0.0]

    class Profiling(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warmup:
                synchronize()
                profiler.start()
                seconds[0] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warmup + STEPS:
                synchronize()
                seconds[1] = time.perf_counter()
                profiler.stop()

    clock = Clock(time.time(), warmup, math.inf, callbacks=(Profiling(),))
    work = Path(case["work"])
    figures = train(spec_of(case), Path(case["base"]), work / "rows", work, clock)
    wall = (seconds[1] - seconds[0]) * 1e6
    rows = kernels(profiler, gpu)
    total = sum(row[1] for row in rows)
    within = f" within {case['gib']:g} GiB" if case["gib"] else ""
    lines = [
        f"## {case['batch']} rows a step{within}, {figures['gpu']}",
        "",
        f"{STEPS} steps of {figures['tokens_a_step']:,.0f} tokens, plan {figures['plan']}, "
        f"{figures['kernel']}: {wall / 1e6:.2f} s, of which kernels ran {total / 1e6:.2f} s "
        f"({total / wall:.0%}).",
        "",
        "| kernel | ms a step | share | launches a step |",
        "| --- | --- | --- | --- |",
    ]
    for name, taken, count in rows[:ROWS]:
        lines.append(
            f"| `{shortened(name)}` | {taken / 1000 / STEPS:.2f} | {taken / total:.1%} | "
            f"{count // STEPS} |"
        )
    rest = rows[ROWS:]
    taken, count = sum(row[1] for row in rest), sum(row[2] for row in rest)
    lines.append(
        f"| {len(rest)} others | {taken / 1000 / STEPS:.2f} | {taken / total:.1%} | {count // STEPS} |"
    )
    return "\n".join([*lines, ""])


def kernels(profiler: Any, gpu: bool) -> list[tuple[str, float, int]]:
    """Name, microseconds and launches, those that took longest first."""
    found = []
    for event in profiler.key_averages():
        if gpu and event.device_type.name != "CUDA":
            continue
        taken = event.self_device_time_total if gpu else event.self_cpu_time_total
        found.append((event.key, float(taken), int(event.count)))
    return sorted(found, key=lambda row: -row[1])


def shortened(name: str) -> str:
    name = " ".join(name.replace("|", "/").replace("`", "'").split())
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


if __name__ == "__main__":
    main()
