"""Importance matrices: how strongly each column of a weight is used, collected and read back. In the
worker only."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as lib
import numpy as np

from jobs.export.gguf_header import read_header
from jobs.export.llama.libllama import Model

SUMS, COUNTS = ".in_sum2", ".counts"  # as llama.cpp's own importance matrices name them
MUL_MAT, MUL_MAT_ID = b"MUL_MAT", b"MUL_MAT_ID"


def read_importance(path: str) -> tuple[Any, list[Any]]:
    """The matrix as libllama takes it, and what must live as long: mean squares of each column."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    entries = (lib.llama_model_imatrix_data * (len(names) + 1))()  # the last one has no name
    kept: list[Any] = [entries]
    for entry, name in zip(entries, names, strict=False):
        sums = np.atleast_2d(tensors[name + SUMS])
        counts = tensors[name + COUNTS].reshape(-1, 1)
        # An expert that no token went to says nothing: all its columns weigh the same.
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
        means = np.ascontiguousarray(means, dtype=np.float32)
        entry.name = name.encode()
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = means.size
        kept.append(means)
    return ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data)), kept


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned llama.cpp (ggml/include/ggml.h), up to its name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]
F32 = 0


def _is_layer(name: bytes) -> bool:
    """A weight of the layers. Attention multiplies what is none, and the output head is quantized
    better without, llama.cpp's authors found."""
    return name.startswith(b"blk.") and name.endswith(b".weight")


class _Collector:
    """The sum of squares of every column of what is multiplied with each weight."""

    def __init__(self) -> None:
        from llama_cpp._ggml import libggml

        # The numbers of ggml's operations change between versions; their names do not.
        libggml.ggml_op_name.restype = ctypes.c_char_p
        libggml.ggml_op_name.argtypes = [ctypes.c_int]
        self.op_name = functools.cache(libggml.ggml_op_name)
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.error: Exception | None = None
        self.callback = lib.ggml_backend_sched_eval_callback(self._seen)

    def _seen(self, address: int, ask: bool, _: Any) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        op = self.op_name(tensor.op)
        wanted = op in (MUL_MAT, MUL_MAT_ID) and _is_layer(tensor.src[0].contents.name)
        if ask or not wanted:
            return wanted or not ask
        try:
            self._add(tensor, op == MUL_MAT_ID)
        except Exception as error:  # none may go through C
            self.error = error
            return False
        return True

    def _add(self, tensor: Any, experts: bool) -> None:
        weight, given = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if given.type != F32 or given.nb[0] != 4:
            raise RuntimeError(f"what is multiplied with {name} is not of type F32")
        count = weight.ne[2] if experts else 1
        sums = self.sums.setdefault(name, np.zeros((count, given.ne[0]), np.float32))
        counts = self.counts.setdefault(name, np.zeros(count, np.float32))
        rows = _array(given, ctypes.c_float)
        if not experts:
            flat = rows.reshape(-1, given.ne[0])
            sums[0] += np.einsum("ij,ij->j", flat, flat)
            counts[0] += len(flat)
            return
        chosen = _array(tensor.src[2].contents, ctypes.c_int32)[0, 0]  # tokens x experts of each
        for place in range(chosen.shape[1]):
            given_here = rows[0, :, place % rows.shape[2]]
            for expert in np.unique(chosen[:, place]):
                mine = given_here[chosen[:, place] == expert]
                sums[expert] += np.einsum("ij,ij->j", mine, mine)
                counts[expert] += len(mine)


def _array(tensor: Any, kind: Any) -> Any:
    """A tensor of the CPU's as numpy sees it, slowest dimension first, nothing copied."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 4
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, np.dtype(kind), memory, strides=strides)


def imatrix(
    model: str, tokens: list[int], chunk: int, target: str, threads: int, dataset: str
) -> dict[str, Any]:
    """Send the tokens through the model, a chunk at a time, and write what its weights were multiplied
    with."""
    collector = _Collector()
    values = read_header(Path(model)).values
    arch = values[gguf.Keys.General.ARCHITECTURE]
    length = min(chunk, values.get(gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=arch), chunk))
    chunks = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    llm = Model(model, length, threads, collector.callback)
    collector.sums.clear()  # of the warm-up
    collector.counts.clear()
    for part in chunks:
        llm.read(part)
        if collector.error:
            raise collector.error
    writer = gguf.GGUFWriter(target, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", len(chunks))
    writer.add_uint32("imatrix.chunk_size", length)
    for name in sorted(collector.sums):
        writer.add_tensor(name + SUMS, collector.sums[name])
        writer.add_tensor(name + COUNTS, collector.counts[name].reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"tensors": len(collector.sums), "tokens": len(tokens)}
