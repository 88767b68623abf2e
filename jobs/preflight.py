"""Everything that can be known before a GPU is used: `check`, and the first seconds of `run`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs.base_model import BaseModel, open_base
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.errors import DoesNotFitError
from jobs.export.llama.build import find_tools, require_compiler
from jobs.spec import Spec
from jobs.store import LocalStore, Store, open_store

# Bits a weight takes in each of llama.cpp's types, block scales included, rounded up
# (llama.cpp, ggml/src/ggml-common.h; k-quant mixes by their largest measured average).
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.8, "q5_k_s": 5.6,
    "q5_0": 5.6, "q5_1": 6.0, "q4_k_m": 5.0, "q4_k_s": 4.7, "q4_0": 4.7, "q4_1": 5.1,
    "q3_k_l": 4.4, "q3_k_m": 4.0, "q3_k_s": 3.6, "q2_k": 3.4,
}  # fmt: skip


@dataclass(frozen=True)
class Ready:
    base: BaseModel
    tokenizer_files: TokenizerFiles
    tokenizer: ChatTokenizer
    targets: list[Store]


def preflight(spec: Spec, folder: Path) -> Ready:
    """Prove that base, tokenizer, tools, disk and every target are there. Raises what is wrong."""
    targets = [open_store(url) for url in spec.publish]
    base = open_base(spec.model.base)
    files = TokenizerFiles(base.folder, spec.model.chat_template, spec.model.template_date)
    tokenizer = files.load()
    if spec.export.gguf and find_tools() is None:
        require_compiler()
    for store in (LocalStore(folder), *targets):
        store.prove_writable()
    _require_disk(disk_bytes(spec, base), folder)
    return Ready(base, files, tokenizer, targets)


def disk_bytes(spec: Spec, base: BaseModel) -> int:
    """The most that the run's folder holds at one time, in bytes, from the base's size alone."""
    weights = base.weight_bytes()
    need = 0.1 * weights  # adapter, optimizer state, prepared data
    if spec.export.merged:
        need += weights
    if spec.export.gguf:
        need += weights  # the unquantized GGUF, while the others are made from it
        need += sum(weights * GGUF_BITS[kind] / 16 for kind in spec.export.gguf)
    return int(need)


def _require_disk(need: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DoesNotFitError(
            f"the run needs about {need / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB "
            "are free",
            "free some, use a larger disk (--work), or make fewer GGUF types",
        )
