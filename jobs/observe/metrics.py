"""The Prometheus endpoint: the snapshot's values under names that alerts and dashboards can use.

Nothing is counted here. A scrape reads what the run's events have left, so it costs the run nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from jobs.observe.snapshot import STAGES, Snapshot
from jobs.observe.usage import memory

Value = float | int | None
Sample = tuple[tuple[str, ...], Value]  # the labels' values, and the metric's


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["gauge", "counter"]
    help: str
    read: Callable[[Snapshot], Value | list[Sample]]
    labels: tuple[str, ...] = ()


def _figure(name: str) -> Callable[[Snapshot], Value]:
    return lambda snapshot: snapshot.figures.get(name)


def _gpu(name: str) -> Callable[[Snapshot], Value]:
    return lambda snapshot: memory().get(name)  # now, not as of the last step: merging uses it too


# A value of None is not exported: there is no loss before there is a step.
METRICS = (
    Metric("lorajob_info", "gauge", "Always 1; the run's name and lorajob's version.",
           lambda s: [((s.name, s.version), 1)], ("name", "version")),
    Metric("lorajob_stage", "gauge", f"1 for the stage the run is in, 0 for the others: {', '.join(STAGES)}.",
           lambda s: [((stage,), int(stage == s.stage)) for stage in STAGES], ("stage",)),
    Metric("lorajob_progress_ratio", "gauge", "How far the present step of the stage is, from 0 to 1.",
           lambda s: s.progress),
    Metric("lorajob_idle_seconds", "gauge", "Seconds since the run showed any progress.",
           lambda s: s.idle),
    Metric("lorajob_step", "gauge", "Optimizer steps done.", _figure("step")),
    Metric("lorajob_steps", "gauge", "Optimizer steps that there will be.", _figure("of")),
    Metric("lorajob_left_seconds", "gauge", "Seconds of training left, by the speed so far.",
           lambda s: s.seconds_left),
    Metric("lorajob_loss", "gauge", "Training loss of the last step, in nats per trained token.",
           _figure("loss")),
    Metric("lorajob_eval_loss", "gauge", "Loss of the last evaluation, in nats per trained token.",
           lambda s: s.eval_loss),
    Metric("lorajob_retention_loss", "gauge", "Last loss on each source of `data.retention`.",
           lambda s: [((source,), loss) for source, loss in s.retention.items()], ("source",)),
    Metric("lorajob_learning_rate", "gauge", "Learning rate of the last step.", _figure("learning_rate")),
    Metric("lorajob_grad_norm", "gauge", "Norm of the last step's gradient, before clipping.",
           _figure("grad_norm")),
    Metric("lorajob_tokens_per_second", "gauge", "Training speed, in tokens that are not padding.",
           _figure("tokens_per_second")),
    Metric("lorajob_gpu_memory_used_bytes", "gauge", "GPU memory in use on the card, by any process.",
           _gpu("gpu_memory_bytes")),
    Metric("lorajob_gpu_memory_total_bytes", "gauge", "The card's memory.", _gpu("gpu_memory_total_bytes")),
    Metric("lorajob_checkpoint_age_seconds", "gauge",
           "Seconds of training that would be lost now: since the last checkpoint, or since training "
           "began. Only while training.", lambda s: s.checkpoint_age),
    Metric("lorajob_retries_total", "counter", "Calls to a store or the Hub that were tried again.",
           lambda s: s.retries()),
    Metric("lorajob_sent_bytes_total", "counter",
           "Bytes of results brought to the targets; what is found there already counts.",
           lambda s: s.moved["sent"]),
    Metric("lorajob_fetched_bytes_total", "counter", "Bytes of the base model and data fetched.",
           lambda s: s.moved["fetched"]),
    Metric("lorajob_warnings_total", "counter", "Warnings in the run's log.", lambda s: s.warnings),
    Metric("lorajob_exit_code", "gauge",
           "The exit code, in the moments between the run's end and the process's.",
           lambda s: s.exit_code),
)  # fmt: skip

# What prometheus_client adds of the process itself; `process_resident_memory_bytes` is of use here.
PROCESS = "process_resident_memory_bytes"


def metrics_table() -> str:
    """Every metric as a Markdown table, for the documentation."""
    rows = [
        "| metric | type | labels | meaning |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |"
            for m in METRICS
        ),
        f"| `{PROCESS}` | gauge | | Memory of the process, without the GPU's. |",
    ]
    return "\n".join(rows).replace("|  |", "| |") + "\n"


class SnapshotCollector(Collector):
    """Reads the snapshot whenever it is asked."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for metric in METRICS:
            found = metric.read(self._snapshot)
            samples = found if isinstance(found, list) else [((), found)]
            family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                metric.name, metric.help, labels=metric.labels
            )
            for labels, value in samples:
                if value is not None:
                    family.add_metric(labels, value)
            if family.samples:
                yield family


class MetricsServer:
    """Serves a snapshot on a port, until it is closed. Raises OSError where the port is taken."""

    def __init__(self, snapshot: Snapshot, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(SnapshotCollector(snapshot))
        ProcessCollector(registry=registry)
        self._server, self._thread = start_http_server(port, registry=registry)

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        """The snapshot has heard it."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
