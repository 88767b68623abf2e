from __future__ import annotations

from typing import Any

import pytest

from jobs.data.formats import BadRow, detect_format, to_messages

MESSAGES = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}


def test_both_formats_mean_the_same_conversation() -> None:
    expected = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    for record in (MESSAGES, SHAREGPT):
        assert to_messages(record, detect_format(record)) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "text"),
        ({}, "nothing"),
        ({**MESSAGES, **SHAREGPT}, "conversations, messages"),
        (["x"], "list"),
    ],
)
def test_an_unclear_format_says_what_was_seen(record: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        detect_format(record)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (turns(("user", "U")), "no assistant turn"),
        (turns(("user", "U"), ("assistant", "A"), ("user", "?")), "ends with a user turn"),
        (turns(("user", "U"), ("assistant", " \n")), "turn 2 is an empty answer"),
        (turns(("user", "U"), ("robot", "A")), "turn 2 has the role 'robot'"),
        (turns(("user", None), ("assistant", "A")), "turn 1 has no text"),
        ({"messages": []}, "no list of turns"),
        ({"messages": "hello"}, "no list of turns"),
        ({"messages": ["hello"]}, "turn 1 is a str"),
        ("hello", "is a str"),
    ],
)
def test_a_row_that_trains_nothing_or_is_unclear_is_refused(record: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_messages(record, "messages")


@pytest.mark.parametrize("role", [["user"], {"a": 1}, None, 7])
def test_a_role_that_is_no_text_is_refused(role: Any) -> None:
    with pytest.raises(BadRow, match="turn 1 has the role"):
        to_messages(turns((role, "U"), ("assistant", "A")), "messages")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(BadRow, match="turn 2 holds half a surrogate pair"):
        to_messages(turns(("user", "U"), ("assistant", "\ud83d")), "messages")
