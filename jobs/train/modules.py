"""Which modules a base has, and whether the spec names such. Without torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from jobs.base_model import INDEX, BaseModel
from jobs.errors import SpecError
from jobs.spec import Lora

SHOWN = 12  # names in a message
# A checkpoint lacks a head that is the same matrix as the embeddings; the module is there.
HEAD = "lm_head"


def require_modules_of_weights(lora: Lora, base: BaseModel) -> None:
    """Raises SpecError where the weights that are at hand say that a module does not exist.

    Where they are still elsewhere in one file, `require_modules` looks when the model is loaded. So
    it does for mixtures of experts, whose modules transformers names otherwise than their weights.
    """
    if any("expert" in key and value for key, value in base.config.items()):
        return
    names = _weight_names(base.folder)
    if names:
        modules = {name.rpartition(".")[0] for name in names}
        matrices = {
            name.rpartition(".")[0]
            for name, dimensions in names.items()
            if name.endswith(".weight") and dimensions in (2, None)
        }
        require_modules(lora, {*modules, HEAD}, {*matrices, HEAD})


def require_modules(lora: Lora, modules: Collection[str], matrices: Collection[str]) -> None:
    """Raises SpecError where the spec names a module that is not among the `modules`, by their whole
    paths, or as a target one without a matrix. `matrices` are those that have one."""
    if lora.target != "all-linear":
        linear = {_last(path) for path in matrices if _in_a_layer(path)}
        for wanted in lora.target:
            if _last(wanted) == HEAD:
                raise head_refused()
            if not any(_is_named(path, wanted) for path in modules):
                raise SpecError(
                    f"lora.target: the base model has no module {wanted}",
                    _hint(wanted, linear or {_last(path) for path in modules})
                    + ", or take all-linear",
                )
            if not any(_is_named(path, wanted) for path in matrices):
                raise SpecError(
                    f"lora.target: {wanted} has no matrix of its own for LoRA to add to",
                    f"train it whole with lora.modules_to_save, or {_hint(wanted, linear)}",
                )
    # What is trained whole may be a block of several, too.
    blocks = {path.rsplit(".", n)[0] for path in modules for n in range(path.count(".") + 1)}
    for wanted in lora.modules_to_save:
        if not any(_is_named(path, wanted) for path in blocks):
            near = get_close_matches(wanted, {_last(path) for path in blocks}, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SpecError(
                f"lora.modules_to_save: the base model has no module {wanted}",
                f"{hint}Its embeddings, head and norms are usual: embed_tokens, lm_head, norm",
            )


def head_refused() -> SpecError:
    """The loss is computed from the head's own weight, without ever holding all logits."""
    return SpecError(
        "lora.target: the output head takes no LoRA",
        "leave it out, or name it in lora.modules_to_save, to train it whole",
    )


def _is_named(path: str, wanted: str) -> bool:
    """Whether a name in the spec means the module: its path, or the end of it.

    The path may be without the name of the model within the one with a head, as checkpoints are.
    """
    return path == wanted or path.endswith(f".{wanted}") or wanted.endswith(f".{path}")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _in_a_layer(path: str) -> bool:
    """Norms have a weight too, which only the header of the weights tells from a matrix."""
    return any(part.isdecimal() for part in path.split(".")) and "norm" not in _last(path)


def _hint(wanted: str, names: set[str]) -> str:
    near = get_close_matches(wanted, names, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    shown = ", ".join(sorted(names)[:SHOWN]) + (" and others" if len(names) > SHOWN else "")
    return f"{meant}it has {shown}" if meant else f"name some of what it has: {shown}"


def _weight_names(folder: Path) -> dict[str, int | None]:
    """The tensors' names, with the number of their dimensions where that is known; none where the
    weights are not here."""
    names: dict[str, int | None] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            names |= {
                name: len(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        if not names and (folder / INDEX).is_file():
            mapped = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            names = dict.fromkeys(map(str, mapped))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return {}
    return names
