"""Merging: base weights + LoRA -> 16-bit weights, one checkpoint shard at a time.

The adapter was trained against the base as it was held while training. A 4-bit base is therefore
quantized and dequantized here exactly as bitsandbytes did it then, and the update is added to that:
merged into the original weights instead, the model is measurably further from what was trained.
The sum is made in float32 and rounded once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jobs.base_model import weight_files
from jobs.errors import VerificationError
from jobs.observe.events import Observer

PREFIX = "base_model.model."


def merge(
    base: Path, adapter: Path, quantized: list[str], out: Path, observer: Observer
) -> dict[str, Any]:
    """Write the merged model to `out`: weights, config and generation config.

    `quantized` names the modules that were held in 4 bit. Raises VerificationError where the
    adapter has a layer that the base does not have.
    """
    updates = Updates(adapter)
    dtype = _dtype(base)
    in_4bit = {f"{name}.weight" for name in quantized}
    waiting = set(updates.tensors)
    shards = weight_files(base)
    with observer.ticker("merging", len(shards)) as ticker:
        for shard in shards:
            merged: dict[str, torch.Tensor] = {}
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    if name in in_4bit:
                        tensor = through_nf4(tensor)
                    if name in updates.tensors:
                        tensor = tensor.float() + updates.delta(name)
                        waiting.discard(name)
                    merged[name] = tensor.to(dtype).contiguous()
            save_file(merged, out / shard.name, metadata={"format": "pt"})
            ticker.advance()
    if waiting:
        raise VerificationError(
            f"the adapter has layers that the base does not have: {sorted(waiting)[0]}",
            "merge it into the base model that it was trained on",
        )
    index = base / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    return {"dtype": config["dtype"], "updated_tensors": len(updates.tensors)}


class Updates:
    """The weight updates that an adapter stands for, by the name of the weight they belong to."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        self._scale = config["lora_alpha"] / config["r"]
        weights = load_file(adapter / "adapter_model.safetensors")
        self.tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, lora_a in weights.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                lora_b = weights[name.replace(".lora_A.", ".lora_B.")]
                self.tensors[f"{module}.weight"] = (lora_a, lora_b)

    def delta(self, name: str) -> torch.Tensor:
        """alpha / rank * B A in float32, of the weight's shape (out, in); Hu et al. 2021, eq. 3."""
        lora_a, lora_b = self.tensors[name]
        delta: torch.Tensor = self._scale * (lora_b.float() @ lora_a.float())
        return delta


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as its 4-bit form stands for it, in float32.

    The same call with the same block size as bitsandbytes' Linear4bit makes, so the result is what
    the adapter saw while it was trained.
    """
    packed, state = quantize_4bit(
        weight.float(), quant_type="nf4", compress_statistics=True, blocksize=64
    )
    unpacked: torch.Tensor = dequantize_4bit(packed, state)
    return unpacked.reshape(weight.shape)


def _dtype(base: Path) -> torch.dtype:
    """float16 stays float16; everything else becomes bfloat16."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16
