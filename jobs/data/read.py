"""Files -> rows. A row is a JSON object with the place it stands at, for messages to name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import AccessError, DataError


@dataclass(frozen=True)
class Row:
    value: Any
    place: str  # "chats.jsonl, line 7" or "chats.json, record 3"


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a .jsonl file (one JSON value a line) or a .json file (an array of them).

    Raises AccessError where the file is missing or unreadable, DataError where it is empty or is
    no JSON; the message names the line.
    """
    path = Path(source)
    try:
        if path.is_dir():
            raise AccessError(f"{source} is a folder", "name a .jsonl or .json file in it")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise AccessError(
            f"there is no data file at {source}",
            f"data paths are taken from the folder lorajob is started in ({Path.cwd()})",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is no UTF-8 text (byte {error.start})", "save it as UTF-8"
        ) from None
    except OSError as error:
        raise AccessError(
            f"{source} cannot be read: {error.strerror}", "check its rights"
        ) from None
    if not text.strip():
        raise DataError(f"{source} is empty", "give it at least one conversation")
    if path.suffix == ".jsonl":
        return _lines(text, source)
    if path.suffix == ".json":
        return _array(text, source)
    raise DataError(
        f"{source}: files ending in {path.suffix or 'nothing'} are not read", "use .jsonl or .json"
    )


def _lines(text: str, source: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{source}, line {number}"
            try:
                yield Row(json.loads(line), place)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}, column {error.colno}: no valid JSON: {error.msg}",
                    "each line of a .jsonl file is one JSON object",
                ) from None
            except (ValueError, RecursionError) as error:
                raise _unusual(place, error) from None


def _array(text: str, source: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}, line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}",
            "a .json file is one array of objects; one object a line is .jsonl",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unusual(source, error) from None
    if not isinstance(values, list):
        raise DataError(f"{source} holds no JSON array", "put the records into [ ... ]")
    if not values:
        raise DataError(f"{source} holds an empty array", "give it at least one conversation")
    for number, value in enumerate(values, 1):
        yield Row(value, f"{source}, record {number}")


def _unusual(place: str, error: Exception) -> DataError:
    """Valid JSON that Python does not take: a number of thousands of digits, deep nesting."""
    return DataError(f"{place} cannot be read: {error}", "mend or remove it")
