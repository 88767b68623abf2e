"""k8s/ and the chart are the same objects, as the real kustomize puts them together."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from helm.generate import CHART, HASHED, K8S, ROOT, plain_values
from helm.values_file import read_values
from jobs.spec import Spec
from jobs.spec_source import load_spec
from tests.deploy.conftest import Object, Render, pod_specs
from tests.deploy.kubernetes import VERSIONS, invalid
from tests.deploy.pod_security import violations

CRDS = Path(os.environ.get("LORAJOB_CRDS") or K8S.parent.parent / "shared" / "crds")
Objects = dict[tuple[str, str], Object]
Build = Callable[[Path], Objects]

CPU = {key: value for key, value in read_values(CHART / "ci" / "cpu.yaml").items() if key != "spec"}
COMPONENTS = {"cache": {"create": True}, "network": {"policy": True}}
# Each with the chart's values that mean the same.
VARIANTS: dict[str, dict[str, Any]] = {
    ".": plain_values(),
    "base": plain_values(),
    "overlays/kueue": plain_values(kueue={"queue": "gpus"}),
    "overlays/cpu": {
        **plain_values(**CPU),
        "spec": read_values(K8S / "overlays" / "cpu" / "spec.yaml"),
    },
    "components": plain_values(**COMPONENTS),
}


@pytest.fixture(scope="session")
def build(tools: Path) -> Build:
    """What `kubectl kustomize` makes of a folder."""

    def run(folder: Path) -> Objects:
        done = subprocess.run(
            [tools / "kubectl", "kustomize", folder], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return by_name(yaml.safe_load_all(done.stdout))

    return run


def by_name(objects: Any) -> Objects:
    return {(its["kind"], its["metadata"]["name"]): its for its in objects if its}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of k8s/ that are applied, and one that has both components."""
    both = tmp_path_factory.mktemp("components")
    relative = os.path.relpath(K8S, both.resolve())
    (both / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [f"{relative}/base"],
                "components": [f"{relative}/components/{n}" for n in ("cache", "network-policy")],
            }
        )
    )
    return {name: both if name == "components" else K8S / name for name in VARIANTS}


def _alike(objects: Objects) -> Objects:
    """Without what has to differ: the hashes of names, and how the spec is written down."""
    config = next(name for kind, name in objects if kind == "ConfigMap")
    found: Objects = {}
    for its in objects.values():
        text = yaml.safe_dump(its).replace(config, "lorajob")
        plain = yaml.safe_load(HASHED.sub("lorajob", text))
        if plain["kind"] == "ConfigMap":
            plain["data"] = {key: _spec(value) for key, value in plain["data"].items()}
        for kind in pod_specs([plain]):
            kind["volumes"].sort(key=lambda its: its["name"])
            kind["containers"][0]["volumeMounts"].sort(key=lambda its: its["mountPath"])
        found[plain["kind"], plain["metadata"]["name"]] = plain
    return found


def _spec(text: str) -> Spec:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_spec(file.name, {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_and_chart_are_the_same_objects(
    variant: str, folders: dict[str, Path], build: Build, render: Render
) -> None:
    rendered = render(VARIANTS[variant], "lorajob", "--no-hooks")
    assert _alike(build(folders[variant])) == _alike(by_name(rendered.objects))


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_are_valid_and_restricted(
    variant: str, folders: dict[str, Path], build: Build
) -> None:
    objects = list(build(folders[variant]).values())
    for version in VERSIONS:
        assert invalid(objects, version) == []
    (pod,) = pod_specs(objects)
    assert violations(pod) == []


def test_the_job_reads_the_spec_that_stands_there(build: Build) -> None:
    """kustomize gives the ConfigMap a name of its content, and the Job has to follow."""
    objects = build(K8S)
    (config,) = [name for kind, name in objects if kind == "ConfigMap"]
    assert re.fullmatch(r"lorajob-[a-z0-9]{10}", config)
    (pod,) = pod_specs(list(objects.values()))
    assert {"name": "spec", "configMap": {"name": config}} in pod["volumes"]
    assert objects["ConfigMap", config]["immutable"] is True


def test_the_example_secret_is_the_one_that_is_looked_for(build: Build) -> None:
    example = yaml.safe_load((K8S / "secret.example.yaml").read_text())
    assert invalid([example], VERSIONS[-1]) == []
    assert not any(example["stringData"].values())
    (pod,) = pod_specs(list(build(K8S).values()))
    (source,) = pod["containers"][0]["envFrom"]
    # The first run needs none.
    assert source == {"secretRef": {"name": example["metadata"]["name"], "optional": True}}


@pytest.mark.parametrize("path", [K8S / "overlays/cpu/spec.yaml", CHART / "ci/cpu.yaml"])
def test_the_smoke_test_needs_nothing_but_the_image(path: Path) -> None:
    values = read_values(path)
    spec = Spec.model_validate(values.get("spec", values))
    copied = re.findall(r"(?m)^COPY (examples/\S+)", (ROOT / "Dockerfile").read_text())
    for place in (spec.model.base, *(source.source for source in spec.data.train)):
        inside = place.removeprefix("/opt/lorajob/")
        assert inside != place and (ROOT / inside).exists()
        assert any(inside == its or inside.startswith(f"{its}/") for its in copied), place
    assert spec.publish == []


# --- Kueue -------------------------------------------------------------------------------------


def _crd(plural: str) -> Object:
    path = CRDS / f"kueue.x-k8s.io_{plural}.yaml"
    if not path.is_file():
        pytest.skip(f"there is no {path}: LORAJOB_CRDS names a folder with Kueue's CRDs")
    found: Object = yaml.safe_load(path.read_text())
    return found


def _closed(schema: Any) -> Any:
    """A CRD's schema, in which a field that it does not name is an error."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if "properties" in made and isinstance(schema.get("type"), str):
        made.setdefault("additionalProperties", False)
    return made


QUEUES = {"ResourceFlavor": "resourceflavors", "ClusterQueue": "clusterqueues", "LocalQueue": "localqueues"}  # fmt: skip


def test_the_example_queues_are_what_kueue_takes(build: Build) -> None:
    objects = list(yaml.safe_load_all((K8S / "overlays/kueue/queues.example.yaml").read_text()))
    assert [its["kind"] for its in objects] == list(QUEUES)
    for its in objects:
        crd = _crd(QUEUES[its["kind"]])
        version = its["apiVersion"].rpartition("/")[2]
        (served,) = [v for v in crd["spec"]["versions"] if v["name"] == version and v["served"]]
        schema = _closed(served["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema.validate(its, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**its, "spec": {"unknownField": 1}}, schema)
    # What the Job asks for is what the queue has, and its label names the queue.
    resources = objects[1]["spec"]["resourceGroups"][0]
    job = build(K8S / "overlays" / "kueue")["Job", "lorajob"]
    (pod,) = pod_specs([job])
    assert set(pod["containers"][0]["resources"]["requests"]) <= set(resources["coveredResources"])
    queue = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert queue == objects[2]["metadata"]["name"]
