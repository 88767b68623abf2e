"""Ollama's Modelfile: its template writes what the chat template of the training writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.conversation import BadRow
from jobs.data.named_templates import FAMILIES, prompt_format_template
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer
from jobs.export.modelfile import CannotSay, files_of, go_template, modelfile, turns_of
from tests.data.cases import DEMO, find_templates, tokenizer_of
from tests.export import go_template as go

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {path.stem: path for path in find_templates()}
GO = os.environ.get("LORAJOB_GO") or shutil.which("go")

FORMAT = "{system}\n\n### Question:\n{instruction}\n\n### Answer:\n{output}"

needs_templates = pytest.mark.skipif(not TEMPLATES, reason="llama.cpp is not built: `make tools`")

# What cannot be said without guessing, and why.
THINKS = "it takes the reasoning out of earlier answers"
TURNS = "it writes some turns otherwise depending on what comes before or after"
REFUSES = "it does not take a plain conversation"
MOVES = "it leaves out, repeats or moves a turn"
NOT_SAID = {
    "Qwen-QwQ-32B": THINKS, "Qwen-Qwen3-0.6B": TURNS,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": THINKS,
    "mistralai-Mistral-Nemo-Instruct-2407": MOVES,  # its system text stands before the last question
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": REFUSES,
}  # fmt: skip


def talk(shape: str, system: str = "Be brief.") -> list[dict[str, str]]:
    said = {
        "s": ("system", system),
        "u": ("user", 'Is {{ .Content }} "it"?\n\n\\n'),
        "a": ("assistant", "It <is> {{- end }}.\n\nSo."),
    }
    return [{"role": said[letter][0], "content": said[letter][1]} for letter in shape]


def wanted(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    """The training template's rendering, as far as a prompt goes."""
    if messages[-1]["role"] == "user":
        return template.render(messages, add_generation_prompt=True)
    text = template.render(messages)
    last = messages[-1]["content"]
    return text[: text.rindex(last) + len(last)]


def sources() -> dict[str, ChatTemplate]:
    found = {name: ChatTemplate(family.source, SPECIAL, name) for name, family in FAMILIES.items()}
    found["prompt format"] = ChatTemplate(prompt_format_template(FORMAT), SPECIAL, "format")
    for name, path in TEMPLATES.items():
        found[name] = tokenizer_of(DEMO, path).template
    return found


def cases() -> list[tuple[str, ChatTemplate, str, list[dict[str, str]]]]:
    """Name, training template, Go template and conversation, for all that can be said."""
    found = []
    for name, template in sources().items():
        try:
            turns = turns_of(template)
        except CannotSay:
            continue
        shapes = ["u", "ua", "uau", "uaua", "uauauau"]
        if not any("system messages are left out" in note for note in turns.notes):
            shapes += [f"s{shape}" for shape in shapes]
        body = go_template(turns)
        found += [(name, template, body, talk(shape)) for shape in shapes]
    return found


def test_every_prompt_is_written_as_the_training_template_writes_it() -> None:
    compared = cases()
    for name, template, body, messages in compared:
        assert go.render(body, messages) == wanted(template, messages), (name, body)
    names = {name for name, *_ in compared}
    assert set(FAMILIES) | {"prompt format"} <= names
    if TEMPLATES:
        assert len(names & set(TEMPLATES)) >= 40


@pytest.mark.skipif(not GO, reason="there is no Go here (LORAJOB_GO or PATH)")
def test_go_itself_writes_them_so(tmp_path: Path) -> None:
    assert GO is not None
    source = Path(__file__).parent / "gotemplate" / "main.go"
    compared = cases()
    tasks = [
        {"template": body, "messages": [{"Role": m["role"], "Content": m["content"]} for m in talk]}
        for _, _, body, talk in compared
    ]
    done = subprocess.run(
        [GO, "run", str(source)], input=json.dumps(tasks), capture_output=True, text=True, check=False,
        env={**os.environ, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, template, _, messages), text in zip(compared, json.loads(done.stdout), strict=True):
        assert text == wanted(template, messages), name


@needs_templates
@pytest.mark.parametrize("name", NOT_SAID)
def test_what_cannot_be_said_is_left_to_the_gguf_with_the_reason(name: str) -> None:
    tokenizer = tokenizer_of(DEMO, TEMPLATES[name])
    text = modelfile(["x-Q4_K_M.gguf"], tokenizer, False)
    assert not re.search("^(TEMPLATE|SYSTEM)", text, re.MULTILINE)
    assert NOT_SAID[name] in text
    assert "FROM ./x-Q4_K_M.gguf\n" in text
    assert "PARAMETER stop" in text


@needs_templates
def test_a_system_text_of_the_template_is_the_models_default() -> None:
    tokenizer = tokenizer_of(DEMO, TEMPLATES["Qwen-Qwen2.5-7B-Instruct"])
    text = modelfile(["x-Q8_0.gguf"], tokenizer, False)
    system = re.search('^SYSTEM """(.*)"""$', text, re.MULTILINE)
    assert system
    assert system[1] == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    plain = [{"role": "user", "content": "Hi"}]
    told = [{"role": "system", "content": system[1]}, *plain]
    template = tokenizer.template
    assert template.render(told) == template.render(plain)
    body = text[text.index('TEMPLATE """') + 12 :].split('"""')[0]
    assert go.render(body, told) == go.render(body, plain) == wanted(template, plain)


def test_there_is_no_system_where_the_template_has_none(tokenizer: ChatTokenizer) -> None:
    assert "SYSTEM" not in modelfile(["demo-Q8_0.gguf"], tokenizer, False)


def test_the_token_that_is_put_first_anyway_is_not_written() -> None:
    template = ChatTemplate(FAMILIES["llama-2"].source, SPECIAL, "llama-2")
    turns = turns_of(template)
    messages = talk("uau")
    assert go.render(go_template(turns, "<s>"), messages) == wanted(template, messages)[3:]
    assert wanted(template, messages).startswith("<s>")
    assert go.render(go_template(turns), messages) == wanted(template, messages)


def test_the_demos_modelfile_says_all_that_is_needed(tokenizer: ChatTokenizer) -> None:
    text = modelfile(["demo-Q4_K_M.gguf", "demo-Q8_0.gguf"], tokenizer, False)
    assert text.startswith("FROM ./demo-Q4_K_M.gguf\n# FROM ./demo-Q8_0.gguf\n")
    assert text.endswith('\nPARAMETER stop "<|im_end|>"\n')
    assert text.count('"""') == 2


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_text_goes_through(system: str, question: str, answer: str) -> None:
    template = ChatTemplate(FAMILIES["chatml"].source, SPECIAL, "chatml")
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    try:
        text = template.render(messages, add_generation_prompt=True)
    except BadRow:
        return
    assert go.render(go_template(turns_of(template)), messages) == text


def test_the_usual_file_comes_first_and_parts_last() -> None:
    there = ["m-F16-LoRA.gguf", "m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf",
             "m-Q4_K_M.gguf", "m-Q8_0.gguf"]  # fmt: skip
    assert files_of("m", ["f16", "q8_0", "q4_k_m"], there) == [
        "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-F16-00001-of-00002.gguf",
    ]  # fmt: skip
