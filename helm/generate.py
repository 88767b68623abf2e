"""Writes what is made of something else: `make charts`; with --check it only says what is stale.

helm/lorajob/Chart.yaml                 versions, from jobs.__version__
helm/lorajob/values.schema.json         from helm/values.py, values.yaml and the spec's models
helm/lorajob/templates/_generated.tpl   from jobs/errors.py, jobs/spec.py, jobs/observe
helm/lorajob/README.md                  from values.yaml and all of these
k8s/                                    from the chart, rendered by the real helm
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from helm.binaries import CannotFetch, binaries
from helm.exit_codes import pod_failure_policy
from helm.readme import readme
from helm.schema import values_schema_json
from helm.values_file import read_values
from jobs import __version__
from jobs.observe.termination import DEFAULT
from jobs.spec import Limits

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "lorajob"
K8S = ROOT / "k8s"
# The plain manifests say what may be there: whoever needs no credentials makes no Secret.
PLAIN = {"credentials": {"env": [{"secret": "lorajob-credentials", "optional": True}]}}
HASHED = re.compile(r"\blorajob-[0-9a-f]{8}\b")


def chart_yaml() -> str:
    text = (CHART / "Chart.yaml").read_text("utf-8")
    text = re.sub(r"(?m)^version: .*", f"version: {__version__}", text)
    return re.sub(r"(?m)^appVersion: .*", f'appVersion: "{__version__}"', text)


def generated_tpl() -> str:
    policy = yaml.safe_dump({"podFailurePolicy": pod_failure_policy("lorajob")}, sort_keys=False)
    parts = {
        "failurePolicy": policy.strip(),
        "terminationMessagePath": str(DEFAULT),
        "defaultGrace": str(Limits().grace_seconds),
    }
    defines = "\n".join(
        f'\n{{{{- define "lorajob.{name}" -}}}}\n{text}\n{{{{- end }}}}'
        for name, text in parts.items()
    )
    return f"{{{{/* Written by `make charts`: edit jobs/ or helm/exit_codes.py. */}}}}\n{defines}\n"


def render(values: dict[str, object], *options: str) -> str:
    """The chart as `helm template lorajob` renders it."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        done = subprocess.run(
            [binaries() / "helm", "template", "lorajob", CHART, "-f", file.name, *options],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def plain(text: str) -> str:
    """A rendering as plain manifests have it: a name without a hash."""
    return HASHED.sub("lorajob", text)


def plain_values(**more: object) -> dict[str, object]:
    return {"spec": read_values(K8S / "base" / "spec.yaml"), **PLAIN, **more}


def versioned() -> Iterator[tuple[Path, str]]:
    """The files of k8s/ that people write and that name lorajob's version."""
    for name in ("kustomization.yaml", "base/kustomization.yaml", "overlays/cpu/job.yaml"):
        path = K8S / name
        yield path, re.sub(r"(?<=\")\d+\.\d+\.\d+(?=\")|(?<=:)\d+\.\d+\.\d+(?=-cpu)", __version__, path.read_text("utf-8"))  # fmt: skip


def manifests() -> Iterator[tuple[Path, str]]:
    """The generated files of k8s/ and their texts."""
    bare = _documents(render(plain_values(), "--no-hooks"))
    more = plain_values(network={"policy": True}, cache={"create": True})
    documents = _documents(render(more, "--no-hooks"))
    yield K8S / "base" / "job.yaml", bare["Job"][0]
    yield K8S / "base" / "serviceaccount.yaml", bare["ServiceAccount"][0]
    yield K8S / "base" / "claim.yaml", bare["PersistentVolumeClaim"][0]
    (cache_claim,) = set(documents["PersistentVolumeClaim"]) - set(bare["PersistentVolumeClaim"])
    yield K8S / "components" / "cache" / "claim.yaml", cache_claim
    (policy,) = documents["NetworkPolicy"]
    yield K8S / "components" / "network-policy" / "networkpolicy.yaml", policy


def _documents(text: str) -> dict[str, list[str]]:
    """The rendered objects' texts by their kind."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^---\n", plain(text)):
        body = re.sub(r"(?m)^# Source: .*\n", "", part).strip()
        if body:
            found.setdefault(yaml.safe_load(body)["kind"], []).append(
                f"# Written by `make charts`, from helm/lorajob.\n{body}\n"
            )
    return found


# In this order: the manifests are rendered from what stands before them.
CHART_FILES: dict[Path, Callable[[], str]] = {
    CHART / "Chart.yaml": chart_yaml,
    CHART / "values.schema.json": values_schema_json,
    CHART / "templates" / "_generated.tpl": generated_tpl,
    CHART / "README.md": readme,
}


def main(check: bool) -> int:
    stale = []

    def put(path: Path, text: str) -> None:
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(text, "utf-8")

    for path, make in CHART_FILES.items():
        put(path, make())
    try:
        for path, text in (*versioned(), *manifests()):
            put(path, text)
    except CannotFetch as error:
        print(f"k8s/ is not looked at: {error}", file=sys.stderr)
        return 1
    for name in stale:
        print(f"{name} is stale: make charts" if check else f"{name} written")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
