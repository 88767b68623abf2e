"""A merge that is not what base and adapter stand for is found, whatever the adapter's kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from jobs.export.merge import merge
from jobs.export.merged_check import merged_failures
from jobs.observe.events import Observer
from jobs.train.engine_transformers import LoadIn, load_model
from tests.export.test_merge_options import OPTIONS, llama, saved_adapter, saved_base

WEIGHTS = "adapter_model.safetensors"


class Made:
    """A base, an adapter and how it was trained; merged and checked as often as one likes."""

    def __init__(self, option: str, load_in: LoadIn, folder: Path, **more: Any) -> None:
        make, options = OPTIONS[option]
        self.folder, self.load_in = folder, load_in
        self.base = saved_base(make, folder / "base")
        self.adapter = saved_adapter(self.base, folder / "adapter", **options, **more)

    def found(
        self, adapter: Path | None = None, form: Any = "16bit", dequantized: bool = True,
        merged_as: bool | None = None,
    ) -> list[str]:  # fmt: skip
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        dequantized = dequantized and self.load_in != "16bit"
        into = dequantized if merged_as is None else merged_as
        merge(
            self.base, adapter or self.adapter, None if into else [], out, Observer("json"), form,
            self.load_in,
        )  # fmt: skip
        model = load_model(self.base, self.load_in, "cpu")
        tuned = PeftModel.from_pretrained(model, str(self.adapter))
        return merged_failures(tuned, self.base, out, dequantized)

    def changed(self, name: str, **config: Any) -> Path:
        """A copy of the adapter, to be spoilt."""
        copy = self.folder / name
        shutil.copytree(self.adapter, copy)
        before = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**before, **config}))
        return copy


def edit(adapter: Path, part: str, change: Any) -> Path:
    """Change the tensors whose names have this in them; those that become None are left out."""
    weights = load_file(adapter / WEIGHTS)
    assert any(part in name for name in weights)
    new = {name: change(t) if part in name else t for name, t in weights.items()}
    save_file({n: t for n, t in new.items() if t is not None}, adapter / WEIGHTS)
    return adapter


@pytest.mark.parametrize("load_in", ["16bit", "4bit", "8bit"])
@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("bias all, few layers",)])
def test_a_right_merge_passes(option: str, load_in: LoadIn, tmp_path: Path) -> None:
    made = Made(option, load_in, tmp_path)
    assert made.found() == []
    assert made.found(dequantized=False) == []


@pytest.mark.parametrize("option", ["plain", "dora", "conv1d", "conv1d, dora", "bias all"])
def test_a_right_merge_to_4_bit_passes(option: str, tmp_path: Path) -> None:
    assert Made(option, "4bit", tmp_path).found(form="4bit", dequantized=False) == []


@pytest.mark.parametrize("load_in", ["16bit", "4bit"])
@pytest.mark.parametrize("option", ["plain", "dora", "rslora", "conv1d, dora"])
def test_wrong_scaling_is_found_in_every_layer(
    option: str, load_in: LoadIn, tmp_path: Path
) -> None:
    made = Made(option, load_in, tmp_path)
    layers = sum("lora_A" in name for name in load_file(made.adapter / WEIGHTS))
    wrong = made.changed("wrong", lora_alpha=25)
    assert len(made.found(wrong)) == layers
    none = edit(made.changed("none"), "lora_B", torch.zeros_like)
    if not OPTIONS[option][1].get("use_dora"):
        assert sum("has 0.00 times" in text for text in made.found(none)) == layers


def test_wrong_scaling_is_found_in_4_bit_results(tmp_path: Path) -> None:
    made = Made("plain", "4bit", tmp_path)
    wrong = made.changed("wrong", lora_alpha=40)
    assert len(made.found(wrong, form="4bit", dequantized=False)) == 14


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("dora", "lora_magnitude_vector"),
        ("whole modules", "embed_tokens"),
        ("whole modules", "lm_head"),
        ("whole modules, tied", "embed_tokens"),
        ("bias all", "q_proj.base_layer.bias"),
        ("bias lora_only", "v_proj.base_layer.bias"),
    ],
)
def test_what_was_left_out_is_found(option: str, part: str, tmp_path: Path) -> None:
    made = Made(option, "4bit", tmp_path)
    found = made.found(edit(made.changed("without"), part, lambda tensor: None))
    assert found
    if option != "dora":
        assert all(part.split(".")[0] in text or "lm_head" in text for text in found)


def test_a_changed_norm_is_found(tmp_path: Path) -> None:
    made = Made("whole modules", "16bit", tmp_path)
    wrong = edit(made.changed("wrong"), "model.norm.weight", lambda t: t * 1.02)
    assert ["model.norm.weight" in text for text in made.found(wrong)] == [True]


def test_an_adapter_of_another_base_is_found(tmp_path: Path) -> None:
    made = Made("plain", "4bit", tmp_path)
    other = tmp_path / "other"
    shutil.copytree(made.base, other)
    tensors = load_file(other / "model.safetensors")
    torch.manual_seed(9)
    save_file({n: torch.randn_like(t) * 0.2 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    right, made.base = made.base, other
    made.found()  # merged into the other
    tuned = PeftModel.from_pretrained(load_model(right, "4bit", "cpu"), str(made.adapter))
    assert len(merged_failures(tuned, right, tmp_path / "out", True)) > 7


def test_the_wrong_base_for_loftq_is_found_nowhere_but_in_the_kind_of_base(tmp_path: Path) -> None:
    """Merged into the original weights, where the dequantized ones were meant, no layer has less of
    the update, but what is not an adapter's is not as it was held."""
    made = Made("bias all, few layers", "4bit", tmp_path)
    found = made.found(merged_as=False)
    assert any("mlp.down_proj.weight is not what base and adapter have there" in t for t in found)


def test_an_update_below_half_a_step_of_16_bit_is_no_fault(tmp_path: Path) -> None:
    """Merged into bfloat16 weights a tiny update is rounded away, and peft would lose it as well."""
    made = Made("plain", "16bit", tmp_path)
    edit(made.adapter, "lora_B", lambda tensor: tensor * 1e-3)
    assert made.found() == []


def test_llama_without_an_adapters_layers_is_left_alone(tmp_path: Path) -> None:
    base = saved_base(llama, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    (out := tmp_path / "out").mkdir()
    merge(base, adapter, None, out, Observer("json"))
    tuned = PeftModel.from_pretrained(load_model(base, "4bit", "cpu"), str(adapter))
    assert merged_failures(tuned, base, out, True) == []
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert len(merged_failures(tuned, base, out, True)) == 1
