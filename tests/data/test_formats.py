from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.conversation import ROLES, BadRow, Conversation, Message
from jobs.data.formats import detect_format, to_conversation
from jobs.spec import RecordFormat

SAMPLES = Path(__file__).parents[3] / "shared" / "data"

ASKED: Message = {"role": "user", "content": "U"}
ANSWERED: Message = {"role": "assistant", "content": "A"}
MESSAGES = {"messages": [ASKED, ANSWERED]}
SHAREGPT = {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}
ALPACA = {"instruction": "U", "output": "A"}
PROMPT = {"prompt": "U", "completion": "A"}


def read(record: Any, columns: dict[str, str] | None = None) -> Conversation:
    return to_conversation(record, detect_format(record, columns or {}), columns or {})


def messages_of(record: Any) -> list[Message]:
    return list(read(record).messages)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", **fields}]}


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# --- which format


@pytest.mark.parametrize(
    ("record", "record_format"),
    [
        (MESSAGES, "messages"),
        (SHAREGPT, "sharegpt"),
        ({"conversation": SHAREGPT["conversations"]}, "sharegpt"),
        (PROMPT, "prompt_completion"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt_completion"),
        ({**MESSAGES, "conversations": None, "text": None}, "messages"),
    ],
)
def test_all_formats_mean_the_same_conversation(record: Any, record_format: str) -> None:
    assert detect_format(record, {}) == record_format
    assert read(record) == Conversation((ASKED, ANSWERED))


def test_the_other_formats_are_told_by_their_fields() -> None:
    assert detect_format(ALPACA, {}) == "alpaca"
    assert detect_format({"text": "x"}, {}) == "text"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "nothing"),
        ({"question": "x"}, "fields question, and a record has `messages`.*`text`"),
        ({"messages": None}, "nothing"),
        ({**MESSAGES, **SHAREGPT}, "conversations, messages"),
        ({**ALPACA, "text": "x"}, "instruction, output, text"),
        ({"\ud800": 1}, r"fields '\\ud800'"),
        (["x"], "list"),
    ],
)
def test_an_unclear_format_says_what_was_seen(record: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        detect_format(record, {})


# --- columns


def test_columns_name_the_fields_of_the_source() -> None:
    record = {"context": "I", "question": "U", "answer": "A", "output": 7}
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    assert [message["content"] for message in read(record, columns).messages] == ["U\n\nI", "A"]


def test_columns_may_swap_fields_and_take_one_away_from_another_format() -> None:
    swapped = read(
        {"prompt": "A", "completion": "U"}, {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped.messages == (ASKED, ANSWERED)
    assert detect_format({"text": "U", "output": "A"}, {"instruction": "text"}) == "alpaca"
    assert detect_format({**ALPACA, "text": "x"}, {"output": "output"}) == "alpaca"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"output": "reply"}, "no field reply.*`output`.*it has instruction, output"),
        ({"response": "output"}, "names response.*known are instruction, input, output"),
    ],
)
def test_wrong_columns_are_refused(columns: dict[str, str], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_conversation(ALPACA, "alpaca", columns)
    with pytest.raises(BadRow, match=reason.split("known")[0]):
        detect_format(ALPACA, columns)


# --- messages


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "system"),
        ("human", "user"),
        ("Human", "user"),
        *((name, "assistant") for name in ("gpt", "model", "bot", "ai", "chatgpt", "bing", "bard")),
        *((name, "tool") for name in ("function", "observation", "ipython", "function_response")),
    ],
)
def test_roles_have_many_names(name: str, role: str) -> None:
    messages = messages_of(turns((name, "X"), ("user", "U"), ("assistant", "A")))
    assert messages == [{"role": role, "content": "X"}, ASKED, ANSWERED]
    sharegpt = {"conversations": [{"from": name, "value": "X"}, ASKED, ANSWERED]}
    assert messages_of(sharegpt) == messages


def test_texts_stay_as_they_are() -> None:
    assert messages_of(turns(("user", " U\n"), ("assistant", "\n A ")))[1]["content"] == "\n A "
    assert messages_of({"prompt": "U ", "completion": " A"})[1]["content"] == " A"
    assert read({"text": " x\n"}) == Conversation(text=" x\n")


@pytest.mark.parametrize("key", ["text", "value"])
def test_content_in_parts(key: str) -> None:
    parts = [{"type": "text", key: "A"}, {"type": "text", key: " B", "unused": None}]
    assert messages_of(answer(content=parts))[1] == {"role": "assistant", "content": "A B"}
    assert (
        messages_of(turns(("user", [{"type": "text", key: "U"}]), ("assistant", "A")))[0] == ASKED
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "A", "reasoning_content": "T"},
        {"content": "A", "reasoning": "T", "reasoning_content": "T"},
        {"thinking": "T", "content": "A", "tool_calls": None, "weight": None},
        {"content": [{"type": "reasoning", "value": "T"}, {"type": "text", "value": "A"}]},
        {"content": [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "A"}]},
    ],
)
def test_reasoning(fields: dict[str, Any]) -> None:
    message = messages_of(answer(**fields))[1]
    assert list(message.items()) == [
        ("role", "assistant"),
        ("content", "A"),
        ("reasoning_content", "T"),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"content": None, "tool_calls": [called("f", x=1)]},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": json.dumps([called("f", x=1)])},
        {"content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
        {"content": [{"type": "function_call", "value": {"name": "f", "arguments": {"x": 1}}}]},
        {"content": [{"type": "tool_call", "name": "f", "arguments": {"x": 1}}]},
        {"content": [{"type": "tool_call", "value": {"name": "f", "parameters": {"x": 1}}}]},
    ],
)
def test_tool_calls(fields: dict[str, Any]) -> None:
    message = messages_of(answer(**fields))[1]
    assert message == {"role": "assistant", "content": "", "tool_calls": [called("f", x=1)]}


def test_a_call_keeps_its_id_because_some_templates_write_it() -> None:
    call = {"id": "call_0001", **called("f", x=1)}
    assert messages_of(answer(tool_calls=[call]))[1]["tool_calls"] == [call]
    assert "id" not in messages_of(answer(tool_calls=[{**call, "id": 7}]))[1]["tool_calls"][0]


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments(arguments: Any) -> None:
    record = answer(content="A", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    assert messages_of(record)[1]["tool_calls"] == [called("f")]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"function": {"name": "f", "arguments": "{x"}}], "arguments that are no valid JSON text"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "a list for its arguments"),
        ([{"function": {"name": "f"}}], "has no `arguments`"),
        ([{"function": {"arguments": {}}}], "has no name"),
        ([{"function": {"name": "f", "arguments": {"x": float("nan")}}}], "JSON cannot say"),
        ([{"function": {"name": "f", "arguments": '{"x": "\\ud83d"}'}}], "surrogate pair"),
        (["f"], "is no object"),
        ("f(1)", "no valid JSON text"),
        (7, "is no object"),
    ],
)
def test_a_broken_call_is_refused(calls: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=f"^turn 2 has a tool call that .*{reason}"):
        read(answer(content="A", tool_calls=calls))


def test_a_tool_turn_says_whose_result_it_is() -> None:
    result = {"role": "tool", "content": "R", "name": "f", "tool_call_id": "1", "weight": 7}
    messages = messages_of({"messages": [result, ASKED, ANSWERED]})
    assert list(messages[0]) == ["role", "content", "name", "tool_call_id"]


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}])
def test_weight_0_is_context_only(weight: dict[str, Any]) -> None:
    conversation = read({"messages": [ASKED, {**ANSWERED, **weight}, ASKED, ANSWERED]})
    assert conversation == Conversation(
        (ASKED, ANSWERED, ASKED, ANSWERED), untrained=frozenset({1})
    )
    empty = {"messages": [ASKED, {**ANSWERED, **weight, "content": ""}, ASKED, ANSWERED]}
    assert read(empty).untrained == {1}


@pytest.mark.parametrize(
    "weight", [{"weight": 1}, {"loss_weight": 1.0}, {"train": True}, {"weight": None}]
)
def test_weight_1_is_trained(weight: dict[str, Any]) -> None:
    assert read(answer(content="A", **weight)) == Conversation((ASKED, ANSWERED))


@pytest.mark.parametrize("weight", [0.5, -1, 2, True, "0", [], float("nan")])
def test_other_weights_are_refused(weight: Any) -> None:
    with pytest.raises(BadRow, match=r"turn 2 has the loss_weight .*only 0 and 1"):
        read(answer(content="A", loss_weight=weight))
    ignored = {"messages": [{**ASKED, "loss_weight": weight}, ANSWERED]}
    assert read(ignored) == Conversation((ASKED, ANSWERED))


# --- tools and system

SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [SCHEMA], "functions": None},
        {"tools": [{"type": "function", **SCHEMA}]},
        {"tools": json.dumps([SCHEMA])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [SCHEMA], "tools": []},
    ],
)
@pytest.mark.parametrize("record", [MESSAGES, SHAREGPT, ALPACA, PROMPT])
def test_tools(record: dict[str, Any], fields: dict[str, Any]) -> None:
    assert read({**record, **fields}).tools == (TOOL,)


@pytest.mark.parametrize("none", [None, "", [], "[]", "null"])
def test_no_tools(none: Any) -> None:
    assert read({**MESSAGES, "tools": none}).tools == ()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": "[{"}, "its `tools` is no valid JSON text"),
        ({"functions": 7}, "its `functions` holds something that is no schema"),
        ({"tools": [{"type": "function", "function": "f"}]}, "no schema of a function"),
        ({"tools": [{**SCHEMA, "description": "\ud83d"}]}, "half a surrogate pair"),
        ({"tools": [TOOL], "functions": [SCHEMA]}, "both"),
    ],
)
def test_broken_tools_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read({**MESSAGES, **fields})


def test_a_system_field_is_the_first_message() -> None:
    system = {"role": "system", "content": "S"}
    untrained = {"messages": [{**ANSWERED, "weight": 0}, ASKED, ANSWERED]}
    conversation = read({**untrained, "system": "S"})
    assert conversation.messages == (system, ANSWERED, ASKED, ANSWERED)
    assert conversation.untrained == {1}
    assert messages_of({**SHAREGPT, "system": "S"}) == [system, ASKED, ANSWERED]
    assert messages_of({**SHAREGPT, "system": ""}) == [ASKED, ANSWERED]
    own = {"messages": [system, ASKED, ANSWERED]}
    assert messages_of({**own, "system": "S"}) == [system, ASKED, ANSWERED]
    with pytest.raises(BadRow, match="another one in its first turn"):
        read({**own, "system": "other"})


# --- sharegpt


def sharegpt(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in pairs]}


CALL_TEXT = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize("value", [CALL_TEXT, f"[{CALL_TEXT}]", json.loads(CALL_TEXT)])
def test_a_function_call_turn(value: Any) -> None:
    record = sharegpt(("human", "U"), ("function_call", value), ("observation", "R"), ("gpt", "A"))
    call = {"role": "assistant", "content": "", "tool_calls": [called("f", x=1)]}
    assert messages_of(record) == [ASKED, call, {"role": "tool", "content": "R"}, ANSWERED]


def test_what_one_side_says_and_calls_in_one_go_is_one_message() -> None:
    record = sharegpt(
        ("human", "U"), ("gpt", ""), ("function_call", CALL_TEXT), ("function_call", CALL_TEXT)
    )
    call = {"role": "assistant", "content": "", "tool_calls": [called("f", x=1)] * 2}
    assert messages_of(record) == [ASKED, call]
    record["conversations"][1].update(train=False, value="A")
    conversation = read(record)
    assert list(conversation.messages) == [ASKED, ANSWERED, call]
    assert conversation.untrained == {1}


def test_turn_numbers_are_those_of_the_source() -> None:
    record = sharegpt(("human", "U"), ("gpt", "A"), ("function_call", CALL_TEXT), ("gpt", " "))
    with pytest.raises(BadRow, match="turn 4 is an empty answer"):
        read(record)


@pytest.mark.parametrize("value", ["", "f(1)", "[]", None])
def test_a_function_call_turn_without_a_call_is_refused(value: Any) -> None:
    with pytest.raises(BadRow, match=r"turn 2 has .*tool call"):
        read(sharegpt(("human", "U"), ("function_call", value)))


# --- alpaca


@pytest.mark.parametrize(
    ("fields", "content", "more"),
    [
        ({}, "U", ""),
        ({"input": None}, "U", ""),
        ({"input": ""}, "U", ""),
        ({"input": "I"}, "U\n\nI", "I"),
        ({"instruction": "", "input": "I"}, "I", "I"),
    ],
)
def test_alpaca(fields: dict[str, Any], content: str, more: str) -> None:
    record = {**ALPACA, **fields}
    asked = {"role": "user", "content": content}
    asked |= {"instruction": record["instruction"], "input": more}
    assert messages_of(record) == [asked, ANSWERED]


def test_alpaca_with_history_and_system() -> None:
    record = {**ALPACA, "system": "S", "history": [["Q", "B"]]}
    assert [(m["role"], m["content"]) for m in messages_of(record)] == [
        ("system", "S"),
        ("user", "Q"),
        ("assistant", "B"),
        ("user", "U"),
        ("assistant", "A"),
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"output": ["A"]}, "its `output` is a list"),
        ({"output": None}, "has no `output`; its fields are instruction"),
        ({"output": ""}, "turn 2 is an empty answer"),
        ({"input": 7}, "its `input` is a number"),
        ({"instruction": "\ud83d"}, "its `instruction` holds half a surrogate pair"),
        ({"history": [["Q"]]}, "no list of pairs"),
        ({"history": "Q"}, "no list of pairs"),
        ({"history": [["Q", 7]]}, "turn 2 has no text"),
    ],
)
def test_broken_alpaca_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_conversation({**ALPACA, **fields}, "alpaca", {})


# --- prompt and completion


def test_answers_of_a_prompt_are_context() -> None:
    conversation = read({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert conversation == Conversation(
        (ASKED, ANSWERED, ASKED, ANSWERED), untrained=frozenset({1})
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "U", "completion": ""}, "turn 2 is an empty answer"),
        ({"prompt": 7, "completion": "A"}, "its `prompt` is no list of turns"),
        ({"prompt": "U", "completion": [ASKED, ANSWERED]}, "begins with a user turn"),
    ],
)
def test_a_broken_completion_is_refused(record: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read(record)


# --- what all formats refuse


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (turns(("user", "U")), "no assistant turn"),
        (turns(("user", "U"), ("assistant", "A"), ("user", "?")), "ends with a user turn"),
        (turns(("user", "U"), ("assistant", "A"), ("function", "?")), "ends with a tool turn"),
        (turns(("user", "U"), ("assistant", " \n")), "turn 2 is an empty answer"),
        (answer(content="", reasoning="T"), "turn 2 is an empty answer"),
        (answer(content="A", weight=0), "no assistant turn that is trained"),
        (turns(("user", "U"), ("robot", "A")), "turn 2 has the role 'robot'"),
        (turns(("user", None), ("assistant", "A")), "turn 1 has no text"),
        (turns(("user", 7), ("assistant", "A")), "turn 1 has no text"),
        (turns(("user", ["U"]), ("assistant", "A")), "turn 1 has a part that is a text"),
        (turns(("user", [{"type": "text"}]), ("assistant", "A")), "a text part without text"),
        (turns(("user", [{"type": "image_url"}]), ("assistant", "A")), "'image_url'.*only text"),
        (answer(content="A", reasoning={}), "turn 2 has an object in `reasoning`"),
        (answer(content="A", reasoning="T", thinking="R"), "reasoning in two ways"),
        (answer(content="A", train=0), "`train`"),
        ({"messages": [{**ASKED, "tool_calls": [called("f")]}, ANSWERED]}, "user turn with tool"),
        ({"messages": [{**ASKED, "role": "tool", "name": 7}, ANSWERED]}, "a number in `name`"),
        ({"messages": []}, "no list of turns"),
        ({"messages": "hello"}, "no list of turns"),
        ({"messages": ["hello"]}, "turn 1 is a text"),
        ({**MESSAGES, "images": ["a.png"]}, "has images"),
        ({"text": "x"}, "has no `messages`; its fields are text"),
        ("hello", "is a text"),
    ],
)
def test_a_row_that_trains_nothing_or_is_unclear_is_refused(record: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_conversation(record, "messages", {})


@pytest.mark.parametrize("text", ["", " \n", 7, None, "\ud83d"])
def test_a_text_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(BadRow, match="`text`"):
        to_conversation({"text": text}, "text", {})


@pytest.mark.parametrize("role", [["user"], {"a": 1}, None, 7])
def test_a_role_that_is_no_text_is_refused(role: Any) -> None:
    with pytest.raises(BadRow, match="turn 1 has the role"):
        to_conversation(turns((role, "U"), ("assistant", "A")), "messages", {})


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "\ud83d"},
        {"content": [{"type": "text", "text": "\ud83d"}]},
        {"content": "A", "reasoning": "\ud83d"},
    ],
)
def test_half_a_character_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="turn 2 holds half a surrogate pair"):
        read(answer(**fields))


@pytest.mark.parametrize("record", [MESSAGES, SHAREGPT, ALPACA, {"prompt": "U"}, {}])
def test_preferences_are_refused_by_name(record: dict[str, Any]) -> None:
    preferences = {**record, "chosen": "A", "rejected": "B"}
    with pytest.raises(BadRow, match="preferences"):
        detect_format(preferences, {})
    for record_format in get_args(RecordFormat):
        with pytest.raises(BadRow, match="preferences"):
            to_conversation(preferences, record_format, {})


def test_the_chosen_answer_can_be_trained_by_asking_for_it() -> None:
    record = {"prompt": "U", "chosen": "A", "rejected": "B"}
    assert read(record, {"completion": "chosen"}) == Conversation((ASKED, ANSWERED))


# --- anything at all

MESSAGE_KEYS = [
    "role", "content", "tool_calls", "reasoning_content", "name", "tool_call_id", "instruction",
    "input",
]  # fmt: skip
FIELDS = [
    "messages", "conversations", "conversation", "instruction", "input", "output", "history",
    "system", "prompt", "completion", "text", "tools", "functions", "chosen", "rejected",
]  # fmt: skip


def hold_or_refuse(record: Any, columns: dict[str, str]) -> None:
    """Whatever it is: a sound conversation or a BadRow that can be printed."""
    try:
        detect_format(record, columns)
    except BadRow as reason:
        str(reason).encode()
    for record_format in get_args(RecordFormat):
        try:
            conversation = to_conversation(record, record_format, columns)
        except BadRow as reason:
            str(reason).encode()
            continue
        said = [conversation.messages, conversation.tools, conversation.text]
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        if conversation.text is not None:
            assert conversation.text.strip() and not conversation.messages
            continue
        answers = set()
        for index, message in enumerate(conversation.messages):
            assert list(message) == [key for key in MESSAGE_KEYS if key in message]
            assert message["role"] in ROLES and isinstance(message["content"], str)
            if message["role"] == "assistant":
                answers.add(index)
                something = message["content"].strip() or message.get("tool_calls")
                assert something or index in conversation.untrained
        assert len(conversation.messages) - 1 in answers
        assert conversation.untrained < answers


texts = st.text(st.characters(), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
columns_of = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(FIELDS), max_size=1)


@given(json_values | st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5), columns_of)
def test_arbitrary_values_are_refused_or_sound(record: Any, columns: dict[str, str]) -> None:
    hold_or_refuse(record, columns)


def often(*likely: Any) -> st.SearchStrategy[Any]:
    return st.one_of(*[st.just(each) for each in likely] * 3, json_values)


a_call = often(json.loads(CALL_TEXT), CALL_TEXT, called("f"), [called("f"), called("g")], "{", None)
a_part = st.fixed_dictionaries(
    {"type": often("text", "reasoning", "tool_call", "image_url")},
    optional={"text": often("A"), "value": often("A", CALL_TEXT), "name": often("f")},
)
a_content = st.one_of(often("A", "", None), st.lists(a_part, max_size=3), a_call)
a_name = often(
    "user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"
)
a_turn = st.one_of(
    st.just(ASKED),
    st.just(ANSWERED),
    st.fixed_dictionaries({"from": a_name, "value": a_content}),
    st.fixed_dictionaries(
        {"role": a_name, "content": a_content},
        optional={
            "tool_calls": a_call,
            "function_call": a_call,
            "reasoning": often("T"),
            "weight": often(0, 1, 1.0),
            "train": often(True, False),
            "tool_call_id": often("1"),
        },
    ),
)
some_turns = st.builds(
    lambda some, end: [*some, *end], st.lists(a_turn, max_size=4), st.sampled_from([[ANSWERED], []])
)
a_record = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations", "conversation"), some_turns),
        **{field: some_turns | often("U") for field in ("prompt", "completion")},
        **{field: often("U", "") for field in ("instruction", "input", "output", "text")},
        "history": often([["Q", "A"]], []),
        "system": often("S", ""),
        "tools": often([TOOL], [SCHEMA], json.dumps([TOOL]), "[{"),
    },
)


@settings(max_examples=300)
@given(a_record, columns_of)
def test_almost_right_records_are_refused_or_sound(record: Any, columns: dict[str, str]) -> None:
    hold_or_refuse(record, columns)


# --- real data


def sample(name: str) -> Iterator[Any]:
    path = SAMPLES / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    text = path.read_text("utf-8")
    if name.endswith(".json"):
        yield from json.loads(text)
    elif name.endswith(".jsonl"):
        yield from (json.loads(line) for line in text.split("\n") if line)
    else:
        yield from ({"text": line} for line in text.split("\n") if line)


@pytest.mark.parametrize(
    ("name", "record_format"),
    [
        ("alpaca_en_demo.json", "alpaca"),
        ("alpaca_zh_demo.json", "alpaca"),
        ("identity.json", "alpaca"),
        ("glaive_toolcall_en_demo.json", "sharegpt"),
        ("v1_sft_demo.jsonl", "messages"),
        ("reason_tool_use_demo_50.jsonl", "messages"),
        ("wiki_demo.txt", "text"),
    ],
)
def test_real_samples_load(name: str, record_format: str) -> None:
    conversations = []
    for record in sample(name):
        assert detect_format(record, {}) == record_format
        conversations.append(read(record))
    assert conversations
    said = [message for each in conversations for message in each.messages]
    assert any("tool_calls" in message for message in said) == ("tool" in name)
    assert any("reasoning_content" in message for message in said) == ("reason" in name)
    assert any(each.tools for each in conversations) == ("tool" in name)


def test_a_real_preference_sample_is_refused() -> None:
    for record in sample("dpo_en_demo.json"):
        with pytest.raises(BadRow, match="preferences"):
            detect_format(record, {})
