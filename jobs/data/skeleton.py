"""Where in the rendered text each answer stands, for any chat template. The heart of lorajob.

How it is known: the conversation is rendered as it is, and once with a mark in place of every text
that a person or a model wrote. What stands between the marks in that second rendering, the
*skeleton*, is the template's own writing. Put together with the texts again it must give the first
rendering, character for character; then the place of every text is proven, whatever the template
does with earlier turns and whatever markers a user's text imitates. A template that rewrites, drops
or repeats an answer fails this, and the row is refused.

The skeleton depends on the conversation's shape alone (roles, which fields there are), so it is made
once for each shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, NamedTuple

from jobs.data.conversation import BadRow, Message
from jobs.data.template import ChatTemplate

# The texts of a message that are put in place of a mark. Arguments of tool calls stay as they are:
# templates take them apart.
TEXTS = ("content", "reasoning_content", "instruction", "input")

NO_END = (
    "the chat template writes no end-of-turn token after an assistant turn, so the model would "
    "never learn to stop"
)

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: no template writes them
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant message in the rendered text, in characters.

    What a model has to write for it is [start, end): its reasoning, text and tool calls, as far as
    the template writes them, and its end-of-turn token.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Skeleton:
    literals: tuple[str, ...]  # one more than marks
    marks: tuple[tuple[int, str], ...]  # (message, field) in the order in which they are written


class _Place(NamedTuple):
    message: int
    field: str
    start: int
    end: int


class TurnFinder:
    """Finds the answers in what one template renders with one tokenizer's special tokens.

    `special_texts` are the tokenizer's special tokens; `stop_texts` those of them that the model's
    files name as the end of a generation.
    """

    def __init__(
        self, template: ChatTemplate, special_texts: Sequence[str], stop_texts: Sequence[str] = ()
    ) -> None:
        self._template = template
        # Longest first, so that no token hides a longer one that begins with it.
        texts = sorted({*special_texts, *stop_texts}, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(text) for text in texts) or r"(?!)")
        self._stop_texts = frozenset(stop_texts)
        self._skeleton_of = lru_cache(maxsize=4096)(self._make_skeleton)
        self._header_of = lru_cache(maxsize=4096)(self._make_header)
        # `last_end` ends the last turn of a conversation; the tokens that end earlier ones are
        # nearly always the same.
        self._closings: frozenset[str] = frozenset()
        self.last_end, self.end_tokens, self._leaves_last_open = self._find_end_tokens()

    def find(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[str, list[Answer]]:
        """The rendered text, and each assistant message's place in it. Raises BadRow."""
        text = self._template.render(messages, tools)
        if self._leaves_last_open:
            # The end-of-turn token comes with the next turn only: let one follow, and cut there.
            messages = [*messages, {"role": "user", "content": "x"}]
            longer = self._template.render(messages, tools)
            if not longer.startswith(text):
                raise BadRow("the chat template ends the last turn in no way that can be known")
            text = longer
        try:
            answers = self._answers(text, messages, tools)
        except BadRow as reason:
            # Templates of reasoning models take `<think>...</think>` in a text apart themselves.
            split = [_split_reasoning(message) for message in messages]
            if split == list(messages):
                raise
            try:
                answers = self._answers(text, split, tools)
            except BadRow:
                raise reason from None
        if self._leaves_last_open:
            text = text[: answers[-1].end]
        return text, answers

    def _answers(
        self, text: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> list[Answer]:
        shape = _shape(messages, tools)
        skeleton = self._skeleton_of(shape)
        places = _fit(text, skeleton, messages)
        return [
            self._answer(text, places, index, message, shape)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _answer(
        self, text: str, places: list[_Place], index: int, message: Message, shape: str
    ) -> Answer:
        own = [place for place in places if place.message == index]
        content = [place for place in own if place.field == "content"]
        if message.get("content", "").strip() and len(content) != 1:
            raise BadRow("the chat template leaves out or repeats an assistant turn")
        if content and len(own) == 1 and not message.get("tool_calls"):
            start = content[0].start
        else:
            start = self._after_header(text, places, own, index, shape)
        if message.get("tool_calls"):
            before = content[0].end if content else start
            end = self._first_end(text, before, _next_start(places, index, text))
            names = [call["function"]["name"] for call in message["tool_calls"]]
            if any(name not in text[start:end] for name in names):
                raise BadRow("the chat template leaves out an assistant's tool calls")
        else:
            end = self._end_at(text, max((place.end for place in own), default=start))
        return Answer(index, start, end)

    def _after_header(
        self, text: str, places: list[_Place], own: list[_Place], index: int, shape: str
    ) -> int:
        """Where a turn with reasoning or tool calls begins: after the header that prompts for it."""
        header = self._header_of(shape, index)
        low = max((place.end for place in places if place.message < index), default=0)
        high = min(place.start for place in own) if own else _next_start(places, index, text)
        between = text[low:high]
        # Where the prompt opens the reasoning itself, earlier turns may be written without that.
        for form in (header, re.sub(r"<think>\s*$", "", header)):
            if form.strip() and between.count(form) == 1:
                return low + between.index(form) + len(form)
        raise BadRow(
            "it cannot be told where an assistant turn with reasoning or tool calls begins"
        )

    def _end_at(self, text: str, at: int) -> int:
        """The end of the end-of-turn token that follows the answer.

        Some templates write white space before it (Llama 2's do). It has to be trained with it, or
        the model never gets from the last word to the end.
        """
        while at < len(text) and text[at].isspace():
            at += 1
        for closing in self._closings:
            if text.startswith(closing, at):
                return at + len(closing)
        found = self._special.match(text, at)
        if found is None or found[0] not in self.end_tokens | self._stop_texts:
            raise BadRow(NO_END)
        return found.end()

    def _first_end(self, text: str, low: int, high: int) -> int:
        for found in self._special.finditer(text, low, high):
            if found[0] in self.end_tokens | self._stop_texts:
                return found.end()
        raise BadRow(NO_END)

    def _make_skeleton(self, shape: str) -> _Skeleton:
        known = json.loads(shape)
        marks: list[tuple[int, str]] = []
        masked = []
        for index, message in enumerate(known["messages"]):
            copy = dict(message)
            for field in TEXTS:
                if copy.get(field) is True:
                    copy[field] = f"{_OPEN}{len(marks)}{_CLOSE}"
                    marks.append((index, field))
            masked.append(copy)
        parts = _MARK.split(self._template.render(masked, known["tools"]))
        written = tuple(marks[int(number)] for number in parts[1::2])
        _require_all_written(known["messages"], set(written))
        return _Skeleton(tuple(parts[::2]), written)

    def _make_header(self, shape: str, index: int) -> str:
        """What the template writes to prompt for message `index`."""
        known = json.loads(shape)
        before = [
            {key: "x" if value is True else value for key, value in message.items()}
            for message in known["messages"][:index]
        ]
        without = self._template.render(before, known["tools"])
        prompting = self._template.render(before, known["tools"], add_generation_prompt=True)
        return prompting.removeprefix(without) if prompting.startswith(without) else ""

    def _find_end_tokens(self) -> tuple[str | None, frozenset[str], bool]:
        """How this template ends an assistant turn, read off a small conversation.

        Returns the token that ends the last turn, those that end any turn, and whether the last
        turn gets its token only when another turn follows.
        """
        for system in ([], [{"role": "system", "content": True}]):
            pair = {"role": "user", "content": True}, {"role": "assistant", "content": True}
            shape = json.dumps({"messages": [*system, *pair, *pair], "tools": []})
            try:
                made = self._make_skeleton(shape)
            except BadRow:
                continue
            if [field for _, field in made.marks] != ["content"] * (4 + len(system)):
                continue
            header, prompt, between, _, rest = made.literals[len(system) :]
            earlier = self._token_at(between)
            last = self._token_at(rest)
            if earlier not in {last, *self._stop_texts} and earlier != self._token_at(prompt):
                # It may belong to the next turn's header, and then it ends nothing.
                earlier = self._token_at(self._without_header(between, header))
            closings = [self._closing(literal) for literal in (between, rest)]
            self._closings = frozenset(text for text, _ in closings if text)
            earlier, last = closings[0][1] or earlier, closings[1][1] or last
            found = frozenset(token for token in (earlier, last) if token is not None)
            return last or earlier, found, last is None and earlier is not None
        return None, frozenset(), False

    def _token_at(self, literal: str) -> str | None:
        """The special token that the literal begins with, white space aside."""
        found = self._special.match(literal.lstrip())
        return found[0] if found else None

    def _closing(self, literal: str) -> tuple[str, str | None]:
        """What the template writes up to the token that stops the model, and that token.

        Only where other tokens come first: Command R7B's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>.
        """
        run = literal.split(maxsplit=1)[0] if literal.strip() else ""
        tokens = list(self._special.finditer(run))
        if not tokens or tokens[0].start() != 0 or tokens[0][0] in self._stop_texts:
            return "", None
        stop = next((found for found in tokens if found[0] in self._stop_texts), None)
        return (run[: stop.end()], stop[0]) if stop else ("", None)

    def _without_header(self, between: str, header: str) -> str:
        """What stands between an answer and the next user's text, less that user's header."""
        same = 0
        while same < min(len(between), len(header)) and between[-1 - same] == header[-1 - same]:
            same += 1
        cut = len(between) - same
        for found in self._special.finditer(between):
            if found.start() < cut < found.end():
                cut = found.end()  # two tokens that end alike: <|eot_id|> and <|header_id|>
        return between[:cut]


def _require_all_written(messages: Sequence[Message], written: set[tuple[int, str]]) -> None:
    """Nothing that was said may be missing: an answer would be trained without its question.

    `messages` are a shape's, with True in place of each text.

    Reasoning before earlier answers may be: the models it is meant for see it so.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        parts = {field for number, field in written if number == index}
        if message.get("content") is True and not parts - {"reasoning_content"}:
            raise BadRow(f"the chat template leaves out or repeats a turn of the {message['role']}")
        reasoning = message.get("reasoning_content") is True
        if index == last and reasoning and "reasoning_content" not in parts:
            raise BadRow(
                "the chat template leaves out the reasoning before the last answer; take it out of "
                "the data, or choose a template that writes it"
            )


def _shape(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    """The conversation as JSON, with true in place of each text; white space alone stays as it is."""
    masked = []
    for message in messages:
        if len(message) == 2 and message["content"].strip():  # role and content, as nearly always
            masked.append(f'{{"role": "{message["role"]}", "content": true}}')
            continue
        copy = dict(message)
        for field in TEXTS:
            if copy.get(field, "").strip():
                copy[field] = True
        masked.append(json.dumps(copy))
    return f'{{"messages": [{", ".join(masked)}], "tools": {json.dumps(tools) if tools else "[]"}}}'


def _fit(text: str, skeleton: _Skeleton, messages: Sequence[Message]) -> list[_Place]:
    """The place of each text, if the skeleton filled with them is `text` in exactly one way."""
    first = skeleton.literals[0]
    ways: list[tuple[int, list[_Place]]] = [(len(first), [])] if text.startswith(first) else []
    for (message, field), literal in zip(skeleton.marks, skeleton.literals[1:], strict=True):
        said = messages[message][field]
        found: list[tuple[int, list[_Place]]] = []
        # Inside JSON only where it stands in no plainer form: a text and its JSON differ, so that
        # no place can hold both.
        for forms in (_plain_forms, _json_forms):
            for form in forms(said):
                for at, way in ways:
                    end = at + len(form)
                    if text.startswith(form, at) and text.startswith(literal, end):
                        found.append((end + len(literal), [*way, _Place(message, field, at, end)]))
            if found or messages[message]["role"] == "assistant":
                break
        ways = found
        if len(ways) > 64:
            break
    ways = [(at, way) for at, way in ways if at == len(text)]
    if len(ways) != 1:
        raise BadRow("the chat template rewrites a turn, so its exact place is not known")
    return ways[0][1]


def _plain_forms(text: str) -> list[str]:
    """How a template may write a text: as it is, or trimmed."""
    if not (text[0].isspace() or text[-1].isspace()):
        return [text]
    forms = (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))
    return list(dict.fromkeys(forms))


def _json_forms(text: str) -> list[str]:
    """How a template may write what no model wrote into JSON of its own: a tool's result."""
    forms = (encode_basestring(text)[1:-1], encode_basestring_ascii(text)[1:-1])
    return list(dict.fromkeys(forms))


def _next_start(places: list[_Place], index: int, text: str) -> int:
    return min((place.start for place in places if place.message > index), default=len(text))


def _split_reasoning(message: Message) -> Message:
    content = message.get("content", "")
    if (
        message["role"] != "assistant"
        or "</think>" not in content
        or "reasoning_content" in message
    ):
        return message
    reasoning, _, rest = content.partition("</think>")
    return {
        **message,
        "reasoning_content": reasoning.partition("<think>")[2] or reasoning,
        "content": rest,
    }
