"""The labels: which tokens are trained.

For every trained turn exactly what the model has to write and its end-of-turn token are trained: no
header, no other role, no newline after. Where that cannot be known exactly the row is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.data.conversation import BadRow, Conversation
from jobs.data.skeleton import Answer
from jobs.data.tokenizer import ChatTokenizer

IGNORE = -100  # torch's cross_entropy leaves out this label


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained turn: tokens [start, end) are what the model writes and its end-of-turn token.

    `text` is what that is in the rendered text.
    """

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    input_ids: list[int]
    turns: list[Turn]  # only those that are trained
    ends: list[int] | None
    """Where the trained answers end, in tokens: it can be cut there. None for a plain text, which
    can be cut anywhere."""

    def cut(self, limit: int) -> tuple[list[int], list[int]] | None:
        """Tokens and spans of its beginning, `limit` tokens at most. Never through an answer, which
        would lose its end-of-turn token; None where no whole one fits."""
        at = limit if self.ends is None else max((e for e in self.ends if e <= limit), default=0)
        spans = [
            min(edge, at)
            for turn in self.turns
            if turn.start < at
            for edge in (turn.start, turn.end)
        ]
        return (self.input_ids[:at], spans) if spans else None

    @property
    def spans(self) -> list[int]:
        """The trained turns as [start, end, start, end, ...]."""
        return [edge for turn in self.turns for edge in (turn.start, turn.end)]

    @property
    def labels(self) -> list[int]:
        """`input_ids` where trained, IGNORE elsewhere; not shifted."""
        return labels_of(self.input_ids, self.spans)


def labels_of(input_ids: list[int], spans: Sequence[int]) -> list[int]:
    """Labels from the trained spans, [start, end, start, end, ...] in tokens."""
    labels = [IGNORE] * len(input_ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = input_ids[start:end]
    return labels


def label(tokenizer: ChatTokenizer, conversation: Conversation, loss_on: str) -> Labelled:
    """Render, tokenize and label a conversation. Raises BadRow where no exact labels exist.

    `loss_on`: `responses` trains every assistant turn but those of weight 0, `last_response` the
    last of them, `all` every token; with `all` too each answer must have its end-of-turn token, or
    the model never stops.
    """
    if conversation.text is not None:
        return _plain(tokenizer, conversation.text)
    text, answers = tokenizer.turns.find(conversation.messages, conversation.tools)
    trained = [answer for answer in answers if answer.message not in conversation.untrained]
    if loss_on == "last_response":
        trained = trained[-1:]
    ids, turns = _tokens(tokenizer, text, trained)
    for turn in turns:
        if not tokenizer.stop_ids.isdisjoint(ids[turn.start : turn.end - 1]):
            raise BadRow("an assistant turn holds the end-of-turn token in its own text")
    bos = tokenizer.bos_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise BadRow("the chat template and the text both write the beginning-of-sequence token")
    ends = [turn.end for turn in turns]
    if loss_on == "all":
        turns = [Turn(0, len(ids), text)]
    return Labelled(text, ids, turns, ends)


def _plain(tokenizer: ChatTokenizer, text: str) -> Labelled:
    """A plain text, trained as a whole, with the tokens around it that the tokenizer puts there."""
    ids = list(tokenizer.backend.encode(text).ids)
    start = 1 if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else 0
    if not ids or ids[-1] not in tokenizer.stop_ids:
        ids.append(tokenizer.eos_id)
    return Labelled(text, ids, [Turn(start, len(ids), text)], None)


def _tokens(
    tokenizer: ChatTokenizer, text: str, answers: list[Answer]
) -> tuple[list[int], list[Turn]]:
    """The text's tokens and the turns in them.

    An answer must begin with a token. Where the header's last characters and the answer's first
    ones are one token, the text is tokenized in two pieces at that place, as it is when a server
    tokenizes the prompt and the model goes on from it.
    """
    quick = _by_words(tokenizer, text, answers)
    if quick:
        return quick
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    turns = []
    for answer in answers:
        start = encoding.char_to_token(answer.start)
        last = encoding.char_to_token(answer.end - 1)
        if start is None or last is None:
            raise BadRow("the tokenizer drops characters of an assistant turn")
        begins = (encoding.token_to_chars(start) or (-1, -1))[0]
        # Where the token of the first word has the template's space in it (" Hello"), the model
        # writes both at once.
        if text[begins : answer.start].strip():
            return _in_pieces(tokenizer, text, answers)
        end = last + 1
        if (encoding.token_to_chars(last) or (-1, -1))[1] != answer.end:
            raise BadRow("an end-of-turn token goes on into the text after it")
        turns.append(Turn(start, end, text[answer.start : answer.end]))
    return list(encoding.ids), turns


def _by_words(
    tokenizer: ChatTokenizer, text: str, answers: list[Answer]
) -> tuple[list[int], list[Turn]] | None:
    """The same, where every answer begins and ends with a word; None where that is not known."""
    words = tokenizer.words.encode(text) if tokenizer.words else None
    if words is None:
        return None
    turns = []
    for answer in answers:
        start, end = words.token_at(answer.start), words.token_at(answer.end)
        if start is None or end is None:
            return None
        turns.append(Turn(start, end, text[answer.start : answer.end]))
    return words.ids, turns


def _in_pieces(
    tokenizer: ChatTokenizer, text: str, answers: list[Answer]
) -> tuple[list[int], list[Turn]]:
    ids: list[int] = []
    turns: list[Turn] = []
    at = 0
    for answer in answers:
        ids += _piece(tokenizer, text[at : answer.start])
        own = _piece(tokenizer, text[answer.start : answer.end])
        turns.append(Turn(len(ids), len(ids) + len(own), text[answer.start : answer.end]))
        ids += own
        at = answer.end
    return ids + _piece(tokenizer, text[at:]), turns


def _piece(tokenizer: ChatTokenizer, text: str) -> list[int]:
    ids = tokenizer.ids_of(text)
    if ids and tokenizer.text_of(ids) != text:
        raise BadRow("an assistant turn begins in the middle of a token")
    return ids
