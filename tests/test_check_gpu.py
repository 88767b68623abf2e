"""What `check` says of the GPU's memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jobs.observe.check_text import gpu_text
from tests.test_cli import Desk, assert_told, desk  # noqa: F401


def card_of(folder: Path, mebibytes: int) -> str:
    """A PATH on which nvidia-smi tells of a card with so much memory."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'NVIDIA Tiny, {mebibytes}, 0, 9.0'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_without_a_card_it_says_what_training_takes(desk: Desk) -> None:
    gpu = json.loads(desk.do("check", "--format", "json", PATH="/usr/bin:/bin").out)["gpu"]
    assert gpu["card"] is None
    assert gpu["smallest_card"] == "T4"
    assert 0.5 * 2**30 < gpu["least"] <= gpu["most"] < 2**30
    assert "(T4) and runs fastest with" in gpu_text(gpu)


def test_the_card_here_is_reckoned_with(desk: Desk) -> None:
    path = card_of(desk.folder, 4096)
    desk.tree["train"] = {"engine": "transformers"}
    gpu = json.loads(desk.do("check", "--format", "json", PATH=path).out)["gpu"]
    assert (gpu["card"], gpu["here"], gpu["engine"]) == ("NVIDIA Tiny", True, "transformers")
    parts = dict(gpu["takes"])
    assert parts.pop("total") == sum(parts.values())
    assert set(parts) == {
        "weights", "lora", "optimizer", "activations", "workspace", "context",
    }  # fmt: skip
    assert not gpu["plan"]["checkpointing"]
    assert gpu_text(gpu).startswith("NVIDIA Tiny, 3.5 GiB: ")
    assert "with activations kept, the 4-bit weights held unpacked, roughly" in gpu_text(
        gpu
    )  # nobody measured this engine


def test_the_named_card_goes_before_the_one_here(desk: Desk) -> None:
    desk.tree["limits"] = {"gpu": "H100"}
    result = desk.do("check", PATH=card_of(desk.folder, 100))
    assert result.code == 0, result.err
    assert "H100, 79.1 GiB: " in result.out


def test_a_run_that_cannot_fit_is_refused_with_a_way_out(desk: Desk) -> None:
    desk.tree["limits"] = {"gpu_memory_gib": 0.5}
    result = desk.do("check", PATH="/usr/bin:/bin")
    assert_told(result, 5, "0.5 GiB", "limits.gpu_memory_gib: 0.5", "T4")


def test_what_is_not_measured_is_a_warning_and_no_refusal(desk: Desk) -> None:
    desk.tree["limits"] = {"gpu_memory_gib": 0.5}
    desk.tree["train"] = {"engine": "transformers"}
    found = json.loads(desk.do("check", "--format", "json", PATH="/usr/bin:/bin").out)
    assert any("may not be enough" in text for text in found["warnings"])


def test_an_architecture_that_is_not_reckoned_is_said(desk: Desk) -> None:
    desk.config(num_hidden_layers=40)  # of which the weights are not
    gpu = json.loads(desk.do("check", "--format", "json").out)["gpu"]
    assert list(gpu) == ["unknown"]
    assert "LlamaForCausalLM" in gpu_text(gpu)
