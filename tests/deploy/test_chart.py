"""What the chart makes of its values."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from helm.documented import documented
from helm.generate import CHART
from helm.sizes import work_gib
from helm.values_file import read_values
from jobs.spec import Spec
from tests.deploy.conftest import Helm, Object, Render, Rendered, pod_specs
from tests.deploy.kubernetes import VERSIONS, invalid
from tests.deploy.pod_security import violations

MINIMAL = read_values(CHART / "ci" / "minimal.yaml")
PUBLISHING = {**MINIMAL, "spec": {**MINIMAL["spec"], "publish": ["s3://models/x"]}}


def changed(path: str, value: Any, values: dict[str, Any] = MINIMAL) -> dict[str, Any]:
    values = copy.deepcopy(values)
    inner = values
    *sections, last = path.split(".")
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return values


# --- names -------------------------------------------------------------------------------------

# What a Job's template may be changed by, and what the API lets change on a Job that is there.
NEW_RUN = {
    "spec.train": {"epochs": 2}, "image.tag": "9.9.9", "gpu.count": 2, "work.kind": "claim2",
    "resources.requests.cpu": "8", "credentials.env": [{"secret": "a"}], "extra.labels": {"a": "b"},
    "security.uid": 7, "tmp.sizeGi": 9, "extra.env": [{"name": "A", "value": "b"}],
}  # fmt: skip
SAME_RUN = {
    "job.backoffLimit": 9, "job.deadlineSeconds": 60, "job.ttlSeconds": -1, "job.suspend": True,
    "extra.annotations": {"a": "b"}, "network.policy": True, "kueue.queue": "gpus",
    "work.sizeGi": 500, "serviceAccount.annotations": {"a": "b"},
}  # fmt: skip


def name(render: Render, values: dict[str, Any]) -> str:
    return str(render(values).job["metadata"]["name"])


@pytest.mark.parametrize("path", NEW_RUN)
def test_what_a_job_cannot_change_makes_another(path: str, render: Render) -> None:
    value = NEW_RUN[path]
    values = changed(path, value)
    if path == "work.kind":
        values = changed("work.existingClaim", "other")
    assert name(render, values) != name(render, MINIMAL)


@pytest.mark.parametrize("path", SAME_RUN)
def test_what_it_can_change_leaves_it_be(path: str, render: Render) -> None:
    """The name stays, and so does all that the API would refuse to change."""
    before, after = render(MINIMAL), render(changed(path, SAME_RUN[path]))
    assert before.job["metadata"]["name"] == after.job["metadata"]["name"]
    for part in ("template", "podFailurePolicy", "completions"):
        assert before.job["spec"][part] == after.job["spec"][part]
    assert before.one("ConfigMap")["data"] == after.one("ConfigMap")["data"]


def test_the_same_values_give_the_same_names(render: Render) -> None:
    assert name(render, MINIMAL) == name(render, copy.deepcopy(MINIMAL))
    assert re.fullmatch(r"r-[0-9a-f]{8}", name(render, MINIMAL))


@pytest.mark.parametrize("release", ["1", "1e3", "true", "a.b", "r" * 53])
def test_any_release_name_will_do(release: str, render: Render) -> None:
    """Also one that YAML would take for a number or a truth value, and the longest that Helm takes."""
    rendered = render(MINIMAL, release)
    assert invalid(rendered.objects, VERSIONS[-1]) == []
    for its in rendered.objects:
        assert isinstance(its["metadata"]["name"], str)
    assert len(rendered.job["metadata"]["name"]) <= 63  # it becomes a label's value


def test_two_releases_share_nothing(render: Render) -> None:
    names = [
        {(o["kind"], o["metadata"]["name"]) for o in render(MINIMAL, release).objects}
        for release in ("one", "two")
    ]
    assert not names[0] & names[1]


# --- GPU ---------------------------------------------------------------------------------------


def test_a_gpu_is_asked_for(matrix: dict[str, Rendered]) -> None:
    rendered = matrix["minimal"]
    for kind in ("requests", "limits"):
        assert rendered.container["resources"][kind]["nvidia.com/gpu"] == 1
    assert rendered.pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


def test_none_is_asked_for_without_one(matrix: dict[str, Rendered]) -> None:
    text = json.dumps(matrix["cpu"].objects)
    assert "nvidia" not in text
    assert matrix["cpu"].container["image"].endswith("-cpu")


def test_the_check_takes_no_gpu(matrix: dict[str, Rendered]) -> None:
    for its in matrix.values():
        check = its.one("Pod")["spec"]
        (container,) = check["containers"]
        assert not re.search(r"/(gpu|mig)", json.dumps(container["resources"]))
        assert "resourceClaims" not in check and "runtimeClassName" not in check
        assert container["args"] == ["check"]
        # But for that it is the run's pod: same image, volumes, credentials and user.
        run = its.container
        for part in ("image", "env", "volumeMounts", "securityContext"):
            assert container[part] == run[part]
        assert container.get("envFrom") == run.get("envFrom")
        for part in ("volumes", "securityContext", "serviceAccountName"):
            assert check[part] == its.pod[part]
        assert its.one("Pod")["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_only_nodes_with_the_right_gpu(matrix: dict[str, Rendered]) -> None:
    affinity = matrix["everything"].pod["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    product, memory = term["matchExpressions"]
    assert product["values"] == ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"]
    # Kubernetes knows "greater than" alone.
    assert (memory["operator"], memory["values"]) == ("Gt", ["39999"])


def test_a_gpu_by_a_claim(matrix: dict[str, Rendered]) -> None:
    pod, container = matrix["dra"].pod, matrix["dra"].container
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-h100"}]
    assert container["resources"]["claims"] == [{"name": "gpu", "request": "gpu"}]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


# --- disk --------------------------------------------------------------------------------------


def volume(pod: Object, name: str) -> Object:
    (found,) = [v for v in pod["volumes"] if v["name"] == name]
    return {key: value for key, value in found.items() if key != "name"}


def test_a_claim_is_made_and_kept(matrix: dict[str, Rendered]) -> None:
    claim = matrix["minimal"].one("PersistentVolumeClaim")
    assert volume(matrix["minimal"].pod, "work") == {
        "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}
    }
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["resources"]["requests"]["storage"] == "80Gi"


def test_claims_that_exist_are_used(matrix: dict[str, Rendered]) -> None:
    its = matrix["byo-pvc"]
    assert not [o for o in its.objects if o["kind"] in ("PersistentVolumeClaim", "ServiceAccount")]
    assert volume(its.pod, "work")["persistentVolumeClaim"]["claimName"] == "runs"
    assert volume(its.pod, "cache")["persistentVolumeClaim"]["claimName"] == "bases"
    for user in ("runAsUser", "runAsGroup", "fsGroup"):
        assert user not in its.pod["securityContext"]


def test_a_volume_that_goes_with_the_pod(matrix: dict[str, Rendered]) -> None:
    template = volume(matrix["kueue"].pod, "work")["ephemeral"]["volumeClaimTemplate"]
    assert template["spec"]["resources"]["requests"]["storage"] == "40Gi"


def test_the_nodes_disk_is_asked_for(matrix: dict[str, Rendered]) -> None:
    """All that is written to it: temporary files, logs, and the run's folder where it is there."""
    disk = {
        name: {
            kind: its.container["resources"][kind]["ephemeral-storage"]
            for kind in ("requests", "limits")
        }
        for name, its in matrix.items()
    }
    assert disk["minimal"] == {"requests": "9Gi", "limits": "9Gi"}
    assert disk["s3-irsa"] == {"requests": "79Gi", "limits": "79Gi"}
    assert volume(matrix["s3-irsa"].pod, "work") == {"emptyDir": {"sizeLimit": "70Gi"}}


def test_the_cache_is_beside_the_run_unless_it_has_its_own(matrix: dict[str, Rendered]) -> None:
    mounts = {
        name: next(m for m in its.container["volumeMounts"] if m["mountPath"] == "/cache")
        for name, its in matrix.items()
    }
    assert mounts["minimal"] == {"name": "work", "mountPath": "/cache", "subPath": ".cache"}
    assert mounts["air-gapped"] == {"name": "cache", "mountPath": "/cache"}


def test_the_default_size_holds_what_the_page_says() -> None:
    default = next(value.default for value in documented() if value.path == "work.sizeGi")
    assert work_gib("Llama-3.1-8B", {"gguf": ["q8_0", "q4_k_m"]}) <= default


# --- credentials, network, queue -----------------------------------------------------------------


def test_secrets_are_only_named(matrix: dict[str, Rendered]) -> None:
    env = matrix["hub-token"].container["env"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}},
    } in env
    for its in matrix.values():
        assert not [o for o in its.objects if o["kind"] == "Secret"]


def test_a_role_needs_no_secret(matrix: dict[str, Rendered]) -> None:
    account = matrix["s3-irsa"].one("ServiceAccount")
    assert account["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/lorajob"
    }
    assert matrix["s3-irsa"].pod["serviceAccountName"] == account["metadata"]["name"]
    assert "secret" not in json.dumps(matrix["s3-irsa"].pod).lower()


def test_no_network_at_all(matrix: dict[str, Rendered]) -> None:
    policy = matrix["air-gapped"].one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy and "egress" not in policy


@pytest.mark.parametrize("case", ["minimal", "everything", "air-gapped"])
def test_the_policy_is_of_the_run_and_its_check(case: str, matrix: dict[str, Rendered]) -> None:
    its = matrix[case]
    policies = [o for o in its.objects if o["kind"] == "NetworkPolicy"]
    assert len(policies) == (case != "minimal")
    labels = [
        its.job["spec"]["template"]["metadata"]["labels"],
        its.one("Pod")["metadata"]["labels"],
    ]
    for policy in policies:
        selector = policy["spec"]["podSelector"]["matchLabels"]
        assert all(selector.items() <= of_pod.items() for of_pod in labels)


def test_ports_of_the_specs_servers_are_open(matrix: dict[str, Rendered]) -> None:
    egress = matrix["everything"].one("NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for port in egress[1]["ports"]] == [443, 8443, 9000, 80]


def test_a_queue_starts_it(matrix: dict[str, Rendered]) -> None:
    job = matrix["kueue"].job
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "batch-low"
    assert job["spec"]["suspend"] is True
    assert "suspend" not in matrix["minimal"].job["spec"]
    # The check doesn't wait for a quota.
    assert "kueue" not in json.dumps(matrix["kueue"].one("Pod"))


def test_metrics_are_scraped_where_the_spec_serves_them(matrix: dict[str, Rendered]) -> None:
    its = matrix["s3-irsa"]
    assert its.container["ports"] == [{"name": "metrics", "containerPort": 9400}]
    assert its.job["spec"]["template"]["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true", "prometheus.io/port": "9400", "prometheus.io/path": "/metrics",
    }  # fmt: skip
    (check,) = its.one("Pod")["spec"]["containers"]
    assert "ports" not in check and "ports" not in matrix["minimal"].container
    assert "annotations" not in matrix["minimal"].job["spec"]["template"]["metadata"]
    # Not annotated, and still let in.
    its = matrix["everything"]
    assert "prometheus" not in json.dumps(its.job)
    (rule,) = its.one("NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": 9100, "protocol": "TCP"}]


# --- notes ---------------------------------------------------------------------------------------


def notes(helm: Helm, tmp_path: Path, values: dict[str, Any]) -> str:
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    done = helm("install", "my", CHART, "-n", "ml", "-f", path, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:\n")[2]


def test_notes_say_how_to_watch_fetch_and_clean_up(helm: Helm, tmp_path: Path) -> None:
    said = notes(helm, tmp_path, MINIMAL)
    job = re.search(r"the Job (my-[0-9a-f]{8})\.", said)
    assert job
    for line in (
        f"kubectl -n ml logs --follow job/{job[1]}",
        "kubectl -n ml cp my-fetch:/work/runs/minimal minimal",
        "helm -n ml uninstall my",
        "kubectl -n ml delete pvc my-work",
    ):
        assert line in said
    pod = re.search(r"(?s)echo '(\{.*?\})' \| kubectl -n ml apply -f -", said)
    assert pod
    made = yaml.safe_load(pod[1])
    assert invalid([made], VERSIONS[-1]) == []
    assert [violations(spec) for spec in pod_specs([made])] == [[]]


def test_notes_say_where_it_is_published(helm: Helm, tmp_path: Path) -> None:
    values = changed("work.kind", "emptyDir", PUBLISHING)
    values["spec"]["publish"].append({"hub": "acme/x"})
    said = notes(helm, tmp_path, values)
    assert "\n  s3://models/x\n  hub: acme/x\n" in said
    assert "kubectl -n ml cp" not in said and "delete pvc" not in said


def test_notes_say_how_to_start_what_is_suspended(helm: Helm, tmp_path: Path) -> None:
    said = notes(helm, tmp_path, changed("job.suspend", True))
    assert "helm -n ml test my --logs" in said and "--set job.suspend=false" in said


@pytest.mark.parametrize(
    ("publish", "checkpoints", "kind", "warned"),
    [
        ([{"hub": "a/b"}], {}, "ephemeral", True),
        (["hub://a/b"], {}, "emptyDir", True),
        ([{"hub": "a/b"}], {"to": "s3://c/d"}, "ephemeral", False),
        ([{"hub": "a/b"}, "s3://c/d"], {}, "ephemeral", False),
        ([{"hub": "a/b"}], {}, "claim", False),
    ],
)
def test_notes_warn_of_checkpoints_that_go_with_the_pod(
    publish: list[Any],
    checkpoints: dict[str, str],
    kind: str,
    warned: bool,
    helm: Helm,
    tmp_path: Path,
) -> None:
    spec = {**MINIMAL["spec"], "publish": publish, "checkpoints": checkpoints}
    said = notes(helm, tmp_path, {"spec": spec, "work": {"kind": kind}})
    assert ("spec.checkpoints.to" in said) == warned


# --- the pages -----------------------------------------------------------------------------------


def test_the_readmes_example_renders(render: Render) -> None:
    text = (CHART / "README.md").read_text()
    example = re.search(r"(?s)```yaml\n(.*?)```", text)
    assert example
    values = yaml.safe_load(example[1])
    Spec.model_validate(values["spec"])
    assert render(values).job


def test_every_value_is_on_the_page() -> None:
    text = (CHART / "README.md").read_text()
    for value in documented():
        assert f"`{value.path}`" in text or value.is_section, value.path


def test_a_value_without_a_comment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"line 3: b\.d has no comment"):
        documented("# A section.\nb:\n  d: 1\n")
