"""Writes docs/spec.md from the spec's models, and the table of docs/fitting.md from what a training is
reckoned to take: `python -m docs.generate`; with --check it only says what is stale."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES
from jobs.spec import NAME_PATTERN, REPOSITORY_PATTERN, GpuName, Spec, json_schema
from jobs.train.cards import GIB, known
from jobs.train.room import Room, smallest_card
from jobs.train.shape import read_shape

FILE = Path(__file__).with_name("spec.md")
FITTING = Path(__file__).with_name("fitting.md")
START, END = "<!-- Written by `python -m docs.generate`. -->", "<!-- The table's end. -->"
FITTED: tuple[GpuName, ...] = ("L4", "A100-40GB", "H100")
MADE_AGAIN = " \\*"
LONGEST = 2048  # tokens of the longest conversation in the table
MOST_CHOICES = 8  # more of them stand below the table

# What a section is about, where the models say it of the fields alone.
# What one of a list is called.
ONE = {"Source": "a source", "Prompt": "a question", "HubTarget": "a repository on the Hub"}

HEAD = """\
# The run spec

<!-- Written by `python -m docs.generate`: edit jobs/spec.py or docs/generate.py. -->

Every field there is, from the models that check a spec (`jobs/spec.py`). `lorajob schema` prints the
same as a JSON schema, for editors.

```yaml
name: support-bot
model:
  base: unsloth/Llama-3.2-1B-Instruct
  load_in: 4bit
  max_seq_length: 2048
data:
  train:
    - source: chats/*.jsonl.gz
    - {source: "hf://mlabonne/FineTome-100k", split: train, limit: 20000}
  eval: 0.02
lora: {rank: 16, alpha: 16}
train: {epochs: 1, batch_size: 8, learning_rate: 2e-4}
export: {gguf: [q8_0, q4_k_m]}
verify:
  prompts:
    - {ask: "Who are you?", expect: Mira}
publish:
  - s3://models/support-bot
  - hub: acme/support-bot
```

**Where it is read from**: the path on the command line (`-` is standard input), else `$LORAJOB_SPEC`,
else `/etc/lorajob/spec.yaml`. It is YAML, so JSON too.

**From the environment**, over what the file says: `LORAJOB__`, then the field's name in capitals with
two underscores for each dot. A value is read as YAML would: numbers, `true`, `null`, `[lists]`,
`{fields}`; anything else is text as it stands. Variables alone are a whole spec.

```
LORAJOB__TRAIN__LEARNING_RATE=1e-4
LORAJOB__EXPORT__GGUF='[q8_0, q4_k_m]'
LORAJOB__DATA__TRAIN=/work/chats.jsonl
LORAJOB__DATA__TRAIN__0__LIMIT=100        # of the first source, where the file has it with its fields
```

**A mistake** ends the start at once with code 2: every one is named, with its line or variable, and an
unknown field with the nearest known one. A number is a number: `"16"` in quotes is refused.

In the tables, *required* fields must be written, and – is a field that is unset until you set it.
"""


@dataclass(frozen=True)
class Part:
    """A section of the spec: `path` is what its fields' names begin with, and `title` its heading."""

    path: str
    title: str
    about: str
    schema: dict[str, Any]
    called: str = "fields"

    @property
    def anchor(self) -> str:
        return slug(self.title)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def parts(schema: dict[str, Any] | None = None) -> list[Part]:
    """The spec's sections in the order of its fields, each once."""
    schema = schema or json_schema()
    defs: dict[str, dict[str, Any]] = schema["$defs"]
    found: dict[str, Part] = {}

    def visit(part: Part) -> None:
        for name, field in part.schema["properties"].items():
            path = f"{part.path}.{name}".lstrip(".")
            for ref, in_list in _refs(field):
                if ref in found or _same(defs[ref], found) is not None:
                    continue
                several = in_list or ref == "Source"  # a source alone stands for a list of one
                one = ONE[ref] if several else "fields"
                title = f"`{path}[]`: {one}" if several else f"`{path}`"
                at = f"{path}[]" if several else path
                about = _text(field)
                found[ref] = Part(at, title, "" if several else about, defs[ref], one)
                visit(found[ref])

    top = Part("", "Top level", "", schema)
    visit(top)
    return [top, *found.values()]


def _same(schema: dict[str, Any], found: dict[str, Part]) -> Part | None:
    """The section that has all of these fields already."""
    own = schema["properties"]
    return next(
        (
            part
            for part in found.values()
            if all(part.schema["properties"].get(name) == field for name, field in own.items())
        ),
        None,
    )


def _refs(field: dict[str, Any], in_list: bool = False) -> Iterator[tuple[str, bool]]:
    """The sections that a field may hold, and whether as a list's items."""
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], in_list
    for inner in field.get("anyOf", []):
        yield from _refs(inner, in_list)
    if isinstance(items := field.get("items"), dict):
        yield from _refs(items, True)
    if isinstance(values := field.get("additionalProperties"), dict):
        yield from _refs(values, in_list)


class _Writer:
    def __init__(self) -> None:
        self._schema = json_schema()
        self._defs: dict[str, dict[str, Any]] = self._schema["$defs"]
        self._parts = parts(self._schema)
        self._of = {id(part.schema): part for part in self._parts}

    def text(self) -> str:
        contents = "\n".join(
            f"- [{part.title.partition(':')[0]}](#{part.anchor})" for part in self._parts
        )
        return "\n".join([HEAD, contents, "", *(self._section(part) for part in self._parts)])

    def _section(self, part: Part) -> str:
        rows, below = [], []
        for name, field in part.schema["properties"].items():
            path = f"{part.path}.{name}".lstrip(".")
            if choices := _long_choices(field):
                below.append(f"`{path}`: {', '.join(f'`{choice}`' for choice in choices)}.")
            required = name in part.schema.get("required", [])
            rows.append(
                [
                    f"`{path}`",
                    self._kind(field),
                    "*required*" if required else _default(field),
                    _text(field),
                ]
            )
        lines = [f"## {part.title}", ""]
        if part.about:
            lines += [_escaped(part.about), ""]
        lines += _table(["field", "type", "default", "meaning"], rows)
        for text in below:
            lines += ["", text]
        return "\n".join([*lines, ""])

    def _kind(self, field: dict[str, Any]) -> str:
        found = list(dict.fromkeys(self._kinds(field)))
        if field.get("default", 0) is None:  # then null says what leaving it out says
            found.remove("`null`")
        if "list of text or" in found[-1]:
            found[-1] = "a list of these"
        return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]

    def _kinds(self, field: dict[str, Any]) -> Iterator[str]:
        """A field's types in plain words."""
        if "anyOf" in field:
            kinds = [kind for inner in field["anyOf"] for kind in self._kinds(inner)]
            yield from (kind for kind in kinds if kind != "`null`")
            yield from (kind for kind in kinds if kind == "`null`")
        elif "$ref" in field:
            schema = self._defs[field["$ref"].rpartition("/")[2]]
            same = self._of.get(id(schema)) or _same(
                schema, {part.path: part for part in self._parts if part.path}
            )
            assert same, field
            yield f"[{same.called}](#{same.anchor})"
        elif "enum" in field:
            yield from (
                [f"`{choice}`" for choice in field["enum"]]
                if len(field["enum"]) <= MOST_CHOICES
                else ["one of those below"]
            )
        elif "const" in field:
            yield f"`{json.dumps(field['const']).strip(chr(34))}`"
        elif field["type"] == "array":
            yield f"list of {self._kind(field['items'])}"
        elif field["type"] == "object":
            yield f"names, each with {self._kind(field['additionalProperties'])}"
        else:
            yield _plain(field)


def _plain(field: dict[str, Any]) -> str:
    match field["type"]:
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
        case "string":
            known = {NAME_PATTERN: "name", REPOSITORY_PATTERN: "`owner/name[@branch]`"}
            return "date" if field.get("format") == "date" else known.get(field.get("pattern", ""), "text")  # fmt: skip
        case kind:
            return f"{'whole number' if kind == 'integer' else 'number'}{_bounds(field)}"


def _bounds(field: dict[str, Any]) -> str:
    """`from 1 to 1024`, `above 0`, `from 0 to below 1`, ..."""
    lower = {"minimum": "from", "exclusiveMinimum": "above"}
    upper = {"maximum": "to", "exclusiveMaximum": "to below"}
    shown = [f" {word} {field[key]}" for key, word in {**lower, **upper}.items() if key in field]
    return "".join(shown).replace(" above 0 to below", " above 0 and below")


def _long_choices(field: dict[str, Any]) -> list[str]:
    """The choices that are too many for a table's cell."""
    inner = [field, *field.get("anyOf", []), field.get("items", {})]
    return next((p["enum"] for p in inner if len(p.get("enum", [])) > MOST_CHOICES), [])


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if value is None or "$ref" in field:
        return "–"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _text(field: dict[str, Any]) -> str:
    return _escaped(" ".join(field.get("description", "").split()))


def _escaped(text: str) -> str:
    """What markdown would read as emphasis or a tag, outside of `code`, is text."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*<>])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]


def spec_page() -> str:
    """The file's text."""
    return _Writer().text()


def fitting_page(text: str) -> str:
    """The page about fitting, with its table made anew."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    return "\n".join([head + start, "", *_fitting_table(), "", end + tail])


def _fitting_table() -> list[str]:
    rows = []
    for name, config in SHAPES.items():
        shape = read_shape(config)
        assert shape
        if shape.softcapped:
            continue
        for load_in in ("4bit", "16bit"):
            model = {"base": "a/b", "load_in": load_in, "max_seq_length": LONGEST}
            spec = Spec.model_validate({"name": "x", "model": model, "data": {"train": "x.jsonl"}})
            room = Room(spec, shape, "unsloth", LONGEST, known("B200"))
            least, most = room.least.total / GIB, room.takes(room.largest).total / GIB
            on = [room.other(card=known(card)) for card in FITTED]
            rows.append(
                [
                    f"{name}, {load_in}",
                    f"{least:.1f} ({smallest_card(room)})",
                    f"{most:.1f} ({smallest_card(room, room.largest)})",
                    *(_tokens(there) for there in on),
                ]
            )
    return _table(["shape", "least GiB (card)", "most GiB (card)", *FITTED], rows)


def _tokens(room: Room) -> str:
    if not room.fits:
        return "–"
    return f"{room.plan.tokens:,}{MADE_AGAIN if room.plan.checkpointing else ''}"


def main(check: bool) -> int:
    stale = []
    for path, make in (
        (FILE, spec_page),
        (FITTING, lambda: fitting_page(FITTING.read_text("utf-8"))),
    ):
        if not path.exists() or path.read_text("utf-8") != make():
            stale.append(path)
            if not check:
                path.write_text(make(), "utf-8")
    for path in stale:
        print(f"docs/{path.name} " + ("is stale: python -m docs.generate" if check else "written"))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
