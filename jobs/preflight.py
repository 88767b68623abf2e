"""Everything that can be known before a GPU is used: `check`, and the first seconds of `run`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.base_model import BaseModel, open_base
from jobs.data.origins import Origins, find_origins
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import DoesNotFitError, in_field
from jobs.export.gguf import COMPARED_ROWS, PREDICTIONS_BYTES, precision_of
from jobs.export.llama.build import find_tools, require_compiler
from jobs.export.tokenizer_proof import require_possible
from jobs.spec import Spec
from jobs.store.base import KeyStore, Store
from jobs.store.cache import cache_folder
from jobs.store.connect import Connections
from jobs.store.local import LocalStore, can_punch, existing
from jobs.store.retry import Retries
from jobs.train.memory import BYTES_OF, HALF, checkpoint_bytes
from jobs.train.modules import require_modules_of_weights
from jobs.train.shape import describes, read_shape

# Bits a weight takes in each of llama.cpp's types, block scales included, rounded up
# (llama.cpp, ggml/src/ggml-common.h; k-quant mixes by their largest measured average).
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.8, "q5_k_s": 5.6,
    "q5_0": 5.6, "q5_1": 6.0, "q4_k_m": 5.0, "q4_k_s": 4.7, "q4_0": 4.7, "q4_1": 5.1,
    "q3_k_l": 4.4, "q3_k_m": 4.0, "q3_k_s": 3.6, "q2_k": 3.4, "q2_k_s": 3.2, "iq4_nl": 4.7,
    "iq4_xs": 4.5, "iq3_m": 3.9, "iq3_s": 3.8, "iq3_xs": 3.7, "iq3_xxs": 3.4, "iq2_m": 3.1,
    "iq2_s": 2.9, "iq2_xs": 2.8, "iq2_xxs": 2.6, "iq1_m": 2.4, "iq1_s": 2.2,
}  # fmt: skip


@dataclass(frozen=True)
class Ready:
    base: BaseModel
    tokenizer_files: TokenizerFiles
    tokenizer: ChatTokenizer
    origins: Origins
    targets: list[Store]
    keeper: KeyStore | None  # where checkpoints go besides the run's folder
    connections: Connections
    disk: list[Need]


@dataclass(frozen=True)
class Need:
    """What will be written below a folder, in bytes, and what is free there."""

    folder: Path
    bytes: int
    what: str

    @property
    def free(self) -> int:
        return shutil.disk_usage(existing(self.folder)).free


def preflight(spec: Spec, folder: Path, tell: Callable[[str], None], keep: bool) -> Ready:
    """Prove that base, tokenizer, data, tools, disk and every target are there.

    `tell` hears of waits for a service. `keep` says whether what a target needs (a folder, a
    repository) stays there: for a run, not for a check. Raises what is wrong.
    """
    retries = Retries(give_up_after=60 * spec.limits.retry_minutes, tell=tell)
    connections = Connections(spec.s3, retries)
    with in_field("publish"):
        targets = [connections.target(target) for target in spec.publish]
    with in_field("model.base"):
        base = open_base(spec.model.base, connections)
    require_modules_of_weights(spec.lora, base)
    files = TokenizerFiles(base.folder, spec.model.chat_template, spec.model.template_date)
    tokenizer = files.load()
    origins = find_origins(spec.data, connections)
    if spec.export.needs_llama_cpp:
        if not find_tools():
            require_compiler()
        with in_field(spec.export.asks_for_llama_cpp):
            require_possible(base.folder)
    LocalStore(folder).prove_writable(keep=True)
    for store in targets:
        with in_field("publish"):
            store.prove_writable(keep)
    keeper = _keeper(spec, connections)
    if keeper and spec.checkpoints.to:
        with in_field("checkpoints.to"):
            keeper.prove_writable(keep)
    disk = [
        Need(folder, run_bytes(spec, base, can_punch(folder)), "the run"),
        Need(cache_folder(), base.missing_bytes(), "the base model"),
        Need(cache_folder(), sum(o.missing_bytes() for o in origins.found), "the data"),
    ]
    _require_disk(disk)
    return Ready(base, files, tokenizer, origins, targets, keeper, connections, disk)


def _keeper(spec: Spec, connections: Connections) -> KeyStore | None:
    """Where checkpoints go: the place that the spec names, else the first target that can."""
    named = spec.checkpoints.to
    for target in [named] if named else spec.publish:
        if isinstance(target, str):
            with in_field("checkpoints.to" if named else "publish"):
                return connections.key_store(target)
    return None


def run_bytes(spec: Spec, base: BaseModel, punches: bool = True) -> int:
    """The most that the run's folder holds at one time, in bytes, from the base's size and shape.
    `punches`: its file system can give back parts of a file."""
    weights = base.weight_bytes()
    need = 0.1 * weights  # adapter, checkpoints, prepared data
    shape = read_shape(base.config)
    if shape:
        # One more is written before the oldest is removed; the adapter is less than another.
        need = max(need, (spec.checkpoints.keep + 2) * checkpoint_bytes(shape, spec))
    if spec.export.needs_llama_cpp:
        tokens = COMPARED_ROWS * spec.model.max_seq_length
        need += min(PREDICTIONS_BYTES, 4 * tokens * int(base.config.get("vocab_size") or 2**18))
        limit = spec.export.gguf_max_gib
        sizes = [weights * GGUF_BITS[kind] / 16 for kind in spec.export.gguf]
        # One file at a time is there whole and in pieces.
        split = max((size for size in sizes if limit and size > limit * 2**30), default=0)
        # The unquantized GGUF goes while the others are made from it, but for the tensor they are at:
        # with a large vocabulary that is its embedding, which no type takes to less than q6_k.
        whole = 0.0 if precision_of(base.config) in spec.export.gguf else weights
        if whole and punches:
            bits = sum(max(GGUF_BITS[kind], GGUF_BITS["q6_k"]) for kind in spec.export.gguf)
            tensor = HALF * shape.vocabulary * shape.hidden if shape else 0
            whole = max(0.0, whole - sum(sizes)) + tensor * bits / 16
        need += max(whole, split)
    return int(need) + result_bytes(spec, base)


def result_bytes(spec: Spec, base: BaseModel) -> int:
    """About what each target gets, in bytes."""
    weights = base.weight_bytes()
    merged = {None: 0.0, "16bit": 1.0, "4bit": _share_in_4_bit(base)}[spec.export.merged]
    return int(weights * (merged + sum(GGUF_BITS[kind] / 16 for kind in spec.export.gguf)))


def _share_in_4_bit(base: BaseModel) -> float:
    """What the weights take in 4 bit, of what they take in 16; all where that is not known."""
    shape = read_shape(base.config)
    if shape is None or not describes(shape, base.weight_bytes()):
        return 1.0
    packed = shape.linear_weights * BYTES_OF["4bit"] + shape.outer_weights * HALF
    return packed / (HALF * shape.weights)


def _require_disk(needs: list[Need]) -> None:
    """Raises DoesNotFitError where a disk has no room for all that will be written to it."""
    of_disk: dict[int, list[Need]] = {}
    for need in needs:
        of_disk.setdefault(existing(need.folder).stat().st_dev, []).append(need)
    for together in of_disk.values():
        total, free = sum(need.bytes for need in together), together[0].free
        if total > free:
            parts = "; ".join(
                f"{need.what} about {need.bytes / 2**30:.1f} GiB in {need.folder}"
                for need in together
                if need.bytes
            )
            raise DoesNotFitError(
                f"the disk has {free / 2**30:.1f} GiB free, and it takes {total / 2**30:.1f} GiB: "
                f"{parts}",
                "free some, use a larger disk (--work, LORAJOB_CACHE), or make fewer GGUF types",
            )
