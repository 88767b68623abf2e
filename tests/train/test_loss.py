"""A model that is held in 16 bit and trained in 32 is measured as it was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from jobs.train.batches import FlatBatch, PadBatch
from jobs.train.engine_transformers import train_in_float32
from jobs.train.loss import evaluate

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "biases": {"bias": "all"},
    "LoRA": {},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_trained_whole_is_measured_in_16_bit_too(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    train_in_float32(model)
    items: Any = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3, 4], [5, 6, 7])]
    found = [evaluate(model, [collate(items)], CPU) for collate in (PadBatch(0), FlatBatch())]
    expected, tokens = evaluate(model.float(), [PadBatch(0)(items)], CPU)
    for loss, count in found:
        assert count == tokens == 5
        assert loss == pytest.approx(expected, rel=0.01)
