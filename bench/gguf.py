"""From an adapter to several GGUF files, side by side with doing it as the usual scripts do.

    .venv/bin/python -m bench.gguf --shapes 1B          -> bench/results/gguf.md

A model of the shape asked for with random weights, an adapter on all its linear layers, and a real
vocabulary (`--tokenizer`, a folder with one of the model's size). The ways:

- lorajob: merged as a stream, converted once, every type quantized from that.
- once: peft merges once; then, for each type, converted and quantized, the conversion removed.
- each: merging, converting and quantizing all over again for each type, as a script that is called
  with one type does.
- unsloth: its own way, from a model that is loaded already (which is not in its seconds). Not by default:
  it needs triton and llama-quantize (see bench/peers/unsloth_gguf.py).

All use the same converter. The quantizing of `once` and `each` is done by `--llama-quantize` where it is
given, as scripts do it, else by the libllama that lorajob has built for itself; each way runs in a process of its own. The disk is
looked at ten times a second: everything but the base and the adapter, which all ways need.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.export import SHAPES, make_base, merge_ours, merge_peft

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
KINDS = ["q8_0", "q5_k_m", "q4_k_m"]
TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
VOCABULARY = {32000: "llama-2-spm", 128256: "llama-3"}

WAYS = {
    "lorajob": "**lorajob**: merged as a stream, one conversion, each type from it",
    "unsloth": "unsloth: `save_pretrained_gguf`, from the model as it is after training",
    "once": "peft merges once; converted and quantized for each type",
    "each": "merged by peft, converted and quantized for each type",
}


def ready(shape: str, work: Path, tokenizer: Path | None) -> Path:
    folder = work / shape
    if not (folder / "base" / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_base(shape, folder)
        named = TOKENIZERS / VOCABULARY[SHAPES[shape]["vocab_size"]]
        for path in (tokenizer or named).iterdir():
            (folder / "base" / path.name).write_bytes(path.read_bytes())
    return folder


def with_tokenizer(folder: Path, merged: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "base" / name, merged / name)
    return merged


def ours(folder: Path, out: Path, tools: Path, threads: int) -> None:
    from jobs.export.gguf import make_gguf
    from jobs.observe.events import Observer

    merged = out / "merged"
    merged.mkdir()
    merge_ours(folder, merged, False, "16bit")
    with_tokenizer(folder, merged)
    made = out / "gguf"
    made.mkdir()
    make_gguf("bench", merged, KINDS, made, out / "log", tools, threads, Observer("json"))


def theirs(
    folder: Path, out: Path, tools: Path, threads: int, again: bool, program: Path | None
) -> None:
    from jobs.export.llama import client

    merged = out / "merged"
    for kind in KINDS:
        if again or not merged.is_dir():
            shutil.rmtree(merged, ignore_errors=True)
            # In a process of its own, which gives its memory back.
            subprocess.run(
                [sys.executable, "-m", "bench.gguf", "peft", str(folder), str(merged)],
                cwd=ROOT, check=True,
            )  # fmt: skip
            with_tokenizer(folder, merged)
        whole = out / "whole.gguf"
        client.convert(tools, merged, whole, "bf16", out / "log")
        made = out / f"bench-{kind}.gguf"
        if program:
            command = [str(program), str(whole), str(made), kind, str(threads)]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        else:
            client.quantize(tools, whole, {kind: made}, threads, out / "log")
        whole.unlink()


def one(way: str, folder: Path, out: Path, threads: int, program: Path | None) -> None:
    """Do one of the ways and print its figures."""
    from jobs.export.llama.build import find_tools

    tools = find_tools()
    assert tools is not None, "build llama.cpp first: lorajob tools"
    peak, over = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, used(out))

    threading.Thread(target=look, daemon=True).start()
    export: Callable[[], None]
    if way == "unsloth":
        from bench.peers.unsloth_gguf import exporting

        export = exporting(folder / "base", folder / "adapter", out, KINDS)
    elif way == "lorajob":
        export = partial(ours, folder, out, tools, threads)
    else:
        export = partial(theirs, folder, out, tools, threads, way == "each", program)
    start = time.monotonic()
    export()
    seconds = time.monotonic() - start
    over.set()
    cpu = sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({"seconds": seconds, "cpu": cpu, "disk": max(peak, used(out)),
                      "left": used(out)}))  # fmt: skip


def used(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_blocks * 512
        except OSError:  # removed meanwhile
            continue
    return total


def measure(
    shape: str,
    ways: list[str],
    work: Path,
    tokenizer: Path | None,
    threads: int,
    program: Path | None,
) -> Iterator[dict[str, Any]]:
    """The figures, after each of the ways."""
    folder = ready(shape, work, tokenizer)
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    for way in ways:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "bench.gguf", way, str(folder), str(out), "--threads", str(threads),
             *(["--llama-quantize", str(program)] if program else [])],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{way} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(shape, way, found, flush=True)
        yield {"size": size, way: found}
    shutil.rmtree(folder / "out", ignore_errors=True)


def gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def report(figures: dict[str, Any], threads: int) -> str:
    lines = [
        "# GGUF: one conversion for several types",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, {gpu()}, "
        f"{threads} threads: `python -m bench.gguf`",
        "",
        f"From base and adapter to {', '.join(KINDS)}; random weights in bfloat16, rank 16 on all linear "
        "layers. One round each, on a machine that others use as well: the CPU seconds say what it takes "
        "by itself. lorajob's comparison of each type with the conversion (KL, perplexity) is not in it: "
        "the others have none. Disk: the most that was used at one time besides base and adapter; what "
        "is left are the merged model, which is published as well, and the three files.",
        "",
        "| shape | way | seconds | of the last way's | CPU seconds | of the last way's | peak disk, GB | left, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, found in figures.items():
        ways = [way for way in WAYS if way in found]
        slow = found[ways[-1]]
        for way in ways:
            mine, text = found[way], WAYS[way]
            lines.append(
                f"| {shape}, {found['size'] / 1e9:.1f} GB | {text} | {mine['seconds']:.0f} | "
                f"{mine['seconds'] / slow['seconds']:.0%} | {mine['cpu']:.0f} | "
                f"{mine['cpu'] / slow['cpu']:.0%} | {mine['disk'] / 1e9:.2f} | {mine['left'] / 1e9:.2f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "peft", *WAYS])
    parser.add_argument("rest", nargs="*", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/lorajob-bench-gguf"))
    parser.add_argument("--shapes", nargs="+", default=["1B"], choices=list(SHAPES))
    parser.add_argument(
        "--ways", nargs="+", default=["lorajob", "once", "each"], choices=list(WAYS)
    )
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--llama-quantize",
        type=Path,
        help="llama.cpp's own program, which the scripts' ways then call",
    )
    given = parser.parse_args()
    if given.what == "peft":
        merge_peft(*given.rest)
    elif given.what != "all":
        one(given.what, given.rest[0], given.rest[1], given.threads, given.llama_quantize)
    else:
        kept = given.work / "figures.json"
        figures = json.loads(kept.read_text()) if kept.is_file() else {}
        for shape in given.shapes:
            for found in measure(
                shape, given.ways, given.work, given.tokenizer, given.threads, given.llama_quantize
            ):
                figures[shape] = {**figures.get(shape, {}), **found}
                kept.write_text(json.dumps(figures))
        text = report(figures, given.threads)
        (RESULTS / "gguf.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
