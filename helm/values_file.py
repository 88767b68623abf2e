"""Reading values as Helm does: YAML 1.2, in which 2e-4 is a number and a date is a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jobs.spec_source import resolvers_without_dates


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = resolvers_without_dates()
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_values(path: Path) -> dict[str, Any]:
    """The file's values."""
    found: dict[str, Any] = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    return found
