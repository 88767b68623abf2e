"""Every way of loading the base with the options of LoRA and training, by one engine, in a process of
its own: a few steps of each.

    python3 -m tests.gpu.options JSON
    {"engine": NAME, "out": FOLDER, "result": FILE, "bases": {NAME: FOLDER}}

With `bases`, these are trained instead, without any options.
"""

from __future__ import annotations

import io
import json
import traceback
from pathlib import Path
from typing import Any

from tests.train.parity import BASE, DATA, LENGTH, asked_with_engine

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"lora": {"rslora": True}},
    "dora": {"lora": {"dora": True}},
    "dropout": {"lora": {"dropout": 0.1}},
    "some layers": {"lora": {"target": ["q_proj", "v_proj", "down_proj"]}},
    "embeddings": {"lora": {"modules_to_save": ["embed_tokens"]}},
    "norms": {"lora": {"modules_to_save": ["input_layernorm", "norm"]}},
    "packing": {"train": {"packing": True}},
    "packing, dora": {"train": {"packing": True}, "lora": {"dora": True}},
    "8-bit AdamW": {"train": {"optimizer": "adamw_8bit"}},
    "paged AdamW": {"train": {"optimizer": "paged_adamw"}},
    "paged 8-bit AdamW": {"train": {"optimizer": "paged_adamw_8bit"}},
    "12 GiB": {"limits": {"gpu_memory_gib": 12}},
}
LOADED = ("4bit", "8bit", "16bit")
ONLY_IN_4BIT: dict[str, dict[str, Any]] = {"loftq": {"lora": {"loftq": True}}}


def main() -> None:
    asked = asked_with_engine()
    found: dict[str, Any] = {}
    for base, folder in asked.get("bases", {}).items():
        for load_in in ("4bit", "16bit"):
            name = f"{base}, {load_in}"
            out = Path(asked["out"]) / f"{base}-{load_in}"
            found[name] = _tried(asked["engine"], Path(folder), load_in, {}, out)
    for load_in in () if found else LOADED:
        more = ONLY_IN_4BIT if load_in == "4bit" else {}
        for name, options in {**OPTIONS, **more}.items():
            folder = Path(asked["out"]) / f"{load_in}-{name}".replace(" ", "-")
            found[f"{load_in}, {name}"] = _tried(asked["engine"], BASE, load_in, options, folder)
    Path(asked["result"]).write_text(json.dumps(found), "utf-8")


def _tried(
    engine: str, base: Path, load_in: str, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The losses and the names of what was trained; or the refusal; or what broke."""
    from jobs.errors import LorajobError

    try:
        return _trained(engine, base, load_in, options, folder)
    except LorajobError as error:
        return {"refused": error.message, "hint": error.hint}
    except Exception:
        return {"broke": traceback.format_exc()[-3000:]}


def _trained(
    engine: str, base: Path, load_in: str, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    from safetensors import safe_open

    from bench.ours import prepared
    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.spec import Spec
    from jobs.train import loop
    from jobs.train.checkpoints import Checkpoints

    spec = Spec.model_validate(
        {
            "name": "options",
            "model": {"base": str(base), "max_seq_length": LENGTH, "load_in": load_in},
            "data": {"train": str(DATA), "eval": 0.05},
            "lora": {"rank": 8, "alpha": 16, **options.get("lora", {})},
            "train": {
                "max_steps": STEPS, "batch_size": 8, "learning_rate": 2e-3, "warmup": 1,
                "schedule": "constant", "seed": 7, "engine": engine, **options.get("train", {}),
            },
            "limits": options.get("limits", {}),
        }
    )  # fmt: skip
    rows = prepared(spec, base, folder.parent / "rows")
    folder.mkdir()
    said = io.StringIO()
    result = loop.train(
        spec, base, TokenizerFiles(base).load(), rows, folder, Checkpoints(folder / "checkpoints", {}),
        Observer("json", stream=said),
    )  # fmt: skip
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = {name.partition(".layers.")[2].partition(".")[2] or name for name in file.keys()}  # noqa: SIM118
    return {
        "losses": [entry["loss"] for entry in result["history"] if "loss" in entry],
        "saved": sorted(names),
        "plan": result["plan"],
        "warned": [line for line in said.getvalue().splitlines() if "padding them" in line],
    }


if __name__ == "__main__":
    main()
