"""What is held for measuring what the model keeps, and what of the base's own data is mixed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.data.labels import IGNORE
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DataError
from jobs.pipeline.data import data_warnings
from jobs.spec import Spec
from jobs.train.rows import lengths_of, load_epoch, load_rows, pack_rows
from tests.data.test_prepare import ANSWERS, run, texts, write


def write_texts(path: Path, lines: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def epoch(tmp_path: Path, tokenizer: ChatTokenizer) -> list[str]:
    return [tokenizer.text_of(row["input_ids"]) for row in load_epoch(tmp_path / "out")]


def spec_of(data: dict[str, Any]) -> Spec:
    return Spec.model_validate({"name": "t", "model": {"base": "b"}, "data": data})


def test_of_a_retained_text_every_token_counts_and_of_a_long_one_its_beginning(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS[:5])
    long = "the old boat is at the dock " * 20
    books = write_texts(tmp_path / "books.jsonl", ["A short text.", long])
    chats = write(tmp_path / "chats.jsonl", ANSWERS[5:8])
    summary = run(tmp_path, train, retention=[books, chats])
    rows = load_rows(tmp_path / "out" / "retention.arrow")
    assert rows is not None
    short, cut, *talks = [(row["input_ids"], row["labels"]) for row in rows]
    assert (
        short[0] == short[1] == [*tokenizer.backend.encode("A short text.").ids, tokenizer.eos_id]
    )
    assert cut[0] == cut[1] == tokenizer.backend.encode(long).ids[:64]
    trained = [tokenizer.text_of([i for i in labels if i != IGNORE]) for _, labels in talks]
    assert trained == [f"{answer}<|im_end|>" for answer in ANSWERS[5:8]]
    assert json.loads((tmp_path / "out" / "retention.json").read_text()) == summary["retention"]
    assert [(s["source"], s["rows"]) for s in summary["retention"]] == [(books, 2), (chats, 3)]
    assert summary["retention"][0]["measured_tokens"] == len(short[0]) + 64
    assert summary["longest"] == 64
    assert summary["train_rows"] == summary["rows"] == 5
    assert [s["side"] for s in summary["sources"]] == ["train", "retention", "retention"]
    assert len(epoch(tmp_path, tokenizer)) == 5  # never trained


def test_a_share_of_the_trained_tokens_is_replayed_and_the_rest_is_as_without(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    train = {"source": write(tmp_path / "a.jsonl", ANSWERS[:50]), "weight": 2}
    own = [f"Text number {i} of what was there before." for i in range(100)]
    replay = {"sources": write_texts(tmp_path / "b.jsonl", own), "share": 0.3}
    run(tmp_path, [train], eval=0.1)
    alone = epoch(tmp_path, tokenizer)
    summary = run(tmp_path, [train], eval=0.1, replay=replay)
    both = epoch(tmp_path, tokenizer)
    drawn = both[len(alone) :]
    assert both[: len(alone)] == alone
    assert {text.removesuffix("<|im_end|>") for text in drawn} <= set(own)
    assert len(set(drawn)) == len(drawn) == summary["replay"]["rows"]
    rows = list(load_epoch(tmp_path / "out"))
    counts = [sum(label != IGNORE for label in row["labels"]) for row in rows]
    assert sum(counts[len(alone) :]) == summary["replay"]["trained_tokens"]
    share = sum(counts[len(alone) :]) / sum(counts)
    assert summary["replay"]["share"] == pytest.approx(share, abs=1e-4)
    assert share == pytest.approx(0.3, abs=0.01)
    assert lengths_of(load_epoch(tmp_path / "out")).tolist() == [len(r["input_ids"]) for r in rows]
    assert sum(len(r["input_ids"]) for r in pack_rows(load_epoch(tmp_path / "out"), 64)) == sum(
        len(r["input_ids"]) for r in rows
    )
    assert data_warnings(summary, spec_of({"train": [train], "replay": replay})) == []


def test_the_draw_depends_on_nothing_but_seed_and_conversation(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS[:10])
    own = [f"Text number {i} of what was there before." for i in range(60)]

    def drawn(lines: list[str], share: float) -> set[str]:
        source = write_texts(tmp_path / "b.jsonl", lines)
        run(tmp_path, train, replay={"sources": source, "share": share})
        return set(epoch(tmp_path, tokenizer)[10:])

    few = drawn(own, 0.2)
    assert drawn(own[::-1], 0.2) == few
    assert drawn([*own, *own], 0.2) == few  # a duplicate is drawn once
    assert few < drawn(own, 0.6)


def test_what_is_measured_with_is_never_replayed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS[:40])
    everything = write(tmp_path / "b.jsonl", ANSWERS)
    summary = run(
        tmp_path,
        train,
        eval=0.2,
        retention={"source": everything, "limit": 60},
        replay={"sources": everything, "share": 0.9},
    )
    replayed = set(epoch(tmp_path, tokenizer)[summary["train_rows"] :])
    held = {*texts(tmp_path, tokenizer, "retention"), *texts(tmp_path, tokenizer, "eval")}
    assert len(replayed) == 40
    assert not replayed & held
    assert summary["replay"]["held_out"] == 60
    warnings = data_warnings(
        summary, spec_of({"train": train, "replay": {"sources": everything, "share": 0.9}})
    )
    assert (
        f"{summary['train_rows']} conversations of data.retention are in data.train" in warnings[0]
    )
    assert "all that can be drawn are 40 conversations" in warnings[1]
    assert len(warnings) == 2
    with pytest.raises(DataError, match="all of it is held out"):
        run(tmp_path, train, retention=everything, replay={"sources": everything})


def test_a_source_of_greater_weight_is_drawn_more_often(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS)
    b, c = (
        write_texts(tmp_path / f"{name}.jsonl", [f"{name} text number {i}." for i in range(400)])
        for name in ("Boat", "Crane")
    )
    sources = [{"source": b, "weight": 4.0}, c]
    run(tmp_path, train, replay={"sources": sources, "share": 0.5})
    drawn = epoch(tmp_path, tokenizer)[100:]
    boats = np.mean([text.startswith("Boat") for text in drawn])
    assert 0.7 < boats < 0.9


def test_what_is_left_out_of_either_is_told(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS[:5])
    sides: dict[str, Any] = {
        "retention": write(tmp_path / "b.jsonl", [*ANSWERS[5:8], "two " * 100]),
        "replay": {"sources": write(tmp_path / "c.jsonl", [*ANSWERS[8:12], *["two " * 100] * 2])},
    }
    summary = run(tmp_path, train, **sides)
    assert data_warnings(summary, spec_of({"train": train, **sides})) == [
        "1 conversations of data.retention are too long or cannot be used, and are left out",
        "2 conversations of data.replay are too long or cannot be used, and are left out",
    ]
    assert summary["dropped_too_long"] == 0


def test_a_source_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ANSWERS[:5])
    long = write(tmp_path / "long.jsonl", ["two " * 100])
    for side in ({"retention": [train, long]}, {"replay": {"sources": long}}):
        with pytest.raises(DataError, match=r"no row of .*long\.jsonl can be used: 1 are too long"):
            run(tmp_path, train, **side)
