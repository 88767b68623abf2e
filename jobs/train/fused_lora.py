"""LoRA's small matrices taken together, in the layers of the `unsloth` engine.

A layer of seven linear modules has fourteen small matrices, and unsloth takes each by itself: cast to
16 bit on the way there and on the way back, its gradient cast to 32, its input read once more. With
few tokens at a time a GPU waits for the processor to start these hundreds of small products; with
many it reads the same activations again and again. Here modules that share an input go through
together, all matrices are cast at once, and what was multiplied with A is kept instead of made again.
The numbers are the same, but for the order in which they are summed up.

Where activations are made again, what a layer ends with is left out: the product of the MLP's last
matrix, a quarter of a layer's operations, is asked for by nobody then but the layer after it, which
has had it.

With A (rank, inputs), B (outputs, rank), a frozen W (outputs, inputs) and the scale s, a module gives
y = x Wᵀ + s (x Aᵀ) Bᵀ (Hu et al. 2021, section 4.1); the gradients are those of this product.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

Tensors = tuple[torch.Tensor, ...]
Unpack = Callable[[torch.Tensor, Any], torch.Tensor]
"""A frozen matrix in 16 bit, from how it is held and its quantization state."""


class Group:
    """Linear modules with LoRA that share their input."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self.modules = tuple(modules)
        self.bases = tuple(module.base_layer for module in self.modules)
        (adapter,) = self.modules[0].active_adapters
        self.down = tuple(module.lora_A[adapter].weight for module in self.modules)
        self.up = tuple(module.lora_B[adapter].weight for module in self.modules)
        self.scales = tuple(float(module.scaling[adapter]) for module in self.modules)
        weight, state, _ = self.frozen()[0]
        self.dtype: torch.dtype = weight.dtype if state is None else state.dtype
        self.halves: Tensors | None = None
        """All A as one matrix and each B, in 16 bit: while a batch goes through (see `Halves`)."""

    @property
    def parameters(self) -> Tensors:
        return self.down + self.up

    def lora(self) -> Tensors:
        """What the functions below take: A as one or each, then each B."""
        return self.halves or self.parameters

    def frozen(self) -> list[tuple[torch.Tensor, Any, torch.Tensor | None]]:
        return [
            (base.weight, getattr(base.weight, "quant_state", None), base.bias)
            for base in self.bases
        ]


def is_plain(module: Any) -> bool:
    """Whether a module is a frozen matrix with one LoRA and nothing else: no dropout, no DoRA, no
    trained bias, and 4 or 16 bit."""
    if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1:
        return False
    (adapter,) = module.active_adapters
    base: Any = module.base_layer
    weight = getattr(base, "weight", None)
    if adapter not in module.lora_A or not isinstance(weight, torch.Tensor):
        return False
    four_bit = getattr(weight, "quant_state", None) is not None and weight.dtype == torch.uint8
    return (
        (four_bit or (weight.is_floating_point() and weight.itemsize >= 2))
        and not weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and isinstance(module.lora_dropout[adapter], torch.nn.Identity)
        and module.lora_B[adapter].bias is None
        and adapter not in module.lora_variant
        and not module.merged
    )


def _project(flat: torch.Tensor, group: Group, lora: Tensors, unpack: Unpack) -> tuple[list[torch.Tensor], torch.Tensor]:  # fmt: skip
    """Each module's y, and x Aᵀ of all: (tokens, outputs) each and (tokens, ranks)."""
    down, up = _taken(lora, len(group.bases), flat.dtype)
    inner = flat @ down.t()
    outputs = []
    for (weight, state, bias), b, part, scale in zip(
        group.frozen(), up, _parts(inner, up), group.scales, strict=True
    ):
        matrix = unpack(weight, state).t()
        y = flat @ matrix if bias is None else torch.addmm(bias.to(flat.dtype), flat, matrix)
        outputs.append(y.addmm_(part, b.t(), alpha=scale))
    return outputs, inner


def _project_back(
    gradients: list[torch.Tensor], flat: torch.Tensor, inner: torch.Tensor, group: Group,
    lora: Tensors, unpack: Unpack, inplace: bool,
) -> tuple[torch.Tensor, Tensors]:  # fmt: skip
    """The gradients of x and of `lora`. `inplace` writes the first over `flat`."""
    down, up = _taken(lora, len(group.bases), flat.dtype)
    back = _back_through_up(gradients, up, group)
    of_up = _of_up(gradients, inner, up, group)
    of_down = back.t() @ flat  # before anything is written over `flat`
    x = _back_to_input(gradients, back, down, group, unpack, flat if inplace else None)
    downs: Tensors = (of_down,)
    if len(lora) > 1 + len(up):
        downs = torch.split_with_sizes(of_down, [b.shape[1] for b in up])
    return x, (*downs, *of_up)


def _back_through_up(gradients: list[torch.Tensor], up: Tensors, group: Group) -> torch.Tensor:
    """The gradient of x Aᵀ, of all together."""
    back = gradients[0].new_empty(gradients[0].shape[0], sum(b.shape[1] for b in up))
    for y, b, part, scale in zip(gradients, up, _parts(back, up), group.scales, strict=True):
        part.addmm_(y, b, beta=0, alpha=scale)
    return back


def _of_up(
    gradients: list[torch.Tensor], inner: torch.Tensor, up: Tensors, group: Group
) -> list[torch.Tensor]:
    """The gradient of each B, from x Aᵀ."""
    return [
        torch.empty_like(b).addmm_(y.t(), part, beta=0, alpha=scale)
        for y, b, part, scale in zip(gradients, up, _parts(inner, up), group.scales, strict=True)
    ]


def _back_to_input(
    gradients: list[torch.Tensor], back: torch.Tensor, down: torch.Tensor, group: Group,
    unpack: Unpack, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The gradient of x, from those of each y and of x Aᵀ; written to `out`, if given."""
    x: torch.Tensor | None = None
    for y, (weight, state, _) in zip(gradients, group.frozen(), strict=True):
        matrix = unpack(weight, state)
        x = torch.mm(y, matrix, out=out) if x is None else x.addmm_(y, matrix)
    assert x is not None
    return x.addmm_(back, down)


def _taken(lora: Tensors, modules: int, dtype: torch.dtype) -> tuple[torch.Tensor, Tensors]:
    """All A as one matrix, and each B, in that type."""
    down, up = lora[:-modules], lora[-modules:]
    whole = down[0] if len(down) == 1 else torch.cat(down)
    return whole.to(dtype), tuple(b.to(dtype) for b in up)


def _parts(inner: torch.Tensor, up: Tensors) -> Tensors:
    """The columns of each module's rank."""
    return torch.split_with_sizes(inner, [b.shape[1] for b in up], 1)


class Linears(torch.autograd.Function):
    """Modules with LoRA on one input: x (..., inputs) to each (..., outputs)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, unpack: Unpack, inplace: bool, *lora: torch.Tensor
    ) -> Any:
        outputs, inner = _project(x.reshape(-1, x.shape[-1]), group, lora, unpack)
        ctx.save_for_backward(x, inner, *lora)
        ctx.told = group, unpack, inplace
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, inner, *lora = ctx.saved_tensors
        group, unpack, inplace = ctx.told
        flat = x.reshape(-1, x.shape[-1])
        rows = [y.reshape(-1, y.shape[-1]) for y in gradients]
        dx, of_lora = _project_back(rows, flat, inner, group, tuple(lora), unpack, inplace)
        return dx.view(x.shape), None, None, None, *of_lora


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)), of which only what gate and up gave is kept.

    `act` gives the product from both; `act_back` takes the product's gradient and both, and gives the
    product again and the gradients of up and of gate, in their places. Where what comes out is not
    `needed`, zeros do.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, groups: tuple[Group, Group], unpack: Unpack, inplace: bool,
        needed: bool, act: Any, act_back: Any, count: int, *lora: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        (gate, up), inner = _project(x.reshape(-1, x.shape[-1]), groups[0], lora[:count], unpack)
        inner_down: torch.Tensor | None = None
        if needed:
            shape = (*x.shape[:-1], gate.shape[-1])
            product = act(gate.view(shape), up.view(shape)).view(gate.shape)
            (y,), inner_down = _project(product, groups[1], lora[count:], unpack)
            y = y.view(*x.shape[:-1], y.shape[-1])
        else:
            y = x.new_zeros(()).expand(*x.shape[:-1], lora[-1].shape[0])
        ctx.save_for_backward(x, inner, inner_down, gate, up, *lora)
        ctx.told = groups, unpack, inplace, act_back, count
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, inner, inner_down, gate, up, *lora = ctx.saved_tensors
        (first, second), unpack, inplace, act_back, count = ctx.told
        y = gradient.reshape(-1, gradient.shape[-1])
        # The product is made again only after its gradient is known, and A's gradient needs it.
        down, up_b = _taken(tuple(lora[count:]), 1, y.dtype)
        back = _back_through_up([y], up_b, second)
        of_product = _back_to_input([y], back, down, second, unpack)
        product, of_up, of_gate = act_back(of_product, gate, up)
        if inner_down is None:
            inner_down = product @ down.t()
        of_a, of_b = back.t() @ product, _of_up([y], inner_down, up_b, second)
        del product, of_product
        flat = x.reshape(-1, x.shape[-1])
        dx, of_first = _project_back(
            [of_gate, of_up], flat, inner, first, tuple(lora[:count]), unpack, inplace
        )
        return dx.view(x.shape), *[None] * 7, *of_first, of_a, *of_b


class Halves:
    """All LoRA matrices in 16 bit, made with one copy before a batch and gone after it."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.parameters = [p for group in groups for p in group.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.shapes: list[tuple[int, ...]] = []  # of the copies: all A of a group, and each B
        for group in groups:
            ranks = sum(a.shape[0] for a in group.down)
            self.shapes += [(ranks, group.down[0].shape[1]), *(tuple(b.shape) for b in group.up)]

    def make(self) -> None:
        made = iter(_InHalf.apply(self, *self.parameters))  # type: ignore[no-untyped-call]
        for group in self.groups:
            group.halves = tuple(next(made) for _ in range(1 + len(group.up)))

    def drop(self) -> None:
        for group in self.groups:
            group.halves = None


class _InHalf(torch.autograd.Function):
    """All matrices in 32 bit to, for each group, all A as one and each B in 16."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, *parameters: torch.Tensor) -> Tensors:
        ctx.halves = halves
        whole = parameters[0].new_empty(sum(halves.sizes), dtype=halves.groups[0].dtype)
        torch._foreach_copy_(
            torch.split_with_sizes(whole, halves.sizes), [p.reshape(-1) for p in parameters]
        )
        copies = torch.split_with_sizes(whole, [math.prod(shape) for shape in halves.shapes])
        return tuple(part.view(shape) for part, shape in zip(copies, halves.shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        groups = ctx.halves.groups
        each: list[torch.Tensor] = []
        given = iter(gradients)
        for group in groups:
            each += torch.split_with_sizes(next(given), [a.shape[0] for a in group.down])
            each += (next(given) for _ in group.up)
        sizes = ctx.halves.sizes
        whole = each[0].new_empty(sum(sizes), dtype=groups[0].down[0].dtype)
        full = torch.split_with_sizes(whole, sizes)
        shaped = [part.view(g.shape) for part, g in zip(full, each, strict=True)]
        torch._foreach_copy_(shaped, each)
        return (None, *shaped)


@dataclass(frozen=True)
class Kernels:
    """What is unsloth's in all this."""

    unpack: Unpack
    activations: dict[Any, tuple[Any, Any]]
    """By its function for a whole MLP: the activation there and back (see `GatedMlp`)."""
    may_overwrite: Callable[[torch.Tensor], bool]
    """Whether nobody needs a layer's input any more once its gradient is known."""
    made_again: Callable[[], bool]
    """Whether a layer is gone through once more for its gradients, and what it gives is not looked at."""


def fuse(model: Any) -> int:
    """Take LoRA together in all layers of a model that unsloth has loaded, where they are plain
    enough; returns in how many groups. In training only: what does not train goes as before."""
    if not torch.cuda.is_available():
        return 0  # where unsloth has none of its own functions either
    from unsloth.kernels import fast_lora as own
    from unsloth_zoo.gradient_checkpointing import in_gradient_checkpoint_recompute

    def unpack(weight: torch.Tensor, state: Any) -> torch.Tensor:
        found: torch.Tensor = (
            weight if state is None else own.fast_dequantize(weight, state, use_global_buffer=True)
        )
        return found

    activations = {
        own.apply_lora_mlp_swiglu: (own.swiglu_fg_kernel, own.swiglu_DWf_DW_dfg_kernel),
        own.apply_lora_mlp_geglu_exact: (
            own.geglu_exact_forward_kernel, own.geglu_exact_backward_kernel,
        ),
        own.apply_lora_mlp_geglu_approx: (
            own.geglu_approx_forward_kernel, own.geglu_approx_backward_kernel,
        ),
    }  # fmt: skip
    return fuse_with(
        model,
        Kernels(unpack, activations, own._may_overwrite_input, in_gradient_checkpoint_recompute),
    )


def fuse_with(model: Any, kernels: Kernels) -> int:
    groups: list[Group] = []
    last = {id(layer.mlp) for layer in model.modules() if _ends_with_its_mlp(layer)}
    for module in list(model.modules()):
        if hasattr(module, "q_proj") and hasattr(module, "o_proj"):
            projections = (module.q_proj, module.k_proj, module.v_proj)
            groups += _fuse_attention(module, "apply_qkv", projections, kernels)
            groups += _fuse_attention(module, "apply_o", (module.o_proj,), kernels)
        elif hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            groups += _fuse_mlp(module, kernels, id(module) in last)
    if groups:
        _cast_together(model, Halves(groups))
    return len(groups)


def _ends_with_its_mlp(layer: Any) -> bool:
    """Whether what a layer's MLP gives is added to what it got and nothing else, as in Llama; Gemma-2
    has one more norm there, whose gradient needs it."""
    names = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    return {name for name, _ in layer.named_children()} == names


def _fuse_attention(
    attention: Any, name: str, modules: tuple[Any, ...], kernels: Kernels
) -> list[Group]:
    """unsloth's attention looks for a function of this name, and else takes the plain one of its own
    module: so it does where modules have a bias."""
    own = sys.modules.get(type(attention).forward.__module__)
    plain = getattr(own, f"original_{name}", None)
    if plain is None or not all(is_plain(module) for module in modules):
        return []
    before = getattr(attention, name, plain)
    group = Group(modules)

    @functools.wraps(before)
    def applied(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _takes(self, group, x):
            return before(self, x, *args, **kwargs)
        inplace = len(modules) > 1 and kernels.may_overwrite(x)
        function: Any = Linears
        found = function.apply(x, group, kernels.unpack, inplace, *group.lora())
        return found if len(modules) > 1 else found[0]

    setattr(attention, name, applied)
    return [group]


def _fuse_mlp(mlp: Any, kernels: Kernels, last: bool) -> list[Group]:
    """`last`: what it gives is what its layer gives, but for a sum."""
    before = mlp.forward
    function: Any = getattr(before, "__func__", None)
    options: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        function, options = function.func, function.keywords
    known = kernels.activations.get(function)
    modules = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if known is None or not all(is_plain(module) for module in modules):
        return []
    first, second = Group(modules[:2]), Group(modules[2:])

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _takes(mlp, first, x):
            return before(x, *args, **kwargs)
        inplace = options.get("inplace", True) and kernels.may_overwrite(x)
        needed = not (last and kernels.made_again())
        lora = first.lora()
        gated: Any = GatedMlp
        return gated.apply(
            x, (first, second), kernels.unpack, inplace, needed, *known, len(lora), *lora,
            *second.lora(),
        )  # fmt: skip

    mlp.forward = forward
    return [first, second]


def _takes(owner: Any, group: Group, x: torch.Tensor) -> bool:
    module, kind = group.modules[0], x.device.type
    return (
        owner.training
        and not module.disable_adapters
        and not module.merged
        and x.dtype == group.dtype
        # Within autocast to another type the products would be of that, and what they are added to not.
        and not (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype)
        and not torch.compiler.is_compiling()  # unsloth's own functions are made for that
    )


def _cast_together(model: Any, halves: Halves) -> None:
    """Around each batch in training; not where layers are gone through again in the backward pass,
    each of which would then go back to the same copy by itself."""
    inner = model.get_base_model().model

    def before(*_: Any) -> None:
        halves.drop()  # an interrupt may have left some
        if (
            model.training
            and torch.is_grad_enabled()
            and not getattr(inner, "gradient_checkpointing", False)
            and halves.parameters[0].dtype != halves.groups[0].dtype
        ):
            halves.make()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(lambda *_: halves.drop(), always_call=True)
