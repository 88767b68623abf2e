"""Sources -> labelled examples, split into train and eval, with the counts that people ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.data.formats import BadRow, Message, detect_format, to_messages
from jobs.data.labels import Labelled, label
from jobs.data.read import read_rows
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DataError, bullet_list
from jobs.spec import Data, Source

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Example:
    messages: list[Message]
    labelled: Labelled

    @property
    def trained(self) -> int:
        return sum(turn.end - turn.start for turn in self.labelled.turns)


@dataclass
class Counts:
    rows: int = 0
    too_long: int = 0
    rows_by_source: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    train: list[Example]
    eval: list[Example]
    counts: Counts

    def summary(self) -> dict[str, Any]:
        """What `check` prints and the manifest keeps: rows, tokens and trained tokens."""
        tokens = sum(len(example.labelled.input_ids) for example in self.train)
        trained = sum(example.trained for example in self.train)
        return {
            "rows": self.counts.rows,
            "rows_by_source": self.counts.rows_by_source,
            "formats": self.counts.formats,
            "dropped_too_long": self.counts.too_long,
            "train_rows": len(self.train),
            "eval_rows": len(self.eval),
            "train_tokens": tokens,
            "trained_tokens": trained,
            "trained_share": round(trained / tokens, 4),
            "longest": max(len(e.labelled.input_ids) for e in [*self.train, *self.eval]),
        }


def prepare(
    data: Data,
    tokenizer: ChatTokenizer,
    max_seq_length: int,
    seed: int,
    advance: Advance = lambda rows: None,
) -> Prepared:
    """Read, label and split everything. Raises DataError naming each row that cannot be used."""
    counts = Counts()
    train = _examples(data.train, data.loss_on, tokenizer, max_seq_length, counts, advance)
    held_out: list[Example] = []
    if isinstance(data.eval, list):
        held_out = _examples(data.eval, data.loss_on, tokenizer, max_seq_length, counts, advance)
    elif data.eval > 0:
        train, held_out = _split(train, data.eval, seed)
    if not train:
        dropped = (
            f": all {counts.too_long} are longer than {max_seq_length} tokens"
            if counts.too_long
            else ""
        )
        raise DataError(f"nothing is left to train on{dropped}", "raise model.max_seq_length")
    return Prepared(train, held_out, counts)


def _examples(
    sources: list[Source],
    loss_on: str,
    tokenizer: ChatTokenizer,
    max_seq_length: int,
    counts: Counts,
    advance: Advance,
) -> list[Example]:
    examples: list[Example] = []
    bad: list[str] = []
    reasons: set[str] = set()
    for source in sources:
        record_format = source.format
        for row in read_rows(source.source):
            counts.rows += 1
            counts.rows_by_source[source.source] = counts.rows_by_source.get(source.source, 0) + 1
            try:
                if record_format == "auto":
                    record_format = detect_format(row.value)  # type: ignore[assignment]
                messages = to_messages(row.value, record_format)
                labelled = label(tokenizer, messages, loss_on)
            except BadRow as reason:
                bad.append(f"{row.place}: {reason}")
                reasons.add(str(reason))
            else:
                if len(labelled.input_ids) > max_seq_length:
                    # Never truncated: a row cut short would lose its end-of-turn token.
                    counts.too_long += 1
                else:
                    examples.append(Example(messages, labelled))
            advance(1)
        counts.formats[source.source] = record_format
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        if len(bad) == counts.rows and len(reasons) == 1:  # the template's fault, not the rows'
            bad = [f"all of them: {reasons.pop()}"]
        raise DataError(
            f"{rows} of {counts.rows} cannot be used:\n{bullet_list(bad)}", "mend or remove them"
        )
    return examples


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out a share by each conversation's own hash.

    So a conversation stays on its side when others are added, and a duplicate is never on both.
    """
    places = [_place(example.messages, seed) for example in examples]
    held = {place for place in places if place < share}
    if not held and len(set(places)) > 1:
        held = {min(places)}  # a small set whose hashes all fall above the share
    train = [e for e, place in zip(examples, places, strict=True) if place not in held]
    return train, [e for e, place in zip(examples, places, strict=True) if place in held]


def _place(messages: list[Message], seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the conversation and the seed."""
    text = json.dumps([seed, messages], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


def save_prepared(prepared: Prepared, folder: Path) -> None:
    """Write train/ and eval/ as Arrow data sets, which training maps into memory."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    for name, examples in (("train", prepared.train), ("eval", prepared.eval)):
        if examples:
            Dataset.from_dict(
                {
                    "input_ids": [e.labelled.input_ids for e in examples],
                    "labels": [e.labelled.labels for e in examples],
                }
            ).save_to_disk(folder / name)
    conversations = {
        name: [example.messages for example in examples[:8]]
        for name, examples in (("train", prepared.train), ("eval", prepared.eval))
    }
    (folder / "first.json").write_text(json.dumps(conversations, ensure_ascii=False), "utf-8")
