"""Replay: which of the data that the base learned from are mixed into the training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.data.arrow import ExampleWriter
from jobs.spec import Source


def draw(
    candidates: ExampleWriter,
    sources: Sequence[Source],
    share: float,
    others: int,
    held: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which candidates to train, so that of all trained tokens `share` are theirs.

    `others` is the number of tokens trained besides them, `held` the places of what is measured
    with, which is never trained. The draw is what each conversation's place says, which is random by
    the seed: it depends on no order, and where more is drawn, what was drawn before stays.
    """
    # Exponential variates of a rate: the smallest is one's with a chance in proportion to its rate.
    weights = np.array([source.weight for source in sources])
    turns = -np.log1p(-candidates.places) / weights[candidates.sources]
    places, first = np.unique(candidates.places, return_index=True)  # of equal ones only one
    able = first[~np.isin(places, held)]
    order = able[np.argsort(turns[able], kind="stable")]
    wanted = others * share / (1 - share)
    reached = np.cumsum(candidates.trained[order])
    count = int(np.searchsorted(reached, wanted)) + 1
    if 1 < count <= len(reached) and wanted - reached[count - 2] < reached[count - 1] - wanted:
        count -= 1  # one less is nearer
    chosen = np.zeros(len(candidates.places), bool)
    chosen[order[:count]] = True
    return chosen
