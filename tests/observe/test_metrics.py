"""The Prometheus endpoint, and the rules and the dashboard that are made for it."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobs.observe.events import Observer
from jobs.observe.metrics import METRICS, PROCESS, MetricsServer, metrics_table
from jobs.observe.watchers import watch
from jobs.spec import Spec
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples" / "observability"
STEP = {"step": 5, "of": 20, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5,
        "tokens_per_second": 99.0}  # fmt: skip


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def observer() -> Iterator[Observer]:
    with Observer("json", io.StringIO()) as observer:
        yield observer


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def spec_with(port: int | None) -> Spec:
    return Spec.model_validate(
        {"name": "a-run", "model": {"base": "b"}, "data": {"train": "d.jsonl"},
         "observe": {"metrics_port": port}}
    )  # fmt: skip


def test_a_scrape_shows_what_the_events_said(observer: Observer, port: int, tmp_path: Path) -> None:
    watch(spec_with(port), tmp_path, tmp_path, observer)
    early = scrape(port)
    assert early["lorajob_stage", (("stage", "preflight"),)] == 1
    assert ("lorajob_loss", ()) not in early
    observer.snapshot.retries = lambda: 7
    observer.event("run_start", name="a-run", version="9")
    with observer.ticker("fetching", 100, "bytes", "fetched") as ticker:
        ticker.advance(60)
    observer.event("stage_start", stage="train")
    with observer.ticker("training", 20) as ticker:
        ticker.advance(5)
        observer.event("train_step", **STEP)
        observer.event("eval", step=5, eval_loss=0.75)
        observer.event("retention", step=5, source="wiki", tokens=9, before=1.0, loss=1.5)
        observer.warn("look")
        found = scrape(port)
    assert found["lorajob_info", (("name", "a-run"), ("version", "9"))] == 1
    stages = {labels: value for (name, labels), value in found.items() if name == "lorajob_stage"}
    assert [labels for labels, value in stages.items() if value] == [(("stage", "train"),)]
    values = {
        "lorajob_progress_ratio": 0.25, "lorajob_step": 5, "lorajob_steps": 20, "lorajob_loss": 1.25,
        "lorajob_eval_loss": 0.75, "lorajob_tokens_per_second": 99, "lorajob_retries_total": 7,
        "lorajob_fetched_bytes_total": 60, "lorajob_sent_bytes_total": 0, "lorajob_warnings_total": 1,
    }  # fmt: skip
    assert {name: found[name, ()] for name in values} == values
    assert found["lorajob_retention_loss", (("source", "wiki"),)] == 1.5
    assert 0 <= found["lorajob_checkpoint_age_seconds", ()] < 60
    assert 0 <= found["lorajob_idle_seconds", ()] < 60
    assert found[PROCESS, ()] > 2**20
    assert ("lorajob_exit_code", ()) not in found
    observer.event("run_failed", code=6, error="x", what_to_do=None)
    assert scrape(port)["lorajob_exit_code", ()] == 6


def test_the_endpoint_ends_with_the_run(port: int) -> None:
    with Observer("json", io.StringIO()) as observer:
        observer.add(MetricsServer(observer.snapshot, port))
        scrape(port)
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_there_is_no_endpoint_unless_it_is_asked_for(
    observer: Observer, port: int, tmp_path: Path
) -> None:
    watch(spec_with(None), tmp_path, tmp_path, observer)
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_a_port_that_is_taken_is_a_warning(port: int, tmp_path: Path) -> None:
    stream = io.StringIO()
    with socket.socket() as taken, Observer("json", stream) as observer:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        watch(spec_with(port), tmp_path, tmp_path, observer)
        observer.event("run_start", name="a-run", version="9")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["warning", "run_start"]
    assert str(port) in events[0]["text"]


def used_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:lorajob|process)_[a-z_]+\b", text))


def known_names() -> set[str]:
    return {metric.name for metric in METRICS} | {PROCESS}


def expressions(tree: Any) -> Iterator[str]:
    """Everything that Prometheus would be asked, wherever it stands."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from expressions(value)


@pytest.mark.parametrize("name", ["alerts.yaml", "dashboard.json"])
def test_every_metric_that_an_example_uses_exists(name: str) -> None:
    tree = yaml.safe_load((EXAMPLES / name).read_text("utf-8"))  # JSON is YAML
    asked = list(expressions(tree))
    used = set().union(*(used_names(text) for text in asked))
    assert len(used) > 4
    assert used <= known_names()
    for text in asked:
        assert text.count("(") == text.count(")"), text
        assert text.count("{") == text.count("}"), text
    for stage in re.findall(r'stage="(\w+)"', " ".join(asked)):
        assert stage in next(m.help for m in METRICS if m.name == "lorajob_stage")


def test_the_dashboard_shows_every_metric_that_changes() -> None:
    text = (EXAMPLES / "dashboard.json").read_text("utf-8")
    left_out = known_names() - used_names(text)
    assert left_out == {"lorajob_exit_code"}


def test_each_alert_says_what_to_make_of_it() -> None:
    rules = yaml.safe_load((EXAMPLES / "alerts.yaml").read_text("utf-8"))
    assert rules["kind"] == "PrometheusRule"
    found = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found) >= 5
    for rule in found:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_documented_table_is_the_codes() -> None:
    assert metrics_table() in (EXAMPLES / "README.md").read_text("utf-8")
