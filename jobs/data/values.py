"""Checks of values that come from anywhere. The reasons of BadRow go on after what is wrong."""

from __future__ import annotations

import json
from typing import Any

from jobs.data.conversation import BadRow

_KINDS = {
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
    float: "a number", type(None): "null",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """What a value is in JSON's terms, with its article; a type that JSON lacks by Python's name."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def from_json(value: Any, what: str = "is") -> Any:
    """What a JSON text says; anything but a text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} no valid JSON text: {error}") from None


def check_json(value: Any) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"holds what JSON cannot say: {error}") from None
    check_characters(text)


def check_characters(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("holds half a surrogate pair, which is no character") from None
