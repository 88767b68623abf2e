"""Every way a run can end badly, and the exit code that says so.

    LorajobError                1   a bug, unless a subclass says otherwise
    ├── SpecError               2   the spec is wrong
    ├── DataError               3   the data is wrong
    ├── AccessError             4   access is refused, or something named does not exist
    ├── DoesNotFitError         5   GPU memory or disk
    ├── VerificationError       6   the result is not what it must be
    ├── ServiceError           10   a network or a service failed for longer than the retries
    └── Preempted              20   stopped from outside, and what was reached is safe

An error is one message for a person: what is wrong (naming the field, file or row), and a hint
that says what to do. Nothing else in the package calls `sys.exit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LorajobError(Exception):
    """Base of all errors that lorajob raises on purpose.

    `message` says what is wrong and where; `hint` says what to do about it.
    """

    exit_code = 1
    title = "internal error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class SpecError(LorajobError):
    exit_code = 2
    title = "the spec is wrong"


class DataError(LorajobError):
    exit_code = 3
    title = "the data is wrong"


class AccessError(LorajobError):
    exit_code = 4
    title = "not there, or not allowed"


class DoesNotFitError(LorajobError):
    exit_code = 5
    title = "it does not fit"


class VerificationError(LorajobError):
    exit_code = 6
    title = "the result failed its verification"


class ServiceError(LorajobError):
    exit_code = 10
    title = "a service failed"


class Preempted(LorajobError):
    exit_code = 20
    title = "stopped from outside"


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Errors from within name this field of the spec."""
    try:
        yield
    except LorajobError as error:
        if not error.message.startswith(name):
            error.message = f"{name}: {error.message}"
        raise


def bullet_list(lines: Iterable[str], limit: int = 20) -> str:
    """The lines indented one below another; what is over `limit` is counted, not shown."""
    lines = list(lines)
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
