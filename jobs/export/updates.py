"""What an adapter does to the base's weights: matrices to add, magnitudes, whole tensors to take over.

Any LoRA adapter in peft's format is understood: plain, rsLoRA, DoRA, with ranks and alphas of single
layers, on embeddings, with biases and whole modules. What is not, is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.errors import AccessError, SpecError, VerificationError
from jobs.export.layout import Layout
from jobs.export.safetensors_stream import Reader

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"

# Fields of adapter_config.json that change what the matrices mean, and that merging does not know.
UNKNOWN = (
    "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip

# Starts of the matrices that leave the base's weights as they are. Others (PiSSA, OLoRA, CorDA, ...)
# take something off them, and the adapter is then none for the base as it was.
STARTS = {"true", "false", "gaussian", "eva", "loftq", "orthogonal"}


@dataclass(frozen=True)
class LowRank:
    """scale * left @ right, of the shape that the weight has in the checkpoint.

    With DoRA the sum with the weight is scaled to `magnitude` along `axis`: 0 where an output is a
    row, 1 where it is a column.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    axis: int

    def to(self, device: str) -> LowRank:
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return replace(
            self, left=self.left.to(device), right=self.right.to(device), magnitude=magnitude
        )

    def add_to(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The sum with rows of the weight, from `start` on; before any scaling to a magnitude."""
        delta = self.left[start : start + len(rows)] @ self.right
        return rows.add_(delta.mul_(self.scale))


@dataclass(frozen=True)
class Update:
    """What becomes of one tensor. Names are those of tensors in the adapter."""

    taken: str | None = None  # stands in the base's place
    matrices: str | None = None  # the module whose matrices are added
    added: str | None = None  # scaled and added: the bias of lora_B


class Updates:
    """The updates of an adapter, by the name of the base's tensor they belong to.

    Raises SpecError where the adapter is of a kind that cannot be merged, AccessError where it
    cannot be read.
    """

    def __init__(self, adapter: Path, layout: Layout) -> None:
        self.config = _config(adapter)
        self._layout = layout
        self._reader = _open(adapter)
        self.entries = self._reader.entries
        found: dict[str, dict[str, str]] = {}
        for key in self.entries:
            name = key.removeprefix(PREFIX)
            if module := _before(name, ".lora_A.weight", ".lora_embedding_A"):
                found.setdefault(f"{module}.weight", {})["matrices"] = module
            elif module := _before(name, ".lora_B.bias"):
                found.setdefault(f"{module}.bias", {})["added"] = key
            elif not _before(name, ".lora_B.weight", ".lora_embedding_B", ".lora_magnitude_vector"):
                if "lora_" in name or "token_adapter" in name:
                    raise SpecError(
                        f"the adapter holds {key}, which merging does not know",
                        "merge it with the library that made it",
                    )
                name = name.replace(".base_layer.", ".")
                found.setdefault(name, {})["taken"] = key
        self.of: Mapping[str, Update] = {name: Update(**parts) for name, parts in found.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._reader.read(name, start, stop)

    def matrices(self, module: str) -> LowRank:
        """The matrices of a module, in float32; Hu et al. 2021, equation 3."""
        if (embedding := f"{PREFIX}{module}.lora_embedding_A") in self.entries:
            a, b = self._float(embedding), self._float(f"{PREFIX}{module}.lora_embedding_B")
        else:
            a = self._float(f"{PREFIX}{module}.lora_A.weight")
            b = self._float(f"{PREFIX}{module}.lora_B.weight")
        if a.dim() != 2 or b.dim() != 2:
            raise SpecError(
                f"the adapter's matrices of {module} are no matrices, so it is no linear layer",
                "only linear layers and embeddings can be merged",
            )
        magnitude = f"{PREFIX}{module}.lora_magnitude_vector"
        across = embedding in self.entries or f"{module}.weight" in self._layout.across
        return LowRank(
            left=a.T.contiguous() if across else b,
            right=b.T.contiguous() if across else a,
            scale=self.scale(module, len(a)),
            magnitude=self._float(magnitude).reshape(-1) if magnitude in self.entries else None,
            axis=int(across),
        )

    def scale(self, module: str, rank: int | None = None) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023)."""
        rank = rank or int(self._of_layer("rank_pattern", module, self.config["r"]))
        alpha = float(self._of_layer("alpha_pattern", module, self.config["lora_alpha"]))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape get the same update."""
        first, second = self.of.get(one), self.of.get(other)
        if first is None or second is None:
            return first is second
        if first.taken and second.taken and not self._equal(first.taken, second.taken):
            return False
        if bool(first.taken) != bool(second.taken):
            return False
        if first.matrices and second.matrices:
            a, b = self.matrices(first.matrices), self.matrices(second.matrices)
            return (
                a.scale == b.scale
                and torch.equal(a.left, b.left)
                and torch.equal(a.right, b.right)
                and a.magnitude is b.magnitude is None
            )
        return bool(first.matrices) == bool(second.matrices)

    def close(self) -> None:
        self._reader.close()

    def _equal(self, one: str, other: str, piece: int = 2**22) -> bool:
        count = self.entries[one].count
        return self.entries[one].shape == self.entries[other].shape and all(
            torch.equal(
                self.read(one, at, min(count, at + piece)),
                self.read(other, at, min(count, at + piece)),
            )
            for at in range(0, count, piece)
        )

    def _float(self, key: str) -> torch.Tensor:
        if key not in self.entries:
            raise AccessError(f"the adapter lacks {key}", "save or fetch it again")
        values = self._reader.tensor(key).float()
        if not torch.isfinite(values).all():
            raise VerificationError(
                f"the adapter's {key} holds values that are no numbers", "train with less heat"
            )
        return values

    def _of_layer(self, patterns: str, module: str, default: Any) -> Any:
        """The value of the first pattern that fits the end of the module's name, as peft reads it."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def _config(adapter: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        kind = str(config["peft_type"]).upper()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AccessError(
            f"{adapter} is no adapter: adapter_config.json cannot be read ({error})",
            "name the folder that peft's save_pretrained wrote",
        ) from None
    if kind != "LORA":
        raise SpecError(f"the adapter is of type {kind}, and only LORA can be merged", None)
    if unknown := [name for name in UNKNOWN if config.get(name)]:
        hint = "matrices on parameters, such as a mixture's experts, cannot be merged yet"
        raise SpecError(
            f"the adapter was made with {unknown[0]}, which merging does not know",
            hint if unknown[0] == "target_parameters" else "merge it with the library that made it",
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in STARTS:
        raise SpecError(
            f"the adapter began as {start}, which changes the base's weights too",
            "let peft convert it to a plain one: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    return config


def _open(adapter: Path) -> Reader:
    try:
        return Reader(adapter / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise AccessError(
            f"{adapter / WEIGHTS} cannot be read: {error}",
            "only safetensors are read: pickled weights (.bin) can run code",
        ) from None


def _before(name: str, *endings: str) -> str | None:
    """What stands before one of these endings, if the name has one."""
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), None)
