"""What an error of the Hub's client means: worth another try, or the end, and what to do then."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from huggingface_hub import constants
from huggingface_hub import errors as hub

from jobs.errors import AccessError, LorajobError
from jobs.store.hub.client import PASSING
from jobs.store.local import disk_error
from jobs.store.retry import Again


class Damaged(Exception):
    """A file arrived whole and with other bytes than the Hub's."""


class Overtaken(Exception):
    """Somebody else has committed in between."""


@dataclass(frozen=True)
class About:
    """What was asked for."""

    name: str  # model owner/name
    page: str  # its address for people
    endpoint: str
    revision: str
    token: Callable[[], str]  # a phrase about it


def judge(error: BaseException, about: About) -> Again | LorajobError | None:
    """The first of the error and its causes that says something: the client wraps what happened."""
    step: BaseException | None = error
    while step is not None:
        if (meaning := _meaning(step, about)) is not None:
            return meaning
        step = step.__cause__
    return None


def _meaning(error: BaseException, about: About) -> Again | LorajobError | None:
    match error:
        case Damaged():
            return Again("a file arrived with wrong bytes")
        case Overtaken():
            return Again("the repository was changed meanwhile")
        case hub.OfflineModeIsEnabled():
            return AccessError(
                f"{about.name} is to be asked for on the Hub, and HF_HUB_OFFLINE forbids it",
                "unset HF_HUB_OFFLINE",
            )
        case hub.HfHubHTTPError():
            return _refusal(error, about)
        case hub.HFValidationError():
            return AccessError(f"{about.name}: {error}", "a repository is called owner/name")
        case hub.FileMetadataError():
            return AccessError(
                f"{about.endpoint} does not answer as a Hub does",
                "check HF_ENDPOINT, and any proxy in between",
            )
        case httpx.LocalProtocolError() | UnicodeEncodeError():
            return AccessError(  # whose own text quotes the token
                f"{about.name} cannot be asked for: a header has characters that none may have",
                "look at HF_TOKEN: a line break or quotation mark may have come along with it",
            )
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return AccessError(f"{about.endpoint} is no address of a Hub", "check HF_ENDPOINT")
        case httpx.ConnectError() if "CERTIFICATE" in str(error):
            return AccessError(
                f"{about.endpoint} has a certificate that is not trusted here",
                "set SSL_CERT_FILE to a file with the authority that signed it",
            )
        case httpx.TooManyRedirects():
            return AccessError(f"{about.endpoint} only redirects", "check HF_ENDPOINT")
        case httpx.TimeoutException() | TimeoutError():
            return Again("timed out")
        case httpx.ConnectError():
            return Again(f"{about.endpoint} cannot be reached")
        case httpx.HTTPError() | ConnectionError():
            return Again("the connection broke off")
        case json.JSONDecodeError():
            return Again("an answer was cut short")
        case RuntimeError() if "client has been closed" in str(error):
            return Again("the connection broke off")  # for another thread, which closed it for all
        case OSError() if "Consistency check failed" in str(error):
            return Again("a download was cut short")
        case OSError() | RuntimeError() if _is_xet(error):
            return Again("the Hub's storage failed")
        case OSError() if error.errno is not None:
            return disk_error(error, Path(error.filename or constants.HF_HUB_CACHE))
        case ValueError() if "too large to be downloaded" in str(error):
            return AccessError(f"{about.name}: a file is over 50 GB", "install hf_xet")
        case ValueError() if "LFS batch API" in str(error):
            said = str(error).partition("`")[2] or str(error)
            return AccessError(f"{about.name} does not take a file: {_short(said)}", _quota(about))
    return None


def _is_xet(error: BaseException) -> bool:
    """Whether it comes from the half of the client that is no Python, and raises plain errors."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    last = step.tb_frame.f_code.co_name if step else ""
    return type(error).__module__ == "hf_xet" or last in ("xet_get", "_upload_xet_files")


def _refusal(error: hub.HfHubHTTPError, about: About) -> Again | LorajobError:
    response = error.response
    status = response.status_code
    if status in PASSING or (status >= 500 and status not in (501, 507)):
        return Again(f"answered {status}", asked_wait(response.headers))
    if _is_storage(response, about):
        # Its addresses are signed and run out; asking the Hub again gets fresh ones. What it says
        # may repeat the signature, and is not shown.
        if status in (400, 403) and "expired" in _text(response).lower():
            return Again("an address of the storage ran out")
        if status in (400, 416):
            return Again(f"the storage answered {status}")
        return AccessError(
            f"{about.name}: the Hub's storage refuses with {status}",
            f"look at {about.page}; if it is there, ask who runs the Hub",
        )
    said = _short(error.server_message or "") or f"status {status}"
    match error:
        case hub.GatedRepoError():
            return AccessError(
                f"{about.name} is gated, and {about.token()}",
                f"ask for access at {about.page} with the account that the token belongs to, "
                "accept the terms there, and set HF_TOKEN to that account's token",
            )
        case hub.RevisionNotFoundError():
            return AccessError(
                f"{about.name} has no revision {about.revision}",
                f"name a branch, a tag or a commit that {about.page} shows",
            )
        case hub.RemoteEntryNotFoundError():
            return AccessError(
                f"{about.name} lacks a file that was asked for", f"look at {about.page}"
            )
        case hub.RepositoryNotFoundError():
            return AccessError(
                f"there is no {about.name} on {about.endpoint}, or it is private and not open to "
                f"this run: {about.token()}",
                "check the name; for a private repository set HF_TOKEN to a token that may read it",
            )
        case hub.DisabledRepoError():
            return AccessError(f"{about.name} has been disabled", f"look at {about.page}")
    if status == 401:
        return AccessError(
            f"the Hub takes the token for no valid one ({about.name})",
            f"it may have run out or been revoked: set HF_TOKEN to one of {about.endpoint}"
            "/settings/tokens, or unset it for what is public",
        )
    if status in (402, 413, 507) or re.search(r"quota|storage limit|exceed", said, re.IGNORECASE):
        return AccessError(f"{about.name} does not take this: {said}", _quota(about))
    if status == 403:
        return AccessError(
            f"{about.name}: the Hub refuses this: {said}; {about.token()}",
            f"give the token the right to do it at {about.endpoint}/settings/tokens, or take one "
            "of an account that has it",
        )
    return AccessError(f"{about.name}: the Hub refuses this: {said}", f"look at {about.page}")


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After`, or the Hub's own `RateLimit`."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        pass
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(limit[1]) + 1 if limit else None


def _is_storage(response: httpx.Response, about: About) -> bool:
    return response.url.host != httpx.URL(about.endpoint).host


def _text(response: httpx.Response) -> str:
    try:
        return response.text
    except httpx.HTTPError:  # its body was never read, and no longer can be
        return ""


def _short(text: str) -> str:
    return " ".join(text.split())[:300].strip("` .")


def _quota(about: About) -> str:
    return f"look at the storage left at {about.endpoint}/settings/billing, and delete what is old"
