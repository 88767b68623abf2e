"""How far a run is. Who ends it, in whatever way, says so from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reached:
    name: str | None = None
    stage: str | None = None
    step: int | None = None
    log: Path | None = None
    grace: float = 120.0
    """Seconds between being told to stop and being killed."""
    safe: Callable[[], str | None] = lambda: None
    """What the next start goes on with, for people; None where it begins anew."""
    started: float = field(default_factory=time.monotonic)

    def fields(self) -> dict[str, Any]:
        """As the termination message has them."""
        return {
            "name": self.name,
            "stage": self.stage,
            "step": self.step,
            "log": self.log,
            "safe": self.safe(),
            "seconds": time.monotonic() - self.started,
        }
