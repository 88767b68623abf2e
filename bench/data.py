"""Conversations -> labelled tokens: beside TRL's and unsloth's preparation, and a million of them.

    .venv/bin/python -m bench.data        writes bench/results/data.md

The peers' way is what their users write. unsloth is found where PYTHONPATH has it:
pip install --no-deps --target DIR unsloth==2026.10.9 unsloth_zoo==2026.10.9
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "data.md"
DEMO = ROOT / "examples" / "demo" / "base"
QWEN = ROOT.parent / "shared" / "tokenizers" / "qwen2"
PROCESSES = 2
MAX_LENGTH = 2048

# ChatML, with the marks around answers that TRL's assistant_only_loss asks for.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You know the Python language well. Answer clearly and to the point.",
    "Answer in plain English. If you do not know the answer, say so.",
)
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}

Turns = list[tuple[str, str]]


def sentences() -> list[str]:
    """English sentences: the prose of Python's own manual."""
    text = " ".join(topics[name] for name in sorted(topics))
    found = re.findall(r"[A-Z][^.!?]{30,200}[.!?](?=\s)", text)
    return [" ".join(sentence.split()) for sentence in found]


def conversations(count: int, seed: int, long: bool) -> Iterator[Turns]:
    """Always the same for a seed. Long: 2 to 6 turns after a system prompt; else a pair."""
    draw = random.Random(seed)
    pool = sentences()
    for _ in range(count):
        turns: Turns = [("system", draw.choice(SYSTEMS))] if long else []
        for _ in range(draw.randint(1, 3) if long else 1):
            turns.append(
                ("user", " ".join(draw.choices(pool, k=draw.randint(1, 2 if long else 1))))
            )
            turns.append(
                ("assistant", " ".join(draw.choices(pool, k=draw.randint(1, 6 if long else 1))))
            )
        yield turns


def write_rows(path: Path, rows: Iterator[Turns], sharegpt: bool = False) -> None:
    with path.open("w", encoding="utf-8") as file:
        for turns in rows:
            row: dict[str, Any]
            if sharegpt:
                row = {"conversations": [{"from": SHAREGPT[r], "value": t} for r, t in turns]}
            else:
                row = {"messages": [{"role": r, "content": t} for r, t in turns]}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path) -> str:
    """Qwen2's where it is at hand, else the demo's; says which."""
    real = QWEN.is_dir()
    folder.mkdir()
    shutil.copyfile((QWEN if real else DEMO) / "tokenizer.json", folder / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>" if real else "<|pad|>",
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return "Qwen2's" if real else "the demo's"


# --- the contenders, each in a process of its own: a folder with rows and tokenizer -> labels

Clock = Callable[[str], None]  # the name of the part that has just ended


def ours(folder: Path, lap: Clock) -> tuple[int, int, int]:
    from jobs.data.chunks import Recipe
    from jobs.data.prepare import prepare
    from jobs.data.tokenizer import TokenizerFiles
    from jobs.spec import Data

    data = Data.model_validate({"train": [str(folder / "messages.jsonl")]})
    recipe = Recipe(
        TokenizerFiles(folder / "tokenizer"), data.loss_on, MAX_LENGTH, data.too_long, seed=1
    )
    out = folder / "cache"
    lap("start")
    summary = prepare(data, recipe, out)
    lap("all")
    return summary["train_rows"], summary["train_tokens"], summary["trained_tokens"]


def tiny_model(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip


def counted(dataset: Any) -> tuple[int, int, int]:
    """Rows, tokens and trained tokens of a data set that is ready for training."""
    import pyarrow.compute as compute  # type: ignore[import-untyped]

    labels = dataset.data.column("labels").combine_chunks().flatten()
    trained = compute.sum(compute.not_equal(labels, -100)).as_py()
    return len(dataset), len(labels), trained


def trl(folder: Path, lap: Clock) -> tuple[int, int, int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = tiny_model(len(tokenizer))
    arguments = SFTConfig(
        output_dir=str(folder / "out"), assistant_only_loss=True, max_length=MAX_LENGTH,
        dataset_num_proc=PROCESSES, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    lap("start")
    dataset = load_dataset("json", data_files=str(folder / "messages.jsonl"), split="train")
    lap("`load_dataset`")
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    lap("`SFTTrainer(...)`")
    return counted(trainer.train_dataset)


def unsloth(folder: Path, lap: Clock) -> tuple[int, int, int]:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import (
        standardize_sharegpt,
        train_on_responses_only,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = tiny_model(len(tokenizer))
    arguments = SFTConfig(
        output_dir=str(folder / "out"), dataset_text_field="text", max_length=MAX_LENGTH,
        dataset_num_proc=PROCESSES, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip

    def render(rows: dict[str, Any]) -> dict[str, Any]:
        return {
            "text": [
                tokenizer.apply_chat_template(row, tokenize=False) for row in rows["conversations"]
            ]
        }

    lap("start")
    dataset = load_dataset("json", data_files=str(folder / "conversations.jsonl"), split="train")
    lap("`load_dataset`")
    dataset = standardize_sharegpt(dataset, num_proc=PROCESSES)
    lap("`standardize_sharegpt`")
    dataset = dataset.map(render, batched=True, num_proc=PROCESSES)
    lap("`apply_chat_template`")
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    lap("`SFTTrainer(...)`")
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n",
        num_proc=PROCESSES,
    )  # fmt: skip
    lap("`train_on_responses_only`")
    return counted(trainer.train_dataset)


CONTENDERS = {"ours": ours, "trl": trl, "unsloth": unsloth}


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def contend(name: str, folder: Path) -> None:
    """What the process of a contender does; the last line it prints is the result."""
    laps: list[tuple[str, float, float]] = []

    def lap(part: str) -> None:
        laps.append((part, time.perf_counter(), processor_seconds()))

    rows, tokens, trained = CONTENDERS[name](folder, lap)
    result = {
        "seconds": laps[-1][1] - laps[0][1],
        "processor": laps[-1][2] - laps[0][2],
        "parts": {b[0]: b[1] - a[1] for a, b in pairwise(laps)},
        "counts": [rows, tokens, trained],
    }
    print(json.dumps(result))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """A contender's run, with empty caches of its own."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.data", "--contender", name, "--folder", str(folder)],
        cwd=cache, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(cache)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def side_by_side(folder: Path, count: int, rounds: int) -> list[str]:
    write_rows(folder / "messages.jsonl", conversations(count, 1, long=True))
    write_rows(folder / "conversations.jsonl", conversations(count, 1, long=True), sharegpt=True)
    of_whom = make_tokenizer(folder / "tokenizer")
    found = [name for name in CONTENDERS if name == "ours" or importlib.util.find_spec(name)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name in found:
            runs[name].append(measure(name, folder))
            print(name, json.dumps(runs[name][-1]), flush=True)
    best = {name: min(runs[name], key=lambda run: run["seconds"]) for name in found}
    counts = best["ours"]["counts"]
    titles = {
        "ours": "**`jobs.data.prepare`**",
        "trl": "TRL, `SFTTrainer` with `assistant_only_loss=True`",
        "unsloth": "unsloth, `train_on_responses_only`",
    }
    lines = [
        f"{counts[0]:,} conversations of 2 to 6 turns and a system prompt, English prose, "
        f"{counts[1] / counts[0]:.0f} tokens on average ({of_whom} tokenizer, ChatML): from a JSONL file "
        f"to labelled tokens on disk, {PROCESSES} processes each, nothing taken from a cache"
        f"{f', the best of {rounds} runs, taken in turns' if rounds > 1 else ''}.",
        "",
        "| what | seconds | of two cores, CPU seconds | rows a second | tokens | trained | ours is faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in titles.items():
        if name not in best:
            lines.append(f"| {title} | not installed | | | | | |")
            continue
        run = best[name]
        times = run["seconds"] / best["ours"]["seconds"]
        rows, tokens, trained = run["counts"]
        lines.append(
            f"| {title} | {run['seconds']:.1f} | {run['processor']:.1f} | {rows / run['seconds']:,.0f} "
            f"| {tokens:,} | {trained:,} | {'' if name == 'ours' else f'**{times:.1f} times**'} |"
        )
    lines.append("")
    for name in found[1:]:
        parts = ", ".join(f"{part} {s:.1f} s" for part, s in best[name]["parts"].items())
        lines.append(f"- {titles[name].split(',')[0]}: {parts}.")
    return lines


# --- a million rows through `check`


def check(spec: Path, work: Path) -> tuple[float, float, float, dict[str, Any]]:
    """Seconds, the peak of the process and of its largest other process in MB, what it found."""
    command = [
        sys.executable, "entrypoint.py", "check", str(spec), "--work", str(work), "--format", "json",
    ]  # fmt: skip
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, float] = {}
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        for pid in (process.pid, *(child.pid for child in children(parent))):
            peaks[pid] = max(peaks.get(pid, 0.0), peak(pid))
        time.sleep(0.05)
    seconds = time.monotonic() - start
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    found = json.loads(process.stdout.read())
    own = peaks.pop(process.pid)
    return seconds, own, max(peaks.values(), default=0.0), found


def children(process: Any) -> list[Any]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def peak(pid: int) -> float:
    """The most memory a process has had so far, in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        at = file.tell() + re.search(rb"[a-z]{4} ", file.read(1000)).start()  # type: ignore[union-attr]
        file.seek(at)
        file.write(b"Z")


def many(folder: Path, count: int) -> list[str]:
    rows = folder / "many.jsonl"
    base, work, spec = folder / "base", folder / "work", folder / "spec.yaml"
    write_rows(rows, conversations(count, 2, long=False))
    shutil.copytree(DEMO, base)
    spec.write_text(
        yaml.safe_dump(
            {
                "name": "many",
                "model": {"base": str(base), "max_seq_length": 1024},
                "data": {"train": [str(rows)]},
                "export": {"merged": "16bit", "gguf": []},
            }
        )
    )
    record = work / "many" / ".work" / "stages" / "data.json"
    lines = []
    stamp = 0

    def start(what: str) -> None:
        nonlocal stamp
        seconds, own, largest, found = check(spec, work)
        again = record.stat().st_mtime_ns != stamp
        stamp = record.stat().st_mtime_ns
        data = found["data"]
        lines.append(
            f"| {what} | {'made' if again else 'taken as they are'} | {data['train_rows']:,} | "
            f"{data['train_tokens']:,} | {seconds:.1f} | {own:,.0f} MB | "
            f"{f'{largest:,.0f} MB' if largest else 'none'} |"
        )
        print(lines[-1], flush=True)

    start("first start")
    start("**second start**")
    change_a_byte(rows)
    start("one byte of one row changed")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another one #}")
    start("the template changed")
    return [
        f"{count:,} conversations of one question and one answer, {rows.stat().st_size / 1e6:.0f} MB of "
        "JSONL, the demo's tokenizer: all of `entrypoint.py check`. A process's peak is its VmHWM.",
        "",
        "| `check` | labelled data | rows | tokens | seconds | peak of the process | peak of its largest other one |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        beside = side_by_side(folder, arguments.rows, arguments.rounds)
        million = many(folder, arguments.many)
    packages = ("tokenizers", "transformers", "datasets", "trl", "unsloth", "unsloth_zoo")
    versions = [f"{p} {version(p)}" for p in packages if importlib.util.find_spec(p)]
    lines = [
        "# Preparing the data",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}: `python -m bench.data`",
        "",
        "## Beside others",
        "",
        *beside,
        "",
        "## A million rows",
        "",
        *million,
        "",
    ]
    print("\n".join(lines))
    RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
