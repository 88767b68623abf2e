"""The K-quants that lorajob makes of itself (kquants.c) are ggml's own, to the last bit."""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
import pytest

from jobs.export.llama.build import find_tools

BLOCK = 256
TYPES = {
    "q4_K": (12, 144),
    "q5_K": (13, 176),
    "q6_K": (14, 210),
}  # enum ggml_type, bytes of a block

TOOLS = find_tools()
pytestmark = [
    pytest.mark.skipif(TOOLS is None, reason="llama.cpp is not built: `lorajob tools`"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="kquants.c is built into llama.cpp on x86-64 Linux alone",
    ),
]


def _weights(kind: str) -> np.ndarray:
    """As many as 1,024 blocks take, float32."""
    random = np.random.default_rng(sum(kind.encode()))
    normal = random.standard_normal((1024, BLOCK)).astype(np.float32)
    groups = normal.reshape(-1, 16)
    if kind == "normal":
        normal *= 0.02
    elif kind == "bfloat16":  # as they come out of a model: many the same
        normal = (normal.view(np.uint32) & 0xFFFF0000).view(np.float32)
    elif kind == "zeros":
        normal[:] = 0
        normal[::3] = -0.0
    elif kind == "constant in groups":
        groups[:] = random.choice([-0.5, 0.0, 0.25], (len(groups), 1))
    elif kind == "zero groups among others":
        groups[random.random(len(groups)) < 0.4] = 0
    elif kind == "positive":
        np.abs(normal, normal)
        normal += 1
    elif kind == "negative":
        np.abs(normal, normal)
        normal *= -1
        normal -= 1
    elif kind == "outliers":
        normal[random.random(normal.shape) < 0.01] *= np.float32(1e4)
    elif kind == "groups far apart":  # scales of which some are rounded to nothing
        groups *= 10.0 ** random.integers(-18, 3, (len(groups), 1)).astype(np.float32)
    elif kind == "tiny":  # below what counts as a weight, and below normal numbers
        normal *= np.float32(1e-30)
        normal[::2] *= np.float32(1e-12)
    elif kind == "huge":
        normal *= np.float32(1e18)
    return np.ascontiguousarray(normal)


KINDS = [
    "normal", "bfloat16", "zeros", "constant in groups", "zero groups among others", "positive",
    "negative", "outliers", "groups far apart", "tiny", "huge",
]  # fmt: skip


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    assert TOOLS is not None
    return ctypes.CDLL(str(TOOLS / "llama_cpp" / "lib" / "libggml-base.so"))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _quantized(
    ggml: ctypes.CDLL, name: str, weights: np.ndarray, importance: np.ndarray | None = None
) -> np.ndarray:
    """What llama.cpp's quantizing calls, with rows of two blocks."""
    number, size = TYPES[name]
    out = np.full(len(weights) * size, 0xAA, np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = ggml.ggml_quantize_chunk(
        number, _pointer(weights), _pointer(out), ctypes.c_int64(0), ctypes.c_int64(len(weights) // 2),
        ctypes.c_int64(2 * BLOCK), None if importance is None else _pointer(importance),
    )  # fmt: skip
    assert written == out.size
    return out


def _reference(ggml: ctypes.CDLL, name: str, weights: np.ndarray) -> np.ndarray:
    out = np.full(len(weights) * TYPES[name][1], 0x55, np.uint8)
    quantize = getattr(ggml, f"quantize_row_{name}_ref")
    quantize(_pointer(weights), _pointer(out), ctypes.c_int64(weights.size))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_same_bits_as_ggml(ggml: ctypes.CDLL, name: str, kind: str) -> None:
    weights = _weights(kind)
    assert np.array_equal(_quantized(ggml, name, weights), _reference(ggml, name, weights))


@pytest.mark.parametrize("name", TYPES)
def test_importance_takes_ggmls_own_search(ggml: ctypes.CDLL, name: str) -> None:
    weights = _weights("normal")
    importance = np.random.default_rng(1).random(2 * BLOCK, np.float32) + np.float32(0.1)
    size = TYPES[name][1]
    own = np.zeros(len(weights) * size, np.uint8)
    quantize = getattr(ggml, f"quantize_{name}")
    quantize.restype = ctypes.c_size_t
    quantize(
        _pointer(weights), _pointer(own), ctypes.c_int64(len(weights) // 2),
        ctypes.c_int64(2 * BLOCK), _pointer(importance),
    )  # fmt: skip
    made = _quantized(ggml, name, weights, importance)
    assert np.array_equal(made, own)
    assert not np.array_equal(made, _reference(ggml, name, weights))


def test_ours_is_what_runs(ggml: ctypes.CDLL) -> None:
    """Else the comparisons above would hold ggml against itself."""
    assert ggml.__wrap_quantize_q4_K
