"""The optimizers of the spec, made to launch as little as they can on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import optimizer_update_8bit_blockwise
from bitsandbytes.optim import AdamW

# The names of transformers: without a GPU the paged ones do not page.
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}

BLOCK = 256  # values that bitsandbytes quantizes together: `blocksize` in its `init_state`
TOGETHER = 2**26  # values at most in one launch: twice 256 MiB are copied for it, for a moment


def optimizer_of(wanted: str, device: str) -> str:
    """transformers' name of the optimizer.

    bitsandbytes waits for the GPU after each tensor, and LoRA has hundreds: tens of milliseconds a
    step. All of it is on one stream, so only what is paged has something to wait for.
    """
    if device == "cuda" and wanted == "adamw":
        return "adamw_torch_fused"
    if device == "cuda" and not wanted.startswith("paged"):
        bitsandbytes.optim.optimizer.sync_gpu = lambda tensor: None
    return OPTIMIZERS[wanted]


@dataclass
class Joined:
    """Some tensors of one group, and the states of all of them in one piece."""

    params: list[torch.Tensor]
    states: dict[str, torch.Tensor]


class AdamWTogether(AdamW):  # type: ignore[misc]
    """bitsandbytes' AdamW, which goes through many tensors with 8-bit states in one launch.

    LoRA has hundreds of small tensors, and launching a kernel for each takes longer than all of
    their sums. States are quantized in blocks of 256 values, so tensors of whole blocks, laid end to
    end, have the same blocks: the result is the same to the last bit. Any other tensor goes the
    usual way, and so does the first step, in which the library makes the states. What is saved and
    loaded has its form.
    """

    _joined: list[list[Joined]] | None = None
    """For each group, what goes together; None where that has to be found out."""

    @classmethod
    def like(cls, optimizer: AdamW) -> AdamWTogether:
        """One for the parameters of another, which has made no step, and with its settings."""
        return cls(optimizer.param_groups, args=optimizer.args, is_paged=optimizer.is_paged)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().load_state_dict(state_dict, *args, **kwargs)
        self._joined = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self._joined is None or any(p.grad is None for p in self._together()):
            self._joined = [
                [self._join(params) for params in self._alike(group["params"])]
                for group in self.param_groups
            ]
        for group, parts in zip(self.param_groups, self._joined, strict=True):
            for part in parts:
                self._update(group, part)
        # What has been updated has no gradient while the library goes through the others.
        done = [(p, p.grad) for p in self._together()]
        for p, _ in done:
            p.grad = None
        found = super().step(closure)
        for p, gradient in done:
            p.grad = gradient
        if not done:
            self._joined = None  # there were no states
        return found

    def _together(self) -> Iterator[torch.Tensor]:
        return (p for parts in self._joined or () for part in parts for p in part.params)

    def _alike(self, params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Tensors of whole blocks that have the same types and have made as many steps."""
        lists: dict[Any, list[torch.Tensor]] = {}
        for p in params:
            state = self.state[p]
            if p.grad is None or p.numel() % BLOCK or not p.is_contiguous() or not state:
                continue
            if state["state1"].dtype == torch.uint8:
                key = p.device, p.dtype, p.grad.dtype, int(state["step"])
                lists.setdefault(key, []).append(p)
        for alike in lists.values():
            part: list[torch.Tensor] = []
            for p in alike:
                if part and sum(each.numel() for each in part) + p.numel() > TOGETHER:
                    yield part
                    part = []
                part.append(p)
            yield part

    def _join(self, params: list[torch.Tensor]) -> Joined:
        """The states in one piece; each tensor's own are parts of it from now on."""
        states = {}
        for name in ("state1", "state2", "absmax1", "absmax2"):
            own = [self.state[p][name] for p in params]
            states[name] = torch.cat([each.reshape(-1) for each in own])
            pieces = torch.split(states[name], [each.numel() for each in own])
            for p, piece, each in zip(params, pieces, own, strict=True):
                self.state[p][name] = piece.view_as(each)
        return Joined(params, states)

    def _update(self, group: dict[str, Any], part: Joined) -> None:
        for p in part.params:
            self.state[p]["step"] += 1
        first = self.state[part.params[0]]
        weights = torch.cat([p.reshape(-1) for p in part.params])
        gradients = torch.cat([p.grad.reshape(-1) for p in part.params if p.grad is not None])
        optimizer_update_8bit_blockwise(
            self.optimizer_name, gradients, weights, part.states["state1"], part.states["state2"],
            *group["betas"], 0.0, 0.0, group["eps"], first["step"], group["lr"],
            first["qmap1"], first["qmap2"], part.states["absmax1"], part.states["absmax2"],
            group["weight_decay"],
        )  # fmt: skip
        pieces = torch.split(weights, [p.numel() for p in part.params])
        torch._foreach_copy_(
            part.params, [w.view_as(p) for w, p in zip(pieces, part.params, strict=True)]
        )
