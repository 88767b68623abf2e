"""Attention over conversations that are laid end to end: each only within itself.

transformers keeps them apart by a mask of (tokens, tokens), which costs the square of a whole row
where only the squares of the conversations are needed. Here a flash kernel that knows where each
begins takes the row; where there is none, each conversation goes through SDPA by itself.
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jobs.train.softcap import SoftCapped

PREFIX = "apart_"  # before the name of the implementation that takes everything else
FLASH_HEAD = 256  # the longest head of the flash kernels
# A kernel's name, and why it is not the fastest.
SOFTCAPPED = "soft-capped, each conversation apart", "flash kernels know no soft-capping"


@cache  # each layer asks for each batch
def no_varlen_kernel() -> str | None:
    """Why this machine has no flash kernel for rows of several conversations; None where it has."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"{torch.cuda.get_device_name()} is older than flash kernels"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no varlen kernel"
    return None


def attend_apart(model: Any) -> tuple[str, str | None]:
    """Have the model attend so wherever it is told where conversations begin (`cu_seq_lens_q`).

    Everything else goes where it went before. Returns the kernel's name, and why it is not the
    fastest there is, if it is not.
    """
    config = model.config
    before = config._attn_implementation
    if not _can(model):
        return f"{before} with a mask", "this architecture takes no other attention"
    if not before.startswith(PREFIX):
        name = PREFIX + before
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(before))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask(before))
        # Every layer looks it up here at each call.
        config._attn_implementation = name
    if getattr(config, "attn_logit_softcapping", None):
        return SOFTCAPPED
    if reason := no_varlen_kernel():
        return "SDPA, each conversation apart", reason
    return "varlen flash", None


def _can(model: Any) -> bool:
    """Whether all that a layer's mask says is causality and a window, which the layer tells its
    attention as well: so it is where flash kernels are supported."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return bool(model._supports_flash_attn) and kinds <= {"full_attention", "sliding_attention"}


def _mask(before: str) -> Any:
    usual: Any = ALL_MASK_ATTENTION_FUNCTIONS[before]

    def mask(*args: Any, **kwargs: Any) -> Any:
        laid_out = (
            kwargs.get("attention_mask") is None
            and kwargs.get("batch_size") == 1
            and kwargs.get("allow_is_causal_skip") is False  # several conversations by positions
        )
        return None if laid_out else usual(*args, **kwargs)

    return mask


def _attention(before: str) -> Any:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if cu_seq_lens_q is None or attention_mask is not None or kwargs.get("s_aux") is not None:
            if before == "eager":
                usual = sys.modules[type(module).__module__].eager_attention_forward
            else:
                usual = ALL_ATTENTION_FUNCTIONS[before]
            found: tuple[torch.Tensor, Any] = usual(
                module, query, key, value, attention_mask, **kwargs
            )
            return found
        q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
        out = attend(
            q, k, v, cu_seq_lens_q, max_length_q,
            scale=kwargs.get("scaling"), window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"), dropout=kwargs.get("dropout") or 0.0,
        )  # fmt: skip
        return out[None], None

    return attention


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    *, scale: float | None, window: int | None = None, softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Causal attention within each of the conversations that begin at `bounds`.

    query is (tokens, heads, width); key and value may have fewer heads, each for as many of the
    query's; `bounds` is int32 (conversations + 1,), from 0 to tokens; with a `window` a token sees
    so many, itself included. Returns (tokens, heads, width of a value).
    """
    if softcap and not dropout:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: torch.Tensor = SoftCapped.apply(  # type: ignore[no-untyped-call]
            query, key, value, bounds, scale, window, softcap
        )
        return out
    if not dropout and flash_takes(query, value) and no_varlen_kernel() is None:
        return flash(query, key, value, bounds, longest, scale=scale, window=window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ends = bounds.tolist()
    parts = []
    for start, end in pairwise(ends):
        q, k, v = (rows[start:end].transpose(0, 1) for rows in (query, key, value))
        parts.append(_one(q, k, v, scale, window, softcap, dropout).transpose(0, 1))
    return torch.cat(parts)


def flash_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether flash kernels take such heads, where there are any."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1] <= FLASH_HEAD
        and width % 8 == 0
    )


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    *, scale: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """`attend` by the kernel behind `torch.nn.attention.varlen.varlen_attn`.

    The kernel takes fewer heads of keys than of queries as they are. That function of torch 2.11
    wants them repeated, which costs memory and time, and goes through Python's operators twice a
    layer, which small steps wait for. Here autograd's own formula is what goes back.
    """
    back = -1 if window is None else window - 1
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, back < 0, False,
        scale=scale, window_size_left=back, window_size_right=0,
    )[0]  # fmt: skip
    return out


def _one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None,
    window: int | None, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """The same for one conversation: (heads, tokens, width)."""
    size = query.shape[1]
    window = window if window is not None and size > window else None
    if not softcap and window is None:
        return scaled_dot_product_attention(
            query[None], key[None], value[None], dropout_p=dropout, is_causal=True, scale=scale
        )[0]
    ago = torch.arange(size, device=query.device)
    ago = ago[:, None] - ago[None, :]
    seen = ago >= 0
    if window is not None:
        seen &= ago < window
    if not softcap:
        return scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=seen, dropout_p=dropout, scale=scale
        )[0]
    # Gemma 2 (Gemma Team 2024, section 2): scores are squeezed into (-softcap, softcap).
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh(query @ key.transpose(1, 2) * (scale / softcap))
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ value
