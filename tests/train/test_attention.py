"""Conversations laid end to end are attended to as each is alone, in each kind of architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from jobs.data.labels import IGNORE
from jobs.train import softcap as softcapped
from jobs.train.attention import attend, attend_apart
from jobs.train.batches import FlatBatch, PadBatch
from jobs.train.loss import evaluate, in_chunks, trained_logits
from tests.train.test_isolation import made

SHAPE = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 8},
    "Phi3": {"sliding_window": 8},
    "Gemma": {},
    "Gemma2": {"sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9},
    "Gemma3Text": {"sliding_window": 8},
    "Granite": {},
    "Olmo2": {},
}


def model_of(kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **ARCHITECTURES[kind])
    name = {"Gemma3Text": "Gemma3"}.get(kind, kind)
    torch.manual_seed(0)
    if kind == "Gemma2":  # as the engine loads it
        config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # so that attention matters
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_conversation_has_the_logits_that_it_has_alone(kind: str) -> None:
    model = model_of(kind)
    items = made([23, 1, 40, 2, 17])
    alone = [model(torch.tensor([i["input_ids"]]), use_cache=False).logits[0] for i in items]
    attend_apart(model)
    batch = FlatBatch(told="boundaries")(items)
    del batch["labels"]
    flat = model(**batch, use_cache=False).logits[0].split([len(i["input_ids"]) for i in items])
    for expected, found in zip(alone, flat, strict=True):
        assert expected.std() > 0.05
        assert (found - expected).abs().max() <= 1e-4
    # Padded and generated text goes where it went before.
    padded = PadBatch(0)(items)
    logits = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    for row, expected in enumerate(alone):
        assert (logits[row, : len(expected)] - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_soft_capping_and_windows_are_not_left_out() -> None:
    # So the test above compares with what the architecture says, and not with what SDPA makes of it.
    model = model_of("Gemma2")
    ids = torch.tensor([made([40])[0]["input_ids"]])
    expected = model(ids, use_cache=False).logits
    for name, value in {"attn_logit_softcapping": 1e4, "sliding_window": 64}.items():
        other = model_of("Gemma2")
        for module in other.modules():
            if getattr(module, name, None):
                setattr(module, name, value)
            if hasattr(module, "config"):
                setattr(module.config, name, value)
        assert (other(ids, use_cache=False).logits - expected).abs().max() > 1e-2, name


def test_an_architecture_whose_layers_see_otherwise_keeps_its_own() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    model._supports_flash_attn = False
    kernel, slow = attend_apart(model)
    assert kernel == "sdpa with a mask"
    assert slow
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_a_masked_row(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # Two short ones at a time, then 70 by itself, and 150 one head of keys after the other.
    monkeypatch.setattr(softcapped, "SCORES", 4 * 2 * 64**2)
    bounds = torch.tensor([0, 5, 6, 10, 15, 85, 235], dtype=torch.int32)
    size = 235
    q, k, v = (torch.randn(size, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    place = torch.arange(size)
    which = torch.bucketize(place, bounds[1:], right=True)
    ago = place[:, None] - place[None, :]
    seen = (which[:, None] == which[None, :]) & (ago >= 0)
    if window:
        seen &= ago < window
    wide = [x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(1, 2) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ wide[2]).transpose(0, 1)
    found = attend(q, k, v, bounds, 150, scale=0.3, window=window, softcap=softcap)
    assert (found - expected).abs().max() <= 1e-5
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * weights).sum(), (q, k, v), retain_graph=True)
        for out in (expected, found)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5


def test_conversations_of_like_length_are_taken_together() -> None:
    bounds = torch.tensor([0, 64, 128, 129, 629, 2629], dtype=torch.int32)
    found = softcapped.buckets(bounds, 2 * 64**2)
    assert [(b.rows, b.length) for b in found] == [(2, 64), (1, 1), (1, 500), (1, 2000)]
    assert torch.equal(torch.cat([b.tokens for b in found]).sort().values, torch.arange(2629))
    assert softcapped.buckets(bounds, 2 * 64**2) is found  # once for all layers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite"])  # the last two change logits
def test_logits_in_chunks_are_those_of_the_whole(kind: str) -> None:
    model = model_of(kind)
    items = made([23, 1, 40, 2, 17])
    for batch in (PadBatch(0)(items), FlatBatch()(items)):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = batch["labels"][:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1][targets != IGNORE]
        targets = targets[targets != IGNORE]
        for found, tokens in (
            trained_logits(model, batch),
            [torch.cat(parts) for parts in zip(*in_chunks(model, batch, 7), strict=True)],
        ):
            assert torch.equal(tokens, targets)
            # Not to the bit: several threads share out another number of rows otherwise.
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
        first = trained_logits(model, batch, limit=5)[0]
        torch.testing.assert_close(first, logits[:5], rtol=0, atol=1e-5)
        loss, count = evaluate(model, [batch], torch.device("cpu"))
        assert count == len(targets)
        assert loss == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)
    assert "forward" not in model.base_model.__dict__  # nothing stands in for it any more
