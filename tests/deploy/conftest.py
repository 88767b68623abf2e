"""The real helm and kubectl, and the chart rendered with each of its ci/ values."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from helm.binaries import CannotFetch, binaries
from helm.generate import CHART
from helm.values_file import read_values

Object = dict[str, Any]
Helm = Callable[..., subprocess.CompletedProcess[str]]

VALUES = sorted((CHART / "ci").glob("*.yaml"))


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder of the real helm and kubectl.

    Skips where they cannot be had, unless LORAJOB_REQUIRE (`helm,...`) says that they must.
    """
    try:
        return binaries()
    except CannotFetch as error:
        if "helm" in os.environ.get("LORAJOB_REQUIRE", "").split(","):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def helm(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm, which neither knows nor finds a cluster."""
    home = tmp_path_factory.mktemp("helm")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        env = {"HOME": str(home), "PATH": os.environ["PATH"], "KUBECONFIG": str(home / "none")}
        return subprocess.run(
            [tools / "helm", *arguments],
            check=False,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@dataclass(frozen=True)
class Rendered:
    values: dict[str, Any]
    objects: list[Object]

    def one(self, kind: str) -> Object:
        (found,) = [o for o in self.objects if o["kind"] == kind]
        return found

    @property
    def job(self) -> Object:
        return self.one("Job")

    @property
    def pod(self) -> Object:
        """The spec of the run's pod."""
        spec: Object = self.job["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        (container,) = self.pod["containers"]
        return dict(container)


Render = Callable[..., Rendered]


@pytest.fixture(scope="session")
def render(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """The chart as `helm template` renders it with these values, or with a file of them."""
    folder = tmp_path_factory.mktemp("values")

    def run(given: Path | dict[str, Any], release: str = "r", *options: str) -> Rendered:
        if isinstance(given, Path):
            path, values = given, read_values(given)
        else:
            path, values = folder / "values.json", given
            path.write_text(json.dumps(values))
        done = helm("template", release, CHART, "-f", path, *options)
        assert done.returncode == 0, done.stderr
        return Rendered(values, [o for o in yaml.safe_load_all(done.stdout) if o])

    return run


@pytest.fixture(scope="session")
def matrix(render: Render) -> dict[str, Rendered]:
    """The rendering of each of the chart's ci/ values, by the file's name."""
    return {path.stem: render(path) for path in VALUES}


def pod_specs(objects: list[Object]) -> list[Object]:
    """The specs of all pods that these objects make."""
    found = []
    for its in objects:
        if its["kind"] == "Pod":
            found.append(its["spec"])
        elif its["kind"] == "Job":
            found.append(its["spec"]["template"]["spec"])
    return found
