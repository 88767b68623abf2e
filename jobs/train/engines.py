"""Which engine runs the model, and what each of them offers.

An engine is a module with the same names, which `Engine` lists.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from jobs.errors import AccessError
from jobs.store.cache import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.spec import Model, Spec
    from jobs.train.batches import FlatBatch

Name = Literal["unsloth", "transformers"]


class Engine(Protocol):
    """What the loop asks of the module of an engine."""

    TRAINER: Any
    ARGUMENTS: Any

    def arguments(self) -> dict[str, Any]:
        """What the trainer's ARGUMENTS need besides those that transformers' own has."""

    def load(self, folder: Path, model: Model, device: str) -> Any:
        """The frozen base model in `folder`, on `device`."""

    def add_lora(self, model: Any, spec: Spec, base: Path) -> Any:
        """The model with trainable matrices on it, as peft wraps it."""

    def set_checkpointing(self, model: Any, wanted: bool) -> None:
        """Whether activations are made again in the backward pass, to save memory."""

    def with_logits(self) -> AbstractContextManager[None]:
        """Within, a forward pass gives logits."""

    def lay_out(self, model: Any) -> tuple[FlatBatch, str, str | None]:
        """How conversations are laid end to end for this model; the kernel that attends to them,
        by name; and why it is not the fastest there is, if it is not."""


def choose_engine(wanted: str, device: str) -> Name:
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


def start_engine(name: Name) -> None:
    """Import unsloth, which has to come before what it patches: transformers, trl and peft.

    It writes what it compiles to the cache, tells nobody about this machine, and looks for nothing
    in the network: everything it needs is in the base's folder.
    """
    if name != "unsloth":
        return
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_ENABLE_LOGGING"] = "0"
    # Its compiled layers are not for conversations laid end to end, which is what is trained here; and
    # those of Gemma-2 cannot be compiled with torch 2.11 (an assertion in its Inductor).
    os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    import torch

    if torch.cuda.is_available():
        # TRL's trainers, which are not used here, are not rewritten then: seconds of every start.
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    import unsloth  # noqa: F401


def is_unsloth() -> bool:
    """Whether this process runs models with unsloth."""
    return "unsloth" in sys.modules


def engine_name() -> Name:
    return "unsloth" if is_unsloth() else "transformers"


def engine() -> Engine:
    """The engine that was started."""
    return cast(Engine, importlib.import_module(f"jobs.train.engine_{engine_name()}"))
