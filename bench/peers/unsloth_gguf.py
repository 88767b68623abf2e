"""The end of unsloth's notebooks: `save_pretrained_gguf` of a model that has just been trained.

It wants triton, and a llama.cpp: UNSLOTH_LLAMA_CPP_PATH names a folder with llama-quantize, and
UNSLOTH_LLAMA_CPP_SCRIPTS_DIR one with the converter; else it would fetch one from GitHub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # first


def exporting(base: Path, adapter: Path, out: Path, kinds: list[str]) -> Callable[[], None]:
    """Load the model, as it is after training; what is returned makes the files."""
    import torch
    from peft import PeftModel
    from unsloth.save import patch_saving_functions

    if not torch.cuda.is_available():  # it asks its device's module for this
        torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(base), max_seq_length=2048, dtype=None, load_in_4bit=True
    )
    model = patch_saving_functions(PeftModel.from_pretrained(model, str(adapter)))

    def export() -> None:
        model.save_pretrained_gguf(str(out / "model"), tokenizer, quantization_method=kinds)

    return export
