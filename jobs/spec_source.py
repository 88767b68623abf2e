"""Reading a spec: file, standard input and environment, with every mistake in one message."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from jobs.errors import AccessError, SpecError, bullet_list
from jobs.spec import Spec

DEFAULT_PATH = "/etc/lorajob/spec.yaml"
PREFIX = "LORAJOB__"

Location = tuple[str | int, ...]


def load_spec(path: str | None = None, environ: Mapping[str, str] | None = None) -> Spec:
    """The checked spec.

    It is read from `path` (`-` is standard input), else from $LORAJOB_SPEC, else from
    /etc/lorajob/spec.yaml where that exists; then `LORAJOB__SECTION__FIELD=value` variables are
    laid over it. Raises SpecError with all mistakes at once, AccessError where there is no file.
    """
    env = os.environ if environ is None else environ
    overrides = {key: value for key, value in env.items() if key.startswith(PREFIX)}
    where = path or env.get("LORAJOB_SPEC")
    if where is None and (Path(DEFAULT_PATH).exists() or not overrides):
        where = DEFAULT_PATH
    if where is None:
        where, text = "the environment", ""
    else:
        text = _read(where)
        where = "standard input" if where == "-" else where
    tree, lines = _parse(text, where)
    origin = _lay_over(tree, overrides)
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        found = _messages(error, tree, lines, origin)
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise SpecError(
            f"{where} has {count}:\n{bullet_list(found)}",
            "mend them and start again; `lorajob schema` prints every field",
        ) from None


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is written twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 2e-4 without a dot is a string; everyone writes learning rates so.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """The YAML text as a tree, and the line on which each of its fields stands."""
    try:
        root = yaml.compose(text, _UniqueKeys)
        tree = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
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
            f"{where} holds a {type(tree).__name__}, not fields", "start with `name: my-run`"
        )
    lines: dict[Location, int] = {}
    _note_lines(root, (), lines)
    return tree, lines


def _note_lines(node: yaml.Node | None, at: Location, lines: dict[Location, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*at, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*at, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines)


def _lay_over(tree: dict[str, Any], overrides: Mapping[str, str]) -> dict[Location, str]:
    """Put each LORAJOB__A__B=value into the tree; returns which variable set which field.

    Values are YAML, so numbers, lists and null mean what they mean in the file.
    """
    origin: dict[Location, str] = {}
    for variable, text in sorted(overrides.items()):
        parts = variable.removeprefix(PREFIX).lower().split("__")
        try:
            value = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            value = text  # a plain text with a colon or a brace in it; the field's type decides
        at: Any = tree
        keys: list[str | int] = [int(part) if part.isdigit() else part for part in parts]
        try:
            for key in keys[:-1]:
                at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
                if not isinstance(at, dict | list):
                    raise TypeError
            at[keys[-1]] = value
        except (IndexError, TypeError, KeyError):
            raise SpecError(
                f"{variable} names no field: {'.'.join(parts)}",
                "write section and field as in the spec, e.g. LORAJOB__TRAIN__EPOCHS=2",
            ) from None
        origin[tuple(keys)] = variable
    return origin


def _messages(
    error: ValidationError,
    tree: dict[str, Any],
    lines: dict[Location, int],
    origin: dict[Location, str],
) -> list[str]:
    """One line per mistake: field, what is wrong, and where it was written."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = _fields_of(item["loc"], tree)
        field = ".".join(str(part) for part in loc) or "the spec"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            nearest = _nearest(loc)
            text = "unknown field" + (f"; did you mean {nearest}?" if nearest else "")
        elif item["type"] == "missing":
            text = "is missing"
        elif not isinstance(item["input"], dict | list):
            text += f", got {item['input']!r}"
        written = origin.get(loc) or (f"line {lines[loc]}" if loc in lines else None)
        # A union reports once for each of its members; the first telling is enough.
        found.setdefault(field, f"{field}: {text}" + (f" ({written})" if written else ""))
    return list(found.values())


def _fields_of(loc: Location, tree: dict[str, Any]) -> Location:
    """pydantic's location as far as it names fields: members of unions have names there too."""
    real: list[str | int] = []
    model: type[BaseModel] | None = Spec
    at: Any = tree
    for part in loc:
        is_field = model is not None and part in model.model_fields
        is_written = (isinstance(at, dict) and part in at) or (
            isinstance(at, list) and isinstance(part, int)
        )
        if not (is_field or is_written):
            continue
        real.append(part)
        if isinstance(part, str):
            model = _model_of(model, part)
            at = at.get(part) if isinstance(at, dict) else None
        else:
            at = at[part]
    return tuple(real)


def _model_of(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or in a union; None for a plain value."""
    if model is None or field not in model.model_fields:
        return None
    return next(iter(_models_in(model.model_fields[field].annotation)), None)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _nearest(loc: Location) -> str | None:
    """The field most like the unknown one: in its own section first, then anywhere."""
    model: type[BaseModel] | None = Spec
    for part in loc[:-1]:
        if isinstance(part, str):
            model = _model_of(model, part)
    name = str(loc[-1])
    if model is not None:
        close = difflib.get_close_matches(name, list(model.model_fields), n=1)
        if close:
            return ".".join([*(str(part) for part in loc[:-1]), close[0]])
    everywhere = {path.rsplit(".", 1)[-1]: path for path in _all_fields(Spec, "")}
    close = difflib.get_close_matches(name, list(everywhere), n=1)
    return everywhere[close[0]] if close else None


def _all_fields(model: type[BaseModel], prefix: str) -> list[str]:
    paths: list[str] = []
    for name, info in model.model_fields.items():
        paths.append(prefix + name)
        for inner in _models_in(info.annotation):
            paths += _all_fields(inner, f"{prefix}{name}.")
    return paths
