"""LoRA on a model: the spec's options as peft takes them, and LoftQ's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from jobs.base_model import weight_files
from jobs.errors import SpecError
from jobs.spec import Lora
from jobs.train.modules import require_modules

WITH_A_MATRIX = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


def options(lora: Lora, model: Any) -> dict[str, Any]:
    """The arguments of peft's LoraConfig, all but the targets.

    Raises SpecError where the model has no such module: peft says nothing, or not which there are.
    """
    modules = dict(model.named_modules())
    matrices = [name for name, each in modules.items() if isinstance(each, WITH_A_MATRIX)]
    require_modules(lora, modules, matrices)
    embeddings = {"embed_tokens", "lm_head"} & {m.rpartition(".")[2] for m in lora.modules_to_save}
    return {
        # Where embeddings and head are one matrix they stay one.
        "ensure_weight_tying": bool(embeddings and model.config.tie_word_embeddings),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": lora.bias,
        "modules_to_save": list(lora.modules_to_save) or None,
    }


def wrong_option(error: Exception) -> SpecError:
    """What peft or unsloth say against the options, as the spec's mistake."""
    text = str(error).strip().splitlines()[0]
    field = "lora.modules_to_save" if "modules_to_save" in text else "lora.target"
    if "is not allowed" in text or "embed_tokens" in text:
        field = "lora.modules_to_save"
    return SpecError(f"{field}: {text}", "name modules of the base model, or all-linear")


@torch.no_grad()
def start_with_loftq(model: Any, base: Path, seed: int) -> None:
    """Set the matrices of each 4-bit layer so that base and update together are nearest to the
    weights as they were.

    The error that quantizing made is taken apart into its largest singular values, of which A and B
    get the square roots each: LoftQ with one iteration (Li et al. 2023, algorithm 1 with T = 1). It
    is divided by the update's scale, which peft's own does not do and so holds for a scale of 1.
    """
    from peft.tuners.lora.bnb import Linear4bit

    where = {}
    for path in weight_files(base):
        with safe_open(path, "pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the decomposition begins with random vectors
        for name, layer in model.named_modules():
            if not isinstance(layer, Linear4bit):
                continue
            held = layer.get_base_layer().weight
            key = f"{name.removeprefix('base_model.model.')}.weight"
            if key not in where:  # checkpoints may leave out the name of the model without its head
                key = key.removeprefix(f"{model.get_base_model().base_model_prefix}.")
            with safe_open(where[key], "pt") as file:
                weight = file.get_tensor(key).to(held.device, torch.float32)
            if getattr(layer.get_base_layer(), "source_cls", None) is Conv1D:
                weight = (
                    weight.T
                )  # GPT-2's lie across, and are turned when they are loaded in 4 bit
            lost = weight - dequantize_4bit(held.data, held.quant_state).reshape(weight.shape)
            rank = layer.r["default"]
            u, s, v = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=4)
            root = (s[:rank] / layer.scaling["default"]).sqrt()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_((v[:, :rank] * root).T)
            b.copy_(u[:, :rank] * root)
