"""Some rows of the training data with what is trained of them, from what the trainer reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

Decode = Callable[[list[int]], str]

SHOWN = 1600  # characters of a row
TOKENS = 4000  # of a row that are looked at: more than are shown


def example_rows(data: Path, count: int, decode: Decode) -> list[dict[str, Any]]:
    """`count` rows from all over train.arrow, as parts of text that are trained or not."""
    path = data / "train.arrow"
    if not count or not path.is_file():
        return []
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
        rows = min(count, table.num_rows)
        chosen = [at * table.num_rows // rows for at in range(rows)]
        return [
            coloured(table["input_ids"][at].as_py(), table["spans"][at].as_py(), decode)
            | {"row": at + 1}
            for at in chosen
        ]


def coloured(ids: list[int], spans: list[int], decode: Decode) -> dict[str, Any]:
    """A row's text in parts, cut where it gets long."""
    edges = [0, *spans, len(ids)]
    parts: list[dict[str, Any]] = []
    room, before = SHOWN, ""
    for number, (start, end) in enumerate(pairwise(edges)):
        if start == end:
            continue
        # Decoded from the beginning each time: some tokenizers drop a space that begins a text.
        last = min(end, TOKENS)
        whole = decode(ids[:last])
        text = whole[len(before) :] if whole.startswith(before) else decode(ids[start:last])
        before = whole
        cut = len(text) > room or last < end
        parts.append({"text": text[:room] + (" ..." if cut else ""), "trained": number % 2 == 1})
        room -= len(text)
        if cut or room <= 0:
            break
    trained = sum(end - start for start, end in zip(spans[::2], spans[1::2], strict=True))
    return {"parts": parts, "tokens": len(ids), "trained": trained}
