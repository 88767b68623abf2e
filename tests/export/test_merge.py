"""The merged weights are what peft would merge, and a wrong merge does not go through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from jobs.base_model import weight_files
from jobs.errors import VerificationError
from jobs.export.merge import Updates, merge, through_nf4
from jobs.observe.events import Observer
from jobs.train.engine_transformers import load_model, quantized_modules
from tests.conftest import BASE


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights on every linear layer; alpha is not the rank."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        load_model(BASE, "16bit", "cpu"),
        LoraConfig(r=8, lora_alpha=20, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_16_bit_merge_is_pefts_own_rounded_once(adapter: Path, tmp_path: Path) -> None:
    merge(BASE, adapter, [], tmp_path, Observer("json"))
    theirs = PeftModel.from_pretrained(load_model(BASE, "16bit", "cpu"), str(adapter))
    expected = theirs.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(load_file(BASE / "model.safetensors"))
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_4_bit_merge_starts_from_what_the_adapter_was_trained_on(
    adapter: Path, tmp_path: Path
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized = load_model(BASE, "4bit", "cpu")
    names = quantized_modules(quantized)
    merge(BASE, adapter, names, tmp_path, Observer("json"))
    ours = load_file(tmp_path / "model.safetensors")
    updates = Updates(adapter)
    for name in names:
        weight = quantized.get_submodule(name).weight
        held = dequantize_4bit(weight.data, weight.quant_state).reshape(
            ours[f"{name}.weight"].shape
        )
        expected = (held.float() + updates.delta(f"{name}.weight")).to(torch.bfloat16)
        assert torch.equal(ours[f"{name}.weight"], expected), name


def test_what_has_no_adapter_and_no_4_bit_stays_as_it_was(adapter: Path, tmp_path: Path) -> None:
    merge(BASE, adapter, [], tmp_path, Observer("json"))
    ours, base = load_file(tmp_path / "model.safetensors"), load_file(BASE / "model.safetensors")
    untouched = set(base) - set(Updates(adapter).tensors)
    assert "model.embed_tokens.weight" in untouched
    assert all(torch.equal(ours[name], base[name]) for name in untouched)


def test_nf4_keeps_what_is_representable() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    once = through_nf4(weight)
    assert 0 < (once - weight).abs().max() < weight.abs().max()
    assert torch.allclose(through_nf4(once), once, atol=0.05)


def test_sharded_bases_are_merged_shard_by_shard(adapter: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    tensors = load_file(BASE / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, base / shard)
    index = {"metadata": {}, "weight_map": {n: s for s, own in shards.items() for n in own}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_bytes((BASE / "config.json").read_bytes())
    merge(base, adapter, [], out, Observer("json"))
    merge(BASE, adapter, [], tmp_path, Observer("json"))
    whole = load_file(tmp_path / "model.safetensors")
    sharded = {k: v for path in weight_files(out) for k, v in load_file(path).items()}
    assert set(sharded) == set(whole)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    foreign = {name.replace("layers.0.", "layers.40."): t for name, t in weights.items()}
    other = tmp_path / "adapter"
    other.mkdir()
    save_file(foreign, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(VerificationError, match=r"layers\.40"):
        merge(BASE, other, [], tmp_path, Observer("json"))
