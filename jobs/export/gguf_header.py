"""What a GGUF file says of itself: its numbers and texts, without its lists and weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from jobs.errors import AccessError

# Types of values in the file's header, as struct reads them (ggml/docs/gguf.md).
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Where a file does not say whether a beginning-of-sequence token goes first, llama.cpp decides by
# the vocabulary: SentencePiece's have one, and of the others Llama 3's.
BEGIN_BY_THEMSELVES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")


def read_header(path: Path) -> dict[str, Any]:
    """The values by name. Raises AccessError where the file is no GGUF file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin as one")
            version, _, count = _take(file, "IQQ")
            if version < 2:
                raise ValueError(f"its version is {version}")
            found = {}
            for _ in range(count):
                name = _text(file)
                value = _value(file, _take(file, "I")[0])
                if value is not None:
                    found[name] = value
            return found
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}", "name a GGUF file") from None
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise AccessError(f"{path} is no GGUF file: {error}", "name a GGUF file") from None


def adds_bos(header: dict[str, Any]) -> bool:
    """Whether llama.cpp puts a beginning-of-sequence token before every prompt for this file."""
    said = header.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    if header.get("tokenizer.ggml.model") == "llama":
        return True
    return header.get("tokenizer.ggml.pre") in BEGIN_BY_THEMSELVES


def _take(file: IO[bytes], form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: IO[bytes]) -> str:
    return file.read(_take(file, "Q")[0]).decode()


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _take(file, FORMS[kind])[0]
    inner, count = _take(file, "IQ")
    if inner in FORMS:
        file.seek(count * struct.calcsize(FORMS[inner]), 1)
    else:
        for _ in range(count):
            if inner == STRING:
                file.seek(_take(file, "Q")[0], 1)
            else:
                _value(file, inner)
    return None
