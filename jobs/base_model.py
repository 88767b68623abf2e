"""The base model's folder: whether it is one, and what identifies it. Without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import AccessError
from jobs.store.hashing import file_entries, key_of

# The files that say how text becomes tokens. They go along with everything that is made.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class BaseModel:
    source: str  # as the spec names it
    folder: Path
    config: dict[str, Any]

    @cached_property
    def content_key(self) -> str:
        """Identifies weights, configuration and tokenizer by their bytes; read once."""
        return key_of([[f["path"], f["sha256"]] for f in file_entries(self.folder)])

    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def open_base(source: str) -> BaseModel:
    """The base model that the spec names. Raises AccessError where it is none, saying why."""
    if "://" in source:
        raise AccessError(
            f"model.base: {source} is no place this version can read from",
            "download the model and name its folder",
        )
    folder = Path(source)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name longer than any file's
        raise AccessError(
            f"model.base: {source[:80]} cannot be read: {error.strerror}", "name a folder"
        ) from None
    if not is_folder:
        what = "is a file" if exists else "does not exist"
        raise AccessError(
            f"model.base: the folder {source} {what}",
            "name a folder with config.json, *.safetensors and tokenizer.json "
            f"(paths are taken from {Path.cwd()})",
        )
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise AccessError(
            f"model.base: {source} is no model: it has no config.json",
            "name the folder that AutoModelForCausalLM.save_pretrained wrote",
        ) from None
    except (OSError, ValueError) as error:
        raise AccessError(
            f"model.base: {config_path} cannot be read: {error}", "fetch the base model again"
        ) from None
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not any(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise AccessError(
            f"model.base: {source} is no causal language model: the architectures in its "
            f"config.json are {json.dumps(kinds)}",
            "name one whose config.json lists a ...ForCausalLM architecture",
        )
    if config.get("quantization_config") is not None:
        raise AccessError(
            f"model.base: {source} is quantized already",
            "name the original 16-bit weights; lorajob quantizes them itself (model.load_in)",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise AccessError(
            f"model.base: {source} has no *.safetensors weights",
            "only safetensors are read: pickled weights (.bin, .pt) can run code",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = {
                str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise AccessError(
                f"model.base: {index} is no index of weights", "fetch the base model again"
            ) from None
        missing = sorted(named - {path.name for path in weights})
        if missing:
            raise AccessError(
                f"model.base: {source} lacks {len(missing)} of its weight files, {missing[0]} first",
                "fetch the base model again",
            )
    for path in weights:
        _require_whole(path)
    return BaseModel(source, folder, config)


def _require_whole(path: Path) -> None:
    """Raises AccessError where a safetensors file is not as long as its own header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is cut short, or it is something else")
            header = json.loads(file.read(length))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        whole = 8 + length + max(ends, default=0)
        if size != whole:
            raise ValueError(f"it has {size} bytes of {whole}")
    except OSError as error:
        raise AccessError(
            f"model.base: {path} cannot be read: {error.strerror}", "fetch the base model again"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = str(error) if type(error) is ValueError else "its header is none"
        raise AccessError(
            f"model.base: {path} is no whole safetensors file: {why}", "fetch the base model again"
        ) from None


def copy_tokenizer(base: Path, tokenizer: ChatTokenizer, target: Path) -> None:
    """Put the base's tokenizer into `target`, with the chat template that was trained with.

    Its end-of-turn token becomes the end-of-sequence token, so that generation stops where the
    training said so, and padding is never that token.
    """
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            (target / name).write_bytes((base / name).read_bytes())
    config_path = target / "tokenizer_config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text("utf-8"))
        if isinstance(config, dict):
            before = dict(config)
            config.pop("chat_template", None)  # chat_template.jinja says it
            for name, token in (("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
                text = tokenizer.backend.id_to_token(token)
                if tokenizer.special_tokens.get(name) != text:
                    config[name] = text
            if config != before:
                write_json(config_path, config)
    (target / "chat_template.jinja").write_text(tokenizer.template.source, "utf-8")


def settle_stops(model: Path, tokenizer: ChatTokenizer) -> None:
    """Make config.json and generation_config.json in `model` name the tokens that end an answer."""
    stops = [tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id})]
    for name in ("config.json", "generation_config.json"):
        path = model / name
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        config["pad_token_id"] = tokenizer.pad_id
        write_json(path, config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
