"""LoRA taken together gives what peft's own layers give: outputs and every gradient."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from jobs.train.fused_lora import (
    GatedMlp,
    Group,
    Halves,
    Kernels,
    Linears,
    fuse_with,
    is_plain,
)

RANK, INPUTS, OUTPUTS = 4, 24, {"q": 32, "k": 16, "v": 8}


class Attention(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        for name, size in OUTPUTS.items():
            setattr(self, name, torch.nn.Linear(INPUTS, size, bias=bias))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in OUTPUTS)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(INPUTS, 40, bias=False)
        self.up = torch.nn.Linear(INPUTS, 40, bias=False)
        self.down = torch.nn.Linear(40, INPUTS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return found


def tuned(module: torch.nn.Module, **options: Any) -> Any:
    """With LoRA that is not zero, of a rank and a scale of its own for each module, in float64."""
    names = [name for name, each in module.named_modules() if isinstance(each, torch.nn.Linear)]
    config = LoraConfig(
        r=RANK, lora_alpha=6, target_modules=names, rank_pattern={names[-1]: RANK + 2}, **options
    )
    model = get_peft_model(module, config).double()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model.base_model.model


def as_it_is(weight: torch.Tensor, state: Any) -> torch.Tensor:
    assert state is None
    return weight


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def seen(module: Any, x: torch.Tensor, forward: Any) -> tuple[list[torch.Tensor], Any]:
    """What comes out, and all gradients of a sum in which each number has another weight."""
    module.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    outputs = forward(leaf * 1)  # not the leaf itself: it may be written over
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(5)
    loss: Any = torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum()
    loss.backward()
    assert leaf.grad is not None
    return [y.detach() for y in outputs], {"x": leaf.grad, **gradients(module)}


def assert_same(found: Any, expected: Any) -> None:
    for y, wanted in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(y, wanted)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        torch.testing.assert_close(found[1][name], wanted, msg=name)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_modules_on_one_input(bias: bool, inplace: bool, together: bool) -> None:
    module = tuned(Attention(bias))
    group, function = Group([module.q, module.k, module.v]), cast(Any, Linears)
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    expected = seen(module, x, module)
    halves = Halves([group])

    def fused(leaf: torch.Tensor) -> Any:
        if together:
            halves.make()
            assert len(group.lora()) == 4
        found = function.apply(leaf, group, as_it_is, inplace, *group.lora())
        halves.drop()
        return found

    assert_same(seen(module, x, fused), expected)
    assert group.lora() == group.parameters


def act_back(product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Any:
    """As unsloth's kernels: the product again, the gradients of up and of gate, each in place."""
    sigmoid = torch.sigmoid(gate)
    f = gate * sigmoid
    of_up, of_gate = product * f, product * up * sigmoid * (1 + gate * (1 - sigmoid))
    return product.copy_(f * up), gate.copy_(of_up), up.copy_(of_gate)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_gated_mlp(inplace: bool, together: bool) -> None:
    module = tuned(Mlp())
    first, second = Group([module.gate, module.up]), Group([module.down])
    function = cast(Any, GatedMlp)
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    expected = seen(module, x, module)
    halves = Halves([first, second])

    def fused(leaf: torch.Tensor) -> Any:
        if together:
            halves.make()
        lora = first.lora()
        return function.apply(
            leaf, (first, second), as_it_is, inplace, True, lambda e, g: silu(e) * g, act_back,
            len(lora), *lora, *second.lora(),
        )  # fmt: skip

    assert_same(seen(module, x, fused), expected)


def test_the_copies_are_of_another_type_and_go_back_to_the_matrices() -> None:
    module = tuned(Attention(False)).to(torch.bfloat16)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    group, function = Group([module.q, module.k, module.v]), cast(Any, Linears)
    x = torch.randn(3, INPUTS, dtype=torch.bfloat16)

    def each(leaf: torch.Tensor) -> Any:
        return function.apply(leaf, group, as_it_is, False, *group.lora())

    halves = Halves([group])

    def together(leaf: torch.Tensor) -> Any:
        halves.make()
        assert {part.dtype for part in group.lora()} == {torch.bfloat16}
        return each(leaf)

    expected = seen(module, x, each)
    found = seen(module, x, together)
    assert {g.dtype for n, g in found[1].items() if n != "x"} == {torch.float32}
    for name, wanted in expected[1].items():
        assert torch.equal(found[1][name], wanted), name


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}]
)
def test_what_is_more_than_lora_is_left_to_unsloth(options: dict[str, Any]) -> None:
    module = tuned(Attention(bias=True), **options)
    assert not is_plain(module.q)


def test_plain_lora_is_taken_and_merged_or_frozen_is_not() -> None:
    module = tuned(Attention(bias=True))
    assert is_plain(module.q) and is_plain(module.v)
    module.q.merge()
    assert not is_plain(module.q)
    module.k.base_layer.weight.requires_grad_()
    assert not is_plain(module.k)
    module.v.base_layer.weight = torch.nn.Parameter(
        torch.zeros(OUTPUTS["v"], INPUTS, dtype=torch.int8), requires_grad=False
    )
    assert not is_plain(module.v)
    assert not is_plain(torch.nn.Linear(2, 2))


# --- in the layers of a model, as unsloth's are made


def original_apply_qkv(self: Any, x: torch.Tensor) -> Any:
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def original_apply_o(self: Any, x: torch.Tensor) -> Any:
    return self.o_proj(x)


def apply_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
    return found


class Again:
    """Whether layers are gone through again; and how often the activation was made."""

    now, made = False, 0


def act(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    Again.made += 1
    return silu(gate) * up


KERNELS = Kernels(as_it_is, {apply_mlp: (act, act_back)}, lambda x: True, lambda: Again.now)


class SelfAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, f"{name}_proj", torch.nn.Linear(INPUTS, INPUTS, bias=name != "o"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = getattr(self, "apply_qkv", original_apply_qkv)(self, x)
        found: torch.Tensor = getattr(self, "apply_o", original_apply_o)(self, q * k + v)
        return found


class GatedLinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(INPUTS, 40, bias=False)
        self.up_proj = torch.nn.Linear(INPUTS, 40, bias=False)
        self.down_proj = torch.nn.Linear(40, INPUTS, bias=False)
        self.forward = MethodType(apply_mlp, self)


class Layers(torch.nn.Module):
    """One layer as Llama's; with `norm`, as Gemma-2's, which has a norm after its MLP."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(), GatedLinear()
        self.input_layernorm = torch.nn.RMSNorm(INPUTS)
        self.post_attention_layernorm = torch.nn.RMSNorm(INPUTS)
        if norm:
            self.post_feedforward_layernorm = torch.nn.RMSNorm(INPUTS)
        self.norm = norm
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gradient_checkpointing:
            return self.layer(x)
        return checkpoint(self.again, x, use_reentrant=True)  # type: ignore[no-any-return]

    def again(self, x: torch.Tensor) -> torch.Tensor:
        Again.now = torch.is_grad_enabled()  # not so the first time
        try:
            return self.layer(x)
        finally:
            Again.now = False

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y: torch.Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + (self.post_feedforward_layernorm(y) if self.norm else y)


class Whole(torch.nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.model = Layers(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(x)
        return found


def whole(norm: bool = False, **options: Any) -> Any:
    torch.manual_seed(1)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = get_peft_model(Whole(norm), LoraConfig(r=RANK, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float64)
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_gives_the_same_with_its_layers_fused(checkpointing: bool, norm: bool) -> None:
    model = whole(norm)
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    expected = seen(model, x, model)
    assert fuse_with(model, KERNELS) == 4
    model.get_base_model().model.gradient_checkpointing = checkpointing
    Again.made = 0
    assert_same(seen(model, x, model), expected)
    # Gone through again, an MLP that ends its layer stops before its last matrix.
    assert Again.made == (2 if checkpointing and norm else 1)


def test_matrices_are_cast_once_for_a_batch_and_not_where_layers_are_gone_through_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Halves] = []
    make = Halves.make

    def counted(halves: Halves) -> None:
        made.append(halves)
        make(halves)

    monkeypatch.setattr(Halves, "make", counted)
    model = whole().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert fuse_with(model, KERNELS) == 4
    attention = model.get_base_model().model.self_attn
    x = torch.randn(2, 5, INPUTS, dtype=torch.bfloat16)
    for _ in range(2):
        model(x).float().sum().backward()
    assert len(made) == 2
    assert attention.q_proj.lora_A["default"].weight.grad.dtype == torch.float32
    model.get_base_model().model.gradient_checkpointing = True
    model(x.requires_grad_()).float().sum().backward()
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert len(made) == 2


def test_what_does_not_train_goes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole()
    assert fuse_with(model, KERNELS) == 4
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    trained = model(x)
    for function in (Linears, GatedMlp):
        monkeypatch.setattr(function, "apply", None)
    torch.testing.assert_close(model.eval()(x), trained)
    with model.train().disable_adapter():
        assert not torch.allclose(model(x), trained)
    with pytest.raises(TypeError):
        model(x)


def test_layers_with_more_than_lora_are_left_as_they_are() -> None:
    assert fuse_with(whole(lora_dropout=0.1), KERNELS) == 0
    # An MLP whose activation is not known.
    assert fuse_with(whole(), Kernels(as_it_is, {}, lambda x: True, lambda: False)) == 2
