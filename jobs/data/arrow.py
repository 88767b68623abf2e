"""Labelled examples as Arrow files: written as they come, read through memory maps.

Columns: `input_ids`, list<int32>, and `spans`, list<int32>: the trained turns as token positions
[start, end, start, end, ...]. Labels are made of the two when a batch is put together.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32()))],
)


class ExampleWriter:
    """Writes one file, and keeps of each example only numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lengths: list[NDArray[np.int32]] = []
        self._trained: list[NDArray[np.int64]] = []
        self._places: list[NDArray[np.float64]] = []
        self._sources: list[NDArray[np.int16]] = []

    def __enter__(self) -> Self:
        self._writer = pa.ipc.new_stream(str(self.path), SCHEMA)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def add(
        self,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int32],
        spans: NDArray[np.int32],
        span_counts: NDArray[np.int32],
        places: NDArray[np.float64],
        chosen: NDArray[np.bool_],
        source: int,
    ) -> None:
        """Append the chosen ones of these examples; `ids` and `spans` are theirs end to end."""
        if not chosen.any():
            return
        batch = pa.record_batch([_lists(ids, lengths), _lists(spans, span_counts)], schema=SCHEMA)
        self._writer.write_batch(batch if chosen.all() else batch.filter(pa.array(chosen)))
        owner = np.repeat(np.arange(len(lengths)), span_counts // 2)
        trained = np.bincount(owner, spans[1::2] - spans[::2], minlength=len(lengths))
        self._lengths.append(lengths[chosen])
        self._trained.append(trained[chosen].astype(np.int64))
        self._places.append(places[chosen])
        self._sources.append(np.full(int(chosen.sum()), source, np.int16))

    @property
    def rows(self) -> int:
        return sum(map(len, self._lengths))

    @property
    def lengths(self) -> NDArray[np.int32]:
        return _joined(self._lengths, np.int32)

    @property
    def trained(self) -> NDArray[np.int64]:
        """Trained tokens of each example."""
        return _joined(self._trained, np.int64)

    @property
    def places(self) -> NDArray[np.float64]:
        return _joined(self._places, np.float64)

    @property
    def sources(self) -> NDArray[np.int16]:
        return _joined(self._sources, np.int16)


def move_one(source: ExampleWriter, target: ExampleWriter, index: int) -> None:
    """Move one example to another, empty file; both are closed."""
    with pa.OSFile(str(source.path), "rb") as file:
        table = pa.ipc.open_stream(file).read_all()
    moved = np.zeros(len(table), bool)
    moved[index] = True
    for writer, chosen in ((source, ~moved), (target, moved)):
        with pa.ipc.new_stream(str(writer.path), SCHEMA) as stream:
            stream.write_table(table.filter(pa.array(chosen)))
    for name in ("_lengths", "_trained", "_places", "_sources"):
        values = np.concatenate(getattr(source, name))
        setattr(target, name, [values[moved]])
        setattr(source, name, [values[~moved]])


def take_rows(source: Path, target: Path, chosen: NDArray[np.bool_]) -> None:
    """Write the chosen examples of one file to another, a batch at a time."""
    at = 0
    with (
        pa.OSFile(str(source), "rb") as file,
        pa.ipc.new_stream(str(target), SCHEMA) as stream,
    ):
        for batch in pa.ipc.open_stream(file):
            own = chosen[at : at + len(batch)]
            at += len(batch)
            if own.any():
                stream.write_batch(batch.filter(pa.array(own)))


def _lists(values: NDArray[np.int32], counts: NDArray[np.int32]) -> Any:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def _joined(parts: list[Any], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
