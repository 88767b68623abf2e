"""The termination message: how a run ended, as one JSON object where Kubernetes reads it.

`kubectl describe pod` shows it beside the exit code, and whatever watches the Job can read it there.
Kubernetes takes 4096 bytes and cuts what is longer, JSON or not; so it is made to fit here.
"""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from jobs.errors import LorajobError, Preempted
from jobs.secrets import redact, redact_tree

VARIABLE = "LORAJOB_TERMINATION_LOG"
DEFAULT = Path("/dev/termination-log")  # Kubernetes makes it; elsewhere there is none
LIMIT = 4096  # bytes

# In the order in which fields give way, and what each keeps at least, in bytes of its JSON. Any
# other field goes before all of these. Together they fit, so the last ones are never touched.
KEPT = {
    "message": 1600,
    "what_to_do": 600,
    "safe": 450,
    "log": 400,
    "name": 200,
    "title": 160,
    "step": 120,
    "seconds": 40,
    "stage": 200,
    "code": 40,
}
CUT = " [...] "

_lock = threading.Lock()


def outcome_of(
    error: BaseException | None = None,
    *,
    name: str | None = None,
    stage: str | None = None,
    step: int | None = None,
    log: str | os.PathLike[str] | None = None,
    safe: str | list[str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """How the run ended: well without an error, as a LorajobError says, or by a bug."""
    code, title, message, hint = 0, "done", "", None
    if isinstance(error, LorajobError):
        code, title, message, hint = error.exit_code, error.title, error.message, error.hint
    elif isinstance(error, KeyboardInterrupt):
        code, title, message = 130, Preempted.title, "interrupted"
        hint = "start it again to go on after the last finished stage"
    elif error is not None:
        code, title = LorajobError.exit_code, LorajobError.title
        message = f"this is a bug in lorajob: {_first_line(error)}"
        hint = "please report it with the log and the spec"
    return {
        "code": code,
        "title": title,
        "stage": stage,
        "step": step,
        "message": message,
        "what_to_do": hint,
        "safe": safe,
        "log": None if log is None else os.fspath(log),
        "name": name,
        "seconds": None if seconds is None else round(seconds, 1),
    }


def write_termination(outcome: dict[str, Any]) -> None:
    """Write it where Kubernetes reads it, and nowhere else. It raises nothing: a run that ends
    badly must not end worse for want of a message."""
    try:
        told = os.environ.get(VARIABLE)
        # A file that is not there is made only where a person named it. A pipe without a reader
        # would be waited for, but for O_NONBLOCK.
        flags = os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
        text = _rendered(outcome)
        # The file is a mount: it can't be replaced by another, only written to. Two threads may end
        # a run at once; one that hangs in here must not keep the other from it.
        held = _lock.acquire(timeout=1)
        try:
            file = os.open(told or DEFAULT, flags | (os.O_CREAT if told else 0), 0o644)
            try:
                if os.write(file, text) < len(text):
                    os.ftruncate(file, 0)  # a full disk; half of it is no JSON
            finally:
                os.close(file)
        finally:
            if held:
                _lock.release()
    except Exception:  # noqa: S110 - there is nobody left to tell
        pass


def _first_line(error: BaseException) -> str:
    kind = type(error).__name__
    try:
        # Redacted while it is whole: a secret may go over several lines.
        lines = redact(f"{kind}: {error}").splitlines()
    except Exception:  # an error that cannot even be shown
        return kind
    return lines[0].strip().removesuffix(":")


def _rendered(outcome: dict[str, Any]) -> bytes:
    try:
        # Redacted before it is cut: half a secret is not known for one.
        return _encoded(_fitted(_plain(redact_tree(outcome))))
    except Exception:  # a value that has no text, or holds itself
        kept = {"code": outcome.get("code"), "stage": outcome.get("stage")}
        return _encoded(
            _fitted(_plain(redact_tree({k: v for k, v in kept.items() if type(v) in (int, str)})))
        )


def _encoded(value: Any) -> bytes:
    # As it reads, not in escapes: those take twice the bytes of most alphabets.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """What every reader of JSON takes: no infinite number, no endless one, no half a character."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if abs(value) < 2**63 else "a number of more than 64 bits"
    return value


def _fitted(fields: dict[str, Any]) -> dict[str, Any]:
    others = [name for name in fields if name not in KEPT]
    for name in [*reversed(others), *KEPT]:
        over = len(_encoded(fields)) - LIMIT
        if over <= 0:
            break
        if name in others:
            del fields[name]
        elif name in fields:
            room = max(KEPT[name], len(_encoded(fields[name])) - over)
            fields[name] = _shortened(fields[name], room)
    return fields


def _shortened(value: Any, room: int) -> Any:
    """The value in at most so many bytes of JSON: a text without its middle, a list without its end."""
    if len(_encoded(value)) <= room:
        return value
    if isinstance(value, list) and (kept := _first_of(value, room)):
        return kept
    text = value if isinstance(value, str) else _encoded(value).decode()
    room -= len('""') + len(CUT)
    head = _that_fit(text[:room], room * 2 // 3)  # its beginning says what the rest is about
    tail = _that_fit(text[: -room - 1 : -1], room - _width(head))[::-1]
    return head + CUT + tail


def _first_of(items: list[Any], room: int) -> list[Any] | None:
    """As many items as there is room for, and how many more there are; none if not one fits."""
    room -= len(_encoded([f"... and {len(items)} more"]))
    kept: list[Any] = []
    for item in items:
        room -= len(_encoded(item)) + len(", ")
        if room < 0:
            break
        kept.append(item)
    return [*kept, f"... and {len(items) - len(kept)} more"] if kept else None


def _that_fit(text: str, room: int) -> str:
    """The first characters of a text that take no more than so many bytes within JSON."""
    for at, char in enumerate(text):
        room -= _width(char)
        if room < 0:
            return text[:at]
    return text


def _width(text: str) -> int:
    return len(_encoded(text)) - len('""')
