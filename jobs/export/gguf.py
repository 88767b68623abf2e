"""GGUF files from the merged model: one conversion, then each type from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.export.llama import client
from jobs.observe.events import Observer


def file_name(name: str, kind: str) -> str:
    """As people look for it: `support-bot-Q4_K_M.gguf`; 16- and 32-bit types in upper case too."""
    return f"{name}-{kind.upper()}.gguf"


def make_gguf(
    name: str, merged: Path, kinds: list[str], out: Path, log: Path, tools: Path, threads: int,
    observer: Observer,
) -> dict[str, Any]:  # fmt: skip
    """Write one file for each type to `out`; returns their sizes in bytes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = out / ".whole.gguf"
    sizes = {}
    with observer.ticker("making GGUF", 1 + len(kinds)) as ticker:
        client.convert(tools, merged, whole, log)
        ticker.advance(note="converted")
        for kind in kinds:
            target = out / file_name(name, kind)
            client.quantize(tools, whole, target, kind, threads, log)
            sizes[kind] = target.stat().st_size
            ticker.advance(note=kind)
    whole.unlink()
    return {"sizes": sizes}
