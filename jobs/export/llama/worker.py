"""The child process that uses libllama: a JSON request on stdin.

The answer is JSON on the file descriptor that the parent names, because libllama writes what it
likes to standard output and standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    tools, answer_fd = Path(sys.argv[1]), int(sys.argv[2])
    # llama.cpp's own gguf package, which knows what its libllama writes, before an installed one.
    sys.path[:0] = [str(tools), str(tools / "gguf-py")]
    from jobs.export.llama import files, probing, quantizing

    known: dict[str, Callable[..., dict[str, Any]]] = {
        "quantize": quantizing.quantize,
        "imatrix": quantizing.imatrix,
        "probe": probing.probe,
        "score": probing.score,
        "tokenize": probing.tokenize,
        "split": files.split,
        "pre_tokenizer": files.pre_tokenizer,
    }
    request = json.load(sys.stdin)
    answer = known[request.pop("do")](**request)
    with os.fdopen(answer_fd, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
