"""The child process that uses libllama: a JSON request on stdin.

The answer is a line of JSON on the file descriptor that the parent names, because libllama writes
what it likes to standard output and standard error. Before it come lines [done, of how many], from
what takes long.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    tools, answer_fd = Path(sys.argv[1]), int(sys.argv[2])
    # llama.cpp's own gguf package, which knows what its libllama writes, before an installed one.
    sys.path[:0] = [str(tools), str(tools / "gguf-py")]
    from jobs.export.llama import files, importance, probing, quantizing

    answers = os.fdopen(answer_fd, "w")

    def tell(done: int, total: int) -> None:
        print(json.dumps([done, total]), file=answers, flush=True)

    known: dict[str, Callable[..., dict[str, Any]]] = {
        "quantize": partial(quantizing.quantize, tell=tell),
        "imatrix": importance.imatrix,
        "probe": probing.probe,
        "score": probing.score,
        "tokenize": probing.tokenize,
        "split": files.split,
        "pre_tokenizer": files.pre_tokenizer,
    }
    request = json.load(sys.stdin)
    answer = known[request.pop("do")](**request)
    with answers:
        json.dump(answer, answers)
    os._exit(0)  # with what is left of threads that nobody waits for


if __name__ == "__main__":
    main()
