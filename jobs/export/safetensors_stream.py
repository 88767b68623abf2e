"""safetensors files a piece at a time: any part of a tensor read, any part written.

The library's own functions take all tensors of a file at once, and its reading maps the file into
memory, where every page that was touched counts. Here only the piece in hand is held.

A file is 8 bytes that say how long the header is, the header (JSON: each tensor's type, shape and
place) and then the tensors' bytes, without gaps. A writer's header is written first, because types
and shapes are known before the values are.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor's type and shape, and where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def count(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


class Reader:
    """The tensors of a file; several threads may read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in header.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor, flat."""
        entry = self.entries[name]
        stop = entry.count if stop is None else stop
        piece = torch.empty(stop - start, dtype=entry.dtype)
        into: memoryview = piece.view(torch.uint8).numpy().data
        at = entry.begin + start * entry.dtype.itemsize
        while into:  # one call reads 2 GiB at most
            done = os.preadv(self._file.fileno(), [into], at)
            if done == 0:
                raise OSError(f"{self.path} ends before its tensor {name} does")
            into, at = into[done:], at + done
        return piece

    def tensor(self, name: str) -> torch.Tensor:
        return self.read(name).reshape(self.entries[name].shape)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """Writes a file whose tensors' types and shapes are given; several threads may write at once.

    The tensors are laid out as the library does it, widest type first and then by name, so that the
    file is the same to the byte. `close` raises where something was left out.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:  # fmt: skip
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        places: dict[str, Entry] = {}
        for name in sorted(tensors, key=lambda name: (-_rank(tensors[name][0]), name)):
            entry = Entry(*tensors[name], at)
            places[name] = entry
            header[name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.bytes],
            }
            at += entry.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self.entries = {n: Entry(e.dtype, e.shape, begin + e.begin) for n, e in places.items()}
        self.bytes = at
        self._missing = at
        self._lock = threading.Lock()
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        self._file.truncate(begin + at)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write elements of a tensor from `start` on. Each element is to be written once."""
        entry = self.entries[name]
        if values.dtype != entry.dtype or start + values.numel() > entry.count:
            raise ValueError(f"{name} is {entry}, and not {values.dtype} of {values.numel()}")
        flat = values.detach().cpu().contiguous().reshape(-1)
        data: memoryview = flat.view(torch.uint8).numpy().data
        at = entry.begin + start * entry.dtype.itemsize
        with self._lock:
            self._missing -= len(data)
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done

    def close(self) -> None:
        """Have everything on the disk. Raises ValueError where elements were never written."""
        try:
            if self._missing:
                raise ValueError(f"{self._missing} of {self.bytes} bytes were not written")
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


# The library's order of types: later in its list comes first in a file.
_ORDER = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]  # fmt: skip


def _rank(dtype: torch.dtype) -> int:
    return _ORDER.index(NAMES[dtype])
