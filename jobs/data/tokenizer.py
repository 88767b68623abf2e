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

from jobs.data.template import DEFAULT_DATE, ChatTemplate
from jobs.data.skeleton import TurnFinder
from jobs.errors import AccessError

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
        stops = {self.backend.id_to_token(token) for token in self.file_stop_ids}
        return TurnFinder(self.template, sorted(special), sorted(stops))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Any of these ends an answer: the files' and those that the template writes."""
        return self.file_stop_ids | {
            self.backend.token_to_id(text) for text in self.turns.end_tokens
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

    def _id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return self.backend.token_to_id(text) if text else None

    def text_of(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def ids_of(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)


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
    source, name = _template_source(folder, config, chat_template)
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


def _template_source(folder: Path, config: dict[str, Any], chosen: str) -> tuple[str, str]:
    own = folder / "chat_template.jinja"
    path = own if chosen == "auto" else Path(chosen)
    if chosen != "auto" or own.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(
                f"the chat template {path} cannot be read: {error}",
                "set model.chat_template to a readable .jinja file, or to auto",
            ) from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {i.get("name"): i.get("template") for i in source if isinstance(i, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise AccessError(
            f"{folder} has no chat template",
            "set model.chat_template to a .jinja file; base models that were never tuned for "
            "chat come without one",
        )
    return source, str(folder / "tokenizer_config.json")


def _stop_ids(folder: Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        eos = _json(folder / name).get("eos_token_id")
        values = eos if isinstance(eos, list) else [eos]
        found |= {value for value in values if isinstance(value, int)}
    return found
