"""values.yaml as documentation: for each value its default and the comment above it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VALUES = Path(__file__).parent / "lorajob" / "values.yaml"


@dataclass(frozen=True)
class Value:
    path: str  # work.sizeGi
    default: Any
    text: str  # what it means
    is_section: bool  # whether it has values below it


def documented(text: str | None = None) -> list[Value]:
    """All values, in their order. Raises ValueError for one without a comment above it."""
    text = VALUES.read_text("utf-8") if text is None else text
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return _below(root, yaml.safe_load(text), "", text.splitlines())


def _below(node: yaml.MappingNode, tree: Any, path: str, lines: list[str]) -> list[Value]:
    found = []
    for key, inner in node.value:
        at = f"{path}.{key.value}".lstrip(".")
        section = isinstance(inner, yaml.MappingNode) and bool(inner.value)
        comment = _above(lines, key.start_mark.line, key.start_mark.column)
        if not comment:
            raise ValueError(f"{VALUES.name}, line {key.start_mark.line + 1}: {at} has no comment")
        found.append(Value(at, tree[key.value], comment, section))
        if section:
            found += _below(inner, tree[key.value], at, lines)
    return found


def _above(lines: list[str], line: int, column: int) -> str:
    """The comment that ends right above a line, in the same column."""
    mark = " " * column + "# "
    first = line
    while first and lines[first - 1].startswith(mark):
        first -= 1
    return " ".join(text.removeprefix(mark).strip() for text in lines[first:line])
