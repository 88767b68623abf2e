"""Rows -> conversations: what the record formats of this field mean, told in one shape.

A row that does not say exactly one conversation, or trains nothing, is a BadRow with the reason.
Texts stay as they are, and a field that is null counts as absent: tables fill their gaps so.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.data.conversation import BadRow, Conversation, Message
from jobs.data.turns import CALL, read_turns, role_of
from jobs.data.values import as_list, check_characters, check_json, from_json, kind_of
from jobs.spec import RecordFormat

_CHAT_FIELDS = ("system", "tools", "functions")
# Per format: the fields that make a record of it (any one of these sets), and all that it knows.
_FORMATS: dict[RecordFormat, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "messages": ((("messages",),), ("messages", *_CHAT_FIELDS)),
    "sharegpt": (
        (("conversations",), ("conversation",)),
        ("conversations", "conversation", *_CHAT_FIELDS),
    ),
    "alpaca": (
        (("instruction", "output"),),
        ("instruction", "input", "output", "history", *_CHAT_FIELDS),
    ),
    "prompt_completion": ((("prompt", "completion"),), ("prompt", "completion", *_CHAT_FIELDS)),
    "text": ((("text",),), ("text",)),
}
_WHAT_FORMATS_HAVE = (
    "a record has `messages` (role, content), or `conversations` (from, value), or `instruction` "
    "and `output` (alpaca), or `prompt` and `completion`, or `text`; `format` chooses between "
    "them, `columns` gives fields of other names"
)

_MEDIA_FIELDS = ("images", "videos", "audios")


def detect_format(record: Any, columns: Mapping[str, str]) -> RecordFormat:
    """The format of a record, or BadRow saying what was seen."""
    known = dict.fromkeys(field for _, fields in _FORMATS.values() for field in fields)
    _check_columns(columns, known, "no format has")
    fields = _renamed(record, columns)
    _refuse_preferences(fields)
    found = [
        name
        for name, (needed, known) in _FORMATS.items()
        if any(all(fields.get(field) is not None for field in each) for each in needed)
        and columns.keys() <= set(known)
    ]
    if len(found) != 1:
        raise BadRow(
            f"its format is not clear: it has the fields {_names(fields)}, and {_WHAT_FORMATS_HAVE}"
        )
    return found[0]


def to_conversation(
    record: Any, record_format: RecordFormat, columns: Mapping[str, str]
) -> Conversation:
    """The conversation in a record. Raises BadRow where it is none, or trains nothing."""
    if columns:
        _check_columns(columns, _FORMATS[record_format][1], f"the format {record_format} lacks")
    fields = _renamed(record, columns)
    _refuse_preferences(fields)
    for field in _MEDIA_FIELDS:
        if fields.get(field):
            raise BadRow(f"has {field}, and only text is trained")
    match record_format:
        case "text":
            text = _text(fields, "text")
            if not text.strip():
                raise BadRow("its `text` is empty, so there is nothing to train on")
            return Conversation(text=text)
        case "messages":
            messages, untrained = read_turns(_turns(fields, "messages"))
        case "sharegpt":
            other = fields.get("conversations") is None and fields.get("conversation") is not None
            messages, untrained = read_turns(
                _turns(fields, "conversation" if other else "conversations")
            )
        case "alpaca":
            messages, untrained = _alpaca(fields)
        case "prompt_completion":
            messages, untrained = _prompt_completion(fields)
    system = fields.get("system")
    if system is not None and system != "":
        system = _text(fields, "system")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
            untrained = {index + 1 for index in untrained}
        elif messages[0]["content"] != system:
            raise BadRow("has a `system` text and another one in its first turn")
    return Conversation(tuple(messages), _tools(fields), frozenset(untrained))


# --- fields of a record


def _check_columns(columns: Mapping[str, str], known: Iterable[str], what: str) -> None:
    if unknown := [field for field in columns if field not in known]:
        raise BadRow(
            f"cannot be read: `columns` names {_names(unknown)}, which {what}; "
            f"known are {', '.join(known)}"
        )


def _renamed(record: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under the formats' own field names."""
    if isinstance(record, BadRow):  # there is no record
        raise record
    if not isinstance(record, dict):
        raise BadRow(f"is {kind_of(record)}, not an object")
    if not columns:
        return record
    taken = {*columns, *columns.values()}
    fields = {field: value for field, value in record.items() if field not in taken}
    for field, theirs in columns.items():
        if theirs not in record:
            raise BadRow(
                f"has no field {_names([theirs])}, which `columns` names for `{field}`; "
                f"it has {_names(record)}"
            )
        fields[field] = record[theirs]
    return fields


def _refuse_preferences(fields: dict[str, Any]) -> None:
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        raise BadRow(
            "holds preferences (`chosen` and `rejected`); the objective sft needs records that "
            "hold one answer"
        )


def _names(fields: Iterable[str]) -> str:
    """Field names for a message; one that cannot be printed is shown by its escapes."""
    if isinstance(fields, dict):
        fields = [field for field, value in fields.items() if value is not None]
    names = sorted(map(str, fields))
    shown = [n if n.isprintable() and len(n) < 50 else reprlib.repr(n) for n in names[:20]]
    return ", ".join(shown + ["..."] * (len(names) > 20)) or "nothing"


def _missing(fields: dict[str, Any], field: str) -> BadRow:
    return BadRow(f"has no `{field}`; its fields are {_names(fields)}")


def _text(fields: dict[str, Any], field: str) -> str:
    text = fields.get(field)
    if text is None:
        raise _missing(fields, field)
    if not isinstance(text, str):
        raise BadRow(f"its `{field}` is {kind_of(text)}, not a text")
    try:
        check_characters(text)
    except BadRow as reason:
        raise BadRow(f"its `{field}` {reason}") from None
    return text


def _turns(fields: dict[str, Any], field: str) -> list[Any]:
    turns = fields.get(field)
    if turns is None:
        raise _missing(fields, field)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"its `{field}` is no list of turns")
    return turns


def _tools(fields: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    given = [field for field in ("tools", "functions") if fields.get(field) not in (None, "", [])]
    if not given:
        return ()
    field = given[0]
    if len(given) > 1:
        raise BadRow("has both `tools` and `functions`")
    try:
        tools = from_json(fields[field])
        return tuple(_tool(from_json(tool)) for tool in as_list(tools) if tools is not None)
    except BadRow as reason:
        raise BadRow(f"its `{field}` {reason}") from None


def _tool(tool: Any) -> dict[str, Any]:
    others = {key: tool[key] for key in tool if key != "type"} if isinstance(tool, dict) else {}
    if others.get("function") is None:  # the bare schema of a function
        others.pop("function", None)
        others = {"function": others}
    function = others["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("holds something that is no schema of a function with a name")
    check_json(others)
    return {"type": "function", **others}


# --- the formats


def _alpaca(fields: dict[str, Any]) -> tuple[list[Message], set[int]]:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    more = "" if fields.get("input") is None else _text(fields, "input")
    messages: list[Message] = []
    history = fields.get("history")
    if history is not None and history != "":
        for pair in history if isinstance(history, list) else [history]:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise BadRow("its `history` is no list of pairs: question, answer")
            messages.append({"role": "user", "content": pair[0]})
            messages.append({"role": "assistant", "content": pair[1]})
    content = f"{instruction}\n\n{more}" if instruction and more else instruction or more
    messages.append({"role": "user", "content": content})
    messages.append({"role": "assistant", "content": output})
    messages, untrained = read_turns(messages)
    messages[-2].update(instruction=instruction, input=more)
    return messages, untrained


def _prompt_completion(fields: dict[str, Any]) -> tuple[list[Message], set[int]]:
    sides: list[list[Any]] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields.get(field), str):
            sides.append([{"role": role, "content": fields[field]}])
        else:
            sides.append(_turns(fields, field))
    prompt, completion = sides
    first = completion[0]
    if isinstance(first, dict) and role_of(first) not in (None, "assistant", CALL):
        raise BadRow(f"its `completion` begins with a {role_of(first)} turn, not with an answer")
    return read_turns(prompt + completion, context=len(prompt))
