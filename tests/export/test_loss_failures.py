"""What an export may lose: half of what training gained, and what its few bits cost."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from jobs.export.verify import loss_failures, type_cost
from jobs.spec import GgufType


def failed(loss: float, gained: float, cost: float = 0.0) -> bool:
    losses = {"base": 3.0, "adapter": 3.0 - gained, "it": loss}
    return bool(loss_failures(losses, {"it": cost}))


def test_half_of_what_training_gained_has_to_be_kept() -> None:
    assert not failed(2.4, gained=1.0)
    assert failed(2.6, gained=1.0)


def test_a_short_training_that_gains_less_than_the_type_costs_is_no_fault_of_the_file() -> None:
    assert not failed(2.985, gained=0.05, cost=type_cost("q4_k_m"))
    assert failed(2.985, gained=0.05, cost=type_cost("f16"))
    assert not failed(3.2, gained=0.5, cost=type_cost("q2_k"))  # 0.7 worse than trained
    assert failed(3.7, gained=0.5, cost=type_cost("q2_k"))
    assert failed(3.2, gained=0.5, cost=type_cost("q4_k_m"))


def test_what_is_no_number_fails() -> None:
    assert failed(math.nan, gained=-1.0, cost=9.0)


@pytest.mark.parametrize("kind", get_args(GgufType))
def test_fewer_bits_may_cost_more(kind: str) -> None:
    bits = 0 if kind in ("f32", "f16", "bf16") else int(kind.lstrip("iq")[0])
    assert type_cost(kind) == {0: 0, 8: 0.02, 6: 0.05, 5: 0.1, 4: 0.2, 3: 0.5, 2: 1, 1: 2.5}[bits]


def test_merged_weights_in_16_bit_cost_nothing() -> None:
    assert (type_cost("16bit"), type_cost("4bit")) == (0.0, 0.2)
