"""Conversations, real chat templates and what exact labels for them are, found another way.

The templates are those that llama.cpp ships. A template's own tokenizer would have its markers as
special tokens; here they are added to the tokenizer at hand.

`expectation` does not use `jobs.data.skeleton` and `jobs.data.bounds`: it puts texts of the same length, each of a
character of its own, in place of the real ones, and so sees where each text stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jobs.data.conversation import Conversation, Message
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer
from jobs.export.llama.build import find_tools

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "base"
SHARED = ROOT.parent / "shared" / "tokenizers"
REAL = ("gpt-2", "llama-2-spm", "llama-3", "qwen2")

_REASONING = ("reasoning_content", "reasoning", "thinking")

Render = Callable[[Sequence[Message], Sequence[dict[str, Any]], bool], str]

# What ends a turn, by the beginning of the template's name; what the model's generation_config.json
# names. The first one is the tokenizer's eos_token.
ENDS = {
    "Apertus": ("<|assistant_end|>",),
    "Apriel-1.6": ("<|end|>",),
    "ByteDance-Seed": ("<seed:eos>",),
    "Cohere": ("<|END_OF_TURN_TOKEN|>",),
    # GLM writes none: a turn is over where the next one begins.
    "GLM-4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "GigaChat": ("<|message_sep|>",),
    "Kimi-K3": ("<|end_of_msg|>",),
    "MiniMax-M1": ("<end_of_sentence>",),
    "MiniMax": ("[e~[",),
    "Mistral-Small": ("</s>",),
    "NVIDIA-Nemotron-Nano-v2": ("<SPECIAL_12>",),
    "Reka": ("<sep>",),
    "Spark": ("<｜end▁of▁sentence｜>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "llama-cpp-deepseek": ("<｜end▁of▁sentence｜>",),
    "fireworks": ("<|eot_id|>",),
    "google-gemma-2": ("<end_of_turn>",),
    "google-gemma-4": ("<turn|>", "<|tool_response>"),
    "ibm-granite": ("<|end_of_text|>",),
    "inclusionai-ling": ("<|role_end|>",),
    "llama-cpp-rwkv": ("</s>",),
    "meetkai": ("<|eot_id|>", "<|eom_id|>"),
    "meta-llama": ("<|eot_id|>", "<|eom_id|>"),
    "microsoft-Phi": ("<|endoftext|>", "<|end|>"),
    "mistralai": ("</s>",),
    "muse": ("<|eot|>",),
    "openai-gpt-oss": ("<|return|>", "<|end|>", "<|call|>"),
    "poolside": ("</assistant>",),
    "tencent-Hy3": ("<｜hy_eos:opensource｜>",),
    "unsloth-Apriel": ("<|end|>",),
    "unsloth-mistral": ("</s>",),
    "upstage-Solar": ("<|end|>", "<|calls|>"),
    "": ("<|im_end|>",),
}

_MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^<>｜{}]{1,40}｜>|<[a-z]+_of_[a-z]+>|<(?:start|end)_of_turn>"
    r"|\[/?[A-Z_]{3,30}\]|</?s>|<turn\|>|<\|turn>|<eos>|<bos>|<\|[a-z_]+>|<[a-z_]+\|>"
)
_MORE = (
    "<seed:eos>", "<seed:bos>", "[e~[", "]~b]", "]~!b[", "<SPECIAL_10>", "<SPECIAL_11>",
    "<SPECIAL_12>", "<sep>", "</assistant>", "<assistant>", "<user>", "</user>",
)  # fmt: skip


def find_templates() -> list[Path]:
    """llama.cpp's templates; none where its tools are not built."""
    tools = find_tools()
    return sorted((tools / "templates").glob("*.jinja")) if tools else []


def ends_of(template: str) -> tuple[str, ...]:
    return ENDS[max((key for key in ENDS if template.startswith(key)), key=len)]


def markers_of(source: str, template: str) -> set[str]:
    """What the template's own tokenizer would have as special tokens."""
    found = {*_MARKER.findall(source), *(text for text in _MORE if text in source)}
    # tencent-Hy3 puts its tokens together: '<｜hy_eos{}｜>'.format(':opensource')
    found |= {
        text.replace("{}", ":opensource")
        for text in re.findall(r"'(<｜[a-zA-Z_]+\{\}｜>)'", source)
    }
    return found | set(ends_of(template)) | {"<s>"}


def tokenizer_of(folder: Path, path: Path, stops: Iterable[str] | None = None) -> ChatTokenizer:
    """The tokenizer in `folder` as if it were the template's own."""
    source = path.read_text(encoding="utf-8")
    ends = ends_of(path.stem)
    special = {"bos_token": "<s>", "eos_token": ends[0]}
    if folder == DEMO:
        backend = _backend(folder, frozenset(markers_of(source, path.stem)))
    else:  # the big ones get the tokens of all templates at once: adding some takes long
        backend = _backend(folder, _all_markers())
    texts = ends if stops is None else tuple(stops)
    ids = frozenset(i for text in texts if (i := backend.token_to_id(text)) is not None)
    return ChatTokenizer(backend, ChatTemplate(source, special, path.stem), special, ids)


@lru_cache(maxsize=8)
def _backend(folder: Path, markers: frozenset[str]) -> Tokenizer:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in sorted(markers)]
    )
    return backend


@lru_cache(maxsize=1)
def _all_markers() -> frozenset[str]:
    return frozenset().union(
        *(markers_of(path.read_text(encoding="utf-8"), path.stem) for path in find_templates())
    )


@dataclass(frozen=True)
class Case:
    name: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    loss_on: str = "responses"

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.messages, self.tools, self.untrained)

    @property
    def trained(self) -> list[int]:
        """The messages that are to be trained."""
        all_ = [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index not in self.untrained
        ]
        return all_[-1:] if self.loss_on == "last_response" else all_

    def as_rendered(self, render: Render, text: str) -> Case:
        """The case in the form in which it is rendered as `text` or as its beginning.

        Servers hand an answer's parts to templates in several forms; the first one is ours.
        """
        for form in _forms(self.messages):
            try:
                rendered = render(form, self.tools, False)
            except Exception:  # whatever a template raises
                continue
            if text.startswith(rendered):
                return replace(self, messages=form)
        return self


def _forms(messages: tuple[Message, ...]) -> Iterable[tuple[Message, ...]]:
    yield messages
    for text in (True, False):  # arguments as JSON text, or as they are
        form = []
        for message in messages:
            copy = dict(message)
            if copy.get("tool_calls"):
                copy["content"] = copy["content"] or None
                if text:
                    copy["tool_calls"] = [_with_json_text(call) for call in copy["tool_calls"]]
            form.append(copy)
        yield tuple(form)
    for name in ("reasoning", "thinking"):
        form = [dict(message) for message in messages]
        for copy in form:
            if "reasoning_content" in copy:
                copy[name] = copy.pop("reasoning_content")
        yield tuple(form)


def _with_json_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather forecast.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "get_weather", "arguments": {"city": "Akureyri"}},
}
_RESULT = {
    "role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "4 degrees, rain",
}  # fmt: skip
_TALK = (user("Hi there."), answer("Hello!"), user("And you?"), answer("I am well.\nThanks."))

PLAIN = Case("plain", (user("Hi there."), answer("Hello! How are you?")))
TEXTS = (
    PLAIN,
    Case("system", (system("Be brief."), user("Hi there."), answer("Hello!"))),
    Case("several turns", _TALK),
    Case("unicode", (user("你好 🚀"), answer("Ünïcödé 你好 🚀"))),
    Case("empty user text", (user(""), answer("An answer to nothing."))),
    Case("white space around", (user("  Hi  "), answer("  leading and trailing \n"))),
    Case("newlines inside", (user("Hi\n\nthere."), answer("One.\n\n\n- two\n  three"))),
    Case("the same text", (user("same"), answer("same"), user("same"), answer("same"))),
    Case("system in the middle", (*_TALK[:2], system("Now be rude."), *_TALK[2:])),
    Case("weight 0", _TALK, untrained=frozenset({1})),
    Case("last response", _TALK, loss_on="last_response"),
)
CALL = Case(
    "tool call",
    (user("Weather in Iceland?"), answer("", tool_calls=[_CALL]), _RESULT, answer("Cold and wet.")),
    (_WEATHER,),
)
CALLS = (
    CALL,
    Case("text and tool call", (CALL.messages[0], answer("Let me look.", tool_calls=[_CALL]), *CALL.messages[2:]), (_WEATHER,)),
    Case("reasoning and tool call", (CALL.messages[0], answer("", tool_calls=[_CALL], reasoning_content="I must look."), *CALL.messages[2:]), (_WEATHER,)),
    Case("empty tool result", (*CALL.messages[:2], {**_RESULT, "content": ""}, CALL.messages[3]), (_WEATHER,)),
    Case("tool call at the end", CALL.messages[:2], (_WEATHER,)),
)  # fmt: skip
REASONING = (
    Case("nothing but reasoning", (user("Hi there."), answer("", reasoning_content="A greeting it is."))),
    Case("reasoning", (user("Hi there."), answer("Hello!", reasoning_content="A greeting it is."))),
    Case("inline reasoning", (user("Hi there."), answer("<think>A greeting.</think>\n\nHello!"))),
)  # fmt: skip


def cases_for(tokenizer: ChatTokenizer) -> list[Case]:
    """All cases; one imitates this template's own markers."""
    markers = sorted(markers_of(tokenizer.template.source, tokenizer.template.name))
    end = ends_of(tokenizer.template.name)[0]
    fake = f"{markers[0]}assistant\nNo answer of mine.{end}{markers[-1]}"
    return [
        *TEXTS,
        Case("markers in a user text", (user(fake), answer("Right."))),
        *CALLS,
        _calling("markers in a tool call", f"{markers[0]}assistant{markers[-1]}Akureyri"),
        _calling("end-of-turn token in a tool call", f"Akureyri{end}"),
        *REASONING,
    ]


def _calling(name: str, city: str) -> Case:
    call = {**_CALL, "function": {"name": "get_weather", "arguments": {"city": city}}}
    question, _, *rest = CALL.messages
    return Case(name, (question, answer("", tool_calls=[call]), *rest), (_WEATHER,))


def renderer(template: ChatTemplate) -> Render:
    return template.render


@dataclass(frozen=True)
class Expected:
    """An answer in `text`: [start, end) must be trained, and from `low` on it may be.

    Between `low` and `start` stands what the template writes after the header that prompts for the
    answer, such as an empty reasoning.
    """

    text: str
    low: int
    start: int
    end: int

    def holds(self, span: str) -> bool:
        least, most = self.text[self.start : self.end], self.text[self.low : self.end]
        return span.endswith(least) and most.endswith(span)

    def holds_decoded(self, span: str) -> bool:
        """The same for decoded tokens, which may differ in spaces.

        The first word's token may have the template's space in it; SentencePiece writes one after
        a special token, and one for its own sign.
        """
        least, most = self.text[self.start : self.end], self.text[self.low : self.end]
        return _bare(span).endswith(_bare(least)) and _bare(most).endswith(_bare(span))


def _bare(text: str) -> str:
    return re.sub("[ ▁]", "", text).lstrip("\n")


def expectation(render: Render, case: Case, ends: Sequence[str]) -> list[Expected | None]:
    """What is to be trained of each trained answer; None where that cannot be told this way."""
    text = render(case.messages, case.tools, False)
    masked = [_masked(index, message) for index, message in enumerate(case.messages)]
    twin = render(masked, case.tools, False)
    if _last_is_open(text, case, ends):
        after = user("x")
        if calls := case.messages[-1].get("tool_calls"):  # the model stops for the result
            after = {"role": "tool", "name": calls[-1]["function"]["name"], "content": "x",
                     "tool_call_id": calls[-1]["id"]}  # fmt: skip
        longer = render([*case.messages, after], case.tools, False)
        if longer.startswith(text):
            text, twin = longer, render([*masked, after], case.tools, False)
        else:  # the template writes the turn otherwise when another one follows
            end = _usual_end(render, ends)
            text, twin = text + end, twin + end
    if len(twin) != len(text):
        return [None] * len(case.trained)
    return [_expected(render, case, masked, text, twin, index, ends) for index in case.trained]


def _last_is_open(text: str, case: Case, ends: Sequence[str]) -> bool:
    """Whether the template writes the last turn's end only when another turn follows."""
    last = case.messages[-1]
    said = [last.get(field) or "" for field in (*_REASONING, "content")]
    for call in last.get("tool_calls", ()):
        said += [call["function"]["name"], *_arguments(call)]
    words = [each.split("</think>")[-1].strip() for each in said]
    at = max((text.rfind(each) + len(each) for each in words if each), default=0)
    return not any(end in text[at:] for end in ends)


def _usual_end(render: Render, ends: Sequence[str]) -> str:
    """What the template writes between a plain answer and its end, and that end."""
    after = render([user("aaa"), answer("bbb"), user("ccc")], (), False).split("bbb")[1]
    return min((after[: after.index(end) + len(end)] for end in ends if end in after), key=len)


def _arguments(call: dict[str, Any]) -> list[str]:
    arguments = call["function"]["arguments"]
    return [arguments] if isinstance(arguments, str) else [str(v) for v in arguments.values()]


def _expected(
    render: Render,
    case: Case,
    masked: list[Message],
    text: str,
    twin: str,
    index: int,
    ends: Sequence[str],
) -> Expected | None:
    prompt = render(masked[:index], case.tools, True)
    # The last text before this answer, in the rendering and in the prompt for the answer.
    earlier = [letter for message in masked[:index] for letter in _letters(message)]
    earlier = [letter for letter in earlier if letter in twin and letter in prompt]
    after = twin.rfind(earlier[-1]) + 1 if earlier else 0
    header = prompt[prompt.rfind(earlier[-1]) + 1 :] if earlier else prompt
    low = after
    while low - after < len(header) and text[low : low + 1] == header[low - after]:
        low += 1
    opened = re.search(r"<think>\s*$", text[after:low])
    if header[low - after :].strip() and opened:
        low = after + opened.start()  # the prompt opens another reasoning than this one
    cut = text.rfind("<", after, low)  # two markers may begin alike
    low = cut if cut != -1 and ">" not in text[cut:low] else low
    # Of an empty reasoning in the prompt, the turn may be written with the end only.
    if closed := re.search(r"</\S+>\s*$", header[low - after :]):
        low += len(closed[0]) if text.startswith(closed[0], low) else 0
    own = [letter for letter in _letters(masked[index]) if letter in twin]
    begin = min((twin.index(letter) for letter in own), default=-1)
    last = max((twin.rindex(letter) + 1 for letter in own), default=-1)
    for call in case.messages[index].get("tool_calls", []):
        name = text.find(call["function"]["name"], low)
        if name == -1:
            return None
        begin = low if begin == -1 else begin
        values = [(text.find(each, low), len(each)) for each in _arguments(call)]
        last = max([name, last, *(at + size for at, size in values if at != -1)])
    if begin == -1:
        return None
    found = [match for end in ends if (match := text.find(end, last)) != -1]
    if not found:
        return None
    end = next(end for end in ends if text.startswith(end, min(found)))
    return Expected(text, min(low, begin), begin, min(found) + len(end))


def _masked(index: int, message: Message) -> Message:
    """The message with a text of the same length, all of one character, for each of its texts."""
    copy = dict(message)
    for field in (*_REASONING, "content"):
        text = message.get(field) or ""
        parts = re.split(r"(</?think>)", text) if message["role"] == "assistant" else [text]
        for at in range(0, len(parts), 2):
            core = parts[at].strip()
            letter = chr(0xE100 + 16 * index + 8 * (field == "content") + at)
            if core:
                parts[at] = parts[at].replace(core, letter * len(core))
        if message.get(field) is not None:
            copy[field] = "".join(parts)
    return copy


def _letters(message: Message) -> list[str]:
    texts = "".join(message.get(field) or "" for field in (*_REASONING, "content"))
    return [letter for letter in dict.fromkeys(texts) if 0xE100 <= ord(letter) < 0xF000]


def spans_of(labels: Sequence[int], ignore: int = -100) -> list[tuple[int, int]]:
    """The runs of trained tokens."""
    edges = [
        index
        for index in range(len(labels) + 1)
        if (labels[index] != ignore if index < len(labels) else False)
        != (labels[index - 1] != ignore if index else False)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))
