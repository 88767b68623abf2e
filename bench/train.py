"""Training on a GPU beside what a user would run instead: an 8B shape, real chats, one run.

    python3 -m bench.train --tokenizer FOLDER --data FILE ...     writes bench/results/train.md

Weights are random: speed and memory depend on shapes alone. All cases train the same conversations,
each in a process of its own with a time limit. Tokens a second are those of whole optimizer steps
once a few have passed; only tokens that are not padding count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.cases import ROOT, run_case, run_cases, write_result, write_results
from bench.shapes import SHAPES, make_base

RESULT = ROOT / "bench" / "results" / "train.md"
MAX_LENGTH = 2048

# The rate of an 8192-cube bf16 product on the H200 that was measured, and the operations that a
# token costs without recomputation: forward and the activations' gradients, 4 for each weight.
MATRIX_RATE = 788e12
WEIGHTS = 8.03e9
CEILING = MATRIX_RATE / (4 * WEIGHTS)

NOTEBOOK = "notebook-unsloth"
# `least` and `seconds`: how much is measured at least; `steps`: at which step it ends in any case.
# All train the same so many rows, and count whole passes over them where time allows: rows differ by
# far in length, and a few steps of one stack would else be compared with other rows of another.
ROWS = 320
CASES: tuple[dict[str, Any], ...] = (
    {"name": NOTEBOOK, "peer": "notebook_unsloth", "rows": "2 x 4", "warmup": 4, "steps": 44, "seconds": 80},
    {"name": "ours-8", "batch": 8, "warmup": 40, "steps": 120, "seconds": 30},
    {"name": "ours-64", "batch": 64, "warmup": 5, "steps": 20, "seconds": 30},
    {"name": "ours-12GiB", "batch": 64, "gib": 12.0, "warmup": 5, "steps": 15, "seconds": 30},
    {"name": "ours-24GiB", "batch": 64, "gib": 24.0, "warmup": 5, "steps": 15, "seconds": 30},
    {"name": "notebook-transformers", "peer": "notebook_transformers", "rows": "2 x 4", "warmup": 3, "steps": 43, "seconds": 30},
    {"name": "unsloth-packed", "peer": "unsloth_packed", "rows": "8 x 1 packed", "warmup": 3, "steps": 10, "seconds": 15},
    {"name": "ours-transformers", "batch": 8, "engine": "transformers", "warmup": 40, "steps": 80, "seconds": 30},
)  # fmt: skip

TINY = {
    **SHAPES["llama-3.1-8b"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def base_of(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> Path:
    """A base model of that shape, whose tokenizer ends and pads as Llama-3's chat models do."""
    make_base(folder, tokenizer, shape)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    for name, token in (("eos", "<|eot_id|>"), ("pad", "<|finetune_right_pad_id|>")):
        if f'"{token}"' in (folder / "tokenizer.json").read_text("utf-8"):
            config[f"{name}_token"] = token
            config.pop(f"{name}_token_id", None)
    path.write_text(json.dumps(config), "utf-8")
    return folder


def sources(files: list[str]) -> list[dict[str, Any]]:
    """The first of each file's conversations, as many as are its share of `ROWS`."""
    counts = [len(json.loads(Path(file).read_text("utf-8"))) for file in files]
    return [
        {"source": file, "limit": max(1, round(ROWS * count / sum(counts)))}
        for file, count in zip(files, counts, strict=True)
    ]


def spec_of(case: dict[str, Any]) -> Any:
    from jobs.spec import Spec

    return Spec.model_validate(
        {
            "name": "bench",
            "model": {"base": case["base"], "max_seq_length": MAX_LENGTH, "chat_template": "llama-3.1"},
            "data": {"train": sources(case["data"]), "skip_bad_rows": 0.5},
            "lora": {"rank": 16, "alpha": 16},
            "train": {
                "max_steps": case.get("steps", 1), "batch_size": case.get("batch", 8),
                "learning_rate": 2e-4, "warmup": 5, "optimizer": "adamw_8bit",
                "engine": case.get("engine", "auto"),
            },
            "limits": {"gpu_memory_gib": case.get("gib")},
        }
    )  # fmt: skip


def prepare(case: dict[str, Any]) -> dict[str, Any]:
    """The base model and the labelled conversations, for all cases."""
    from bench.ours import prepared

    base = Path(case["base"])
    if not (base / "config.json").exists():
        base_of(base, Path(case["tokenizer"]), TINY if case["tiny"] else SHAPES["llama-3.1-8b"])
    prepared(spec_of(case), base, Path(case["work"]) / "rows")
    return {}


def ours(case: dict[str, Any]) -> dict[str, Any]:
    from jobs.train.engines import start_engine
    from jobs.train.runtime import settle_threads

    settle_threads()
    start_engine(case.get("engine", "unsloth"))
    from bench.clock import Clock
    from bench.ours import train

    clock = Clock(case["began"], case["warmup"], case["seconds"])
    work = Path(case["work"])
    return train(spec_of(case), Path(case["base"]), work / "rows", work, clock)


def peer(case: dict[str, Any]) -> dict[str, Any]:
    module = importlib.import_module(f"bench.peers.{case['peer']}")
    from bench.clock import Clock
    from bench.peers import texts_of

    clock = Clock(case["began"], case["warmup"], case["seconds"])
    clock.mark("imports")
    work, base = Path(case["work"]), Path(case["base"])
    texts = texts_of(work / "rows", base)
    with tempfile.TemporaryDirectory(dir=work) as out:
        trainer = module.trainer(base, texts, Path(out), case["steps"])
        clock.attach(trainer)
        trainer.train()
    return clock.figures()


def measure(case: dict[str, Any]) -> None:
    """One case in this process."""
    does = prepare if case["name"] == "prepare" else peer if "peer" in case else ours
    write_result(case, does(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama-3's tokenizer")
    parser.add_argument("--data", nargs="+", help="files of conversations")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report; figures go beside it")
    parser.add_argument("--cases", help="only these, by name, with commas; in this order")
    parser.add_argument("--base", type=Path, help="where the base is or is made, and kept")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one case")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of them")
    parser.add_argument(
        "--shared-caches", action="store_true", help="let cases find what others have compiled"
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case)
        return
    deadline = time.time() + arguments.budget
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorajob-bench-")))
        common = {
            "base": str((arguments.base or work / "base").resolve()),
            "data": [str(Path(path).resolve()) for path in arguments.data or ()],
            "tokenizer": str((arguments.tokenizer or Path()).resolve()),
            "tiny": arguments.tiny,
        }
        made = run_case("bench.train", {"name": "prepare", **common}, work, arguments.limit)
        if "failed" in made:
            raise SystemExit(f"the base or the data could not be made: {made['stderr']}")
        print(f"base and data: {made['wall_seconds']} s", flush=True)
        cases = [{**case, **common} for case in chosen(arguments.cases)]
        if arguments.tiny:
            small = {"steps": 3, "warmup": 1, "seconds": 0.1, "batch": 4}
            cases = [{**case, **small} for case in cases]
        run_cases(
            "bench.train", cases, work, arguments.limit, deadline,
            lambda found: write_results(arguments.out, found, report(found, arguments.shared_caches)),
            arguments.shared_caches,
        )  # fmt: skip
    print(arguments.out.read_text("utf-8"))


def chosen(names: str | None) -> list[dict[str, Any]]:
    if names is None:
        return list(CASES)
    known = {case["name"]: case for case in CASES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--cases: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


# --- the report


def versions() -> str:
    found = []
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


CACHES = {
    False: "Every case begins with empty caches of compiled kernels.",
    True: "Kernels that were compiled once stay compiled for the cases after it (`--shared-caches`).",
}


def report(found: list[dict[str, Any]], shared_caches: bool = False) -> str:
    done = [case for case in found if "failed" not in case]
    gpu = done[0]["gpu"] if done else "nothing ended"
    notebook = next((case for case in done if case["name"] == NOTEBOOK), None)
    lines = [
        "# Training on a GPU, beside what a user would run instead",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {gpu}, {versions()}: "
        "`python3 -m bench.train --tokenizer FOLDER --data FILE ...`",
        "",
        "Llama-3.1-8B's shape with random weights, 4 bit, LoRA of rank 16 on all linear layers, the "
        f"same real chats of up to {MAX_LENGTH} tokens. Only tokens that are not padding count. The "
        f"ceiling is {CEILING:,.0f} tokens a second: the card's measured matrix rate "
        f"({MATRIX_RATE / 1e12:.0f} TFLOP/s) over the operations of a token without recomputation. "
        f"{CACHES[shared_caches]} GiB are what torch had reserved at most while training, and in "
        "brackets while it looked for a plan, where that was more.",
        "",
        "| case | rows a step | tokens a second | times the notebook | of the ceiling | s a step "
        "| GiB | start to first step | tokens at a time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(case, notebook) for case in found]
    lines += ["", "| target | must | aim | measured | |", "| --- | --- | --- | --- | --- |"]
    lines += _targets({case["name"]: case for case in found}, notebook)
    lines += ["", "Start to the end of the first optimizer step, in seconds:", ""]
    lines += [f"- {c['name']}: {_phases(c)}" for c in done]
    failed = [case for case in found if "failed" in case]
    for case in failed:
        lines += ["", f"{case['name']} failed, {case['failed']}:", "", "```", case["stderr"], "```"]
    return "\n".join([*lines, ""])


def _row(case: dict[str, Any], notebook: dict[str, Any] | None) -> str:
    rows = case.get("rows") or str(case["batch"])
    if "failed" in case:
        return f"| {case['name']} | {rows} | failed: {case['failed']} | | | | | | |"
    rate = case["tokens_per_second"]
    ratio = f"**{rate / notebook['tokens_per_second']:.1f}**" if notebook else ""
    peak, searched = case["peak_gib"], case["peak_gib_with_search"]
    memory = f"{peak:.1f}" + (f" ({searched:.1f})" if searched > peak + 0.05 else "")
    plan = case.get("plan")
    at_a_time = (
        f"{plan['tokens']:,}{', activations made again' if plan['checkpointing'] else ''}"
        if plan
        else ""
    )
    return (
        f"| {case['name']} | {rows} | {rate:,.0f} | {ratio} | {rate / CEILING:.0%} | "
        f"{case['seconds_a_step']:.2f} | {memory} | {case['start_to_first_step']:.0f} s | {at_a_time} |"
    )


def _targets(found: dict[str, dict[str, Any]], notebook: dict[str, Any] | None) -> list[str]:
    """One row for each target: what must be, what is aimed at, what is."""

    def rate(name: str) -> float | None:
        value = found.get(name, {}).get("tokens_per_second")
        return value / notebook["tokens_per_second"] if value and notebook else None

    def share(name: str) -> float | None:
        value = found.get(name, {}).get("tokens_per_second")
        return value / CEILING if value else None

    small = found.get("ours-12GiB", {})
    peak = max(small.get("peak_gib", 0.0), small.get("peak_gib_with_search", 0.0)) or None
    theirs = notebook["peak_gib"] if notebook else 0.0
    starts = [
        case["start_to_first_step"]
        for name, case in found.items()
        if name.startswith("ours") and "failed" not in case
    ]
    fits = "failed" not in found["ours-24GiB"] if "ours-24GiB" in found else None
    return [
        _target("8 rows a step, times the notebook", rate("ours-8"), 5, 6),
        _target("64 rows a step, times the notebook", rate("ours-64"), 11, 11),
        _target("64 rows a step, share of the ceiling", share("ours-64"), 0.60, 0.70),
        _target("64 rows within 12 GiB, times the notebook", rate("ours-12GiB"), 8, 8),
        _target(
            "the same, GiB reserved at most (aim: the notebook's)", peak, 12, theirs, least=False
        ),
        f"| 64 rows within 24 GiB | no failure | | {'' if fits is None else 'done' if fits else 'failed'} "
        f"| {'' if fits is None else 'met' if fits else '**missed**'} |",
        _target(
            "seconds from start to first step, the slowest", max(starts, default=None), 60, 30,
            least=False,
        ),
    ]  # fmt: skip


def _target(name: str, value: float | None, must: float, aim: float, least: bool = True) -> str:
    if value is None:
        return f"| {name} | {must:g} | {aim:.3g} | not measured | |"
    bounds = {"aim met": aim, "met": must}
    reached = [v for v, bound in bounds.items() if (value >= bound if least else value <= bound)]
    verdict = reached[0] if reached else "**missed**"
    return f"| {name} | {must:g} | {aim:.3g} | {value:.2f} | {verdict} |"


def _phases(case: dict[str, Any]) -> str:
    told = [f"{name} {seconds:.1f}" for name, seconds in case["phases"].items()]
    return f"{case['start_to_first_step']:.1f} = " + " + ".join(told)


if __name__ == "__main__":
    main()
