"""Asking libllama and llama.cpp's converter for things, each in a child process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.errors import DoesNotFitError, VerificationError
from jobs.export.llama.build import LLAMA_CPP_COMMIT

# enum llama_ftype in llama.cpp's include/llama.h
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21, "iq3_xs": 22,
    "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29,
    "iq4_xs": 30, "iq1_m": 31, "bf16": 32,
}  # fmt: skip
WHOLE = ("f32", "f16", "bf16")

Tell = Callable[[int, int], None]


def untold(done: int, total: int) -> None:
    """Nobody wants to hear of it."""


ROOT = Path(__file__).parents[3]


def block_of(kind: str) -> int:
    """Weights in a row that the type takes together: a row of another length cannot have it."""
    if kind in WHOLE:
        return 1
    return 256 if "_k" in kind or (kind.startswith("iq") and kind != "iq4_nl") else 32


def convert(
    tools: Path, model: Path, target: Path, precision: str, log: Path, name: str = "model"
) -> None:
    """A merged model as GGUF, in 16 or 32 bit. Raises VerificationError."""
    done = _converter(tools, "convert_hf_to_gguf.py", [
        str(model), "--outfile", str(target), "--outtype", precision, "--model-name", name,
    ], log)  # fmt: skip
    if done != 0 or not target.is_file():
        raise _refused("the merged model", log, target)


def convert_vocabulary(tools: Path, model: Path, target: Path, log: Path, name: str) -> None:
    """The vocabulary alone, of a folder that needs no weights. Raises VerificationError."""
    done = _converter(tools, "convert_hf_to_gguf.py", [
        str(model), "--outfile", str(target), "--vocab-only", "--model-name", name,
    ], log)  # fmt: skip
    if done != 0 or not target.is_file():
        raise _refused("the tokenizer", log, target)


def convert_adapter(tools: Path, base: Path, adapter: Path, target: Path, log: Path) -> None:
    """A LoRA adapter in peft's format as GGUF; of the base its configuration is read."""
    done = _converter(tools, "convert_lora_to_gguf.py", [
        str(adapter), "--base", str(base), "--outfile", str(target), "--outtype", "f16",
    ], log)  # fmt: skip
    if done != 0 or not target.is_file():
        raise _refused("the adapter", log, target)


def _converter(tools: Path, script: str, arguments: list[str], log: Path) -> int:
    # Not PYTHONPATH alone: the converter must find its own gguf package before the installed one.
    env = {**os.environ, "PYTHONPATH": str(tools / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        return subprocess.run(
            [sys.executable, str(tools / script), *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
        ).returncode


def _refused(what: str, log: Path, target: Path) -> VerificationError:
    tail = log.read_text("utf-8", "replace").strip().splitlines()[-4:]
    _raise_if_disk_full(tail, target)
    return VerificationError(
        f"llama.cpp's converter refused {what}:\n" + "\n".join(tail),
        f"the whole log is {log}; llama.cpp {LLAMA_CPP_COMMIT} may not know this model type yet",
    )


def quantize(
    tools: Path, source: Path, targets: dict[str, Path], threads: int, log: Path,
    tell: Tell = untold, imatrix: Path | None = None, consume: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write `source` (a 16- or 32-bit GGUF) in other types, all in one go; `tell` hears of tensors
    done, of how many. Raises VerificationError.

    Returns for each how many tensors have which type, and those that fell back to another than was
    meant. Where it may `consume` the source, its weights go meanwhile, in any case.
    """
    wanted = [
        {"path": str(target), "file_type": FILE_TYPES[kind], "block": block_of(kind)}
        for kind, target in targets.items()
    ]
    answer = _ask(
        tools,
        {"do": "quantize", "source": str(source), "targets": wanted, "threads": threads,
         "imatrix": str(imatrix) if imatrix else None, "consume": consume},
        log, tell,
    )  # fmt: skip
    if (failed := answer.get("failed")) is not None:
        kind, target = list(targets.items())[failed]
        said = [line for line in answer["said"].splitlines() if line.strip()][-5:]
        _raise_if_disk_full(said, target)
        raise VerificationError(
            f"llama.cpp could not quantize to {kind} (code {answer['code']}):\n" + "\n".join(said),
            f"its log is {log}",
        )
    return dict(zip(targets, answer["made"], strict=True))


def imatrix(
    tools: Path, model: Path, tokens: list[int], chunk: int, target: Path, threads: int, log: Path
) -> dict[str, Any]:
    """Write the importance matrix that sending the tokens through the model, so many at a time, gives."""
    return _ask(
        tools,
        {"do": "imatrix", "model": str(model), "tokens": tokens, "chunk": chunk,
         "target": str(target), "threads": threads, "dataset": "the run's training data"},
        log,
    )  # fmt: skip


def split(tools: Path, source: Path, max_bytes: int, log: Path) -> list[Path]:
    """Write a GGUF file as several beside it, each as large as `max_bytes` at most."""
    request = {"do": "split", "source": str(source), "target": str(source), "max_bytes": max_bytes}
    return [source.with_name(name) for name in _ask(tools, request, log)["files"]]


def tokenize(tools: Path, path: Path, texts: list[str], log: Path) -> list[list[int]]:
    """The texts' tokens as a GGUF file has them, which need not hold any weights."""
    answer = _ask(tools, {"do": "tokenize", "path": str(path), "texts": texts}, log)
    return [[int(token) for token in ids] for ids in answer["ids"]]


def probe(tools: Path, log: Path, **request: Any) -> dict[str, Any]:
    """What `probing.probe` finds out about a GGUF file."""
    return _ask(tools, {"do": "probe", **request}, log)


def score(tools: Path, log: Path, **request: Any) -> dict[str, Any]:
    """What `probing.score` measures of a GGUF file's predictions."""
    return _ask(tools, {"do": "score", **request}, log)


def pre_tokenizer(tools: Path, folder: Path, log: Path) -> str | None:
    """llama.cpp's name for how the tokenizer in a folder splits words; None for one it has none for."""
    answer = _ask(tools, {"do": "pre_tokenizer", "folder": str(folder)}, log)["pre"]
    return None if answer is None else str(answer)


def _ask(tools: Path, request: dict[str, Any], log: Path, tell: Tell = untold) -> dict[str, Any]:
    read_fd, write_fd = os.pipe()
    with log.open("a") as file, os.fdopen(read_fd) as answer:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.export.llama.worker", str(tools), str(write_fd)],
            stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=(write_fd,), text=True,
            env={**os.environ, "PYTHONPATH": _python_path(), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        os.close(write_fd)
        last: Any = None
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in answer:
                last = json.loads(line)
                if isinstance(last, list):
                    tell(*last)
        except BaseException:  # told to stop: it may have an hour to go
            process.kill()
            raise
        finally:
            process.wait()
    if process.returncode != 0:
        tail = log.read_text("utf-8", "replace").strip().splitlines()[-4:]
        [first, *_] = request.get("targets") or [{}]
        written = request.get("target") or request.get("write") or first.get("path")
        _raise_if_disk_full(tail, Path(written or log))
        raise VerificationError(
            f"llama.cpp ended with code {process.returncode} at {request['do']}:\n"
            + "\n".join(tail),
            f"the whole log is {log}",
        )
    return last  # type: ignore[no-any-return]


def _python_path() -> str:
    """Where lorajob is, and where packages are besides."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# What those say who write: Python and the system, numpy, C++'s streams.
FULL_DISK = re.compile(r"No space left|\d+ requested and \d+ written|basic_ios::clear")


def _raise_if_disk_full(lines: list[str], path: Path) -> None:
    if any(FULL_DISK.search(line) for line in lines):
        raise DoesNotFitError(
            f"the disk is full: {path} could not be written",
            "free some space and start the same run again: it goes on with the stage it was in",
        )
