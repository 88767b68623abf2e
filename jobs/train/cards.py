"""GPUs: what well-known ones have, and what is in this machine. Without torch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from jobs.spec import GpuName

GIB = 2**30
PATIENCE = 2.0  # seconds for nvidia-smi, which can hang with its driver

# What CUDA reports as total memory, in GiB (rounded down), and whether there is bfloat16.
CARDS: dict[GpuName, tuple[float, bool]] = {
    "T4": (14.5, False), "V100-16GB": (15.7, False), "L4": (22.0, True), "A10G": (22.0, True),
    "RTX-3090": (23.5, True), "RTX-4090": (23.5, True), "RTX-5090": (31.3, True),
    "V100-32GB": (31.7, False), "A100-40GB": (39.3, True), "A40": (44.3, True), "L40S": (44.3, True),
    "RTX-A6000": (47.3, True), "RTX-6000-Ada": (47.3, True), "A100": (79.1, True),
    "H100": (79.1, True), "H100-NVL": (93.0, True), "H200": (139.7, True), "B200": (178.0, True),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    name: str
    bytes: int  # all of its memory
    used: int = 0  # by others
    bf16: bool = True
    here: bool = False  # in this machine

    @property
    def free(self) -> int:
        return self.bytes - self.used


def known(name: GpuName) -> Card:
    gib, bf16 = CARDS[name]
    return Card(name, int(gib * GIB), bf16=bf16)


def find_card() -> Card | None:
    """The first GPU of this machine, as nvidia-smi tells; None where there is none, or it hangs."""
    query = "--query-gpu=name,memory.total,memory.used,compute_cap"
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        name, total, used, capability = done.stdout.splitlines()[0].split(", ")
        # nvidia-smi counts some 0.6 GiB (1 % of a large card) that no program gets.
        usable = int(total) * 2**20 - max(GIB // 2, int(total) * 2**20 // 128)
        others = int(used) if int(used) > 700 else 0  # older drivers count their own here
        bf16 = float(capability) >= 8
        return Card(name, usable, others * 2**20, bf16, here=True)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
