"""What is shipped with the weights stops where training said so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from jobs.base_model import copy_tokenizer, open_base, settle_stops
from jobs.data.template import ChatTemplate
from jobs.data.tokenizer import ChatTokenizer
from jobs.store.connect import Connections
from tests.conftest import BASE

# A template whose turns end with a token that the base's files do not name as the end.
OTHER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<s>\n{% endfor %}"


def other(tokenizer: ChatTokenizer) -> ChatTokenizer:
    return replace(tokenizer, template=ChatTemplate(OTHER, tokenizer.special_tokens, "other"))


def test_the_template_and_its_end_go_along(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    copy_tokenizer(BASE, other(tokenizer), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<s>"
    assert config["pad_token"] == "<|pad|>"
    assert (tmp_path / "chat_template.jinja").read_text() == OTHER
    assert (tmp_path / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()


def test_gpt2_is_a_causal_language_model(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    model.save_pretrained(tmp_path)  # no class of transformers is called GPT2ForCausalLM
    assert open_base(str(tmp_path), Connections()).folder == tmp_path


def test_what_fits_already_stays_as_it_was(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    copy_tokenizer(BASE, tokenizer, tmp_path)
    name = "tokenizer_config.json"
    assert (tmp_path / name).read_bytes() == (BASE / name).read_bytes()


def test_generation_stops_at_the_templates_end_first(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((BASE / "config.json").read_bytes())
    settle_stops(tmp_path, other(tokenizer))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == [1, 2046]


def test_padding_is_never_what_ends_an_answer(tokenizer: ChatTokenizer) -> None:
    special = {**tokenizer.special_tokens, "pad_token": "<|im_end|>"}
    assert replace(tokenizer, special_tokens=special).pad_id == 2047
    assert tokenizer.pad_id == 2047
