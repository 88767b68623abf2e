"""What `check` found out, for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def print_check(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    base, data = found["base"], found["data"]
    console.print(f"[bold green]ready[/bold green]  {found['name']}")
    lines = {
        "base": f"{base['source']} ({base['architecture']}, {base['weight_bytes'] / 2**30:.2f} GiB)",
        "template": base["chat_template"],
        "data": f"{data['rows']} conversations: {data['train_rows']} to train on, "
        f"{data['eval_rows']} held out, {data['dropped_too_long']} too long",
        "tokens": f"{data['train_tokens']}, of which {data['trained_tokens']} are trained "
        f"({data['trained_share']:.0%}); the longest conversation has {data['longest']}",
        "disk": f"{found['disk_bytes'] / 2**30:.2f} GiB at the most",
        "llama.cpp": found["llama_cpp"],
        "publish": ", ".join(found["publish"]) or "nowhere: the results stay in the run's folder",
    }
    for name, text in lines.items():
        console.print(Text.assemble((f"  {name:<10}", "dim"), text), soft_wrap=True)
    console.print(Text("  the first conversation, what is trained of it in green:", "dim"))
    row = Text("    ")
    for piece in found["first_row"]:
        row.append(piece["text"].replace("\n", "\n    "), "green" if piece["trained"] else "")
    console.print(row, soft_wrap=True)
