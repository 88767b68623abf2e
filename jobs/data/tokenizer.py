"""The base model's tokenizer, read without transformers: text <-> ids, special tokens, template.

What counts is the tokenizer that transformers loads from the same files; before training the
two are compared (`jobs.train.engine`), so a file that only transformers understands is refused
and never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jobs.data.named_templates import FAMILIES, resolve_template
from jobs.data.skeleton import TurnFinder
from jobs.data.template import DEFAULT_DATE, ChatTemplate
from jobs.data.words import WordEncoder
from jobs.errors import AccessError, SpecError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class ChatTokenizer:
    backend: Tokenizer
    template: ChatTemplate
    special_tokens: dict[str, str]
    file_stop_ids: frozenset[int]  # what the model's files say ends an answer

    @cached_property
    def turns(self) -> TurnFinder:
        special = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        stops = {str(self.backend.id_to_token(token)) for token in self.file_stop_ids}
        return TurnFinder(self.template, sorted(special), sorted(stops))

    @cached_property
    def words(self) -> WordEncoder | None:
        """A quicker way to the same tokens, for tokenizers that are known to have one."""
        return WordEncoder.of(self.backend)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Any of these ends an answer: the files' and those that the template writes."""
        return self.file_stop_ids | {
            found
            for text in self.turns.end_tokens
            if (found := self.backend.token_to_id(text)) is not None
        }

    @cached_property
    def eos_id(self) -> int:
        """The token that ends an answer: the template's, else the files'."""
        text = self.turns.last_end or self.special_tokens.get("eos_token")
        found = self.backend.token_to_id(text) if text else None
        return found if found is not None else min(self.stop_ids)

    @cached_property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @cached_property
    def pad_id(self) -> int:
        """Padding: never a token that ends an answer. It is masked, so any other one serves."""
        named = [
            self.backend.token_to_id(token.content)
            for token in self.backend.get_added_tokens_decoder().values()
            if "pad" in token.content.lower()
        ]
        candidates = [self._id("pad_token"), *named, self._id("unk_token"), 0, 1, 2]
        return next(i for i in candidates if i is not None and i not in self.stop_ids)

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text."""
        found = self.backend.get_added_tokens_decoder().get(token)
        return found is not None and bool(found.special)

    def _id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return self.backend.token_to_id(text) if text else None

    def text_of(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def ids_of(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class TokenizerFiles:
    """What `load_tokenizer` needs: other processes load their own."""

    folder: Path
    chat_template: str = "auto"
    today: date | None = None

    def load(self) -> ChatTokenizer:
        return load_tokenizer(self.folder, self.chat_template, self.today)


def load_tokenizer(
    folder: Path, chat_template: str = "auto", today: date | None = None
) -> ChatTokenizer:
    """The tokenizer in `folder`, with the chat template that the spec chooses.

    Raises AccessError where a file is missing or says nothing usable.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise AccessError(
            f"{folder} has no tokenizer.json",
            "save the fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise AccessError(
            f"{path} is no tokenizer: {error}", "fetch the base model again"
        ) from None
    config = _json(folder / "tokenizer_config.json")
    special = _special_tokens(_json(folder / "special_tokens_map.json") | config)
    eos = special.get("eos_token")
    stops = _stop_ids(folder)
    if eos and (eos_id := backend.token_to_id(eos)) is not None:
        stops.add(eos_id)
    stops = {token for token in stops if backend.id_to_token(token) is not None}
    if not stops:
        raise AccessError(
            f"{folder} names no end-of-sequence token, so an answer could never stop",
            "set eos_token in its tokenizer_config.json",
        )
    source, name = _template(folder, config, chat_template, backend)
    template = ChatTemplate(source, special, name, today or DEFAULT_DATE)
    return ChatTokenizer(backend, template, special, frozenset(stops))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AccessError(f"{path} cannot be read: {error}", "fetch the base model again") from None
    if not isinstance(value, dict):
        raise AccessError(f"{path} holds no object", "fetch the base model again")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key in SPECIAL:
        value = config.get(key)
        if isinstance(value, dict):  # an AddedToken as JSON
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _template(
    folder: Path, config: dict[str, Any], chosen: str, backend: Tokenizer
) -> tuple[str, str]:
    """The source and the name of the chat template that the spec chooses."""
    if chosen in FAMILIES:
        missing = [t for t in FAMILIES[chosen].special_tokens if backend.token_to_id(t) is None]
        if missing:
            raise SpecError(
                f"model.chat_template: {chosen} needs the token {missing[0]}, which the tokenizer in "
                f"{folder} does not have: it would be spelled out in pieces, and nothing would stop",
                "choose the template of the base model's own family, or auto",
            )
    try:
        return resolve_template(chosen, _own_template(folder, config))
    except LookupError:
        raise AccessError(
            f"{folder} has no chat template",
            "set model.chat_template: a family's name such as alpaca, a prompt format, or a .jinja "
            "file; base models that were never tuned for chat come without one",
        ) from None


def _own_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(
                f"the chat template {path} cannot be read: {error}", "fetch the base model again"
            ) from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {i.get("name"): i.get("template") for i in source if isinstance(i, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _stop_ids(folder: Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        eos = _json(folder / name).get("eos_token_id")
        values = eos if isinstance(eos, list) else [eos]
        found |= {value for value in values if isinstance(value, int)}
    return found
