"""The spec's fields, and the JSON schema that is made from them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from jobs.spec import HubTarget, Spec, json_schema
from tests.conftest import ROOT


def tree(**sections: Any) -> dict[str, Any]:
    return {"name": "t", "model": {"base": "b"}, "data": {"train": "x.jsonl"}, **sections}


def test_the_smallest_spec_names_a_run_a_base_and_data() -> None:
    spec = Spec.model_validate(tree())
    assert [source.source for source in spec.data.train] == ["x.jsonl"]
    assert spec.lora.rank == 16
    assert spec.publish == []


def test_one_source_or_a_bare_path_stands_for_a_list() -> None:
    one = Spec.model_validate(tree(data={"train": {"source": "x.jsonl"}}))
    bare = Spec.model_validate(tree(data={"train": "x.jsonl"}))
    full = Spec.model_validate(tree(data={"train": [{"source": "x.jsonl"}]}))
    assert one == bare == full


def test_eval_is_a_share_or_sources_of_its_own() -> None:
    share = Spec.model_validate(tree(data={"train": "x.jsonl", "eval": 0.25}))
    own = Spec.model_validate(tree(data={"train": "x.jsonl", "eval": "e.jsonl"}))
    assert share.data.eval == 0.25
    assert isinstance(own.data.eval, list)
    assert own.data.eval[0].source == "e.jsonl"


@pytest.mark.parametrize("text", ["10%", "12.5 %", "0.1", ".1"])
def test_a_share_in_words_is_no_file(text: str) -> None:
    with pytest.raises(ValidationError, match="a share is a number"):
        Spec.model_validate(tree(data={"train": "x.jsonl", "eval": text}))


# One text stands for a list of one, and a question for a prompt.
SHORT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"export": {"gguf": "q8_0"}}, {"export": {"gguf": ["q8_0"]}}),
    ({"export": {"gguf": "Q4_K_M"}}, {"export": {"gguf": ["q4_k_m"]}}),
    ({"export": {"gguf": ["Q8_0", "bf16"]}}, {"export": {"gguf": ["q8_0", "bf16"]}}),
    ({"publish": "folder"}, {"publish": ["folder"]}),
    ({"publish": "hub://acme/bot"}, {"publish": [{"hub": "acme/bot"}]}),
    ({"lora": {"target": "q_proj"}}, {"lora": {"target": ["q_proj"]}}),
    ({"lora": {"modules_to_save": "lm_head"}}, {"lora": {"modules_to_save": ["lm_head"]}}),
    ({"observe": {"track": "wandb"}}, {"observe": {"track": ["wandb"]}}),
    ({"verify": {"prompts": "Who?"}}, {"verify": {"prompts": [{"ask": "Who?"}]}}),
    (
        {"verify": {"prompts": ["Who?", {"ask": "Where?"}]}},
        {"verify": {"prompts": [{"ask": "Who?"}, {"ask": "Where?"}]}},
    ),
]


@pytest.mark.parametrize(("short", "full"), SHORT, ids=str)
def test_what_is_written_short_means_the_same_and_the_schema_takes_it(
    short: dict[str, Any], full: dict[str, Any]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert Spec.model_validate(tree(**short)) == Spec.model_validate(tree(**full))
    for sections in (short, full):
        jsonschema.validate(tree(**sections), json_schema())


def test_all_linear_is_no_name_of_a_module() -> None:
    assert Spec.model_validate(tree(lora={"target": "all-linear"})).lora.target == "all-linear"
    for text in ("all", "all_linear", "ALL-LINEAR"):
        with pytest.raises(ValidationError, match="is written all-linear"):
            Spec.model_validate(tree(lora={"target": text}))


WRONG: list[dict[str, Any]] = [
    {"name": "Upper"},
    {"name": "a/b"},
    {"name": "../a"},
    {"name": "a\n"},
    {"name": "-a"},
    {"name": "a" * 54},
    {"name": 5},
    {"model": None},
    {"model": {"base": ""}},
    {"model": {"base": "a\0b"}},
    {"model": {"base": "b", "load_in": "2bit"}},
    {"model": {"base": "b", "max_seq_length": "2048"}},
    {"data": {"train": []}},
    {"data": {"train": None}},
    {"data": {"train": "x.jsonl", "eval": 1}},
    {"data": {"train": [{"source": "x.jsonl", "format": "csv"}]}},
    {"train": {"batch_size": True}},
    {"train": {"batch_size": 2.5}},
    {"train": {"learning_rate": "fast"}},
    {"train": {"learning_rate": 0}},
    {"train": {"seed": -1}},
    {"train": {"seed": 2**32}},
    {"lora": {"rank": 0}},
    {"export": {"gguf": ["q9"]}},
    {"export": {"adapter": False}},
    {"publish": {"hub": "acme/bot"}},
    {"publish": [5]},
    {"observe": {"track": ["tensorboard"]}},
    {"lora": {"target": 5}},
    {"lora": {"target": []}},
    {"verify": {"prompts": ""}},
    {"verify": {"prompts": [5]}},
    {"verify": {"prompts": [{"ask": ""}]}},
    {"typo": 1},
    {"train": {"typo": 1}},
    {"verify": {"prompts": [{"ask": "x", "typo": 1}]}},
]


@pytest.mark.parametrize("sections", WRONG, ids=str)
def test_a_value_that_a_field_cannot_have_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(tree(**sections))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_has_to_be_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Spec.model_validate(tree(train={"epochs": value}))


def test_gguf_without_merged_weights_is_refused() -> None:
    with pytest.raises(ValidationError, match="merged weights"):
        Spec.model_validate(tree(export={"merged": None, "gguf": ["q8_0"]}))


def test_a_gguf_type_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="twice"):
        Spec.model_validate(tree(export={"gguf": ["q8_0", "q8_0"]}))


def test_a_spec_does_not_change_once_it_is_read() -> None:
    spec = Spec.model_validate(tree())
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"


def test_a_hub_target_can_be_told_as_an_address() -> None:
    same = [{"hub": "acme/bot"}, "hub://acme/bot", "hf://acme/bot"]
    targets = Spec.model_validate(tree(publish=[*same, "folder"])).publish
    assert targets == [HubTarget(hub="acme/bot")] * 3 + ["folder"]


def objects(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"Spec": schema, **schema["$defs"]}


def test_the_schema_knows_every_field_and_refuses_others() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["properties"]) == set(Spec.model_fields)
    for name, part in objects(schema).items():
        assert part["additionalProperties"] is False, name


def test_the_schema_describes_every_value() -> None:
    for name, part in objects(json_schema()).items():
        for field, value in part["properties"].items():
            assert "description" in value or "$ref" in value, f"{name}.{field}"


def test_the_schema_takes_the_demo_and_what_the_model_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    demo = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text("utf-8"))
    demo["train"]["learning_rate"] = float(demo["train"]["learning_rate"])  # YAML 1.1's 4e-3
    for value in (
        demo,
        tree(publish=[{"hub": "acme/bot"}, "folder"]),
        tree(data={"train": ["a", {"source": "b"}], "eval": "e.jsonl"}),
        tree(data={"train": {"source": "b"}, "eval": 0.5}),
    ):
        Spec.model_validate(value)
        jsonschema.validate(value, json_schema())


def test_the_schema_refuses_what_the_model_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    # Python's $ also matches before a last line break; no other JSON schema validator's does.
    wrong = [sections for sections in WRONG if sections != {"name": "a\n"}]
    assert [sections for sections in wrong if validator.is_valid(tree(**sections))] == []
