"""Whether merged weights are what base and adapter stand for, weight by weight.

Measured against the model as peft holds it, and not against what merging reckoned: a fault there is
found here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open

from jobs.base_model import weight_files
from jobs.export.held import STATE
from jobs.export.updates import PREFIX

# How much of the trained update is in the merged weights must be 1 for every layer: see `_share`.
# This much it may be off beyond what rounding explains.
MERGED_SHARE = 0.02

# Rounding errors, as a share of a weight: half a step of bfloat16's 8 bits of mantissa; and NF4's,
# of the weights' root mean square (0.09 to 0.1 for weights that are normally distributed).
ROUNDING = {"16bit": 2**-9, "4bit": 0.1}


@torch.no_grad()
def merged_failures(tuned: Any, base: Path, merged: Path, dequantized: bool) -> list[str]:
    """Whether each layer's update is in the merged weights exactly once, and all else as it was.

    `tuned` is the base with the adapter on it; `dequantized` says whether the updates were added to
    the weights as it holds them, or to the original ones.
    """
    layers = _lora_layers(tuned)
    held = {n: m for n, m in _weights(tuned) if _is_quantized(m) or n in layers}
    others = _other_tensors(tuned)
    prefix = f"{tuned.get_base_model().base_model_prefix}."  # which a checkpoint's names may lack
    failures = []
    with ExitStack() as files:
        originals: dict[str, Any] = {}
        for path in weight_files(base):
            file = files.enter_context(safe_open(path, "pt"))
            originals.update(dict.fromkeys(file.keys(), file))
        for stored, found, form in merged_weights(merged):
            name = prefix + stored if prefix + stored in others else stored
            module = held.get(name)
            if module is None:
                wanted = others.get(name)
            elif dequantized or stored not in originals or not _is_quantized(module):
                wanted = _upright(module, dequantize_module_weight(module).data)
            else:
                wanted = originals[stored].get_tensor(stored).to(module.weight.device)
            if wanted is None:
                continue
            wanted = wanted.float()
            weight = found.to(wanted.device)
            if form == "4bit" and (_is_turned(module) or type(module).__name__ == "Conv1D"):
                weight = weight.T  # 4 bit are the other way round in the checkpoint as well
            if name in layers:
                failures += _share_failures(name, weight, wanted, layers[name], form)
            elif form == "16bit" and (off := _off(weight, wanted)) > 0:
                failures.append(
                    f"merged: {name} is not what base and adapter have there (off by up to {off:.3g})"
                )
    return failures


def merged_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor, str]]:
    """The weights of a checkpoint with their names, and whether each was in 16 or in 4 bit."""
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            packed = {n.removesuffix(f".{STATE}") for n in names if n.endswith(STATE)}
            for name in sorted(names):
                if name in packed:
                    parts = {n: file.get_tensor(n) for n in names if n.startswith(f"{name}.")}
                    state = QuantState.from_dict(parts, torch.device("cpu"))
                    yield name, dequantize_4bit(file.get_tensor(name), state), "4bit"
                elif not any(name.startswith(f"{module}.") for module in packed):
                    yield name, file.get_tensor(name), "16bit"


def _lora_layers(tuned: Any) -> dict[str, Any]:
    return {
        f"{name.removeprefix(PREFIX)}.weight": layer
        for name, layer in tuned.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def _weights(tuned: Any) -> Iterator[tuple[str, Any]]:
    """Modules that have a weight, by the weight's name in the base."""
    for name, module in tuned.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and "lora_" not in name:
            yield _name_in_base(f"{name}.weight"), module


def _other_tensors(tuned: Any) -> dict[str, torch.Tensor]:
    """What is not quantized: as trained, where it was trained, else as in the base."""
    tensors = {
        _name_in_base(name): tensor
        for name, tensor in tuned.state_dict().items()
        if "lora_" not in name and ".original_module." not in name and tensor.is_floating_point()
    }
    for name, layer in _lora_layers(tuned).items():
        if layer.lora_bias.get("default"):
            added = layer.lora_B["default"].bias * layer.scaling["default"]
            bias = f"{name.removesuffix('.weight')}.bias"
            tensors[bias] = tensors[bias] + added
    return tensors


def _name_in_base(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name.replace(".modules_to_save.default.", ".")


def _is_quantized(module: Any) -> bool:
    return type(module.weight).__name__ in ("Params4bit", "Int8Params")


def _is_turned(module: Any) -> bool:
    """Whether it is held the other way round than in the checkpoint: bitsandbytes does so with
    GPT-2's."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def _upright(module: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if _is_turned(module) else weight


def _share_failures(
    name: str, merged: torch.Tensor, base: torch.Tensor, layer: Any, form: str
) -> list[str]:
    share, noise = _share(merged, base, layer, form)
    if abs(share - 1) <= MERGED_SHARE + 6 * noise:
        return []
    return [
        f"merged: {name} has {round(share, 2) + 0.0:.2f} times the update that was trained, "
        "where it must have it once"
    ]


def _share(merged: torch.Tensor, base: torch.Tensor, layer: Any, form: str) -> tuple[float, float]:
    """How many times a layer's update is in its merged weight, and how unsure that is.

    What the merged weight has beyond the tuned one, rounded to 16 bit, projected on the trained
    update: with the 1 that it must have it is 0 where nothing was merged, 2 where it was twice. The
    tuned one is rounded too, because an update smaller than half a step of a weight is lost for good.
    Other errors are independent of the update and cancel in the projection: what is left of them has
    the standard deviation sigma / |update|, with sigma the rounding error of a weight.
    """
    tuned = _tuned_weight(base, layer)
    update = tuned - base
    size = update.norm().item()
    if size == 0:  # nothing was trained here, and `changed_tensors` says the rest
        return 1.0, 0.0
    beyond = merged.float() - tuned.to(merged.dtype).float()
    share = 1 + (beyond * update).sum().item() / size**2
    return share, ROUNDING[form] * base.pow(2).mean().sqrt().item() / size


def _tuned_weight(base: torch.Tensor, layer: Any) -> torch.Tensor:
    """What peft makes of a base weight, in float32."""
    delta = _upright(layer.get_base_layer(), layer.get_delta_weight("default")).float()
    if not getattr(layer, "lora_magnitude_vector", None):
        return base + delta
    dora = layer.lora_magnitude_vector["default"]
    # An output is a row, but a column in embeddings and in GPT-2's layers.
    across = dora.fan_in_fan_out or _is_turned(layer.get_base_layer())
    norm = torch.linalg.vector_norm(base + delta, dim=0 if across else 1)
    ratio = dora.weight.float().reshape(-1) / norm
    tuned: torch.Tensor = (base + delta) * (ratio if across else ratio.unsqueeze(1))
    return tuned


def _off(merged: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far two tensors are apart beyond two roundings to 16 bit; 0 where they are not."""
    if merged.shape != wanted.shape:
        return math.inf
    apart = (merged.float() - wanted).abs()
    beyond = apart > 2**-7 * wanted.abs() + 1e-6
    return apart[beyond].max().item() if beyond.any() else 0.0
