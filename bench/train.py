"""Training speed and memory on a GPU: an 8B shape with random weights, real chats.

    python3 -m bench.train --tokenizer FOLDER --data FILE ...     writes bench/results/train.md

Weights are random: speed and memory depend on shapes alone. Each case runs in a process of its own.
Tokens a second are those of whole optimizer steps, once the first half of them is past (compiling).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "train.md"
MAX_LENGTH = 2048

# The rate of an 8192-cube bf16 product on the H200 that was measured, and the operations that a
# token costs without recomputation: forward and the activations' gradients, 4 for each weight.
MATRIX_RATE = 788e12
WEIGHTS = 8.03e9
NOTEBOOK = 1304  # tokens a second of unsloth's notebook (2 rows, 4 times) on the same card and data


def make_base(folder: Path, tokenizer: Path, layers: int = 32) -> None:
    """Llama-3.1-8B's shape."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir()
    hidden, inner, kv, vocabulary = 4096, 14336, 1024, 128256
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=128000,
        eos_token_id=128009, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    names: dict[str, str] = {}

    def put(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        names.update(dict.fromkeys(tensors, name))

    put("outer.safetensors", {
        "model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    })  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}."
        put(f"layer-{layer}.safetensors", {
            f"{at}self_attn.q_proj.weight": (hidden, hidden), f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden), f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden), f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner), f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        })  # fmt: skip
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def measure(case: dict[str, Any], base: Path, data: list[str], work: Path) -> dict[str, Any]:
    """One training in this process; the figures."""
    began = time.monotonic()
    from jobs.train.engines import start_engine

    start_engine(case["engine"])
    import torch

    from jobs.data.chunks import Recipe
    from jobs.data.prepare import prepare
    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.spec import Spec
    from jobs.train import loop
    from jobs.train.checkpoints import Checkpoints
    from jobs.train.runtime import quiet_libraries

    quiet_libraries()
    spec = Spec.model_validate(
        {
            "name": "bench",
            "model": {"base": str(base), "max_seq_length": MAX_LENGTH, "chat_template": "llama-3.1"},
            "data": {"train": data, "skip_bad_rows": 0.5},
            "lora": {"rank": 16},
            "train": {
                "max_steps": case["steps"], "batch_size": case["batch"], "learning_rate": 1e-4,
                "engine": case["engine"],
            },
            "limits": {"gpu_memory_gib": case["limit"]},
        }
    )  # fmt: skip
    files = TokenizerFiles(base, "llama-3.1")
    rows = work / "rows"
    if not rows.exists():
        rows.mkdir()
        prepare(spec.data, Recipe(files, "responses", MAX_LENGTH, "drop", 1), rows)
    steps: list[tuple[float, int]] = []

    class Clock(loop.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            tokens = sum(p["labels"].numel() for p in inputs["parts"])
            result = super().training_step(model, inputs, num_items_in_batch)
            torch.cuda.synchronize()
            steps.append((time.monotonic(), tokens))
            return result

    loop.Trainer = Clock  # type: ignore[misc]
    out = Path(tempfile.mkdtemp(dir=work))
    result = loop.train(
        spec, base, files.load(), rows, out, Checkpoints(out / "checkpoints", {}),
        Observer("json", stream=io.StringIO()),
    )  # fmt: skip
    half = len(steps) // 2
    seconds = steps[-1][0] - steps[half - 1][0]
    tokens = sum(count for _, count in steps[half:])
    return {
        **case,
        "tokens_per_second": tokens / seconds,
        "step_tokens": tokens / (len(steps) - half),
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_step": steps[0][0] - began,
        "plan": result["plan"],
        "gpu": torch.cuda.get_device_name(),
    }


CASES = (
    {"engine": "unsloth", "batch": 64, "limit": None, "steps": 10},
    {"engine": "unsloth", "batch": 8, "limit": None, "steps": 24},
    {"engine": "unsloth", "batch": 64, "limit": 24.0, "steps": 6},
    {"engine": "unsloth", "batch": 64, "limit": 12.0, "steps": 6},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        base = arguments.work / "base"
        print(json.dumps(measure(arguments.case, base, arguments.data, arguments.work)))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_base(work / "base", arguments.tokenizer)
        for case in CASES:
            done = subprocess.run(
                [sys.executable, "-m", "bench.train", *sys.argv[1:], "--case", json.dumps(case), "--work", name],
                cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            if done.returncode:
                print(done.stderr[-1500:], file=sys.stderr)
                continue
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
            arguments.out.write_text(report(found))


def report(found: list[dict[str, Any]]) -> str:
    ceiling = MATRIX_RATE / (4 * WEIGHTS)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo")
    lines = [
        "# Training on a GPU",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {found[0]['gpu']}, "
        f"{', '.join(f'{p} {version(p)}' for p in packages)}: "
        "`python3 -m bench.train --tokenizer FOLDER --data FILE ...`",
        "",
        "Llama-3.1-8B's shape with random weights, 4 bit, LoRA of rank 16 on all linear layers, real "
        f"chats of up to {MAX_LENGTH} tokens, nothing packed. All tokens count, none is padding. The "
        f"ceiling is {ceiling:,.0f} tokens a second: the card's measured matrix rate "
        f"({MATRIX_RATE / 1e12:.0f} TFLOP/s) over the operations of a token without recomputation. "
        f"The notebook is unsloth's as it stands, {NOTEBOOK:,} tokens a second, measured earlier on "
        "such a card with the same data; it is not part of this run.",
        "",
        "| rows a step | memory allowed | tokens a second | of the ceiling | times the notebook | reserved at most | tokens at a time | checkpointing | start to first step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in found:
        rate = case["tokens_per_second"]
        lines.append(
            f"| {case['batch']} | {case['limit'] or 'all'} | {rate:,.0f} | {rate / ceiling:.0%} | "
            f"**{rate / NOTEBOOK:.1f}** | {case['peak_gib']:.1f} GiB | {case['plan']['tokens']:,} | "
            f"{'yes' if case['plan']['checkpointing'] else 'no'} | {case['first_step']:.0f} s |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
