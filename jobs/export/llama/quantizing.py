"""Writing a GGUF file in other types, with an importance matrix where wanted. In the worker only.

All types are written together, a tensor at a time: each tensor is read from the disk once, and its
place in the source is given back when every type has it. So the disk never holds the source and all
that is made of it at the same time. What libllama writes is the same, byte for byte.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gguf
import llama_cpp.llama_cpp as lib

from jobs.export.gguf_header import Header, Tensor, read_header
from jobs.export.llama.importance import read_importance
from jobs.export.llama.libllama import ERROR, WARN
from jobs.store.local import punch

# Bytes of rows that libllama holds at once. Its own limit is 8 GiB, for each of the types: a large
# vocabulary's embedding would take all of 4 GB, and goes no faster for it.
BUFFER = 256 * 2**20

# How libllama announces each tensor, the same ones in the same order for every type.
BEGINS = re.compile(rb"\[ *\d+/ *\d+\] (\S+)")

Progress = Callable[[int, int], None]


def quantize(
    source: str,
    targets: list[dict[str, Any]],
    threads: int,
    tell: Progress,
    imatrix: str | None = None,
    consume: bool = False,
) -> dict[str, Any]:
    """`targets`: for each the `path`, its `file_type` (enum llama_ftype), and the weights that the
    type takes together (`block`): a tensor whose columns are no multiple of it gets another type,
    which libllama only mumbles about. `tell` hears of tensors done, and of how many there are.

    Where it may `consume` the source, its weights go meanwhile, also if this fails. The first call
    that fails ends it all: the others are left where they are, for the process ends after this.
    """
    header = read_header(Path(source))
    held = read_importance(imatrix) if imatrix else None
    # By its descriptor: should this process outlive the run, the next one's file is another.
    consumed = os.open(source, os.O_RDWR) if consume else None
    turns = _Turns(len(targets), header, consumed, tell)
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()

    def one(place: int) -> None:
        code = -1
        try:
            params = lib.llama_model_quantize_default_params()
            params.ftype = targets[place]["file_type"]
            params.nthread = threads
            params.max_buf_size = BUFFER
            if held is not None:
                params.imatrix = held[0]
            path = targets[place]["path"]
            turns.enter(place)
            code = lib.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(params))
        finally:
            if code == 0:
                turns.leave()
            ended.put((place, int(code)))

    lib.llama_log_set(turns.log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    for place in range(len(targets)):
        threading.Thread(target=one, args=[place], daemon=True).start()
    for _ in targets:
        place, code = ended.get()
        if code:
            return {"failed": place, "code": code, "said": turns.said[place]}
    return {"made": [_fallen(header, target) for target in targets]}


class _Turns:
    """Has several calls of libllama, each on a thread of its own, take one tensor after another, all
    of them the same. They are held where libllama says which one comes next."""

    def __init__(self, count: int, header: Header, consumed: int | None, tell: Progress) -> None:
        self.log = lib.llama_log_callback(self._log)
        self.said = [""] * count  # warnings and errors of each
        self._tell = tell
        self._all = count * len(header.tensors)
        self._ranges = {tensor.name: _range(header, tensor) for tensor in header.tensors}
        self._consumed = consumed
        self._mine = threading.local()
        # All below are guarded by it.
        self._changed = threading.Condition()
        self._active = list(range(count))
        self._next = 0  # whose turn it is
        self._done = 0  # tensors, of all types together
        self._current = ""  # the tensor that they are at

    def enter(self, place: int) -> None:
        """Before one of the calls, on its thread."""
        self._mine.place, self._mine.began = place, False

    def leave(self) -> None:
        """After it, where it has all its tensors: the others go on without it."""
        with self._changed:
            self._end_turn()
            self._active.remove(self._mine.place)
            if not self._active:
                self._give_back()

    def _log(self, level: int, text: bytes, _: Any) -> None:
        try:
            if begins := BEGINS.match(text):
                self._begin(begins[1].decode())
            elif level in (WARN, ERROR):
                said = text.decode("utf-8", "replace")
                if (place := getattr(self._mine, "place", None)) is not None:
                    self.said[place] += said
                print(said, end="", flush=True)
        except BrokenPipeError:  # whoever wanted it is no more
            os._exit(1)
        except Exception as error:  # none may go through C; where the disk is full, nor be printed
            with suppress(OSError):
                print(f"{type(error).__name__}: {error}", flush=True)

    def _begin(self, tensor: str) -> None:
        with self._changed:
            if self._mine.began:
                self._end_turn()
            self._mine.began = True
            self._changed.wait_for(lambda: self._next == self._mine.place)
            if tensor != self._current:  # it is the first there: all have the one before
                self._give_back()
                self._current = tensor

    def _end_turn(self) -> None:
        """It has the tensor that it began. The turn goes to the next, from the last to the first."""
        after = [place for place in self._active if place > self._next]
        self._next = after[0] if after else self._active[0]
        self._changed.notify_all()
        self._done += 1
        self._tell(self._done, self._all)

    def _give_back(self) -> None:
        """The place of the tensor that all have now."""
        if self._consumed is not None and self._current:
            punch(self._consumed, *self._ranges[self._current])


def _range(header: Header, tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's weights are in the file, and their bytes."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    return header.data + tensor.offset, math.prod(tensor.shape) // block * size


def _fallen(source: Header, target: dict[str, Any]) -> dict[str, Any]:
    """The tensors that could not have the type, with the one they have; and how many of each type."""
    before = {tensor.name: tensor.type for tensor in source.tensors}
    types, fallen = Counter[str](), dict[str, str]()
    for tensor in read_header(Path(target["path"])).tensors:
        name = gguf.GGMLQuantizationType(tensor.type).name
        types[name] += 1
        columns = tensor.shape[0]
        if len(tensor.shape) < 2 or columns % target["block"] == 0 or target["block"] == 1:
            continue
        if tensor.type != before[tensor.name] or columns % 32:
            fallen[tensor.name] = name
    return {"types": dict(types), "fallen": fallen}
