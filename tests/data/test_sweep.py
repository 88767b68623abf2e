"""Labels with every chat template that llama.cpp ships: exact, or refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.data.conversation import BadRow
from jobs.data.labels import IGNORE, Labelled, label
from jobs.data.tokenizer import ChatTokenizer
from tests.data.cases import (
    CALL,
    DEMO,
    PLAIN,
    REAL,
    REASONING,
    SHARED,
    Case,
    cases_for,
    ends_of,
    expectation,
    find_templates,
    renderer,
    tokenizer_of,
)

TEMPLATES = find_templates()
FOLDERS = {"demo": DEMO, **{name: SHARED / name for name in REAL}}

needs_templates = pytest.mark.skipif(not TEMPLATES, reason="llama.cpp is not built: `make tools`")
each_tokenizer = pytest.mark.parametrize("name", FOLDERS)

NO_TOOLS = "cannot go without tools"  # the template reads them without asking
NO_END = "no end-of-turn token"
REASONS = {
    NO_TOOLS: re.compile("'NoneType' object is not iterable|'functions' is undefined"),
    NO_END: re.compile("would never learn to stop"),
}

# The templates that refuse a plain question and answer; every other one labels it.
REFUSED = {
    "CohereForAI-c4ai-command-r-plus-tool_use": NO_TOOLS,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": NO_TOOLS,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": NO_TOOLS,
    "fireworks-ai-llama-3-firefunction-v2": NO_TOOLS,
    "llama-cpp-rwkv-world": NO_END,
}

# Without the model's stop tokens in its files these cannot be labelled: GLM ends a turn with the
# token that begins the next one.
NEEDS_STOPS = {"GLM-4.6": NO_END, "GLM-4.7-Flash": NO_END}

# At least so many templates label these with the demo's tokenizer.
LABELLED = {
    "tool call": 53, "text and tool call": 39, "reasoning and tool call": 54,
    "empty tool result": 53, "tool call at the end": 52, "markers in a tool call": 38,
    "nothing but reasoning": 17, "reasoning": 18, "inline reasoning": 58,
}  # fmt: skip

# With what the model begins a call, where the prompt ends otherwise than the turn is written. Read
# off the templates by hand.
CALLS_BEGIN = {
    # no header: the turn follows [/INST]
    "Mistral-Small-3.2-24B-Instruct-2506": "[TOOL_CALLS]get_weather",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[TOOL_CALLS]get_weather",
    "mistralai-Mistral-Nemo-Instruct-2407": '[TOOL_CALLS][{"name"',
    "unsloth-mistral-Devstral-Small-2507": "[TOOL_CALLS]get_weather",
    # the prompt has an empty reasoning, the turn none
    "Qwen-QwQ-32B": '<tool_call>\n{"name"',
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜tool▁calls▁begin｜>",
    "google-gemma-4-31B-it": "<|tool_call>call:get_weather",
    "google-gemma-4-31B-it-interleaved": "<|tool_call>call:get_weather",
    # the prompt has an empty reasoning, the turn its end
    "deepseek-ai-DeepSeek-V3.2": "\n\n<｜DSML｜function_calls>",
    "deepseek-ai-DeepSeek-V4": "\n\n<｜DSML｜tool_calls>",
    # the prompt opens a reasoning, and the turn ends it
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "</think>\n<tool_call>",
    "GLM-4.7-Flash": "</think><tool_call>get_weather",
    # the prompt writes the empty reasoning always
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_ACTION|>",
    # the arguments have to be JSON text
    "meetkai-functionary-medium-v3.2": 'get_weather\n{"city"',
}


def folder_of(name: str) -> Path:
    if not FOLDERS[name].is_dir():
        pytest.skip(f"there is no {FOLDERS[name]}")
    return FOLDERS[name]


def refusal(tokenizer: ChatTokenizer, case: Case) -> str | None:
    try:
        label(tokenizer, case.conversation, case.loss_on)
    except BadRow as reason:
        return str(reason)
    return None


def reason_of(refused: str) -> str:
    return next((name for name, known in REASONS.items() if known.search(refused)), refused)


def fault(tokenizer: ChatTokenizer, case: Case, made: Labelled) -> str | None:
    """What is wrong with the labels, or None."""
    render, ends = renderer(tokenizer.template), ends_of(tokenizer.template.name)
    expected = expectation(render, case.as_rendered(render, made.text), ends)
    if len(expected) != len(made.turns):
        return f"{len(made.turns)} trained turns, not {len(expected)}"
    inside = {i for turn in made.turns for i in range(turn.start, turn.end)}
    for index, value in enumerate(made.labels):
        if value != (made.input_ids[index] if index in inside else IGNORE):
            return f"the label at {index} is wrong"
    for turn, answer in zip(made.turns, expected, strict=True):
        decoded = tokenizer.text_of(made.input_ids[turn.start : turn.end])
        before = tokenizer.text_of(made.input_ids[: turn.end])
        if answer is None:
            return "where the answer stands cannot be told"
        if not answer.holds(turn.text) or not answer.holds_decoded(decoded):
            return f"{decoded!r} is trained, not {answer.text[answer.start : answer.end]!r}"
        # It is this answer, and not another one with the same text.
        if squeezed(before) != squeezed(answer.text[: answer.end]):
            return f"{decoded!r} stands elsewhere"
        if made.input_ids[turn.end - 1] not in tokenizer.stop_ids:
            return f"{decoded!r} does not end with a stop token"
        if any(i in tokenizer.stop_ids for i in made.input_ids[turn.start : turn.end - 1]):
            return f"{decoded!r} has a stop token inside"
    return None


def squeezed(text: str) -> str:
    return re.sub("[ ▁]", "", text)


@needs_templates
@each_tokenizer
def test_every_conversation_is_labelled_exactly_or_refused(name: str) -> None:
    folder = folder_of(name)
    faults, labelled = [], dict.fromkeys(LABELLED, 0)
    for path in TEMPLATES:
        tokenizer = tokenizer_of(folder, path)
        for case in cases_for(tokenizer):
            try:
                made = label(tokenizer, case.conversation, case.loss_on)
            except BadRow as reason:
                assert str(reason)
                continue
            if wrong := fault(tokenizer, case, made):
                faults.append(f"{path.stem}, {case.name}: {wrong}")
            elif case.name in labelled:
                labelled[case.name] += 1
    assert not faults, "\n".join(faults)
    if name == "demo":
        assert all(labelled[case] >= least for case, least in LABELLED.items()), labelled


@needs_templates
@each_tokenizer
def test_a_plain_answer_is_refused_by_these_templates_only(name: str) -> None:
    folder = folder_of(name)
    found = {path.stem: refusal(tokenizer_of(folder, path), PLAIN) for path in TEMPLATES}
    refused = {stem: reason_of(reason) for stem, reason in found.items() if reason is not None}
    assert refused == REFUSED


@needs_templates
def test_the_end_is_found_where_the_files_name_another_stop_token() -> None:
    refused = {}
    for path in TEMPLATES:
        if len(ends_of(path.stem)) == 1 and path.stem.startswith(("Cohere", "Kimi-K3")):
            continue  # <|END_RESPONSE|><|END_OF_TURN_TOKEN|>: only the files tell which one stops
        tokenizer = tokenizer_of(DEMO, path, stops=["<s>"])
        try:
            made = label(tokenizer, PLAIN.conversation, "responses")
        except BadRow as reason:
            refused[path.stem] = reason_of(str(reason))
            continue
        assert fault(tokenizer, PLAIN, made) is None, path.stem
    known = REFUSED | NEEDS_STOPS
    assert refused == {stem: why for stem, why in known.items() if not stem.startswith("Cohere")}


@needs_templates
def test_a_call_begins_where_the_prompt_ends() -> None:
    paths = {path.stem: path for path in TEMPLATES}
    for stem, begin in CALLS_BEGIN.items():
        made = label(tokenizer_of(DEMO, paths[stem]), CALL.conversation, "responses")
        call, answer = (turn.text for turn in made.turns)
        assert call.startswith(begin), stem
        assert call.endswith(ends_of(stem)), stem
        assert answer.startswith("Cold and wet."), stem


@needs_templates
@pytest.mark.parametrize("case", [CALL, *REASONING[1:]], ids=lambda case: case.name)
def test_what_the_model_writes_is_trained_after_the_header(case: Case) -> None:
    for path in TEMPLATES:
        tokenizer = tokenizer_of(DEMO, path)
        try:
            made = label(tokenizer, case.conversation, case.loss_on)
        except BadRow:
            continue
        first, text = made.turns[0].text, made.text
        prompt = tokenizer.template.render(case.messages[:1], case.tools, True)
        header = prompt[prompt.rindex("?" if case is CALL else ".") + 1 :]
        header = re.sub(r"<think>\s*$", "", header).strip()
        assert first.endswith(ends_of(path.stem)), path.stem
        assert not header or header not in first, path.stem
        assert case.messages[0]["content"] not in first, path.stem
        if case is CALL:
            assert "get_weather" in first and "Akureyri" in first, path.stem
            assert "degrees" not in first, path.stem
        else:
            assert "Hello!" in first, path.stem
            assert "A greeting" in first or "A greeting" not in text, path.stem
