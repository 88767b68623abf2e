"""What lies in examples/demo is what its scripts make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BASE, ROOT

DEMO = ROOT / "examples" / "demo"


def script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(DEMO / name), *arguments], check=True, capture_output=True)


def test_the_tokenizer_is_what_make_base_trains(tmp_path: Path) -> None:
    script("make_base.py", "--tokenizer-only", "--out", str(tmp_path))
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
    for name in made:
        assert (tmp_path / name).read_bytes() == (BASE / name).read_bytes(), name


def test_the_conversations_are_what_make_data_writes(tmp_path: Path) -> None:
    script("make_data.py", "--out", str(tmp_path))
    for name in ("data/persona.jsonl", "data/facts.json", "heldout.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


@pytest.mark.slow
def test_what_is_retained_and_replayed_is_what_make_retention_writes(tmp_path: Path) -> None:
    script("make_retention.py", "--out", str(tmp_path))
    for name in ("data/retention.jsonl", "data/replay.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
