"""Many small steps at a time, on a few threads, with bounded memory and one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import Queue
from threading import Thread

Step = Callable[[], None]


def run_steps(steps: Iterable[Step], threads: int) -> None:
    """Do all steps; the first that fails ends it, with those that have begun finished.

    `steps` is drawn from as threads get free, so that a million of them cost no memory.
    """
    waiting: Queue[Step | None] = Queue(threads)
    failed: list[BaseException] = []

    def work() -> None:
        while (step := waiting.get()) is not None:
            if failed:
                continue
            try:
                step()
            except BaseException as error:
                failed.append(error)

    # Daemons: who is told to stop leaves them behind, in the middle of whatever they wait for.
    workers = [Thread(target=work, name=f"transfer-{n}", daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        for step in steps:
            if failed:
                break
            waiting.put(step)
    except Exception as error:
        failed.append(error)
    except BaseException as stopped:
        failed.append(stopped)
        raise
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
