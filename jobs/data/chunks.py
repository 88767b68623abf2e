"""Rows -> labelled chunks: what one process does with the rows it gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.conversation import BadRow, Conversation
from jobs.data.formats import to_conversation
from jobs.data.labels import label
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.spec import RecordFormat

KEPT = 8  # conversations kept as they are, to ask the model about


@dataclass(frozen=True)
class Recipe:
    """All that labelling depends on besides the rows: what other processes get."""

    tokenizer: TokenizerFiles
    loss_on: str
    max_seq_length: int
    too_long: str
    seed: int
    cut_texts: bool = False
    """Whether of a plain text that is too long the beginning is taken, whatever `too_long` says."""


@dataclass
class Chunk:
    """Labelled rows: flat arrays, because they travel between processes."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_counts: NDArray[np.int32]
    places: NDArray[np.float64]  # in [0, 1), one for each example
    bad: list[tuple[int, str]]  # index in the chunk, reason
    too_long: list[int]
    cut: int
    # The first examples, and those with the lowest places, which are the held-out ones.
    conversations: list[tuple[float, Conversation]]


class Labeller:
    """Rows -> chunks, in this process."""

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer | None = None) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer or recipe.tokenizer.load()

    def chunk(
        self, values: Sequence[Any], form: RecordFormat, columns: dict[str, str], keep: bool
    ) -> Chunk:
        ids: list[int] = []
        lengths: list[int] = []
        spans: list[int] = []
        span_counts: list[int] = []
        places: list[float] = []
        bad: list[tuple[int, str]] = []
        too_long: list[int] = []
        cut = 0
        kept: list[tuple[float, Conversation]] = []
        limit = self._recipe.max_seq_length
        for index, value in enumerate(values):
            try:
                conversation = to_conversation(value, form, columns)
                labelled = label(self._tokenizer, conversation, self._recipe.loss_on)
            except BadRow as reason:
                bad.append((index, str(reason)))
                continue
            row, edges = labelled.input_ids, labelled.spans
            if len(row) > limit:
                found = labelled.cut(limit) if self._cuts(conversation) else None
                if found is None:
                    too_long.append(index)
                    continue
                row, edges = found
                cut += 1
            ids += row
            lengths.append(len(row))
            spans += edges
            span_counts.append(len(edges))
            places.append(_place(conversation, self._recipe.seed))
            if conversation.messages:
                kept.append((places[-1], conversation))
        return Chunk(
            np.array(ids, np.int32),
            np.array(lengths, np.int32),
            np.array(spans, np.int32),
            np.array(span_counts, np.int32),
            np.array(places, np.float64),
            bad,
            too_long,
            cut,
            [*kept[: 2 * KEPT], *sorted(kept[2 * KEPT :], key=itemgetter(0))[:KEPT]]
            if keep
            else [],
        )

    def _cuts(self, conversation: Conversation) -> bool:
        is_text = conversation.text is not None
        return self._recipe.too_long == "truncate" or (is_text and self._recipe.cut_texts)


def _place(conversation: Conversation, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the conversation and the seed.

    It decides on which side of the split a conversation is: so it stays there when others are
    added, and a duplicate is never on both sides.
    """
    parts = [str(seed), conversation.text or ""]
    for message in conversation.messages:
        if len(message) == 2:  # role and content, as nearly always
            parts += message.values()
        else:
            parts.append(json.dumps(message, ensure_ascii=False, sort_keys=True))
    if conversation.tools:
        parts.append(json.dumps(conversation.tools, ensure_ascii=False, sort_keys=True))
    text = "\0".join(parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
