"""The best weights so far, and when to end: both by the loss on the held-out rows.

All of it but the weights follows from the history of the evaluations, so a run that was stopped
and goes on decides as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from jobs.spec import EarlyStopping

FILE = "best.safetensors"  # of a checkpoint: the weights of the best evaluation before it


def best_of(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the lowest loss; of equal ones the first."""
    found = [e for e in history if "eval_loss" in e and not math.isnan(e["eval_loss"])]
    return min(found, key=lambda entry: float(entry["eval_loss"]), default=None)


def is_exhausted(history: Sequence[dict[str, Any]], settings: EarlyStopping) -> bool:
    """Whether `patience` evaluations one after another were no better than the best before them.

    One counts as better that is lower by more than `min_delta` than the last that did: so small
    improvements add up.
    """
    lowest, waited = math.inf, 0
    for loss in (entry["eval_loss"] for entry in history if "eval_loss" in entry):
        if loss < lowest - settings.min_delta:
            lowest, waited = loss, 0
        else:
            waited += 1
    return waited >= settings.patience


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that is trained, outside the GPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_back(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give the model what `weights_of` took of it."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)
