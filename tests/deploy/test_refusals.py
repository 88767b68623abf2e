"""Wrong values never reach a cluster, and the message names the place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from helm.documented import documented
from helm.generate import CHART
from helm.values_file import read_values
from tests.deploy.conftest import VALUES, Helm

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
MINIMAL = read_values(CHART / "ci" / "minimal.yaml")
EVERYTHING = read_values(CHART / "ci" / "everything.yaml")
HUB_TOKEN = "hf_" + "aB3dE5gH7j" * 3

Path_ = tuple[str | int, ...]


def refusal(helm: Helm, tmp_path: Path, values: dict[str, Any]) -> str:
    """What `helm template` says instead of rendering these values over the minimal ones."""
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(laid_over(copy.deepcopy(MINIMAL), values)))
    done = helm("template", "r", CHART, "-f", path)
    assert done.returncode != 0, "it was rendered"
    return done.stderr


def laid_over(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        old = values.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        values[key] = laid_over(old, value) if both else value  # type: ignore[arg-type]
    return values


# --- by the schema ---------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a typo at the top": ({"wrok": {}}, "''", "wrok"),
    "a typo in a section": ({"gpu": {"cuont": 2}}, "/gpu", "cuont"),
    "a typo two sections down": ({"resources": {"limits": {"mem": "1Gi"}}}, "/resources/limits", "mem"),
    "a typo in a list": ({"credentials": {"keys": [{"env": "A", "secret": "b", "kee": "c"}]}}, "/credentials/keys/0", "kee"),
    "a typo far down": (
        {"extra": {"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b", "optionl": True}}}]}},
        "/extra/env/0/valueFrom/configMapKeyRef", "optionl",
    ),
    "a typo in the spec": ({"spec": {"modle": {}}}, "/spec", "modle"),
    "a typo in the spec's section": ({"spec": {"train": {"epoch": 1}}}, "/spec/train", "epoch"),
    "a typo in the spec's list": ({"spec": {"data": {"train": [{"source": "a.csv", "wieght": 2}]}}}, "/spec/data/train/0", "wieght"),
    "a typo deep in the spec": ({"spec": {"s3": {"buckets": {"b": {"endpont": "https://x"}}}}}, "/spec/s3/buckets/b", "endpont"),
    "a text for a number": ({"spec": {"train": {"epochs": "3"}}}, "/spec/train/epochs", "want number"),
    "a fraction for a whole number": ({"spec": {"lora": {"rank": 1.5}}}, "/spec/lora/rank", "want integer"),
    "a number out of bounds": ({"spec": {"lora": {"dropout": 1.5}}}, "/spec/lora/dropout", "1"),
    "none of the choices": ({"spec": {"export": {"gguf": ["q9"]}}}, "/spec/export/gguf/0", "q8_0"),
    "a number for a text": ({"spec": {"model": {"base": 7}}}, "/spec/model/base", "want string"),
    "no date": ({"spec": {"model": {"template_date": "tomorrow"}}}, "/spec/model/template_date", "tomorrow"),
    "no name": ({"spec": {"name": "Not A Name"}}, "/spec/name", "Not A Name"),
    "a section left out": ({"spec": {"model": None}}, "/spec/model", "object"),
    "a value taken away": ({"work": {"sizeGi": None}}, "/work", "sizeGi"),
    "a size with a unit": ({"work": {"sizeGi": "60Gi"}}, "/work/sizeGi", "want integer"),
    "no quantity": ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory", "lots"),
    "a volume of the host": (
        {"extra": {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}}, "/extra/volumes/0", "hostPath",
    ),
    "a volume of two kinds": (
        {"extra": {"volumes": [{"name": "x", "emptyDir": {}, "secret": {"secretName": "a"}}]}}, "/extra/volumes/0", "maxProperties",
    ),
    "a label that is none": ({"extra": {"labels": {"not a key": "x"}}}, "/extra/labels", "not a key"),
    "a label's value that is none": ({"extra": {"labels": {"team": True}}}, "/extra/labels/team", "want string"),
    "root": ({"security": {"uid": 0}}, "/security/uid", "not"),
    "a security context": ({"security": {"privileged": True}}, "/security", "privileged"),
    "a token where a secret's name belongs": ({"credentials": {"env": [{"secret": "a", "HF_TOKEN": HUB_TOKEN}]}}, "/credentials/env/0", "HF_TOKEN"),
    "a token under credentials": ({"credentials": {"hfToken": HUB_TOKEN}}, "/credentials", "hfToken"),
    "a key in the spec": ({"spec": {"s3": {"secret_access_key": "x"}}}, "/spec/s3", "secret_access_key"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_helm_refuses(case: str, helm: Helm, tmp_path: Path) -> None:
    values, place, word = WRONG[case]
    said = refusal(helm, tmp_path, values)
    line = next((line for line in said.splitlines() if word in line), "")
    assert f"at '{place.strip(chr(39))}'" in line or f"at '{place}" in line, said
    assert HUB_TOKEN not in said


def test_a_chart_without_a_spec_is_refused(helm: Helm) -> None:
    said = helm("template", "r", CHART).stderr
    assert "at '/spec': missing properties 'name', 'model', 'data'" in said


def test_no_field_goes_unnoticed_at_any_depth() -> None:
    """A field that nobody knows, put into each of the sections of a file that has them all."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    whole = laid_over(read_values(CHART / "values.yaml"), copy.deepcopy(EVERYTHING))
    assert list(validator.iter_errors(whole)) == []
    places = list(_sections(whole, ()))
    assert len(places) > 70
    unnoticed = []
    for path in places:
        wrong = copy.deepcopy(whole)
        inner: Any = wrong
        for key in path:
            inner = inner[key]
        inner["unknownField"] = {"x": 1}
        if validator.is_valid(wrong):
            unnoticed.append(".".join(map(str, path)))
    # A field of any name is a text there; this one is none.
    assert unnoticed == []


def _sections(value: Any, path: Path_) -> Iterator[Path_]:
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            yield from _sections(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _sections(inner, (*path, index))


def test_the_schema_is_strict_at_every_level() -> None:
    loose = []

    def look(part: Any, at: str) -> None:
        if isinstance(part, dict):
            if part.get("type") == "object" and at != "/properties/global":
                more = part.get("additionalProperties", True)
                # Closed, or a map of names to values of one type.
                if more is not False and not (isinstance(more, dict) and more):
                    loose.append(at)
            for key, inner in part.items():
                look(inner, f"{at}/{key}")
        elif isinstance(part, list):
            for index, inner in enumerate(part):
                look(inner, f"{at}/{index}")

    look(SCHEMA, "")
    assert loose == []


def test_every_value_is_set_to_something_else_by_a_file_of_the_matrix() -> None:
    """So that none of them is without effect on what is rendered, tested and validated."""
    every = [read_values(path) for path in VALUES]
    same = []
    for value in documented():
        if value.is_section:
            continue
        given = []
        for values in every:
            inner: Any = values
            for key in value.path.split("."):
                inner = inner.get(key) if isinstance(inner, dict) else None
            given.append(inner)
        if all(its is None or its == value.default for its in given):
            same.append(value.path)
    assert same == []


# --- by the templates ------------------------------------------------------------------------

KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a token in the spec": ({"spec": {"model": {"base": HUB_TOKEN}}}, "spec.model.base: holds a secret"),
    "a password in an address": ({"spec": {"publish": ["/x", "s3://me:pass@bucket/x"]}}, "spec.publish[1]: holds a secret"),
    "a signed address": ({"spec": {"s3": {"endpoint": "https://x"}, "data": {"train": [{"source": "https://x/y?X-Amz-Signature=12"}]}}}, "spec.data.train[0].source: holds a secret"),
    "a key in a list": ({"spec": {"verify": {"prompts": [{"ask": f"use {KEY}"}]}}}, "spec.verify.prompts[0].ask: holds a secret"),
    "a private key": ({"extra": {"annotations": {"a": "-----BEGIN RSA PRIVATE KEY-----"}}}, "extra.annotations.a: holds a secret"),
    "a token as a variable": ({"extra": {"env": [{"name": "X", "value": HUB_TOKEN}]}}, "extra.env[0].value: holds a secret"),
    "a variable named a secret": ({"extra": {"env": [{"name": "A", "value": "1"}, {"name": "WANDB_API_KEY", "value": "x"}]}}, "extra.env[1]: WANDB_API_KEY is a secret"),
    "HF_TOKEN as a value": ({"extra": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}, "extra.env[0]: HF_TOKEN is a secret"),
    "the spec by a variable": ({"extra": {"env": [{"name": "LORAJOB__TRAIN__EPOCHS", "value": "3"}]}}, "extra.env[0]: LORAJOB__TRAIN__EPOCHS"),
    "a variable of the chart": ({"extra": {"env": [{"name": "LORAJOB_CACHE", "value": "/x"}]}}, "extra.env[0].name: LORAJOB_CACHE is already set by the chart"),
    "a variable twice": ({"extra": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}}, "extra.env[1].name: A is already set by extra.env[0].name"),
    "a secret's variable twice": (
        {"credentials": {"keys": [{"env": "A", "secret": "s", "key": "k"}]}, "extra": {"env": [{"name": "A", "value": "1"}]}},
        "extra.env[0].name: A is already set by credentials.keys[0].env",
    ),
    "a volume of the chart": ({"extra": {"volumes": [{"name": "work", "emptyDir": {}}]}}, "extra.volumes[0].name: work is already set by the chart"),
    "a volume twice": ({"extra": {"volumes": [{"name": "a", "emptyDir": {}}, {"name": "a", "emptyDir": {}}]}}, "extra.volumes[1].name: a is already set by extra.volumes[0].name"),
    "a mount over the chart's": (
        {"extra": {"volumes": [{"name": "a", "emptyDir": {}}], "mounts": [{"name": "a", "mountPath": "/work/"}]}},
        "extra.mounts[0].mountPath: /work is already set by the chart",
    ),
    "a mount of nothing": ({"extra": {"mounts": [{"name": "a", "mountPath": "/a"}]}}, "extra.mounts[0].name: a is not among extra.volumes"),
    "a run that leaves nothing": ({"work": {"kind": "ephemeral"}}, "work.kind: with ephemeral nothing would be left"),
    "GPUs twice": ({"gpu": {"claims": [{"name": "a", "claim": "b"}]}}, "gpu.claims: GPUs are asked for twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_templates_refuse(case: str, helm: Helm, tmp_path: Path) -> None:
    values, message = REFUSED[case]
    said = refusal(helm, tmp_path, values)
    assert message in said
    assert "\n  -> " in said  # what to do
    for secret in (HUB_TOKEN, KEY, "me:pass"):
        assert secret not in said


def test_what_looks_like_a_secret_and_is_none_is_taken(helm: Helm, tmp_path: Path) -> None:
    values = copy.deepcopy(MINIMAL)
    values["spec"]["model"]["base"] = "hf-internal-testing/tiny-random-LlamaForCausalLM@v1.2"
    values["spec"]["s3"] = {"endpoint": "https://minio.example.org:9000"}
    values["spec"]["verify"] = {"prompts": [{"ask": "Write to me@example.org: https://x/y?page=2"}]}
    values["extra"] = {"env": [{"name": "TOKENIZERS_PARALLELISM", "value": "false"}]}
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    done = helm("template", "r", CHART, "-f", path)
    assert done.returncode == 0, done.stderr
