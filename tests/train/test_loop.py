"""What reaches the model, what training changes, and that evaluation leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from jobs.data.chunks import Recipe
from jobs.data.labels import IGNORE
from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import AccessError, SpecError, VerificationError
from jobs.observe.events import Observer
from jobs.spec import Spec, Train
from jobs.train import engine_transformers, isolation, loop
from jobs.train.batches import FlatBatch, Item, PadBatch
from jobs.train.checkpoints import Checkpoints
from jobs.train.engine_transformers import load_hf_tokenizer, load_model, quantized_modules
from jobs.train.loss import evaluate
from jobs.train.rows import load_rows
from jobs.train.trainer import arguments_of
from tests.conftest import BASE, ROOT

DATA = ROOT / "examples" / "demo" / "data"


def spec(**train: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "test",
            "model": {"base": str(BASE), "max_seq_length": 256},
            "data": {"train": str(DATA / "persona.jsonl"), "eval": 0.1},
            "lora": {"rank": 4, **train.pop("lora", {})},
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, **train},
        }
    )


@pytest.fixture(scope="module")
def prepared(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_of(tmp_path_factory.mktemp("prepared"))


def prepared_of(folder: Path, limit: int | None = None) -> Path:
    tree = spec().model_dump(mode="json")
    tree["data"]["train"] = {"source": str(DATA / "persona.jsonl"), "limit": limit}
    data = Spec.model_validate(tree).data
    folder.mkdir(exist_ok=True)
    prepare(data, Recipe(TokenizerFiles(BASE), "responses", 256, "drop", 3407), folder)
    return folder


def items_of(folder: Path, side: str = "train") -> list[Item]:
    rows = load_rows(folder / f"{side}.arrow")
    assert rows is not None
    return list(rows)


def run(tokenizer: ChatTokenizer, data: Path, out: Path, **train: Any) -> dict[str, Any]:
    out.mkdir()
    checkpoints = Checkpoints(out.with_name(f"{out.name}-checkpoints"), {"what": "a test"})
    return loop.train(spec(**train), BASE, tokenizer, data, out, checkpoints, Observer("json"))


def test_the_models_forward_gets_exactly_our_labels(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)

        def note(module: Any, args: Any, inputs: dict[str, Any]) -> None:
            if module.training and "labels" in inputs:
                for ids, labels, mask in zip(
                    inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True
                ):
                    assert (labels[mask == 0] == IGNORE).all()
                    seen.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    monkeypatch.setattr(engine_transformers, "load_model", spy)
    run(tokenizer, prepared, tmp_path / "out")
    made = {tuple(item["input_ids"]): item["labels"] for item in items_of(prepared)}
    assert len(seen) == 4 + 16  # the longest rows once, to see that they fit; 4 steps of 4
    for ids, labels in seen:
        assert made[tuple(ids)] == labels


@pytest.mark.parametrize("whole", [["embed_tokens"], ["input_layernorm", "norm"]])
def test_what_is_trained_whole_goes_through_a_model_in_16_bit(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    whole: list[str],
) -> None:  # fmt: skip
    # As on a GPU: from the try whether the longest rows fit to the last evaluation.
    arguments = engine_transformers.ARGUMENTS
    monkeypatch.setattr(engine_transformers, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(
        engine_transformers, "ARGUMENTS", lambda **given: arguments(**{**given, "bf16": True})
    )
    result = run(
        tokenizer, prepared, tmp_path / "out", max_steps=8, lora={"modules_to_save": whole}
    )
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_evaluation_in_between_changes_nothing(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    # bitsandbytes' CPU kernel repacks 4-bit weights at the first evaluation: see engine.py.
    often = run(tokenizer, prepared, tmp_path / "often", eval_every=1, lora={"dropout": 0.1})
    once = run(tokenizer, prepared, tmp_path / "once", eval_every=4, lora={"dropout": 0.1})
    losses = [
        [entry["loss"] for entry in result["history"] if "loss" in entry]
        for result in (often, once)
    ]
    assert losses[0] == losses[1]
    weights = [load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("often", "once")]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_adapter_is_float32_and_only_on_linear_layers(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    result = run(tokenizer, prepared, tmp_path / "out", max_steps=1)
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 7 * 4  # A and B, seven linear layers, four blocks
    assert not any("lm_head" in name or "embed" in name for name in weights)
    assert sum(tensor.numel() for tensor in weights.values()) == result["trainable_parameters"]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE)


def test_a_loss_that_is_not_finite_stops_the_run(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match="training has diverged: at step 3"):
        run(tokenizer, prepared, tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30)


def test_a_target_that_the_model_does_not_have_is_the_specs_mistake(
    tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"lora\.target.*qq_proj"):
        run(tokenizer, prepared, tmp_path / "out", lora={"target": ["qq_proj"]})


def test_each_trained_token_counts_the_same_in_the_evaluation(
    tokenizer: ChatTokenizer, prepared: Path
) -> None:
    model = load_model(BASE, "16bit", "cpu").eval()
    items = items_of(prepared)[:5]
    collate = PadBatch(tokenizer.pad_id)
    whole = evaluate(model, [collate(items)], torch.device("cpu"))
    parts = evaluate(model, [collate(items[:1]), collate(items[1:])], torch.device("cpu"))
    batch = collate(items)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert whole[1] == parts[1] == sum(value != IGNORE for i in items for value in i["labels"])
    assert whole[0] == pytest.approx(expected.item(), rel=1e-5)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)


def test_every_linear_layer_but_the_head_is_held_in_4_bit() -> None:
    names = quantized_modules(load_model(BASE, "4bit", "cpu"))
    assert len(names) == 28
    assert names[0] == "model.layers.0.mlp.down_proj"


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    for path in BASE.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_bytes((BASE / "config.json").read_bytes())
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(AccessError, match="transformers reads the tokenizer"):
        load_hf_tokenizer(tmp_path, tokenizer)


def test_packed_training_learns_what_unpacked_training_learns(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    data = prepared_of(tmp_path / "data", limit=32)
    # All conversations in one step: packed or not, it is the same step.
    whole = {"max_steps": 2, "batch_size": len(items_of(data)), "warmup": 0}
    plain = run(tokenizer, data, tmp_path / "plain", **whole)
    packed = run(tokenizer, data, tmp_path / "packed", **whole, packing=True)
    losses = [[e["loss"] for e in r["history"] if "loss" in e] for r in (plain, packed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("warmup", [0.03, 5])
def test_a_training_of_one_step_learns(
    warmup: float, tokenizer: ChatTokenizer, prepared: Path, tmp_path: Path
) -> None:
    result = run(tokenizer, prepared, tmp_path / "out", max_steps=1, warmup=warmup)
    assert result["history"][0]["learning_rate"] == 1e-3
    trained = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in trained.items() if "lora_B" in name)


def test_the_warm_up_is_a_share_of_the_steps_that_are_made(tmp_path: Path) -> None:
    # Nine rows are two steps of eight, so ten epochs are twenty.
    made = arguments_of(Train(epochs=10, batch_size=8, warmup=0.5), tmp_path, 9, False, "cpu")
    assert made.warmup_steps == 10


def test_an_architecture_that_mixes_packed_conversations_is_refused(
    tokenizer: ChatTokenizer,
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    assert not isolation.is_isolated(model, FlatBatch())
    packing = spec(packing=True)
    with pytest.raises(SpecError, match=r"train\.packing"):
        isolation.choose_collate(model, packing, tokenizer, "cpu", Observer("json"))
    assert isolation.is_isolated(load_model(BASE, "4bit", "cpu"), FlatBatch())


def test_the_rounding_of_8_bit_is_not_taken_for_conversations_that_see_each_other() -> None:
    model = load_model(BASE, "8bit", "cpu")
    before = model.model.layers[0].mlp.up_proj.state.threshold
    assert before > 0  # inputs above it are looked for over the whole batch
    assert isolation.is_isolated(model, FlatBatch())
    assert model.model.layers[0].mlp.up_proj.state.threshold == before
