"""How answers to a list of questions are shown: a table, or JSON for scripts."""

from __future__ import annotations

import json
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.secrets import redact_tree

WIDTH = 120  # where nobody says how wide it may be


def print_answers(found: dict[str, Any], form: str, stream: IO[str]) -> None:
    """`found` has the `questions` and, of each of the `subjects`, `text` and `stopped` of every answer."""
    found = redact_tree(found)
    if form == "json":
        stream.write(json.dumps(found, ensure_ascii=False) + "\n")
        return
    table = Table(box=box.ROUNDED, show_lines=True)
    table.add_column("question", style="bold", ratio=2)
    for name in found["subjects"]:
        table.add_column(name, ratio=3)
    for number, question in enumerate(found["questions"]):
        cells = [Text(question)]
        for subject in found["subjects"].values():
            answer = subject["answers"][number]
            cells.append(Text(answer["text"].strip() + ("" if answer["stopped"] else " ...")))
        table.add_row(*cells)
    Console(file=stream, width=None if stream.isatty() else WIDTH).print(table)
