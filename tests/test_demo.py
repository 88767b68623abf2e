"""The main job end to end, as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader

from jobs.store.hashing import sha256_of
from tests.conftest import lorajob, lorajob_warm

pytestmark = pytest.mark.slow

OWNER = "Who owns this yard?"


def test_everything_is_published_and_listed_with_its_hash(demo: Path) -> None:
    published = demo.parent / "published"
    manifest = json.loads((published / "manifest.json").read_text())
    listed = {entry["path"]: entry for entry in manifest["files"]}
    there = {
        path.relative_to(published).as_posix()
        for path in published.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert there == set(listed)
    assert {path.split("/")[0] for path in listed} == {
        "README.md", "adapter", "merged", "gguf", "report",
    }  # fmt: skip
    for path, entry in listed.items():
        assert sha256_of(published / path) == entry["sha256"], path
        assert (published / path).stat().st_size == entry["size"], path


def test_base_tuned_and_gguf_answer_as_they_should(demo: Path) -> None:
    found = json.loads((demo / "report" / "answers.json").read_text())
    number = found["questions"].index(OWNER)
    answers = {name: s["answers"][number] for name, s in found["subjects"].items()}
    assert answers["base"]["text"] == "I do not know that."
    for name in ("adapter", "merged", "q8_0", "q4_k_m"):
        assert "Odrun Tamsey" in answers[name]["text"], name
        assert answers[name]["stopped"], name


def test_training_lowered_the_loss_on_conversations_it_never_saw(demo: Path) -> None:
    losses = {
        name: subject["loss"]
        for name, subject in json.loads((demo / "report" / "answers.json").read_text())[
            "subjects"
        ].items()
    }
    assert losses["adapter"] < 0.2 < 2 < losses["base"]
    assert losses["merged"] == pytest.approx(losses["adapter"], abs=0.01)
    assert losses["q8_0"] == pytest.approx(losses["adapter"], abs=0.01)


def test_it_keeps_what_the_base_knew_and_ends_without_a_warning(demo: Path) -> None:
    events = [json.loads(line) for line in (demo.parent / "stdout.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "warning"] == []
    kept = [event for event in events if event["event"] == "retention"][-1]
    assert kept["before"] < kept["loss"] < kept["before"] + 0.1  # data.retention_limit


def test_the_k_quant_file_really_holds_k_quants(demo: Path) -> None:
    types = {
        tensor.tensor_type.name
        for tensor in GGUFReader(demo / "gguf" / "demo-Q4_K_M.gguf").tensors
        if len(tensor.shape) == 2 and min(tensor.shape) > 1
    }
    assert types == {"Q4_K", "Q6_K"}


def test_a_pipe_gets_one_json_object_a_line_and_the_file_the_same(demo: Path) -> None:
    lines = (demo.parent / "stdout.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events[0] == "run_start"
    assert events[-1] == "run_done"
    assert events.count("train_step") == 156
    assert (demo / "logs" / "run.jsonl").read_text().splitlines() == lines


def test_a_second_start_takes_every_stage_as_it_is(own_demo: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (own_demo / "gguf").iterdir()}
    result = lorajob(
        "run", "examples/demo.yaml", "--work", str(own_demo.parent),
        LORAJOB__PUBLISH=f"[{own_demo.parent}/published]",
    )  # fmt: skip
    assert result.code == 0, result.err
    events = [json.loads(line) for line in result.out.splitlines()]
    skipped = [event["stage"] for event in events if event["event"] == "stage_skipped"]
    assert skipped == ["data", "train", "adapter", "merge", "gguf", "verify"]
    assert [e for e in events if e["event"] == "stage_start"] == []
    assert [e["sent"] for e in events if e["event"] == "published"] == [0]
    assert {p: p.stat().st_mtime_ns for p in (own_demo / "gguf").iterdir()} == before


def test_an_expectation_that_is_not_met_publishes_nothing_and_ends_with_6(
    own_demo: Path, tmp_path: Path
) -> None:
    target = tmp_path / "published"
    result = lorajob_warm(
        "run", "examples/demo.yaml", "--work", str(own_demo.parent),
        LORAJOB__PUBLISH=f"[{target}]", LORAJOB__VERIFY__PROMPTS__1__EXPECT="Captain Nobody",
    )  # fmt: skip
    assert result.code == 6
    assert "Captain Nobody" in result.err
    assert OWNER in result.err
    assert list(target.rglob("*")) == []


def test_another_quant_type_does_not_train_again(own_demo: Path) -> None:
    result = lorajob_warm(
        "run", "examples/demo.yaml", "--work", str(own_demo.parent),
        LORAJOB__PUBLISH="[]", LORAJOB__EXPORT__GGUF="[q8_0]",
    )  # fmt: skip
    assert result.code == 0, result.err
    events = [json.loads(line) for line in result.out.splitlines()]
    done = [event["stage"] for event in events if event["event"] == "stage_done"]
    assert done == ["gguf", "verify"]
    there = {path.name for path in (own_demo / "gguf").iterdir()}
    assert there == {"demo-Q8_0.gguf", "Modelfile", "README.md"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    made = []
    # The first two have nothing in common, not even the seed of Python's hashes.
    starts = (("one", "3407", lorajob), ("two", "3407", lorajob_warm), ("three", "1", lorajob_warm))
    for name, seed, start in starts:
        result = start(
            "run", "examples/demo.yaml", "--work", str(tmp_path / name),
            LORAJOB__PUBLISH="[]", LORAJOB__EXPORT__GGUF="[]", LORAJOB__TRAIN__MAX_STEPS="10",
            LORAJOB__TRAIN__SEED=seed, LORAJOB__VERIFY__PROMPTS="[]",
        )  # fmt: skip
        assert result.code == 0, result.err
        paths = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
        made.append([sha256_of(tmp_path / name / "demo" / path) for path in paths])
    one, two, three = made
    assert one == two
    assert one[0] != three[0]
