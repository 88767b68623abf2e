"""How much memory is in use."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs.observe.usage import memory
from tests.conftest import ROOT


def test_asking_loads_no_torch_and_takes_no_gpu() -> None:
    code = (
        "import sys; from jobs.observe.usage import memory; found = memory();"
        "assert 'torch' not in sys.modules; print(*found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["memory_bytes"]


def test_of_a_gpu_everything_in_use_is_counted() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    before = memory()
    assert before["gpu_memory_total_bytes"] > before["gpu_memory_bytes"] > held.numel()
    more = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert memory()["gpu_memory_bytes"] - before["gpu_memory_bytes"] >= more.numel()
