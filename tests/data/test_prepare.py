from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DataError
from jobs.spec import Data


def write(path: Path, answers: list[str]) -> str:
    rows = [
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": a}]}
        for a in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(*sources: str, **more: object) -> Data:
    return Data.model_validate({"train": list(sources), **more})


ANSWERS = [f"Answer number {i}." for i in range(100)]


def test_rows_and_tokens_are_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    a = write(tmp_path / "a.jsonl", ["One."])
    b = write(tmp_path / "b.jsonl", ["One.", "two " * 100])
    prepared = prepare(data(a, b), tokenizer, 64, seed=1)
    summary = prepared.summary()
    assert summary["rows_by_source"] == {a: 1, b: 2}
    assert summary["dropped_too_long"] == 1
    assert summary["train_rows"] == 2
    one = len(tokenizer.ids_of("One.")) + 1
    assert summary["trained_tokens"] == 2 * one
    assert summary["longest"] == len(prepared.train[0].labelled.input_ids)


def test_nothing_is_cut_short(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write(tmp_path / "a.jsonl", ["One.", "two " * 100])
    for example in prepare(data(source), tokenizer, 64, seed=1).train:
        assert example.labelled.labels[example.labelled.turns[-1].end - 1] in tokenizer.stop_ids


def test_if_all_is_too_long_it_says_so(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write(tmp_path / "a.jsonl", ["two " * 100])
    with pytest.raises(DataError, match="all 1 are longer than 16 tokens"):
        prepare(data(source), tokenizer, 16, seed=1)


def test_the_split_is_a_share_and_stays_when_rows_are_added(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    few = prepare(data(write(tmp_path / "a.jsonl", ANSWERS[:60]), eval=0.2), tokenizer, 64, seed=1)
    many = prepare(data(write(tmp_path / "b.jsonl", ANSWERS), eval=0.2), tokenizer, 64, seed=1)
    assert 5 <= len(few.eval) <= 20
    assert 10 <= len(many.eval) <= 30

    def texts(examples: list) -> set[str]:  # type: ignore[type-arg]
        return {example.messages[-1]["content"] for example in examples}

    assert texts(few.eval) == texts(many.eval) & set(ANSWERS[:60])
    assert texts(many.train).isdisjoint(texts(many.eval))


def test_a_duplicate_is_never_on_both_sides(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write(tmp_path / "a.jsonl", [*ANSWERS[:10], *ANSWERS[:10]])
    prepared = prepare(data(source, eval=0.3), tokenizer, 64, seed=1)
    assert len(prepared.train) + len(prepared.eval) == 20
    assert not {e.labelled.text for e in prepared.train} & {e.labelled.text for e in prepared.eval}


def test_a_small_set_still_gets_an_evaluation(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write(tmp_path / "a.jsonl", ANSWERS[:3])
    prepared = prepare(data(source, eval=0.001), tokenizer, 64, seed=1)
    assert (len(prepared.train), len(prepared.eval)) == (2, 1)


def test_bad_rows_are_all_named_with_file_and_line(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    source = write(tmp_path / "a.jsonl", ANSWERS[:30])
    lines = Path(source).read_text().splitlines()
    for number in range(1, 26):
        lines[number] = json.dumps({"messages": [{"role": "user", "content": "alone"}]})
    Path(source).write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        prepare(data(source), tokenizer, 64, seed=1)
    assert "25 rows of 30" in caught.value.message
    assert f"{source}, line 2: has no assistant turn" in caught.value.message
    assert f"{source}, line 21:" in caught.value.message
    assert f"{source}, line 22:" not in caught.value.message
    assert "and 5 more" in caught.value.message
