"""With a GPU the sums are made there: the same weights as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

from jobs.export.held import STATE, Nf4
from jobs.export.merge import merge
from jobs.observe.events import Observer
from tests.export.test_merge_options import OPTIONS, saved_adapter, saved_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("form", ["16bit", "4bit"])
@pytest.mark.parametrize("load_in", ["16bit", "4bit", "8bit"])
@pytest.mark.parametrize("option", ["plain", "dora", "conv1d, dora", "bias all", "embeddings"])
def test_a_gpu_merges_as_a_cpu_does(
    option: str, load_in: Any, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = OPTIONS[option]
    base = saved_base(make, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    made = []
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        (out := tmp_path / str(gpu)).mkdir()
        merge(
            base, adapter, [] if load_in == "16bit" else None, out, Observer("json"), form, load_in
        )
        made.append(load_file(out / "model.safetensors"))
    on_gpu, on_cpu = made
    assert set(on_gpu) == set(on_cpu)
    for name, tensor in on_gpu.items():
        if "quant_state" in name or ".nested_" in name:
            continue
        if name.endswith(".absmax"):
            # Codes of 8 bits: bitsandbytes rounds otherwise on a GPU where two are near, and the small
            # ones are many and near. What they stand for is the same.
            scales, expected = (scales_of(merged, name) for merged in made)
            assert float((scales - expected).abs().max()) <= 2**-7 * float(expected.max()), name
            continue
        # A weight halfway between two 4-bit values may go to either.
        same = (tensor.float() - on_cpu[name].float()).abs() <= 2**-7 * on_cpu[name].float().abs()
        assert same.float().mean() > 0.99, name


def scales_of(merged: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The blocks' scales of a 4-bit weight, from the codes and their own scales."""
    weight = name.removesuffix(".absmax")
    codes, step = merged[name].long(), merged[f"{weight}.nested_absmax"].repeat_interleave(256)
    state = bytes(merged[f"{weight}.{STATE}"].tolist())
    offset = float(json.loads(state)["nested_offset"])
    return merged[f"{weight}.nested_quant_map"][codes] * step[: len(codes)] + offset


def test_nf4_in_pieces_is_bitsandbytes_own_on_a_gpu() -> None:
    weight = torch.randn(512, 768, device="cuda") * 0.02
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    flat, held, step = weight.reshape(-1), Nf4((512, 768), "cuda"), 64 * 50
    for start in range(0, len(flat), step):
        held.put(start, flat[start : start + step])
    held.settle()
    pieces = [held.take(at, min(len(flat), at + step)) for at in range(0, len(flat), step)]
    assert torch.equal(torch.cat(pieces), dequantize_4bit(packed, state).reshape(-1))
