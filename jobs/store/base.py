"""The one interface over every place that results go to and come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Store(Protocol):
    """A place for files under keys like `gguf/demo-Q8_0.gguf`.

    A key is either absent or complete: `put` makes it visible only when all its bytes are there.
    """

    url: str

    def prove_writable(self) -> None:
        """Write and remove a probe. Raises AccessError, saying why, where that fails."""

    def has(self, key: str, size: int, sha256: str) -> bool:
        """Whether exactly these bytes are there already."""

    def read_json(self, key: str) -> Any:
        """What a JSON file there says, or None where there is none or it is no JSON."""

    def put(self, source: Path, key: str) -> None:
        """Copy a file there, whole or not at all."""

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""

    def keys(self) -> list[str]:
        """Everything there, sorted."""
