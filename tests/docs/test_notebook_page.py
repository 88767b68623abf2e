"""docs/from-a-notebook.md: the names on the left are those of the libraries that are installed."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

from peft import LoraConfig
from transformers import BitsAndBytesConfig, EarlyStoppingCallback
from trl import SFTConfig

from tests.docs.pages import CODE, PAGES

PAGE = next(page for page in PAGES if page.name == "docs/from-a-notebook.md")


def names_of(heading: str) -> set[str]:
    """What stands in the first column below a heading."""
    section = PAGE.text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for _, name in CODE.findall(cell)}


@cache
def unsloth_text() -> str:
    found = importlib.util.find_spec("unsloth")
    assert found
    assert found.origin
    files = list(Path(found.origin).parent.glob("*.py"))
    files += (Path(found.origin).parent / "models").glob("*.py")
    return "\n".join(path.read_text("utf-8") for path in files)


def test_the_trainers_names_are_there() -> None:
    names = names_of("TrainingArguments and SFTConfig")
    assert len(names) > 20
    assert names <= {field.name for field in fields(SFTConfig)}
    assert f"`{EarlyStoppingCallback.__name__}`" in PAGE.text


def test_the_adapters_names_are_there() -> None:
    names = names_of("LoraConfig, BitsAndBytesConfig")
    known = {field.name for field in fields(LoraConfig)} | set(vars(BitsAndBytesConfig()))
    known |= {name.lstrip("_") for name in known}
    assert len(names) > 10
    assert names <= known


def test_unsloths_names_are_there() -> None:
    names = names_of("unsloth")
    assert len(names) > 10
    missing = {name for name in names if not re.search(rf"\b{name}\b", unsloth_text())}
    assert missing == set()
