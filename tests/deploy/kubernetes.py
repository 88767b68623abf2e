"""Kubernetes' own schemas of each version, where an unknown field is an error."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import kubernetes_validate.utils as schemas

# From the chart's kubeVersion on; the last is the newest that there are schemas for.
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]

# A version's definitions are megabytes, and each validation would read them again.
schemas.schema_contents = functools.cache(schemas.schema_contents)


def invalid(objects: Iterable[dict[str, Any]], version: str) -> list[str]:
    """What Kubernetes of this version would refuse."""
    found = []
    for its in objects:
        try:
            schemas.validate(its, version, strict=True)
        except schemas.ValidationError as error:
            place = ".".join(map(str, error.path))
            found.append(f"{its['kind']} {its['metadata']['name']}: {place}: {error.message}")
    return found
