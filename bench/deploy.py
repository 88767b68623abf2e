"""The chart under the clock, and under checkov: what `helm template` and validation take, and what a
scanner that knows the chart's business not at all finds in it.

    .venv/bin/python -m bench.deploy      writes bench/results/deploy.md

checkov is looked for on PATH (`pipx install checkov==3.3.30`); without it its table is left out.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from helm.binaries import binaries
from helm.generate import CHART, ROOT
from tests.deploy.kubernetes import VERSIONS, invalid

RESULT = ROOT / "bench" / "results" / "deploy.md"
TRIES = 5
# What it would take, or why it is as it is.
REASONS = {
    "CKV2_K8S_6": "`network.policy: true`",
    "CKV_K8S_8": "the check's pod, which serves nothing and ends by itself",
    "CKV_K8S_9": "the same",
    "CKV_K8S_11": "`resources.limits.cpu`; a limit slows down what feeds the GPU",
    "CKV_K8S_15": "`image.pullPolicy: Always`",
    "CKV_K8S_21": "the namespace is named when it is installed",
    "CKV_K8S_40": "the image's user is 1000; `security.uid: 10001`",
    "CKV_K8S_43": "`image.digest`",
}


def template(values: Path) -> tuple[float, str]:
    """Seconds, the best of some, and the rendering."""
    helm = binaries() / "helm"
    best = float("inf")
    for _ in range(TRIES):
        start = time.monotonic()
        done = subprocess.run(
            [helm, "template", "r", CHART, "-f", values], check=True, capture_output=True, text=True
        )
        best = min(best, time.monotonic() - start)
    return best, done.stdout


def checked(text: str) -> tuple[int, dict[str, list[str]]]:
    """How many of checkov's checks pass, and which fail for which kinds of objects."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(
            ["checkov", "-f", file.name, "--framework", "kubernetes", "--skip-download", "-o", "json"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    failed = defaultdict(set)
    for its in report["results"]["failed_checks"]:
        failed[f"{its['check_id']} {its['check_name']}"].add(its["resource"].split(".")[0])
    return report["summary"]["passed"], {name: sorted(kinds) for name, kinds in failed.items()}


def main() -> None:
    rows, total, texts = [], 0.0, {}
    for values in sorted((CHART / "ci").glob("*.yaml")):
        seconds, text = template(values)
        texts[values.stem] = text
        objects = [its for its in yaml.safe_load_all(text) if its]
        versions = [v for v in VERSIONS if values.stem != "dra" or int(v[2:]) >= 31]
        start = time.monotonic()
        found = sum(len(invalid(objects, version)) for version in versions)
        validation = time.monotonic() - start
        total += seconds + validation
        rows.append((values.stem, len(objects), seconds, validation, len(versions), found))
    lines = [
        "# The chart's times, and what a scanner says",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, helm 4.1.4: `python -m bench.deploy`",
        "",
        f"`helm template` (best of {TRIES}) and strict validation by Kubernetes' schemas {VERSIONS[0]} to {VERSIONS[-1]}, for each file of `helm/lorajob/ci`:",
        "",
        "| values | objects | template, s | validation, s | versions | refused |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {n} | {o} | {s:.2f} | {v:.2f} | {c} | {f} |" for n, o, s, v, c, f in rows),
        f"| **all** | | **{total:.1f} in all** | | | |",
    ]
    if shutil.which("checkov"):
        passed, failed = checked(texts["minimal"])
        lines += [
            "",
            f"checkov on the rendering of `minimal`: {passed} checks pass, these do not:",
            "",
            "| check | of | what it takes |",
            "| --- | --- | --- |",
            *(
                f"| {name} | {', '.join(kinds)} | {REASONS.get(name.split()[0], '')} |"
                for name, kinds in sorted(failed.items())
            ),
        ]
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
