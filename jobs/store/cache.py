"""Where things are kept that can be fetched or made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LORAJOB_CACHE, else below ~/.cache."""
    own = os.environ.get("LORAJOB_CACHE")
    return Path(own) if own else Path.home() / ".cache" / "lorajob"
