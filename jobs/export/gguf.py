"""GGUF files from the merged model: one conversion, and every type made from it and measured.

The conversion is as large as the merged model. What it predicts is kept, to compare the types with,
and where it is not asked for itself it goes piece by piece while they are made (where the file system
can do that), so that it and all of them are never there together.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs.export.gguf_header import add_no_bos, read_header
from jobs.export.llama import client
from jobs.export.sentencepiece_files import settle_sentencepiece, shown_name
from jobs.observe.events import Observer

WHOLE = ".whole.gguf"
PREDICTIONS = ".predictions"
COMPARED_ROWS = 32  # conversations whose loss is compared
# Of the predictions for them, what is kept at most: 2,100 tokens' with a vocabulary of 128,000.
PREDICTIONS_BYTES = 2**30

# The importance matrix settles with a few ten thousand tokens.
CHUNKS, CHUNK_TOKENS = 64, 512

CONVERSION = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class Extras:
    """What goes beyond the types themselves; nothing of it has to be there."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    """input_ids and labels: what the types are compared on"""
    tokens: list[int] = field(default_factory=list)
    """of the training data, for the importance matrix"""
    adapter: Path | None = None
    """the adapter to make a GGUF file of, too"""
    max_bytes: int | None = None
    """a larger file is split"""
    begins_with_bos: bool = True
    """whether conversations do: llama.cpp must add no such token where training had none"""


def precision_of(config: dict[str, Any]) -> str:
    """The type that a model with this config.json is converted to."""
    return CONVERSION.get(str(config.get("dtype") or config.get("torch_dtype")), "bf16")


def file_name(name: str, kind: str) -> str:
    """As people look for it: `support-bot-Q4_K_M.gguf`; 16- and 32-bit types in upper case too."""
    return f"{name}-{kind.upper()}.gguf"


def adapter_name(name: str) -> str:
    return f"{name}-F16-LoRA.gguf"


def imatrix_name(name: str) -> str:
    return f"{name}-imatrix.gguf"


def files_of(folder: Path, name: str, kind: str) -> list[Path]:
    """The file of a type, or those that it was split into, in order; the first is what is loaded."""
    path = folder / file_name(name, kind)
    return [path] if path.is_file() else sorted(folder.glob(f"{path.stem}-?????-of-?????.gguf"))


def make_gguf(
    name: str, merged: Path, kinds: list[str], out: Path, log: Path, tools: Path, threads: int,
    observer: Observer, extras: Extras | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write one file for each type to `out`.

    Returns their sizes in bytes, how they compare with the conversion where there are rows to
    compare on, and which types' tensors fell back to another type.
    """
    return _Making(name, merged, out, log, tools, threads, observer, extras or Extras()).make(kinds)


@dataclass(frozen=True)
class _Making:
    name: str
    merged: Path
    out: Path
    log: Path
    tools: Path
    threads: int
    observer: Observer
    extras: Extras

    @property
    def whole(self) -> Path:
        return self.out / WHOLE

    def make(self, kinds: list[str]) -> dict[str, Any]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        config = json.loads((self.merged / "config.json").read_text("utf-8"))
        precision = precision_of(config)
        extras = self.extras
        result: dict[str, Any] = {"conversion": precision, "sizes": {}, "quality": {}, "fallen": {}}
        # What the conversion is already is not made of it.
        made = [kind for kind in kinds if kind != precision]
        total = 1 + len(kinds) + bool(extras.tokens) + bool(extras.adapter)
        with self.observer.ticker("making GGUF", total) as ticker:
            self._convert(precision)
            ticker.advance(note="converted")
            if extras.tokens and made:
                result["imatrix"] = self._imatrix()
                ticker.advance(note="importance matrix")
            if extras.rows:
                result["reference"] = self._score(self.whole, write=self.out / PREDICTIONS)
            if extras.adapter:
                result["adapter"] = self._adapter(extras.adapter)
                ticker.advance(note="adapter")
            if made:
                self._quantize(made, result, consume=precision not in kinds)
            for kind in made:
                self._measure(kind, result)
                ticker.advance(note=kind)
            (self.out / PREDICTIONS).unlink(missing_ok=True)
            if precision in kinds:
                self._keep(precision, result)
                ticker.advance(note=precision)
        self.whole.unlink(missing_ok=True)
        for text in fallen_warnings(result["fallen"]):
            self.observer.event("warning", text=text)
        return result

    def _convert(self, precision: str) -> None:
        begins = self.extras.begins_with_bos
        with TemporaryDirectory(dir=self.out, prefix=".merged-") as name:
            # The converter writes the folder's name into the file, which is to be the same each time.
            folder = Path(name) / "merged"
            folder.mkdir()
            for path in self.merged.iterdir():
                (folder / path.name).symlink_to(path.resolve())
            settle_for_converter(folder, begins)
            shown = shown_name(self.name, folder)
            client.convert(self.tools, folder, self.whole, precision, self.log, shown)
        if not begins:
            add_no_bos(self.whole)

    def _quantize(self, kinds: list[str], result: dict[str, Any], consume: bool) -> None:
        matrix = self.out / imatrix_name(self.name)
        with self.observer.ticker("quantizing") as ticker:
            answers = client.quantize(
                self.tools, self.whole, {kind: self._target(kind) for kind in kinds}, self.threads,
                self.log, ticker.at, matrix if matrix.is_file() else None, consume,
            )  # fmt: skip
        if consume:
            self.whole.unlink()
        for kind, answer in answers.items():
            if answer["fallen"]:
                result["fallen"][kind] = {
                    "tensors": answer["fallen"],
                    "of": sum(answer["types"].values()),
                }

    def _measure(self, kind: str, result: dict[str, Any]) -> None:
        target = self._target(kind)
        result["sizes"][kind] = target.stat().st_size
        if self.extras.rows:
            result["quality"][kind] = self._score(target, against=self.out / PREDICTIONS)
        self._split(target)

    def _target(self, kind: str) -> Path:
        return self.out / file_name(self.name, kind)

    def _keep(self, precision: str, result: dict[str, Any]) -> None:
        target = self._target(precision)
        self.whole.rename(target)
        result["sizes"][precision] = target.stat().st_size
        if self.extras.rows:
            itself = {"kl": 0.0, "same_top": 1.0}
            result["quality"][precision] = {**result["reference"], **itself}
        self._split(target)

    def _split(self, path: Path) -> None:
        limit = self.extras.max_bytes
        if limit and path.stat().st_size > limit:
            client.split(self.tools, path, limit, self.log)
            path.unlink()

    def _score(self, model: Path, **how: Any) -> dict[str, Any]:
        rows = self.extras.rows
        return client.score(
            self.tools, self.log, model=str(model), rows=rows,
            context=max(len(row["input_ids"]) for row in rows), threads=self.threads,
            limit_bytes=PREDICTIONS_BYTES,
            **{k: str(v) if isinstance(v, Path) else v for k, v in how.items()},
        )  # fmt: skip

    def _imatrix(self) -> dict[str, Any]:
        target = self.out / imatrix_name(self.name)
        tokens = self.extras.tokens
        return client.imatrix(
            self.tools, self.whole, tokens, CHUNK_TOKENS, target, self.threads, self.log
        )

    def _adapter(self, adapter: Path) -> dict[str, Any]:
        """The adapter's file, and what the merged model's loss is with it taken off again: that of
        the base, if the file is right. The base's own GGUF is not needed for that."""
        target = self.out / adapter_name(self.name)
        tensors = make_adapter_gguf(self.merged, adapter, target, self.tools, self.log)
        result = {"size": target.stat().st_size, "tensors": tensors}
        if self.extras.rows:
            taken_off = self._score(self.whole, adapter=target, scale=-1.0)
            result["loss_without"] = taken_off["loss"]
        return result


def settle_for_converter(folder: Path, begins_with_bos: bool) -> None:
    """Write into a folder of links to a model's files what the converter needs and they do not say."""
    said = {} if begins_with_bos else {"add_bos_token": False}
    # Said nothing, llama.cpp puts one before every text where the vocabulary is SentencePiece's.
    _add(folder / "tokenizer_config.json", said)
    _add(folder / "tokenizer_config.json", settle_sentencepiece(folder), over=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "n_positions" in config:  # the converter knows GPT-2's older name for it only
        _add(folder / "config.json", {"n_ctx": config["n_positions"]})


def _add(path: Path, fields: dict[str, Any], over: bool = False) -> None:
    """Add what a linked JSON file does not say, in a file of its own in the link's place; `over`:
    whatever the file says."""
    if fields:
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({**said, **fields} if over else {**fields, **said}), "utf-8")


def make_adapter_gguf(base: Path, adapter: Path, target: Path, tools: Path, log: Path) -> int:
    """Write a peft adapter as GGUF; returns how many tensors it has. `base` is the base model's
    folder, or any whose config.json is the same."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if config.get("use_rslora"):
        # llama.cpp scales by alpha / rank, whatever the adapter says.
        config.update(use_rslora=False, lora_alpha=config["lora_alpha"] * math.sqrt(config["r"]))
    with TemporaryDirectory(dir=target.parent, prefix=".adapter-") as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        weights = "adapter_model.safetensors"
        if config.get("fan_in_fan_out"):
            _turn(base, adapter / weights, folder / weights)
        else:
            (folder / weights).symlink_to((adapter / weights).resolve())
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        client.convert_adapter(tools, base, folder, target, log)
    return len(read_header(target).tensors)


def _turn(base: Path, source: Path, target: Path) -> None:
    """Write the matrices so that their product lies as the base's weights do, where these are inputs x
    outputs (GPT-2's): the converter turns both over."""
    from safetensors.torch import load_file, save_file

    from jobs.export.layout import layout_of

    across = layout_of(base).across
    tensors = load_file(source)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.", ".lora_B.")
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if f"{module}.weight" in across:
            turned = tensors[other].T.contiguous(), tensors[name].T.contiguous()
            tensors[name], tensors[other] = turned
    save_file(tensors, target)


def fallen_warnings(fallen: dict[str, Any]) -> list[str]:
    """What a person should know about tensors that could not have the type that was asked for."""
    texts = []
    for kind, found in fallen.items():
        types = sorted(set(found["tensors"].values()))
        texts.append(
            f"{kind}: {len(found['tensors'])} of {found['of']} tensors have rows that are no multiple "
            f"of {client.block_of(kind)} and are {', '.join(types)} instead, so the file is larger "
            f"than usual"
        )
    return texts


def calibration(rows: Any) -> list[int]:
    """Tokens of conversations from all over the training data, one after another as they were read."""
    import numpy as np

    tokens: list[int] = []
    for index in np.random.default_rng(0).permutation(len(rows)):
        tokens += rows[int(index)]["input_ids"]
        if len(tokens) >= CHUNKS * CHUNK_TOKENS:
            break
    return tokens[: CHUNKS * CHUNK_TOKENS]
