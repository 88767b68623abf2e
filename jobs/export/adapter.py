"""An adapter that was there before: ours, or any LoRA one in peft's format.

It is taken in the place of one that was trained: loaded as peft loads it, with the logits that it gives
there kept for verification to compare against.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jobs.base_model import write_json
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import AccessError, SpecError, VerificationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

PROBES = 4  # conversations whose logits are kept
PROBED = 256  # and how many of their trained tokens

LoadIn = Literal["4bit", "8bit", "16bit"]


def find_adapter(place: Path) -> Path:
    """The adapter's folder: `place` itself, or `adapter/` in a run's folder. Raises AccessError."""
    for folder in (place, place / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AccessError(
        f"{place} is no adapter: it has no {CONFIG}",
        "name the folder that peft's save_pretrained wrote, or a run's",
    )


def read_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter. Raises AccessError, SpecError where it is another one."""
    path = adapter / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        kind = str(config["peft_type"]).upper()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AccessError(
            f"{path} cannot be read: {error}", "name the folder that peft's save_pretrained wrote"
        ) from None
    if kind != "LORA":
        raise SpecError(
            f"the adapter in {adapter} is of type {kind}, and only LORA adapters are exported",
            "use the library that made it",
        )
    if not (adapter / WEIGHTS).is_file():
        raise AccessError(
            f"the adapter in {adapter} has no {WEIGHTS}",
            "only safetensors are read: pickled weights (.bin) can run code",
        )
    found: dict[str, Any] = config
    return found


def weights_and_config(adapter: Path) -> tuple[Path, Path]:
    """The files that make the adapter what it is."""
    return adapter / WEIGHTS, adapter / CONFIG


def lora_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options of the spec's `lora` that it was made with, and its targets as the spec has them."""
    targets = config.get("target_modules")
    return {
        "rank": int(config.get("r") or 8),
        "alpha": float(config.get("lora_alpha") or 8),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "target": sorted(targets) if isinstance(targets, list) and targets else "all-linear",
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "bias": config.get("bias") or "none",
        "modules_to_save": list(config.get("modules_to_save") or []),
    }


def take(
    adapter: Path, base: Path, load_in: LoadIn, tokenizer: ChatTokenizer, data: Path, out: Path,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Write what training would have: `out/adapter`, and `out/probe.safetensors` with its logits.

    Raises VerificationError where the adapter does not fit the base.
    """
    from peft import PeftModel

    from jobs.train.engine_transformers import load_model, quantized_modules

    config = read_config(adapter)
    require_same_base(adapter, base)
    model = load_model(base, load_in, device)
    in_4bit = quantized_modules(model)
    tuned = PeftModel.from_pretrained(model, str(adapter))
    tuned.eval()
    _keep_probe(tuned, tokenizer, data, out / "probe.safetensors", device)
    (out / "adapter").mkdir()
    shutil.copyfile(adapter / WEIGHTS, out / "adapter" / WEIGHTS)
    write_json(out / "adapter" / CONFIG, config)
    return {
        "given": str(adapter),
        "lora": lora_of(config),
        "parameters": _count(adapter),
        "device": device,
        "quantized_modules": in_4bit,
    }


def require_same_base(adapter: Path, base: Path) -> None:
    """Raises VerificationError where a tensor of the adapter has no place in the base."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = _shapes(adapter)
    missing, other = [], []
    for key, shape in found.items():
        place = _place(key, shape)
        if place is None:
            continue
        name, size, axes = place
        if name not in shapes:
            missing.append(name)
        elif size not in {shapes[name][axis] for axis in axes if axis < len(shapes[name])}:
            other.append(f"{key.removeprefix(PREFIX)} is {_by(shape)}, {name} {_by(shapes[name])}")
    hint = "name the base that it was trained on with --base"
    named = read_config(adapter).get("base_model_name_or_path")
    if named:
        hint += f"; its {CONFIG} names {named}"
    if missing:
        missing = sorted(set(missing))
        raise VerificationError(
            f"the adapter in {adapter} is of another base: {len(missing)} of the weights that it "
            f"changes are not in {base}, {missing[0]} first",
            hint,
        )
    if other:
        raise VerificationError(
            f"the adapter in {adapter} is of another base: {len(other)} of its matrices do not fit, "
            f"the first: {other[0]}",
            hint,
        )


def _place(key: str, shape: tuple[int, ...]) -> tuple[str, int, tuple[int, ...]] | None:
    """The base's weight that a matrix goes with, its length there, and the axes it may be along.

    A layer of GPT-2's kind lies across, so that both are asked.
    """
    name = key.removeprefix(PREFIX)
    for ending, mine in (
        (".lora_A.weight", -1), (".lora_B.weight", 0), (".lora_embedding_A", -1),
        (".lora_embedding_B", 0),
    ):  # fmt: skip
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}.weight", shape[mine], (0, 1)
    if "lora_" in name or not shape:
        return None
    return name.replace(".base_layer.", "."), shape[0], (0,)  # trained as a whole


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own
        raise AccessError(
            f"{adapter / WEIGHTS} cannot be read: {error}", "save or fetch it again"
        ) from None


def _count(adapter: Path) -> int:
    import math

    return sum(math.prod(shape) for shape in _shapes(adapter).values())


def _keep_probe(model: Any, tokenizer: ChatTokenizer, data: Path, path: Path, device: str) -> None:
    """Some conversations with the logits that peft gives for them, as training keeps its own."""
    import torch
    from safetensors.torch import save_file

    from jobs.train.batches import PadBatch
    from jobs.train.loss import on_device, trained_logits
    from jobs.train.rows import load_rows

    rows: Any = load_rows(data / "eval.arrow") or load_rows(data / "train.arrow")
    items = [dict(rows[index]) for index in range(min(PROBES, len(rows)))]
    batch = PadBatch(tokenizer.pad_id)(items)  # type: ignore[arg-type]
    with torch.no_grad():
        logits, _ = trained_logits(model, on_device(batch, device), PROBED)
    save_file({**batch, "logits": logits.cpu().contiguous()}, path)
