"""values.schema.json: the values' types, what they mean, and within them the run spec's own schema."""

from __future__ import annotations

import json
from typing import Any

from helm.documented import documented
from helm.values import schema as values_schema
from jobs.spec import json_schema as spec_schema

SPEC = "spec"
DATE = r"^\d{4}-\d{2}-\d{2}$"  # Helm looks at no `format`


def values_schema_json() -> str:
    """The file's text."""
    texts = {value.path: value.text for value in documented()}
    schema = values_schema()
    kept = schema.pop("$defs")
    whole = _inlined(schema, kept, "", texts)
    # Every chart that is part of another is given its `global` values, whatever they are.
    whole["properties"]["global"] = {"type": "object", "description": "Of a chart around this one."}
    whole["properties"][SPEC] = {"$ref": f"#/$defs/{SPEC}", "description": texts[SPEC]}
    run = spec_schema()
    parts = run.pop("$defs")
    run.pop("$schema")
    whole["$defs"] = {
        **_reachable(whole, kept),
        SPEC: _of_spec(run),
        **{f"{SPEC}.{name}": _of_spec(part) for name, part in parts.items()},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lorajob's values"}
    return json.dumps({**head, **whole}, indent=1, ensure_ascii=False) + "\n"


def _inlined(part: Any, kept: dict[str, Any], path: str, texts: dict[str, str]) -> dict[str, Any]:
    """A section with its values' descriptions: two of one type mean different things."""
    if "$ref" in part:
        part = kept[part["$ref"].rpartition("/")[2]]
    made = dict(part)
    if path in texts:
        made["description"] = texts[path]
    if part.get("properties") and (not path or path in texts):
        made["properties"] = {
            name: _inlined(inner, kept, f"{path}.{name}".lstrip("."), texts)
            for name, inner in part["properties"].items()
        }
    return made


def _reachable(part: Any, kept: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def look(inner: Any) -> None:
        if isinstance(inner, dict):
            name = str(inner.get("$ref", "")).rpartition("/")[2]
            if name in kept and name not in found:
                found[name] = kept[name]
                look(kept[name])
            for value in inner.values():
                look(value)
        elif isinstance(inner, list):
            for value in inner:
                look(value)

    look(part)
    return found


def _of_spec(part: Any) -> Any:
    """A part of the spec's schema, with its references to where it stands here."""
    if isinstance(part, list):
        return [_of_spec(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    made = {
        key: value.replace("#/$defs/", f"#/$defs/{SPEC}.") if key == "$ref" else _of_spec(value)
        for key, value in part.items()
        if key != "title" or not isinstance(value, str)
    }
    if made.get("format") == "date":
        made["pattern"] = DATE
    return made
