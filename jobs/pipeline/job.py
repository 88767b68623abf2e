"""What every stage of a run knows: the spec, what preflight found, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.observe.events import Observer
from jobs.preflight import Ready
from jobs.spec import Spec
from jobs.stages import Stages
from jobs.store.hashing import file_entries, key_of

PACKAGE = Path(__file__).parent.parent
WORK = ".work"  # what the run needs of its own, below its folder; never published
CHECKPOINTS = f"{WORK}/checkpoints"


@dataclass(frozen=True)
class Job:
    spec: Spec
    ready: Ready
    stages: Stages
    threads: int = 0
    """PyTorch's, on which the last bits depend; none are needed to read data"""

    @property
    def folder(self) -> Path:
        return self.stages.folder

    @property
    def observer(self) -> Observer:
        return self.stages.observer

    @property
    def data(self) -> Path:
        """The prepared conversations."""
        return self.folder / WORK / "data"

    @property
    def trained(self) -> Path:
        """What training left: the adapter, and what is proven of it later."""
        return self.folder / WORK / "train"

    @property
    def llama_log(self) -> Path:
        return self.folder / "logs" / "llama.log"

    def whole_base(self) -> Path:
        """The base's folder with its weights, which are fetched when the first stage needs them."""
        base = self.ready.base
        missing = base.missing_bytes()
        if not missing:
            return base.whole()
        with self.observer.ticker(f"fetching {base.source}", missing, "bytes", "fetched") as ticker:
            return base.whole(ticker.advance)


def code_key(package: str) -> str:
    """Changes with the code of a package of jobs/, so that what an older version made is made again."""
    folder = PACKAGE / package
    return key_of(
        [[f["path"], f["sha256"]] for f in file_entries(folder) if f["path"].endswith(".py")]
    )
