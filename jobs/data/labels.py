"""The labels: which tokens are trained. The heart of lorajob.

For every trained turn exactly its content and its end-of-turn token are trained: no header, no
other role, no newline after. Where that cannot be known exactly the row is refused.

How it is known, for any template: the conversation is rendered twice, once as it is and once with
a placeholder in place of each assistant text. The second rendering, cut at the placeholders, is
what the template itself writes around the answers; put together with the answers again it must
give the first rendering, character for character. If it does, the answers' places are proven. If
not (a template that rewrites or drops an answer), there is no exact place, and the row is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.data.formats import BadRow, Message
from jobs.data.tokenizer import ChatTokenizer

IGNORE = -100  # torch's cross_entropy leaves out this label


@dataclass(frozen=True)
class Turn:
    """A trained turn: tokens [start, end) are its content and its end-of-turn token."""

    start: int
    end: int


@dataclass(frozen=True)
class Labelled:
    text: str
    input_ids: list[int]
    labels: list[int]  # input_ids where trained, IGNORE elsewhere; not shifted
    turns: list[Turn]


def label(tokenizer: ChatTokenizer, messages: list[Message], loss_on: str) -> Labelled:
    """Render, tokenize and label a conversation. Raises BadRow where no exact labels exist.

    `loss_on`: `responses` trains every assistant turn, `last_response` the last one, `all` every
    token; with `all` too each answer must have its end-of-turn token, or the model never stops.
    """
    text = tokenizer.template.render(messages)
    places = answer_places(tokenizer, messages, text)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    turns = [_turn(tokenizer, ids, encoding.offsets, text, place) for place in places]
    if loss_on == "all":
        return Labelled(text, ids, list(ids), [Turn(0, len(ids))])
    if loss_on == "last_response":
        turns = turns[-1:]
    labels = [IGNORE] * len(ids)
    for turn in turns:
        labels[turn.start : turn.end] = ids[turn.start : turn.end]
    return Labelled(text, ids, labels, turns)


def answer_places(
    tokenizer: ChatTokenizer, messages: list[Message], text: str
) -> list[tuple[int, int]]:
    """The [start, end) of each assistant text in the rendered `text`, in characters."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    stem = "\ue000answer"  # a private-use character: no text to be trained holds this
    while any(stem in message["content"] for message in messages):
        stem += "\ue000"
    marks = [f"{stem}{number}\ue001" for number in range(len(answers))]
    waiting = iter(marks)
    masked = [
        {**message, "content": next(waiting)} if message["role"] == "assistant" else message
        for message in messages
    ]
    skeleton = tokenizer.template.render(masked)
    around: list[str] = []
    for mark in marks:
        before, found, skeleton = skeleton.partition(mark)
        if not found or mark in skeleton:
            raise BadRow("the chat template leaves out or repeats an assistant turn")
        around.append(before)
    found_places = _fit(text, around, skeleton, answers)
    if len(found_places) != 1:
        raise BadRow(
            "the chat template rewrites an assistant turn, so its exact place is not known"
        )
    return found_places[0]


def _fit(
    text: str, around: list[str], rest: str, answers: list[str]
) -> list[list[tuple[int, int]]]:
    """All ways in which around[0] + answer 0 + around[1] + ... + rest is `text`.

    Templates may trim an answer, so each may stand as it is or trimmed.
    """
    ways: list[list[tuple[int, int]]] = [[]]
    for before, answer in zip(around, answers, strict=True):
        longer = []
        for way in ways:
            at = way[-1][1] if way else 0
            if text.startswith(before, at):
                start = at + len(before)
                for form in {answer, answer.strip(), answer.lstrip(), answer.rstrip()}:
                    if text.startswith(form, start):
                        longer.append([*way, (start, start + len(form))])
        ways = longer
    return [way for way in ways if text[way[-1][1] :] == rest]


def _turn(
    tokenizer: ChatTokenizer,
    ids: list[int],
    offsets: list[tuple[int, int]],
    text: str,
    place: tuple[int, int],
) -> Turn:
    """The tokens of an answer and of what ends it."""
    start_char, end_char = place
    start = next((i for i, span in enumerate(offsets) if span[1] > start_char), len(ids))
    if start == len(ids) or offsets[start][0] != start_char:
        raise BadRow("an assistant turn begins in the middle of a token")
    end = start
    while end < len(ids) and offsets[end][0] < end_char:
        end += 1
    if offsets[end - 1][1] != end_char:
        raise BadRow("an assistant turn ends in the middle of a token")
    # Some templates write a space before the end-of-turn token (Llama 2's do). It has to be
    # trained with it, or the model never gets from the last word to the end.
    stop = end
    while stop < len(ids) and ids[stop] not in tokenizer.stop_ids:
        if text[offsets[stop][0] : offsets[stop][1]].strip():
            break
        stop += 1
    if stop == len(ids) or ids[stop] not in tokenizer.stop_ids:
        raise BadRow(
            "the chat template writes no end-of-turn token after an assistant turn, so the model "
            "would never learn to stop"
        )
    return Turn(start, stop + 1)
