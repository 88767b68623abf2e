"""The turns of a conversation, under whatever names and in whatever parts, -> messages."""

from __future__ import annotations

import reprlib
from typing import Any

from jobs.data.conversation import BadRow, Message
from jobs.data.values import as_list, check_characters, check_json, from_json, kind_of

CALL = "call"  # a turn that is nothing but tool calls
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def read_turns(turns: list[Any], context: int = 0) -> tuple[list[Message], set[int]]:
    """Messages and the indices of untrained ones, among them all of the first `context` turns."""
    messages: list[Message] = []
    untrained: set[int] = set()
    numbers: list[int] = []  # of the turn that each message began with
    for number, turn in enumerate(turns, 1):
        try:
            role, message = _message(turn)
            trained = number > context
            if message["role"] == "assistant" and len(turn) > 2:
                trained &= _is_trained(turn)
        except BadRow as reason:
            raise BadRow(f"turn {number} {reason}") from None
        if role == CALL and messages and messages[-1]["role"] == "assistant":
            # What the assistant says and calls in one go is one message.
            before = messages[-1]
            if trained == (len(messages) - 1 not in untrained) and len(message) == 3:
                calls = before.get("tool_calls", []) + message["tool_calls"]
                messages[-1] = _assistant(
                    before["content"], calls, before.get("reasoning_content", "")
                )
                continue
        if not trained and message["role"] == "assistant":
            untrained.add(len(messages))
        messages.append(message)
        numbers.append(number)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no assistant turn, so there is nothing to train on")
    if len(untrained) == len(answers):
        raise BadRow("has no assistant turn that is trained: the weight of each is 0")
    if answers[-1] != len(messages) - 1:
        raise BadRow(f"ends with a {messages[-1]['role']} turn, not with an answer")
    for index in answers:
        message = messages[index]
        empty = not message["content"].strip() and "tool_calls" not in message
        if empty and index not in untrained:
            raise BadRow(f"turn {numbers[index]} is an empty answer")
    return messages, untrained


def role_of(turn: dict[str, Any]) -> str | None:
    name = turn.get("role")
    if name is None:
        name = turn.get("from")
    if not isinstance(name, str):
        return None
    return _ROLES.get(name) or _ROLES.get(name.lower())


def _message(turn: Any) -> tuple[str, Message]:
    """A turn's role (or CALL) and message. The reasons of BadRow go on after "turn 7"."""
    if not isinstance(turn, dict):
        raise BadRow(f"is {kind_of(turn)}, not an object")
    role = role_of(turn)
    if role is None:
        name = turn.get("from") if turn.get("role") is None else turn["role"]
        raise BadRow(f"has the role {reprlib.repr(name)}, known are {', '.join(_ROLES)}")
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if isinstance(content, str):
        check_characters(content)
        if len(turn) == 2 and role != CALL:  # nothing but role and content
            return role, {"role": role, "content": content}
    text, thought, calls = _content(role, content)
    thoughts = {thought} if thought else set()
    for field in _REASONING_FIELDS:
        value = turn.get(field)
        if not (value is None or isinstance(value, str)):
            raise BadRow(f"has {kind_of(value)} in `{field}`, not a text")
        if value:
            check_characters(value)
            thoughts.add(value)
    said = [calls, _calls(turn.get("tool_calls")), _calls(turn.get("function_call"))]
    said = [each for each in said if each]
    if len(thoughts) > 1 or len(said) > 1:
        raise BadRow(f"gives its {'tool calls' if len(said) > 1 else 'reasoning'} in two ways")
    thought, calls = "".join(thoughts), said[0] if said else []
    if text is None and calls:
        text = ""
    if text is None:
        raise BadRow(f"has no text in `{'value' if 'from' in turn else 'content'}`")
    if role in ("assistant", CALL):
        return role, _assistant(text, calls, thought)
    if thought or calls:
        raise BadRow(f"is a {role} turn with {'tool calls' if calls else 'reasoning'}")
    message = {"role": role, "content": text}
    if role == "tool":
        for field in ("name", "tool_call_id"):
            value = turn.get(field)
            if value is not None:
                if not isinstance(value, str):
                    raise BadRow(f"has {kind_of(value)} in `{field}`, not a text")
                check_characters(value)
                message[field] = value
    return role, message


def _assistant(text: str, calls: list[dict[str, Any]], thought: str) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    if thought:
        message["reasoning_content"] = thought
    return message


def _content(role: str, content: Any) -> tuple[str | None, str, list[dict[str, Any]]]:
    """Text (None where there is none), reasoning and tool calls of a turn's content."""
    if role == CALL:
        calls = _calls(content)
        if not calls:
            raise BadRow("has no tool call")
        return "", "", calls
    if isinstance(content, str):
        return content, "", []
    if not isinstance(content, list):
        return None, "", []
    texts: list[str] = []
    thoughts: list[str] = []
    calls = []
    for part in content:
        if not isinstance(part, dict):
            raise BadRow(f"has a part that is {kind_of(part)}, not an object")
        kind = part.get("type")
        value = part.get("value")
        match kind:
            case "text" | "reasoning" | "thinking":
                for key in ("text", kind):
                    value = part.get(key) if value is None else value
                if not isinstance(value, str):
                    raise BadRow(f"has a {kind} part without text")
                check_characters(value)
                (texts if kind == "text" else thoughts).append(value)
            case "tool_call" | "function_call":
                calls += _calls(part if value is None else value)
            case _:
                raise BadRow(f"has a part of type {reprlib.repr(kind)}, and only text is trained")
    return "".join(texts), "".join(thoughts), calls


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls: one or a list of them, as objects or as JSON text."""
    if value is None or value == "":
        return []
    try:
        return [_call(call) for call in as_list(from_json(value))]
    except BadRow as reason:
        raise BadRow(f"has a tool call that {reason}") from None


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRow("is no object")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRow("has no name")
    if "arguments" not in function and "parameters" not in function:
        raise BadRow("has no `arguments`")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    arguments = from_json(arguments, "has arguments that are")
    if not isinstance(arguments, dict):
        raise BadRow(f"has {kind_of(arguments)} for its arguments, not an object")
    checked: dict[str, Any] = {
        "type": "function", "function": {"name": name, "arguments": arguments},
    }  # fmt: skip
    if isinstance(call.get("id"), str) and call["id"]:
        checked["id"] = call["id"]  # some templates write it
    check_json(checked)
    return checked


def _is_trained(turn: dict[str, Any]) -> bool:
    trained = turn.get("train")
    if not (trained is None or isinstance(trained, bool)):
        raise BadRow("has a `train` that is neither true nor false")
    for field in ("weight", "loss_weight"):
        weight = turn.get(field)
        if weight is None:
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"has the {field} {reprlib.repr(weight)}, and only 0 and 1 are exact")
        trained = trained is not False and weight == 1
    return trained is not False
