"""Base models of well-known shapes with random weights: memory and speed depend on shapes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As in the config.json of the models that they are named after.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128009,
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "bos_token_id": 128000, "eos_token_id": 128009, "tie_word_embeddings": True,
        "use_sliding_window": False, "torch_dtype": "bfloat16",
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000,
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192,
        "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "bos_token_id": 128000, "eos_token_id": 128009,
        "pad_token_id": 128004, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
}  # fmt: skip

POOL = 2**26  # random values that all weights are cut from: drawing billions would take minutes


def make_base(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> None:
    """A base model of this shape in `folder`, in bf16, with the tokenizer's files; needs no GPU."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape, indent=2))
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(1)) * 0.02
    pool = pool.to(torch.bfloat16)

    def filled(size: tuple[int, ...], start: int) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        count = size[0] * size[1]
        begin = start % POOL
        copies = -(-(begin + count) // POOL)
        return pool.repeat(copies)[begin : begin + count].reshape(size)

    names: dict[str, str] = {}
    number = 0
    for file, tensors in _files(shape):
        made = {}
        for name, size in tensors.items():
            number += 1
            made[name] = filled(size, number * 7919 * 64)
        save_file(made, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(made, file))
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in tokenizer.iterdir():
        if path.is_file() and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def _files(shape: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The weights' files, each with the sizes of its tensors."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", hidden // shape["num_attention_heads"])
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape["tie_word_embeddings"]:
        outer["lm_head.weight"] = (shape["vocab_size"], hidden)
    yield "outer.safetensors", outer
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    linears = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors: dict[str, tuple[int, ...]] = {
            f"{at}.{name}.weight": size for name, size in linears.items()
        }
        tensors |= {f"{at}.{norm}.weight": (hidden,) for norm in norms}
        if shape["model_type"] == "qwen2":
            tensors |= {f"{at}.self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
        yield f"layer-{layer}.safetensors", tensors
