"""Going through many tensors at once changes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW

from jobs.train import optimizer
from jobs.train.optimizer import AdamWTogether

# Of whole blocks; of none; small ones, whose states have 32 bits.
SHAPES = ((16, 512), (512, 16), (7, 1000), (64,), (32, 256), (3, 4096))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def parameters(device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    return [torch.nn.Parameter(each) for each in made]


def usual(params: list[torch.nn.Parameter]) -> AdamW:
    groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:]}]
    return AdamW(groups, lr=0.01, betas=(0.8, 0.95), optim_bits=8)


def gradients(step: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(shape, generator=generator) for shape in SHAPES)


def steps(
    made: AdamW, params: list[torch.nn.Parameter], numbers: range, left_out: int = -1
) -> None:
    for step in numbers:
        for index, (p, gradient) in enumerate(zip(params, gradients(step), strict=True)):
            p.grad = None if step == left_out and index == 1 else gradient.to(p.device)
        made.param_groups[0]["lr"] = 0.01 / (step + 1)  # as a schedule does
        before = [None if p.grad is None else p.grad.clone() for p in params]
        made.step()
        for p, kept in zip(params, before, strict=True):
            assert (p.grad is None) == (kept is None)
            assert p.grad is None or kept is None or torch.equal(p.grad, kept)


def states(made: AdamW) -> list[dict[str, Any]]:
    return [made.state[p] for group in made.param_groups for p in group["params"]]


def require_same(one: AdamW, other: AdamW) -> None:
    mine, theirs = states(one), states(other)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            same = torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name]
            assert same, name
    for one_group, other_group in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(one_group["params"], other_group["params"], strict=True):
            assert torch.equal(p, q)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what goes together, as it goes."""
    sizes: list[int] = []
    called = "optimizer_update_8bit_blockwise"
    update = getattr(optimizer, called)

    def counting(name: str, gradient: torch.Tensor, *rest: Any, **options: Any) -> None:
        sizes.append(gradient.numel())
        update(name, gradient, *rest, **options)

    monkeypatch.setattr(optimizer, called, counting)
    return sizes


@pytest.mark.parametrize("device", DEVICES)
def test_many_at_once_are_the_same_to_the_last_bit(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = parameters(device), parameters(device)
    together, alone = AdamWTogether.like(usual(mine)), usual(theirs)
    sizes = counted(monkeypatch)
    steps(together, mine, range(5))
    steps(alone, theirs, range(5))
    require_same(together, alone)
    # The first step makes the states; then each group goes at once, but for what has no whole blocks.
    assert sizes == [16 * 512 * 2, 32 * 256 + 3 * 4096] * 4


def test_a_tensor_without_a_gradient_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = parameters("cpu"), parameters("cpu")
    together, alone = AdamWTogether.like(usual(mine)), usual(theirs)
    sizes = counted(monkeypatch)
    steps(together, mine, range(6), left_out=3)
    steps(alone, theirs, range(6), left_out=3)
    require_same(together, alone)
    # From then on it is a step behind the others, and goes by itself.
    whole, half, second = 16 * 512 * 2, 16 * 512, 32 * 256 + 3 * 4096
    assert sizes == [whole, second] * 2 + [half, second] * 3


def test_no_more_than_fits_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "TOGETHER", 16 * 512)
    mine, theirs = parameters("cpu"), parameters("cpu")
    together, alone = AdamWTogether.like(usual(mine)), usual(theirs)
    sizes = counted(monkeypatch)
    steps(together, mine, range(3))
    steps(alone, theirs, range(3))
    require_same(together, alone)
    assert sizes == [16 * 512, 16 * 512, 32 * 256, 3 * 4096] * 2


def saved(made: AdamW) -> Any:
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("first", [usual, lambda params: AdamWTogether.like(usual(params))])
@pytest.mark.parametrize("then", [usual, lambda params: AdamWTogether.like(usual(params))])
def test_what_is_saved_by_either_goes_on_in_either(first: Any, then: Any) -> None:
    never, kept = parameters("cpu"), parameters("cpu")
    stopped, whole = first(kept), usual(never)
    steps(stopped, kept, range(3))
    again = then(kept)
    again.load_state_dict(saved(stopped))
    steps(again, kept, range(3, 6))
    steps(whole, never, range(6))
    require_same(again, whole)
