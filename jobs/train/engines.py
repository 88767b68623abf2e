"""Which engine runs the model. Asked before anything that unsloth patches is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Literal

from jobs.errors import AccessError
from jobs.store.cache import cache_folder

Engine = Literal["unsloth", "transformers"]


def choose_engine(wanted: str, device: str) -> Engine:
    """The engine that the spec names; `auto` is unsloth on a GPU where it is installed.

    Raises AccessError where the one that is named is not there.
    """
    there = importlib.util.find_spec("unsloth") is not None
    if wanted == "unsloth" and not there:
        raise AccessError(
            "train.engine: unsloth is not installed",
            "use the GPU image, or install requirements.lock; or set train.engine to auto",
        )
    if wanted == "transformers" or not there or (wanted == "auto" and device != "cuda"):
        return "transformers"
    return "unsloth"


def start_engine(engine: Engine) -> None:
    """Import unsloth, which has to come before what it patches: transformers, trl and peft.

    It writes what it compiles to the cache, tells nobody about this machine, and looks for nothing
    in the network: everything it needs is in the base's folder.
    """
    if engine != "unsloth":
        return
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_ENABLE_LOGGING"] = "0"
    import unsloth  # type: ignore[import-not-found]  # noqa: F401


def is_unsloth() -> bool:
    """Whether this process runs models with unsloth."""
    return "unsloth" in sys.modules
