"""A release from its installation to its end, by the real helm and kubectl against a double of the API
server, which refuses what Kubernetes refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any

import pytest

from helm.generate import CHART, K8S, ROOT
from tests.deploy.api_server import Cluster, Refused, running
from tests.deploy.conftest import Helm, Rendered

MINIMAL = CHART / "ci" / "minimal.yaml"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running() as found:
        yield found


class Release:
    """`helm` with this release in this cluster."""

    def __init__(self, helm: Helm, cluster: Cluster) -> None:
        self.helm, self.cluster = helm, cluster

    def do(self, command: str, *options: str | Path) -> str:
        done = self.helm(
            command, "my", *options, "-n", "ml", "--kube-apiserver", self.cluster.url
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def upgrade(self, *options: str) -> str:
        return self.do("upgrade", CHART, "--reuse-values", *options)

    @property
    def job(self) -> str:
        (name,) = self.cluster.names("jobs")
        return name


@pytest.fixture
def release(helm: Helm, cluster: Cluster) -> Release:
    its = Release(helm, cluster)
    its.do("install", CHART, "-f", MINIMAL)
    return its


def test_install_makes_one_run(release: Release, cluster: Cluster) -> None:
    assert cluster.names("jobs") == cluster.names("configmaps")
    assert cluster.names("persistentvolumeclaims") == ["my-work"]
    assert cluster.names("serviceaccounts") == ["my"]
    assert cluster.names("pods") == []  # the check is run by `helm test` alone


def test_another_spec_is_another_job_in_place_of_the_old(
    release: Release, cluster: Cluster
) -> None:
    old = release.job
    release.upgrade("--set", "spec.train.epochs=3")
    assert release.job != old
    assert cluster.names("configmaps") == [release.job]
    assert "epochs: 3" in cluster.get("configmaps", release.job)["data"]["spec.yaml"]
    # Its pods go, too: they get SIGTERM, and leave a checkpoint on the claim that stays.
    assert cluster.deleted["jobs", old] == "Background"
    assert ("persistentvolumeclaims", "my-work") not in cluster.deleted


@pytest.mark.parametrize(
    "change", ["image.tag=9.9.9", "gpu.count=2", "resources.limits.memory=32Gi"]
)
def test_whatever_a_job_cannot_change_is_a_new_one(release: Release, change: str) -> None:
    """Without that the upgrade would end with `field is immutable`."""
    old = release.job
    release.upgrade("--set", change)
    assert release.job != old


def test_what_a_job_can_change_is_changed(release: Release, cluster: Cluster) -> None:
    before = cluster.get("jobs", release.job)
    release.upgrade("--set", "job.ttlSeconds=60,job.backoffLimit=9,extra.annotations.a=b")
    after = cluster.get("jobs", release.job)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["ttlSecondsAfterFinished"] == 60
    assert after["spec"]["backoffLimit"] == 9


def test_checked_first_and_then_started(helm: Helm, cluster: Cluster) -> None:
    its = Release(helm, cluster)
    its.do("install", CHART, "-f", MINIMAL, "--set", "job.suspend=true")
    job = cluster.get("jobs", its.job)
    assert job["spec"]["suspend"] is True
    assert "Phase:          Succeeded" in its.do("test")
    (name,) = cluster.names("pods")
    check = cluster.get("pods", name)["spec"]
    assert check["containers"][0]["args"] == ["check"]
    its.upgrade("--set", "job.suspend=false")
    assert cluster.get("jobs", its.job)["metadata"]["uid"] == job["metadata"]["uid"]
    assert not cluster.get("jobs", its.job)["spec"].get("suspend")
    its.do("test")  # and again, beside the run


def test_uninstall_leaves_the_results(release: Release, cluster: Cluster) -> None:
    job = release.job
    said = release.do("uninstall")
    assert "my-work" in said
    assert cluster.names("persistentvolumeclaims") == ["my-work"]
    assert cluster.names("jobs") == cluster.names("configmaps") == []
    assert cluster.deleted["jobs", job] == "Background"
    # The same release again goes on with them.
    release.do("install", CHART, "-f", MINIMAL)
    assert release.job == job


@pytest.mark.parametrize("name", ["everything", "air-gapped", "s3-irsa", "kueue", "dra"])
def test_every_kind_installs(
    name: str, helm: Helm, cluster: Cluster, matrix: dict[str, Rendered]
) -> None:
    Release(helm, cluster).do("install", CHART, "-f", CHART / "ci" / f"{name}.yaml")
    kinds = {(o["kind"]) for o in matrix[name].objects if o["kind"] != "Pod"}
    there = {its["kind"] for its in cluster.objects.values()} - {"Secret"}
    assert there == kinds


def kubectl(
    tools: Path, cluster: Cluster, *arguments: str | Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tools / "kubectl", "--server", cluster.url, "-n", "ml", "--cache-dir", "/dev/null", *arguments],
        check=False, input=stdin, capture_output=True, text=True,
    )  # fmt: skip


def test_template_and_create(helm: Helm, tools: Path, cluster: Cluster) -> None:
    text = helm("template", "my", CHART, "-f", MINIMAL, "--no-hooks").stdout
    done = kubectl(tools, cluster, "create", "-f", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    (job,) = cluster.names("jobs")
    assert f"job.batch/{job} created" in done.stdout
    # The same run is not made twice.
    again = kubectl(tools, cluster, "create", "-f", "-", stdin=text)
    assert again.returncode == 1 and "AlreadyExists" in again.stderr


@pytest.mark.parametrize("folder", [".", "overlays/kueue", "overlays/cpu"])
def test_apply_kustomization(folder: str, tools: Path, cluster: Cluster) -> None:
    done = kubectl(tools, cluster, "apply", "-k", K8S / folder)
    assert done.returncode == 0, done.stderr
    assert cluster.names("jobs") == ["lorajob"]
    again = kubectl(tools, cluster, "apply", "-k", K8S / folder)
    assert again.returncode == 0, again.stderr
    assert "job.batch/lorajob unchanged" in again.stdout


def test_the_double_refuses_what_kubernetes_refuses(release: Release, cluster: Cluster) -> None:
    job = cluster.get("jobs", release.job)
    for path, value, message in (
        (("spec", "template", "spec", "containers", 0, "image"), "other", "field is immutable"),
        (("spec", "unknownField"), 1, "unknownField"),
        (("spec", "template", "spec", "hostNetwork"), True, "restricted"),
        (("spec", "template", "spec", "restartPolicy"), "OnFailure", "restartPolicy"),
    ):
        changed = copy.deepcopy(job)
        inner: Any = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(Refused) as refused:
            cluster.put("jobs", changed)
        assert message in refused.value.message


# --- where helm cannot be had ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("required", "outcome"), [("", 'skipped="1"'), ("ceph,helm", 'errors="1"')]
)
def test_who_requires_helm_gets_a_failure_instead_of_a_skip(
    required: str, outcome: str, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.deploy.conftest import tools\n")
    (tmp_path / "test_it.py").write_text("def test_it(tools): pass\n")
    report = tmp_path / "report.xml"
    env = {
        **environ, "PYTHONPATH": str(ROOT), "LORAJOB_CACHE": str(tmp_path / "cache"),
        "LORAJOB_REQUIRE": required, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, "-c", "/dev/null",
         "-p", "no:cacheprovider", f"--junit-xml={report}", tmp_path],
        check=False, capture_output=True, env=env,
    )  # fmt: skip
    text = report.read_text()
    assert outcome in text
    assert "cannot be fetched" in text
    assert not list((tmp_path / "cache" / "helm").iterdir())  # nothing half-made stays
