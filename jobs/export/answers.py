"""Questions and answers: what is asked, and what a transformers model says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from transformers import GenerationConfig

from jobs.data.conversation import Message
from jobs.data.tokenizer import ChatTokenizer
from jobs.spec import Verify

FROM_DATA = 4  # questions taken from the data where the spec has none


class Said(TypedDict):
    """A conversation of the data, as first.json keeps it."""

    messages: list[Message]
    tools: list[dict[str, Any]]


class Answer(TypedDict):
    text: str
    stopped: bool  # by an end-of-turn token, not by the limit


@dataclass(frozen=True)
class Question:
    messages: list[Message]  # up to and with the user's turn
    expect: str | None  # what the answer must contain
    required: bool  # from the spec: each must stop by itself
    tools: Sequence[dict[str, Any]] = ()

    @property
    def text(self) -> str:
        return str(self.messages[-1]["content"])

    def ids(self, tokenizer: ChatTokenizer) -> list[int]:
        return tokenizer.ids_of(
            tokenizer.template.render(self.messages, self.tools, add_generation_prompt=True)
        )


def questions(verify: Verify, conversations: list[Said]) -> list[Question]:
    """The spec's prompts; without any, how the first conversations of the data begin."""
    asked = []
    for prompt in verify.prompts:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        asked.append(
            Question([*system, {"role": "user", "content": prompt.ask}], prompt.expect, True)
        )
    for said in conversations[:FROM_DATA] if not asked else []:
        messages = said["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if first:
            asked.append(Question(messages[:first], None, False, said["tools"]))
    return asked


@torch.no_grad()
def ask(
    model: Any, tokenizer: ChatTokenizer, asked: list[Question], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers, one question after another."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
    )
    answers: list[Answer] = []
    for question in asked:
        prompt = torch.tensor([question.ids(tokenizer)], device=model.device)
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )
        ids = output[0, prompt.shape[1] :].tolist()
        stopped = bool(ids) and ids[-1] in tokenizer.stop_ids
        answers.append(
            {"text": tokenizer.text_of(ids[:-1] if stopped else ids), "stopped": stopped}
        )
    return answers
