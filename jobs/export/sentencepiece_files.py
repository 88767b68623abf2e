"""A SentencePiece vocabulary as llama.cpp's converter reads it, made from tokenizer.json alone.

The converter takes the scores by which llama.cpp joins pieces from tokenizer.model, and without that
file gives all pieces the same one, or refuses the model. transformers saves no tokenizer.model any
more, so many fine-tuned models come without. What it would say is in tokenizer.json: the order of the
merges is the order of the scores.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

MODEL = "tokenizer.model"
SPACE = "\u2581"
BYTES = [f"<0x{value:02X}>" for value in range(256)]

# Kinds of pieces (message SentencePiece in sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2

# llama.cpp takes the whitespace after special tokens for a part of them where the model's name has
# this in it, and nowhere else.
STRIPPING_NAME = "phi-3"
NEVER_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json as it stands; nothing where there is none."""
    path = folder / "tokenizer.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether it joins characters to pieces and spells unknown ones in bytes, as SentencePiece's BPE
    models do (Llama 2, Mistral, Gemma, Phi-3)."""
    return spells_in_bytes(tokenizer) and not missing_bytes(tokenizer)


def spells_in_bytes(tokenizer: dict[str, Any]) -> bool:
    """Whether characters without a piece become tokens for their bytes; where all text is turned into
    bytes first, there are none such."""
    model = tokenizer.get("model", {})
    before = json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("normalizer")])
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and "ByteLevel" not in before
    )


def missing_bytes(tokenizer: dict[str, Any]) -> list[str]:
    return [token for token in BYTES if token not in tokenizer["model"]["vocab"]]


def sentencepiece_model(tokenizer: dict[str, Any], space_first: bool = False) -> bytes:
    """tokenizer.model of the same pieces, with scores in the order of the merges: the earlier a piece's
    first merge, the higher. `space_first`: whether text gets a space before it."""
    model = tokenizer["model"]
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens") or []}
    pieces = {int(index): text for text, index in model["vocab"].items()}
    scores = _scores(model)
    unknown = model.get("unk_token") or "<unk>"
    content = b""
    for index in range(max(pieces) + 1):
        text = pieces.get(index) or (added[index]["content"] if index in added else f"[PAD{index}]")
        if text == unknown:
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index].get("special") else USER_DEFINED
        elif index not in pieces:
            kind = UNUSED
        else:
            kind = BYTE if text in BYTES else NORMAL
        score = scores.get(text, -len(scores) - 1.0) if kind == NORMAL else 0.0
        content += _piece(text, score, kind)
    if unknown not in model["vocab"]:  # SentencePiece reads no model without one
        content += _piece(unknown, 0.0, UNKNOWN)
    content += _field(2, _number(3, BPE) + _number(35, 1))  # the last: it falls back to bytes
    return content + _field(
        3, _number(3, space_first) + _number(4, 0)
    )  # several spaces stay several


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """Those of pieces that merges make."""
    scores: dict[str, float] = {}
    for merge in model.get("merges") or []:
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        scores.setdefault(left + right, -float(len(scores)))
    return scores


def settle_sentencepiece(folder: Path) -> dict[str, Any]:
    """Write tokenizer.model where it is missing; returns what tokenizer_config.json must say beside it.

    Nothing where the vocabulary is of another kind.
    """
    tokenizer = read_tokenizer(folder)
    if not is_sentencepiece(tokenizer):
        return {}
    space_first = puts_space_first(Tokenizer.from_file(str(folder / "tokenizer.json")))
    if not (folder / MODEL).is_file():
        (folder / MODEL).write_bytes(sentencepiece_model(tokenizer, space_first))
    added = tokenizer.get("added_tokens") or []
    return {
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "add_prefix_space": space_first,
    }


def puts_space_first(tokenizer: Tokenizer) -> bool:
    """Whether text gets a space before it.

    Asked of text after a special token, which most conversations begin with: llama.cpp does the same
    there as at the beginning, and not every tokenizer does.
    """
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    before = special[:1]
    found = tokenizer.encode("".join([*before, "x"]), add_special_tokens=False).tokens
    return found[len(before)].startswith(SPACE)


def shown_name(name: str, folder: Path) -> str:
    """The name to write into the GGUF file, by which llama.cpp knows some tokenizers."""
    strips = any(
        token.get("special") and token.get("rstrip") and token["content"] not in NEVER_STRIPPING
        for token in read_tokenizer(folder).get("added_tokens") or []
    )
    return f"{name} ({STRIPPING_NAME})" if strips and STRIPPING_NAME not in name else name


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(
        1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
    )


def _varint(value: int) -> bytes:
    """Protobuf's integer: seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
