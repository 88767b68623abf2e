"""The `unsloth` engine: the same model with unsloth's kernels and its gradient checkpointing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from unsloth import FastLanguageModel  # type: ignore[import-not-found]

from jobs.errors import AccessError, SpecError
from jobs.spec import Lora
from jobs.train.engine import LoadIn
from jobs.train.runtime import compute_dtype

# What `all-linear` is for unsloth, which takes names: the linear layers of the architectures that
# it has kernels for.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def use_varlen_kernel() -> str:
    """Have laid-out conversations attended to by torch's own variable-length flash kernel.

    unsloth 2026.10 asks for the one of torch 2.12, which takes fewer heads of keys than of queries;
    with torch 2.11 it launches one kernel for each conversation and layer, which takes half of the
    time. The kernel is the same here, with keys and values repeated. Returns its name.
    """
    from unsloth.utils import attention_dispatch  # type: ignore[import-not-found]

    if attention_dispatch._TORCH_VARLEN_ATTN is not None:
        return "torch varlen"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return "SDPA for each conversation: this device has no flash kernel"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "SDPA for each conversation: this torch has no varlen kernel"

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Any:  # fmt: skip
        if enable_gqa:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    attention_dispatch._TORCH_VARLEN_ATTN = attend
    return "torch varlen, keys repeated"


def load_model(folder: Path, load_in: LoadIn, device: str, max_seq_length: int) -> Any:
    """The model in `folder`, with unsloth's kernels. Raises AccessError where it cannot be loaded."""
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=max_seq_length,
            dtype=compute_dtype(device),
            load_in_4bit=load_in == "4bit",
            load_in_16bit=load_in == "16bit",
            use_gradient_checkpointing=False,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise AccessError(
            f"unsloth could not load {folder}: {str(error).strip().splitlines()[0]}",
            "set train.engine to transformers, which knows more architectures",
        ) from None
    return model


def add_lora(model: Any, lora: Lora, base: str, seed: int) -> Any:
    """Freeze the model and put trainable LoRA matrices on its linear layers."""
    try:
        tuned = FastLanguageModel.get_peft_model(
            model,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=ALL_LINEAR if lora.target == "all-linear" else list(lora.target),
            bias="none",
            use_gradient_checkpointing=False,
            random_state=seed,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise SpecError(
            f"lora.target: {str(error).strip().splitlines()[0]}",
            "name modules of the base model, or all-linear",
        ) from None
    tuned.peft_config["default"].base_model_name_or_path = base
    return tuned


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Keep activations, or make them again in the backward pass (and hold them on the CPU)."""
    FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth" if wanted else False)


@contextmanager
def with_logits() -> Iterator[None]:
    """Within, the model gives logits; training computes the loss without ever holding them."""
    before = os.environ.get("UNSLOTH_RETURN_LOGITS")
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["UNSLOTH_RETURN_LOGITS"]
        else:
            os.environ["UNSLOTH_RETURN_LOGITS"] = before
