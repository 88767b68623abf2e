"""The manifest: what a run was made from, what it made, and what was found out about it."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from jobs import __version__
from jobs.store.hashing import FileEntry, key_of

NAME = "manifest.json"
FORMAT = 1

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets",
    "tokenizers", "safetensors", "gguf", "unsloth", "unsloth_zoo",
)  # fmt: skip


def versions() -> dict[str, str]:
    """lorajob's own version, Python's, and those of the packages that can change a result."""
    found = {"lorajob": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def build(
    spec: dict[str, Any],
    inputs: dict[str, Any],
    data: dict[str, Any],
    stages: dict[str, dict[str, Any]],
    files: list[FileEntry],
) -> dict[str, Any]:
    return {
        "manifest": FORMAT,
        "name": spec["name"],
        "spec": spec,
        "spec_sha256": key_of(spec),
        "versions": versions(),
        "inputs": inputs,
        "data": data,
        "stages": stages,
        "files": files,
    }
