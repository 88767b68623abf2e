"""Cases that are measured one after another, each in a process of its own with a time limit.

What fails is told and kept, and the others are measured all the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOWN = 1500  # characters of what a failed case wrote
TOLD = (
    "tokens_per_second", "seconds_a_step", "tokens_a_step", "steps", "peak_gib",
    "peak_gib_with_search", "start_to_first_step", "phases", "plan", "kernel", "warnings",
    "wall_seconds",
)  # fmt: skip


def run_case(
    module: str, case: dict[str, Any], work: Path, limit: float, shared_caches: bool = False
) -> dict[str, Any]:
    """`python3 -m module --case JSON` in a process group of its own; its result, or what went wrong.

    The case gets `began`, when it was started, and `result`, the file that takes its figures. Its
    caches of compiled kernels are its own, as in a container that has just started.
    """
    folder = work / "cases" / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    caches = work / "caches" if shared_caches else folder / "caches"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "WANDB_DISABLED": "true",
    }
    began = time.time()
    text = json.dumps({**case, "began": began, "result": str(result), "work": str(work)})
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--case", text],
            cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = round(time.time() - began, 1)
    found: dict[str, Any] = {**case, "wall_seconds": seconds}
    if code == 0 and result.exists():
        return {**found, **json.loads(result.read_text("utf-8"))}
    failed = f"no end after {limit:.0f} s" if code is None else f"ended with code {code}"
    written = (folder / "stderr").read_text("utf-8", "replace").strip()
    written = written or (folder / "stdout").read_text("utf-8", "replace").strip()
    return {**found, "failed": failed, "stderr": written[-SHOWN:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The group's processes, workers of data sets among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_cases(
    module: str,
    cases: list[dict[str, Any]],
    work: Path,
    limit: float,
    deadline: float,
    found: Callable[[list[dict[str, Any]]], None],
    shared_caches: bool = False,
) -> list[dict[str, Any]]:
    """Each case; `found` is called with all results so far after each.

    What would begin after `deadline` (seconds of the epoch) is left out, and said to be.
    """
    results: list[dict[str, Any]] = []
    for case in cases:
        left = deadline - time.time()
        if left < 20:
            results.append({**case, "failed": "left out: the time is up", "stderr": ""})
        else:
            results.append(run_case(module, case, work, min(limit, left), shared_caches))
        print(summary(results[-1]), flush=True)
        found(results)
    return results


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal; what a failed case wrote stands below it."""
    if "failed" in result:
        return f"{result['name']}: FAILED, {result['failed']}\n{result['stderr']}"
    told = {
        key: round(result[key], 3) if isinstance(result[key], float) else result[key]
        for key in TOLD
        if key in result
    }
    return f"{result['name']}: {json.dumps(told)}"


def write_result(case: dict[str, Any], figures: dict[str, Any]) -> None:
    """By the case's process, when it is done."""
    Path(case["result"]).write_text(json.dumps(figures), "utf-8")


def write_results(out: Path, results: list[dict[str, Any]], report: str) -> None:
    """The report, and beside it the figures that it is made of."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    out.write_text(report, "utf-8")
