"""What the spec offers trains with unsloth as it does with transformers, on a GPU: 4, 8 and 16 bit,
each with the options of LoRA, the optimizers, packing.

No fixtures here, so that `tests.gpu.run` can run the same functions without pytest.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu.options import STEPS
from tests.gpu.test_fused import make_base
from tests.train import parity
from tests.train.parity import ENGINES, in_a_process

LIMIT = 400  # seconds
# Of the loss. 8 bit is rounded by what else is in a batch, and dropout draws other numbers.
LOSSES = {"8bit": 0.03, "dropout": 0.05, "": 0.01}

# Those whose tokenizers are what a file says: of Qwen2 transformers takes its own from the model.
TRAINED = ("llama", "mistral", "gemma2")


def tried(work: Path, bases: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By engine, what became of each; both at the same time."""

    def of(engine: str) -> dict[str, Any]:
        asked = {"engine": engine, "out": str(work / engine), "bases": bases}
        return in_a_process(asked, LIMIT, "tests.gpu.options")

    with ThreadPoolExecutor(len(ENGINES)) as pool:
        return dict(zip(ENGINES, pool.map(of, ENGINES), strict=True))


def test_what_the_spec_offers_trains_with_both_engines() -> None:
    with tempfile.TemporaryDirectory(prefix="lorajob-options-") as work:
        found = tried(Path(work), {})
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


def test_families_of_models_train_the_same_with_both_engines() -> None:
    """Windows shorter than the conversations, and Gemma 2's soft-capped scores, laid end to end."""
    with tempfile.TemporaryDirectory(prefix="lorajob-families-") as name:
        work = Path(name)
        bases = {family: str(work / family) for family in TRAINED}
        for family, folder in bases.items():
            make_base(family, Path(folder))
        plain, other = (found for found in tried(work, bases).values())
    assert len(plain) == 2 * len(TRAINED)
    for name, expected in plain.items():
        told = other[name]
        assert "losses" in expected, f"{name}: {expected}"
        assert "losses" in told, f"{name}: {told}"
        assert not expected["warned"] + told["warned"], name
        assert len(told["losses"]) == STEPS
        parity.assert_near(told["losses"], expected["losses"], LOSSES[""])
        assert told["losses"][-1] < expected["losses"][0], f"{name} learns nothing: {told}"
        print(name, told["losses"], expected["losses"])
