"""Chat templates by name, from a file, or made from a prompt format.

A prompt format is a text with placeholders, such as

    ### Instruction:
    {instruction}

    ### Response:
    {output}

It becomes a Jinja template, so that from here on there is one kind of template: transformers,
llama.cpp and every server that reads the published model write the same prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jobs.errors import AccessError, SpecError

FIELD = "model.chat_template"
SUFFIXES = (".jinja", ".jinja2", ".j2")
PLACEHOLDERS = ("instruction", "input", "output", "system")

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models with a chat template of its own, and what the tokenizer needs for it."""

    name: str
    special_tokens: tuple[str, ...] = ()  # besides bos_token and eos_token
    end_of_turn: str | None = None  # None: eos_token

    @property
    def source(self) -> str:
        return (_FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")


_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        Family("llama-3", _LLAMA_3, "<|eot_id|>"),
        Family("llama-3.1", _LLAMA_3, "<|eot_id|>"),
        Family("llama-2"),
        Family("gemma", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        Family("mistral", ("[INST]", "[/INST]")),
        Family("phi-3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
        Family("phi-4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>"),
        Family("alpaca"),
        Family("vicuna"),
        Family("zephyr"),
    )
}


def resolve_template(chosen: str, own: str | None) -> tuple[str, str]:
    """The Jinja source that `model.chat_template` means, and what to call it.

    `own` is the tokenizer's own template; LookupError where `auto` finds none. Raises AccessError
    for a file that cannot be read, SpecError for what means nothing.
    """
    if chosen == "auto":
        if own is None:
            raise LookupError("the tokenizer has no chat template of its own")
        return own, "the tokenizer's own"
    if chosen in FAMILIES:
        return FAMILIES[chosen].source, chosen
    if any(f"{{{name}}}" in chosen for name in PLACEHOLDERS):
        return prompt_format_template(chosen), "the prompt format"
    if chosen.lower().endswith(SUFFIXES):
        return _read(chosen), chosen
    nearest = difflib.get_close_matches(chosen.lower(), FAMILIES, n=1, cutoff=0.5)
    raise SpecError(
        f"{FIELD} {chosen!r} names no chat template"
        + (f"; did you mean {nearest[0]}?" if nearest else ""),
        f"set it to auto, to a family ({', '.join(FAMILIES)}), to the path of a "
        f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or to a prompt format with {{output}} "
        "and {instruction} or {input}",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise AccessError(
            f"the chat template {path} cannot be read: {error}",
            f"set {FIELD} to a readable UTF-8 file, to a family's name, or to auto",
        ) from None


class _Placeholder(str):
    """A placeholder's name, told apart from literal text."""

    __slots__ = ()


_Line = tuple[str, ...]  # literals and placeholders


class _Format(NamedTuple):
    lines: list[_Line]  # up to {output}, which the last one goes on with
    after: str  # the literal text after {output}

    @property
    def names(self) -> set[str]:
        return {name for line in self.lines for name in _names(line)}


def _names(line: _Line) -> set[str]:
    return {str(part) for part in line if isinstance(part, _Placeholder)}


def prompt_format_template(text: str) -> str:
    """The Jinja template of a prompt format. Raises SpecError.

    A user's turn and the answer to it are one exchange, and each repeats the format, the system
    text only in the first. A block between blank lines whose only placeholders are {system} and
    {input} is left out with its heading where they are empty, and so is such a line in a block
    that stays. eos_token is written after {output} unless the format writes it there, and bos_token
    at the start likewise.
    """
    form = _parse(text)
    names = form.names
    raising = "{{{{- raise_exception('The prompt format {}') }}}}".format
    lines = [
        f"{{%- set after = {_quote(form.after)} %}}",
        f"{{%- set ending = {_quote(form.after.lstrip())} %}}",
        "{%- if tools %}",
        "    " + raising("has no form for tools."),
        "{%- endif %}",
        "{%- if messages[0].role == 'system' %}",
        "    {%- set given = messages[0].content %}",
        "    {%- set turns = messages[1:] %}",
        "{%- else %}",
        "    {%- set given = '' %}",
        "    {%- set turns = messages %}",
        "{%- endif %}",
    ]
    if "system" not in names:
        lines += [
            "{%- if given %}",
            "    " + raising("has no place for a system turn: write {system} where it belongs."),
            "{%- endif %}",
        ]
    lines += [
        "{%- for m in turns %}",
        "    {%- if m.role == 'tool' or m.tool_calls %}",
        "        " + raising("has no form for tool calls and their results."),
        "    {%- elif m.reasoning_content %}",
        "        " + raising("has no form for reasoning_content."),
        "    {%- elif m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
        "        "
        + raising("takes an optional system turn first, then user and assistant in turn."),
        "    {%- endif %}",
        "    {%- if m.role == 'user' %}",
        *(f"        {line}" for line in [*_values(names), *_prompts(form)]),
        "        {%- if loop.first and bos_token is defined and bos_token %}",
        "            {%- if not opening.startswith(bos_token) %}",
        "                {{- bos_token }}",
        "            {%- endif %}",
        "        {%- endif %}",
        "        {{- prompt }}",
        "    {%- else %}",
        "        {{- m.content }}",
        "        {%- if eos_token is defined and eos_token and not ending.startswith(eos_token) %}",
        "            {{- eos_token }}",
        "        {%- endif %}",
        "        {{- after }}",
        "    {%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines) + "\n"


def _parse(text: str) -> _Format:
    parts = list(_parts(text))
    outputs = [i for i, part in enumerate(parts) if _is(part) and part == "output"]
    if not outputs:
        raise _wrong("has no {output}, so the answer has no place")
    if len(outputs) > 1:
        raise _wrong(f"has {{output}} {len(outputs)} times; an answer stands in one place")
    before, after = parts[: outputs[0]], parts[outputs[0] + 1 :]
    late = [part for part in after if _is(part)]
    if late:
        raise _wrong(f"has {{{late[0]}}} after {{output}}, which must be the last placeholder")
    if not any(_is(part) and part in ("instruction", "input") for part in before):
        raise _wrong("has neither {instruction} nor {input}, so the question has no place")
    lines: list[list[str]] = [[]]
    for part in before:
        if _is(part):
            lines[-1].append(part)
            continue
        first, *others = part.split("\n")
        lines[-1].append(first)
        lines += [[other] for other in others]
    return _Format([tuple(part for part in line if part) for line in lines], "".join(after))


def _is(part: str) -> bool:
    return isinstance(part, _Placeholder)


def _parts(text: str) -> Iterator[str]:
    """The format's literals and placeholders in their order."""
    literal = ""
    at = 0
    while at < len(text):
        if text[at : at + 2] in ("{{", "}}"):
            literal += text[at]
            at += 2
        elif text[at] == "{":
            name = text[at + 1 :].partition("}")[0]
            if name not in PLACEHOLDERS:
                if not name.replace(".", "_").strip().isidentifier():
                    raise _wrong("has a { that begins no placeholder; write {{ for the brace")
                raise _wrong(
                    f"has the unknown placeholder {{{name}}}; there are "
                    + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                )
            yield literal
            yield _Placeholder(name)
            literal = ""
            at += len(name) + 2
        elif text[at] == "}":
            raise _wrong("has a } that ends no placeholder; write }} for the brace")
        else:
            literal += text[at]
            at += 1
    yield literal


def _wrong(what: str) -> SpecError:
    return SpecError(
        f"the prompt format in {FIELD} {what}",
        "write it like '### Instruction:\\n{instruction}\\n\\n### Response:\\n{output}'",
    )


def _values(names: set[str]) -> list[str]:
    """Jinja that takes the placeholders' values from the message `m`.

    `content` holds instruction and input together, so it serves where the format has a place for
    one of them and the message has both: nothing is lost.
    """
    lines = ["{%- set system = given if loop.first else '' %}"]
    if {"instruction", "input"} <= names:
        lines += [
            "{%- if m.instruction is defined or m.input is defined %}",
            "    {%- set instruction = m.instruction or '' %}",
            "    {%- set input = m.input or '' %}",
            "{%- else %}",
            "    {%- set instruction = m.content %}",
            "    {%- set input = '' %}",
            "{%- endif %}",
        ]
    elif "instruction" in names:
        lines.append(
            "{%- set instruction = m.instruction if m.instruction and not m.input else m.content %}"
        )
    else:
        lines.append("{%- set input = m.input if m.input and not m.instruction else m.content %}")
    return lines


def _prompts(form: _Format) -> Iterator[str]:
    """Jinja that sets `prompt`, one way for each combination of empty values, and its `opening`."""
    optional = [name for name in ("system", "input") if name in form.names]
    cases: list[tuple[set[str], str]] = [(set(), "")]
    for name in optional:
        cases = [
            (empty | more, f"{test} and {word}{name}".removeprefix(" and "))
            for empty, test in cases
            for more, word in ((set[str](), ""), ({name}, "not "))
        ]
    for number, (empty, test) in enumerate(cases):
        if optional:
            yield f"{{%- {'elif' if number else 'if'} {test} %}}"
        parts = _without(form.lines, empty)
        opening = "" if _is(parts[0]) else parts[0]
        yield f"    {{%- set opening = {_quote(opening)} %}}"
        terms = (part if _is(part) else _quote(part) for part in parts)
        yield f"    {{%- set prompt = {' ~ '.join(terms)} %}}"
    if optional:
        yield "{%- endif %}"


def _without(lines: list[_Line], empty: set[str]) -> list[str]:
    """The format up to {output} less what only the `empty` placeholders would fill."""

    def is_blank(line: _Line) -> bool:
        return not "".join(line).strip()

    def drops(names: set[str]) -> bool:
        return bool(names) and names <= empty

    kept: list[_Line] = []
    dropped = False
    last = len(lines) - 1  # {output} stands in it, so it always stays
    for blank, group in groupby(range(len(lines)), key=lambda i: i != last and is_blank(lines[i])):
        numbers = list(group)
        if blank:
            # The blank lines after a block go with it.
            kept += [] if dropped else [lines[i] for i in numbers]
            continue
        names = {name for i in numbers for name in _names(lines[i])}
        dropped = last not in numbers and drops(names)
        if not dropped:
            kept += [lines[i] for i in numbers if i == last or not drops(_names(lines[i]))]
    # Join the lines, and literals that stand side by side.
    parts: list[str] = [""]
    for number, line in enumerate(kept):
        for part in (*(["\n"] if number else []), *line):
            if _is(part) or _is(parts[-1]):
                parts.append(part)
            else:
                parts[-1] += part
    return [part for part in parts if part] or [""]


_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"})


def _quote(text: str) -> str:
    """`text` as a Jinja string literal that every engine reads alike.

    Engines differ on rarer escapes, so there are none. Pairs that open or close Jinja's own tags
    are taken apart, for tools that look for these before they look for strings.
    """
    pieces = [""]
    for character in text:
        if pieces[-1][-1:] + character in ("{{", "}}", "{%", "%}", "{#", "#}"):
            pieces.append("")
        pieces[-1] += character
    quoted = " ~ ".join(f"'{piece.translate(_ESCAPES)}'" for piece in pieces)
    return f"({quoted})" if len(pieces) > 1 else quoted
