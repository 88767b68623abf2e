"""Starts of Python programs that find the large libraries imported: most of a short run's time.

    python -m tests.warm FD     one process that imports them and forks for each start asked of it

What is started is a process of its own all the same: with its own environment, folder and files,
everything of jobs/ imported anew, and the end that any process has. What differs from an ordinary
start: libraries are there before the program says a word, and all starts share the seed of Python's
hashes. A test that is about either of these starts its processes as a user does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What a run imports, and llama.cpp's converters; not gguf, of which those have their own.
LIBRARIES = (
    "torch", "bitsandbytes", "boto3", "datasets", "matplotlib.figure", "matplotlib.ticker",
    "peft.tuners.lora.bnb", "prometheus_client", "rich.live", "rich.progress", "structlog",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.trainer",
)  # fmt: skip
# Libraries look at these when they are imported: for other values another process imports them.
SEEN_AT_IMPORT = (
    "BNB_", "CUDA", "HF_", "HOME", "HUGGING", "LD_", "MKL", "MPL", "OMP_", "OPENBLAS", "PATH",
    "PROMETHEUS", "PYTHON", "TMP", "TOKENIZERS", "TORCH", "TRANSFORMERS", "TZ", "XDG_",
)  # fmt: skip


def seen_at_import(env: Mapping[str, str]) -> dict[str, str]:
    # Where a program looks for its modules is settled for each start.
    return {
        name: text
        for name, text in env.items()
        if name.startswith(SEEN_AT_IMPORT) and name != "PYTHONPATH"
    }


class Process:
    """A start of `python SCRIPT ARGUMENTS`, with what tests need of subprocess.Popen."""

    def __init__(
        self, command: Sequence[str], files: Sequence[int], env: Mapping[str, str],
        cwd: Path | None = None, own_session: bool = False,
    ) -> None:  # fmt: skip
        """`files` are its standard input, output and error."""
        python, script, *arguments = command
        assert python == sys.executable
        self.returncode: int | None = None
        self._told, telling = os.pipe()
        asked = {
            "argv": [str(Path(script).absolute()), *arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(env),
            "own_session": own_session,
        }
        with _lock:
            forker = _forker_for(env)
            forker.ask(asked, [*files, telling])
        os.close(telling)
        pid = self._number()
        if pid is None:
            os.close(self._told)
            raise RuntimeError(f"what starts processes for the tests has ended:\n{forker.said()}")
        self.pid = pid

    def _number(self) -> int | None:
        text = os.read(self._told, 12)
        return int(text) if text else None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = self._number()
            os.close(self._told)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a start", timeout or 0)
        code = self.poll()
        assert code is not None
        return code


class Forker:
    """A process that has imported the libraries and done nothing with them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.seen = seen_at_import(env)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._ours, theirs = socket.socketpair()
        bare = {name: text for name, text in env.items() if name != "PYTHONPATH"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                cwd=ROOT, env=bare, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=self._said, stderr=self._said,
            )  # fmt: skip
        atexit.register(self.end)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, wanted: dict[str, Any], files: Sequence[int]) -> None:
        with tempfile.TemporaryFile("w+") as request:
            json.dump(wanted, request)
            request.flush()
            socket.send_fds(self._ours, [b"."], [*files, request.fileno()])

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def end(self) -> None:
        atexit.unregister(self.end)
        self._ours.close()
        self._process.wait()
        self._said.close()


# One at a time, as large as it is. What an earlier one has started goes on without it.
_forker: Forker | None = None
_lock = threading.Lock()


def _forker_for(env: Mapping[str, str]) -> Forker:
    global _forker  # noqa: PLW0603 - one for this process
    seen = seen_at_import(env)
    if _forker is None or _forker.seen != seen or not _forker.alive:
        if _forker is not None:
            _forker.end()
        _forker = Forker(env)
    return _forker


# --- the process that forks


def serve(asked: socket.socket) -> dict[str, Any] | None:
    """Fork for each request: in the new process this returns it, in the old one None at the end."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, 1, 5)
        if not message:
            return None
        with contextlib.suppress(ChildProcessError):  # those that waited for others and have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        waiting = os.fork()
        if waiting == 0:
            asked.close()
            return start(*files)
        for file in files:
            os.close(file)


def start(given: int, out: int, err: int, telling: int, request: int) -> dict[str, Any]:
    """Fork once more: one is what was asked for, the other tells its number and how it ends."""
    with os.fdopen(request, "r") as file:
        file.seek(0)
        wanted: dict[str, Any] = json.load(file)
    child = os.fork()
    if child:
        os.write(telling, str(child).encode().ljust(12))
        for file_number in (given, out, err):
            os.close(file_number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(telling, str(code).encode().ljust(12))
        os._exit(0)
    os.close(telling)
    if wanted["own_session"]:
        os.setsid()
    for number, file_number in enumerate((given, out, err)):
        os.dup2(file_number, number)
        os.close(file_number)
    return wanted


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # or each start, as it ends, would look through all of it for what nobody holds
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is None:
        os._exit(0)  # there is nothing to be put in order
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    sys.argv = wanted["argv"]
    first = [folder for folder in wanted["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *first]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
