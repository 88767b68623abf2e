"""Exactly each answer and its end-of-turn token are trained, or the row is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.conversation import BadRow, Conversation, Message
from jobs.data.labels import IGNORE, Labelled, label
from jobs.data.skeleton import TurnFinder
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from tests.conftest import BASE, ROOT

END = "<|im_end|>"
CHATML = load_tokenizer(BASE)


def with_template(source: str) -> ChatTokenizer:
    return replace(CHATML, template=ChatTemplate(source, CHATML.special_tokens, "test"))


def trained_texts(tokenizer: ChatTokenizer, messages: list[Message], **kwargs: str) -> list[str]:
    labelled = label(tokenizer, Conversation(tuple(messages)), kwargs.get("loss_on", "responses"))
    spans = []
    for turn in labelled.turns:
        ids = labelled.input_ids[turn.start : turn.end]
        assert labelled.labels[turn.start : turn.end] == ids
        spans.append(tokenizer.text_of(ids))
    trained = sum(turn.end - turn.start for turn in labelled.turns)
    assert sum(value != IGNORE for value in labelled.labels) == trained
    return spans


def chat(*turns: str) -> list[Message]:
    """user, assistant, user, ... with a leading `system:` turn where the text says so."""
    messages: list[Message] = []
    for turn in turns:
        if turn.startswith("system:"):
            messages.append({"role": "system", "content": turn.removeprefix("system:")})
        else:
            last = messages[-1]["role"] if messages else "system"
            messages.append({"role": "assistant" if last == "user" else "user", "content": turn})
    return messages


@pytest.mark.parametrize(
    "messages",
    [
        chat("Hi.", "Hello!"),
        chat("system:Be brief.", "Hi.", "Hello!"),
        chat("Hi.", "Hello!", "And you?", "I am well."),
        chat("", "An answer to nothing."),
        chat("Hi.", " leading and trailing \n"),
        chat("Hi.", "Ünïcödé 你好 🚀"),
        chat("Hi.", "same", "Hi.", "same"),
        chat("<|im_start|>assistant\nI am not the assistant.<|im_end|>", "Right."),
        chat("What is it?", "What is it?"),
        chat("\ue000answer0\ue001", "\ue000answer0\ue001"),
    ],
    ids=lambda messages: messages[-2]["content"][:20] or "empty user",
)
def test_each_answer_and_its_end_are_trained(messages: list[Message]) -> None:
    answers = [m["content"] + END for m in messages if m["role"] == "assistant"]
    assert trained_texts(CHATML, messages) == answers


def test_last_response_trains_only_the_last() -> None:
    messages = chat("Hi.", "Hello!", "And you?", "I am well.")
    assert trained_texts(CHATML, messages, loss_on="last_response") == ["I am well." + END]


def test_all_trains_every_token() -> None:
    labelled = label(CHATML, Conversation(tuple(chat("Hi.", "Hello!"))), "all")
    assert labelled.labels == labelled.input_ids


def test_a_system_turn_in_the_middle_is_not_trained() -> None:
    messages = [*chat("Hi.", "Hello!"), {"role": "system", "content": "Now be rude."}]
    messages += [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Go away."}]
    assert trained_texts(CHATML, messages) == ["Hello!" + END, "Go away." + END]


def test_an_answer_that_the_template_trims_is_trained_as_it_stands() -> None:
    trimming = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    )
    assert trained_texts(trimming, chat("Hi.", "  Hello!\n")) == ["Hello!" + END]


def test_a_space_before_the_end_is_trained_with_it() -> None:
    spaced = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }} <|im_end|>{% endfor %}"
    )
    assert trained_texts(spaced, chat("Hi.", "Hello!")) == ["Hello! " + END]


def test_a_template_that_is_not_prefix_preserving_is_labelled_exactly() -> None:
    # Each turn is numbered from the end, so every rendering of a shorter chat differs.
    counting = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.revindex }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    messages = chat("Hi.", "Hello!", "And you?", "I am well.")
    assert trained_texts(counting, messages) == ["Hello!" + END, "I am well." + END]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "learn to stop"),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "rewrites a turn"),
        ("{{ messages[0].content }}<|im_end|>", "leaves out or repeats"),
        ("{% for m in messages %}{{ m.content * 2 }}<|im_end|>{% endfor %}", "leaves out or repeats"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages.nothing.there }}", "refuses it"),
    ],
)  # fmt: skip
def test_what_has_no_exact_labels_is_refused_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        label(
            with_template(source),
            Conversation(tuple(chat("Hi.", "<think>hm</think>Hello!"))),
            "responses",
        )


def test_every_token_of_a_batch_but_the_answers_is_ignored() -> None:
    labelled = label(CHATML, Conversation(tuple(chat("system:S", "U", "A"))), "responses")
    text = CHATML.text_of([i for i, v in zip(labelled.input_ids, labelled.labels, strict=True) if v == IGNORE])  # fmt: skip
    assert (
        text
        == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n\n"
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "\ue000answer", " ", "\n", "</s>", "<0x0A>", "▁"]
)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=6
).filter(lambda messages: any(m["role"] == "assistant" for m in messages))


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_any_conversation_is_labelled_exactly_or_refused(messages: list[Message]) -> None:
    try:
        labelled = label(CHATML, Conversation(tuple(messages)), "responses")
    except BadRow:
        return
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(labelled.turns) == len(answers)
    for turn, answer in zip(labelled.turns, answers, strict=True):
        ids = labelled.input_ids[turn.start : turn.end]
        assert ids[-1] in CHATML.stop_ids
        assert ids == CHATML.ids_of(answer + END)


THINK: Message = {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "x"}}}],
}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*chat("Hi."), THINK], "leaves out the reasoning"),
        ([*chat("What time?"), CALL], "leaves out an assistant's tool calls"),
    ],
    ids=["reasoning", "tool call"],
)
def test_a_template_without_a_place_for_it_does_not_drop_it(
    messages: list[Message], reason: str
) -> None:
    with pytest.raises(BadRow, match=reason):
        label(CHATML, Conversation(tuple(messages)), "responses")


def call_of(name: str = "clock", **arguments: Any) -> Message:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


TOOL: Message = {"role": "tool", "name": "clock", "content": "12:00"}
SAY = "{{ m.content or '' }}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}"
)
HEAD = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def each(*parts: str) -> str:
    """A template that writes `parts` for each message `m`."""
    return "{% for m in messages %}" + "".join(parts) + "{% endfor %}"


def first_turn(source: str, *messages: Message) -> str:
    return label(with_template(source), Conversation(messages), "responses").turns[0].text


def test_a_turn_without_a_header_begins_after_the_users() -> None:
    source = each(
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]",
        "{% else %}", SAY, CALLS, "<|im_end|>{% endif %}",
    )  # fmt: skip
    asked = chat("Time?[/INST]<call>clock {}</call><|im_end|>[INST]")
    call = '<call>clock {"zone": "x"}</call>' + END
    assert first_turn(source, *asked, call_of(zone="x")) == call
    assert first_turn(source, *asked, call_of(zone="x"), TOOL, *chat("Hi.", "It is.")[1:]) == call
    second = [*asked, call_of(zone="x"), {**TOOL, "content": "[/RESULT]"}, call_of(zone="y")]
    made = label(with_template(source), Conversation(tuple(second)), "responses")
    assert [turn.text for turn in made.turns] == [call, call.replace("x", "y")]


def test_a_template_that_knows_no_prompt_does_not_train_its_header() -> None:
    with pytest.raises(BadRow, match="cannot be told where"):
        first_turn(each(HEAD, SAY, CALLS, END, "\n"), *chat("Time?"), call_of(zone="x"))


@pytest.mark.parametrize(
    ("added", "written", "begin"),
    [
        ("<think>\n\n</think>\n\n", "", "<call>"),
        ("<think></think>", "</think>", "<call>"),
        ("<think></think>\n\n", "\n\n", "<call>"),
        ("<|channel>thought\n<channel|>", "", "<call>"),
        ("<|START_THINKING|><|END_THINKING|>", "", "<call>"),
        ("[THINK][/THINK]", "", "<call>"),
        ("<think>\n", "<think>", "<call>"),
        ("<think>\n", "</think>", "</think><call>"),
        ("<think>", "", "<call>"),
        ("", "</think>", "</think><call>"),
    ],
)
def test_a_call_begins_after_an_empty_reasoning(added: str, written: str, begin: str) -> None:
    prompt = PROMPT.replace("{% endif %}", added + "{% endif %}")
    source = each(
        HEAD, "{% if m.tool_calls %}", written, "{% endif %}", SAY, CALLS, END, "\n"
    ) + prompt  # fmt: skip
    asked = chat("<|im_start|>assistant\n" + added + "<call>")
    assert first_turn(source, *asked, call_of(zone="x"), TOOL, *chat("a", "b")[1:]) == (
        begin + 'clock {"zone": "x"}</call>' + END
    )


@pytest.mark.parametrize(
    "added",
    ["Here are my steps:\n", "<|START_THINKING|>", "<think>well</think>", "</think>", "<a></b>"],
)
def test_a_call_after_a_prompt_for_something_else_is_refused(added: str) -> None:
    prompt = PROMPT.replace("{% endif %}", added + "{% endif %}")
    with pytest.raises(BadRow, match="could not go on from it"):
        first_turn(each(HEAD, SAY, CALLS, END, "\n") + prompt, *chat("Time?"), call_of(zone="x"))


REASONED = (
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
    SAY,
    CALLS,
    END,
    "\n",
)


@pytest.mark.parametrize("added", ["<think></think>", "</think>", "[THINK][/THINK]"])
def test_reasoning_after_a_prompt_that_closes_it_is_refused(added: str) -> None:
    source = each(HEAD, *REASONED) + PROMPT.replace("{% endif %}", added + "{% endif %}")
    with pytest.raises(BadRow, match="could not go on from it"):
        first_turn(source, *chat("Hi."), THINK)


def test_reasoning_begins_after_what_the_prompt_opens() -> None:
    for added in ("<think>", "<think>\n"):
        source = each(HEAD, *REASONED) + PROMPT.replace("{% endif %}", added + "{% endif %}")
        assert first_turn(source, *chat("<think>"), THINK) == "A greeting.</think>Hello!" + END


def test_a_turn_before_what_is_behind_all_messages_begins_after_its_header() -> None:
    source = (
        each(HEAD, SAY, CALLS, END, "\n") + "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT
    )
    assert first_turn(source, *chat("Time?"), call_of(), TOOL, *chat("a", "b")[1:]) == (
        "<call>clock {}</call>" + END
    )


def test_the_prompt_after_a_tools_result_may_be_another_one() -> None:
    after_tool = "{% if loop.previtem and loop.previtem.role == 'tool' %}again{% endif %}"
    again = "{% if messages[-1].role == 'tool' %}again{% else %}<|im_start|>assistant\n{% endif %}"
    source = each(
        HEAD.replace("<|im_start|>", after_tool + "<|im_start|>").replace(
            "{{ m.role }}\n", "{% if not loop.previtem or loop.previtem.role != 'tool' %}{{ m.role }}\n{% endif %}"
        ),
        "{% if m.role == 'assistant' and m.content %}<text>{% endif %}", SAY, CALLS, END, "\n",
    ) + "{% if add_generation_prompt %}" + again.replace("again", "again<|im_start|>") + "{% endif %}"  # fmt: skip
    messages = (
        *chat("Time?"),
        call_of(zone="x"),
        TOOL,
        call_of(zone="y"),
        TOOL,
        *chat("a", "b")[1:],
    )
    made = label(with_template(source), Conversation(messages), "responses")
    assert [turn.text for turn in made.turns[:2]] == [
        f'<call>clock {{"zone": "{zone}"}}</call>' + END for zone in "xy"
    ]


def test_a_prompt_without_the_last_text_proves_nothing() -> None:
    source = each(
        "{% if not (add_generation_prompt and loop.last) %}", HEAD, SAY, CALLS, END, "\n{% endif %}"
    )
    with pytest.raises(BadRow, match="cannot be told where"):
        first_turn(source + PROMPT, *chat("system:S", "Time?"), call_of(zone="x"))


@pytest.mark.parametrize("prompt", ["{{ ' ' }}", "<think></think>", "<think>"])
def test_a_prompt_without_the_header_does_not_train_it(prompt: str) -> None:
    source = each(HEAD, SAY, CALLS, END) + "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    with pytest.raises(BadRow):
        first_turn(source, *chat("Time?"), call_of(zone="x"))


def test_two_markers_that_begin_alike_are_told_apart() -> None:
    source = (
        each("{% if m.role == 'user' %}[U]", SAY, "{% else %}[A]", SAY,
             "{% for c in m.tool_calls or [] %}[TOOL]{{ c.function.name }}{% endfor %}[END]{% endif %}")
        + "{% if add_generation_prompt %}[A][THINK][/THINK]{% endif %}"
    )  # fmt: skip
    markers = ["[U]", "[A]", "[THINK]", "[/THINK]", "[TOOL]", "[END]"]
    finder = TurnFinder(ChatTemplate(source, {}, "brackets"), markers, ["[END]"])
    text, answers = finder.find((*chat("Time?"), call_of()))
    assert text[answers[0].start : answers[0].end] == "[TOOL]clock[END]"


def test_a_prompt_in_place_of_something_else_proves_nothing() -> None:
    source = (
        each(HEAD, SAY, CALLS, END, "\n")
        + "{% if not add_generation_prompt %}That is all.{% endif %}"
    )
    with pytest.raises(BadRow, match="cannot be told where"):
        first_turn(
            source + PROMPT.replace("{% endif %}", "<think></think>{% endif %}"),
            *chat("Time?"), call_of(zone="x"), TOOL, *chat("a", "b")[1:],
        )  # fmt: skip


@pytest.mark.parametrize("zone", [END, f"{END}\n<|im_start|>assistant\n", f'"{END}</call>{END}'])
def test_an_end_of_turn_token_in_a_call_is_not_its_end(zone: str) -> None:
    tokenizer = load_tokenizer(BASE, "chatml")
    messages = (*chat("Time?"), call_of(zone=zone), TOOL, *chat("a", "b")[1:])
    _, answers = tokenizer.turns.find(messages)
    text = tokenizer.template.render(messages)
    assert text[: answers[0].end].endswith(f'"}}}}\n</tool_call>{END}')
    with pytest.raises(BadRow, match="in its own text"):  # the model would stop there
        label(tokenizer, Conversation(messages), "responses")


def test_a_call_that_is_not_written_is_missed_whatever_the_text_says() -> None:
    source = each(HEAD, SAY, END, "\n") + PROMPT
    told = {**call_of(zone="x"), "content": 'I call <call>clock {"zone": "x"}</call>.'}
    with pytest.raises(BadRow, match="leaves out an assistant's tool calls"):
        first_turn(source, *chat("Time?"), told, TOOL, *chat("a", "b")[1:])


def test_arguments_that_are_not_written_are_missed() -> None:
    source = each(HEAD, SAY, CALLS.replace("{{ c.function.arguments | tojson }}", ""), END) + PROMPT
    with pytest.raises(BadRow, match="leaves out an assistant's tool calls"):
        first_turn(source, *chat("Time?"), call_of(zone="x"))


def test_a_call_after_the_end_of_its_turn_is_refused() -> None:
    source = each(HEAD, SAY, END, CALLS, END, "\n") + PROMPT
    with pytest.raises(BadRow, match="before its tool calls"):
        first_turn(source, *chat("Time?"), call_of(zone="x"))


@pytest.mark.parametrize("again", ["{{ c.function.name }}", "{{ c.function.name | tojson }}"])
@pytest.mark.parametrize("name", ["clock", 'the "clock"', END])
def test_a_result_may_name_its_call_again(again: str, name: str) -> None:
    source = each(HEAD, SAY, CALLS, END, "{% for c in m.tool_calls or [] %}", again, "{% endfor %}")
    messages = (*chat("a"), call_of(name), TOOL, *chat("b", "c")[1:])
    text, answers = with_template(source + PROMPT).turns.find(messages)
    assert text[answers[0].start : answers[0].end] == f"<call>{name} {{}}</call>" + END


def test_two_calls_in_a_row_are_refused() -> None:
    source = each(HEAD, SAY, CALLS, END, "\n") + PROMPT
    with pytest.raises(BadRow, match="told apart"):
        first_turn(source, *chat("Time?"), call_of(zone="x"), call_of(zone="y"), *chat("a", "b"))


@pytest.mark.parametrize(
    "after", [[{**TOOL, "content": ""}, *chat("a", "b")[1:]], [TOOL, *chat("a", "b")[1:]], []]
)
def test_the_end_of_the_next_turn_is_not_this_ones(after: list[Message]) -> None:
    ended = each(HEAD, SAY, CALLS, END, "\n") + PROMPT
    endless = each(HEAD, SAY, CALLS, "{% if not m.tool_calls %}<|im_end|>{% endif %}\n") + PROMPT
    endless += "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    messages = (*chat("Time?"), call_of(zone="x"), *after)
    assert first_turn(ended, *messages) == '<call>clock {"zone": "x"}</call>' + END
    with pytest.raises(BadRow, match="learn to stop"):
        first_turn(endless, *messages)


def test_a_turn_that_ends_twice_is_refused() -> None:
    source = each(
        "{% if m.tool_calls %}", HEAD, CALLS, END, "\n{% endif %}",
        "{% if m.content is string %}", HEAD, SAY, END, "\n{% endif %}",
    ) + PROMPT  # fmt: skip
    messages = (*chat("Time?"), {**call_of(zone="x"), "content": " "}, TOOL, *chat("a", "b")[1:])
    with pytest.raises(BadRow, match="twice"):
        first_turn(source, *messages)
    again = each(HEAD, SAY, CALLS, "{% if m.tool_calls %}<|im_end|>more{% endif %}", END) + PROMPT
    for after in ((), messages[2:]):
        with pytest.raises(BadRow, match="twice"):
            first_turn(again, *chat("Time?"), call_of(zone="x"), *after)
    # No text, as in OpenAI's replies, is not an empty text.
    messages = (*chat("Time?"), call_of(zone="x"), TOOL, *chat("a", "b")[1:])
    assert first_turn(source, *messages) == '<call>clock {"zone": "x"}</call>' + END


def test_calls_with_no_text_between_them_are_told_apart() -> None:
    source = each(HEAD, SAY, CALLS, END, "\n") + PROMPT
    silent = {**TOOL, "content": ""}
    messages = (
        *chat("Time?"), call_of(zone="x"), silent, call_of(zone="longer"), silent,
        *chat("a", "b")[1:],
    )  # fmt: skip
    made = label(with_template(source), Conversation(messages), "responses")
    assert [turn.text for turn in made.turns] == [
        '<call>clock {"zone": "x"}</call>' + END,
        '<call>clock {"zone": "longer"}</call>' + END,
        "b" + END,
    ]
    assert text_before(made, 1).endswith("tool\n<|im_end|>\n<|im_start|>assistant\n")


def text_before(made: Labelled, turn: int) -> str:
    return CHATML.text_of(made.input_ids[: made.turns[turn].start])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (each(HEAD, SAY, CALLS, END) + "{{ messages[0].content }}", "rewrites a turn"),
        (each(HEAD, "{% if not m.tool_calls or m.tool_calls[0].function.name == 'clock' %}", SAY,
              "{% endif %}", CALLS, END), "rewrites a turn"),
        (each("{% for c in m.tool_calls or [] %}{{ c.function.name[:1] }}{% endfor %}", HEAD, SAY,
              CALLS, END), "cannot be told where"),
    ],
)  # fmt: skip
def test_what_moves_or_changes_with_a_call_is_refused(source: str, reason: str) -> None:
    told = {**call_of(zone="x"), "content": "Hm."}
    messages = (*chat("Time?"), told, {**TOOL, "content": ""}, *chat("a", "b")[1:])
    with pytest.raises(BadRow, match=reason):
        first_turn(source + PROMPT, *messages)


@pytest.mark.parametrize("zone", ["QJXZ0ZXJQ", "\ue0000\ue001", "\ue00099\ue001"])
def test_a_call_that_imitates_our_own_marks_is_refused(zone: str) -> None:
    with pytest.raises(BadRow, match="characters that no text has"):
        first_turn(each(HEAD, SAY, CALLS, END) + PROMPT, *chat("Time?"), call_of(zone=zone))


def test_arguments_are_json_whatever_the_template_takes_them_for() -> None:
    as_text = CALLS.replace(" | tojson", "")
    written = first_turn(each(HEAD, SAY, as_text, END) + PROMPT, *chat("a"), call_of(zone="x"))
    assert written == '<call>clock {"zone": "x"}</call>' + END
    joined = CALLS.replace(
        " {{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"
    )
    written = first_turn(each(HEAD, SAY, joined, END) + PROMPT, *chat("a"), call_of(zone="é"))
    assert written == '<call>clock{"zone": "é"}</call>' + END
    repr_of = CALLS.replace("| tojson", "| string")
    twice = repr_of.replace("arguments", "arguments | tojson")
    with pytest.raises(BadRow, match="not as JSON"):
        first_turn(
            each(HEAD, SAY, "{% for c in m.tool_calls or [] %}", "{% if c.function.arguments is string %}",
                 twice, "{% else %}", repr_of, "{% endif %}{% endfor %}", END) + PROMPT,
            *chat("a"), call_of(zone="x"),
        )  # fmt: skip


def test_reasoning_is_found_under_its_other_names() -> None:
    for name in ("reasoning", "thinking"):
        source = each(HEAD, *REASONED).replace("reasoning_content", name) + PROMPT
        assert first_turn(source, *chat("a"), THINK) == "<think>A greeting.</think>Hello!" + END


def test_an_answer_may_be_nothing_but_reasoning() -> None:
    alone = {**THINK, "content": ""}
    source = each(HEAD, *REASONED) + PROMPT
    assert first_turn(source, *chat("a"), alone) == "<think>A greeting.</think>" + END
    dropping = source.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
    with pytest.raises(BadRow, match="a turn of the assistant"):
        first_turn(dropping, *chat("a"), alone, *chat("b", "c"))


def test_inline_reasoning_that_a_template_looks_for_is_trained_as_it_stands() -> None:
    source = each(
        HEAD, "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}",
        SAY, END,
    ) + PROMPT  # fmt: skip
    inline = chat("Hi.", "<think>A greeting.</think>\n\nHello!")
    assert first_turn(source, *inline) == inline[1]["content"] + END


def test_inline_reasoning_that_a_template_takes_away_is_the_reason() -> None:
    source = each(HEAD, "{{ m.content.split('</think>')[-1] }}", END) + PROMPT
    with pytest.raises(BadRow, match="leaves out the reasoning"):
        first_turn(source, *chat("Hi.", "<think>A greeting.</think>Hello!"))


OPEN_LAST = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    + SAY + CALLS + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ({"role": "assistant", "content": "Hello!"}, "Hello!<|user|>"),
        (THINK, "<think>A greeting.</think>Hello!<|user|>"),  # a user's turn would take it away
        ({**THINK, "content": ""}, "<think>A greeting.</think><|user|>"),
        (call_of(zone="x"), '<call>clock {"zone": "x"}</call><|tool|>'),
    ],
    ids=["text", "reasoning", "nothing but reasoning", "tool call"],
)
def test_the_last_turn_ends_with_the_token_that_begins_the_next(
    answer: Message, trained: str
) -> None:
    names = ("user", "assistant", "tool", "system")
    special = [f"<|{name}|>" for name in names]
    finder = TurnFinder(
        ChatTemplate(OPEN_LAST, {}, "open"), special, ["<|user|>", "<|tool|>", "<|end|>"]
    )
    text, answers = finder.find((*chat("Hi."), answer))
    assert [text[a.start : a.end] for a in answers] == [trained]
    assert text.endswith(trained)


@settings(max_examples=150, deadline=None)
@given(
    st.text("<|im_end>\"'{} xQJZ0\ue000\ue001", min_size=1, max_size=12),
    st.dictionaries(
        st.sampled_from(["a", "b", END, "<|im_start|>"]),
        TEXT | st.none() | st.integers() | st.lists(TEXT, max_size=2),
        max_size=3,
    ),
    TEXT,
    TEXT,
)
def test_any_call_is_labelled_exactly_or_refused(
    name: str, arguments: dict[str, Any], told: str, result: str
) -> None:
    tokenizer = load_chatml()
    messages = (
        *chat("Time?"), {**call_of(name, **arguments), "content": told},
        {**TOOL, "content": result}, *chat("a", "b")[1:],
    )  # fmt: skip
    try:
        text, answers = tokenizer.turns.find(messages)
    except BadRow:
        return
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    turn = text[answers[0].start : answers[0].end]
    assert turn.endswith(f"<tool_call>\n{body}\n</tool_call>{END}")
    assert turn.startswith(told if told.strip() else "")
    assert text[: answers[0].start].endswith(f"Time?{END}\n<|im_start|>assistant\n")
    assert text[answers[0].end :].startswith("\n<|im_start|>")
    assert text[answers[1].start :].rstrip() == "b" + END


@lru_cache(maxsize=1)
def load_chatml() -> ChatTokenizer:
    return load_tokenizer(BASE, "chatml")


def test_a_template_that_drops_a_question_is_refused() -> None:
    deaf = with_template(
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [*chat("Hi.", "Hello!"), {"role": "tool", "content": "12:00"}, *chat("x", "y")[1:]]
    with pytest.raises(BadRow, match="a turn of the tool"):
        label(deaf, Conversation(tuple(messages)), "responses")


def test_named_chatml_trains_reasoning_and_tool_calls_whole() -> None:
    tokenizer = load_tokenizer(BASE, "chatml")
    messages = [*chat("What time?"), CALL, {"role": "tool", "content": "12:00"}, THINK]
    labelled = label(tokenizer, Conversation(tuple(messages)), "responses")
    call, answer = (turn.text for turn in labelled.turns)
    assert call.startswith("<tool_call>\n")
    assert '"clock"' in call
    assert call.endswith("</tool_call>" + END)
    assert answer == "<think>\nA greeting.\n</think>\n\nHello!" + END


def test_weight_0_turns_are_context_only() -> None:
    messages = chat("Hi.", "Hello!", "And you?", "I am well.")
    labelled = label(CHATML, Conversation(tuple(messages), untrained=frozenset({1})), "responses")
    assert [turn.text for turn in labelled.turns] == ["I am well." + END]


def test_an_answer_that_holds_the_end_token_is_refused() -> None:
    with pytest.raises(BadRow, match="in its own text"):
        label(CHATML, Conversation(tuple(chat("Hi.", f"Hello{END}Bye"))), "responses")


def test_a_plain_text_is_trained_whole_and_ends() -> None:
    labelled = label(CHATML, Conversation(text="Once upon a time."), "responses")
    assert labelled.labels == labelled.input_ids
    assert CHATML.text_of(labelled.input_ids) == "Once upon a time." + END


def test_the_date_of_a_template_is_pinned() -> None:
    dated = with_template(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    labelled = label(dated, Conversation(tuple(chat("Hi.", "Hello!"))), "responses")
    assert labelled.text.startswith("01 Jan 2025<|im_start|>")


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not in {SHARED}")
@pytest.mark.parametrize(
    "name",
    ["alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json", "glaive_toolcall_en_demo.json",
     "v1_sft_demo.jsonl", "reason_tool_use_demo_50.jsonl", "wiki_demo.txt"],
)  # fmt: skip
def test_every_row_of_the_real_sets_is_labelled(name: str) -> None:
    from jobs.data.formats import detect_format, to_conversation
    from jobs.data.read import read_rows
    from jobs.spec import Source

    tokenizer = load_tokenizer(BASE, "chatml")
    form = None
    for row in read_rows(Source(source=str(SHARED / name))):
        form = form or detect_format(row.value, {})
        conversation = to_conversation(row.value, form, {})
        labelled = label(tokenizer, conversation, "responses")
        answers = [m for m in conversation.messages if m["role"] == "assistant"]
        if conversation.text is None:
            assert len(labelled.turns) == len(answers) - len(conversation.untrained)
            for turn in labelled.turns:
                assert labelled.input_ids[turn.end - 1] in tokenizer.stop_ids
