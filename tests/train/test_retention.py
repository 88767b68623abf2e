"""What the model keeps of what it could: measured exactly, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from jobs import stop
from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import DoesNotFitError
from jobs.spec import Spec
from jobs.train import loss, retention
from jobs.train.engine_transformers import load_model
from tests.conftest import BASE, ROOT
from tests.train.test_resume import fresh_signals, go, spec, stop_at  # noqa: F401

CHATS = str(ROOT / "examples" / "demo" / "data" / "retention.jsonl")  # which the base knows
TEXTS = ["The capital of France is Paris.", "A dog barks, and a duck quacks.", "Boil water."]


def wanted_of(source: str, limit: float = 0.1, **train: Any) -> Spec:
    wanted = spec(**{"dropout": 0.1, "eval_every": 2, "max_steps": 5, **train})
    data = wanted.data.model_dump() | {
        "retention": [source, {"source": CHATS, "limit": 4}],
        "retention_limit": limit,
    }
    return Spec.model_validate({**wanted.model_dump(), "data": data})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def prepared(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(TokenizerFiles(BASE), "responses", 128, "drop", 3407)
    prepare(wanted_of(source).data, recipe, folder)
    return folder


def loss_on_texts(model: Any, tokenizer: ChatTokenizer) -> tuple[float, int]:
    """The mean over all tokens of the texts, by the shortest way there is."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer.backend.encode(text).ids, tokenizer.eos_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
        total += cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


def events(printed: str, name: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, printed.splitlines()) if e["event"] == name]


def test_each_sources_loss_is_measured_before_in_between_and_after(
    tokenizer: ChatTokenizer,
    source: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retention, "CHEAP", 1.0)
    result, _ = go(tokenizer, prepared, tmp_path, wanted_of(source, limit=1e-6))
    printed = capsys.readouterr().out
    texts, chats = result["retention"]
    model = load_model(BASE, "4bit", "cpu").eval()
    before, count = loss_on_texts(model, tokenizer)
    after, _ = loss_on_texts(
        PeftModel.from_pretrained(model, tmp_path / "out" / "adapter"), tokenizer
    )
    assert (texts["source"], chats["source"]) == (source, CHATS)
    assert texts["before"] == pytest.approx(before, abs=2e-5)
    assert texts["after"] == pytest.approx(after, abs=2e-5)
    assert texts["before"] != texts["after"]
    assert texts["tokens"] == count + len(TEXTS)
    told = [e for e in events(printed, "retention") if e["source"] == source]
    assert [e["step"] for e in told] == [0, 2, 4, 5]
    assert {e["before"] for e in told} == {texts["before"]}
    assert (told[0]["loss"], told[-1]["loss"]) == (texts["before"], texts["after"])
    worse = [each for each in (texts, chats) if each["after"] > each["before"] + 1e-6]
    warnings = [e["text"] for e in events(printed, "warning")]
    assert len(warnings) == len(worse)
    for text, each in zip(warnings, worse, strict=True):
        assert each["source"] in text
        assert f"{each['before']:.3f} and is {each['after']:.3f}" in text


def test_a_loss_that_rises_is_warned_of_above_the_limit(
    tokenizer: ChatTokenizer,
    source: str,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hot: dict[str, Any] = {"learning_rate": 0.02, "eval_every": None, "warmup": 0}
    result, _ = go(tokenizer, prepared, tmp_path / "a", wanted_of(source, **hot))
    rise = result["retention"][1]["after"] - result["retention"][1]["before"]
    assert rise > 0.1
    (text,) = [e["text"] for e in events(capsys.readouterr().out, "warning") if CHATS in e["text"]]
    assert "data.retention_limit is 0.1; set data.replay" in text
    go(tokenizer, prepared, tmp_path / "b", wanted_of(source, limit=rise + 0.01, **hot))
    texts = [e["text"] for e in events(capsys.readouterr().out, "warning")]
    assert not [text for text in texts if CHATS in text]


def test_a_resume_reports_the_same(
    tokenizer: ChatTokenizer,
    source: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "CHEAP", 1.0)
    wanted = wanted_of(source)
    whole, expected = go(tokenizer, prepared, tmp_path / "whole", wanted)
    with monkeypatch.context() as patch:
        stop_at(patch, "on_step_end", 3)
        with pytest.raises(stop.Stop):
            go(tokenizer, prepared, tmp_path / "a", wanted)
    monkeypatch.setattr(stop, "_state", stop._State())
    result, digest = go(tokenizer, prepared, tmp_path / "a", wanted)
    assert digest == expected
    assert result["retention"] == whole["retention"]
    kept = [(e["step"], e["retention"]) for e in whole["history"] if "retention" in e]
    assert [step for step, _ in kept] == [2, 4, 5]
    assert [(e["step"], e["retention"]) for e in result["history"] if "retention" in e] == kept


def refuse_above(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """A device on which more tokens at a time do not fit in an evaluation."""
    refused: list[int] = []
    real = loss.in_chunks

    def in_chunks(model: Any, batch: dict[str, Any], *args: Any) -> Any:
        at_once = batch["input_ids"].numel()
        if at_once > tokens:
            refused.append(at_once)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch, *args)

    monkeypatch.setattr(loss, "in_chunks", in_chunks)
    return refused


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_smaller_parts(
    tokenizer: ChatTokenizer,
    source: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = wanted_of(source, dropout=0.0)
    whole, _ = go(tokenizer, prepared, tmp_path / "whole", wanted)
    refused = refuse_above(monkeypatch, 150)
    result, _ = go(tokenizer, prepared, tmp_path / "small", wanted)
    assert refused
    assert result["plan"]["tokens"] < whole["plan"]["tokens"]
    assert result["eval_loss_before"] == pytest.approx(whole["eval_loss_before"], abs=2e-5)
    assert result["eval_loss"] == pytest.approx(whole["eval_loss"], abs=2e-4)
    assert result["steps"] == whole["steps"]
    refuse_above(monkeypatch, 0)
    with pytest.raises(DoesNotFitError, match=r"memory runs out evaluating with \d+ tokens"):
        go(tokenizer, prepared, tmp_path / "none", wanted)
