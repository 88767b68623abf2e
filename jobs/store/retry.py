"""Trying again: what every call to a service goes through.

Each store says what an error means (`Judge`); waiting, counting and giving up are the same for all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from jobs.errors import LorajobError, ServiceError

T = TypeVar("T")

LONGEST_WAIT = 30.0  # seconds between two tries, where the service asks for no more
LONGEST_ASKED = 300.0  # a Retry-After beyond this is not waited for


@dataclass(frozen=True, slots=True)
class Again:
    """This may pass: try again, after as long as the service asked for."""

    why: str
    after: float | None = None  # seconds, from Retry-After


# What an error of a call means: Again, or the error that ends it; None for one it does not know.
Judge = Callable[[BaseException], "Again | LorajobError | None"]


@dataclass(slots=True)
class Retries:
    """How long to go on, and how often it was needed."""

    give_up_after: float = 600.0
    """Seconds for which one call may go on failing."""
    wait: float = 0.5
    """Seconds before the second try; doubled each time, up to LONGEST_WAIT."""
    tell: Callable[[str], None] = lambda text: None
    """Told of waits that a person would notice."""
    count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def call(self, what: str, do: Callable[[], T], judge: Judge) -> T:
        """`do()`, again and again where its error may pass. `what` is for messages."""
        failing: float | None = None  # since when; a call that works for an hour has not failed yet
        attempt = 0
        while True:
            try:
                return do()
            except LorajobError:
                raise
            except Exception as error:
                meaning = judge(error)
                if meaning is None:
                    raise
                if isinstance(meaning, LorajobError):
                    raise meaning from None
                again = meaning
            failing = failing or time.monotonic()
            spent = time.monotonic() - failing
            # Full jitter, so that many jobs that failed together do not come back together.
            most = min(LONGEST_WAIT, self.wait * 2**attempt)
            pause = random.uniform(most / 10, most)  # noqa: S311 - no secret hangs on it
            if again.after is not None:
                pause = max(pause, again.after)
            if spent + pause > self.give_up_after or pause > LONGEST_ASKED:
                raise ServiceError(
                    f"{what} failed {attempt + 1} times in {spent:.0f} s: {again.why}",
                    "start the same run again: it goes on with what is missing",
                )
            attempt += 1
            self.count += 1
            self.reasons[again.why] = self.reasons.get(again.why, 0) + 1
            if attempt >= 3:
                self.tell(f"{what}: {again.why}; trying again in {pause:.0f} s")
            time.sleep(pause)
