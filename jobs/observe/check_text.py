"""What `check` found out, for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

BAR = 30  # characters of the histogram's longest bar
COLOURLESS = "[[", "]]"  # around what is trained, in a pipe and where there are no colours
# What a source is for that is not trained on in its own right.
USE = {
    "eval": ", for evaluation",
    "retention": ", what should not be forgotten",
    "replay": ", to be replayed",
}


def print_check(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    base, data, template = found["base"], found["data"], found["chat_template"]
    console.print(f"[bold green]ready[/bold green]  {found['name']}")
    lines = [
        (
            "base",
            f"{base['source']} ({base['architecture']}, {base['weight_bytes'] / 2**30:.2f} GiB)",
        ),
        (
            "template",
            f"{template['name']}; a turn ends with {template['end_of_turn']}"
            + (f"; today's date is {template['date']}" if template["date"] else ""),
        ),
        *(
            ("data", f"{s['source']}: {s['rows']} rows of {s['format']}{USE.get(s['side'], '')}")
            for s in data["sources"]
        ),
        (
            "rows",
            f"{data['train_rows']} to train on, {data['eval_rows']} held out; left out: "
            f"{data['dropped_too_long']} too long, {data['bad_rows']} unusable; "
            f"{data['duplicates']} duplicates",
        ),
        (
            "tokens",
            f"{data['train_tokens']}, of which {data['trained_tokens']} are trained "
            f"({data['trained_share']:.0%}); a conversation has {data['mean_length']:.0f} on "
            f"average and {data['longest']} at the most; {data['near_limit']} are near the limit",
        ),
        *(
            ("disk", f"{d['what']}: {_gib(d['bytes'])} in {d['folder']}, {d['free'] // 2**30} GiB free")
            for d in found["disk"]
            if d["bytes"]
        ),
        ("gpu", gpu_text(found["gpu"])),
        ("llama.cpp", found["llama_cpp"]),
        ("publish",
            f"{', '.join(found['publish'])}: can be written; about {_gib(found['publish_bytes'])} to send"
            if found["publish"] else "nowhere: the results stay in the run's folder"),
    ]  # fmt: skip
    for name, text in lines:
        console.print(Text.assemble((f"  {name:<10}", "dim"), text), soft_wrap=True)
    for warning in [*found["warnings"], *(f"left out: {line}" for line in data["bad_shown"])]:
        console.print(Text.assemble(("  warning   ", "yellow"), warning), soft_wrap=True)
    most = max(bucket["rows"] for bucket in data["lengths"])
    for bucket in data["lengths"]:
        bar = "█" * -(-BAR * bucket["rows"] // most)
        console.print(Text(f"  {'':<10}up to {bucket['up_to']:>7} tokens {bucket['rows']:>8} {bar}", "dim"))  # fmt: skip
    if found["rows"]:
        marks = COLOURLESS if console.color_system is None or console.no_color else ("", "")
        how = f"between {marks[0]} and {marks[1]}" if marks[0] else "in green"
        console.print(Text(f"  the first rows as they are trained, what is trained {how}:", "dim"))
        for row in found["rows"]:
            console.print(Text(f"  {row['place']}", "bold"), soft_wrap=True)
            console.print(_coloured(row, marks), soft_wrap=True)


def gpu_text(gpu: dict[str, Any]) -> str:
    """What training takes of a GPU's memory, in a sentence."""
    if "unknown" in gpu:
        return str(gpu["unknown"])
    about = "roughly" if gpu["rough"] else "about"
    if gpu["card"] is None:
        small, fast = (
            gpu[key] or "no card that is known" for key in ("smallest_card", "fastest_card")
        )
        return (
            f"none here; training takes {about} {_gib(gpu['least'])} at the least ({small}) and runs "
            f"fastest with {_gib(gpu['most'])} ({fast})"
        )
    plan, takes = gpu["plan"], gpu["takes"]
    parts = ", ".join(
        f"{name} {_gib(count)}"
        for name, count in sorted(takes.items(), key=lambda part: -part[1])
        if name != "total"
    )
    return (
        f"{gpu['card']}, {gpu['bytes'] / 2**30:.1f} GiB: {plan['tokens']:,} tokens at a time with "
        f"activations {'made again' if plan['checkpointing'] else 'kept'}"
        f"{', the 4-bit weights held unpacked' if gpu['unpacked'] else ''}, {about} "
        f"{_gib(takes['total'])} ({parts})"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _coloured(row: dict[str, Any], marks: tuple[str, str]) -> Text:
    if "refused" in row:
        return Text(f"    refused: {row['refused']}", "red")
    text = Text("    ")
    at = 0
    for turn in row["trained"]:
        start = row["text"].index(turn["text"], at)
        text.append(_indented(row["text"][at:start]))
        text.append(_indented(turn["text"].join(marks)), "green")
        at = start + len(turn["text"])
    return text.append(_indented(row["text"][at:]))


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
