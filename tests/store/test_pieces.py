"""Steps on a few threads: each once, the first error ends them, and no more threads than are worth it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from jobs.store import pieces
from jobs.store.pieces import Pace, run_steps


def settled(speed: Callable[[int], float], seconds: float = 60, most: int = 10) -> list[int]:
    """The threads that a pace asks for, every tenth of a second, where so many have that speed."""
    now, threads, asked = [0.0], 0, []
    pace = Pace(lambda: now[0])
    while now[0] < seconds:
        threads = pace.look(most)
        asked.append(threads)
        now[0] += 0.1
        pace.add(int(speed(threads) * 0.1))
    return asked


def test_far_away_every_connection_helps() -> None:
    asked = settled(lambda threads: threads * 50e6)
    assert asked[0] == pieces.FIRST
    assert set(asked[25:]) == {10}  # within two and a half seconds


def test_nearby_few_are_enough_and_more_are_tried_only_now_and_then() -> None:
    asked = settled(lambda threads: 1e9 / threads**0.3)
    assert max(asked) == 2 * pieces.FIRST
    assert sum(threads > pieces.FIRST for threads in asked) < 0.15 * len(asked)


def test_what_a_network_is_full_with_is_what_stays() -> None:
    asked = settled(lambda threads: min(threads, 4) * 50e6)
    assert sum(threads == 4 for threads in asked[20:]) > 0.85 * len(asked[20:])


def test_never_more_than_allowed() -> None:
    assert set(settled(lambda threads: threads * 50e6, most=1)) == {1}


@pytest.mark.parametrize("paced", [False, True])
def test_each_step_is_done_once_while_threads_come_and_go(
    monkeypatch: pytest.MonkeyPatch, paced: bool
) -> None:
    monkeypatch.setattr(pieces, "LOOK", 0.01)
    monkeypatch.setattr(pieces, "REST", 0.02)
    done: list[int] = []
    at_once, most = [0], [0]
    lock = threading.Lock()
    pace = Pace() if paced else None

    def step(number: int) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.001)
        with lock:
            at_once[0] -= 1
            done.append(number)
        if pace and number < 300:  # worth it at first, and not any more later
            pace.add(1000)

    run_steps((lambda n=n: step(n) for n in range(600)), 6, pace)  # type: ignore[misc]
    assert sorted(done) == list(range(600))
    assert 2 <= most[0] <= 6
    assert not [t for t in threading.enumerate() if t.name.startswith("transfer-")]


@pytest.mark.parametrize("paced", [False, True])
def test_the_first_that_fails_ends_it(paced: bool) -> None:
    done: list[int] = []

    def step(number: int) -> None:
        if number == 5:
            raise ValueError("planted")
        done.append(number)

    with pytest.raises(ValueError, match="planted"):
        run_steps((lambda n=n: step(n) for n in range(10**6)), 3, Pace() if paced else None)  # type: ignore[misc]
    assert len(done) < 1000


def test_no_steps_at_all() -> None:
    run_steps([], 3)
    run_steps([], 3, Pace())
