"""Where a turn with reasoning or tool calls begins and ends. For the skeletons, see `skeleton.py`.

It begins where the prompt for it ends, for what comes after that the model has to write. The prompt
is what a server renders with add_generation_prompt from the messages before; its tail is what stands
there after their last text.

1. After that text the turn is written with the whole tail. Then the model goes on from there.
2. It is written otherwise after a header that both have, because the prompt adds white space, opens
   a reasoning, or opens and closes one: `<think></think>`, which templates leave out of earlier
   turns. If the turn goes on with the end of an empty one, as in `</think>`, that is the prompt's
   too. A prompt that adds anything else is for another answer than this one, and so is one that has
   closed the reasoning of a turn that has some: refused.
3. What the template writes behind all messages may be in the tail and not before the turn. Then the
   turn must be written with all that add_generation_prompt adds.
4. A template whose prompt adds nothing has no header, or it knows no prompt. It has none where it
   writes none before a plain answer either.

It ends with the first end-of-turn token after its last text and its last call, if that token stands
before the next message. Where the next one has no text, and so no mark, it is given one to see.

What a tool call says is data as any text is and may imitate markers, but templates take it apart. So
all this is read off a twin: the same conversation with strangers in place of the texts in its calls.
The twin shows too whether each of them is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from jobs.data.conversation import BadRow, Message
from jobs.data.template import ChatTemplate

REASONING = ("reasoning_content", "reasoning", "thinking")  # as templates call it
# The texts of a message that are put in place of a mark. Arguments of tool calls stay as they are.
TEXTS = ("content", *REASONING, "instruction", "input")
INLINE = "inline"  # a shape's message with this has its reasoning in its content

NO_END = (
    "the chat template writes no end-of-turn token after an assistant turn, so the model would "
    "never learn to stop"
)
NO_START = "it cannot be told where an assistant turn with reasoning or tool calls begins"
OTHER_PROMPT = (
    "the chat template's prompt for an answer opens or closes a reasoning otherwise than this turn "
    "does, so the model could not go on from it with this turn"
)
NO_CALLS = "the chat template leaves out an assistant's tool calls"
ENDS_BEFORE = "the chat template ends an assistant turn before its tool calls, or between them"
REWRITTEN = "the chat template rewrites a turn, so its exact place is not known"

# Private-use characters: no template writes them.
OPEN, CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
# In place of a call's own text. Of plain letters, for some templates escape all others.
_STRANGE = re.compile(r"QJXZ\d+ZXJQ")

_OPENED = re.compile(r"<think>\s*")
# An empty reasoning: a marker and its counterpart, in any of the ways in which they are written.
_EMPTY = re.compile(
    r"\s*(?:<([\w:.-]+)>\s*</\1>|<\|(\w+)>\w*\s*<\2\|>|<\|START_(\w+)\|>\s*<\|END_\3\|>"
    r"|\[(\w+)\]\s*\[/\4\])\s*"
)


@dataclass(frozen=True, slots=True)
class Skeleton:
    literals: tuple[str, ...]  # one more than marks
    marks: tuple[tuple[int, str], ...]  # (message, field) in the order in which they are written


@dataclass(frozen=True, slots=True)
class Bounds:
    """A turn begins `skip` characters into literal `first`, and ends `back` before the end of `last`.

    `back` is None where it ends right after its last text.
    """

    first: int
    skip: int
    last: int
    back: int | None


def marked(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
) -> Skeleton:
    """The skeleton of a shape's messages, which have True in place of each text."""
    marks: list[tuple[int, str]] = []
    masked = []
    for index, message in enumerate(messages):
        copy = dict(message)
        for field in TEXTS:
            if copy.get(field) is True:
                copy[field] = f"{OPEN}{len(marks)}{CLOSE}"
                marks.append((index, field))
        if copy.pop(INLINE, False):
            copy["content"] = f"<think>{copy.pop(REASONING[0])}</think>{copy['content']}"
        masked.append(copy)
    parts = _MARK.split(template.render(masked, tools, add_generation_prompt))
    return Skeleton(tuple(parts[::2]), tuple(marks[int(number)] for number in parts[1::2]))


@dataclass(frozen=True, slots=True)
class Shape:
    """Messages with True in place of each text, their tools and skeleton, and its twin."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]
    skeleton: Skeleton
    twin: Skeleton
    strangers: dict[int, dict[str, str]]  # of each message with calls: what stands for which text
    closing: str  # what was put behind the rendering


class BoundsFinder:
    """`special` finds the tokenizer's special tokens; `ends` are those that end a turn."""

    def __init__(
        self, template: ChatTemplate, special: re.Pattern[str], ends: frozenset[str]
    ) -> None:
        self._template = template
        self._special = special
        self._ends = ends
        self._usual_prompt = self._find_usual_prompt()

    def find(self, shape: Shape, index: int) -> Bounds:
        """Where message `index` stands. Raises BadRow."""
        marks = shape.skeleton.marks
        own = sum(message == index for message, _ in marks)
        first = sum(message < index for message, _ in marks)
        # The turn has a place only where its texts stand together, between the earlier ones and
        # the later ones.
        order = [(message > index) - (message < index) for message, _ in marks]
        if order != sorted(order):
            raise BadRow(REWRITTEN)
        shape = self._for_turn(shape, index, first, first + own)
        skip = self._skip(shape, index, first)
        if own and marks[first + own - 1][1] == "content" and index not in shape.strangers:
            return Bounds(first, skip, first + own, None)
        return Bounds(first, skip, first + own, self._back(shape, index, first, first + own, skip))

    def shape(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        skeleton: Skeleton,
        closing: str = "",
        only: int | None = None,
    ) -> Shape:
        """The shape with its twin, in which all calls are strange, or those of one message only."""
        if not any("tool_calls" in message for message in messages):
            return Shape(messages, tools, skeleton, skeleton, {}, closing)
        if any(_STRANGE.search(literal) for literal in skeleton.literals):
            raise BadRow("a tool or a tool call holds characters that no text has")
        strangers: dict[int, dict[str, str]] = {}
        copies = []
        used = 0
        for index, message in enumerate(messages):
            if not message.get("tool_calls") or only not in (None, index):
                copies.append(message)
                continue
            estranger = _Estranger(used)
            calls = [estranger.call(call) for call in message["tool_calls"]]
            if any(self._special.search(key) for key in estranger.keys):
                raise BadRow("a tool call's argument has the name of a special token")
            copies.append({**message, "tool_calls": calls})
            strangers[index] = estranger.said
            used += len(estranger.said)
        twin = marked(self._template, copies, tools)
        if twin.marks != skeleton.marks:
            raise BadRow(REWRITTEN)
        twin = Skeleton((*twin.literals[:-1], twin.literals[-1] + closing), twin.marks)
        return Shape(messages, tools, skeleton, twin, strangers, closing)

    def _for_turn(self, shape: Shape, index: int, first: int, last: int) -> Shape:
        """The shape with a twin in which other turns' calls are as they were, where they stand beside."""
        own = shape.strangers.get(index, {})
        for number in {first, last}:
            if any(found not in own for found in _STRANGE.findall(shape.twin.literals[number])):
                return self.shape(
                    shape.messages, shape.tools, shape.skeleton, shape.closing, only=index
                )
        return shape

    def _skip(self, shape: Shape, index: int, first: int) -> int:
        """The length of what the prompt for the turn writes after the last text before it."""
        before, marks = shape.messages[:index], shape.skeleton.marks
        prompt = marked(self._template, before, shape.tools, add_generation_prompt=True)
        if prompt.marks[-1:] != marks[max(first - 1, 0) : first]:
            raise BadRow(NO_START)
        tail = prompt.literals[-1]
        # Only what stands before the first word of a call: the same in the turn and in its twin.
        written = _STRANGE.split(shape.twin.literals[first], maxsplit=1)[0]
        if not shape.skeleton.literals[first].startswith(written):
            raise BadRow(NO_START)
        if written.startswith(tail):
            if not (self._usual_prompt and tail.endswith(self._usual_prompt)):
                self._require_no_more_header(shape, before, tail, marks[:first])
            return len(tail)
        return self._skip_parted(shape, index, tail, written)

    def _require_no_more_header(
        self, shape: Shape, before: Sequence[Message], tail: str, marks: Sequence[tuple[int, str]]
    ) -> None:
        """That a template which prompts with nothing writes nothing before a plain answer either."""
        without = marked(self._template, before, shape.tools).literals[-1]
        if tail.startswith(without) and tail[len(without) :].strip():
            return
        answer = {"role": "assistant", "content": True}
        plain = marked(self._template, [*before, answer], shape.tools)
        if plain.marks != (*marks, (len(before), "content")):
            raise BadRow(NO_START)
        header = plain.literals[len(marks)]
        if header.startswith(tail) and header[len(tail) :].strip():
            raise BadRow(NO_START)

    def _skip_parted(self, shape: Shape, index: int, tail: str, written: str) -> int:
        """The same where the prompt ends otherwise than the turn begins."""
        without = marked(self._template, shape.messages[:index], shape.tools).literals[-1]
        if not tail.startswith(without):
            raise BadRow(NO_START)
        prompt = tail[len(without) :]
        same = self._same(tail, written)
        if same < len(without):
            # The template writes something behind all messages, which is not behind this one.
            at = written.rfind(prompt, 0, same + len(prompt)) if prompt.strip() else -1
            if at == -1:
                raise BadRow(NO_START)
            return at + len(prompt)
        added, rest = tail[same:], written[same:]
        header = prompt.removesuffix(added).strip()
        if header and not added.strip():
            return same
        if any(message == index and field in REASONING for message, field in shape.twin.marks):
            raise BadRow(OTHER_PROMPT)
        both = 0
        if _EMPTY.fullmatch(added):
            most = min(len(added), len(rest))
            both = next(n for n in range(most, -1, -1) if added.endswith(rest[:n]))
        elif not _OPENED.fullmatch(added):
            raise BadRow(OTHER_PROMPT)
        if not (header or rest[:both].strip()):
            raise BadRow(NO_START)  # nothing of the prompt is there
        return same + both

    def _same(self, tail: str, written: str) -> int:
        """How far both are the same, up to a whole marker."""
        pairs = enumerate(zip(tail, written, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(len(tail), len(written)))
        for text in (tail, written):
            for found in self._special.finditer(text):
                if found.start() < same < found.end():
                    same = found.start()
            cut = text.rfind("<", 0, same)
            if cut != -1 and ">" not in text[cut:same]:
                same = cut
        return same

    def _back(self, shape: Shape, index: int, first: int, last: int, skip: int) -> int:
        """How many characters stand between the end of the turn and the end of its last literal."""
        literals = list(shape.twin.literals[first : last + 1])
        literal = literals.pop()
        low = 0 if literals else skip
        if literals:
            literals[0] = literals[0][skip:]
        own = shape.strangers.get(index, {})
        at, end = self._end(literals, literal, low, own)
        begun = literal[:low]
        self._require_own_end(shape, index, last, literals, begun, literal[at:end], literal[end:])
        # What follows may name the call again, as a tool's result does.
        written = shape.skeleton.literals[last]
        forms = (_filled(literal[at:], own, form) for form in (str, _json, _ascii_json))
        found = {len(form) for form in forms if written.endswith(form)}
        if len(found) != 1:
            raise BadRow(REWRITTEN)
        return found.pop() - (end - at)

    def _end(
        self, literals: Sequence[str], literal: str, low: int, own: dict[str, str]
    ) -> tuple[int, int]:
        """Where a turn's last call ends in its last literal, and its end-of-turn token.

        `literals` are the turn's others, and `own` stands for its calls' texts.
        """
        earlier = "".join(literals)
        at = low
        for stranger in own:
            if stranger not in earlier:
                found = literal.find(stranger, low)
                if found == -1:
                    raise BadRow(NO_CALLS)
                at = max(at, found + len(stranger))
        ends = [m for m in self._special.finditer(literal, low) if m[0] in self._ends]
        if not ends:
            raise BadRow(NO_END)
        if ends[0].start() < at:
            raise BadRow(ENDS_BEFORE)
        return at, ends[0].end()

    def _require_own_end(
        self,
        shape: Shape,
        index: int,
        last: int,
        literals: Sequence[str],
        begun: str,
        closing: str,
        rest: str,
    ) -> None:
        """That the turn's end-of-turn token is not the next one's.

        `begun` is what its last literal holds of what stands before the turn, `closing` what stands
        between the last call and the end of the token, and `rest` follows.
        """
        marks, messages = shape.twin.marks, shape.messages
        if index + 1 == len(messages):
            if shape.closing or self._ends_as_plain(shape, index, closing + rest):
                return
            follower = follower_of(messages[index])
        elif last < len(marks) and marks[last][0] == index + 1:
            self._require_one_end(rest)
            return
        else:  # the next message has no text: see where it begins by giving it one
            follower = {**messages[index + 1], "content": True}
        if follower["role"] == "assistant":
            raise BadRow("two assistant turns with no text between them cannot be told apart")
        copies = [*messages[: index + 1], follower, *messages[index + 2 :]]
        made = marked(self._template, copies, shape.tools)
        other = self.shape(copies, shape.tools, made, only=index)
        if other.twin.marks[: last + 1] != (*marks[:last], (index + 1, "content")):
            raise BadRow(NO_END)
        literal = other.twin.literals[last]
        at, end = self._end(literals, literal, len(begun), other.strangers.get(index, {}))
        # White space may differ: some templates write the last turn without the newline.
        if not literal.startswith(begun) or literal[at:end].split() != closing.split():
            raise BadRow(NO_END)
        self._require_one_end(literal[end:])

    def _ends_as_plain(self, shape: Shape, index: int, written: str) -> bool:
        """Whether the last turn ends with what the template writes after a plain answer there."""
        plain = [*shape.messages[:index], {"role": "assistant", "content": True}]
        made = marked(self._template, plain, shape.tools)
        ending = made.literals[-1].lstrip()
        ends = [found for found in self._special.finditer(written) if found[0] in self._ends]
        return (
            made.marks[-1:] == ((index, "content"),)
            and written.endswith(ending)
            and len(written) - len(ending) <= ends[0].start()
        )

    def _require_one_end(self, rest: str) -> None:
        """`rest` stands between a turn's end and the next text."""
        ends = [found for found in self._special.finditer(rest) if found[0] in self._ends]
        if ends and rest[: ends[0].start()].strip():
            raise BadRow("the chat template ends an assistant turn twice")

    def _find_usual_prompt(self) -> str:
        """What the template writes to prompt for an answer to a user's text; "" if it knows no prompt."""
        asked = [{"role": "user", "content": True}]
        try:
            tail = marked(self._template, asked, (), add_generation_prompt=True).literals[-1]
            without = marked(self._template, asked, ()).literals[-1]
        except BadRow:
            return ""
        prompt = tail.removeprefix(without) if tail.startswith(without) else ""
        return prompt if prompt.strip() else ""


class _Estranger:
    """Puts strangers in place of the texts of a message's tool calls."""

    def __init__(self, used: int) -> None:
        self._used = used
        self.said: dict[str, str] = {}
        self.keys: list[str] = []  # these, and what else is no text of a call, stay as they are

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        self.keys.append(str(call.get("id", "")))
        own = {key: self._value(function[key]) for key in ("name", "arguments")}
        return {**call, "function": {**function, **own}}

    def _value(self, value: Any) -> Any:
        match value:
            case str() if value:
                stranger = f"QJXZ{self._used + len(self.said)}ZXJQ"
                self.said[stranger] = value
                return stranger
            case dict():
                self.keys += value
                return {key: self._value(each) for key, each in value.items()}
            case list():
                return [self._value(each) for each in value]
            case _:
                return value


def _filled(text: str, own: dict[str, str], form: Callable[[str], str]) -> str:
    return _STRANGE.sub(lambda found: form(own[found[0]]), text)


def _json(text: str) -> str:
    return encode_basestring(text)[1:-1]


def _ascii_json(text: str) -> str:
    return encode_basestring_ascii(text)[1:-1]


def follower_of(message: Message) -> Message:
    """A message that may follow the last one: after a call the model stops for its result."""
    if "tool_calls" not in message:
        return {"role": "user", "content": True}
    call = message["tool_calls"][-1]
    follower = {"role": "tool", "name": call["function"]["name"], "content": True}
    return follower | ({"tool_call_id": call["id"]} if "id" in call else {})
