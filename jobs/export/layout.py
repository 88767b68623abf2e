"""What a checkpoint's tensors are in the model: which lie across, which are tied, which go in 4 bit.

The names and shapes in a checkpoint do not say it; the model's code does. It is built without
weights, which takes no memory worth naming.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Layout:
    """Names are those of the model's parameters."""

    across: frozenset[
        str
    ]  # weights of inputs x outputs, as GPT-2 has them, not the other way round
    tied: dict[str, str]  # a parameter that is the same as another, and that other
    linear: tuple[str, ...]  # modules that bitsandbytes quantizes
    prefix: str  # that a checkpoint's names may lack, with its dot

    def stored(self, name: str, names: set[str]) -> str:
        """The name under which a checkpoint with these names holds a parameter."""
        short = name.removeprefix(self.prefix)
        return short if name not in names and short in names else name


def layout_of(base: Path) -> Layout:
    """The layout of the causal language model in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, keep_in_fp32_modules=model._keep_in_fp32_modules
    )
    modules = dict(model.named_modules())
    conv1d = {name for name, module in modules.items() if isinstance(module, Conv1D)}
    return Layout(
        across=frozenset(f"{name}.weight" for name in conv1d),
        tied={str(k): str(v) for k, v in model.all_tied_weights_keys.items()},
        linear=tuple(
            name
            for name, module in modules.items()
            if (name in conv1d or type(module) is torch.nn.Linear)
            and should_convert_module(name, skipped)
        ),
        prefix=f"{model.base_model_prefix}.",
    )
