"""Trackers: what they are told, and that none of them can harm a run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.observe import trackers
from jobs.observe.trackers import MLflow, Tracker, Tracking, WandB, flat

STEPS = 5
LAST = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 10.0}


class Recorder:
    """A tracker that keeps what it gets, and fails or hangs where it is told to."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.said: list[tuple[str, Any]] = []
        self._fails, self._hangs = fails, hangs
        self.let_go = threading.Event()

    def _say(self, what: str, value: Any) -> None:
        if what == self._hangs:
            self.let_go.wait(60)
        if what == self._fails:
            raise ConnectionError("the server is on fire")
        self.said.append((what, value))

    def start(self, name: str, config: dict[str, Any], before: str | None) -> str:
        self._say("start", (name, before))
        return "run-17"

    def log(self, values: dict[str, float], step: int) -> None:
        self._say("log", (step, values["train/loss"]))

    def finish(self, code: int) -> None:
        self._say("finish", code)


def follow(
    tracker: Tracker, folder: Path, resumed: int | None = None, end: str = "run_done",
    code: int = 0,
) -> list[str]:  # fmt: skip
    """Tell it of a run as the observer does; returns the warnings."""
    warnings: list[str] = []
    tracking = Tracking(
        "x", tracker, "a-run", {"name": "a-run"}, folder / "logs", folder / "checkpoints",
        warnings.append,
    )  # fmt: skip
    tracking.hear("stage_start", {"stage": "train"})
    if resumed:
        tracking.hear("resumed", {"checkpoint": f"checkpoint-{resumed}"})
    for step in range((resumed or 0) + 1, STEPS + 1):
        tracking.hear("train_step", {"step": step, "of": STEPS, "loss": 1 / step, **LAST})
    tracking.hear(end, {"code": code} if end != "run_done" else {})
    tracking.close()
    return warnings


def test_it_gets_every_step_and_how_the_run_ended(tmp_path: Path) -> None:
    recorder = Recorder()
    assert follow(recorder, tmp_path, end="run_failed", code=6) == []
    steps = [("log", (step, 1 / step)) for step in range(1, STEPS + 1)]
    assert recorder.said == [("start", ("a-run", None)), *steps, ("finish", 6)]


def test_a_resumed_run_goes_on_with_its_own(tmp_path: Path) -> None:
    follow(Recorder(), tmp_path, end="run_stopped", code=20)
    second = Recorder()
    follow(second, tmp_path, resumed=3)
    assert second.said[0] == ("start", ("a-run", "run-17"))
    assert [step for what, (step, _) in second.said[1:-1] if what == "log"] == [4, 5]


def test_a_run_begun_anew_is_another_one(tmp_path: Path) -> None:
    follow(Recorder(), tmp_path)
    second = Recorder()
    follow(second, tmp_path)
    assert second.said[0] == ("start", ("a-run", None))


def test_on_another_machine_it_is_told_what_was_before(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    history = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}]
    (checkpoint / "progress.json").write_text(json.dumps({"history": history}))
    recorder = Recorder()
    follow(recorder, tmp_path, resumed=2)
    assert [value for what, value in recorder.said if what == "log"][:3] == [
        (1, 9.0), (2, 8.0), (3, pytest.approx(1 / 3)),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_one_that_fails_costs_one_warning(tmp_path: Path, where: str) -> None:
    recorder = Recorder(fails=where)
    warnings = follow(recorder, tmp_path)
    assert len(warnings) == 1
    assert "the server is on fire" in warnings[0]
    assert not any(what == "finish" for what, _ in recorder.said)


def test_one_that_hangs_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "ENOUGH", 0.3)
    recorder = Recorder(hangs="start")
    start = time.monotonic()
    warnings = follow(recorder, tmp_path)
    assert time.monotonic() - start < 5
    assert len(warnings) == 1
    assert "not waited for" in warnings[0]
    recorder.let_go.set()


@pytest.mark.parametrize(
    ("tracker", "variables"),
    [(WandB, ("WANDB_API_KEY", "WANDB_MODE")), (MLflow, ("MLFLOW_TRACKING_URI",))],
)
def test_one_that_knows_no_place_says_what_to_set(
    tracker: Any, variables: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    ours = WandB(tmp_path) if tracker is WandB else MLflow()
    (warning,) = follow(ours, tmp_path)
    assert f"set {variables[0]}" in warning


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_one_that_is_not_installed_says_how_to_get_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker: Tracker = WandB(tmp_path) if package == "wandb" else MLflow()
    (warning,) = follow(tracker, tmp_path)
    assert f"pip install {package}" in warning


def test_mlflow_itself_has_the_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/ml")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert follow(MLflow(), tmp_path, end="run_stopped", code=20) == []
    assert follow(MLflow(), tmp_path, resumed=3) == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("lorajob")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a-run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step for metric in history} == set(range(1, STEPS + 1))


def test_wandb_itself_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(WandB(tmp_path / "logs"), tmp_path) == []
    (kept,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_a_spec_is_flattened_by_its_fields_names() -> None:
    spec = {"name": "a", "train": {"epochs": 1, "max_steps": None}, "export": {"gguf": ["q8_0"]}}
    assert flat(spec) == {"name": "a", "train.epochs": "1", "export.gguf": '["q8_0"]'}
