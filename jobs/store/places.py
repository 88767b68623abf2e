"""What a spec's text for a place means: a path, an S3 address, a repository on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./+-]+?))?(:(?P<inside>.+))?", re.ASCII)  # fmt: skip


class WrongPlace(ValueError):
    """The text names no place; says why, and never repeats what might be a secret."""


@dataclass(frozen=True, slots=True)
class LocalPlace:
    path: str


@dataclass(frozen=True, slots=True)
class S3Place:
    bucket: str
    key: str  # "" for the whole bucket; without a slash around it


@dataclass(frozen=True, slots=True)
class HubPlace:
    """`hf://[datasets/|models/]owner/name[@revision][/path or glob inside]`"""

    kind: Literal["model", "dataset"]
    repository: str  # owner/name
    revision: str | None
    inside: str  # path or glob in the repository, "" for all of it


Place = LocalPlace | S3Place | HubPlace


def parse_place(text: str, hub_kind: Literal["model", "dataset"] = "model") -> Place:
    """The place a text names; `hub_kind` is what `hf://owner/name` means. Raises WrongPlace."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalPlace(text)
    require_no_secret(text)
    match scheme:
        case "file":
            return LocalPlace(rest)
        case "s3":
            bucket, _, key = rest.partition("/")
            if not bucket:
                raise WrongPlace("an S3 address is s3://bucket/prefix")
            return S3Place(bucket, key.strip("/"))
        case "hf" | "hub":
            return _hub(rest, hub_kind)
    raise WrongPlace(f"{scheme}:// is none of s3://, hf:// and file://")


def parse_base(text: str) -> Place:
    """The same for a base model, where a bare `owner/name` that is no folder here is the Hub's."""
    looks = REPOSITORY.fullmatch(text)
    if looks and not looks["inside"] and not Path(text).exists() and not text.startswith("."):
        return HubPlace("model", looks["id"], looks["revision"], "")
    return parse_place(text)


def require_no_secret(text: str) -> None:
    """Raises WrongPlace for an address with a user, a password or a signed query in it."""
    try:
        parts = urlsplit(text)
        user = parts.username is not None or parts.password is not None
    except ValueError:
        raise WrongPlace("this is no address") from None
    if user and parts.scheme not in ("hf", "hub"):  # whose @ stands before a revision
        raise WrongPlace(
            "an address with a user name or password in it is refused, because it ends up in logs; "
            "put credentials into the environment"
        )
    if user and ":" in parts.netloc:
        raise WrongPlace("a Hub address has no password in it; set HF_TOKEN instead")
    if parts.query or re.search(r"[?&](X-Amz-|Signature=|sig=|token=)", text, re.IGNORECASE):
        raise WrongPlace(
            "an address with a query (a presigned one) is refused: it holds a secret, and runs out "
            "in the middle of a run; name the place, and put credentials into the environment"
        )


def _hub(rest: str, kind: Literal["model", "dataset"]) -> HubPlace:
    for prefix, named in (("datasets/", "dataset"), ("models/", "model")):
        if rest.startswith(prefix):
            rest, kind = rest.removeprefix(prefix), named  # type: ignore[assignment]
    owner, _, more = rest.partition("/")
    name, slash, inside = more.partition("/")
    revision = None
    if "@" in name:
        name, _, revision = name.partition("@")
        if revision == "refs" and slash:  # the one kind of revision with slashes: refs/pr/7
            one, _, after = inside.partition("/")
            two, _, inside = after.partition("/")
            revision = f"refs/{one}/{two}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", f"{owner}/{name}", re.ASCII) or revision == "":
        raise WrongPlace("a repository on the Hub is hf://owner/name[@revision][/path]")
    return HubPlace(kind, f"{owner}/{name}", revision, inside.strip("/"))
