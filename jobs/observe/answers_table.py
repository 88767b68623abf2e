"""The tables that end a run: what base, tuned model and GGUF say to each question, and what
quantizing cost each GGUF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

ANSWERS = "answers.json"
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


def types_table(result: dict[str, Any]) -> Table | None:
    """From `verify`'s result: one row a GGUF type, or None where none was compared."""
    found = result.get("gguf")
    if not found or not found["types"]:
        return None
    reference = found["reference"]
    table = Table(
        box=box.ROUNDED,
        expand=False,
        caption=f"Compared with the {reference['type']} GGUF on {reference['tokens']} trained tokens.",
        caption_justify="left",
    )
    table.add_column("GGUF", style="bold")
    for title in ("MiB", "bits/weight", "perplexity", "more", "KL, nats/token", "same first choice",
                  "prompt tok/s", "answer tok/s"):  # fmt: skip
        table.add_column(title, justify="right")
    for kind, row in found["types"].items():
        itself, speed = kind == reference["type"], row["tokens_per_second"]
        table.add_row(
            kind,
            f"{row['size'] / 2**20:,.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.4g}",
            "" if itself else f"{row['perplexity_increase']:+.2%}",
            "" if itself else f"{row['kl']:.5f}",
            "" if itself else f"{row['same_top']:.1%}",
            f"{row['prompt_tokens_per_second']:,.0f}",
            "" if speed is None else f"{speed:,.0f}",
        )
    return table


def write_answers(folder: Path, result: dict[str, Any], failures: Sequence[str] = ()) -> None:
    """answers.json for machines, with every check that failed; answers.txt for people."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | {"failures": list(failures)}, indent=2, ensure_ascii=False)
    (folder / ANSWERS).write_text(text + "\n", "utf-8")
    console = Console(file=StringIO(), width=120)
    console.print(answers_table(result))
    if types := types_table(result):
        console.print(types)
    assert isinstance(console.file, StringIO)
    (folder / "answers.txt").write_text(console.file.getvalue(), "utf-8")
