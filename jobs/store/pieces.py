"""Many small steps at a time, on a few threads, with bounded memory and one clear error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from queue import Full, Queue
from threading import Lock, Thread

Step = Callable[[], None]

FIRST = 1  # threads that a Pace begins with
LOOK = 0.5  # seconds for which a throughput is measured
WORTH = 1.2  # times the throughput that more threads have to bring to stay
REST = 5.0  # seconds after which more are tried again


class Pace:
    """How many threads are worth it, by the throughput.

    One connection fills a network that is near, and each further one only takes the processors from
    the others and from the hashing; over a long way each brings its own share. So there are more and
    more of them as long as the throughput grows with them, and fewer again where it did not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._count = 0
        self._since, self._before = clock(), 0
        self._grown_from: tuple[int, float] | None = None  # threads and throughput, when on trial
        self._rests_until = 0.0
        self.threads = FIRST

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._count += count

    def look(self, most: int) -> int:
        """How many threads there should be now, of at most so many."""
        now = self._clock()
        if now - self._since < LOOK:
            return min(most, self.threads)
        with self._lock:
            done = self._count
        rate = (done - self._before) / (now - self._since)
        self._since, self._before = now, done
        if self._grown_from:
            threads, before = self._grown_from
            self._grown_from = None
            if rate < WORTH * before:
                self.threads, self._rests_until = threads, now + REST
        if now >= self._rests_until and self.threads < most:
            self._grown_from = self.threads, rate
            self.threads = min(most, 2 * self.threads)
        return min(most, self.threads)


def run_steps(steps: Iterable[Step], threads: int, pace: Pace | None = None) -> None:
    """Do all steps; the first that fails ends it, with those that have begun finished.

    `steps` is drawn from as threads get free, so that a million of them cost no memory. With a
    `pace`, there are as many threads as it says, and never more than `threads`.
    """
    waiting: Queue[Step | None] = Queue(1 if pace else threads)
    failed: list[BaseException] = []
    workers: dict[int, Thread] = {}
    wanted = threads

    def work(number: int) -> None:
        while number < wanted:
            step = waiting.get()
            if step is None:
                waiting.put(None)  # for the next one, too
                return
            if failed:
                continue
            try:
                step()
            except BaseException as error:
                failed.append(error)

    def settle() -> None:
        """As many threads as are wanted now."""
        nonlocal wanted
        wanted = pace.look(threads) if pace else threads
        for number in range(wanted):
            if number not in workers or not workers[number].is_alive():
                # Daemons: who is told to stop leaves them behind, in the middle of whatever they
                # wait for.
                workers[number] = Thread(
                    target=work, args=[number], name=f"transfer-{number}", daemon=True
                )
                workers[number].start()

    def give(step: Step | None) -> None:
        while True:
            settle()
            try:
                return waiting.put(step, timeout=LOOK if pace else None)
            except Full:
                pass

    try:
        settle()
        for step in steps:
            if failed:
                break
            give(step)
    except Exception as error:
        failed.append(error)
    except BaseException as stopped:
        failed.append(stopped)
        raise
    give(None)
    for worker in workers.values():
        worker.join()
    if failed:
        raise failed[0]
