"""`lorajob export`: from an adapter that is there to everything that a run makes of one.

It is the run's own pipeline with the adapter in the place of the training: this says what is asked of
it, as a spec. It publishes where the command line says and nowhere else: what a run has published
there would be replaced.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.base_model import repository_of
from jobs.errors import SpecError
from jobs.export.adapter import find_adapter, lora_of, read_config
from jobs.spec import Spec
from jobs.spec_mistakes import mistakes
from jobs.spec_source import load_spec
from jobs.store.manifest import NAME as MANIFEST

# What everything is measured with where no data are named: short questions about nothing special.
QUESTIONS = Path(__file__).parent / "export" / "questions.jsonl"


@dataclass(frozen=True)
class Request:
    spec: Spec
    folder: Path
    adapter: Path
    warnings: tuple[str, ...]


def request(arguments: argparse.Namespace) -> Request:
    """What the command line asks for. Raises SpecError and AccessError."""
    if arguments.spec:
        return _of_spec(arguments)
    if not arguments.adapter or not arguments.out:
        lacks = "--adapter" if not arguments.adapter else "--out"
        raise SpecError(
            f"export has neither a spec nor {lacks}",
            "lorajob export SPEC, or lorajob export --adapter FOLDER --out FOLDER",
        )
    adapter = find_adapter(arguments.adapter)
    config = read_config(adapter)
    before = _run_of(adapter)
    named = config.get("base_model_name_or_path")
    commit = config.get("revision")
    base = arguments.base or before.get("model", {}).get("base") or named
    if not base:
        raise SpecError(f"the adapter in {adapter} does not say which base it is for", "set --base")
    if not arguments.base and base == named and commit and "@" not in base:
        base = f"{base}@{commit}"
    model = {
        **before.get("model", {}),
        "base": base,
        "load_in": arguments.load_in or before.get("model", {}).get("load_in") or "16bit",
        "chat_template": arguments.template or _template_of(adapter, arguments.out),
    }
    spec = _spec(
        {
            "name": arguments.name or before.get("name") or _name_of(arguments.out),
            "model": model,
            "data": {"train": arguments.data or [str(QUESTIONS)]},
            "lora": lora_of(config),
            "export": _export(arguments, {}),
            "verify": _verify(arguments, before.get("verify", {})),
            "publish": arguments.publish or [],
        }
    )
    return Request(spec, arguments.out, adapter, _warnings(adapter, config, spec, arguments))


def _of_spec(arguments: argparse.Namespace) -> Request:
    spec = load_spec(arguments.spec)
    adapter = find_adapter(arguments.adapter or arguments.work / spec.name)
    config = read_config(adapter)
    fields = spec.model_dump(mode="json")
    model = fields["model"]
    model["base"] = arguments.base or model["base"]
    model["load_in"] = arguments.load_in or model["load_in"]
    model["chat_template"] = arguments.template or model["chat_template"]
    if arguments.data:
        fields["data"] = {**fields["data"], "train": arguments.data, "eval": 0.0}
    changed = _spec(
        {
            **fields,
            "name": arguments.name or spec.name,
            "lora": {**lora_of(config), "loftq": spec.lora.loftq and model["load_in"] == "4bit"},
            "export": _export(arguments, fields["export"]),
            "verify": _verify(arguments, fields["verify"]),
            "publish": arguments.publish or [],
        }
    )
    folder = arguments.out or Path("exports") / changed.name
    return Request(changed, folder, adapter, _warnings(adapter, config, changed, arguments))


def _spec(fields: dict[str, Any]) -> Spec:
    try:
        return Spec.model_validate(fields)
    except ValidationError as error:
        said = "\n".join(_as_option(text) for text in mistakes(error, fields))
        raise SpecError(said, "see lorajob export --help") from None


# The options that say what a field holds.
OPTIONS = {
    "name": "--name",
    "model.base": "--base",
    "model.chat_template": "--template",
    "data.train": "--data",
    "export.gguf": "--gguf",
    "verify.max_new_tokens": "--max-new-tokens",
    "publish": "--publish",
}


def _as_option(mistake: str) -> str:
    """A mistake in a field as one in the option that set it."""
    field, colon, text = mistake.partition(": ")
    option = next((o for f, o in OPTIONS.items() if field == f or field.startswith(f"{f}.")), field)
    return option + colon + text


def _export(arguments: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    found = dict(before)
    if arguments.merged:
        found["merged"] = None if arguments.merged == "none" else arguments.merged
    if arguments.gguf is not None:
        found["gguf"] = [kind.strip().lower() for kind in arguments.gguf.split(",") if kind.strip()]
    found |= {name: True for name in ("imatrix", "adapter_gguf") if getattr(arguments, name)}
    return found


def _verify(arguments: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    limit = arguments.max_new_tokens
    return before if limit is None else {**before, "max_new_tokens": limit}


def _run_of(adapter: Path) -> dict[str, Any]:
    """The spec of the run that made the adapter, where its manifest lies beside it."""
    try:
        spec = json.loads((adapter.parent / MANIFEST).read_text("utf-8"))["spec"]
        found: dict[str, Any] = spec if isinstance(spec["model"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _template_of(adapter: Path, out: Path) -> str:
    """The chat template that lies beside the adapter, as a file; `auto` where none does."""
    own = adapter / "chat_template.jinja"
    if own.is_file():
        return str(own)
    try:
        source = json.loads((adapter / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"
    if not isinstance(source, str):
        return "auto"
    path = out / ".work" / "chat_template.jinja"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, "utf-8")
    return str(path)


def _name_of(out: Path) -> str:
    name = out.resolve().name.lower().replace("_", "-").replace(" ", "-")
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-.")).strip("-.")[:53]


def _warnings(
    adapter: Path, config: dict[str, Any], spec: Spec, arguments: argparse.Namespace
) -> tuple[str, ...]:
    found = []
    named = config.get("base_model_name_or_path")
    taken = repository_of(spec.model.base)
    if named and named != taken:
        found.append(f"the adapter in {adapter} names {named} as its base, and {taken} is taken")
    if spec.model.load_in == "16bit" and not arguments.load_in and "4bit" in str(named):
        found.append(
            f"{named} is a base in 4 bit: if the adapter was trained on it so, --load-in 4bit is "
            "nearer to what was trained"
        )
    return tuple(found)
