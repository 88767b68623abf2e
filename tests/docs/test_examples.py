"""What a reader would copy is right: specs, values and command lines."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from helm.generate import CHART
from helm.values import Values
from helm.values_file import read_values
from jobs.cli import _parser, _with_command
from jobs.spec import Spec
from jobs.spec_source import load_spec
from tests.conftest import ROOT
from tests.deploy.conftest import Helm, helm, tools  # noqa: F401 - fixtures
from tests.docs.pages import PAGES, Block, Page, commands

MINIMAL: dict[str, Any] = {"name": "x", "model": {"base": "a/b"}, "data": {"train": "x.jsonl"}}
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
YAML = [block for page in PAGES for block in page.blocks if block.language == "yaml"]
SHELL = ("", "sh", "bash", "console")

SPECS = [b for b in YAML if set(yaml.safe_load(b.text)) <= set(Spec.model_fields)]
VALUES = [b for b in YAML if set(yaml.safe_load(b.text)) <= set(Values.model_fields) and b not in SPECS]  # fmt: skip


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm lays values over a chart's, and a fragment over the least that a spec is."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        found[key] = laid_over(old, value) if both else value  # type: ignore[arg-type]
    return found


def checked(spec: dict[str, Any], folder: Path) -> Spec:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, allow_unicode=True), "utf-8")
    return load_spec(str(path), {})


def test_every_yaml_block_is_of_a_known_kind() -> None:
    odd = [str(b) for b in YAML if b not in SPECS and b not in VALUES]
    assert odd == []
    assert len(SPECS) > 15
    assert len(VALUES) > 5


@pytest.mark.parametrize("block", SPECS, ids=str)
def test_a_spec_or_a_part_of_one_is_valid(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block.text, "utf-8")
    whole = {"name", "model", "data"} <= set(yaml.safe_load(block.text))
    if whole and "base" in yaml.safe_load(block.text)["model"]:
        load_spec(str(path), {})
    else:
        checked(laid_over(MINIMAL, read_values(path)), tmp_path)


VARIABLES = re.compile(r"(?m)^(LORAJOB__\w+)=(.*?)\s*(?:#.*)?$")


def test_variables_set_what_they_name(tmp_path: Path) -> None:
    """Each over the reference's example; of the page about rented boxes one block is a spec alone."""
    (example, *_) = [b for b in SPECS if b.page.name == "spec.md"]
    path = tmp_path / "spec.yaml"
    path.write_text(example.text, "utf-8")
    shown = alone = 0
    for page in PAGES:
        for block in page.blocks:
            found = {name: text.strip("'") for name, text in VARIABLES.findall(block.text)}
            for name, text in found.items():
                load_spec(str(path), {name: text})  # raises where there is no such field
            shown += len(found)
            if page.path.name == "rented-box.md" and "LORAJOB__NAME" in found:
                assert load_spec(None, found).name == found["LORAJOB__NAME"]
                alone += 1
    assert shown > 8
    assert alone == 1


@pytest.mark.parametrize("block", VALUES, ids=str)
def test_values_or_a_part_of_them_are_valid(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(block.text, "utf-8")
    values = laid_over({"spec": MINIMAL}, read_values(path))
    whole = laid_over(read_values(CHART / "values.yaml"), values)
    assert [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(whole)] == []  # fmt: skip
    checked(whole["spec"], tmp_path)


def test_helm_renders_all_values(helm: Helm, tmp_path: Path) -> None:
    """What no schema says: values that do not go together are refused by the chart itself."""
    for block in VALUES:
        path = tmp_path / "values.yaml"
        path.write_text(block.text, "utf-8")
        values = laid_over({"spec": MINIMAL}, read_values(path))
        path.write_text(yaml.safe_dump(values), "utf-8")
        done = helm("template", "r", CHART, "-f", path)
        assert done.returncode == 0, f"{block}: {done.stderr}"


def test_what_is_for_a_shell_is_no_syntax_error() -> None:
    for page in PAGES:
        for block in page.blocks:
            if block.language in ("sh", "bash"):
                done = subprocess.run(["bash", "-n"], input=block.text, check=False, capture_output=True, text=True)  # fmt: skip
                assert done.returncode == 0, f"{block}: {done.stderr}"


def own_commands(page: Page) -> list[tuple[str, list[str]]]:
    """The arguments of each lorajob command that a page shows, and where it stands."""
    found = []
    for block in page.blocks:
        if block.language in SHELL:
            found += [(str(block), words) for words in commands(block.text)]
    for line, code in page.codes:
        if code.startswith(("lorajob ", ".venv/bin/lorajob ")):
            found.append((f"{page.name}:{line}", shlex.split(code)))
    ours = []
    for place, words in found:
        arguments = _arguments(words)
        if arguments is not None:
            ours.append((place, arguments))
    return ours


def _arguments(words: list[str]) -> list[str] | None:
    """What follows lorajob's own name in a command; None where it is another program's."""
    while words and re.fullmatch(r"\$|[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:2] in (["docker", "run"], ["podman", "run"]):
        return next((words[n + 1 :] for n, word in enumerate(words) if re.fullmatch(r"([\w.:/-]+/)?lorajob(:[\w.-]+)?", word)), None)  # fmt: skip
    if "--" in words and words[0] == "kubectl":
        words = words[words.index("--") + 1 :]
    if words and words[0].endswith("python") and len(words) > 1:
        words = words[1:]
    if words and words[0] in ("lorajob", ".venv/bin/lorajob"):
        return words[1:]
    return None


COMMANDS = [(place, words) for page in PAGES for place, words in own_commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20
    assert {words[0] for _, words in COMMANDS if words} >= {"run", "check", "export", "chat"}


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_the_parser_knows_every_command(
    place: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser, words = _parser(), _with_command(words)
    try:
        parser.parse_args(words)
    except SystemExit as ended:
        assert ended.code == 0, f"{place}: {capsys.readouterr().err}"  # 0: --help, --version
        return
    # Beginnings of options are taken as well, but nobody should be shown them.
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= set(commands.choices[words[0]]._option_string_actions), place


def test_what_helm_is_told_to_set_are_values() -> None:
    known = read_values(CHART / "values.yaml")
    shown = 0
    for page in PAGES:
        lines = [words for b in page.blocks if b.language in SHELL for words in commands(b.text)]
        for words in (w for w in lines if w[0] == "helm" and "helm/lorajob" in w):
            for path in (
                after.partition("=")[0] for word, after in pairwise(words) if word == "--set"
            ):
                at: Any = known
                for name in path.split("."):
                    assert name in at, f"{page.name}: --set {path}"
                    at = at[name]
                shown += 1
    assert shown


def test_what_make_is_told_to_make_is_there() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8")))
    for page in PAGES:
        shown = [words for b in page.blocks if b.language in SHELL for words in commands(b.text)]
        shown += [code.split() for _, code in page.codes]
        for words in shown:
            if words[0] == "make":
                named = [word for word in words[1:] if "=" not in word and word != "..."]
                assert set(named) <= targets, f"{page.name}: {' '.join(words)}"
