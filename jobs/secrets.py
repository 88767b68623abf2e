"""Secrets never show: whatever a run says goes through `redact` on its way out.

Two kinds are found. What this process knows to be secret: values of the environment, of token and
credential files, and what it was told by `remember`; in any spelling that JSON, Python or a URL
gives them. And what has the form of a secret, wherever it comes from: tokens with their well-known
beginnings, signed addresses, authorization headers, private keys, `password=...`.

A hash has no such form: only where it is named as a key or a token is it taken for one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import unquote

MASK = "***"


def redact(text: str) -> str:
    """The text with `***` in place of each secret in it. Doing it again changes nothing."""
    return _redact(text, _known().pattern)


def redact_tree(value: Any) -> Any:
    """The same for every text in lists and fields; what is no JSON value becomes its text."""
    return _redact_tree(value, _known().pattern)


def _redact(text: str, pattern: re.Pattern[str]) -> str:
    # What is left beside one secret may be another's; a text without any takes one round.
    for _ in range(8):
        clean = pattern.sub(_masked, text)
        if clean == text:
            break
        text = clean
    return text


def _redact_tree(value: Any, pattern: re.Pattern[str]) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            _redact(str(key), pattern): MASK
            if isinstance(inner, str) and inner and _holds_secret(str(key))
            else _redact_tree(inner, pattern)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact_tree(inner, pattern) for inner in value]
    return _redact(str(value), pattern)


def looks_like_secret(text: str) -> bool:
    """Whether the text has no place in a spec: it has a secret's form, or holds a known one."""
    known = _known()
    return (
        text in known.values
        or _FORMS.search(text) is not None
        or any(value in text for value in known.values if _is_random(value))
    )


def is_secret_field(name: str) -> bool:
    """Whether a field of this name would hold a secret: `secret_key`, `token`, `password`, ..."""
    return name.lower() in ("token", "tokens", "key", "secrets") or _holds_secret(name)


def remember(*values: str | None) -> None:
    """Take these for secrets from now on: credentials that came from a service, say."""
    with _lock:
        _told.update(value for value in values if value and len(value) >= SHORTEST)


# --- what the process knows ------------------------------------------------------------------

SHORTEST = 6  # characters of a known secret; a shorter one would be found in half of all words

# Names of variables whose values are secret, whatever they look like.
_SURE = re.compile(
    r"(?:.*_)?(?:SECRET|PASSWORD|PASSWD|PASS|PASSPHRASE|PAT|API_?KEY|SECRET_KEY|ACCESS_KEY"
    r"|PRIVATE_KEY|CREDENTIALS?)"
    r"|AWS_(?:SESSION|SECURITY)_TOKEN|AWS_CONTAINER_AUTHORIZATION_TOKEN|HF_TOKEN"
    r"|HUGGING_?FACE_?HUB_(?:API_)?TOKEN|MLFLOW_TRACKING_TOKEN",
    re.IGNORECASE,
)
# Names whose values are secret where they look random.
_LIKELY = re.compile(
    r"(?!.*(?:CACHE|PUBLIC|SORT|PRIMARY|PARTITION|FOREIGN|STAGE|ROUTING)_KEY$)"
    r"(?:.*_)?(?:TOKEN|KEY|ACCESS_KEY_ID)"
    r"|(?:.*_)?(?:SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIALS?|TOKEN)_[A-Z0-9_]*(?<!FILE)(?<!PATH)",
    re.IGNORECASE,
)
_SECRET_FILE = re.compile(r".*_(?:TOKEN|PASSWORD|SECRET|KEY)_(?:FILE|PATH)|HF_TOKEN_PATH", re.I)

# Said by everyone, so no secret; and to be found in every other line.
_WORDS = frozenset(
    ["undefined", "disabled", "enabled", "default", "testing", "example", "anonymous", "required",
     "optional"]
)  # fmt: skip
_URL_USER = re.compile(r"://[^\s/@:]*:(?!\d{1,5}(?:[/?#]|$))(?P<password>[^\s@]+)@")
_IN_FILE = re.compile(
    r"(?im)^\s*(?:aws_secret_access_key|aws_session_token|hf_token|refresh_token)\s*=\s*(\S+)"
    r"|\bpassword\s+(\S+)"  # of .netrc
)


@dataclass(frozen=True, slots=True)
class _Known:
    values: frozenset[str]
    pattern: re.Pattern[str]


_told: set[str] = set()
_lock = threading.Lock()
_last: tuple[dict[str, str], int, _Known] | None = None


def _known() -> _Known:
    """The pattern of now: made anew when the environment has changed or something was told."""
    global _last  # noqa: PLW0603 - the one thing kept between calls
    environ = os.environ.copy()
    if _last is not None and _last[0] == environ and _last[1] == len(_told):
        return _last[2]
    with _lock:
        told = len(_told)
        found = {*_told, *_of_environment(environ), *_of_files(environ)}
    lines = {line.strip() for value in found if "\n" in value for line in value.splitlines()}
    found |= {line for line in lines if len(line) >= 16}
    values = frozenset(
        value
        for value in found
        if len(value) >= SHORTEST
        and sum(char.isalnum() for char in value) >= SHORTEST // 2
        and value.lower() not in _WORDS
    )
    # The longest first: one secret may begin like another.
    spelled = [_spelled(value) for value in sorted(values, key=lambda v: (-len(v), v))]
    known = _Known(values, re.compile("|".join([*spelled, _FORMS.pattern, _NAMED.pattern])))
    _last = environ, told, known
    return known


def _of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    for name, raw in environ.items():
        value = raw.strip()
        # A field of the spec may be called like a secret and hold none.
        sure = _SURE.fullmatch(name) and not name.startswith("LORAJOB__")
        if (sure and not _is_path(value)) or (
            _LIKELY.fullmatch(name) and _is_random(value) and not _is_path(value)
        ):
            yield value
        if url := _URL_USER.search(value):
            yield url["password"]
            yield unquote(url["password"])


def _of_files(environ: Mapping[str, str]) -> Iterator[str]:
    """Secrets in the files where the Hub's and AWS' libraries and .netrc keep them."""
    home = str(Path("~").expanduser())
    cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = environ.get("HF_HOME") or f"{cache}/huggingface"
    whole = [environ.get("HF_TOKEN_PATH") or f"{hub}/token"]
    whole += [value for name, value in environ.items() if _SECRET_FILE.fullmatch(name)]
    for path in whole:
        yield _content(path).strip()
    fields = (
        environ.get("HF_STORED_TOKENS_PATH") or f"{hub}/stored_tokens",
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials",
        environ.get("AWS_CONFIG_FILE") or f"{home}/.aws/config",
        environ.get("NETRC") or f"{home}/.netrc",
    )
    for path in fields:
        for match in _IN_FILE.finditer(_content(path)):
            yield match[match.lastindex or 0]


def _content(path: str) -> str:
    """A small file's text; nothing where it cannot be had, for then nobody else has it either."""
    try:
        with Path(path).expanduser().open(encoding="utf-8", errors="replace") as file:
            return file.read(2**16)
    except (OSError, ValueError, RuntimeError):
        return ""


def _is_path(value: str) -> bool:
    if not value.startswith(("/", "./", "../", "~/")):
        return False
    path = Path(value).expanduser() if value.startswith("~/") and "HOME" in os.environ else Path(value)  # fmt: skip
    try:
        return path.exists() or (path.parent != Path("/") and path.parent.is_dir()) or (
            re.fullmatch(r"\.(?:pem|key|crt|json|txt|ya?ml)", path.suffix) is not None
        )  # fmt: skip
    except (OSError, ValueError):
        return False


def _is_random(value: str) -> bool:
    """Whether no person would write this but as a secret."""
    return (
        len(value) >= 12
        and "://" not in value
        and re.search(r"\d", value) is not None
        and re.search(r"[A-Za-z]", value) is not None
        and re.search(r"\s(?!\S*$)|^[<\[]", value) is None
    )


def _spelled(value: str) -> str:
    return "".join(map(_spelled_char, value))


def _spelled_char(char: str) -> str:
    """A pattern for a character in each of the spellings of JSON, Python, URLs and HTML."""
    if char.isascii() and char.isalnum():
        return char
    encoded = char.encode("utf-8", "surrogatepass")
    forms = [re.escape(char), "".join(rf"%(?:25)*(?i:{byte:02x})" for byte in encoded)]
    match char:
        case "\\":
            forms[0] = r"\\+"
        case '"' | "'" | "/":
            forms[0] = r"\\*" + char
            forms.append({'"': "&quot;", "'": r"&\#x27;", "/": r"&\#x2F;"}[char])
        case " ":
            forms.append(r"\+")
        case "\n" | "\r" | "\t" | "\b" | "\f":
            forms.append(r"\\+" + {"\n": "n", "\r": "r", "\t": "t", "\b": "b", "\f": "f"}[char])
        case "&" | "<" | ">":
            forms.append({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[char])
    units = char.encode("utf-16-be", "surrogatepass")
    forms.append("".join(rf"\\+u(?i:{units[at : at + 2].hex()})" for at in range(0, len(units), 2)))
    if not char.isprintable() or not char.isascii():
        forms.append("".join(rf"\\+x{byte:02x}" for byte in encoded))
        forms.append(rf"\\+x{ord(char):02x}" if ord(char) < 256 else rf"\\+U{ord(char):08x}")
    return f"(?:{'|'.join(forms)})"


# --- what has the form of a secret -----------------------------------------------------------
# Each alternative is a secret, or what stays, an empty group, and then the secret. None goes past a
# quote, so that JSON stays JSON. Each begins with a character or a set of them, by which most are
# ruled out at once: that makes the search several times as fast.


def _any_case(word: str) -> str:
    return "".join(f"[{char.upper()}{char}]" if char.isalpha() else char for char in word)


_SPACE = r"(?:\s|%20|\+)"
_GAP = r"(?:[ \t]|%20|\+){0,4}"  # never to the next line
_QUOTE = r"""(?:(?:\\{0,3}["']){1,2}|%22|%27|&quot;)"""
_IS = rf"{_QUOTE}?{_GAP}(?:=|:|>|%3D|%3A){_GAP}b?{_QUOTE}?"
_ESCAPED = r"(?:\\u[0-9a-fA-F]{4}|\\[bfnrt/\\])"  # in JSON's strings
_END = r"""\s"'\\,;&<>(){}\[\]"""  # ends a value without quotes
_SLASHES = r"(?:\\?/|%2[Ff]){2}"
_SIGNED = (
    "(?i:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|token"
    "|(?:access|auth|session|security)[_-]?token|api[_-]?key|password|secret)"
)
_A_HASH = r"(?:[0-9a-f]{40}|[0-9a-f]{64})(?![A-Za-z0-9])"

_FORMS = re.compile(
    "|".join(
        [
            # Private keys; one without an end goes on to the end of the text.
            rf"-----BEGIN(?:{_SPACE}[A-Z0-9]+)*?{_SPACE}PRIVATE{_SPACE}KEY(?:{_SPACE}BLOCK)?-----"
            r"""[^"'<>]*?(?:-----END[^"'<>]{0,60}?-----|(?=["'<>])|\Z)""",
            # Tokens known by how they begin. A hash after hf_ is a file's name in some cache.
            rf"hf_(?:oauth_|jwt_)?(?!{_A_HASH})[A-Za-z0-9]{{24,}}(?:[._-][A-Za-z0-9_-]{{16,}})*",
            r"api_org_[A-Za-z0-9]{24,}",
            r"A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{16}",
            r"AIza[A-Za-z0-9_-]{35}",
            r"g(?:h[pousr]_[A-Za-z0-9]{30,}|ithub_pat_[A-Za-z0-9_]{30,}|lpat-[A-Za-z0-9_-]{20,})",
            r"xox[abeoprs]-[A-Za-z0-9-]{16,}",
            r"wandb_v\d_[A-Za-z0-9_]{20,}",
            r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
            # No letter or digit before it (as in task-1), but for the end of `\n` or `%20`.
            r"sk-(?:(?<![A-Za-z0-9]sk-)|(?<=\\[bfnrt]sk-)|(?<=%[0-9A-Fa-f][0-9A-Fa-f]sk-)"
            r"|(?<=\\u[0-9a-f][0-9a-f][0-9a-f][0-9a-f]sk-)"
            r"|(?=(?:proj|ant|svcacct|or)-))(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}",
            # Headers.
            rf"""[Aa](?i:uthorization{_IS})()(?i:AWS4-[A-Z0-9-]+|Bearer|Basic|Token|AWS){_SPACE}[^"'\\\r\n<>]+""",
            rf"""[Aa](?i:uthorization){_QUOTE},{_GAP}b?{_QUOTE}()[^"'\\\r\n]+""",
            rf"[Bb](?i:earer){_SPACE}{{1,4}}()[A-Za-z0-9._~+/=%-]{{16,}}",
            rf"""AWS4-(?:HMAC|ECDSA-P256)-SHA256{_SPACE}+()Credential(?:=|%3[Dd])[^"'\\\r\n<>]+""",
            # Addresses with a user's password, or with a token as the user. The password goes on to
            # the last @ of the host; what follows a port is none.
            rf""":{_SLASHES}()[^\s/@:"'<>\\]{{0,200}}:(?!\d{{1,5}}(?:[/?#]|$))[^\s"'<>\\]{{1,300}}?(?=@[^\s@/"'<>]*(?:[/?#\s"'<>\\]|$))""",
            rf"""%3[Aa]{_SLASHES}()[^\s/@:"'<>&\\]{{0,200}}?%3[Aa](?!\d{{1,5}}(?:%2[Ff]|/))[^\s"'<>&@\\]{{1,300}}?(?=%40)""",
            rf"(?::|%3[Aa]){_SLASHES}()[A-Za-z0-9_-]{{16,}}(?=@|%40)",
            # Signed addresses.
            rf"""(?:[?&]|%3F|%26){_SIGNED}(?:=|%3[Dd])()[^&\s"'\\<>#]+""",
            rf"""[Xx](?i:-Amz-(?:Signature|Credential|Security-Token){_IS})()[^&\s"'\\<>,;]+""",
            # AWS' secrets, by their names.
            rf"[Ss](?i:ecret[_-]?access[_-]?key{_IS})()[A-Za-z0-9+/=%_-]{{16,}}",
            rf"[Aa](?i:ws[_-]?(?:session|security)[_-]?token{_IS})()[A-Za-z0-9+/=%_-]{{16,}}",
        ]
    )
)

_KINDS_OF_KEY = ("api", "secret", "access", "private")
_KINDS_OF_TOKEN = (
    "session", "security", "access", "auth", "refresh", "bearer", "hf", "hub", "api", "identity",
    "github", "wandb",
)  # fmt: skip


def _kind_of(kinds: Iterable[str], word: str) -> str:
    """The word, where one of the kinds stands before it."""
    before = "|".join(f"(?<={kind}{link}{word})" for kind in kinds for link in ("", "[_-]"))
    return f"{_any_case(word)}(?i:{before})"


_NAME = (
    f"(?:{_any_case('secret')}|{_any_case('passw')}(?:{_any_case('or')})?[Dd]"
    f"|{_any_case('passphrase')}|{_kind_of(_KINDS_OF_KEY, 'key')}(?:[_-]?[Ii][Dd])?"
    f"|{_kind_of(_KINDS_OF_TOKEN, 'token')})"
)
_WEAK = (
    f"(?:{_any_case('token')}|{_any_case('sig')}(?<![A-Za-z]...)"
    f"|{_any_case('signature')}|{_any_case('credential')}[Ss]?)"
)
_NOTHING = r"(?!(?i:none|null|nil|true|false|undefined|unset|not|is)(?![A-Za-z0-9]))"
_RANDOM = rf"(?=[^{_END}]*[0-9])"

# What only its name gives away; too little to refuse a spec for, which may hold people's prose.
_NAMED = re.compile(
    "|".join(
        [
            rf"{_NAME}{_QUOTE}?{_GAP}(?:"
            rf"(?:=|>|%3D){_GAP}b?(){_NOTHING}[^{_END}]{{4,}}"
            rf"""|(?:=|:|,|%3D|%3A){_GAP}b?{_QUOTE}(){_NOTHING}(?:[^"'\\\r\n]{{4,}}|{_ESCAPED}+)(?:[^"'\\\r\n]|{_ESCAPED})*"""
            rf"|:{_GAP}(?P<number>)(?=[0-9.eE+-]{{6,}}{_GAP}[,}}\]])[0-9.eE+-]+"
            rf"|(?::|%3A){_GAP}(){_NOTHING}{_RANDOM}[^{_END}]{{6,}})",
            rf"{_WEAK}{_QUOTE}?{_GAP}(?:(?:=|%3D){_GAP}|(?::|%3A){_GAP}(?!{_QUOTE}?[0-9a-f]+(?![\w.~+/%=-])))"
            rf"b?{_QUOTE}?(){_RANDOM}[\w.~+/%=-]{{16,}}",
            rf"[Aa](?i:uthorization){_IS}(){_RANDOM}[^{_END}]{{6,}}",
            r"login\s+\S+\s+password\s+()\S+",  # of .netrc
            rf"wandb{_SPACE}login{_SPACE}(?:--?\w+{_SPACE}){{0,3}}()[0-9a-f]{{40}}",
        ]
    )
)
_SECRET_FIELD = re.compile(
    r"(?:.*[_.-]|.*[a-z](?=[A-Z]))?(?i:secret|password|passwd|passphrase|credentials?|authorization"
    rf"|(?:{'|'.join(_KINDS_OF_KEY)})[_-]?key(?:[_-]?id)?|(?:{'|'.join(_KINDS_OF_TOKEN)})[_-]?token)"
)


def _holds_secret(field: str) -> bool:
    return _SECRET_FIELD.fullmatch(field) is not None


def _masked(match: re.Match[str]) -> str:
    kept = match.start(match.lastindex) if match.lastindex else match.start()
    mask = f'"{MASK}"' if match.lastgroup == "number" else MASK  # JSON stays JSON
    return match.string[match.start() : kept] + mask


# --- the ways out of a process ----------------------------------------------------------------


class _Redacted:
    """A stream that writes no secret; all else is as with the stream below."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_process() -> None:
    """From now on nothing that Python prints in this process shows a secret.

    Standard output and error, tracebacks nobody caught (of threads and destructors too), warnings,
    and every log record, whichever handler a library gives it. What cannot be guarded is what does
    not go through Python: C libraries that write to the file descriptors, and other programs.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Redacted):
            setattr(sys, name, cast(TextIO, _Redacted(stream)))
    sys.excepthook = _excepthook
    threading.excepthook = _thread_excepthook
    sys.unraisablehook = _unraisablehook
    if warnings.formatwarning is not _formatwarning:
        global _plain_formatwarning  # noqa: PLW0603 - as the process had it
        _plain_formatwarning = warnings.formatwarning
        warnings.formatwarning = _formatwarning
    if logging.getLogRecordFactory() is not _record:
        global _plain_record  # noqa: PLW0603 - the same
        _plain_record = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_record)


_plain_formatwarning: Any = warnings.formatwarning
_plain_record: Any = logging.LogRecord


def _tell(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(redact(text))


def _excepthook(kind: Any, error: BaseException, trace: Any) -> None:
    _tell("".join(traceback.format_exception(kind, error, trace)))


def _thread_excepthook(told: threading.ExceptHookArgs) -> None:
    if not issubclass(told.exc_type, SystemExit):
        name = told.thread.name if told.thread else "unknown"
        text = traceback.format_exception(told.exc_type, told.exc_value, told.exc_traceback)
        _tell(f"Exception in thread {name}:\n{''.join(text)}")


def _unraisablehook(told: Any) -> None:
    text = traceback.format_exception(told.exc_type, told.exc_value, told.exc_traceback)
    _tell(f"{told.err_msg or 'Exception ignored in'}: {told.object!r}\n{''.join(text)}")


def _formatwarning(*arguments: Any, **options: Any) -> str:
    return redact(_plain_formatwarning(*arguments, **options))


def _record(*arguments: Any, **options: Any) -> logging.LogRecord:
    """A log record whose message is redacted before any handler sees it."""
    record: logging.LogRecord = _plain_record(*arguments, **options)
    try:
        plain = record.getMessage()
    except Exception:  # arguments that do not fit the message: its handler tells so
        return record
    clean = redact(plain)
    if clean != plain:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redact("".join(traceback.format_exception(record.exc_info[1])).rstrip())
    if record.stack_info:
        record.stack_info = redact(record.stack_info)
    return record
