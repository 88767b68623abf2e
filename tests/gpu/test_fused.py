"""LoRA that is taken together has the losses and gradients that unsloth's own has, on a GPU: in 4 bit
and in 16, with activations kept and made again, in four families of models.

No fixtures here, so that `tests.gpu.run` can run the same functions without pytest.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.train.parity import BASE, in_a_process

LIMIT = 240  # seconds
# bfloat16 keeps 8 bits, and the two ways round in different places.
LOSS, GRADIENT = 0.005, 0.03
SMALL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2046, "pad_token_id": 2047, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},  # biases at queries, keys and values
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 64},
}


def make_base(family: str, folder: Path) -> None:
    """A small model of a family with random weights, and the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    for path in BASE.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)


def compared() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lorajob-fused-") as name:
        work = Path(name)
        bases = {family: str(work / family) for family in FAMILIES}
        for family, folder in bases.items():
            make_base(family, Path(folder))
        asked = {"engine": "unsloth", "bases": bases, "out": str(work / "out")}
        return in_a_process(asked, LIMIT, "tests.gpu.fused")


def test_lora_taken_together_has_the_same_gradients() -> None:
    for family, forms in compared().items():
        for load_in, found in forms.items():
            print(family, load_in, found)
            assert found["groups"] > 0, (family, load_in)
            assert found["end to end"], (family, load_in)
            expected = found["ways"]["plain"]["loss"]
            for way, told in found["ways"].items():
                at = f"{family} in {load_in}, {way}: {told}"
                assert abs(told["loss"] - expected) <= LOSS * expected, at
                assert told["distance"] <= GRADIENT, at
