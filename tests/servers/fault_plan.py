"""Which request the fault proxy fails, and how: by what was planted, else drawn from a seed."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Fault = Literal[
    "reset_before", "reset_after", "truncate", "stall", "status_429", "status_500", "status_503",
    "status_504", "upload_cut", "expired",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)
DEFAULT_FAULTS = tuple(fault for fault in FAULTS if fault != "expired")

# Parts of a query that a server or a clock makes up: they differ from run to run.
MADE_UP = re.compile(r"(uploadid|x-amz-\w+(-\w+)*)=", re.IGNORECASE)


@dataclass
class Record:
    """One request as the proxy saw it. It is in the log from its arrival on, and grows."""

    method: str
    target: str  # path and query
    received: int = 0  # bytes of the request's body; what a stall swallows is not counted
    sent: int = 0  # bytes of the answer's body given to the client
    status: int | None = None  # what the client was answered; None for nothing
    upstream_status: int | None = None  # what upstream answered; None if it was not asked or broke
    fault: Fault | None = None

    def receive(self, content: int) -> None:
        self.received += content


@dataclass
class _Planted:
    fault: Fault
    match: str
    left: int


@dataclass(frozen=True)
class Decision:
    fault: Fault | None
    retry_after: int  # for status_429, drawn with the fault


@dataclass(kw_only=True)
class FaultPlan:
    """The settings, which may change at any time, and what came of them."""

    rate: float
    seed: int
    kinds: Sequence[Fault]
    match: str = ""
    """A regular expression: random faults hit only requests whose `METHOD /path?query` it finds."""
    max_consecutive: int = 3
    """Planted faults do not keep to it; they count towards it."""
    injected: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._log: list[Record] = []
        self._paused = False
        self._planted: list[_Planted] = []
        self._asked: Counter[str] = Counter()
        self._failed_in_a_row: Counter[str] = Counter()

    @property
    def log(self) -> list[Record]:
        """All requests so far, in the order in which they arrived."""
        with self._lock:
            return list(self._log)

    @property
    def bytes_up(self) -> int:
        return sum(record.received for record in self.log)

    @property
    def bytes_down(self) -> int:
        return sum(record.sent for record in self.log)

    def pause(self) -> None:
        """Let everything through, planted faults too."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def fail(self, kind: Fault, match: str = "", times: int = 1) -> None:
        """Fail the next `times` requests that `match` finds, before any random fault.

        Several calls are worked off in their order. `upload_cut` waits for a request with a body.
        """
        with self._lock:
            self._planted.append(_Planted(kind, match, times))

    def begin(
        self, method: str, target: str, byte_range: str, has_body: bool
    ) -> tuple[Record, Decision]:
        """Log the request and decide about it."""
        record = Record(method, target)
        what = f"{method} {target}"
        key = _identity(method, target, byte_range)
        with self._lock:
            self._log.append(record)
            if self._paused:
                return record, Decision(None, 0)
            decision = self._planted_fault(what, has_body) or self._drawn_fault(what, key, has_body)
            if decision.fault:
                self._failed_in_a_row[key] += 1
            else:
                self._failed_in_a_row[key] = 0
        return record, decision

    def _planted_fault(self, what: str, has_body: bool) -> Decision | None:
        for planted in self._planted:
            if planted.fault == "upload_cut" and not has_body:
                continue
            if planted.left > 0 and re.search(planted.match, what):
                planted.left -= 1
                return Decision(planted.fault, 0)
        return None

    def _drawn_fault(self, what: str, key: str, has_body: bool) -> Decision:
        if not re.search(self.match, what):
            return Decision(None, 0)
        self._asked[key] += 1
        # A generator for each request, not one for all: threads then cannot change who is hit.
        draw = random.Random(f"{self.seed} {self._asked[key]} {key}")
        hit = draw.random() < self.rate
        kinds = [kind for kind in self.kinds if not (kind == "upload_cut" and not has_body)]
        if not hit or not kinds or self._failed_in_a_row[key] >= self.max_consecutive:
            return Decision(None, 0)
        return Decision(draw.choice(kinds), draw.randrange(2))

    def inject(self, record: Record, fault: Fault) -> None:
        """Note a fault just before it is carried out, so that who meets it finds it counted."""
        with self._lock:
            record.fault = fault
            self.injected[fault] += 1


def _identity(method: str, target: str, byte_range: str) -> str:
    """What makes two requests the same one, tried again or repeated in another run."""
    path, _, query = target.partition("?")
    fixed = sorted(part for part in query.split("&") if part and not MADE_UP.match(part))
    return " ".join([method, path, *fixed, byte_range])
