"""The table that ends a run: each question, and what base, tuned model and GGUF say to it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NAMES = {"base": "before (base)", "adapter": "after (adapter)", "merged": "merged 16 bit"}


def answers_table(result: dict[str, Any]) -> Table:
    """From `verify`'s result: one row a question, one column a subject.

    Merged is left out where it says what the adapter says, which it nearly always does.
    """
    subjects = dict(result["subjects"])
    texts = {name: [answer["text"] for answer in s["answers"]] for name, s in subjects.items()}
    if texts.get("merged") == texts["adapter"]:
        texts.pop("merged", None)
    table = Table(box=box.ROUNDED, show_lines=True, expand=False)
    table.add_column("question", style="bold", ratio=2)
    for name in texts:
        table.add_column(NAMES.get(name, f"GGUF {name}"), ratio=3)
    for number, question in enumerate(result["questions"]):
        cells = []
        for name in texts:
            answer = subjects[name]["answers"][number]
            cells.append(Text(answer["text"].strip() + ("" if answer["stopped"] else " ...")))
        table.add_row(Text(question), *cells)
    return table


def write_answers(folder: Path, result: dict[str, Any]) -> None:
    """answers.json for machines, answers.txt for people."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / "answers.json").write_text(text + "\n", "utf-8")
    console = Console(file=StringIO(), width=120)
    console.print(answers_table(result))
    assert isinstance(console.file, StringIO)
    (folder / "answers.txt").write_text(console.file.getvalue(), "utf-8")
