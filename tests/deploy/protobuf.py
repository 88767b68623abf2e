"""Reading the one kind that helm sends as protobuf: the Secret that holds a release."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def read_secret(data: bytes) -> dict[str, Any]:
    """The Secret in Kubernetes' envelope (runtime.Unknown: its type, then the object itself)."""
    assert data.startswith(MAGIC)
    raw = dict(_fields(data[len(MAGIC) :]))[2]
    found: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "data": {}}
    for number, value in _fields(raw):
        if number == 1:
            found["metadata"] = _metadata(value)
        elif number == 2:
            key, content = _entry(value)
            found["data"][key.decode()] = base64.b64encode(content).decode()
        elif number == 3:
            found["type"] = value.decode()
    return found


def _metadata(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"labels": {}}
    for number, value in _fields(data):
        if number == 11:
            key, content = _entry(value)
            found["labels"][key.decode()] = content.decode()
        elif number in (1, 3):
            found["name" if number == 1 else "namespace"] = value.decode()
    return found


def _entry(data: bytes) -> tuple[bytes, bytes]:
    """A map's key and value."""
    found = dict(_fields(data))
    return found.get(1, b""), found.get(2, b"")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields' numbers and contents; those that are numbers are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 2:
            length, at = _varint(data, at)
            yield key >> 3, data[at : at + length]
            at += length
        elif key & 7 == 0:
            _, at = _varint(data, at)
        else:
            raise ValueError(f"wire type {key & 7}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
