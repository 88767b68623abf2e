"""Proving a GGUF file: it loads, reads and writes text as the tokenizer does, and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import VerificationError
from jobs.export.llama import client

if TYPE_CHECKING:  # the module imports torch, and the preflight goes without
    from jobs.export.answers import Answer, Question, Said

# The adapter is stored in 16 bit, and the merged weights that it is taken off were rounded to them.
ADAPTER_LOSS = 0.02  # nats per trained token
ADAPTER_SHARE = 0.1  # of what training took off the loss


@dataclass(frozen=True)
class Found:
    """What a file gave: its loss on the rows (None where none were sent), answers, facts, faults."""

    loss: float | None
    answers: list[Answer]
    facts: dict[str, Any]
    failures: list[str]


@dataclass(frozen=True)
class GgufCheck:
    """Looks at one file after another, each in a process of its own."""

    tools: Path
    log: Path
    threads: int
    tokenizer: ChatTokenizer
    tokenizer_folder: Path
    conversations: list[Said]
    asked: list[Question]
    limit: int

    def look(self, files: list[Path], rows: list[dict[str, list[int]]]) -> Found:
        """The first of the files is the one that is loaded. `rows` are what its loss is found on."""
        texts = self.rendered
        prompts = [question.ids(self.tokenizer) for question in self.asked]
        longest = max(
            [1]
            + [len(row["input_ids"]) for row in rows]
            + [len(ids) + self.limit for ids in prompts]
        )
        try:
            seen = client.probe(
                self.tools, self.log, model=str(files[0]), texts=texts, rows=rows, prompts=prompts,
                max_new_tokens=self.limit, context=longest, threads=self.threads,
            )  # fmt: skip
        except VerificationError as error:
            silent: list[Answer] = [{"text": "", "stopped": False} for _ in self.asked]
            return Found(math.nan, silent, {}, [f"it cannot be used: {error.message}"])
        answers: list[Answer] = [
            {"text": answer["text"], "stopped": answer["stopped"]} for answer in seen["answers"]
        ]
        facts = {
            "size": sum(file.stat().st_size for file in files),
            "tokens_per_second": seen["tokens_per_second"],
            "pre": seen["metadata"].get("tokenizer.ggml.pre"),
        }
        failures = [
            *self._tokens(texts, seen["ids"]),
            *self._metadata(seen["metadata"]),
            *self._special(seen["special"]),
        ]
        loss = (seen["loss"] if seen["loss"] is not None else math.nan) if rows else None
        return Found(loss, answers, facts, failures)

    @cached_property
    def rendered(self) -> list[str]:
        render = self.tokenizer.template.render
        return [render(said["messages"], said["tools"]) for said in self.conversations]

    def _tokens(self, texts: list[str], ids: list[list[int]]) -> list[str]:
        wrong = [
            text
            for text, found in zip(texts, ids, strict=True)
            if found != self.tokenizer.ids_of(text)
        ]
        if not wrong:
            return []
        return [
            f"llama.cpp splits {len(wrong)} of {len(texts)} conversations into other tokens than "
            f"the tokenizer, the first: {wrong[0][:80]!r}"
        ]

    def _metadata(self, metadata: dict[str, str]) -> list[str]:
        failures = []
        if metadata.get("tokenizer.chat_template") != self.tokenizer.template.source:
            failures.append("its chat template is not the one that was trained with")
        said = metadata.get("tokenizer.ggml.pre")
        # Only vocabularies of byte pairs are split into words first.
        if metadata.get("tokenizer.ggml.model") == "gpt2":
            expected = self._pre_tokenizer
            if expected is not None and said != expected:
                failures.append(
                    f"its pre-tokenizer is {said}, and the tokenizer's is {expected}: words would be "
                    "split otherwise"
                )
        return failures

    @cached_property
    def _pre_tokenizer(self) -> str | None:
        return client.pre_tokenizer(self.tools, self.tokenizer_folder, self.log)

    def _special(self, special: dict[str, Any]) -> list[str]:
        tokenizer, failures = self.tokenizer, []

        def name(token: int) -> str:
            text = tokenizer.backend.id_to_token(token) if token >= 0 else None
            return repr(text) if text is not None else "none"

        if special["eos"] not in tokenizer.stop_ids:
            failures.append(
                f"its end-of-sequence token is not the one that was trained but {name(special['eos'])}"
            )
        if tokenizer.eos_id not in special["end"]:
            failures.append(
                f"llama.cpp would not stop at {name(tokenizer.eos_id)}, which ends each answer"
            )
        if tokenizer.bos_id is not None and special["bos"] != tokenizer.bos_id:
            failures.append(
                f"its beginning-of-sequence token is {name(special['bos'])}, the tokenizer's "
                f"{name(tokenizer.bos_id)}"
            )
        # Where no special token is left for padding, the file may name any or none.
        padding = tokenizer.pad_id if tokenizer.is_special(tokenizer.pad_id) else special["pad"]
        if special["pad"] >= 0 and special["pad"] != padding:
            failures.append(
                f"its padding token is {name(special['pad'])}, not {name(tokenizer.pad_id)}"
            )
        if special["add_bos"] and not begins_with_bos(tokenizer, self.rendered):
            failures.append(
                f"llama.cpp would put {name(special['bos'])} before every conversation, which none "
                "had in training"
            )
        if special["add_eos"]:
            failures.append("llama.cpp would end every prompt with an end-of-sequence token")
        return failures


def begins_with_bos(tokenizer: ChatTokenizer, rendered: list[str]) -> bool:
    """Whether the template writes the beginning-of-sequence token. llama.cpp takes it off again
    where the file says to add one."""
    bos = tokenizer.special_tokens.get("bos_token")
    return bool(bos) and all(text.startswith(str(bos)) for text in rendered)


def adapter_failures(
    made: dict[str, Any], file: Path, base_loss: float, tuned_loss: float, trained: int
) -> list[str]:
    """`made`: what make_gguf found out of the adapter's GGUF; `trained`: the adapter's own tensors."""
    failures = []
    if made["tensors"] != trained:
        failures.append(f"{file.name}: it has {made['tensors']} tensors, the adapter {trained}")
    without = made.get("loss_without")
    if without is None:
        return failures
    allowed = ADAPTER_LOSS + ADAPTER_SHARE * abs(base_loss - tuned_loss)
    if not abs(without - base_loss) <= allowed:
        failures.append(
            f"{file.name}: taken off the merged model again it should leave the base, whose loss is "
            f"{base_loss:.3f}, but leaves {without:.3f}"
        )
    return failures
