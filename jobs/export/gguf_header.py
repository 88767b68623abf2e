"""What a GGUF file says of itself: its numbers, texts and tensors, without its lists and weights.

In a tenth of a second: llama.cpp's own reader makes an object of each of 128,000 tokens, in seven.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jobs.errors import AccessError

# Types of values in the file's header, as struct reads them (ggml/docs/gguf.md).
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

ALIGNMENT = 32  # where a file says nothing of it (ggml/docs/gguf.md)
ADD_BOS = "tokenizer.ggml.add_bos_token"

# Where a file does not say whether a beginning-of-sequence token goes first, llama.cpp decides by
# the vocabulary: SentencePiece's have one, and of the others Llama 3's.
BEGIN_BY_THEMSELVES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """columns first, as GGUF has them"""
    type: int
    """one of `gguf.GGMLQuantizationType`"""
    offset: int
    """of its weights from where the first tensor's are, in bytes"""


@dataclass(frozen=True)
class Header:
    values: dict[str, Any]
    """by name, without lists"""
    places: dict[str, int]
    """where in the file each of the values is, in bytes from its start"""
    tensors: tuple[Tensor, ...]
    data: int
    """where the weights begin, in bytes from the file's start"""


def read_header(path: Path) -> Header:
    """Raises AccessError where the file is no GGUF file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not begin as one")
            version, tensors, count = _take(file, "IQQ")
            if version < 2:
                raise ValueError(f"its version is {version}")
            values, places = {}, {}
            for _ in range(count):
                name, kind = _text(file), _take(file, "I")[0]
                place = file.tell()
                value = _value(file, kind)
                if value is not None:
                    values[name], places[name] = value, place
            described = tuple(_tensor(file) for _ in range(tensors))
            aligned = int(values.get("general.alignment", ALIGNMENT))
            return Header(values, places, described, -(-file.tell() // aligned) * aligned)
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}", "name a GGUF file") from None
    except (ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise AccessError(f"{path} is no GGUF file: {error}", "name a GGUF file") from None


def _tensor(file: IO[bytes]) -> Tensor:
    name = _text(file)
    shape = _take(file, f"{_take(file, 'I')[0]}Q")
    kind, offset = _take(file, "IQ")
    return Tensor(name, shape, kind, offset)


def adds_bos(header: Header) -> bool:
    """Whether llama.cpp puts a beginning-of-sequence token before every prompt for this file."""
    said = header.values.get(ADD_BOS)
    if isinstance(said, bool):
        return said
    if header.values.get("tokenizer.ggml.model") == "llama":
        return True
    return header.values.get("tokenizer.ggml.pre") in BEGIN_BY_THEMSELVES


def add_no_bos(path: Path) -> None:
    """Have a file that says whether a beginning-of-sequence token goes before a text say no."""
    place = read_header(path).places.get(ADD_BOS)
    if place is not None:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")


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
