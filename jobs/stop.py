"""Being stopped from outside: SIGTERM, SIGINT, or a reason found by a thread.

The first signal raises `Stop` in the main thread, wherever it is: importing, downloading, waiting
for other processes. Only where an interruption would leave something half-done, such as a step of
training, it is deferred, and `check` raises it at the next place where everything is consistent.
Nothing is saved from a handler; who catches `Stop` saves.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.errors import LorajobError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(BaseException):
    """Stopped from outside. Not an Exception, so that nothing takes it for a failure to retry."""


class _State:
    installed = False
    signal: int | None = None
    since: float = 0.0
    reason: LorajobError | None = None
    deferred = 0
    raised = False


_state = _State()


def install(grace: Callable[[], float], too_late: Callable[[], None]) -> None:
    """From now on SIGTERM and SIGINT raise `Stop`.

    `grace` says how many seconds there are from then on; shortly before they are over `too_late` is
    called, from a thread, to end the process with what is safe. A second SIGINT ends it at once.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if _state.signal is not None:
            if number == signal.SIGINT:
                os._exit(130)
            return
        _state.signal, _state.since = number, time.monotonic()
        threading.Thread(target=_wait, args=(grace, too_late), daemon=True).start()
        if not _state.deferred:
            _raise()

    _state.installed = True
    for number in SIGNALS:
        # A shell starts what is in the background with SIGINT ignored: that stays so. SIGTERM is
        # never ignored: who sends it will kill next.
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _wait(grace: Callable[[], float], too_late: Callable[[], None]) -> None:
    limit = grace()
    time.sleep(max(0.5, limit - max(2.0, 0.1 * limit) - (time.monotonic() - _state.since)))
    too_late()


def _raise() -> None:
    _state.raised = True
    raise Stop


def over() -> None:
    """How it ends is settled: a signal changes nothing any more, also while Python itself ends."""
    if _state.installed:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def asked() -> bool:
    """Whether the process has been told to stop."""
    return _state.signal is not None


def signal_number() -> int:
    return _state.signal or signal.SIGTERM


def reason() -> LorajobError | None:
    """Why, where it was no signal from outside but `because`."""
    return _state.reason


def seconds_left(grace: float) -> float:
    """Of the grace period; all of it while nobody has asked."""
    return grace - (time.monotonic() - _state.since) if asked() else grace


def because(error: LorajobError) -> None:
    """Stop the run for this reason. May be called from any thread."""
    _state.reason = error
    os.kill(os.getpid(), signal.SIGTERM)


def check() -> None:
    """Raise `Stop` if it is due and has not been raised, or was swallowed by a library."""
    if asked() and threading.current_thread() is threading.main_thread():
        _raise()


@contextmanager
def recognized() -> Iterator[None]:
    """Within, what a library made of `Stop` is `Stop` again.

    It may come in the middle of a library's code, and pydantic, for one, makes a SchemaError of whatever
    comes while it builds a model.
    """
    try:
        yield
    except LorajobError:
        raise
    except Exception as error:
        if _state.raised:
            raise Stop from error
        raise


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal only makes `asked` true; it is raised at the end, or by `check`."""
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
    if asked() and not _state.raised and not _state.deferred:
        _raise()
