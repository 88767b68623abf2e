from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.data import pool
from jobs.data.chunks import Recipe
from jobs.data.conversation import BadRow
from jobs.data.labels import IGNORE
from jobs.data.prepare import first_conversations, prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import DataError
from jobs.spec import Data
from jobs.train.rows import lengths_of, load_rows, pack_rows
from tests.conftest import BASE

ANSWERS = [f"Answer number {i}." for i in range(100)]


def write(path: Path, answers: list[str]) -> str:
    rows = [
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": a}]}
        for a in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path: Path, source: Any, limit: int = 64, **more: Any) -> dict[str, Any]:
    """Prepare into tmp_path/out, anew each time."""
    train = source if isinstance(source, list) else [source]
    data = Data.model_validate({"train": train, **more})
    recipe = Recipe(TokenizerFiles(BASE), data.loss_on, limit, data.too_long, seed=1)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    return prepare(data, recipe, out)


def texts(tmp_path: Path, tokenizer: ChatTokenizer, side: str = "train") -> list[str]:
    rows = load_rows(tmp_path / "out" / f"{side}.arrow")
    return [] if rows is None else [tokenizer.text_of(row["input_ids"]) for row in rows]


def test_rows_and_tokens_are_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    a = write(tmp_path / "a.jsonl", ["One."])
    b = write(tmp_path / "b.jsonl", ["One.", "two " * 100])
    summary = run(tmp_path, [a, b])
    assert [(s["source"], s["rows"]) for s in summary["sources"]] == [(a, 1), (b, 2)]
    assert summary["dropped_too_long"] == 1
    assert summary["train_rows"] == 2
    assert summary["duplicates"] == 1
    assert summary["trained_tokens"] == 2 * (len(tokenizer.ids_of("One.")) + 1)
    rows = load_rows(tmp_path / "out" / "train.arrow")
    assert rows is not None
    assert summary["train_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert summary["longest"] == len(rows[0]["input_ids"])
    assert sum(bucket["rows"] for bucket in summary["lengths"]) == 2


def test_labels_come_back_from_the_disk_as_they_were_made(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    run(tmp_path, write(tmp_path / "a.jsonl", ["One.", "Two and three."]))
    rows = load_rows(tmp_path / "out" / "train.arrow")
    assert rows is not None
    for row, answer in zip(rows, ["One.", "Two and three."], strict=True):
        trained = [
            i for i, value in zip(row["input_ids"], row["labels"], strict=True) if value == i
        ]
        assert tokenizer.text_of(trained) == answer + "<|im_end|>"
        assert set(row["labels"]) - set(trained) == {IGNORE}


def two_turns(path: Path, second: str) -> str:
    turns = [("user", "Hi."), ("assistant", "One."), ("user", "More."), ("assistant", second)]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path.write_text(json.dumps(row))
    return str(path)


def test_truncate_cuts_after_the_last_whole_answer(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    summary = run(tmp_path, two_turns(tmp_path / "a.jsonl", "two " * 100), too_long="truncate")
    assert (summary["truncated"], summary["dropped_too_long"]) == (1, 0)
    (text,) = texts(tmp_path, tokenizer)
    assert text.endswith("<|im_start|>assistant\nOne.<|im_end|>")


def test_truncate_never_cuts_an_answer(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["two " * 100, "One."])
    summary = run(tmp_path, a, too_long="truncate")
    assert (summary["truncated"], summary["dropped_too_long"], summary["train_rows"]) == (0, 1, 1)


def test_truncate_cuts_after_an_answer_where_every_token_is_trained(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    source = two_turns(tmp_path / "a.jsonl", "two " * 100)
    summary = run(tmp_path, source, too_long="truncate", loss_on="all")
    assert (summary["truncated"], summary["dropped_too_long"]) == (1, 0)
    (text,) = texts(tmp_path, tokenizer)
    assert text.endswith("<|im_start|>assistant\nOne.<|im_end|>")
    assert summary["trained_tokens"] == summary["train_tokens"]


def test_truncate_cuts_a_plain_text_where_it_gets_too_long(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    (tmp_path / "notes.txt").write_text("One.\n" + "two " * 100)
    summary = run(tmp_path, str(tmp_path / "notes.txt"), too_long="truncate")
    assert (summary["truncated"], summary["dropped_too_long"]) == (1, 0)
    short, long = texts(tmp_path, tokenizer)
    assert short.startswith("One.")
    assert ("two " * 100).startswith(long)
    assert summary["longest"] == 64
    # With drop, which is the default, nothing is cut.
    assert run(tmp_path, str(tmp_path / "notes.txt"))["dropped_too_long"] == 1


def test_fail_names_the_row_that_is_too_long(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["One.", "two " * 100])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .* longer than"):
        run(tmp_path, a, too_long="fail")


def test_if_all_is_too_long_it_says_so(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["two " * 100])
    with pytest.raises(DataError, match="all 1 are longer than 16 tokens"):
        run(tmp_path, a, limit=16)


def test_where_nothing_is_left_the_reason_is_named(tmp_path: Path) -> None:
    two = write(tmp_path / "a.jsonl", ANSWERS[:2])
    for why, what_to_do, source, more in (
        ("all 2 .* held out", r"lower data\.eval, which is 0\.99", two, {"eval": 0.99}),
        ("are longer", "set data.too_long to truncate", two, {"limit": 4}),
        ("are longer", "make the data shorter", two, {"limit": 4, "too_long": "truncate"}),
        ("weights .* none of 2", "raise the weights", {"source": two, "weight": 0.2}, {}),
    ):
        with pytest.raises(DataError, match=why) as caught:
            run(tmp_path, source, **more)
        assert re.search(what_to_do, str(caught.value.hint))


def test_the_split_is_a_share_and_stays_when_rows_are_added(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    run(tmp_path, write(tmp_path / "a.jsonl", ANSWERS[:60]), eval=0.2)
    few = set(texts(tmp_path, tokenizer, "eval"))
    every = few | set(texts(tmp_path, tokenizer))
    run(tmp_path, write(tmp_path / "b.jsonl", ANSWERS), eval=0.2)
    many = set(texts(tmp_path, tokenizer, "eval"))
    assert 5 <= len(few) <= 20
    assert 10 <= len(many) <= 30
    assert few == many & every
    assert many.isdisjoint(texts(tmp_path, tokenizer))


def test_a_duplicate_is_never_on_both_sides(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = write(tmp_path / "a.jsonl", [*ANSWERS[:10], *ANSWERS[:10]])
    summary = run(tmp_path, source, eval=0.3)
    train, held_out = texts(tmp_path, tokenizer), texts(tmp_path, tokenizer, "eval")
    assert len(train) + len(held_out) == 20
    assert not set(train) & set(held_out)
    assert summary["in_train_and_eval"] == 0


def test_duplicates_between_separate_train_and_eval_sources_are_counted(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ANSWERS[:10])
    b = write(tmp_path / "b.jsonl", ANSWERS[8:12])
    assert run(tmp_path, a, eval=[b])["in_train_and_eval"] == 2


def test_a_small_set_still_gets_an_evaluation(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    summary = run(tmp_path, write(tmp_path / "a.jsonl", ANSWERS[:3]), eval=0.001)
    assert (summary["train_rows"], summary["eval_rows"]) == (2, 1)
    both = [*texts(tmp_path, tokenizer), *texts(tmp_path, tokenizer, "eval")]
    assert len(set(both)) == 3


def bad_file(path: Path, good: int, bad: int) -> str:
    write(path, ANSWERS[:good])
    lines = path.read_text().splitlines()
    lines += [json.dumps({"messages": [{"role": "user", "content": "alone"}]})] * bad
    path.write_text("\n".join(lines))
    return str(path)


def test_bad_rows_are_named_with_file_and_line_the_first_twenty(tmp_path: Path) -> None:
    source = bad_file(tmp_path / "a.jsonl", 5, 25)
    with pytest.raises(DataError) as caught:
        run(tmp_path, source)
    assert "25 rows of 30" in caught.value.message
    assert f"{source}, line 6: has no assistant turn" in caught.value.message
    assert f"{source}, line 25:" in caught.value.message
    assert f"{source}, line 26:" not in caught.value.message
    assert "and 5 more" in caught.value.message


def test_bad_rows_up_to_a_share_are_skipped_and_shown(tmp_path: Path) -> None:
    source = bad_file(tmp_path / "a.jsonl", 18, 2)
    summary = run(tmp_path, source, skip_bad_rows=0.1)
    assert (summary["train_rows"], summary["bad_rows"]) == (18, 2)
    assert summary["bad_shown"][0].startswith(f"{source}, line 19:")
    with pytest.raises(DataError, match=r"9\.0% may be"):
        run(tmp_path, source, skip_bad_rows=0.09)


@pytest.mark.parametrize("broken", [0, 3])
def test_a_line_that_is_no_json_is_one_of_the_rows_that_cannot_be_used(
    tmp_path: Path, broken: int
) -> None:
    source = write(tmp_path / "a.jsonl", ANSWERS[:9])
    lines = Path(source).read_text().splitlines()
    lines.insert(broken, lines[0][:30])  # as the first one the format is found behind it
    lines.append('{"messages": []}')
    Path(source).write_text("\n".join(lines))
    summary = run(tmp_path, source, skip_bad_rows=0.2)
    assert (summary["rows"], summary["train_rows"], summary["bad_rows"]) == (11, 9, 2)
    assert f"a.jsonl, line {broken + 1}: no valid JSON: " in summary["bad_shown"][0]
    with pytest.raises(DataError, match="2 rows of 11 cannot be used") as raised:
        run(tmp_path, source)
    assert "a.jsonl, line 11: " in raised.value.message, "the other bad rows are told too"
    data = Data.model_validate({"train": [source]})
    shown = list(first_conversations(data, 11))
    assert [isinstance(found, BadRow) for _, found in shown].count(True) == 2


def test_a_file_of_which_no_line_is_json_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[\n{"messages": []},\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no valid JSON") as raised:
        run(tmp_path, str(path), skip_bad_rows=0.9)
    assert "one array of all records is a .json file" in str(raised.value)


def test_many_rows_are_labelled_by_several_processes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [f"Answer number {i}." for i in range(3000)])

    def files() -> dict[str, bytes]:
        summary = run(tmp_path, source, eval=0.1)
        assert summary["train_rows"] + summary["eval_rows"] == 3000
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    pooled = files()
    monkeypatch.setattr(pool, "cores", lambda: 1)
    assert files() == pooled


def test_weights_repeat_and_sample_a_source(tmp_path: Path) -> None:
    a = {"source": write(tmp_path / "a.jsonl", ANSWERS[:10]), "weight": 2}
    b = {"source": write(tmp_path / "b.jsonl", ANSWERS[10:30]), "weight": 0.5}
    run(tmp_path, [a, b])
    order = np.load(tmp_path / "out" / "order.npy")
    counts = np.bincount(order, minlength=30)
    assert (counts[:10] == 2).all()
    assert counts[10:].sum() == 10
    assert counts[10:].max() == 1
    rows = load_rows(tmp_path / "out" / "train.arrow")
    assert rows is not None
    assert len(rows) == 30


def test_packed_rows_hold_each_conversation_once_and_whole(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    run(tmp_path, write(tmp_path / "a.jsonl", ANSWERS))
    rows = load_rows(tmp_path / "out" / "train.arrow")
    assert rows is not None
    packed = pack_rows(rows, 64)
    assert len(packed) < len(rows) / 2
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        at = 0
        for length in row["seq_lengths"]:
            pieces.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    assert sorted(pieces) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert lengths_of(rows).tolist() == [len(row["input_ids"]) for row in rows]


def test_the_first_conversations_of_both_sides_are_kept_to_ask_the_model_about(
    tmp_path: Path,
) -> None:
    run(tmp_path, write(tmp_path / "a.jsonl", ANSWERS), eval=0.1)
    first = json.loads((tmp_path / "out" / "first.json").read_text())
    held_out = load_rows(tmp_path / "out" / "eval.arrow")
    assert held_out is not None
    assert len(first["train"]) == 8
    assert len(first["eval"]) == min(8, len(held_out))
