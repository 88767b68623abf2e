"""What is made of something else is what it is made of: the chart, its README, and the manifests."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import helm.documented
import helm.exit_codes
import helm.generate
import helm.readme
import helm.schema
from helm.documented import documented
from helm.exit_codes import pod_failure_policy, table
from helm.generate import CHART, CHART_FILES, ROOT, main
from helm.values_file import read_values
from jobs import __version__, errors
from jobs.errors import LorajobError
from jobs.observe.termination import DEFAULT
from jobs.spec import Limits, json_schema
from tests.deploy.conftest import Object, Rendered

KINDS: list[type[LorajobError]] = [LorajobError, *LorajobError.__subclasses__()]
CODES = {kind.exit_code for kind in KINDS if kind.__module__ == errors.__name__}


def test_nothing_is_stale(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", CHART_FILES, ids=lambda path: path.name)
def test_the_chart_is_not_stale(path: Path) -> None:
    """What needs no helm to be known."""
    assert path.read_text("utf-8") == CHART_FILES[path]()


# --- a change of any source is found -----------------------------------------------------------


@pytest.fixture(scope="module")
def before(tools: Path) -> set[str]:
    """What is stale as it is: `test_nothing_is_stale` says so, and these tests are of something else."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(check=True)
    return {line.split()[0] for line in out.getvalue().splitlines()}


Stale = Callable[[], set[str]]


@pytest.fixture
def stale(tools: Path, before: set[str], capsys: pytest.CaptureFixture[str]) -> Stale:
    """The files that a change has made stale."""

    def found() -> set[str]:
        assert main(check=True) == 1
        return {line.split()[0] for line in capsys.readouterr().out.splitlines()} - before

    return found


def test_another_action_is_found(stale: Stale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(helm.exit_codes.ACTIONS, errors.ServiceError, "FailJob")
    assert stale() == {
        "helm/lorajob/templates/_generated.tpl", "helm/lorajob/README.md",
    }  # fmt: skip


def test_another_code_is_found(stale: Stale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.VerificationError, "exit_code", 7)
    assert "helm/lorajob/templates/_generated.tpl" in stale()


def test_an_error_that_kubernetes_knows_nothing_of_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NewError(LorajobError):
        exit_code = 7

    monkeypatch.setattr(errors, "NewError", NewError, raising=False)
    with pytest.raises(LookupError, match="NewError"):
        table()


def test_another_comment_is_found(
    stale: Stale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "values.yaml"
    changed.write_text(
        (CHART / "values.yaml").read_text().replace("# The LocalQueue;", "# A LocalQueue;")
    )
    monkeypatch.setattr(helm.documented, "VALUES", changed)
    assert stale() == {"helm/lorajob/values.schema.json", "helm/lorajob/README.md"}


def test_another_spec_is_found(stale: Stale, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = json_schema()
    schema["properties"]["new"] = {"type": "string"}
    monkeypatch.setattr(helm.schema, "spec_schema", lambda: schema)
    assert stale() == {"helm/lorajob/values.schema.json"}


def test_another_version_is_found(stale: Stale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helm.generate, "__version__", "9.8.7")
    found = stale()
    assert {
        "helm/lorajob/Chart.yaml",
        "k8s/overlays/cpu/job.yaml",
        "k8s/kustomization.yaml",
    } <= found


def test_other_manifests_are_found(stale: Stale, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helm.generate, "PLAIN", {"job": {"backoffLimit": 9}})
    assert stale() == {"k8s/base/job.yaml"}


# --- and what it says is true ------------------------------------------------------------------


def verdict(policy: Object, code: int, disrupted: bool = False) -> str:
    """What Kubernetes does about a pod, by its rules for a podFailurePolicy: the first that fits."""
    for rule in policy["rules"]:
        if "onPodConditions" in rule:
            if disrupted and rule["onPodConditions"] == [
                {"type": "DisruptionTarget", "status": "True"}
            ]:
                return str(rule["action"])
        elif code in rule["onExitCodes"]["values"]:
            assert rule["onExitCodes"]["operator"] == "In"
            return str(rule["action"])
    return "Count"


EXPECTED = {  # the README's table of exit codes, as Kubernetes sees it
    1: "Count", 2: "FailJob", 3: "FailJob", 4: "FailJob", 5: "FailJob", 6: "FailJob", 10: "Count",
    20: "Ignore",
}  # fmt: skip


def test_each_exit_code_does_what_it_means(matrix: dict[str, Rendered]) -> None:
    assert set(EXPECTED) == CODES
    for rendered in matrix.values():
        policy = rendered.job["spec"]["podFailurePolicy"]
        assert policy == pod_failure_policy("lorajob")
        assert {code: verdict(policy, code) for code in CODES} == EXPECTED
        # Killed for its memory, or by a signal before there was anything to keep.
        assert verdict(policy, 137) == verdict(policy, 143) == "Count"
        # A drained node is never the run's fault, not even when it kills it.
        assert {verdict(policy, code, disrupted=True) for code in (*CODES, 137, 143)} == {"Ignore"}
        names = {r["onExitCodes"]["containerName"] for r in policy["rules"] if "onExitCodes" in r}
        assert names == {rendered.container["name"]}


def test_the_job_may_have_the_policy(matrix: dict[str, Rendered]) -> None:
    """Kubernetes takes a podFailurePolicy only with these, and the schemas do not say so."""
    for rendered in matrix.values():
        assert rendered.pod["restartPolicy"] == "Never"
        assert rendered.job["spec"]["podReplacementPolicy"] == "Failed"
        for rule in rendered.job["spec"]["podFailurePolicy"]["rules"]:
            values = rule.get("onExitCodes", {}).get("values", [])
            assert values == sorted(set(values)) and 0 not in values


def test_the_pages_name_every_exit_code() -> None:
    for page in (ROOT / "README.md", CHART / "README.md"):
        rows = re.findall(r"(?m)^\| (\d+) \| ", page.read_text())
        assert set(map(int, rows)) - {0} == CODES, page


def test_the_pod_ends_as_the_run_does(matrix: dict[str, Rendered]) -> None:
    for name, rendered in matrix.items():
        limits = rendered.values["spec"].get("limits", {})
        wanted = limits.get("grace_seconds", Limits().grace_seconds)
        assert rendered.pod["terminationGracePeriodSeconds"] == wanted, name
        assert rendered.container["terminationMessagePath"] == str(DEFAULT)


def test_defaults_and_types_are_of_the_same_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    missing = []

    def compare(value: Any, part: Object, path: str) -> None:
        if "properties" in part and path != "spec":
            if set(part["properties"]) - {"global"} != set(value):
                missing.append((path, sorted(set(part["properties"]) ^ set(value))))
            assert set(part["required"]) == set(value), path
            for name, inner in value.items():
                compare(inner, part["properties"][name], f"{path}.{name}".lstrip("."))

    compare(read_values(CHART / "values.yaml"), schema, "")
    assert missing == []
    for value in documented():
        assert value.text.endswith((".", "`.")), f"{value.path}: {value.text}"


def test_the_spec_within_is_the_spec() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    own = json_schema()
    assert set(schema["$defs"]["spec"]["properties"]) == set(own["properties"])
    for name, part in own["$defs"].items():
        within = schema["$defs"][f"spec.{name}"]
        assert set(within["properties"]) == set(part["properties"])
        assert within.get("required") == part.get("required")
        assert within["additionalProperties"] is False


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_image_is_what_the_pod_takes_it_for(matrix: dict[str, Rendered]) -> None:
    """Folders, user and entrypoint of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text()
    env = dict(re.findall(r"(?m)^\s*(?:ENV )?([A-Z_]+)=(\S+)", text))
    rendered = matrix["minimal"]
    given = {e["name"]: e["value"] for e in rendered.container["env"]}
    for name in ("LORAJOB_WORK", "LORAJOB_CACHE"):
        assert env[name] == given[name]
    mounts = {mount["mountPath"] for mount in rendered.container["volumeMounts"]}
    # Everything that the image writes to is a volume, for the rest is read-only.
    folders = {name: value for name, value in env.items() if value.startswith("/")}
    read_only = {"PATH", "LORAJOB_LLAMA_CPP"}
    for name, folder in folders.items():
        written = any(folder == mount or folder.startswith(f"{mount}/") for mount in mounts)
        assert written != (name in read_only), f"{name}={folder}"
    user = re.search(r"(?m)^USER (\d+):(\d+)", text)
    context = rendered.pod["securityContext"]
    assert user and (context["runAsUser"], context["runAsGroup"]) == tuple(map(int, user.groups()))
    assert "entrypoint.py" in (re.search(r"(?m)^ENTRYPOINT .*", text) or [""])[0]
    assert rendered.container["args"] == ["run"]
    assert "command" not in rendered.container
