"""Where in the rendered text each answer stands, for any chat template. The heart of lorajob.

How it is known: the conversation is rendered as it is, and once with a mark in place of every text
that a person or a model wrote. What stands between the marks in that second rendering, the
*skeleton*, is the template's own writing. Put together with the texts again it must give the first
rendering, character for character; then the place of every text is proven, whatever the template
does with earlier turns and whatever markers a user's text imitates. A template that rewrites, drops
or repeats an answer fails this, and the row is refused.

The skeleton depends on the conversation's shape alone (roles, which fields there are), so it is made
once for each shape.

An answer that is nothing but a text begins with its first character. A turn with reasoning or tool
calls begins where the prompt for it ends: see `bounds.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, NamedTuple

from jobs.data.bounds import (
    INLINE,
    NO_END,
    OPEN,
    REASONING,
    REWRITTEN,
    TEXTS,
    Bounds,
    BoundsFinder,
    Shape,
    Skeleton,
    follower_of,
    marked,
)
from jobs.data.conversation import BadRow, Message
from jobs.data.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant message in the rendered text, in characters.

    What a model has to write for it is [start, end): its reasoning, text and tool calls, as far as
    the template writes them, and its end-of-turn token.
    """

    message: int
    start: int
    end: int


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
        self._known_of = lru_cache(maxsize=8)(json.loads)
        self._shape_of = lru_cache(maxsize=64)(self._make_shape)
        self._bounds_of = lru_cache(maxsize=4096)(self._find_bounds)
        # `last_end` ends the last turn of a conversation; the tokens that end earlier ones are
        # nearly always the same.
        self._closings: frozenset[str] = frozenset()
        self._opening_end = ""  # what a following turn begins with, if that ends the one before
        self.last_end, self.end_tokens, self._leaves_last_open = self._find_end_tokens()
        ends = self.end_tokens | self._stop_texts
        self._bounds = BoundsFinder(template, self._special, ends)

    def find(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[str, list[Answer]]:
        """The rendered text, and each assistant message's place in it. Raises BadRow."""
        try:
            return self._find(messages, tools)
        except BadRow as reason:
            for form in _other_forms(messages):
                try:
                    return self._find(form, tools)
                except BadRow:
                    continue
            raise reason

    def _find(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[str, list[Answer]]:
        text = self._template.render(messages, tools)
        closing = ""
        if self._leaves_last_open:
            # The end-of-turn token comes with the next turn only: let one follow, and cut there.
            longer = [*messages, {**follower_of(messages[-1]), "content": "x"}]
            longer_text = self._template.render(longer, tools)
            if longer_text.startswith(text):
                messages, text = longer, longer_text
            elif "tool_calls" in messages[-1]:
                raise BadRow("the chat template ends the last turn in no way that can be known")
            else:  # what follows changes the turn: write what a following turn would begin with
                closing = self._opening_end
        try:
            answers = self._answers(text + closing, messages, tools, closing)
        except BadRow as reason:
            answers = self._split_answers(text, messages, tools, closing, reason)
        if self._leaves_last_open:
            text = (text + closing)[: answers[-1].end]
        return text, answers

    def _split_answers(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        closing: str,
        reason: BadRow,
    ) -> list[Answer]:
        """The answers where a template of a reasoning model looks for `<think>` in a text itself.

        `reason` is why they are not known otherwise.
        """
        split = [_split_reasoning(message) for message in messages]
        if split == list(messages):
            raise reason
        try:  # it takes the text apart
            return self._answers(text + closing, split, tools, closing)
        except BadRow as other:
            with suppress(BadRow):
                if self._template.render(split, tools) == text:
                    reason = other
        inline = [
            {**message, INLINE: True} if _is_inline(message, before) else message
            for message, before in zip(split, messages, strict=True)
        ]
        try:  # it leaves the text as it is, but sees that there is reasoning in it
            return self._answers(text + closing, inline, tools, closing)
        except BadRow:
            raise reason from None

    def _answers(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        closing: str,
    ) -> list[Answer]:
        shape = _shape(messages, tools)
        skeleton = self._skeleton_of(shape, closing)
        places = _fit(text, skeleton, messages)
        return [
            self._answer(text, places, index, message, shape, closing)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _answer(
        self,
        text: str,
        places: list[_Place],
        index: int,
        message: Message,
        shape: str,
        closing: str,
    ) -> Answer:
        own = [place for place in places if place.message == index]
        content = [place for place in own if place.field == "content"]
        if (message.get("content") or "").strip() and len(content) != 1:
            raise BadRow("the chat template leaves out or repeats an assistant turn")
        if content and len(own) == 1 and not message.get("tool_calls"):
            return Answer(index, content[0].start, self._end_at(text, content[0].end))
        bounds = self._bounds_of(shape, index, closing)
        start = (places[bounds.first - 1].end if bounds.first else 0) + bounds.skip
        if bounds.back is None:
            return Answer(index, start, self._end_at(text, own[-1].end))
        after = places[bounds.last].start if bounds.last < len(places) else len(text)
        end = after - bounds.back
        _require_json(message, text[start:end])
        return Answer(index, start, end)

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

    def _make_skeleton(self, shape: str, closing: str = "") -> Skeleton:
        if f"\\u{ord(OPEN):x}" in shape:
            raise BadRow("a tool or a tool call holds characters that no text has")
        known = self._known_of(shape)
        made = marked(self._template, known["messages"], known["tools"])
        _require_all_written(known["messages"], set(made.marks))
        return Skeleton((*made.literals[:-1], made.literals[-1] + closing), made.marks)

    def _make_shape(self, shape: str, closing: str) -> Shape:
        known = self._known_of(shape)
        skeleton = self._skeleton_of(shape, closing)
        return self._bounds.shape(known["messages"], known["tools"], skeleton, closing)

    def _find_bounds(self, shape: str, index: int, closing: str) -> Bounds:
        return self._bounds.find(self._shape_of(shape, closing), index)

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
            if earlier and between.lstrip().startswith(earlier):
                self._opening_end = between[: between.index(earlier) + len(earlier)]
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


def _require_json(message: Message, written: str) -> None:
    """A template that takes arguments to be a JSON text writes an object as Python does."""
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else _json_text(arguments)
        if text not in written and (text is arguments or str(arguments) in written):
            raise BadRow("the chat template writes the arguments of a tool call not as JSON")


def _require_all_written(messages: Sequence[Message], written: set[tuple[int, str]]) -> None:
    """Nothing that was said may be missing: an answer would be trained without its question.

    `messages` are a shape's, with True in place of each text.

    Reasoning before earlier answers may be: the models it is meant for see it so.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        parts = {field for number, field in written if number == index}
        if message.get("content") is True and not parts - set(REASONING):
            raise BadRow(f"the chat template leaves out or repeats a turn of the {message['role']}")
        reasoning = any(message.get(field) is True for field in REASONING)
        if not reasoning or parts & set(REASONING):
            continue
        if index == last:
            raise BadRow(
                "the chat template leaves out the reasoning before the last answer; take it out of "
                "the data, or choose a template that writes it"
            )
        if not (parts or message.get("tool_calls")):
            raise BadRow("the chat template leaves out or repeats a turn of the assistant")


def _shape(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    """The conversation as JSON, with true in place of each text; white space alone stays as it is."""
    masked = []
    for message in messages:
        if len(message) == 2 and message["content"].strip():  # role and content, as nearly always
            masked.append(f'{{"role": "{message["role"]}", "content": true}}')
            continue
        copy = dict(message)
        for field in TEXTS:
            if (copy.get(field) or "").strip():
                copy[field] = True
        masked.append(json.dumps(copy))
    return f'{{"messages": [{", ".join(masked)}], "tools": {json.dumps(tools) if tools else "[]"}}}'


def _fit(text: str, skeleton: Skeleton, messages: Sequence[Message]) -> list[_Place]:
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
        raise BadRow(REWRITTEN)
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
    content = message.get("content") or ""
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


def _is_inline(split: Message, before: Message) -> bool:
    reasoning, rest = split.get(REASONING[0], ""), split.get("content") or ""
    return before.get("content") == f"<think>{reasoning}</think>{rest}" and all(
        text.strip() for text in (reasoning, rest)
    )


def _other_forms(messages: Sequence[Message]) -> list[list[Message]]:
    """The same conversation as other servers hand it to a template."""
    forms: list[list[Message]] = []
    if any("tool_calls" in message for message in messages):
        forms += [[change(message) for message in messages] for change in (_null_text, _json_calls)]
    if any(REASONING[0] in message for message in messages):
        forms += [[_renamed(message, name) for message in messages] for name in REASONING[1:]]
    return [form for form in forms if form != list(messages)]


def _null_text(message: Message) -> Message:
    """No text in place of an empty one beside tool calls, as in OpenAI's replies."""
    empty = "tool_calls" in message and message["content"] == ""
    return {**message, "content": None} if empty else message


def _json_calls(message: Message) -> Message:
    """The arguments of tool calls as JSON text, as in OpenAI's replies."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = _json_text(call["function"]["arguments"])
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**_null_text(message), "tool_calls": calls}


def _json_text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _renamed(message: Message, name: str) -> Message:
    """The reasoning in another field."""
    return {name if key == REASONING[0] else key: value for key, value in message.items()}
