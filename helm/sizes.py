"""How large `work` has to be, by the formula of `check`, for bases of well-known shapes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from jobs.base_model import BaseModel
from jobs.preflight import run_bytes
from jobs.spec import Spec
from jobs.train.shape import read_shape

# Layers, width, inner width, heads, key-value heads, width of a head, vocabulary, tied.
_LLAMAS = {
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, False),
    "Llama-3.3-70B": (80, 8192, 28672, 64, 8, 128, 128256, False),
}
EXPORTS: dict[str, dict[str, Any]] = {
    "adapter only": {"merged": None},
    "merged": {},
    "merged, q8_0 and q4_k_m": {"gguf": ["q8_0", "q4_k_m"]},
}


class _Imagined(BaseModel):
    """A base of a shape, which is nowhere."""

    def weight_bytes(self) -> int:
        shape = read_shape(self.config)
        assert shape is not None
        return 2 * shape.weights


def _base(name: str) -> _Imagined:
    layers, width, inner, heads, kv_heads, head, vocabulary, tied = _LLAMAS[name]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 131072,
    }  # fmt: skip
    return _Imagined(name, Path(), config)


def work_gib(name: str, export: dict[str, Any]) -> int:
    """GiB for a run of this base, which is in `work` as well."""
    spec = Spec.model_validate(
        {"name": "x", "model": {"base": name}, "data": {"train": "x"}, "export": export}
    )
    base = _base(name)
    return math.ceil((run_bytes(spec, base) + base.weight_bytes()) / 2**30)


@cache
def sizes() -> list[list[str]]:
    """The table: for each base what each kind of export takes, in GiB."""
    head = ["base", *EXPORTS]
    return [head] + [
        [name, *(str(work_gib(name, export)) for export in EXPORTS.values())] for name in _LLAMAS
    ]
