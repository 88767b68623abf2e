"""Shell completion: `shtab` makes a script of the parser, so that it knows what `--help` says."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that makes `shell` complete commands, options, choices and files."""
    import shtab

    # What a value is, its placeholder in the help says already.
    kinds: dict[str, Any] = {
        "SPEC": shtab.glob("*.yaml", "*.yml", "*.json"),
        "FILE": shtab.FILE,
        "FOLDER": shtab.DIRECTORY,
        "FOLDER|MODEL.gguf": shtab.glob("*.gguf"),
    }
    _mark(parser, kinds)
    return shtab.complete(parser, shell)


def _mark(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    for action in parser._actions:  # argparse has no public way to look at them
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark(command, kinds)
        elif (kind := kinds.get(str(action.metavar))) and not action.choices:
            action.complete = kind  # type: ignore[attr-defined]
