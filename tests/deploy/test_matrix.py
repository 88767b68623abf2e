"""Every file of helm/lorajob/ci lints, renders, and is what Kubernetes and its strictest profile take."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helm.generate import CHART
from jobs.spec import Spec
from jobs.spec_source import load_spec
from tests.deploy.conftest import VALUES, Helm, Object, Render, Rendered, pod_specs
from tests.deploy.kubernetes import VERSIONS, invalid
from tests.deploy.pod_security import violations

NAMES = [path.stem for path in VALUES]
WANTED = {
    "minimal", "everything", "kueue", "cpu", "air-gapped", "byo-pvc", "s3-irsa", "hub-token", "dra",
}  # fmt: skip
DRA = {version for version in VERSIONS if int(version[2:]) >= 31}  # has its fields; GA from 1.34 on

each = pytest.mark.parametrize("name", NAMES)


def test_the_matrix_is_whole() -> None:
    assert set(NAMES) == WANTED


@pytest.mark.parametrize("path", VALUES, ids=NAMES)
def test_lints(path: Path, helm: Helm) -> None:
    done = helm("lint", CHART, "--strict", "-f", path)
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_is_valid_in_every_version(name: str, matrix: dict[str, Rendered]) -> None:
    versions = sorted(DRA) if name == "dra" else VERSIONS
    found = {version: invalid(matrix[name].objects, version) for version in versions}
    assert not any(found.values()), found


def test_validation_is_strict(matrix: dict[str, Rendered]) -> None:
    job = copy.deepcopy(matrix["minimal"].job)
    job["spec"]["template"]["spec"]["containers"][0]["imagePullPolicie"] = "Always"
    assert all(invalid([job], version) for version in VERSIONS)


@each
def test_passes_pod_security_restricted(name: str, matrix: dict[str, Rendered]) -> None:
    pods = pod_specs(matrix[name].objects)
    assert len(pods) == 2  # the run, and its check
    for pod in pods:
        assert violations(pod) == []
        # What the profile does not ask for, and the chart gives.
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert "add" not in container["securityContext"]["capabilities"]


BREACHES: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "root": (("securityContext", "runAsUser"), 0),
    "may be root": (("securityContext", "runAsNonRoot"), False),
    "no seccomp": (("securityContext", "seccompProfile"), {"type": "Unconfined"}),
    "host network": (("hostNetwork",), True),
    "host processes": (("hostPID",), True),
    "host path": (("volumes", 0), {"name": "host", "hostPath": {"path": "/"}}),
    "nfs": (("volumes", 0), {"name": "nfs", "nfs": {"server": "x", "path": "/"}}),
    "privileged": (("containers", 0, "securityContext", "privileged"), True),
    "escalation": (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True),
    "escalation unset": (("containers", 0, "securityContext"), {"capabilities": {"drop": ["ALL"]}}),
    "capability": (("containers", 0, "securityContext", "capabilities", "add"), ["SYS_PTRACE"]),
    "none dropped": (("containers", 0, "securityContext", "capabilities"), {}),
    "host port": (("containers", 0, "ports"), [{"containerPort": 1, "hostPort": 1}]),
    "own root": (("containers", 0, "securityContext", "runAsUser"), 0),
    "unmasked": (("containers", 0, "securityContext", "procMount"), "Unmasked"),
    "sysctl": (("securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}]),
    "selinux": (("securityContext", "seLinuxOptions"), {"type": "spc_t"}),
    "apparmor": (("securityContext", "appArmorProfile"), {"type": "Unconfined"}),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_the_profile_refuses(breach: str, matrix: dict[str, Rendered]) -> None:
    pod = copy.deepcopy(matrix["everything"].pod)
    path, value = BREACHES[breach]
    inner: Any = pod
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert violations(pod)


@each
def test_names_nothing_twice(name: str, matrix: dict[str, Rendered]) -> None:
    for pod in pod_specs(matrix[name].objects):
        (container,) = pod["containers"]
        names = {
            "env": [env["name"] for env in container["env"]],
            "volumes": [volume["name"] for volume in pod["volumes"]],
            "mounts": [mount["mountPath"] for mount in container["volumeMounts"]],
        }
        for kind, found in names.items():
            assert [name for name, count in Counter(found).items() if count > 1] == [], kind
        assert {mount["name"] for mount in container["volumeMounts"]} == set(names["volumes"])
    kept = Counter((its["kind"], its["metadata"]["name"]) for its in matrix[name].objects)
    assert max(kept.values()) == 1


@each
def test_every_name_that_is_used_is_there(name: str, matrix: dict[str, Rendered]) -> None:
    """Whatever a pod refers to is made by the release, or was named in its values."""
    rendered = matrix[name]
    made = {its["metadata"]["name"] for its in rendered.objects}
    given = set(_texts(rendered.values))
    for pod in pod_specs(rendered.objects):
        assert set(_references(pod)) <= made | given


def _references(pod: Object) -> Iterator[str]:
    yield pod["serviceAccountName"]
    for volume in pod["volumes"]:
        if "configMap" in volume:
            yield volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield volume["persistentVolumeClaim"]["claimName"]
    for source in pod["containers"][0].get("envFrom", []):
        yield source["secretRef"]["name"]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@each
def test_the_run_reads_the_spec_that_was_given(
    name: str, matrix: dict[str, Rendered], tmp_path: Path
) -> None:
    """Through Helm's YAML and back: numbers, nulls and dates stay what they are."""
    config = matrix[name].one("ConfigMap")
    path = tmp_path / "spec.yaml"
    path.write_text(config["data"]["spec.yaml"])
    assert load_spec(str(path), {}) == Spec.model_validate(matrix[name].values["spec"])
    assert matrix[name].pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]


def test_the_whole_matrix_in_seconds(render: Render) -> None:
    """Every file rendered and validated for the oldest and the newest version."""
    begin = time.monotonic()
    for path in VALUES:
        rendered = render(path)
        versions = (VERSIONS[0] if path.stem != "dra" else "1.34", VERSIONS[-1])
        assert not any(invalid(rendered.objects, version) for version in versions)
    assert time.monotonic() - begin < 20
