"""Who watches a run besides its log: TensorBoard's files, trackers, Prometheus."""

from __future__ import annotations

from pathlib import Path

from jobs.observe.events import Observer
from jobs.observe.tensorboard import TensorBoard
from jobs.observe.trackers import MLflow, Tracker, Tracking, WandB
from jobs.secrets import redact_tree
from jobs.spec import Spec


def watch(spec: Spec, folder: Path, checkpoints: Path, observer: Observer) -> None:
    """Tell them of everything from now on. What cannot be reached is a warning, never an error."""
    logs = folder / "logs"
    observer.add(TensorBoard(logs / "tensorboard", checkpoints))
    config = redact_tree(spec.model_dump(mode="json"))
    for kind in dict.fromkeys(spec.observe.track):
        tracker: Tracker = WandB(logs) if kind == "wandb" else MLflow()
        observer.add(Tracking(kind, tracker, spec.name, config, logs, checkpoints, observer.warn))
    if spec.observe.metrics_port is None:
        return
    from jobs.observe.metrics import MetricsServer

    try:
        observer.add(MetricsServer(observer.snapshot, spec.observe.metrics_port))
    except OSError as error:
        observer.warn(
            f"no metrics: port {spec.observe.metrics_port} cannot be served: {error.strerror}"
        )
