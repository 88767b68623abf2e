"""Each of the spec's LoRA options does what it says, and is in what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from jobs.base_model import weight_files
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import SpecError
from jobs.spec import Spec
from jobs.train.engine_transformers import add_lora, load_model
from tests.conftest import BASE
from tests.train.test_loop import prepared, run  # noqa: F401


def spec(load_in: str = "4bit", **lora: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "t",
            "model": {"base": str(BASE), "load_in": load_in},
            "data": {"train": "x.jsonl"},
            "lora": {"rank": 8, "alpha": 16, **lora},
        }
    )


def test_loftq_brings_the_quantized_base_nearer_to_the_weights_as_they_were() -> None:
    wanted = spec(loftq=True, rslora=True)
    model = add_lora(load_model(BASE, "4bit", "cpu"), wanted, BASE)
    weights = {k: v for path in weight_files(BASE) for k, v in load_file(path).items()}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == 28
    for name, layer in layers.items():
        weight = weights[f"{name.removeprefix('base_model.model.')}.weight"].float()
        held = layer.get_base_layer().weight
        quantized = dequantize_4bit(held.data, held.quant_state).reshape(weight.shape)
        before = (weight - quantized).norm()
        after = (weight - quantized - layer.get_delta_weight("default")).norm()
        assert after < 0.99 * before, name
        # The best that a matrix of this rank can do, by Eckart, Young and Mirsky.
        best = torch.linalg.svdvals(weight - quantized)[8:].norm()
        assert after.item() == pytest.approx(best.item(), rel=0.01)
    again = add_lora(load_model(BASE, "4bit", "cpu"), wanted, BASE)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_target_that_the_model_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(
        SpecError, match=r"lora\.target: the base model has no module v_prj"
    ) as caught:
        add_lora(load_model(BASE, "16bit", "cpu"), spec("16bit", target=["q_proj", "v_prj"]), BASE)
    assert "did you mean v_proj? it has down_proj, gate_proj, k_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"rslora": True}, {"use_rslora": True}),
        ({"dora": True}, {"use_dora": True}),
        ({"bias": "all"}, {"bias": "all"}),
        (
            {"modules_to_save": ["embed_tokens", "norm"]},
            {"modules_to_save": ["embed_tokens", "norm"]},
        ),
    ],
)
def test_options_are_trained_and_saved(
    options: dict[str, Any], saved: dict[str, Any], tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:  # fmt: skip
    result = run(tokenizer, prepared, tmp_path / "out", lora=options, max_steps=2)
    folder = tmp_path / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, value in saved.items():
        assert set(value) <= set(config[name]) if isinstance(value, list) else config[name] == value
    weights = load_file(folder / "adapter_model.safetensors")
    names = " ".join(weights)
    assert ("lora_magnitude_vector" in names) == bool(options.get("dora"))
    assert ("embed_tokens" in names) == bool(options.get("modules_to_save"))
    if options.get("modules_to_save"):
        trained = next(v for k, v in weights.items() if "embed_tokens" in k)
        before = load_file(weight_files(BASE)[0])["model.embed_tokens.weight"]
        assert not torch.equal(trained.float(), before.float())
    assert result["steps"] == 2


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = add_lora(load_model(BASE, "16bit", "cpu"), spec("16bit", rslora=True), BASE)
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    assert layer.scaling["default"] == pytest.approx(16 / 8**0.5)


def test_8_bit_loading_holds_bytes_and_trains(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:  # fmt: skip
    model = load_model(BASE, "8bit", "cpu")
    held = model.model.layers[0].mlp.down_proj.weight
    assert held.dtype == torch.int8


def test_a_module_that_is_not_there_is_the_specs_mistake() -> None:
    with pytest.raises(SpecError, match=r"lora\.modules_to_save"):
        add_lora(load_model(BASE, "16bit", "cpu"), spec("16bit", modules_to_save=["nothing"]), BASE)


def test_dora_trains_on_an_8_bit_base() -> None:
    model = add_lora(load_model(BASE, "8bit", "cpu"), spec("8bit", dora=True), BASE)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for _ in range(3)]  # the second one had no scales
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    model(input_ids=ids, labels=ids).loss.backward()
    magnitudes = [p.grad for n, p in model.named_parameters() if "magnitude" in n]
    assert len(magnitudes) == 28
    assert all(grad is not None and grad.any() for grad in magnitudes)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_loftq_knows_the_layers_of_gpt2(prefix: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96)).save_pretrained(
        tmp_path
    )
    path = tmp_path / "model.safetensors"
    weights = {k.replace("transformer.", prefix): v for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})  # the Hub's gpt2 has no prefix
    model = add_lora(load_model(tmp_path, "4bit", "cpu"), spec(loftq=True), tmp_path)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == 4
    for name, layer in layers.items():
        key = f"{name.removeprefix('base_model.model.transformer.')}.weight"
        weight = weights[prefix + key].T
        held = layer.get_base_layer().weight
        lost = weight - dequantize_4bit(held.data, held.quant_state).reshape(weight.shape)
        assert (lost - layer.get_delta_weight("default")).norm() < 0.95 * lost.norm(), name


def test_lora_on_the_output_head_is_refused_with_what_to_do() -> None:
    with pytest.raises(SpecError, match=r"lora\.target: the output head") as caught:
        add_lora(load_model(BASE, "16bit", "cpu"), spec(target=["q_proj", "lm_head"]), BASE)
    assert "lora.modules_to_save" in str(caught.value.hint)
    saved = spec(target=["q_proj"], modules_to_save=["lm_head"])
    assert add_lora(load_model(BASE, "16bit", "cpu"), saved, BASE) is not None
