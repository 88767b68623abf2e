"""The child process that uses libllama: `python worker.py TOOLS`, a JSON request on stdin.

The answer is JSON on the file descriptor that the parent names, because libllama writes what it
likes to standard output and standard error.

This file is run by its path and imports nothing of lorajob.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def quantize(source: str, target: str, file_type: int, threads: int) -> dict[str, Any]:
    import llama_cpp.llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = threads
    code = lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    return {"code": code}


def probe(
    model: str,
    texts: list[str],
    rows: list[dict[str, list[int]]],
    prompts: list[list[int]],
    max_new_tokens: int,
    context: int,
    threads: int,
) -> dict[str, Any]:
    """Look at a model from all sides: metadata, token ids, loss on rows, greedy answers."""
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        model, n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads,
        logits_all=True, verbose=False, use_mmap=True,
    )  # fmt: skip
    # The bindings add a token that the file asks for; what is given here is complete.
    ids = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    loss, count = 0.0, 0
    for row in rows:
        llm.reset()
        llm.eval(row["input_ids"])
        trained = [i for i, label in enumerate(row["labels"]) if label >= 0 and i > 0]
        scores = np.asarray(llm.scores[[i - 1 for i in trained]], dtype=np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[range(len(trained)), [row["labels"][i] for i in trained]]
        loss += float((np.log(np.exp(scores).sum(axis=1)) - chosen).sum())
        count += len(trained)
    answers, start, generated = [], time.monotonic(), 0
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    for prompt in prompts:
        llm.reset()
        answer, stopped = [], False
        for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
            generated += 1
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                stopped = True
                break
            answer.append(int(token))
            if len(answer) >= max_new_tokens:
                break
        text = llm.detokenize(answer, special=True).decode("utf-8", "replace")
        answers.append({"ids": answer, "text": text, "stopped": stopped})
    return {
        "metadata": {key: value for key, value in llm.metadata.items() if len(value) < 100_000},
        "ids": ids,
        "loss": loss / count if count else None,
        "loss_tokens": count,
        "answers": answers,
        "tokens_per_second": round(generated / max(time.monotonic() - start, 1e-9), 1),
    }


def main() -> None:
    tools, answer_fd = sys.argv[1], int(sys.argv[2])
    sys.path.insert(0, tools)
    request = json.load(sys.stdin)
    known: dict[str, Callable[..., dict[str, Any]]] = {"quantize": quantize, "probe": probe}
    answer = known[request.pop("do")](**request)
    with os.fdopen(answer_fd, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
