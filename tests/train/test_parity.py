"""unsloth trains what transformers trains: here with its CPU backend, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import parity
from tests.train.parity import ENGINES

WHY_NOT = parity.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
LIMIT = 600


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def found(work: Path) -> dict[str, Any]:
    return {engine: parity.trained(engine, work, "16bit", LIMIT) for engine in ENGINES}


def test_both_engines_have_the_same_losses(found: dict[str, Any]) -> None:
    parity.require_same_losses(found, "8x1", 1e-5, parity.STEPS)
    parity.require_same_losses(found, "packed", 1e-5, 3)
    for engine in ENGINES:
        parity.require_learning(found[engine], 0.8)


@pytest.mark.parametrize("engine", ENGINES)
def test_how_many_rows_go_through_at_a_time_changes_nothing(
    found: dict[str, Any], engine: str
) -> None:
    parity.require_same_whatever_the_plan(found[engine], 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_gets_our_batches(found: dict[str, Any], work: Path, engine: str) -> None:
    parity.require_what_was_made_arrives(found[engine], parity.items_of(work))


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_reads_the_others_adapter(
    found: dict[str, Any], work: Path, engine: str
) -> None:
    parity.require_readable(parity.read(engine, work, "16bit", LIMIT), 1e-4)
