"""What the pages name is there: exit codes, variables, fields, values, files, modules, messages."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from helm.generate import CHART
from helm.values import Values
from helm.values_file import read_values
from jobs import errors
from jobs.errors import LorajobError
from jobs.spec import Spec
from tests.conftest import ROOT
from tests.docs.pages import CODE, PAGES, Page, commands

KINDS: list[type[LorajobError]] = [LorajobError, *LorajobError.__subclasses__()]
OWN = {kind.exit_code: kind.title for kind in KINDS if kind.__module__ == errors.__name__}
# Of shells and kernels: stopped by SIGINT, SIGKILL and SIGTERM.
CODES = {0, 130, 137, 143, *OWN}

VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_+[A-Z0-9]+)+\b")
LIBRARIES = {
    "huggingface_hub": ("constants.py",),
    "datasets": ("config.py",),
    "botocore": ("configprovider.py", "credentials.py", "utils.py"),
}
PLACE = re.compile(r"(?:jobs|tests|helm|k8s|bench|docs|examples|image|\.ci)/[\w./-]*")
NOT_A_FIELD = re.compile(r".*\.(md|json|yaml|jsonl|arrow|txt|py|safetensors)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
TROUBLE = next(page for page in PAGES if page.name == "docs/troubleshooting.md")


@every_page
def test_exit_codes_are_there(page: Page) -> None:
    for found in re.finditer(r"\bcodes? `?((?:\d+`?(?:, | and | or | to )?`?)+)", page.text):
        named = {int(number) for number in re.findall(r"\d+", found[1])}
        assert named <= CODES, f"{page.name}: {found[0]}"


def test_every_exit_code_has_its_section() -> None:
    sections = re.findall(r"(?m)^## (\d+)(?:, \d+)*: (.*)$", TROUBLE.text)
    assert {int(code): title for code, title in sections if int(code) in OWN} == OWN


@cache
def known_texts() -> str:
    """Everything that reads variables."""
    folders = ("jobs", "helm", "k8s", "bench", "tests", "image")
    files = [ROOT / "Dockerfile", ROOT / "Makefile", *(ROOT / ".ci").iterdir()]
    for folder in folders:
        files += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".tpl", ".yaml", ".tpl") and "docs" not in path.parts[-2:]
        ]
    for library, names in LIBRARIES.items():
        found = importlib.util.find_spec(library)
        assert found
        assert found.origin
        files += [Path(found.origin).parent / name for name in names]
    return "\n".join(path.read_text("utf-8") for path in files)


@every_page
def test_variables_are_there(page: Page) -> None:
    names = set(VARIABLE.findall(page.text))
    fields = {name for name in names if name.startswith("LORAJOB__")}
    for name in sorted(names - fields):
        assert re.search(rf"\b{name}\b", known_texts()), f"{page.name}: {name}"
    for name in sorted(fields):
        parts = name.removeprefix("LORAJOB__").lower().split("__")
        assert is_field([part for part in parts if not part.isdecimal()]), f"{page.name}: {name}"


def is_field(parts: list[str]) -> bool:
    """Whether the names lead from the spec to one of its fields."""
    models: list[Any] = [Spec]
    for part in parts:
        here = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if not here:
            return False
        models = [model for annotation in here for model in _models(annotation)]
    return True


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def test_a_field_that_is_none_is_found() -> None:
    assert is_field(["data", "train", "limit"])
    assert is_field(["s3", "buckets"])
    assert not is_field(["train", "rank"])
    assert not is_field(["lora", "rank", "more"])


@every_page
def test_fields_and_values_are_there(page: Page) -> None:
    values = read_values(CHART / "values.yaml")
    for line, code in page.codes:
        name = re.split(r"[:=\s]", code.removeprefix("spec."))[0]
        if not re.fullmatch(r"[a-zA-Z0-9]+(\.[a-zA-Z_]+)+", name) or NOT_A_FIELD.fullmatch(name):
            continue
        parts = name.split(".")
        if parts[0] in Spec.model_fields:
            assert is_field(parts), f"{page.name}:{line}: {code}"
        elif parts[0] in Values.model_fields:
            at: Any = values
            for part in parts:
                assert part in at, f"{page.name}:{line}: {code}"
                at = at[part]


@every_page
def test_files_are_there(page: Page) -> None:
    for line, code in page.codes:
        if PLACE.fullmatch(code):
            assert (ROOT / code).exists(), f"{page.name}:{line}: {code}"


@every_page
def test_modules_are_there(page: Page) -> None:
    shown = [words for block in page.blocks if not block.name for words in commands(block.text)]
    shown += [code.split() for _, code in page.codes]
    for words in shown:
        if "-m" in words[:-1] and words[words.index("-m") - 1].rpartition("/")[2].startswith(
            "python"
        ):
            module = words[words.index("-m") + 1]
            if module.split(".")[0] in ("bench", "tests", "helm", "docs"):
                path = ROOT.joinpath(*module.split("."))
                assert path.with_suffix(".py").is_file(), f"{page.name}: {module}"


def test_packages_know_only_what_the_page_says() -> None:
    page = next(page for page in PAGES if page.name == "docs/contributing.md")
    rows = re.findall(r"(?m)^\| `jobs/(\w+)/` \| .* \| (.*) \|$", page.text)
    allowed = {package: set(re.findall(r"`jobs/(\w+)/`", may)) for package, may in rows}
    assert set(allowed) == {
        path.name for path in (ROOT / "jobs").iterdir() if (path / "__init__.py").exists()
    }
    for package, known in allowed.items():
        used = {
            found[1]
            for path in (ROOT / "jobs" / package).rglob("*.py")
            for found in re.finditer(
                r"(?m)^\s*(?:from|import) jobs\.(\w+)", path.read_text("utf-8")
            )
        }
        assert used & set(allowed) <= known | {package}, package


# --- messages --------------------------------------------------------------------------------


@cache
def said_together() -> list[str]:
    """All texts of each function in jobs/, and of each module beside its functions; where a value
    stands in a text there is a NUL."""
    found = []
    for path in (ROOT / "jobs").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        functions = (ast.FunctionDef, ast.Module)
        for scope in (node for node in ast.walk(tree) if isinstance(node, functions)):
            texts: list[str] = []
            ahead: list[ast.AST] = list(ast.iter_child_nodes(scope))
            while ahead:
                node = ahead.pop()
                if isinstance(node, ast.JoinedStr):
                    texts.append(
                        "".join(
                            str(value.value) if isinstance(value, ast.Constant) else "\0"
                            for value in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif not isinstance(node, ast.FunctionDef):
                    ahead += ast.iter_child_nodes(node)
            found.append("\0".join(texts))
    return found


def is_message(text: str) -> bool:
    """Whether some function of lorajob says all of this, `...` standing for anything."""
    pieces = [piece.strip(" :,()") for piece in text.split("...")]
    pieces = [piece for piece in pieces if len(re.sub(r"\W", "", piece)) >= 3]
    return any(all(piece in texts for piece in pieces) for texts in said_together())


def test_a_message_that_nobody_says_is_found() -> None:
    assert is_message("model.base: the folder ... does not exist")
    assert not is_message("model.base: the folder ... cannot be found")
    assert not is_message("there is no space left on the device")


def test_the_messages_are_what_lorajob_says() -> None:
    said: list[tuple[int, str]] = []
    in_table = False
    for line, text in TROUBLE.prose:
        in_table = text.startswith("|") and (in_table or text.startswith("| message |"))
        if in_table:
            cell = re.split(r"(?<!\\)\|", text)[1]
            said += [(line, code.strip()) for _, code in CODE.findall(cell)]
    wrong = [f"line {line}: {text}" for line, text in said if not is_message(text)]
    assert wrong == []
    assert len(said) > 40
