"""A tokenizer that llama.cpp would get wrong is found before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data.tokenizer import load_tokenizer
from jobs.errors import SpecError
from jobs.export import tokenizer_proof
from jobs.export.llama import client
from jobs.export.llama.build import find_tools
from jobs.export.tokenizer_proof import require_possible, require_same_tokens
from tests.conftest import BASE, lorajob

FOUND = find_tools()
TOOLS = FOUND or Path()
built = pytest.mark.skipif(not FOUND, reason="llama.cpp is not built: `lorajob tools`")
Change = Callable[[dict[str, Any]], None]
pytestmark = pytest.mark.usefixtures("warm_converter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The demo's base, as transformers saves it: without tokenizer.model."""
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of its own: what was found before is kept there."""
    monkeypatch.setenv("LORAJOB_CACHE", str(tmp_path / "cache"))
    if FOUND:
        monkeypatch.setenv("LORAJOB_LLAMA_CPP", str(FOUND))
    return tmp_path / "cache"


def change(base: Path, how: Change) -> None:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    how(tokenizer)
    path.write_text(json.dumps(tokenizer))


def to_unigram(tokenizer: dict[str, Any]) -> None:
    pieces = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: int(item[1]))
    tokenizer["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[text, -float(index)] for text, index in pieces],
    }


def lose_a_byte(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<byte>"] = vocabulary.pop("<0xE2>")


def one_way_to_each_piece(tokenizer: dict[str, Any]) -> None:
    """As trainers of byte-pair encodings leave it, where SentencePiece knows every way."""
    ways: dict[str, list[str]] = {}
    for left, right in tokenizer["model"]["merges"]:
        ways[left + right] = [left, right]
    tokenizer["model"]["merges"] = list(ways.values())


def to_byte_level(tokenizer: dict[str, Any]) -> None:
    """A byte-level one that nobody has seen before."""
    tokenizer["model"]["byte_fallback"] = False
    tokenizer["normalizer"] = None
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["pre_tokenizer"] = tokenizer["decoder"] = {"type": "ByteLevel", **level}


@built
def test_what_fits_passes_and_is_not_looked_for_again(
    base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    require_same_tokens(base, load_tokenizer(base), TOOLS, told.append)
    assert told == []

    def refuse(*_: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(client, "convert_vocabulary", refuse)
    require_same_tokens(base, load_tokenizer(base), TOOLS, told.append)
    change(base, lambda tokenizer: tokenizer["model"]["merges"].reverse())
    with pytest.raises(AssertionError, match="asked again"):
        require_same_tokens(base, load_tokenizer(base), TOOLS, told.append)


@built
def test_a_tokenizer_model_of_other_pieces_is_found(base: Path) -> None:
    """It came from the original base, and the tokenizer was changed afterwards."""
    shutil.copy(BASE / "tokenizer.model", base)
    change(base, lambda tokenizer: tokenizer["model"]["merges"].reverse())
    with pytest.raises(SpecError, match="ordinary text into other tokens"):
        require_same_tokens(base, load_tokenizer(base), TOOLS, print)


@built
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (one_way_to_each_piece, "ordinary text into other tokens"),
        (to_byte_level, "llama.cpp cannot take the base's tokenizer: .*pre-tokenizer"),
    ],
    ids=["one way", "unknown"],
)
def test_what_only_llama_cpp_itself_knows_is_found(base: Path, how: Change, message: str) -> None:
    change(base, how)
    with pytest.raises(SpecError, match=message):
        require_same_tokens(base, load_tokenizer(base), TOOLS, print)


def test_scripts_that_nobody_has_to_use_are_a_warning(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(base)

    def otherwise(_: Path, __: Any, ___: Path, texts: list[str]) -> list[list[int]]:
        ordinary, further = map(tokenizer.ids_of, texts)
        return [ordinary, further[:-1]]

    monkeypatch.setattr(tokenizer_proof, "ids_in_llama_cpp", otherwise)
    for _ in range(2):  # it is said each time
        told: list[str] = []
        require_same_tokens(base, tokenizer, tmp_path, told.append)
        assert len(told) == 1
        assert "some scripts" in told[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [(to_unigram, "of the kind Unigram"), (lose_a_byte, "lacks 1 of 256 tokens for them, <0xE2>")],
    ids=["unigram", "bytes"],
)
def test_what_tokenizer_json_says_is_found_without_llama_cpp(
    base: Path, how: Change, message: str
) -> None:
    change(base, how)
    with pytest.raises(SpecError, match=message):
        require_possible(base)


def test_check_says_it_with_the_exit_code_of_a_wrong_spec(base: Path, tmp_path: Path) -> None:
    change(base, to_unigram)
    command = ["check", "examples/demo.yaml", "--work", str(tmp_path / "work")]
    model = str(base)
    refused = lorajob(*command, LORAJOB__MODEL__BASE=model, LORAJOB__PUBLISH="[]")
    assert refused.code == 2
    assert "export.gguf: the base's tokenizer is of the kind Unigram" in refused.err
    passed = lorajob(
        *command, LORAJOB__MODEL__BASE=model, LORAJOB__PUBLISH="[]", LORAJOB__EXPORT__GGUF="[]"
    )
    assert passed.code == 0, passed.err
