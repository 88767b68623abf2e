"""Rows -> conversations: what the record formats of this field mean, told in one shape.

A conversation is a list of messages, `{"role": ..., "content": ...}`, with the roles system, user
and assistant. A row that does not say exactly that is a BadRow with the reason.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class BadRow(Exception):
    """Why a row cannot be used; the caller knows its place."""


def detect_format(value: Any) -> str:
    """The format of a record, or BadRow saying what was seen."""
    if not isinstance(value, dict):
        raise BadRow(f"is a {type(value).__name__}, not an object")
    found = [
        name
        for name, key in (("messages", "messages"), ("sharegpt", "conversations"))
        if key in value
    ]
    if len(found) != 1:
        seen = ", ".join(sorted(map(str, value))) or "nothing"
        raise BadRow(
            f"its format is not clear: it has the fields {seen}, and a record has either "
            "`messages` (role, content) or `conversations` (from, value)"
        )
    return found[0]


def to_messages(value: Any, record_format: str) -> list[Message]:
    """The conversation in a record. Raises BadRow where it is none, or trains nothing."""
    if not isinstance(value, dict):
        raise BadRow(f"is a {type(value).__name__}, not an object")
    if record_format == "messages":
        messages = _turns(value, "messages", "role", "content", {role: role for role in ROLES})
    else:
        messages = _turns(value, "conversations", "from", "value", SHAREGPT_ROLES)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant turn, so there is nothing to train on")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"ends with a {messages[-1]['role']} turn, not with an answer")
    return messages


def _turns(
    value: dict[str, Any], field: str, role_key: str, text_key: str, roles: dict[str, str]
) -> list[Message]:
    turns = value.get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"its `{field}` is no list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is a {type(turn).__name__}, not an object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(f"turn {number} has the {role_key} {role!r}, known are {', '.join(roles)}")
        if not isinstance(text, str):
            raise BadRow(f"turn {number} has no text in `{text_key}`")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadRow(f"turn {number} holds half a surrogate pair, which is no character")
        if roles[role] == "assistant" and not text.strip():
            raise BadRow(f"turn {number} is an empty answer")
        messages.append({"role": roles[role], "content": text})
    return messages
