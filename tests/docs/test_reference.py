"""What is generated is what it is made from, and the reference says something of each field."""

from __future__ import annotations

import re
from typing import Any

import pytest

import docs.generate
from docs.generate import main, parts, spec_page
from jobs.spec import Spec, json_schema


def test_nothing_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check=True) == 0, capsys.readouterr().out


def test_a_change_of_the_spec_makes_it_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = json_schema()
    schema["$defs"]["Lora"]["properties"]["rank"]["default"] = 32
    monkeypatch.setattr(docs.generate, "json_schema", lambda: schema)
    assert main(check=True) == 1
    assert capsys.readouterr().out == "docs/spec.md is stale: python -m docs.generate\n"


def test_another_reckoning_makes_the_table_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs.generate, "LONGEST", 4096)
    assert main(check=True) == 1
    assert capsys.readouterr().out == "docs/fitting.md is stale: python -m docs.generate\n"


def test_every_field_is_in_it_once() -> None:
    rows = re.findall(r"(?m)^\| `([\w.\[\]]+)` \| .* \| .* \| (.+) \|$", spec_page())
    names = [name for name, _ in rows]
    assert len(names) == len(set(names))
    assert {name for name in names if "." not in name} == set(Spec.model_fields)
    for part in parts():
        inner = {f"{part.path}.{field}".lstrip(".") for field in part.schema["properties"]}
        assert inner <= set(names)


def test_every_model_of_the_spec_has_a_section() -> None:
    schema = json_schema()
    shown = [set(part.schema["properties"]) for part in parts()]
    for name, model in schema["$defs"].items():
        assert any(set(model["properties"]) <= fields for fields in shown), name


def test_no_field_lacks_a_meaning() -> None:
    schema = json_schema()
    models: dict[str, Any] = {"Spec": schema, **schema["$defs"]}
    missing = {
        f"{name}.{field}"
        for name, model in models.items()
        for field, said in model["properties"].items()
        if len(said.get("description", "")) < 10
    }
    assert not missing
    for cell in re.findall(r"(?m)^\| `.* \| ([^|]*) \|$", spec_page()):
        assert len(cell) > 10


def test_no_type_is_left_in_programmers_words() -> None:
    kinds = re.findall(r"(?m)^\| `[\w.\[\]]+` \| (.*?) \| ", spec_page())
    for kind in kinds:
        assert not re.search(r"integer|boolean|array|object|anyOf|None", kind), kind
