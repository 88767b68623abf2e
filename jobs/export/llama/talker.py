"""The child process that talks: `python talker.py TOOLS FD`. It keeps one GGUF file loaded.

Each line on standard input is a request as JSON, each line on the file descriptor a piece of an
answer: libllama writes what it likes to standard output and standard error. A line that comes while
an answer is made ends it.

This file is run by its path and imports nothing of lorajob.
"""

from __future__ import annotations

import codecs
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

SMALL = 64 * 2**20  # bytes: threads that share less wait for one another longer than they reckon


def main() -> None:
    tools, answer_fd = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and says what is to end
    sys.path.insert(0, tools)
    requests = open(0, "rb", buffering=0)  # noqa: SIM115 - unbuffered, for select to see what waits
    with os.fdopen(answer_fd, "w") as answers:

        def tell(**fields: Any) -> None:
            answers.write(json.dumps(fields) + "\n")
            answers.flush()

        settings = json.loads(requests.readline())
        talker = _Talker(**settings)
        tell(**talker.about())
        while line := requests.readline():
            request = json.loads(line)
            if "prompt" not in request:
                continue  # an end that came too late
            for piece in talker.answer(**request):
                tell(text=piece)
                if select.select([requests], [], [], 0)[0]:
                    break
            tell(done=True, stopped=talker.stopped, too_long=talker.too_long)


class _Talker:
    def __init__(self, model: str, context: int, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        if Path(model).stat().st_size < SMALL:
            threads = 1
        self.llm = llama_cpp.Llama(
            model, n_ctx=context, n_batch=256, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
        self.stopped = self.too_long = False

    def about(self) -> dict[str, Any]:
        """What a chat template needs to know of the file."""
        tokens = {}
        for name in ("bos", "eos"):
            token = getattr(self.lib, f"llama_vocab_{name}")(self.vocab)
            text = self.lib.llama_vocab_get_text(self.vocab, token) if token >= 0 else b""
            tokens[f"{name}_token"] = text.decode("utf-8", "replace")
        template = self.llm.metadata.get("tokenizer.chat_template")
        return {"template": template, "special_tokens": tokens}

    def answer(
        self, prompt: str, temperature: float, min_p: float, seed: int, max_new_tokens: int
    ) -> Any:
        """The answer in pieces, each whole characters."""
        self.stopped = self.too_long = False
        # The bindings add a token that the file asks for; the prompt is complete.
        tokens = self.llm.tokenize(prompt.encode(), add_bos=False, special=True)
        room = self.llm.n_ctx() - len(tokens)
        if room <= 0:
            self.too_long = True
            return
        self.llm.set_seed(seed)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        made = self.llm.generate(
            tokens, temp=temperature, min_p=min_p, top_k=0, top_p=1.0, repeat_penalty=1.0
        )
        for count, token in enumerate(made, 1):
            if self.lib.llama_vocab_is_eog(self.vocab, token):
                self.stopped = True
                break
            yield decoder.decode(self.llm.detokenize([token], special=True))
            if count >= min(max_new_tokens, room):
                break


if __name__ == "__main__":
    main()
