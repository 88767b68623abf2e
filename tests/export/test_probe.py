"""What training keeps to be compared with is compared, however much was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file

from jobs.export.verify import _logits
from jobs.train.batches import PadBatch
from jobs.train.engine_transformers import load_model
from jobs.train.loop import PROBED, _keep_probe
from tests.conftest import BASE
from tests.train.test_isolation import made


def test_only_as_many_logits_are_compared_as_were_kept(tmp_path: Path) -> None:
    model = load_model(BASE, "16bit", "cpu")
    rows = Dataset.from_list([dict(item) for item in made([250, 220, 240, 200])])
    assert sum(label >= 0 for row in rows for label in row["labels"]) > PROBED
    _keep_probe(model, rows, PadBatch(0), tmp_path / "probe", "cpu", 4 * 250)
    probe = load_file(tmp_path / "probe")
    assert len(probe["logits"]) == PROBED
    torch.testing.assert_close(_logits(model, probe, "cpu"), probe["logits"])
