"""Exactly each answer and its end-of-turn token are trained, or the row is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.conversation import BadRow, Conversation, Message
from jobs.data.labels import IGNORE, label
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
