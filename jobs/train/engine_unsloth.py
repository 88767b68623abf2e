"""The `unsloth` engine: the same model with unsloth's kernels and its gradient checkpointing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from unsloth import FastLanguageModel

from jobs.errors import AccessError, SpecError
from jobs.spec import Model, Spec
from jobs.train import attention, lora
from jobs.train.batches import FlatBatch
from jobs.train.fused_lora import fuse
from jobs.train.runtime import compute_dtype

QUANTIZED = (Linear4bit, Linear8bitLt)

LONG = 2048  # any length from which unsloth finds it worthwhile to move a layer's input away

# unsloth rewrites TRL's trainer, which would put its own collator in place of ours: the plain one
# of transformers is the loop, and the loss is unsloth's kernel's.
TRAINER: Any = Trainer
ARGUMENTS: Any = TrainingArguments


def arguments() -> dict[str, Any]:
    return {}


def lay_out(model: Any) -> tuple[FlatBatch, str, str | None]:
    layer = next(m for name, m in model.named_modules() if name.endswith("self_attn"))
    if type(layer).forward.__module__.startswith("unsloth.models."):
        kernel, slow = _use_varlen_kernel(model)
        return FlatBatch(told="lengths"), kernel, slow
    # An architecture for which unsloth has no attention of its own: transformers' is used.
    kernel, slow = attention.attend_apart(model.get_base_model())
    return FlatBatch(told="boundaries"), kernel, slow


def _use_varlen_kernel(model: Any) -> tuple[str, str | None]:
    """Have laid-out conversations attended to by torch's own variable-length flash kernel.

    unsloth 2026.10 asks for the one of torch 2.12; with torch 2.11 it launches one kernel for each
    conversation and layer, which takes half of the time. Returns its name, and why another is taken
    where it is.
    """
    from unsloth.utils import attention_dispatch

    if getattr(model.config, "attn_logit_softcapping", None):
        _attend_softcapped()
        return attention.SOFTCAPPED
    if attention_dispatch._TORCH_VARLEN_ATTN is not None:
        return "varlen flash", None
    if reason := attention.no_varlen_kernel():
        return "SDPA for each conversation", reason

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Any:  # fmt: skip
        back = window_size[0]
        return attention.attend(
            q, k, v, cu_q, max_q, scale=scale, window=None if back < 0 else back + 1
        )

    attention_dispatch._TORCH_VARLEN_ATTN = attend
    return "varlen flash", None


def _attend_softcapped() -> None:
    """Have Gemma 2's conversations attended to each by itself.

    unsloth does so where flash-attn is installed; else it takes a mask over the whole row, in which
    conversations see each other, and compiles that with trying out kernels for minutes. So it is
    told that there is such a kernel, and given ours.
    """
    from unsloth.models import gemma2, llama

    def run_attention(*, config: Any, context: Any, Q: Any, K: Any, V: Any) -> torch.Tensor:
        """Q (rows, heads, queries, width), K and V (rows, fewer heads, keys, width) ->
        (rows, queries, heads, width)."""
        rows, keys = Q.shape[0], K.shape[2]
        before = keys - Q.shape[2]  # what a cache holds already: asked for as well, and left out
        Q = torch.nn.functional.pad(Q, (0, 0, before, 0))
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (Q, K, V))
        if context.seq_info is None:
            bounds = torch.arange(0, rows * keys + 1, keys, dtype=torch.int32, device=q.device)
        else:
            bounds = context.seq_info[1]
        told = config.flash_varlen_kwargs
        back = told["window_size"][0]
        out = attention.attend(
            q, k, v, bounds, keys, scale=told["softmax_scale"], softcap=told["softcap"],
            window=None if back < 0 else back + 1,
        )  # fmt: skip
        return out.view(rows, keys, *out.shape[1:])[:, before:]

    gemma2.run_attention = run_attention
    gemma2.HAS_FLASH_ATTENTION_SOFTCAPPING = llama.HAS_FLASH_ATTENTION_SOFTCAPPING = True


def load(folder: Path, model: Model, device: str) -> Any:
    """The model in `folder`, with unsloth's kernels. Raises AccessError where it cannot be loaded."""
    try:
        loaded, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=model.max_seq_length,
            dtype=compute_dtype(device),
            load_in_4bit=model.load_in == "4bit",
            load_in_8bit=model.load_in == "8bit",
            load_in_16bit=model.load_in == "16bit",
            use_gradient_checkpointing=False,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise AccessError(
            f"unsloth could not load {folder}: {str(error).strip().splitlines()[0]}",
            "set train.engine to transformers, which knows more architectures",
        ) from None
    if model.load_in != "16bit" and not any(isinstance(m, QUANTIZED) for m in loaded.modules()):
        raise SpecError(
            f"model.load_in: unsloth loads this base in 16 bit here, not in {model.load_in}",
            "set train.engine to transformers, or model.load_in to 16bit",
        )
    return loaded


def linear_names(model: Any) -> list[str]:
    """What `all-linear` is for unsloth, which takes names: those of the linear layers, without the
    output head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
    )


def add_lora(model: Any, spec: Spec, base: Path) -> Any:
    """Freeze the model and put trainable LoRA matrices on its linear layers."""
    target = spec.lora.target
    if target != "all-linear" and any(name.endswith("embed_tokens") for name in target):
        raise SpecError(
            "lora.target: unsloth trains embed_tokens whole, not with LoRA",
            "name it in lora.modules_to_save instead, or set train.engine to transformers",
        )
    try:
        tuned = FastLanguageModel.get_peft_model(
            model,
            target_modules=linear_names(model) if target == "all-linear" else list(target),
            use_gradient_checkpointing=False,
            random_state=spec.train.seed,
            **lora.options(spec.lora, model),
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise lora.wrong_option(error) from None
    if spec.lora.loftq:
        lora.start_with_loftq(tuned, base, spec.train.seed)
    # The folder, not its name on the Hub: peft would ask there at every checkpoint.
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    fuse(tuned)
    return tuned


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Keep activations, or make them again in the backward pass; what each layer begins with waits
    in the machine's memory then."""
    if wanted and torch.cuda.is_available():  # and never back: its buffers would be gone
        from unsloth.models._utils import apply_unsloth_gradient_checkpointing

        apply_unsloth_gradient_checkpointing("unsloth", LONG, compute_dtype("cuda"))
    FastLanguageModel.for_training(model, use_gradient_checkpointing=wanted)


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
