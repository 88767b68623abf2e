"""The setups that people copy from tutorials, run as they stand from a spec on a GPU.

    python3 -m bench.setups --tokenizer FOLDER --alpaca FILE --chats FILE

Shapes are the models' own, weights random. The tokenizer and, where a template needs the tokens of a
family, the template are Llama-3's for all but Qwen (`--qwen-tokenizer`), whose class transformers
takes from the model; the vocabulary has the model's size where that is larger. It shows what runs, with which kernel, how
fast, and in how much memory; not what is learnt. Writes bench/results/setups.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.cases import ROOT, run_case, summary, write_result, write_results
from bench.shapes import SHAPES
from bench.train import base_of, versions

RESULT = ROOT / "bench" / "results" / "setups.md"
STEPS, WARMUP = 6, 2

SHORT = {"num_hidden_layers": 8}  # speed of getting through, where whole layers say nothing new
LLAMA = SHAPES["llama-3.1-8b"]
PHI = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 96, "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES_HERE: dict[str, dict[str, Any]] = {
    **SHAPES,
    "mistral-7b": {
        **LLAMA, **SHORT, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": None,
    },
    "qwen2.5-7b": {
        **SHAPES["qwen2.5-1.5b"], **SHORT, "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "phi-3.5-mini": {
        **LLAMA, **SHORT, **PHI, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
        "pad_token_id": 128004, "sliding_window": None,
    },
    "phi-3.5-mini-split": {**LLAMA, **SHORT, **PHI},
}  # fmt: skip

# Gemma's turns around a format of one's own, as tutorials write it.
OWN_FORMAT = (
    "<start_of_turn>user\n{system}\n{instruction}<end_of_turn>\n"
    "<start_of_turn>model\n{output}<end_of_turn>"
)
CHAT = {
    "lora": {"rank": 16, "alpha": 16},
    "train": {
        "batch_size": 8, "learning_rate": 2e-4, "warmup": 5, "optimizer": "adamw_8bit",
        "weight_decay": 0.01,
    },
}  # fmt: skip
QLORA = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "train": {
        "batch_size": 4, "learning_rate": 5e-4, "schedule": "cosine", "warmup": 0.03,
        "optimizer": "paged_adamw", "weight_decay": 0.001, "max_grad_norm": 0.3,
        "group_by_length": True,
    },
}  # fmt: skip


def setup(name: str, shape: str, data: str, template: str, spec: dict[str, Any] = CHAT, length: int = 2048) -> dict[str, Any]:  # fmt: skip
    return {"name": name, "shape": shape, "source": data, "template": template, "spec": spec, "length": length}  # fmt: skip


CASES = (
    setup("A-llama-3.2-3b", "llama-3.2-3b", "chats", "llama-3.1"),
    setup("A-llama-3.2-1b", "llama-3.2-1b", "chats", "llama-3.1"),
    setup("C-gemma-2-2b", "gemma-2-2b", "alpaca", OWN_FORMAT, QLORA, 512),
    setup("B-llama-3.1-8b", "llama-3.1-8b", "alpaca", "alpaca"),
    setup("qwen2.5-7b-8-layers", "qwen2.5-7b", "chats", "chatml"),
    setup("mistral-7b-8-layers", "mistral-7b", "alpaca", "llama-3.1"),
    setup("phi-3.5-mini-8-layers", "phi-3.5-mini", "alpaca", "llama-3.1"),
    setup("phi-3.5-split-8-layers", "phi-3.5-mini-split", "alpaca", "llama-3.1"),
    setup("D-llama-3.2-3b", "llama-3.2-3b", "chats", "llama-3.1"),
)


def spec_of(case: dict[str, Any]) -> Any:
    from jobs.spec import Spec

    return Spec.model_validate(
        {
            "name": "bench",
            "model": {"base": case["base"], "max_seq_length": case["length"], "chat_template": case["template"]},
            "data": {"train": case["data"], "skip_bad_rows": 0.5},
            "lora": case["spec"]["lora"],
            "train": {**case["spec"]["train"], "max_steps": STEPS, "engine": case["engine"]},
        }
    )  # fmt: skip


def prepare(case: dict[str, Any]) -> dict[str, Any]:
    """The base and the rows of one setup."""
    from bench.ours import prepared

    base = Path(case["base"])
    if not (base / "config.json").exists():
        shape = SHAPES_HERE[case["shape"]]
        if case["tiny"]:
            shape = {
                **shape, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "head_dim": 16,
                "num_key_value_heads": 4 if "phi" in case["shape"] else 2,
            }  # fmt: skip
        base_of(base, Path(case["tokenizer"]), shape)
        if shape["model_type"] == "phi3":
            fuse(base)
    prepared(spec_of(case), base, Path(case["rows"]))
    return {}


def fuse(base: Path) -> None:
    """Phi-3's own layout: queries, keys and values in one layer, gate and up in another."""
    import torch
    from safetensors.torch import load_file, save_file

    index_path = base / "model.safetensors.index.json"
    index = json.loads(index_path.read_text("utf-8"))
    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for path in sorted(base.glob("layer-*.safetensors")):
        tensors = load_file(path)
        at = next(name for name in tensors if "input_layernorm" in name).partition("input_")[0]
        for name, parts in fused.items():
            split = [tensors.pop(f"{at}{part}.weight") for part in parts]
            tensors[f"{at}{name}.weight"] = torch.cat(split)
        save_file(tensors, path, {"format": "pt"})
        kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
        index["weight_map"] = {**kept, **dict.fromkeys(tensors, path.name)}
    index_path.write_text(json.dumps(index), "utf-8")


def measure(case: dict[str, Any]) -> None:
    """One case in this process: making what a setup needs, or training it."""
    if case["name"].startswith("prepare-"):
        write_result(case, prepare(case))
        return
    from jobs.train.engines import choose_engine, start_engine
    from jobs.train.runtime import settle_threads

    settle_threads()
    start_engine(choose_engine(case["engine"], "cuda"))
    from bench.clock import Clock
    from bench.ours import train

    clock = Clock(case["began"], WARMUP, math.inf)
    figures = train(spec_of(case), Path(case["base"]), Path(case["rows"]), Path(case["work"]), clock)  # fmt: skip
    write_result(case, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama-3's tokenizer")
    parser.add_argument("--qwen-tokenizer", type=Path, help="one with Qwen2's, for Qwen")
    parser.add_argument("--alpaca", type=Path, help="instructions with input and output")
    parser.add_argument("--chats", type=Path, help="conversations as ShareGPT has them")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--cases", help="only these, by name, with commas")
    parser.add_argument("--base", type=Path, help="an 8B base that is there already")
    parser.add_argument("--engine", choices=("auto", "unsloth", "transformers"), default="auto")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one case")
    parser.add_argument("--budget", type=float, default=300, help="seconds for all of them")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case)
        return
    deadline = time.time() + arguments.budget
    names = arguments.cases.split(",") if arguments.cases else [case["name"] for case in CASES]
    if not arguments.qwen_tokenizer:
        names = [name for name in names if not name.startswith("qwen")]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorajob-bench-")))
        cases = [
            filled(case, arguments, work)
            for name in names
            for case in CASES
            if case["name"] == name
        ]
        # The next setup's base is made while one trains.
        making = stack.enter_context(ThreadPoolExecutor(1))
        made = [making.submit(make, case, work, arguments.limit) for case in cases]
        results: list[dict[str, Any]] = []
        for number, (case, base) in enumerate(zip(cases, made, strict=True)):
            results.append(run(case, base, work, deadline, arguments.limit))
            print(summary(results[-1]), flush=True)
            write_results(arguments.out, results, report(results))
            if case["base"] not in [later["base"] for later in cases[number + 1 :]] and (
                Path(case["base"]).is_relative_to(work)
            ):
                shutil.rmtree(case["base"], ignore_errors=True)
        for base in made:
            base.cancel()
    print(arguments.out.read_text("utf-8"))


def filled(case: dict[str, Any], arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    given = arguments.base if case["shape"] == "llama-3.1-8b" else None
    tokenizer = arguments.qwen_tokenizer if "qwen" in case["shape"] else arguments.tokenizer
    return {
        **case,
        "base": str((given or work / case["shape"]).resolve()),
        "rows": str(work / f"rows-{case['name']}"),
        "data": str(getattr(arguments, case["source"]).resolve()),
        "tokenizer": str(tokenizer.resolve()),
        "engine": arguments.engine,
        "tiny": arguments.tiny,
    }


def make(case: dict[str, Any], work: Path, limit: float) -> dict[str, Any]:
    return run_case("bench.setups", {**case, "name": f"prepare-{case['name']}"}, work, limit)


def run(
    case: dict[str, Any],
    base: Future[dict[str, Any]],
    work: Path,
    deadline: float,
    limit: float,
) -> dict[str, Any]:
    left = deadline - time.time()
    if left < 15:
        base.cancel()
        return {**case, "failed": "left out: the time is up", "stderr": ""}
    made = base.result()
    if "failed" in made:
        return {**made, "name": case["name"], "failed": f"its base or its rows: {made['failed']}"}
    left = max(15.0, deadline - time.time())
    return run_case("bench.setups", case, work, min(limit, left))


def report(found: list[dict[str, Any]]) -> str:
    done = [case for case in found if "failed" not in case]
    gpu = done[0]["gpu"] if done else "nothing ended"
    lines = [
        "# The setups of tutorials",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {gpu}, {versions()}: "
        "`python3 -m bench.setups --tokenizer FOLDER --alpaca FILE --chats FILE`",
        "",
        f"Each from a spec, {STEPS} optimizer steps, the last {STEPS - WARMUP} measured. The shapes are "
        "the models' own (where it says so with 8 layers), the weights random, the tokenizer Llama-3's but for Qwen. "
        "GiB are what torch had reserved at most while training.",
        "",
        "| setup | rows a step | attention | tokens at a time | tokens a second | GiB "
        "| start to first step | loss, first | last |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in found:
        rows = case["spec"]["train"]["batch_size"]
        if "failed" in case:
            lines.append(f"| {case['name']} | {rows} | failed: {case['failed']} | | | | | | |")
            continue
        plan, losses = case["plan"], case["losses"]
        again = ", activations made again" if plan["checkpointing"] else ""
        finite = all(math.isfinite(loss) for loss in losses)
        lines.append(
            f"| {case['name']} | {rows} | {case['kernel']} | {plan['tokens']:,}{again} | "
            f"{case['tokens_per_second']:,.0f} | {case['peak_gib']:.1f} | "
            f"{case['start_to_first_step']:.0f} s | {losses[0]:.3f} | "
            f"{losses[-1]:.3f}{'' if finite else ', **not finite**'} |"
        )
    for case in found:
        for text in case.get("warnings", []):
            lines += ["", f"{case['name']} warns: {text}"]
        if "failed" in case:
            lines += ["", f"{case['name']} failed, {case['failed']}:", "", "```", case["stderr"], "```"]  # fmt: skip
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
