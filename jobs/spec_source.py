"""Reading a spec: file, standard input and environment, with every mistake in one message.

A spec ends up in logs, manifests and model cards, so one that holds a secret is refused, and no
message repeats it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs.errors import AccessError, SpecError, bullet_list
from jobs.secrets import MASK, looks_like_secret, redact
from jobs.spec import Spec
from jobs.spec_mistakes import CREDENTIALS, Location, mistakes

DEFAULT_PATH = "/etc/lorajob/spec.yaml"
PREFIX = "LORAJOB__"


def load_spec(path: str | None = None, environ: Mapping[str, str] | None = None) -> Spec:
    """The checked spec.

    It is read from `path` (`-` is standard input), else from $LORAJOB_SPEC, else from
    /etc/lorajob/spec.yaml where that exists; then `LORAJOB__SECTION__FIELD=value` variables are
    laid over it. Raises SpecError with all mistakes at once or for a secret in it, AccessError where
    there is no file.
    """
    try:
        return _load(path, environ)
    except (SpecError, AccessError) as error:
        hint = error.hint and redact(error.hint)
        raise type(error)(redact(error.message), hint) from None


def _load(path: str | None, environ: Mapping[str, str] | None) -> Spec:
    env = os.environ if environ is None else environ
    _refuse_misspelled(env)
    overrides = {key: value for key, value in env.items() if key.startswith(PREFIX)}
    where = path or env.get("LORAJOB_SPEC") or None
    if where is None and (Path(DEFAULT_PATH).exists() or not overrides):
        where = DEFAULT_PATH
    if where is None:
        where, text = "the environment", ""
    else:
        text = _read(where)
        where = "standard input" if where == "-" else where
    tree, lines = _parse(text, where)
    origin = _lay_over(tree, overrides)
    _refuse_secrets(tree, where, lines, origin)
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        found = mistakes(error, tree, lambda loc: _written(loc, lines, origin))
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise SpecError(
            f"{where} has {count}:\n{bullet_list(found)}",
            "mend them and start again; `lorajob schema` prints every field",
        ) from None


def _refuse_misspelled(env: Mapping[str, str]) -> None:
    """A variable that is meant for a field and would set none, because LORAJOB has one underscore
    after it, is a mistake that nobody would find."""
    for variable in sorted(env):
        section, two, _ = variable.removeprefix("LORAJOB_").partition("__")
        if (
            variable.startswith("LORAJOB_")
            and not variable.startswith(PREFIX)
            and two
            and section.lower() in Spec.model_fields
        ):
            meant = PREFIX + variable.removeprefix("LORAJOB_")
            raise SpecError(
                f"{variable} sets nothing: two underscores stand after LORAJOB, too",
                f"write {meant}, or take the variable out of the environment",
            )


def _read(path: str) -> str:
    try:
        if path != "-":
            return Path(path).read_text(encoding="utf-8")
        path = "standard input"
        if sys.stdin is None:
            raise AccessError("standard input is closed", "name a file, or pipe the spec in")
        return sys.stdin.buffer.read().decode("utf-8")
    except FileNotFoundError:
        raise AccessError(
            f"there is no spec at {path}",
            "name a file (`lorajob run my.yaml`), mount one there, or set LORAJOB_SPEC; "
            "examples/ has some to start from",
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{path} is no UTF-8 text (byte {error.start})", "save it as UTF-8"
        ) from None
    except OSError as error:
        raise AccessError(
            f"the spec {path} cannot be read: {error.strerror}", "name a readable file"
        ) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which one would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    problem="a field's name is a text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.composer.ComposerError(
                    problem=f"{key.value!r} is written twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a number of thousands of digits, say
            raise yaml.constructor.ConstructorError(
                problem=str(error), problem_mark=node.start_mark
            ) from None


def resolvers_without_dates() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's, by which a date is a text: no field holds one, and a run's name may look like one."""
    return {
        first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_UniqueKeys.yaml_implicit_resolvers = resolvers_without_dates()
# PyYAML follows YAML 1.1, where 2e-4 without a dot is a string; everyone writes learning rates so.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number"}


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """The YAML text as a tree, and the line on which each of its fields stands."""
    try:
        loader = _UniqueKeys(text)
        root = loader.get_single_node()
        tree = None if root is None else loader.construct_document(root)
    except RecursionError:
        raise SpecError(f"{where} is nested too deep", "no field is deeper than five") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(
            f"{where}{line}: no valid YAML: {error.problem}", "mend that line"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(f"{where} is no valid YAML: {error}", "save it as plain text") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise SpecError(
            f"{where} holds {_KINDS.get(type(tree), 'one value')}, not fields",
            "start with `name: my-run`",
        )
    lines: dict[Location, int] = {}
    _note_lines(root, (), lines, set())
    return tree, lines


def _note_lines(
    node: yaml.Node | None, at: Location, lines: dict[Location, int], seen: set[int]
) -> None:
    if id(node) in seen:  # an alias, which may even stand in what it names
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*at, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*at, key.value), lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines, seen)


def _lay_over(tree: dict[str, Any], overrides: Mapping[str, str]) -> dict[Location, str]:
    """Put each LORAJOB__A__B=value into the tree; returns which variable set which field."""
    origin: dict[Location, str] = {}
    for variable, text in sorted(overrides.items()):
        parts = variable.removeprefix(PREFIX).lower().split("__")
        at: Any = tree
        try:
            keys: list[str | int] = [int(part) if part.isdecimal() else part for part in parts]
            for key in keys[:-1]:
                if isinstance(at, dict) and at.get(key) is None:
                    at[key] = {}  # a section left out, or of which only the heading is written
                at = at[key]
                if not isinstance(at, dict | list):
                    raise TypeError
            at[keys[-1]] = _value_of(text)
        except (IndexError, TypeError, KeyError, ValueError):
            raise SpecError(
                f"{variable} names no field: {'.'.join(parts)}",
                "write section and field as in the spec, e.g. LORAJOB__TRAIN__EPOCHS=2",
            ) from None
        origin[tuple(keys)] = variable
    return origin


def _value_of(text: str) -> Any:
    """What a variable's text means: numbers, true, null, [lists] and {fields} as in the file.

    Anything else is text as it is, also with a colon, a # or line breaks in it.
    """
    plain = text.strip()
    try:
        if plain[:1] in ("[", "{", '"', "'") or "\n" in plain:
            value = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
            return text if isinstance(value, str) and plain[:1] not in ('"', "'") else value
        loader = _UniqueKeys("")
        tag = loader.resolve(yaml.ScalarNode, plain, (True, False))  # type: ignore[no-untyped-call]
        value = loader.construct_object(yaml.ScalarNode(tag, plain))
        return text if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError):
        return text


def _refuse_secrets(
    tree: dict[str, Any], where: str, lines: dict[Location, int], origin: dict[Location, str]
) -> None:
    found = []
    for loc in _secrets_in(tree, (), set()):
        written = _written(loc, lines, origin)
        field = ".".join(MASK if looks_like_secret(str(part)) else str(part) for part in loc)
        found.append(f"{field}: holds a secret" + (f" ({written})" if written else ""))
    if found:
        raise SpecError(
            f"{where} holds what has to stay outside:\n{bullet_list(found)}",
            f"take it out: {CREDENTIALS}; and if others could read this spec, make a new one",
        )


def _secrets_in(value: Any, at: Location, seen: set[int]) -> Iterator[Location]:
    """Where a name or a text looks like a secret."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        if looks_like_secret(value):
            yield at
    elif isinstance(value, dict | list | tuple | set):
        if id(value) in seen:  # an alias, which may even stand in what it names
            return
        seen.add(id(value))
        fields = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in fields:
            if isinstance(key, str) and looks_like_secret(key):
                yield (*at, key)
            else:
                yield from _secrets_in(inner, (*at, key), seen)


def _written(loc: Location, lines: dict[Location, int], origin: dict[Location, str]) -> str | None:
    """The variable or the line that a field was written in, or the nearest section around it."""
    return next(
        (
            origin.get(part) or f"line {lines[part]}"
            for part in (loc[:end] for end in range(len(loc), 0, -1))
            if part in origin or part in lines
        ),
        None,
    )
