"""Merging, side by side with what a user would run instead.

    .venv/bin/python -m bench.export          speed and memory   -> bench/results/export.md
    .venv/bin/python -m bench.export base     which base to merge into -> bench/results/merge_base.md

Speed: a model of the shape asked for with random weights, in shards, and an adapter on all its linear
layers; merged by `jobs.export.merge` (into the 16-bit base, into the dequantized one, and to 4 bit),
by peft's merge_and_unload with save_pretrained, and copied by `cp`. Each in a process of its own, and
each time ends when the files are on the disk.

The base: the demo is trained for several seeds, merged into the original weights and into the
dequantized ones, and evaluated on the rows held out, beside base + adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

SHAPES: dict[str, dict[str, Any]] = {
    "0.1B": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
             "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
TIED = {"0.1B", "1B", "3B"}


def make_base(shape: str, folder: Path) -> None:
    """A base of this shape with random weights, a shard at a time, and an adapter beside it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=shape in TIED, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config.save_pretrained(base)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, lora, number = {}, {}, 1
    total = sum(p.numel() for p in model.parameters())
    count = max(1, round(2 * total / 2.5e9))

    def save() -> None:
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shards[0], base / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[0], name))
        shards[0] = {}

    torch.manual_seed(0)
    values = torch.empty(2**24 + 1, dtype=torch.bfloat16).normal_().mul_(0.02)  # over and over
    for name, parameter in model.named_parameters():
        held = sum(t.nbytes for t in shards[0].values())
        if held > 2 * total / count and number < count:
            save()
            number += 1
        shards[0][name] = (
            values.repeat(-(-parameter.numel() // len(values)))[: parameter.numel()].view(
                parameter.shape
            )
            if parameter.dim() > 1
            else torch.ones(parameter.shape, dtype=torch.bfloat16)
        )
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{module}.lora_A.weight"] = torch.randn(16, parameter.shape[1]) * 0.01
            lora[f"{module}.lora_B.weight"] = torch.randn(parameter.shape[0], 16) * 0.01
    save()
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(lora, adapter / "adapter_model.safetensors")
    targets = sorted({n.split(".")[-2] for n, _ in model.named_parameters() if "_proj" in n})
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32,
                    "target_modules": targets, "base_model_name_or_path": str(base)})
    )  # fmt: skip


def merge_ours(folder: Path, out: Path, dequantized: bool, form: Any) -> None:
    from jobs.export.layout import layout_of
    from jobs.export.merge import merge
    from jobs.observe.events import Observer

    quantized = list(layout_of(folder / "base").linear) if dequantized else []
    merge(folder / "base", folder / "adapter", quantized, out, Observer("json"), form)


def merge_peft(folder: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(out)


def synced(out: Path) -> None:
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes, mapped files included."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def one(what: str, folder: Path, out: Path) -> None:
    """Do one of the ways, in this process, and print its figures."""
    from jobs.train.runtime import settle_threads

    settle_threads()
    before = 0.0
    if what == "cp":
        imported = time.monotonic()
        subprocess.run(
            ["cp", *map(str, (folder / "base").glob("*.safetensors")), str(out)], check=True
        )
    else:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401

        imported, before = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        if what == "peft":
            merge_peft(folder, out)
        else:
            merge_ours(folder, out, "dequantized" in what, "4bit" if "4bit" in what else "16bit")
    synced(out)
    seconds = time.monotonic() - imported
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before  # fmt: skip
    peak = peak_memory()
    print(json.dumps({"seconds": seconds, "cpu": spent, "peak": peak}))


WAYS = {
    "cp": "`cp` of the same files",
    "16bit": "**lorajob**, into the original weights",
    "16bit dequantized": "**lorajob**, into the dequantized weights",
    "4bit": "**lorajob**, into the original weights, then quantized (`merged: 4bit`)",
    "peft": "peft: `merge_and_unload` + `save_pretrained` (into the original weights)",
}


def measure(shape: str, ways: list[str], work: Path, rounds: int) -> dict[str, Any]:
    """The figures of each way and round. peft is left out where two models do not fit into memory."""
    folder = work / shape
    if not (folder / "adapter" / "adapter_config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_base(shape, folder)
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ways = [way for way in ways if way != "peft" or 2 * size < memory]
    found: dict[str, Any] = {"size": size, **{way: [] for way in ways}}
    for _ in range(rounds):
        for way in ways:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            done = subprocess.run(
                [sys.executable, "-m", "bench.export", "one", way, str(folder), str(out)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{way} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(shape, way, found[way][-1], flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return found


def speed(shapes: list[str], ways: list[str], work: Path, rounds: int) -> None:
    """Measure, and write the table of all that was measured in `work`."""
    kept = work / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for shape in shapes:
        figures[shape] = measure(shape, ways, work, rounds)
        kept.write_text(json.dumps(figures))
    lines = [
        "# Merging: seconds and memory",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, no GPU: "
        "`python -m bench.export`",
        "",
        "Random weights in bfloat16, rank 16 on all linear layers. Each way in a process of its own, "
        "in turn; the best of the rounds, on a machine that others use as well: the CPU seconds say "
        "what it takes by itself. The time ends when all is on the disk (fsync). Imports, the same for "
        "all, are not in it, but are in the peak memory.",
        "",
        "| shape | way | rounds | seconds | MB/s read | of cp's speed | CPU seconds | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape, found in figures.items():
        copied = min(one["seconds"] for one in found["cp"])
        for way in WAYS:
            if not (of_way := found.get(way)):
                continue
            seconds, cpu = (min(one[what] for one in of_way) for what in ("seconds", "cpu"))
            peak = max(one["peak"] for one in of_way) / 2**30
            lines.append(
                f"| {shape}, {found['size'] / 1e9:.1f} GB | {WAYS[way]} | {len(of_way)} | {seconds:.1f} | "
                f"{found['size'] / 1e6 / seconds:.0f} | {copied / seconds:.2f} | {cpu:.1f} | "
                f"{'' if way == 'cp' else f'{peak:.2f}'} |"
            )
    lines.append("")
    (RESULTS / "export.md").write_text("\n".join(lines))
    print("\n".join(lines))


CASES: dict[str, dict[str, str]] = {
    "4bit": {"LORAJOB__MODEL__LOAD_IN": "4bit"},
    "4bit, LoftQ": {"LORAJOB__MODEL__LOAD_IN": "4bit", "LORAJOB__LORA__LOFTQ": "true"},
    "8bit": {"LORAJOB__MODEL__LOAD_IN": "8bit"},
}


def trained(case: str, seed: int, work: Path) -> Path:
    """The folder of a run of the demo's data and adapter."""
    folder = work / f"{case.replace(', ', '-')}-{seed}"
    run = folder / "demo"
    if not (run / "adapter" / "adapter_config.json").is_file():
        env = {
            **os.environ, **CASES[case], "LORAJOB__TRAIN__SEED": str(seed),
            "LORAJOB__DATA__EVAL": "0.2", "LORAJOB__EXPORT": '{"merged": null}',
            "LORAJOB__PUBLISH": "[]", "LORAJOB__VERIFY": '{"max_new_tokens": 1}',
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "entrypoint.py", "run", "examples/demo.yaml", "--work", str(folder)],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # The run ends with 6: with a single token asked for, no answer stops by itself.
        if not (run / "adapter" / "adapter_config.json").is_file():
            raise SystemExit(f"{case}, seed {seed}: {done.returncode}\n{done.stderr[-2000:]}")
    return run


def compare_bases(case: str, seed: int, work: Path) -> dict[str, tuple[float, float]]:
    """Loss on the rows held out, and KL to base + adapter, for each way to merge."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from jobs.data.tokenizer import load_tokenizer
    from jobs.export.layout import layout_of
    from jobs.export.merge import merge
    from jobs.observe.events import Observer
    from jobs.train.batches import PadBatch
    from jobs.train.engine_transformers import load_model
    from jobs.train.loss import evaluate, trained_logits
    from jobs.train.rows import load_rows
    from jobs.train.runtime import quiet_libraries

    quiet_libraries()
    base = ROOT / "examples" / "demo" / "base"
    run = trained(case, seed, work)
    load_in: Any = case.split(",")[0]
    rows: Any = load_rows(run / ".work" / "data" / "eval.arrow")
    collate = PadBatch(load_tokenizer(base).pad_id)
    items: list[Any] = [dict(rows[i]) for i in range(len(rows))]
    batches = [collate(items[i : i + 8]) for i in range(0, len(items), 8)]

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return torch.cat([trained_logits(model, batch)[0] for batch in batches]).log_softmax(-1)

    tuned: Any = PeftModel.from_pretrained(load_model(base, load_in, "cpu"), str(run / "adapter"))
    tuned.eval()
    reference = logits(tuned)
    found = {"base + adapter": (evaluate(tuned, batches, tuned.device)[0], 0.0)}
    linear = list(layout_of(base).linear)
    ways: list[tuple[str, list[str], Any]] = [
        ("dequantized", linear, "16bit"), ("original", [], "16bit"),
        ("dequantized, 4bit again", linear, "4bit"), ("original, 4bit again", [], "4bit"),
    ]  # fmt: skip
    for name, quantized, form in ways:
        out = work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        merge(base, run / "adapter", quantized, out, Observer("json"), form, load_in)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        model.eval()
        ours = logits(model)
        divergence = (reference.exp() * (reference - ours)).sum(-1).mean().item()
        found[name] = (evaluate(model, batches, model.device)[0], divergence)
    return found


def kept_after_quantizing() -> list[str]:
    """How much of an update is left when the merged weight is quantized, by the update's size."""
    import torch

    from jobs.export.held import through_nf4

    torch.manual_seed(0)
    original = (torch.randn(1024, 2048) * 0.02).bfloat16().float()
    update = torch.randn(1024, 16) @ torch.randn(16, 2048)
    update /= update.norm()
    lines = []
    for size in (0.003, 0.01, 0.03, 0.1, 0.3):
        scaled = update * original.norm() * size
        kept = []
        for base in (through_nf4(original), original):
            merged = through_nf4((base + scaled).bfloat16().float())
            kept.append(((merged - base) * scaled).sum().item() / scaled.norm().item() ** 2)
        lines.append(f"| {size:.1%} | {kept[0]:.2f} | {kept[1]:.2f} |")
    return lines


def bases(work: Path, seeds: list[int], cases: list[str]) -> None:
    lines = [
        "# Which base to merge into",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, CPU: `python -m bench.export base`",
        "",
        f"examples/demo, trained with the base held as the first column says, a fifth of the rows held "
        f"out, seeds {', '.join(map(str, seeds))}. Loss in nats per trained token of the rows held out; "
        "KL(base + adapter || merged) in nats per trained token. *4bit again*: the merged weights "
        "quantized once more (`merged: 4bit`).",
        "",
        "| trained in | merged into | loss, each seed | mean | beyond base + adapter | KL, mean |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        of_seed = [compare_bases(case, seed, work) for seed in seeds]
        start = statistics.mean(found["base + adapter"][0] for found in of_seed)
        for way in of_seed[0]:
            losses = [found[way][0] for found in of_seed]
            mean, kl = statistics.mean(losses), statistics.mean(f[way][1] for f in of_seed)
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            lines.append(
                f"| {case} | {way} | {each} | {mean:.4f} | {mean - start:+.4f} | {kl:.2g} |"
            )
        print("\n".join(lines), flush=True)
    lines += [
        "",
        "## How much of an update a second quantizing leaves",
        "",
        "A random weight of 1024 x 2048 and an update of rank 16, by the size of the update beside the "
        "weight (Frobenius norms; in the demo it is 12 to 23 %, in large models mostly a few percent "
        "and less). Weights that were quantized before lie on the grid of the second quantizing, and "
        "fall back onto it: 1 is all of the update, 0 none. This is why `merge_base: auto` means the "
        "original weights for `merged: 4bit`, although the demo's update is large enough for both.",
        "",
        "| size of the update | into dequantized weights | into original weights |",
        "| --- | --- | --- |",
        *kept_after_quantizing(),
    ]
    lines.append("")
    (RESULTS / "merge_base.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "base", "one"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("/tmp/lorajob-bench-export"))
    parser.add_argument("--shapes", nargs="+", default=["1B"], choices=list(SHAPES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    if given.what == "one":
        one(given.rest[0], Path(given.rest[1]), Path(given.rest[2]))
    elif given.what == "base":
        bases(given.work, given.seeds, given.cases)
    else:
        speed(given.shapes, given.ways, given.work, given.rounds)


if __name__ == "__main__":
    main()
