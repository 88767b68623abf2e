"""For each LoRA option the merged weights are peft's own, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from jobs.errors import SpecError, VerificationError
from jobs.export.merge import merge
from jobs.observe.events import Observer

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}


def llama(tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=tied))


def tied_llama() -> PreTrainedModel:
    return llama(tied=True)


def qwen2() -> PreTrainedModel:
    """With biases in attention, fewer heads for keys and values, and tied embeddings."""
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )


def gpt2() -> PreTrainedModel:
    """With its weights lying across (Conv1D), and biases everywhere."""
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96))


def saved_base(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    """A model with random weights, norms and biases too, in bfloat16."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def saved_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter whose every trained number is random. Alpha is not the rank."""
    torch.manual_seed(1)
    options = {"r": 8, "lora_alpha": 20, "target_modules": "all-linear", **options}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # as it began, or nearly
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def load(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model


OPTIONS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "plain": (llama, {}),
    "rslora": (llama, {"use_rslora": True}),
    "dora": (llama, {"use_dora": True}),
    "rsdora": (qwen2, {"use_dora": True, "use_rslora": True}),
    "bias all": (qwen2, {"bias": "all"}),
    "bias all, few layers": (qwen2, {"bias": "all", "target_modules": ["q_proj"]}),
    "bias lora_only": (qwen2, {"bias": "lora_only"}),
    "bias of B": (qwen2, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "whole modules": (llama, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "whole modules, tied": (
        tied_llama,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "rank and alpha of layers": (
        llama,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 4, "down_proj": 16},
            "alpha_pattern": {"layers.1.*": 3, "o_proj": 7},
        },
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embeddings, dora": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "conv1d": (gpt2, {}),
    "conv1d, bias all": (gpt2, {"bias": "all"}),
    "conv1d, dora": (gpt2, {"use_dora": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_merged_weights_are_pefts(option: str, tmp_path: Path) -> None:
    make, options = OPTIONS[option]
    base = saved_base(make, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    theirs = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")

    (exact := tmp_path / "exact").mkdir()
    result = merge(base, adapter, [], exact, Observer("json"), dtype=torch.float32)
    ours = load_file(exact / "model.safetensors")
    assert set(ours) == set(before)
    changed = [name for name in ours if not torch.equal(ours[name], before[name].float())]
    assert len(changed) == result["updated_tensors"] > 0
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)

    (rounded := tmp_path / "rounded").mkdir()
    merge(base, adapter, [], rounded, Observer("json"))
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        if options.get("use_dora"):
            # peft takes the norm over all columns at once, and a sum in another order may round
            # otherwise: the last bit of a few numbers.
            off = (tensor.float() - theirs[name]).abs() / theirs[name].abs().clamp(min=1e-6)
            assert off.max() <= 2**-8, name
        else:
            assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["LoRA on the embeddings", "the head whole", "both, apart"],
)
def test_what_was_trained_apart_is_tied_no_more(options: dict[str, Any], tmp_path: Path) -> None:
    """Merged, the model predicts what base and adapter did, though the base's matrices are tied."""
    base = saved_base(tied_llama, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    (out := tmp_path / "out").mkdir()
    merge(base, adapter, [], out, Observer("json"), dtype=torch.float32)
    merged = load(out)
    assert not merged.config.tie_word_embeddings
    ids = torch.arange(90).reshape(3, 30)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base), str(adapter))(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_was_trained_as_one_stays_tied(tmp_path: Path) -> None:
    base = saved_base(tied_llama, tmp_path / "base")
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    assert "base_model.model.lm_head.weight" in load_file(adapter / "adapter_model.safetensors")
    (out := tmp_path / "out").mkdir()
    merge(base, adapter, [], out, Observer("json"), dtype=torch.float32)
    merged = load(out)
    assert merged.config.tie_word_embeddings
    ids = torch.arange(90).reshape(3, 30)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base), str(adapter))(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "of type VERA"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import json

    base = saved_base(llama, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SpecError, match=message):
        merge(base, adapter, [], tmp_path, Observer("json"))


def test_an_adapter_for_other_shapes_is_refused(tmp_path: Path) -> None:
    base = saved_base(llama, tmp_path / "base")
    adapter = saved_adapter(saved_base(qwen2, tmp_path / "other"), tmp_path / "adapter")
    with pytest.raises(VerificationError, match=r"of shape \[32, 64\], and the base's \[64, 64\]"):
        merge(base, adapter, [], tmp_path, Observer("json"))


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    base = saved_base(llama, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="no numbers"):
        merge(base, adapter, [], tmp_path, Observer("json"))
