"""The base model, here or elsewhere: whether it is one, and what identifies it. Without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import AccessError, SpecError
from jobs.store.base import Advance, Store, no_advance
from jobs.store.connect import Connections
from jobs.store.hashing import file_entries, key_of
from jobs.store.places import HubPlace, LocalPlace, S3Place, WrongPlace, parse_base
from jobs.store.remote import Remote

# The files that say how text becomes tokens. They go along with everything that is made.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


# What of a repository belongs to a model: weights in other formats and of other frameworks, which
# lie beside them on the Hub, would double what has to be fetched.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
INDEX = "model.safetensors.index.json"

# How the names of causal language models end: GPT-2's is from before there was a custom.
CAUSAL = ("ForCausalLM", "GPT2LMHeadModel")


@dataclass(frozen=True)
class BaseModel:
    source: str  # as the spec names it
    folder: Path  # with configuration and tokenizer; `whole` has the weights too
    config: dict[str, Any]
    remote: Remote | None = None  # None for a folder of this machine
    commit: str | None = None  # on the Hub

    @cached_property
    def content_key(self) -> str:
        """Identifies weights, configuration and tokenizer by their content; found out once."""
        if self.remote:
            return self.remote.identity
        return key_of([[f["path"], f["sha256"]] for f in file_entries(self.folder)])

    def weight_bytes(self) -> int:
        if self.remote:
            return sum(e.size for e in self.remote.entries if e.key.endswith(".safetensors"))
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def missing_bytes(self) -> int:
        """What has yet to be fetched, in bytes."""
        return sum(entry.size for entry in self.remote.missing()) if self.remote else 0

    def whole(self, advance: Advance = no_advance) -> Path:
        """The folder with the weights in it: fetched now, where they have not been yet."""
        if self.remote and self.remote.missing():
            self.remote.bring(advance=advance)
            _require_weights(self.source, self.folder)
        return self.folder


def open_base(source: str, connections: Connections) -> BaseModel:
    """The base model that the spec names. Raises AccessError where it is none, saying why.

    Of one that is elsewhere only configuration and tokenizer are fetched.
    """
    try:
        place = parse_base(source)
    except WrongPlace as error:
        raise SpecError(f"model.base: {error}", "name a repository, s3://... or a folder") from None
    match place:
        case LocalPlace(path):
            return _open_folder(source, path)
        case S3Place():
            store: Store = connections.s3_store(place)
            commit = None
        case HubPlace():
            from jobs.store.hub import HubStore

            hub = HubStore.of_place(place, connections.retries)
            store, commit = hub, hub.commit
    there = [entry for entry in store.entries() if "/" not in entry.key]
    if not there:
        raise AccessError(f"model.base: there is nothing at {source}", "check the address")
    small = [e for e in there if any(fnmatchcase(e.key, pattern) for pattern in SMALL_FILES)]
    weights = [entry for entry in there if entry.key.endswith(".safetensors")]
    index = next((entry for entry in there if entry.key == INDEX), None)
    if index:
        wanted = _index(source, Remote(store, (index,)).bring() / INDEX)
        _require_named(source, wanted, {entry.key for entry in weights})
    else:
        wanted = {"model.safetensors"} & {entry.key for entry in weights}
    chosen = [entry for entry in weights if not wanted or entry.key in wanted]
    remote = Remote(store, tuple(sorted([*small, *chosen], key=lambda entry: entry.key)))
    folder = remote.bring(small)
    config = _config(source, folder)
    if not chosen:
        raise _no_weights(source)
    return BaseModel(source, folder, config, remote, commit)


def _open_folder(source: str, path: str) -> BaseModel:
    folder = Path(path)
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
            f"(paths are taken from {Path.cwd()}), or a repository on the Hub: owner/name",
        )
    config = _config(source, folder)
    _require_weights(source, folder)
    return BaseModel(source, folder, config)


def _config(source: str, folder: Path) -> dict[str, Any]:
    """config.json, if it is one of a model that can be trained."""
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
    if not isinstance(kinds, list) or not any(str(kind).endswith(CAUSAL) for kind in kinds):
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
    return config


def _require_weights(source: str, folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _no_weights(source)
    index = folder / INDEX
    if index.is_file():
        _require_named(source, _index(source, index), {path.name for path in weights})
    for path in weights:
        _require_whole(path)


def _no_weights(source: str) -> AccessError:
    return AccessError(
        f"model.base: {source} has no *.safetensors weights",
        "only safetensors are read: pickled weights (.bin, .pt) can run code",
    )


def _index(source: str, path: Path) -> set[str]:
    """The weight files that an index names."""
    try:
        named = json.loads(path.read_text("utf-8"))["weight_map"].values()
        return {str(name) for name in named}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise AccessError(
            f"model.base: {path} is no index of weights", "fetch the base model again"
        ) from None


def _require_named(source: str, named: set[str], there: set[str]) -> None:
    if missing := sorted(named - there):
        raise AccessError(
            f"model.base: {source} lacks {len(missing)} of its weight files, {missing[0]} first",
            "fetch the base model again",
        )


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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each once, in order."""
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return [folder / "model.safetensors"]


def repository_of(source: str) -> str:
    """`owner/name` of a base on the Hub, without its revision."""
    place = parse_base(source)
    return place.repository if isinstance(place, HubPlace) else source


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
                # A token that stands for text, named here, would be split from its neighbours.
                if tokenizer.special_tokens.get(name) != text and tokenizer.is_special(token):
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
