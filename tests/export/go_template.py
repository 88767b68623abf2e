"""The part of Go's text/template that Modelfiles are written in, read as Go reads it.

Made for the tests alone, and from the language's description, so that what is compared is not what
made the template. `main.go` in gotemplate/ is the same with Go's own package, for where there is a Go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(?:(-)\s)?(.*?)(?:\s(-))?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s]+')
_SPACE = " \t\r\n"  # what a trim marker takes off

Message = dict[str, str]


class _Continue(Exception):
    pass


@dataclass
class _Node:
    """A text, an action, or a block of either with what comes after `else`."""

    kind: str
    words: list[str] = field(default_factory=list)
    text: str = ""
    body: list[_Node] = field(default_factory=list)
    other: list[_Node] = field(default_factory=list)


def render(template: str, messages: Sequence[Message]) -> str:
    """What Ollama gives to the model: neighbours of one role are one message."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    nodes, rest, _ = _parse(list(_tokens(template)), 0)
    assert rest == len(list(_tokens(template)))
    out: list[str] = []
    root = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in joined]}
    _run(nodes, root, {}, out)
    return "".join(out)


def _tokens(template: str) -> Iterator[tuple[str, str]]:
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip(_SPACE) if trim else text
        yield "text", text.rstrip(_SPACE) if found[1] else text
        yield "action", found[2].strip()
        at, trim = found.end(), bool(found[3])
    yield "text", template[at:].lstrip(_SPACE) if trim else template[at:]


def _parse(tokens: list[tuple[str, str]], at: int) -> tuple[list[_Node], int, list[str]]:
    """Nodes up to an `else` or `end` that is not theirs, where that stands, and its words."""
    nodes: list[_Node] = []
    while at < len(tokens):
        kind, text = tokens[at]
        words = _WORD.findall(text) if kind == "action" else []
        if kind == "text":
            nodes.append(_Node("text", text=text))
        elif words[0] in ("else", "end"):
            return nodes, at, words
        elif words[0] in ("if", "range"):
            node, at = _block(tokens, at, words)
            nodes.append(node)
        else:
            nodes.append(_Node("action", words))
        at += 1
    return nodes, at, []


def _block(tokens: list[tuple[str, str]], at: int, words: list[str]) -> tuple[_Node, int]:
    node = _Node(words[0], words[1:])
    node.body, at, closing = _parse(tokens, at + 1)
    if closing[:2] == ["else", "if"]:
        inner, at = _block(tokens, at, closing[1:])
        node.other = [inner]
    elif closing[0] == "else":
        node.other, at, closing = _parse(tokens, at + 1)
        assert closing == ["end"]
    return node, at


def _run(nodes: list[_Node], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "if":
            _run(
                node.body if _value(node.words, dot, variables) else node.other, dot, variables, out
            )
        elif node.kind == "range":
            for each in _value(node.words, dot, variables):
                try:
                    _run(node.body, each, variables, out)
                except _Continue:
                    continue
        elif node.words == ["continue"]:
            raise _Continue
        elif len(node.words) > 1 and node.words[1] in (":=", "="):
            variables[node.words[0]] = _value(node.words[2:], dot, variables)
        else:
            out.append(_value(node.words, dot, variables))


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    name, *rest = words
    arguments = [_value([word], dot, variables) for word in rest]
    if name == "eq":
        return arguments[0] in arguments[1:]
    if name == "printf":
        return arguments[0] % tuple(arguments[1:])
    assert not rest, words
    if name.startswith('"'):
        return json.loads(name)
    if name.startswith("$"):
        return variables[name]
    assert name.startswith("."), words
    return dot[name[1:]]
