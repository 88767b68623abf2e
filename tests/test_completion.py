"""`lorajob completion`: the scripts, loaded by the shells that they are for."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from jobs.completion import SHELLS
from tests.conftest import lorajob

# As readline does it: the function that is registered for the word, with the line in words.
ASK = """
eval "$(cat completion.bash)"
registered=$(complete -p lorajob)
[[ $registered =~ -F\\ ([^ ]+) ]] || exit 9
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"${BASH_REMATCH[1]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and some files to complete."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        made = lorajob("completion", shell)
        assert made.code == 0, made.err
        (folder / f"completion.{shell}").write_text(made.out)
    for name in ("run.yaml", "other.yml", "notes.txt", "model.gguf"):
        (folder / name).touch()
    (folder / "runs").mkdir()
    return folder


def asked(place: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "--norc", "--noprofile", "-c", ASK, "ask", "lorajob", *words],
        check=False, cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.split())


def test_commands_are_completed(place: Path) -> None:
    assert asked(place, "") == set(COMMANDS)
    assert asked(place, "ch") == {"check", "chat"}
    assert asked(place, "x") == set()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_of_the_help_is_completed(place: Path, command: str) -> None:
    named = set(
        re.findall(r"^  (?:-h, )?(--[a-z-]+)", lorajob(command, "--help").out, re.MULTILINE)
    )
    assert "--help" in named
    assert asked(place, command, "--") == named


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("run", "--log", ""), {"auto", "json", "terminal"}),
        (("check", "--format", "t"), {"text"}),
        (("export", "--load-in", ""), {"4bit", "8bit", "16bit"}),
        (("completion", ""), {"bash", "zsh", "fish"}),
        (("run", "r"), {"run.yaml", "runs"}),
        (("check", "--rows", "2", "o"), {"other.yml"}),
        (("export", "run.yaml", "--adapter", ""), {"runs"}),
        (("report", ""), {"runs"}),
        (("chat", "m"), {"model.gguf"}),
        (("chat", "runs", "--prompts", "n"), {"notes.txt"}),
        (("export", "--data", "n"), {"notes.txt"}),
    ],
)
def test_values_are_completed_by_their_kind(
    place: Path, words: tuple[str, ...], offered: set[str]
) -> None:
    assert asked(place, *words) == offered


INTERACTIVE = {
    "bash": (("--norc", "--noprofile"), ""),
    "zsh": (("-f",), "autoload -Uz compinit; compinit -u -d dump; "),
}


@pytest.mark.parametrize("name", sorted(INTERACTIVE))
def test_a_key_press_completes_at_the_prompt(place: Path, name: str) -> None:
    """The shell itself, on a terminal: what the command gets after Tab."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not here")
    options, before = INTERACTIVE[name]
    env = {"PATH": os.environ["PATH"], "TERM": "dumb", "INPUTRC": "/dev/null", "HOME": str(place)}
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [name, *options, "-i"],
        stdin=end, stdout=end, stderr=end, cwd=place, env=env, start_new_session=True,
    ) as shell:  # fmt: skip
        os.close(end)
        prepare = f'{before}eval "$(cat completion.{name})"; lorajob() {{ echo "<$*>"; }}; '
        os.write(terminal, f"{prepare} echo read''y\n".encode())
        _until(terminal, b"ready")
        for typed, got in (("sch", "schema"), ("run oth", "run other.yml"), ("run --log j", "run --log json")):  # fmt: skip
            os.write(terminal, f"lorajob {typed}\t\n".encode())
            _until(terminal, f"<{got}>".encode())
        shell.kill()
    os.close(terminal)


def _until(terminal: int, awaited: bytes) -> None:
    """Read what comes until it holds `awaited`."""
    seen, ends = b"", time.monotonic() + 20
    while awaited not in seen:
        assert select.select([terminal], [], [], max(0, ends - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096)


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not here")
def test_fish_completes_by_its_script(place: Path) -> None:
    asking = "source completion.fish; complete -C 'lorajob ch'; complete -C 'lorajob run --log '"
    env = {**os.environ, "HOME": str(place), "XDG_DATA_HOME": str(place)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", asking],
        check=False, cwd=place, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert sorted(words) == ["auto", "chat", "check", "json", "terminal"]


def test_an_unknown_shell_is_refused() -> None:
    result = lorajob("completion", "nosuchshell")
    assert result.code == 2
    assert "zsh" in result.err
