"""Many small steps at a time, on a few threads, with bounded memory and one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

Step = Callable[[], None]


def run_steps(steps: Iterable[Step], threads: int) -> None:
    """Do all steps; the first that fails ends it, with those that have begun finished.

    `steps` is drawn from as threads get free, so that a million of them cost no memory.
    """
    source = iter(steps)
    pool = ThreadPoolExecutor(threads, "transfer")
    running: set[Future[None]] = set()
    try:
        while True:
            running |= {pool.submit(step) for step in islice(source, 2 * threads - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)
