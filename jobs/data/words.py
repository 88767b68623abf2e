"""A quick way to the same tokens: text is cut into words, and each word's tokens are remembered.

Byte-level BPE tokenizers cut a text by one regular expression and encode each piece, here called a
word, by itself. The same words come again and again, so that looking them up takes a quarter of the
time that encoding takes. Only tokenizers whose cutting is known to be the same here are served, and
only texts of characters on whose class both regular-expression engines agree; for all others there
is no answer, and the tokenizer itself is asked.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import regex
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_NAME = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"

# How the families cut text, as their tokenizer.json files say it. Every other way is left to the
# tokenizer itself: tests compare these with it, character by character.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": GPT_2,
    "llama-3": _MARKS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST,
    "qwen2": _MARKS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST,
    "o200k": rf"{_WORD}{_MARKS}?|{_NAME}{_MARKS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _REST,
    "tekken": rf"{_WORD}|{_NAME}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST,
}

# Scripts that have been in Unicode for so long that both engines know them, in whole ranges. Those
# left out hold characters that are new to one of the two.
KNOWN_CHARACTERS = (
    "\0-\u0557\u0590-\u05c7\u05d0-\u086f\u1e00-\u208e\u20a0-\u218f\u2190-\u2bff\u2e80-\ua48f\uac00-\ud7a3"
    "\uf900-\ufaff\ufe00-\uffef\U0001f000-\U0001faff"
)
_UNKNOWN = re.compile(f"[^{KNOWN_CHARACTERS}]")

MOST_WORDS = 300_000  # remembered at a time: some 60 MB
LONGEST_WORD = 48  # characters; longer ones hardly come twice


@dataclass(frozen=True, slots=True)
class Words:
    """A text's tokens, and where its words begin."""

    ids: list[int]
    _starts: list[int]  # of each part of the text, in characters
    _tokens: list[int]  # before that part
    _parts: list[tuple[list[str], list[list[int]]]]  # its words, and their tokens

    def token_at(self, place: int) -> int | None:
        """The number of tokens before this character, where a word begins there or the text ends."""
        part = bisect_right(self._starts, place) - 1
        if part < 0:
            return 0 if place == 0 else None
        at, tokens = self._starts[part], self._tokens[part]
        for word, ids in zip(*self._parts[part], strict=True):
            if at >= place:
                break
            at += len(word)
            tokens += len(ids)
        return tokens if at == place else None


class WordEncoder:
    """Encodes as `backend` does, without its special tokens around the text."""

    def __init__(self, backend: Tokenizer, pattern: str, composed: bool) -> None:
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._words = regex.compile(pattern).findall
        self._model = backend.model
        self._composed = composed  # whether the tokenizer normalizes text to NFC first
        self._bytes = ByteLevel(add_prefix_space=False, use_regex=False)
        self._special = {text: [token] for text, token in special.items()}
        self._known = dict(self._special)

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """An encoder for this tokenizer, or None where its way is not one of those known."""
        pattern, normalizer = _pattern(_says(backend.pre_tokenizer)), _says(backend.normalizer)
        composed = normalizer == {"type": "NFC"}
        plain = normalizer in (None, {"type": "Sequence", "normalizers": []})
        exact = not any(
            token.single_word or token.lstrip or token.rstrip or token.normalized
            for token in backend.get_added_tokens_decoder().values()
        )
        settings = backend.truncation, backend.padding, getattr(backend.model, "dropout", None)
        if pattern is None or not exact or not (plain or composed) or any(settings):
            return None
        return cls(backend, pattern, composed)

    def encode(self, text: str) -> Words | None:
        """The text's tokens, or None where only the tokenizer itself knows them."""
        if not text.isascii() and (
            _UNKNOWN.search(text) or (self._composed and not unicodedata.is_normalized("NFC", text))
        ):
            return None
        ids: list[int] = []
        starts: list[int] = []
        tokens: list[int] = []
        parts: list[tuple[list[str], list[list[int]]]] = []
        known, at = self._known, 0
        for number, part in enumerate(self._split.split(text)):
            if not part:
                continue
            words = [part] if number % 2 else self._words(part)
            try:
                found = [known[word] for word in words]
            except KeyError:
                found = [self._ids(word) for word in words]
            starts.append(at)
            tokens.append(len(ids))
            parts.append((words, found))
            ids += chain.from_iterable(found)
            at += len(part)
        return Words(ids, starts, tokens, parts)

    def _ids(self, word: str) -> list[int]:
        found = self._known.get(word)
        if found is None:
            spelled = "".join(piece for piece, _ in self._bytes.pre_tokenize_str(word))
            found = [token.id for token in self._model.tokenize(spelled)]
            if len(word) <= LONGEST_WORD:
                if len(self._known) >= MOST_WORDS:
                    self._known = dict(self._special)
                self._known[word] = found
        return found


def _says(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json has it; asking for all would take half a second."""
    return None if part is None else json.loads(part.__getstate__())


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that cuts text into words, where nothing else cuts it."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT_2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in PATTERNS.values():  # fmt: skip
            return str(pattern)
    return None
