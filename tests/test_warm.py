"""What is started by a process that has the libraries imported is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import lorajob, lorajob_warm

SCRIPT = """
import json, os, sys
modules = [name for name in ("torch", "transformers", "gguf", "jobs") if name in sys.modules]
print(json.dumps({
    "argv": sys.argv[1:], "path": sys.path[:2], "env": os.environ.get("LORAJOB_SEEN"), "modules": modules,
    "cwd": os.getcwd(), "read": sys.stdin.read(), "alone": os.getsid(0) == os.getpid(),
    "parent": os.environ.get("OF_THE_TESTS"),
}))
print("told", file=sys.stderr)
sys.exit(7)
"""


class Started:
    """A script's start, with files in the place of a terminal."""

    def __init__(self, folder: Path, code: str, own_session: bool = True, **env: str) -> None:
        self.folder = folder
        (folder / "script.py").write_text(code)
        (folder / "in").write_text("asked")
        with (folder / "in").open() as given, self.file("out").open("w") as out, self.file("err").open("w") as err:  # fmt: skip
            self.process = warm.Process(
                [sys.executable, str(folder / "script.py"), "one", "two"],
                [given.fileno(), out.fileno(), err.fileno()], {**os.environ, **env}, folder, own_session,
            )  # fmt: skip

    def file(self, name: str) -> Path:
        return self.folder / name


def test_it_has_its_own_environment_folder_files_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = Started(tmp_path, SCRIPT, LORAJOB_SEEN="yes", PYTHONPATH=str(tmp_path / "modules"))
    assert its.process.wait(120) == 7
    assert its.file("err").read_text() == "told\n"
    found: dict[str, Any] = json.loads(its.file("out").read_text())
    assert found == {
        "argv": ["one", "two"], "path": [str(tmp_path), str(tmp_path / "modules")], "env": "yes",
        "modules": ["torch", "transformers"], "cwd": str(tmp_path), "read": "asked", "alone": True,
        "parent": None,
    }  # fmt: skip
    # The next has nothing of it, nor of this process but what it is given.
    monkeypatch.setenv("OF_THE_TESTS", "now")
    again = Started(tmp_path, SCRIPT, own_session=False)
    assert again.process.wait(60) == 7
    found = json.loads(again.file("out").read_text())
    assert (found["env"], found["parent"], found["alone"]) == (None, "now", False)


def test_it_is_seen_to_run_and_to_be_killed(tmp_path: Path) -> None:
    its = Started(tmp_path, "print('there', flush=True)\nimport time\ntime.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        its.process.wait(0.2)
    assert its.process.poll() is None
    assert Path(f"/proc/{its.process.pid}").exists()
    os.killpg(its.process.pid, signal.SIGKILL)
    assert its.process.wait(60) == -signal.SIGKILL
    assert its.process.poll() == -signal.SIGKILL
    assert not Path(f"/proc/{its.process.pid}").exists()


def test_several_run_beside_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    waits = "import sys, time\nfrom pathlib import Path\nPath('begun').touch()\n" \
            "while not Path('../two/begun').exists(): time.sleep(0.01)"  # fmt: skip
    first, second = (Started(folder, waits) for folder in folders)
    assert first.process.wait(60) == second.process.wait(60) == 0


def test_the_program_says_and_ends_as_when_it_is_started_anew(tmp_path: Path) -> None:
    for arguments in (("--version",), ("check", "nowhere.yaml"), ("run", "--nonsense")):
        assert lorajob_warm(*arguments, cwd=tmp_path) == lorajob(*arguments, cwd=tmp_path)
    # What a library has seen when it was imported cannot be seen otherwise: it is imported anew.
    assert lorajob_warm("--version", HF_HOME=str(tmp_path)) == lorajob("--version")
