"""What several tests need: the demo's tokenizer, one whole run of the demo, a process as it was."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import stop
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.export.llama import client
from jobs.train.runtime import settle_threads
from tests import warm

settle_threads()  # before any test imports torch
# What a script starts in the background ignores SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # no test waits for a cloud's credentials

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples" / "demo" / "base"


# Files go to the workers one by one: the longest first, or one worker waits for another in the end.
# The second makes the demo's run, on more than one core: the first is one that mostly sleeps.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "lease", "verify", "stopping", "remote_runs", "image", "demo", "cli", "s3", "gguf", "resume",
        "stall", "export_command", "gguf_vocabularies", "parity", "chat", "secrets", "merge",
        "unsloth_run", "fit", "life", "retention", "best", "sweep", "evaluate_memory", "loop",
        "examples", "ceph", "card", "tokenizer_proof",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def lorajob(*arguments: str, cwd: Path = ROOT, stdin: str = "", **env: str) -> Result:
    """Run the entrypoint as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), *arguments],
        check=False, cwd=cwd, env={**os.environ, **env}, input=stdin, capture_output=True, text=True,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def lorajob_warm(*arguments: str, cwd: Path = ROOT, stdin: str = "", **env: str) -> Result:
    """The same without the seconds of importing libraries: see warm.py. For one run of several in a
    test, or where the first of a kind is another test's."""
    if warm.seen_at_import(env):
        return lorajob(*arguments, cwd=cwd, stdin=stdin, **env)
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed below
    with files[0] as given, files[1] as out, files[2] as err:
        given.write(stdin.encode())
        given.seek(0)
        code = warm.Process(
            [sys.executable, str(ROOT / "entrypoint.py"), *arguments],
            [file.fileno() for file in files], {**os.environ, **env}, cwd,
        ).wait()  # fmt: skip
        out.seek(0)
        err.seek(0)
        return Result(code, out.read().decode(), err.read().decode())


@pytest.fixture
def warm_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter starts without the seconds of importing libraries: see warm.py. For
    tests whose GGUF files are made in this process, and that are not about the converter."""

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        assert how["stdin"] == subprocess.DEVNULL
        assert how["stderr"] == subprocess.STDOUT
        # Nothing that it reads is on the Hub: it starts as the runs do, by the same process.
        env = {name: text for name, text in how["env"].items() if name != "HF_HUB_OFFLINE"}
        with Path(os.devnull).open() as nothing:
            log = how["stdout"].fileno()
            code = warm.Process(command, [nothing.fileno(), log, log], env).wait()
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(client, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run}))


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(BASE)


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test does to the process's signals is undone: a command that is run in this process
    leaves them ignored, and what is ignored here is ignored by every process that is started."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    monkeypatch.setattr(stop, "_state", stop._State())
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def hear_signals() -> None:
    """A `preexec_fn`: signals end the child whoever runs the tests. What a script starts in the
    background ignores SIGINT, and so would all that it starts."""
    for number in stop.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One for the whole session, also where several processes run its tests."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a whole run of examples/demo.yaml, published beside it.

    It is everybody's: made by who needs it first, waited for by the others, changed by nobody. Who
    has something to change takes `own_demo`.
    """
    work = shared_folder(tmp_path_factory) / "demo"
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (work / "stdout.jsonl").exists():
            result = lorajob(
                "run", "examples/demo.yaml", "--work", str(work), LORAJOB__PUBLISH=f"[{work}/published]"
            )  # fmt: skip
            assert result.code == 0, result.err + result.out[-2000:]
            (work / "stdout.jsonl").write_text(result.out)  # the last: it says that all is there
    before = _contents(work)
    yield work / "demo"
    assert _contents(work) == before, "a test has changed what all share"


def _contents(work: Path) -> dict[str, tuple[int, int]]:
    """Every file that a run leaves, with its size and the time of its last change."""
    return {
        path.relative_to(work).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for top in ("demo", "published")
        for path in sorted((work / top).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def own_demo(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for the tests of one file to go on with and to change."""
    work = tmp_path_factory.mktemp("demo")
    for name in ("demo", "published"):
        shutil.copytree(demo.parent / name, work / name)
    return work / "demo"
