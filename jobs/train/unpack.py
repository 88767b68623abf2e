"""A quantized base, held unpacked where there is room for it.

bitsandbytes unpacks each 4-bit matrix to 16 bit for every product, and forgets it again. Held
unpacked it is the same numbers in the same products, so the training is the same; what it costs is
memory, and what it saves is the unpacking, three times a matrix and part of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn import Linear


@torch.no_grad()
def unpack(model: Any) -> int:
    """Put an ordinary linear layer in the place of each 4-bit one; returns how many there were."""
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in layers:
        parent, _, own = name.rpartition(".")
        held = getattr(model.get_submodule(parent), own)
        weight = dequantize_4bit(held.weight.data, held.weight.quant_state)
        layer = Linear(held.in_features, held.out_features, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(
            weight.reshape(held.out_features, held.in_features), False
        )
        layer.bias = held.bias
        setattr(model.get_submodule(parent), own, layer)
    return len(layers)
