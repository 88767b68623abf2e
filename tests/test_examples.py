"""Every spec in examples/, through the real `check`: without a network, and without the real weights.

What is on the Hub has a stand-in on the double of it, which the unmodified client talks to: the demo's
small base with the special tokens of the real one, and rows of the real data set's shape.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml
from tokenizers import Tokenizer

from jobs.data.read import read_rows
from jobs.errors import SpecError
from jobs.spec import Source
from jobs.spec_source import load_spec
from tests.conftest import BASE, ROOT, Result, lorajob
from tests.servers.hub import Hub, running_hub

FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text("utf-8")
TOKEN = "hf_reader"  # may read what acme keeps private, and has accepted Gemma's licence
REAL = ROOT.parent / "shared" / "data"

LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # fmt: skip
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PLACES = ("harbour", "mill", "lighthouse", "quarry", "ferry")


@dataclass(frozen=True)
class Case:
    """What `check` has to find out about an example."""

    train_rows: int
    eval_rows: int
    ends: str  # what each trained answer ends with
    begins: str  # the first row's text


CASES = {
    "demo": Case(136, 17, "<|im_end|>", "<|im_start|>system\nYou are Mira"),
    "persona": Case(39, 3, "<|eot_id|>", "<|begin_of_text|><|start_header_id|>system"),
    "llama-3.2-3b-finetome": Case(399, 1, "<|eot_id|>", "<|begin_of_text|><|start_header_id|>system"),
    "llama-3.1-8b-alpaca": Case(296, 4, "<|end_of_text|>", "<|begin_of_text|>Below is an instruction"),
    "gemma-2-2b-jpn": Case(22, 0, "<eos>", "<bos><start_of_turn>user\nあなたは温泉旅館"),
    "after-pretraining": Case(98, 2, "<|eot_id|>", "<|begin_of_text|><|start_header_id|>system"),
}  # fmt: skip


# What stands in for the Hub's repositories


def base(specials: tuple[str, ...], **config: Any) -> dict[str, bytes | Path]:
    """The files of the demo's base, as if it had these special tokens: BOS and EOS come first."""
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    tokenizer.add_special_tokens(list(specials))
    names = json.loads((BASE / "tokenizer_config.json").read_text())
    names |= {"bos_token": specials[0], "eos_token": specials[1]}
    ids = {name: tokenizer.token_to_id(text) for name, text in zip(("bos_token_id", "eos_token_id"), specials, strict=False)}  # fmt: skip
    shape = json.loads((BASE / "config.json").read_text()) | ids
    shape["vocab_size"] = tokenizer.get_vocab_size()
    return {
        "config.json": json.dumps(shape | config).encode(),
        "generation_config.json": json.dumps(ids).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(names).encode(),
        "model.safetensors": BASE / "model.safetensors",
    }


def instruct() -> dict[str, bytes | Path]:
    template = ROOT / "jobs" / "data" / "templates" / "llama-3.1.jinja"
    return {**base(LLAMA), "chat_template.jinja": template}


def talk(count: int) -> Iterator[tuple[str, str]]:
    for number, place in enumerate(islice(cycle(PLACES), count)):
        yield f"What is at the {place}, house {number}?", f"At the {place} is house {number}."


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def finetome() -> bytes:
    """A parquet file with the columns of the data set: two turns in every third row."""
    rows = []
    for number, (ask, answer) in enumerate(talk(400)):
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
        rows.append({"conversations": turns * (2 if number % 3 == 0 else 1), "source": "stand-in", "score": 4.5})  # fmt: skip
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def alpaca() -> bytes:
    rows = [
        {"instruction": ask, "input": "It is evening." if number % 2 else "", "output": answer}
        for number, (ask, answer) in enumerate(talk(300))
    ]
    return json.dumps(rows, indent=1).encode()


def messages(count: int) -> list[Any]:
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)]}
        for turn in talk(count)
    ]


def texts(first: int, count: int) -> list[Any]:
    return [{"text": f"Chapter {n}. A keelson lies on the keel."} for n in range(first, first + count)]  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub(tmp_path_factory.mktemp("hub"), page_size=100) as hub:
        hub.add_token(TOKEN, "ada", orgs=["acme"])
        hub.add_repo("unsloth/Llama-3.2-3B-Instruct", files=instruct())
        hub.add_repo("unsloth/Llama-3.2-1B-Instruct", files=instruct())
        hub.add_repo("unsloth/Meta-Llama-3.1-8B", files=base(LLAMA))
        gemma = base(GEMMA, architectures=["Gemma2ForCausalLM"], model_type="gemma2", final_logit_softcapping=30.0)  # fmt: skip
        gemma["chat_template.jinja"] = b"{{ raise_exception('System role not supported') }}"
        hub.add_repo("google/gemma-2-2b-jpn-it", files=gemma, gated="manual")
        hub.grant("google/gemma-2-2b-jpn-it", "ada")
        hub.add_repo("acme/llama-3.1-8b-shipbuilding", files=base(LLAMA), private=True)
        card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
        hub.add_repo("mlabonne/FineTome-100k", "dataset",
                     {"README.md": card, "data/train-00000-of-00001.parquet": finetome()})  # fmt: skip
        hub.add_repo("yahma/alpaca-cleaned", "dataset", {"alpaca_data_cleaned.json": alpaca()})
        hub.add_repo("acme/shipbuilding-chats", "dataset",
                     {"train.jsonl": jsonl(messages(100))}, private=True)  # fmt: skip
        hub.add_repo(
            "acme/shipbuilding-texts", "dataset",
            {"heldout/a.jsonl": jsonl(texts(0, 10)), "replay/a.jsonl": jsonl(texts(10, 200))}, private=True,
        )  # fmt: skip
        yield hub
    assert hub.leaks == [], "a token went to the storage"


class Desk:
    """Where examples are checked as a user does it; what was found out is kept for other tests."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder
        self._found: dict[str, dict[str, Any]] = {}

    def check(self, name: str, *arguments: str, **env: str) -> Result:
        env = {
            **self.hub.environment(TOKEN, self.folder / "hf"),
            "LORAJOB_CACHE": str(self.folder / "cache"),
            **env,
        }
        return lorajob(
            "check", f"examples/{name}.yaml", "--work", str(self.folder / "runs"), *arguments,
            cwd=ROOT, stdin="", **env,
        )  # fmt: skip

    def found(self, name: str) -> dict[str, Any]:
        if name not in self._found:
            result = self.check(name, "--rows", "5", "--format", "json")
            assert result.code == 0, result.err
            self._found[name] = json.loads(result.out)
        return self._found[name]


@pytest.fixture(scope="module")
def desk(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(hub, tmp_path_factory.mktemp("desk"))


def specs() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.y*ml"))


def test_every_example_has_a_case_and_a_line_in_the_readme() -> None:
    assert specs() == sorted(CASES)
    for name in specs():
        assert f"({name}.yaml)" in README, name


@pytest.mark.parametrize("name", specs())
def test_check_finds_nothing_wrong_and_labels_the_rows(name: str, desk: Desk) -> None:
    case, found = CASES[name], desk.found(name)
    data = found["data"]
    assert (data["train_rows"], data["eval_rows"]) == (case.train_rows, case.eval_rows)
    assert (data["bad_rows"], data["dropped_too_long"], data["duplicates"]) == (0, 0, 0)
    assert 0 < data["trained_tokens"] < data["train_tokens"]
    assert found["warnings"] == []
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        assert row["text"].startswith(case.begins), row
        assert row["trained"], row
        for turn in row["trained"]:
            assert turn["text"].endswith(case.ends)
            assert len(turn["text"]) > len(case.ends)


def test_a_check_fetches_no_weights(desk: Desk) -> None:
    desk.found("gemma-2-2b-jpn")
    assert desk.hub.seen("GET .*(config|tokenizer).json")
    assert not list(desk.folder.rglob("*.safetensors"))


def test_people_are_shown_what_is_trained(desk: Desk) -> None:
    result = desk.check("gemma-2-2b-jpn")
    assert result.code == 0, result.err
    assert "22 to train on, 0 held out" in result.out
    [(tokens, trained)] = re.findall(r"(\d+), of which (\d+) are trained", result.out)
    assert 0 < int(trained) < int(tokens)
    assert "午後三時からです。お早めのお着きでも、お荷物はお預かりいたします。<eos>" in result.out


def test_an_answer_of_gemma_ends_once_with_what_generation_stops_at(desk: Desk) -> None:
    found = desk.found("gemma-2-2b-jpn")
    assert found["chat_template"]["end_of_turn"] == "<eos>"
    for row in found["rows"]:
        assert row["text"].count("<eos>") == 1
        assert row["text"].count("<end_of_turn>") == 1
        assert row["text"].endswith("<start_of_turn>model\n" + row["trained"][0]["text"])


def test_an_instruction_without_an_input_has_no_heading_for_it(desk: Desk) -> None:
    texts = [row["text"] for row in desk.found("llama-3.1-8b-alpaca")["rows"]]
    assert ["### Input:\nIt is evening.\n\n" in text for text in texts] == [False, True] * 2 + [
        False
    ]
    assert ["### Input:" in text for text in texts] == [False, True] * 2 + [False]


def test_retention_and_replay_are_read_and_kept_apart(desk: Desk) -> None:
    data = desk.found("after-pretraining")["data"]
    assert {source["side"]: source["rows"] for source in data["sources"]} == {
        "train": 100, "retention": 10, "replay": 200,
    }  # fmt: skip
    assert data["replay"]["share"] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", ["gemma-2-2b-jpn", "after-pretraining"])
def test_what_is_closed_is_refused_by_name_to_others(name: str, desk: Desk, tmp_path: Path) -> None:
    desk.hub.add_token("hf_other", "eve", role="read")
    elsewhere = {"HF_HOME": str(tmp_path / "hf"), "LORAJOB_CACHE": str(tmp_path / "cache")}
    result = desk.check(name, HF_TOKEN="hf_other", **elsewhere)
    assert result.code == 4, result.err
    spec = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    assert spec["model"]["base"].partition("@")[0] in result.err


# Each field of an example means something, and no wrong value passes


Path_ = tuple[str | int, ...]


def leaves(tree: Any, at: Path_ = ()) -> Iterator[Path_]:
    if isinstance(tree, dict | list) and tree:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield from leaves(value, (*at, key))
    else:
        yield at


def put(tree: Any, at: Path_, value: Any) -> Any:
    """A copy of the tree with another value in one place."""
    if not at:
        return value
    if isinstance(tree, dict):
        return {key: put(old, at[1:], value) if key == at[0] else old for key, old in tree.items()}
    return [put(old, at[1:], value) if number == at[0] else old for number, old in enumerate(tree)]


def misspelt(tree: Any, at: Path_) -> Any:
    """A copy of the tree with a letter too many in the last field's name."""
    *above, last = at
    node = tree
    for key in above:
        node = node[key]
    renamed = {(f"{key}x" if key == last else key): value for key, value in node.items()}
    return put(tree, tuple(above), renamed)


def mistake(tree: Any, path: Path) -> str:
    """What is said of a spec that must be refused."""
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    with pytest.raises(SpecError) as refused:
        load_spec(str(path), {})
    return refused.value.message


@pytest.mark.parametrize("name", specs())
def test_a_wrong_value_or_name_anywhere_is_named(name: str, tmp_path: Path) -> None:
    tree = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    load_spec(str(FOLDER / f"{name}.yaml"), {})
    spoiled = tmp_path / "spoiled.yaml"
    for at in leaves(tree):
        section = str(at[0])
        assert section in mistake(put(tree, at, {"no": ["such"]}), spoiled), at
        if isinstance(at[-1], str):
            assert f"{at[-1]}x" in mistake(misspelt(tree, at), spoiled), at
        # A number outside any range that a field has.
        value: Any = tree
        for key in at:
            value = value[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert str(at[-1]) in mistake(put(tree, at, -1), spoiled), at


def test_no_example_holds_a_token_or_a_path_of_someones_machine() -> None:
    for path in [*FOLDER.glob("*.yaml"), FOLDER / "README.md"]:
        text = path.read_text("utf-8")
        assert not re.search(r"hf_[A-Za-z0-9]{8}|AKIA|/home/|/root/|/Users/", text), path


def test_the_readme_names_only_what_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README):
        assert "://" in target or (FOLDER / target).exists(), target
    for spec in re.findall(r"examples/[\w.-]+\.yaml", README):
        assert (ROOT / spec).is_file(), spec


# Real rows, where they are at hand


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data sets are not in {REAL}")
@pytest.mark.parametrize(
    ("name", "file"),
    [("llama-3.1-8b-alpaca", "alpaca_en_demo.json"), ("persona", "identity.json")],
)
def test_real_rows_of_the_kind_are_labelled_to_the_last(name: str, file: str, desk: Desk) -> None:
    rows = list(read_rows(Source(source=str(REAL / file))))
    result = desk.check(
        name, "--rows", "20", "--format", "json", LORAJOB__DATA__TRAIN=str(REAL / file)
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    data = found["data"]
    assert data["bad_rows"] == 0
    assert data["train_rows"] + data["eval_rows"] + data["dropped_too_long"] == len(rows) > 50
    for row in found["rows"]:
        assert [turn["text"].endswith(CASES[name].ends) for turn in row["trained"]] == [True]
