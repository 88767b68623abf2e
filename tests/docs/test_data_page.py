"""docs/data.md: each example goes through `lorajob check`, and trains what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from jobs.data.tokenizer import ChatTokenizer
from tests.conftest import BASE
from tests.docs.pages import CODE, PAGES, Block
from tests.docs.test_examples import MINIMAL, laid_over

PAGE = next(page for page in PAGES if page.name == "docs/data.md")
FILES = {block.name: block.text for block in PAGE.blocks if block.name}
SAYS = "Trained: "


def _sources(data: dict[str, Any]) -> set[str]:
    """The files that a fragment's `data` names."""
    found: set[str] = set()
    for side in ("train", "eval", "retention"):
        value = data.get(side, [])
        for source in value if isinstance(value, list) else [value]:
            found.add(source["source"] if isinstance(source, dict) else str(source))
    return found


RUN = [
    (block, yaml.safe_load(block.text))
    for block in PAGE.blocks
    if block.language == "yaml"
    and _sources(yaml.safe_load(block.text).get("data", {})) & set(FILES)
]


@pytest.mark.parametrize(("block", "fragment"), RUN, ids=[str(block) for block, _ in RUN])
def test_an_example_is_trained_as_the_page_says(
    block: Block, fragment: dict[str, Any], tmp_path: Path, tokenizer: ChatTokenizer,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    spec = laid_over({**MINIMAL, "model": {"base": str(BASE)}}, fragment)
    Path("spec.yaml").write_text(yaml.safe_dump(spec), "utf-8")
    assert main(["check", "spec.yaml", "--format", "json", "--rows", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = [turn for row in found["rows"] for turn in row["trained"]]
    for turn in trained:
        assert turn["ids"][-1] in tokenizer.stop_ids, "an answer that never ends"
    if block.after.startswith(SAYS):
        said = [text for _, text in CODE.findall(block.after.removeprefix(SAYS))]
        assert [turn["text"].replace("\n", "⏎") for turn in trained] == said


def test_every_format_has_an_example_that_is_found_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, "utf-8")
    data = {"train": ["chats.jsonl", "sharegpt.json", "alpaca.jsonl", "prompts.jsonl", "notes.txt"]}
    Path("spec.yaml").write_text(yaml.safe_dump({**MINIMAL, "model": {"base": str(BASE)}, "data": data}))  # fmt: skip
    assert main(["check", "spec.yaml", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    formats = [source["format"] for source in found["data"]["sources"]]
    assert formats == ["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
    headings = {line.strip("# `") for _, line in PAGE.prose if line.startswith("## `")}
    assert headings == set(formats)


def test_the_places_that_the_page_about_labels_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = next(page for page in PAGES if page.name == "docs/labels.md")
    (shown,) = [json.loads(block.text) for block in page.blocks if block.language == "json"]
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(FILES["chats.jsonl"], "utf-8")
    spec = {**MINIMAL, "model": {"base": str(BASE)}, "data": {"train": "chats.jsonl"}}
    Path("spec.yaml").write_text(yaml.safe_dump(spec), "utf-8")
    assert main(["check", "spec.yaml", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["trained"] == shown


def test_every_file_of_the_page_is_used() -> None:
    used = {name for _, fragment in RUN for name in _sources(fragment["data"])}
    used |= {fragment.get("model", {}).get("chat_template") for _, fragment in RUN}
    assert set(FILES) <= used
    assert sum(block.after.startswith(SAYS) for block, _ in RUN) >= len(FILES) - 1
