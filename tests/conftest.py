"""What several tests need: the demo's tokenizer, and one whole run of the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.train.runtime import settle_threads

settle_threads()  # before any test imports torch
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # no test waits for a cloud's credentials

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples" / "demo" / "base"


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


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(BASE)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of examples/demo.yaml, published beside it."""
    work = tmp_path_factory.mktemp("demo")
    result = lorajob(
        "run", "examples/demo.yaml", "--work", str(work), LORAJOB__PUBLISH=f"[{work}/published]"
    )
    assert result.code == 0, result.err + result.out[-2000:]
    (work / "stdout.jsonl").write_text(result.out)
    return work / "demo"
