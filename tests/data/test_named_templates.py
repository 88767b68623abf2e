"""Each family's template against hand-written text, and prompt formats."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from jobs.data import named_templates
from jobs.data.conversation import BadRow, Conversation, Message
from jobs.data.labels import label
from jobs.data.named_templates import FAMILIES, prompt_format_template, resolve_template
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.errors import AccessError, SpecError
from tests.conftest import BASE

DEMO = load_tokenizer(BASE)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TODAY = date(2024, 7, 26)


def render(
    source: str, messages: list[Message], prompt: bool = False, tools: list[Any] | None = None
) -> str:
    template = ChatTemplate(source, TOKENS, "test", TODAY)
    return template.render(messages, tools or [], add_generation_prompt=prompt)


def chat(*turns: str, system: str = "") -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


ONE = chat("Hi.", "Hello!")
SYSTEM = chat("Hi.", "Hello!", system="Be brief.")
MANY = chat("Hi.", "Hello!", "And you?", "Fine.")
PROMPT = chat("Hi.", "Hello!", "And you?")

HEADER_31 = (
    "<s><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = (
    "<s>Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_INPUT = (
    "<s>Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)


def llama_3(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


LLAMA_3_ONE = llama_3("user", "Hi.") + llama_3("assistant", "Hello!")
LLAMA_3_PROMPT = (
    LLAMA_3_ONE + llama_3("user", "And you?") + "<|start_header_id|>assistant<|end_header_id|>\n\n"
)

# One turn, with a system turn, several turns, and a prompt for the second answer.
EXPECTED = {
    "chatml": (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n",
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-3": (
        "<s>" + LLAMA_3_ONE,
        "<s>" + llama_3("system", "Be brief.") + LLAMA_3_ONE,
        "<s>" + LLAMA_3_ONE + llama_3("user", "And you?") + llama_3("assistant", "Fine."),
        "<s>" + LLAMA_3_PROMPT,
    ),
    "llama-3.1": (
        HEADER_31 + "<|eot_id|>" + LLAMA_3_ONE,
        HEADER_31 + "Be brief.<|eot_id|>" + LLAMA_3_ONE,
        HEADER_31 + "<|eot_id|>" + LLAMA_3_ONE
        + llama_3("user", "And you?") + llama_3("assistant", "Fine."),
        HEADER_31 + "<|eot_id|>" + LLAMA_3_PROMPT,
    ),
    "llama-2": (
        "<s>[INST] Hi. [/INST] Hello! </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST] Hello! </s>",
        "<s>[INST] Hi. [/INST] Hello! </s><s>[INST] And you? [/INST] Fine. </s>",
        "<s>[INST] Hi. [/INST] Hello! </s><s>[INST] And you? [/INST]",
    ),
    "gemma": (
        "<s><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
        "<s><start_of_turn>user\nBe brief.\n\nHi.<end_of_turn>\n"
        "<start_of_turn>model\nHello!<end_of_turn>\n",
        "<s><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\nFine.<end_of_turn>\n",
        "<s><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": (
        "<s>[INST] Hi.[/INST] Hello!</s>",
        "<s>[INST] Be brief.\n\nHi.[/INST] Hello!</s>",
        "<s>[INST] Hi.[/INST] Hello!</s>[INST] And you?[/INST] Fine.</s>",
        "<s>[INST] Hi.[/INST] Hello!</s>[INST] And you?[/INST]",
    ),
    "phi-3": (
        "<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n",
        "<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nAnd you?<|end|>\n<|assistant|>\nFine.<|end|>\n",
        "<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nAnd you?<|end|>\n<|assistant|>\n",
    ),
    "phi-4": (
        "<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>",
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>"
        "<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>",
        "<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>"
        "<|im_start|>user<|im_sep|>And you?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Fine.<|im_end|>",
        "<|im_start|>user<|im_sep|>Hi.<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>"
        "<|im_start|>user<|im_sep|>And you?<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "alpaca": (
        ALPACA + "### Instruction:\nHi.\n\n### Response:\nHello!</s>",
        "<s>Be brief.\n\n### Instruction:\nHi.\n\n### Response:\nHello!</s>",
        ALPACA + "### Instruction:\nHi.\n\n### Response:\nHello!</s>"
        "\n\n### Instruction:\nAnd you?\n\n### Response:\nFine.</s>",
        ALPACA + "### Instruction:\nHi.\n\n### Response:\nHello!</s>"
        "\n\n### Instruction:\nAnd you?\n\n### Response:\n",
    ),
    "vicuna": (
        VICUNA + "USER: Hi. ASSISTANT: Hello!</s>",
        "<s>Be brief. USER: Hi. ASSISTANT: Hello!</s>",
        VICUNA + "USER: Hi. ASSISTANT: Hello!</s>USER: And you? ASSISTANT: Fine.</s>",
        VICUNA + "USER: Hi. ASSISTANT: Hello!</s>USER: And you? ASSISTANT:",
    ),
    "zephyr": (
        "<s><|user|>\nHi.</s>\n<|assistant|>\nHello!</s>\n",
        "<s><|system|>\nBe brief.</s>\n<|user|>\nHi.</s>\n<|assistant|>\nHello!</s>\n",
        "<s><|user|>\nHi.</s>\n<|assistant|>\nHello!</s>\n"
        "<|user|>\nAnd you?</s>\n<|assistant|>\nFine.</s>\n",
        "<s><|user|>\nHi.</s>\n<|assistant|>\nHello!</s>\n<|user|>\nAnd you?</s>\n<|assistant|>\n",
    ),
}  # fmt: skip
ALTERNATING = ("alpaca", "gemma", "llama-2", "mistral", "vicuna")
WITH_TOOLS = ("chatml", "llama-3.1")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <3"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLING: list[Message] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "dry"},
    {"role": "assistant", "content": "No."},
]


def test_every_family_is_tested_and_has_its_file() -> None:
    assert set(EXPECTED) == set(FAMILIES)
    folder = Path(named_templates.__file__).parent / "templates"
    assert {path.stem for path in folder.iterdir()} == set(FAMILIES)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_writes_its_form(name: str) -> None:
    source = FAMILIES[name].source
    one, system, many, prompt = EXPECTED[name]
    assert render(source, ONE) == one
    assert render(source, SYSTEM) == system
    assert render(source, MANY) == many
    assert render(source, PROMPT, prompt=True) == prompt


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_prompt_is_the_beginning_of_the_answered_conversation(name: str) -> None:
    source = FAMILIES[name].source
    for messages in (ONE, SYSTEM, MANY):
        prompt = render(source, messages[:-1], prompt=True)
        assert render(source, messages).startswith(prompt)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_transformers_renders_alike(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = FAMILIES[name].source
    # The date comes from transformers' own clock; that line is compared by its form.
    dated = re.compile(r"Today Date: \d\d \w{3} \d{4}\n")
    cases: list[tuple[list[Message], Any]] = [(SYSTEM, None), (MANY, None)]
    cases += [(CALLING, [TOOL])] if name in WITH_TOOLS else []
    for messages, tools in cases:
        theirs, _ = render_jinja_template([messages], chat_template=source, tools=tools, **TOKENS)
        ours = render(source, messages, tools=tools)
        assert dated.sub("", ours) == dated.sub("", theirs[0])
        assert len(dated.findall(ours)) == len(dated.findall(theirs[0]))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_a_family_cannot_write_is_refused_in_words(name: str) -> None:
    source = FAMILIES[name].source
    if name not in WITH_TOOLS:
        with pytest.raises(BadRow, match=f"{name} template has no form for tool calls"):
            render(source, CALLING)
        with pytest.raises(BadRow, match=f"{name} template has no form for tools"):
            render(source, ONE, tools=[TOOL])
    if name != "chatml":
        thought = [ONE[0], {**ONE[1], "reasoning_content": "Hm."}]
        with pytest.raises(BadRow, match=f"{name} template has no form for reasoning_content"):
            render(source, thought)
    odd = [ONE, [*ONE, {"role": "system", "content": "S"}], [*ONE, ONE[1]], ONE[1:]]
    for messages in odd[1:]:
        if name in ALTERNATING:
            with pytest.raises(
                BadRow, match=f"{name} template takes .* user and assistant in turn"
            ):
                render(source, messages)
        else:
            render(source, messages)
    with pytest.raises(BadRow, match=f"{name} template"):
        render(source, [{"role": "narrator", "content": "Once."}])


def test_chatml_writes_tools_calls_results_and_reasoning() -> None:
    source = FAMILIES["chatml"].source
    text = render(source, CALLING, tools=[TOOL])
    assert text.startswith("<|im_start|>system\n# Tools\n\n")
    assert (
        '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object"}}}\n</tools>'
    ) in text
    assert text.partition("<|im_end|>\n")[2] == (
        "<|im_start|>user\nRain?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    both = [{"role": "system", "content": "S"}, CALLING[0]]
    both += [
        {**CALLING[1], "content": "I look.", "tool_calls": [CALL, CALL]},
        CALLING[2],
        CALLING[2],
    ]
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}\n</tool_call>'
    text = render(source, both, tools=[TOOL])
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n\n")
    assert f"<|im_start|>assistant\nI look.{call}{call}<|im_end|>\n" in text
    result = "<tool_response>\ndry\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{result}\n{result}<|im_end|>\n")
    thought = [ONE[0], {**ONE[1], "reasoning_content": "Hm."}]
    assert render(source, thought).endswith(
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nHello!<|im_end|>\n"
    )


def test_llama_3_1_writes_tools_a_call_and_its_result() -> None:
    source = FAMILIES["llama-3.1"].source
    text = render(source, CALLING, tools=[TOOL])
    assert text.startswith(HEADER_31.replace("Cutting", "Environment: ipython\nCutting"))
    assert '    "function": {\n        "name": "weather",' in text
    assert text.endswith(
        "}\n\nRain?<|eot_id|>"
        + llama_3("assistant", '{"name": "weather", "parameters": {"city": "Köln <3"}}')
        + llama_3("ipython", "dry")
        + llama_3("assistant", "No.")
    )
    with pytest.raises(BadRow, match="one tool call"):
        render(source, [CALLING[0], {**CALLING[1], "tool_calls": [CALL, CALL]}])
    with pytest.raises(BadRow, match="first user turn"):
        render(source, CALLING[1:], tools=[TOOL])


def test_alpaca_tells_whether_there_is_an_input() -> None:
    parts = {"instruction": "Translate.", "input": "Hallo"}
    user: Message = {"role": "user", "content": "Translate.\n\nHallo", **parts}
    answer = {"role": "assistant", "content": "Hello"}
    source = FAMILIES["alpaca"].source
    assert render(source, [user, answer]) == (
        ALPACA_INPUT
        + "### Instruction:\nTranslate.\n\n### Input:\nHallo\n\n### Response:\nHello</s>"
    )
    assert render(source, [{**user, "input": ""}, answer]) == (
        ALPACA + "### Instruction:\nTranslate.\n\n### Response:\nHello</s>"
    )


def tokenizer_for(
    source: str, special: tuple[str, ...] = (), end: str | None = None
) -> ChatTokenizer:
    """The demo's tokenizer with a family's tokens added and its template."""
    backend = Tokenizer.from_str(DEMO.backend.to_str())
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("</s>", *special)])
    tokens = {**DEMO.special_tokens, **TOKENS}
    stop = backend.token_to_id(end or TOKENS["eos_token"])
    assert stop is not None
    return replace(
        DEMO,
        backend=backend,
        special_tokens=tokens,
        template=ChatTemplate(source, tokens, "test", TODAY),
        file_stop_ids=frozenset({stop}),
    )


def trained(tokenizer: ChatTokenizer, messages: list[Message], tools: list[Any]) -> list[str]:
    """What is trained of each answer, as tokens decode to it."""
    labelled = label(tokenizer, Conversation(tuple(messages), tuple(tools)), "responses")
    texts = []
    for turn in labelled.turns:
        # A word's own space (" Hello" is one token) is no part of the answer's text.
        assert tokenizer.text_of(labelled.input_ids[turn.start : turn.end]).strip() == turn.text
        texts.append(turn.text)
    return texts


@pytest.mark.parametrize("name", list(FAMILIES))
def test_exactly_each_answer_and_its_end_are_trained(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_for(family.source, family.special_tokens, family.end_of_turn)
    end = (" " if name == "llama-2" else "") + (family.end_of_turn or "</s>")
    for messages in (ONE, SYSTEM, MANY):
        answers = [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert trained(tokenizer, messages, []) == answers


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("chatml", '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln <3"}}\n</tool_call>'),
        ("llama-3.1", '{"name": "weather", "parameters": {"city": "Köln <3"}}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["untold", "told"])
def test_tool_calls_are_trained(name: str, call: str, tools: list[Any]) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_for(family.source, family.special_tokens, family.end_of_turn)
    end = str(family.end_of_turn)
    assert trained(tokenizer, CALLING, tools) == [call + end, "No." + end]


def test_a_template_is_chosen_by_what_the_text_is(tmp_path: Path) -> None:
    assert resolve_template("auto", "{{ own }}") == ("{{ own }}", "the tokenizer's own")
    with pytest.raises(LookupError):
        resolve_template("auto", None)
    assert resolve_template("gemma", "{{ own }}") == (FAMILIES["gemma"].source, "gemma")
    for suffix in ("jinja", "j2", "jinja2"):
        path = tmp_path / f"mine.{suffix}"
        path.write_text("{{ 'ä' }}", encoding="utf-8")
        assert resolve_template(str(path), None) == ("{{ 'ä' }}", str(path))
    source, name = resolve_template("Q: {instruction}\nA: {output}", None)
    assert (render(source, ONE), name) == ("<s>Q: Hi.\nA: Hello!</s>", "the prompt format")


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe\xff")
    for name in ("latin.jinja", "nowhere.jinja"):
        with pytest.raises(AccessError, match=name) as error:
            resolve_template(str(tmp_path / name), None)
        assert "model.chat_template" in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("llama3", "did you mean llama-3?"),
        ("ChatML", "did you mean chatml?"),
        ("mistrall", "did you mean mistral?"),
        ("quux", "'quux' names no chat template"),
        ("template.txt", "names no chat template"),
        ("{instruction}", "has no {output}"),
        ("{instruction}{output}{output}", "has {output} 2 times"),
        ("{instruction}{{output}}", "has no {output}"),
        ("{output}", "neither {instruction} nor {input}"),
        ("{system}{output}", "neither {instruction} nor {input}"),
        ("{output}\n{instruction}", "has {instruction} after {output}"),
        ("{instruction} {answer} {output}", "unknown placeholder {answer}"),
        ("{instruction} {Output} {output}", "unknown placeholder {Output}"),
        ("{instruction} {0} {output}", "begins no placeholder"),
        ('{"q": "{instruction}"} {output}', "begins no placeholder"),
        ("{instruction} { {output}", "begins no placeholder"),
        ("{instruction} } {output}", "ends no placeholder"),
    ],
)
def test_what_is_no_template_is_told_with_what_is(chosen: str, reason: str) -> None:
    with pytest.raises(SpecError, match=re.escape(reason)) as error:
        resolve_template(chosen, None)
    assert "{output}" in str(error.value.hint)


def ask(*answers: str, system: str = "", **parts: str) -> list[Message]:
    """Exchanges whose user turns have `parts`; without an answer, a prompt."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    user = {"role": "user", "content": "\n\n".join(v for v in parts.values() if v), **parts}
    for answer in answers:
        messages += [user, {"role": "assistant", "content": answer}]
    return messages if answers else [*messages, user]


FULL = "# System\n{system}\n\n# Task\n{instruction}\n\n# Input\n{input}\n\n\n# Answer\n{output}\n"


@pytest.mark.parametrize(
    ("form", "messages", "text"),
    [
        (FULL, ask("A", system="S", instruction="T", input="I"),
         "<s># System\nS\n\n# Task\nT\n\n# Input\nI\n\n\n# Answer\nA</s>\n"),
        (FULL, ask("A", instruction="T", input="I"),
         "<s># Task\nT\n\n# Input\nI\n\n\n# Answer\nA</s>\n"),
        (FULL, ask("A", system="S", instruction="T", input=""),
         "<s># System\nS\n\n# Task\nT\n\n# Answer\nA</s>\n"),
        (FULL, chat("Hi.", "A"), "<s># Task\nHi.\n\n# Answer\nA</s>\n"),
        (FULL, ask("A", "B", system="S", instruction="T", input="I"),
         "<s># System\nS\n\n# Task\nT\n\n# Input\nI\n\n\n# Answer\nA</s>\n"
         "# Task\nT\n\n# Input\nI\n\n\n# Answer\nB</s>\n"),
        (FULL, ask(instruction="T", input=""), "<s># Task\nT\n\n# Answer\n"),
        ("{system}\n{instruction}\n{output}", SYSTEM, "<s>Be brief.\nHi.\nHello!</s>"),
        ("{system}\n{instruction}\n{output}", ONE, "<s>Hi.\nHello!</s>"),
        ("{instruction}\n{system}\n\n{output}", ONE, "<s>Hi.\n\nHello!</s>"),
        ("{system} {instruction}\n{output}", ONE, "<s> Hi.\nHello!</s>"),
        ("Q: {instruction}\nAbout: {input}\nA: {output}", ONE, "<s>Q: Hi.\nA: Hello!</s>"),
        ("{system}{input}\n\n{instruction}{output}", ask("A", instruction="T", input="I"),
         "<s>I\n\nTA</s>"),
        ("{system}{input}\n\n{instruction}{output}", ONE, "<s>Hi.Hello!</s>"),
        # The whole user text where the format names one of its parts only.
        ("{instruction}:{output}", ask("A", instruction="T", input="I"), "<s>T\n\nI:A</s>"),
        ("{input}:{output}", ask("A", instruction="T", input="I"), "<s>T\n\nI:A</s>"),
        ("{input}:{output}", ask("A", instruction="", input="I"), "<s>I:A</s>"),
        ("{input}:{output}", MANY, "<s>Hi.:Hello!</s>And you?:Fine.</s>"),
        # A format that writes these tokens itself.
        ("<s>{instruction}:{output}</s>\n", ONE, "<s>Hi.:Hello!</s>\n"),
        ("{instruction}:{output} </s>", ONE, "<s>Hi.:Hello! </s>"),
        ("{instruction}:{output}. </s>", ONE, "<s>Hi.:Hello!</s>. </s>"),
        ("{{{instruction}}} {{{{x}}}} {{% if %}} {output}", ONE,
         "<s>{Hi.} {{x}} {% if %} Hello!</s>"),
    ],
)  # fmt: skip
def test_a_prompt_format_is_filled(form: str, messages: list[Message], text: str) -> None:
    assert render(prompt_format_template(form), messages, prompt=True) == text


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (SYSTEM, [], "no place for a system turn"),
        (CALLING, [], "no form for tool calls"),
        (ONE, [TOOL], "no form for tools"),
        ([ONE[0], {**ONE[1], "reasoning_content": "Hm."}], [], "no form for reasoning_content"),
        (ONE[1:], [], "user and assistant in turn"),
        ([*ONE, ONE[1]], [], "user and assistant in turn"),
    ],
)
def test_a_prompt_format_drops_nothing(messages: list[Message], tools: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        render(prompt_format_template("{instruction}\n{output}"), messages, tools=tools)


def test_answers_in_a_prompt_format_are_trained_with_their_end() -> None:
    tokenizer = tokenizer_for(prompt_format_template(FULL))
    for messages in (ONE, SYSTEM, MANY, ask("A", "B", system="S", instruction="T", input="I")):
        answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
        assert trained(tokenizer, messages, []) == answers


TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
    | st.sampled_from(
        ["{", "}", "{{", "}}", "{%", "%}", "{#", "#}", "{% raw %}", "{%- endif -%}", "\\", "\\n", "'",
         '"', "\n", "\r\n", "\r", "\n\n", " ", "\t", "\x00", "\u2028", "{{ bos_token }}", "</s>", "~"]
    ),
    max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_any_literal_and_any_text_survive(
    start: str, middle: str, after: str, question: str, answer: str
) -> None:
    literal = [part.replace("{", "{{").replace("}", "}}") for part in (start, middle, after)]
    form = f"{literal[0]}{{instruction}}{literal[1]}{{output}}{literal[2]}"
    bos = "" if start.startswith("<s>") else "<s>"
    eos = "" if after.lstrip().startswith("</s>") else "</s>"
    text = render(prompt_format_template(form), chat(question, answer))
    assert text == f"{bos}{start}{question}{middle}{answer}{eos}{after}"
