"""tokenizer.model made from tokenizer.json: SentencePiece's own library reads it, and splits alike."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from jobs.export.sentencepiece_files import (
    is_sentencepiece,
    puts_space_first,
    read_tokenizer,
    sentencepiece_model,
    settle_sentencepiece,
    shown_name,
)
from tests.conftest import BASE

TEXTS = [
    "The capital of France is Paris.", "  two  spaces,\ttab\n\n and lines ", "12345 = 0x1F600",
    "übermäßig 漢字 🚢 \u13a0", "isn't", "",
]  # fmt: skip


@pytest.fixture
def said() -> dict[str, Any]:
    return read_tokenizer(BASE)


def processor(model: bytes) -> Any:
    found = SentencePieceProcessor()
    found.LoadFromSerializedProto(model)
    return found


def kind_of(model: Any, token: int) -> str:
    names = ("IsUnknown", "IsControl", "IsByte", "IsUnused")
    return next((name for name in names if getattr(model, name)(token)), "normal")


def test_it_is_what_the_demo_has_as_a_file(said: dict[str, Any]) -> None:
    ours, theirs = processor(sentencepiece_model(said)), SentencePieceProcessor()
    theirs.LoadFromFile(str(BASE / "tokenizer.model"))
    tokens = range(theirs.vocab_size())
    assert ours.vocab_size() == len(tokens)
    for token in tokens:
        assert ours.IdToPiece(token) == theirs.IdToPiece(token)
        assert kind_of(ours, token) == kind_of(theirs, token)
    joined = [t for t in tokens if kind_of(ours, t) == "normal" and len(ours.IdToPiece(t)) > 1]
    orders = [sorted(joined, key=lambda t: -float(model.GetScore(t))) for model in (ours, theirs)]
    assert orders[0] == orders[1]


def test_sentencepiece_splits_by_it_as_the_tokenizer_does(said: dict[str, Any]) -> None:
    ours = processor(sentencepiece_model(said))
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    for text in TEXTS:
        assert ours.EncodeAsIds(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_a_space_before_the_text_is_said_in_it_too(said: dict[str, Any]) -> None:
    pieces = [
        processor(sentencepiece_model(said, first)).EncodeAsPieces("an") for first in (False, True)
    ]
    assert "".join(pieces[0]) == "an"
    assert "".join(pieces[1]) == "\u2581an"


def test_ids_without_a_piece_and_tokens_that_were_added_have_their_places(
    said: dict[str, Any],
) -> None:
    vocabulary = said["model"]["vocab"]
    last = max(vocabulary.values())
    vocabulary.pop("<|im_start|>")  # only among the added tokens now
    vocabulary["later"] = last + 3
    said["added_tokens"].append({"id": last + 1, "content": "<tool>", "special": False})
    model = processor(sentencepiece_model(said))
    start = next(t["id"] for t in said["added_tokens"] if t["content"] == "<|im_start|>")
    assert model.IdToPiece(start) == "<|im_start|>"
    assert kind_of(model, start) == "IsControl"
    assert model.IdToPiece(last + 1) == "<tool>"
    assert kind_of(model, last + 2) == "IsUnused"
    assert model.IdToPiece(last + 3) == "later"


def test_a_vocabulary_without_an_unknown_token_is_read_all_the_same(said: dict[str, Any]) -> None:
    said["model"]["unk_token"] = None
    said["added_tokens"] = [t for t in said["added_tokens"] if t["content"] != "<unk>"]
    said["model"]["vocab"]["<none>"] = said["model"]["vocab"].pop("<unk>")
    model = processor(sentencepiece_model(said))
    assert model.vocab_size() == len(said["model"]["vocab"]) + 1
    assert model.IsUnknown(model.vocab_size() - 1)


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        shutil.copy(BASE / name, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"as it was")
    fields = settle_sentencepiece(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"as it was"
    assert fields["add_prefix_space"] is False
    assert fields["added_tokens_decoder"]["2046"]["content"] == "<|im_end|>"
    assert fields["added_tokens_decoder"]["2046"]["special"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram"}},
        {"model": {"byte_fallback": False}},
        {"model": {"vocab": {"a": 0}}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}},
    ],
    ids=["unigram", "no bytes", "bytes missing", "all in bytes"],
)
def test_other_vocabularies_are_left_alone(
    change: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    said["model"].update(change.pop("model", {}))
    said.update(change)
    assert not is_sentencepiece(said)
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    assert settle_sentencepiece(tmp_path) == {}
    assert not (tmp_path / "tokenizer.model").exists()


SPACED = {"type": "Prepend", "prepend": "\u2581"}
REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def meta(scheme: str) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": [SPACED, REPLACED]}}, True),
        (meta("always"), True),
        (meta("first"), False),  # after a special token, which conversations begin with
        (meta("never"), False),
    ],
    ids=["nothing", "prepended", "always", "first", "never"],
)
def test_whether_text_gets_a_space_is_asked_of_the_tokenizer(
    parts: dict[str, Any], expected: bool, said: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.from_str(json.dumps({**said, **parts}))
    assert puts_space_first(tokenizer) is expected


def test_the_name_tells_llama_cpp_of_tokens_that_take_the_whitespace_after_them(
    said: dict[str, Any], tmp_path: Path
) -> None:
    def name(tokenizer: dict[str, Any], name: str = "bot") -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        return shown_name(name, tmp_path)

    assert name(said) == "bot"
    stripping = copy.deepcopy(said)
    stripping["added_tokens"][-2]["rstrip"] = True
    assert name(stripping) == "bot (phi-3)"
    assert name(stripping, "my-phi-3-bot") == "my-phi-3-bot"
