"""What the model should not get worse at: sets that are measured and never trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from jobs.observe.events import Observer
from jobs.train.rows import load_rows

# With no more than this share of the tokens that are trained between two evaluations, it is
# measured at each: a forward pass takes a third of a training step's time, so that adds a twelfth.
CHEAP = 0.25


@dataclass(frozen=True)
class Retained:
    """The rows of a source."""

    source: str
    rows: Dataset
    tokens: int  # those that count
    length: int  # of all rows together


def load_retained(folder: Path) -> list[Retained]:
    """What `prepare` wrote of each source of data.retention; empty where there is none."""
    listed = folder / "retention.json"
    if not listed.exists():
        return []
    rows = load_rows(folder / "retention.arrow")
    assert rows is not None
    found = []
    at = 0
    for entry in json.loads(listed.read_text("utf-8")):
        own = rows.select(range(at, at + entry["rows"]))
        at += entry["rows"]
        found.append(Retained(entry["source"], own, entry["measured_tokens"], entry["tokens"]))
    return found


def is_cheap(retained: Sequence[Retained], tokens_between: float) -> bool:
    """Whether they are measured at each evaluation, and not only before and after."""
    return sum(each.length for each in retained) <= CHEAP * tokens_between


def result_of(
    retained: Sequence[Retained], before: Sequence[float], after: Sequence[float]
) -> list[dict[str, Any]]:
    """Each source's loss in nats a token, before the training and of the weights it ended with."""
    return [
        {"source": each.source, "tokens": each.tokens, "before": first, "after": last}
        for each, first, last in zip(retained, before, after, strict=True)
    ]


def warn_of_forgetting(
    results: Sequence[dict[str, Any]], limit: float, replays: bool, observer: Observer
) -> None:
    """Say where the model got worse by more than `limit` nats a token."""
    for found in results:
        if not found["after"] - found["before"] <= limit:  # also where it is not a number
            observer.warn(
                f"the model forgot some of {found['source']}: its loss on it was "
                f"{found['before']:.3f} and is {found['after']:.3f}, and data.retention_limit is "
                f"{limit:g}; "
                + ("raise the share of data.replay" if replays else "set data.replay")
                + ", or lower train.learning_rate or train.epochs"
            )
