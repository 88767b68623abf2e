"""What the events leave: the state that the live view and the metrics show."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.observe.snapshot import Snapshot


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def snapshot(clock: Clock) -> Snapshot:
    return Snapshot(clock)


def step(number: int, of: int = 100) -> dict[str, Any]:
    return {"step": number, "of": of, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0,
            "tokens_per_second": 500.0}  # fmt: skip


def test_the_time_left_goes_by_the_steps_of_this_start_alone(
    snapshot: Snapshot, clock: Clock
) -> None:
    snapshot.hear("stage_start", {"stage": "train"})
    clock.now += 300  # loading the model
    snapshot.hear("train_step", step(61))  # the first one after a resume at 60
    assert snapshot.seconds_left is None
    for number in range(62, 71):
        clock.now += 4
        snapshot.hear("train_step", step(number))
    assert snapshot.seconds_left == pytest.approx(30 * 4)
    clock.now += 3
    assert snapshot.seconds_left == pytest.approx(30 * 4 - 3)


def test_a_checkpoints_age_counts_from_the_trainings_begin_and_only_while_training(
    snapshot: Snapshot, clock: Clock
) -> None:
    assert snapshot.checkpoint_age is None
    snapshot.hear("stage_start", {"stage": "train"})
    clock.now += 50
    assert snapshot.checkpoint_age == 50
    snapshot.hear("checkpoint", {"step": 5})
    clock.now += 7
    assert snapshot.checkpoint_age == 7
    snapshot.hear("stage_done", {"stage": "train"})
    assert snapshot.checkpoint_age is None
    snapshot.hear("checkpoint", {"step": 5})
    assert snapshot.checkpoint_age is None


def test_bytes_are_counted_by_the_way_they_went(snapshot: Snapshot) -> None:
    snapshot.tick(10, 100, 10, "fetched")
    snapshot.tick(40, 100, 30, "fetched")
    assert (snapshot.moved, snapshot.stage) == ({"sent": 0, "fetched": 40}, "preflight")
    snapshot.tick(5, 5, 5, "sent")
    snapshot.tick(3, 9, 3, "")
    assert (snapshot.moved, snapshot.stage) == ({"sent": 5, "fetched": 40}, "publish")
    assert snapshot.progress == pytest.approx(1 / 3)


def test_idle_is_the_time_since_anything_happened(snapshot: Snapshot, clock: Clock) -> None:
    clock.now += 20
    assert snapshot.idle == 20
    snapshot.tick(1, None, 1, "")
    assert (snapshot.idle, snapshot.progress) == (0, None)


@pytest.mark.parametrize(
    ("event", "fields", "code"),
    [("run_done", {}, 0), ("run_failed", {"code": 6}, 6), ("run_stopped", {"code": 20}, 20)],
)
def test_the_end_has_a_code(
    snapshot: Snapshot, event: str, fields: dict[str, Any], code: int
) -> None:
    snapshot.hear(event, fields)
    assert (snapshot.exit_code, snapshot.stage) == (code, "ended")
