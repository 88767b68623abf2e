"""The report: how a run went and what came of it, as a page and as the figures behind it.

`report.json` holds all that the page shows; the page and the pictures are made of it alone, so they
can be made again from a run's folder, or from what was published of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import AccessError
from jobs.observe.answers_table import ANSWERS
from jobs.observe.charts import png, standalone
from jobs.observe.report_page import charts_of, page
from jobs.observe.report_rows import Decode, example_rows
from jobs.secrets import redact, redact_tree
from jobs.spec import Spec
from jobs.store.hashing import file_entries, key_of

FORMAT = 1
NAME = "report.json"
KEPT_POINTS = 1500  # of the history: several for each pixel of the pictures
CODE = ("charts.py", "report.py", "report_page.py", "report_rows.py", "report.css", "report.html.jinja")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage of the run, as its record has it."""

    name: str
    key: str
    seconds: float
    result: dict[str, Any]


def write_report(
    folder: Path, spec: Spec, inputs: dict[str, Any], versions: dict[str, str],
    stages: Sequence[Stage], data: Path, decode: Decode,
) -> None:  # fmt: skip
    """Write `folder`/report, beside the answers that verification left there.

    What is there of the same run already stays as it is: a second start publishes nothing anew.
    """
    out = folder / "report"
    results = {stage.name: stage.result for stage in stages}
    verify = _json(out / ANSWERS)
    if not isinstance(verify, dict):
        verify = results.get("verify", {})
    failures = verify.get("failures", [])
    key = key_of(
        {
            "stages": {stage.name: stage.key for stage in stages},
            "verify": verify,
            "observe": spec.observe.model_dump(mode="json"),
            "code": _code_key(),
        }
    )
    if _key_of(out / NAME) == key and (out / "report.html").is_file():
        return
    told = list(_events(folder / "logs" / "run.jsonl"))
    train = dict(results.get("train", {}))
    history = _with_memory(train.pop("history", []), told)
    train.pop("quantized_modules", None)
    report = {
        "report": FORMAT,
        "key": key,
        "name": spec.name,
        "passed": not failures,
        "failures": failures,
        "spec": spec.model_dump(mode="json"),
        "versions": versions,
        "inputs": inputs,
        "data": results.get("data", {}),
        "train": train,
        "history": kept(history),
        "verify": verify,
        "gguf": results.get("gguf", {}),
        "rows": example_rows(data, spec.observe.report_rows, decode),
        "stages": [{"name": stage.name, "seconds": stage.seconds} for stage in stages],
        "warnings": warnings_of(told),
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(redact_tree(report), indent=1, ensure_ascii=False)
    (out / NAME).write_text(_whole_characters(text) + "\n", "utf-8")
    render_report(folder)


def render_report(folder: Path) -> Path:
    """Make the page and the pictures of a run's `report/report.json`; returns the page's path.

    Raises AccessError where there is none.
    """
    out = folder / "report"
    report = _json(out / NAME)
    if not isinstance(report, dict) or report.get("report") != FORMAT:
        raise AccessError(
            f"{out} has no {NAME} of this version", "name the folder of a run that was verified"
        )
    charts = charts_of(report)
    html = redact(page(report, charts))
    (out / "report.html").write_text(_whole_characters(html), "utf-8")
    for picture in ("loss.svg", "loss.png"):
        (out / picture).unlink(missing_ok=True)  # of an earlier run
    for chart in charts:
        if chart.name == "loss":  # for the model card
            (out / "loss.svg").write_text(standalone(chart, 640, 280), "utf-8")
            (out / "loss.png").write_bytes(png(chart, 640, 280))
    return out / "report.html"


def warnings_of(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every different warning with its stage: of a stage that was done again, the last time's; of
    what is outside of stages, the last start's."""
    found: dict[str, dict[str, int]] = {}
    stage = ""
    for entry in told:
        match entry["event"]:
            case "run_start":
                stage = ""
                found.pop("", None)
            case "stage_start":
                stage = str(entry["stage"])
                found.pop(stage, None)
            case "stage_done" | "stage_failed":
                stage = ""
            case "warning" | "library_warning":
                text = str(entry.get("text", ""))
                if source := entry.get("source"):
                    text = f"{source}: {text}"
                of_stage = found.setdefault(stage, {})
                of_stage[text] = of_stage.get(text, 0) + 1
    return [
        {"stage": stage, "text": text, "times": times}
        for stage, texts in found.items()
        for text, times in texts.items()
    ]


def kept(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history with at most KEPT_POINTS steps: each the mean of as many as it takes."""
    steps = [entry for entry in history if "loss" in entry]
    evals = [entry for entry in history if "eval_loss" in entry]
    size = -(-len(steps) // KEPT_POINTS)
    if size <= 1:
        return list(history)
    means = []
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        last = dict(group[-1])
        for name, value in last.items():
            values = [entry[name] for entry in group if isinstance(entry.get(name), int | float)]
            if name not in ("step", "epoch") and isinstance(value, int | float):
                last[name] = float(f"{sum(values) / len(values):.6g}")
        means.append(last)
    return sorted([*means, *evals], key=lambda entry: int(entry["step"]))


def _with_memory(
    history: Sequence[dict[str, Any]], told: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The history, with the memory that the log has for its steps."""
    memory = {
        entry["step"]: {name: entry[name] for name in entry if name.endswith("memory_bytes")}
        for entry in told
        if entry["event"] == "train_step"
    }
    return [
        entry | memory.get(entry["step"], {}) if "loss" in entry else dict(entry)
        for entry in history
    ]


def _events(log: Path) -> Iterator[dict[str, Any]]:
    """The log's events; a line that was cut off by a kill is passed over."""
    try:
        file = log.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                yield entry


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _key_of(path: Path) -> str | None:
    found = _json(path)
    return str(found["key"]) if isinstance(found, dict) and "key" in found else None


def _code_key() -> str:
    """Changes with what makes the page."""
    here = Path(__file__).parent
    return key_of([[f["path"], f["sha256"]] for f in file_entries(here) if f["path"] in CODE])


def _whole_characters(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
