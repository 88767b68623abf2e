"""What is wrong with a spec, in words: pydantic's errors, each told for the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from jobs.secrets import is_secret_field, redact
from jobs.spec import (
    ENDPOINT_PATTERN,
    NAME_PATTERN,
    PLACE_PATTERN,
    REPOSITORY_PATTERN,
    Spec,
    share_of,
)
from jobs.spec_names import meant_by

Location = tuple[str | int, ...]

CREDENTIALS = (
    "credentials belong into the environment (HF_TOKEN, AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, ...) or into the files mounted for them, never into a spec"
)
OTHER_CARD = (
    "; for another one leave it out and set limits.gpu_memory_gib: where the machine has no GPU, `check` "
    "reckons with one that has so much, and the run uses no more"
)
LONGEST = 120  # characters shown of a wrong value
_PATTERNS = {
    NAME_PATTERN: "a name has lower-case letters, digits, dots and dashes, at most 53, "
    "with a letter or digit first and last",
    REPOSITORY_PATTERN: "a repository on the Hub is owner/name or owner/name@branch",
    ENDPOINT_PATTERN: "an address is wanted, as https://minio.example.org:9000",
    PLACE_PATTERN: "a path is wanted, not empty and without NUL characters",
}


def mistakes(
    error: ValidationError,
    tree: dict[str, Any],
    where: Callable[[Location], str | None] = lambda loc: None,
) -> list[str]:
    """One line per mistake: field, what is wrong, and where it was written, as `where` says."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = _fields_of(item["loc"], tree)
        field = ".".join(str(part) for part in loc) or "the spec"
        written = where(loc)
        # A union reports once for each of its members; the first telling, which may be of a field
        # inside, is enough.
        if any(told.startswith(f"{field}.") for told in found):
            continue
        text = _text(item, loc)
        found.setdefault(field, f"{field}: {text}" + (f" ({written})" if written else ""))
    return list(found.values())


def _text(item: Any, loc: Location) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(loc)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        return _unknown_value(value, context["expected"], loc)
    text = _wanted(kind, context, loc)
    if text is None:
        text = item["msg"].removeprefix("Value error, ")
    if not isinstance(value, dict | list):
        text += f", got {_shown(value)}"
    way_out = _way_out(kind, value, loc)
    return f"{text}: {way_out}" if way_out else text


def _wanted(kind: str, context: Mapping[str, Any], loc: Location) -> str | None:
    """What a field takes, where pydantic would tell it to programmers."""
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _BOUNDS:
        name, text = _BOUNDS[kind]
        bound = context[name]
        return text.format(int(bound) if bound == int(bound) else bound)
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"])
    return None


_DAY = "a day is wanted, as 2025-01-31"
_WORDS = {
    "bool_parsing": "true or false is wanted",
    "bool_type": "true or false is wanted",
    "date_from_datetime_inexact": _DAY,
    "date_from_datetime_parsing": _DAY,
    "date_parsing": _DAY,
    "date_type": _DAY,
    "dict_type": "names with their values are wanted, as {output: answer}",
    "finite_number": "a finite number is wanted",
    "float_type": "a number is wanted",
    "int_type": "a whole number is wanted",
    "invalid_key": "a field's name is a text",
    "list_type": "a list is wanted",
    "model_type": "it is a section",
    "string_too_short": "a text is wanted that is not empty",
    "string_type": "a text is wanted",
    "too_short": "is empty, where at least one is wanted",
}
_BOUNDS = {
    "greater_than": ("gt", "has to be above {}"),
    "greater_than_equal": ("ge", "has to be {} or more"),
    "less_than": ("lt", "has to be below {}"),
    "less_than_equal": ("le", "has to be {} or less"),
}


_SHARES = (("data", "eval"), ("data", "skip_bad_rows"), ("data", "replay", "share"))
_NUMBERS = {
    "int_type": re.compile(r"[-+]?\d+"),
    "float_type": re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?"),
}


def _way_out(kind: str, value: Any, loc: Location) -> str | None:
    """What to write instead, where that is plain."""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = value.strip()
        if _NUMBERS[kind].fullmatch(plain):
            return f"remove the quotes, {plain}"
        if (share := share_of(plain)) is not None:
            return f"write {share:g}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind == "less_than" and loc in _SHARES and 1 < value <= 100:
        return f"write {value / 100:g} for {value:g} %"
    if kind == "string_type" and isinstance(value, int | float):
        return f"put it in quotes, '{str(value).lower() if isinstance(value, bool) else value}'"
    if kind == "list_type" and isinstance(value, dict):
        return "begin each of its items with a dash and a space"
    if kind == "list_type" and value is None:
        return "leave it out, or write []"
    if kind == "model_type":
        fields = model.model_fields.items() if (model := _model_at(loc)) else ()
        needed = next((name for name, info in fields if info.is_required()), None)
        if needed and isinstance(value, str | int | float):
            return f"write {{{needed}: {_short(str(value))}}}"
        return "write its fields below it" + ("" if needed else ", or leave it out")
    return None


def _unknown_field(loc: Location) -> str:
    name = str(loc[-1])
    if is_secret_field(name):
        return f"unknown field; {CREDENTIALS}"
    if meant := meant_by(name):
        return f"unknown field; {meant}"
    nearest = _nearest(loc)
    return "unknown field" + (f"; did you mean {nearest}?" if nearest else "")


def _unknown_value(value: Any, expected: str, loc: Location) -> str:
    """The choice most like the wrong one comes first: the list of them may be long."""
    choices = re.findall(r"'([^']*)'", expected)
    if not choices:  # true is all that there is
        return f"it is always {expected.lower()}: leave it out"
    text = f"unknown value {_shown(value)}"
    if str(value).lower() in ("none", "no", "off", "false", "") and _may_be_null(loc):
        return f"{text}; for none write null"
    # Of cards only the same one in other letters: one of a like name is another card.
    near = _like(str(value), choices, 1.0 if loc == ("limits", "gpu") else 0.6)
    text += f"; did you mean {near}? Known are " if near else "; known are "
    return text + ", ".join(choices) + (OTHER_CARD if loc == ("limits", "gpu") else "")


def _like(value: str, choices: list[str], least: float) -> str | None:
    """The choice most like a value, whatever its case and punctuation; the first of several."""

    def bare(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def likeness(choice: str) -> float:
        begins = bool(bare(value)) and bare(choice).startswith(bare(value))  # 4 of 4bit
        return max(0.6 * begins, difflib.SequenceMatcher(None, bare(value), bare(choice)).ratio())

    best = max(choices, key=likeness)
    return best if likeness(best) >= least else None


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _short(repr(value))


def _short(text: str) -> str:
    text = redact(text)  # before it is cut: half a secret has no form
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


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


def _model_at(loc: Location) -> type[BaseModel] | None:
    """The section at a place in the spec."""
    model: type[BaseModel] | None = Spec
    for part in loc:
        if isinstance(part, str):
            model = _model_of(model, part)
    return model


def _model_of(model: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or in a union; None for a plain value."""
    if model is None or field not in model.model_fields:
        return None
    return next(iter(_models_in(model.model_fields[field].annotation)), None)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _may_be_null(loc: Location) -> bool:
    model = _model_at(loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model else None
    return field is not None and type(None) in get_args(field.annotation)


def _nearest(loc: Location) -> str | None:
    """The field most like the unknown one: in its own section first, then anywhere."""
    model = _model_at(loc[:-1])
    name = str(loc[-1])
    if model is not None:
        close = difflib.get_close_matches(name, list(model.model_fields), n=1)
        if close:
            return ".".join([*(str(part) for part in loc[:-1]), close[0]])
    everywhere: dict[str, str] = {}
    for path in all_fields():
        everywhere.setdefault(path.rpartition(".")[2], path)
    close = difflib.get_close_matches(name, list(everywhere), n=1)
    return everywhere[close[0]] if close else None


def all_fields(model: type[BaseModel] = Spec, prefix: str = "") -> list[str]:
    """The paths of all fields, those of a list's items as if there were one."""
    paths: list[str] = []
    for name, info in model.model_fields.items():
        paths.append(prefix + name)
        for inner in _models_in(info.annotation):
            paths += all_fields(inner, f"{prefix}{name}.")
    return paths
