"""A base that is held unpacked says what it said in 4 bit, and LoRA goes on it as before."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit

from jobs.train.engine_transformers import add_lora, load_model, quantized_modules
from jobs.train.unpack import unpack
from tests.conftest import BASE
from tests.train.test_lora import spec


@torch.no_grad()
def test_unpacked_weights_are_the_same_numbers() -> None:
    packed, unpacked = (load_model(BASE, "4bit", "cpu").eval() for _ in "ab")
    names = quantized_modules(packed)
    assert unpack(unpacked) == len(names) == 28
    assert not any(isinstance(module, Linear4bit) for module in unpacked.modules())
    ids = torch.arange(3, 203)[None]
    expected, found = (model(ids).logits for model in (packed, unpacked))
    assert (found - expected).abs().max() <= 1e-4
    whole = load_model(BASE, "16bit", "cpu").eval()
    assert (whole(ids).logits - expected).abs().max() > 0.01  # so that the test can fail
    assert not any(weight.requires_grad for weight in unpacked.model.layers[0].mlp.parameters())


def test_the_gradients_of_lora_are_the_same() -> None:
    found = []
    ids = torch.arange(3, 103)[None]
    for hold in (False, True):
        torch.manual_seed(0)
        base = load_model(BASE, "4bit", "cpu")
        if hold:
            unpack(base)
        torch.manual_seed(0)
        model = add_lora(base, spec(), BASE)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 56
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * (1 + gradient.abs().max()), name
