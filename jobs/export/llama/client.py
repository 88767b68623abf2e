"""Asking libllama and llama.cpp's converter for things, each in a child process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs.errors import DoesNotFitError, VerificationError
from jobs.export.llama.build import LLAMA_CPP_COMMIT

# enum llama_ftype in llama.cpp's include/llama.h
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "bf16": 32,
}  # fmt: skip

WORKER = Path(__file__).with_name("worker.py")


def convert(tools: Path, model: Path, target: Path, log: Path) -> None:
    """A merged model as GGUF, in the precision that it has. Raises VerificationError."""
    command = [sys.executable, str(tools / "convert_hf_to_gguf.py"), str(model),
               "--outfile", str(target), "--outtype", "auto"]  # fmt: skip
    # Not PYTHONPATH alone: the converter must find its own gguf package before the installed one.
    env = {**os.environ, "PYTHONPATH": str(tools / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
        )
    if done.returncode != 0 or not target.is_file():
        tail = log.read_text("utf-8", "replace").strip().splitlines()[-4:]
        _raise_if_disk_full(tail, target)
        raise VerificationError(
            "llama.cpp's converter refused the merged model:\n" + "\n".join(tail),
            f"the whole log is {log}; llama.cpp {LLAMA_CPP_COMMIT} may not know this model type yet",
        )


def quantize(tools: Path, source: Path, target: Path, kind: str, threads: int, log: Path) -> None:
    """Write `source` (a 16- or 32-bit GGUF) in another type. Raises VerificationError."""
    answer = _ask(
        tools,
        {"do": "quantize", "source": str(source), "target": str(target),
         "file_type": FILE_TYPES[kind], "threads": threads},
        log,
    )  # fmt: skip
    if answer["code"] != 0 or not target.is_file():
        _raise_if_disk_full(log.read_text("utf-8", "replace").splitlines()[-5:], target)
        raise VerificationError(
            f"llama.cpp could not quantize to {kind} (code {answer['code']})", f"its log is {log}"
        )


def probe(tools: Path, log: Path, **request: Any) -> dict[str, Any]:
    """What `worker.probe` finds out about a GGUF file."""
    return _ask(tools, {"do": "probe", **request}, log)


def _ask(tools: Path, request: dict[str, Any], log: Path) -> dict[str, Any]:
    read_fd, write_fd = os.pipe()
    with log.open("a") as file, os.fdopen(read_fd) as answer:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tools), str(write_fd)],
            stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=(write_fd,), text=True,
        )  # fmt: skip
        os.close(write_fd)
        with process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            text = answer.read()
    if process.returncode != 0:
        tail = log.read_text("utf-8", "replace").strip().splitlines()[-4:]
        _raise_if_disk_full(tail, log)
        raise VerificationError(
            f"llama.cpp ended with code {process.returncode} at {request['do']}:\n"
            + "\n".join(tail),
            f"the whole log is {log}",
        )
    return json.loads(text)  # type: ignore[no-any-return]


# What those say who write: Python and the system, numpy, C++'s streams.
FULL_DISK = re.compile(r"No space left|\d+ requested and \d+ written|basic_ios::clear")


def _raise_if_disk_full(lines: list[str], path: Path) -> None:
    if any(FULL_DISK.search(line) for line in lines):
        raise DoesNotFitError(
            f"the disk is full: {path} could not be written",
            "free some space and start the same run again: it goes on with the stage it was in",
        )
