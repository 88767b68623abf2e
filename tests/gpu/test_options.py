"""What the spec offers trains with unsloth as it does with transformers, on a GPU: 4, 8 and 16 bit,
each with the options of LoRA, the optimizers, packing.

No fixtures here, so that `tests.gpu.run` can run the same functions without pytest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.options import STEPS
from tests.train.parity import ENGINES, ROOT

LIMIT = 400  # seconds
# Of the loss. 8 bit is rounded by what else is in a batch, and dropout draws other numbers.
LOSSES = {"8bit": 0.03, "dropout": 0.05, "": 0.01}


def tried() -> dict[str, dict[str, Any]]:
    """By engine, what became of each; both at the same time."""
    with tempfile.TemporaryDirectory(prefix="lorajob-options-") as name:
        work = Path(name)
        running = {engine: _start(engine, work) for engine in ENGINES}
        found = {}
        for engine, process in running.items():
            _, said = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, f"{engine}: {said[-3000:]}"
            found[engine] = json.loads((work / f"{engine}.json").read_text("utf-8"))
    return found


def _start(engine: str, work: Path) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(work / "compiled"),
    }
    asked = {"engine": engine, "work": str(work / engine), "result": str(work / f"{engine}.json")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.options", json.dumps(asked)],
        cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_what_the_spec_offers_trains_with_both_engines() -> None:
    found = tried()
    plain, other = (found[engine] for engine in ENGINES)
    assert set(plain) == set(other) and len(plain) > 30
    wrong = []
    for name, expected in plain.items():
        told = other[name]
        tolerance = next(share for part, share in LOSSES.items() if part in name)
        if "losses" not in expected or "losses" not in told:
            wrong.append(f"{name}: {told if 'losses' in expected else expected}")
        elif told["saved"] != expected["saved"]:
            wrong.append(f"{name}: {sorted(set(told['saved']) ^ set(expected['saved']))} saved")
        elif len(told["losses"]) != STEPS or told["losses"][-1] > 0.95 * told["losses"][0]:
            wrong.append(f"{name}: {told['losses']} learns nothing")
        else:
            pairs = zip(told["losses"], expected["losses"], strict=True)
            off = max(abs(one - two) / two for one, two in pairs)
            if off > tolerance:
                wrong.append(f"{name}: {off:.2%} off: {told['losses']}, {expected['losses']}")
    assert not wrong, "\n".join(wrong)
