"""Conversations, real chat templates and what exact labels for them are, found another way.

The templates are those that llama.cpp ships. A template's own tokenizer would have its markers as
special tokens; here they are added to the tokenizer at hand.

`expectation` does not use `jobs.data.skeleton`: it puts texts of the same length, each of a
character of its own, in place of the real ones, and so sees where each text stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
REASONING = (
    Case("reasoning", (user("Hi there."), answer("Hello!", reasoning_content="A greeting it is."))),
    Case("inline reasoning", (user("Hi there."), answer("<think>A greeting.</think>\n\nHello!"))),
)


def cases_for(tokenizer: ChatTokenizer) -> list[Case]:
    """All cases; one imitates this template's own markers."""
    markers = sorted(markers_of(tokenizer.template.source, tokenizer.template.name))
    end = ends_of(tokenizer.template.name)[0]
    fake = f"{markers[0]}assistant\nNo answer of mine.{end}{markers[-1]}"
    return [
        *TEXTS,
        Case("markers in a user text", (user(fake), answer("Right."))),
        CALL,
        *REASONING,
    ]


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
    after = [user("x")] if _last_is_open(text, case, ends) else []
    text = render([*case.messages, *after], case.tools, False)
    masked = [_masked(index, message) for index, message in enumerate(case.messages)]
    twin = render([*masked, *after], case.tools, False)
    if len(twin) != len(text):
        return [None] * len(case.trained)
    return [_expected(render, case, masked, text, twin, index, ends) for index in case.trained]


def _last_is_open(text: str, case: Case, ends: Sequence[str]) -> bool:
    """Whether the template writes the last turn's end only when another turn follows."""
    words = str(case.messages[-1]["content"]).strip()
    return not any(end in text[text.rfind(words) + len(words) :] for end in ends)


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
    if low - after < len(header) and (opened := re.search(r"<think>\s*$", text[after:low])):
        low = after + opened.start()  # the prompt opens another reasoning than this one
    cut = text.rfind("<", after, low)  # two markers may begin alike
    low = cut if cut != -1 and ">" not in text[cut:low] else low
    own = [letter for letter in _letters(masked[index]) if letter in twin]
    begin = min((twin.index(letter) for letter in own), default=-1)
    last = max((twin.rindex(letter) + 1 for letter in own), default=-1)
    for call in case.messages[index].get("tool_calls", []):
        name = text.find(call["function"]["name"], low)
        if name == -1:
            return None
        begin = low if begin == -1 else begin
        last = max(
            [name, last, *(text.find(v, low) for v in call["function"]["arguments"].values())]
        )
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
    for number, field in enumerate(("reasoning_content", "content")):
        text = message.get(field, "")
        parts = re.split(r"(</?think>)", text) if message["role"] == "assistant" else [text]
        for at in range(0, len(parts), 2):
            core = parts[at].strip()
            letter = chr(0xE100 + 16 * index + 8 * number + at)
            if core:
                parts[at] = parts[at].replace(core, letter * len(core))
        if field in message:
            copy[field] = "".join(parts)
    return copy


def _letters(message: Message) -> list[str]:
    texts = message.get("reasoning_content", "") + message.get("content", "")
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
