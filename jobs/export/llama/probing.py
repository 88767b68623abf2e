"""Looking at a GGUF file from all sides. In the worker only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from jobs.export.llama.libllama import Model, Vocabulary

Row = dict[str, list[int]]  # input_ids and labels; a label below 0 is not trained


def probe(
    model: str,
    texts: list[str],
    rows: list[Row],
    prompts: list[list[int]],
    max_new_tokens: int,
    context: int,
    threads: int,
) -> dict[str, Any]:
    """Metadata, special tokens, token ids of texts, loss on rows, greedy answers."""
    llm = Model(model, context, threads)
    ids = [llm.tokenize(text) for text in texts]
    loss, count = 0.0, 0
    for row in rows:
        for labels, scores in _predictions(llm, row):
            loss -= float(scores[np.arange(len(labels)), labels].sum(dtype=np.float64))
            count += len(labels)
    answers, read, generated, read_seconds, seconds = [], 0, 0, 0.0, 0.0
    for prompt in prompts:
        tokens, stopped, for_prompt, for_answer = llm.answer(prompt, max_new_tokens)
        answers.append({"ids": tokens, "text": llm.text_of(tokens), "stopped": stopped})
        read, read_seconds = read + len(prompt), read_seconds + for_prompt
        generated, seconds = generated + len(tokens), seconds + for_answer
    return {
        "metadata": llm.metadata(),
        "special": special_tokens(llm),
        "ids": ids,
        "loss": loss / count if count else None,
        "loss_tokens": count,
        "answers": answers,
        "prompt_tokens_per_second": _rate(read, read_seconds),
        "tokens_per_second": _rate(generated, seconds),
        "bits_per_weight": bits_per_weight(llm),
    }


def tokenize(path: str, texts: list[str]) -> dict[str, Any]:
    """Token ids of texts, as the vocabulary in a file has them."""
    vocabulary = Vocabulary(path)
    return {"ids": [vocabulary.tokenize(text) for text in texts]}


def special_tokens(llm: Model) -> dict[str, Any]:
    """What the vocabulary, as libllama has loaded it, does with texts and answers."""
    return {
        "bos": lib.llama_vocab_bos(llm.vocab),
        "eos": lib.llama_vocab_eos(llm.vocab),
        "eot": lib.llama_vocab_eot(llm.vocab),
        "pad": lib.llama_vocab_pad(llm.vocab),
        "add_bos": bool(lib.llama_vocab_get_add_bos(llm.vocab)),
        "add_eos": bool(lib.llama_vocab_get_add_eos(llm.vocab)),
        "end": [t for t in range(llm.vocab_size) if lib.llama_vocab_is_eog(llm.vocab, t)],
    }


def bits_per_weight(llm: Model) -> float:
    weights = int(lib.llama_model_n_params(llm.handle))
    return round(8 * int(lib.llama_model_size(llm.handle)) / weights, 3)


def score(
    model: str,
    rows: list[Row],
    context: int,
    threads: int,
    limit_bytes: int,
    write: str | None = None,
    against: str | None = None,
    adapter: str | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Loss on the trained tokens of the rows and, against another model's predictions, how far off.

    `write` keeps this model's predictions in a file, one float32 a token of the vocabulary, for as
    many trained tokens as `limit_bytes` have room for; `against` compares with such a file.
    """
    llm = Model(model, context, threads)
    if adapter:
        llm.add_adapter(adapter, scale)
    room = limit_bytes // (4 * llm.vocab_size)
    loss, divergence, same, count, compared, read = 0.0, 0.0, 0, 0, 0, 0
    other = _mapped(against, llm.vocab_size) if against else None
    with Path(write or "/dev/null").open("wb") as file:
        for row in rows:
            read += len(row["input_ids"])
            for labels, scores in _predictions(llm, row):
                loss -= float(scores[np.arange(len(labels)), labels].sum(dtype=np.float64))
                kept = scores[: max(0, room - count)]
                if write:
                    file.write(np.ascontiguousarray(kept).data)
                if other is not None and len(kept):
                    theirs = other[count : count + len(kept)]
                    divergence += float((np.exp(theirs) * (theirs - kept)).sum(dtype=np.float64))
                    same += int((theirs.argmax(axis=1) == kept.argmax(axis=1)).sum())
                    compared += len(kept)
                count += len(labels)
    found: dict[str, Any] = {
        "loss": loss / max(count, 1),
        "tokens": count,
        "perplexity": float(np.exp(loss / max(count, 1))),
        "prompt_tokens_per_second": _rate(read, llm.decode_seconds),
        "bits_per_weight": bits_per_weight(llm),
    }
    if compared:
        # Rounding of the sums alone could make it a hair less than nothing.
        found["kl"] = max(0.0, divergence / compared)
        found["same_top"] = same / compared
        found["compared_tokens"] = compared
    return found


def _predictions(llm: Model, row: Row) -> Any:
    """The labels of a row's trained tokens, and log-probabilities at the positions before them."""
    labels = row["labels"]
    wanted = [index - 1 for index, label in enumerate(labels) if label >= 0 and index > 0]
    for positions, logits in llm.logits(row["input_ids"], wanted):
        scores = logits - logits.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True, dtype=np.float64)).astype("f4")
        yield np.array([labels[position + 1] for position in positions]), scores


def _mapped(path: str, vocab_size: int) -> Any:
    return np.memmap(path, dtype=np.float32, mode="r").reshape(-1, vocab_size)


def _rate(count: int, seconds: float) -> float:
    return round(count / max(seconds, 1e-9), 1) if count else 0.0
