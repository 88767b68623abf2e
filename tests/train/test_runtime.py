from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.train.runtime import VISIBLE, settle_gpu


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")  # so that it is put back as it was, also where it was unset
    monkeypatch.delenv(VISIBLE)


def machine(root: Path, *names: str) -> Path:
    (root / "dev").mkdir()
    for name in names:
        (root / "dev" / name).touch()
    return root


def test_of_several_gpus_one_is_seen(tmp_path: Path) -> None:
    root = machine(tmp_path, "nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm")
    assert settle_gpu(root) == 3
    assert os.environ[VISIBLE] == "0"


@pytest.mark.parametrize("names", [(), ("nvidia3", "nvidiactl")])
def test_where_there_is_no_choice_nothing_is_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    settle_gpu(machine(tmp_path, *names))
    assert VISIBLE not in os.environ


@pytest.mark.parametrize(
    ("given", "kept", "count"),
    [("2,3", "2", 2), ("GPU-aa, GPU-bb", "GPU-aa", 2), ("1", "1", 1), ("", "", 0)],
)
def test_who_chose_some_gets_the_first_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, kept: str, count: int
) -> None:
    monkeypatch.setenv(VISIBLE, given)
    assert settle_gpu(machine(tmp_path, "nvidia0", "nvidia1", "nvidia2", "nvidia3")) == count
    assert os.environ[VISIBLE] == kept
