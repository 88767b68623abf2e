"""Where things come from and go to."""

from __future__ import annotations

from jobs.errors import SpecError
from jobs.store.base import Store
from jobs.store.local import LocalStore

__all__ = ["LocalStore", "Store", "open_store"]


def open_store(url: str) -> Store:
    """The store behind a publishing target of the spec; nothing is touched yet."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(url)
    if scheme == "file":
        return LocalStore(rest)
    raise SpecError(f"publish: {url} is no place this version can publish to", "name a folder")
