"""The quick way to tokens gives what the tokenizer gives, or no answer."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from jobs.data.labels import label
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.data.words import GPT_2, KNOWN_CHARACTERS, PATTERNS, WordEncoder
from tests.conftest import BASE, ROOT

SHARED = ROOT.parent / "shared" / "tokenizers"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "<tool>"]
CORPUS = [path.read_text("utf-8") for path in sorted((ROOT / "jobs").rglob("*.py"))]
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.text(st.sampled_from("aB1 \n\r\t'slLe.,-_é你ſ\u3000 /"), max_size=20),
        st.sampled_from([*SPECIAL, "<|im_", " don't", "e\u0301", "\n\n", "   ", "I'LL", "123456"]),
    ),
    max_size=8,
).map("".join)


def made(pattern: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A small byte-level tokenizer that cuts text by this pattern."""
    tokenizer = Tokenizer(BPE())
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"), bytes_only])
    if pattern == GPT_2:
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
            special_tokens=SPECIAL[:2],
        ),
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in SPECIAL[2:]])
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


MADE = {name: made(pattern) for name, pattern in PATTERNS.items()} | {
    "composed": made(PATTERNS["qwen2"], normalizers.NFC())
}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_words_give_the_tokenizers_own_tokens(name: str, text: str) -> None:
    encoder = WordEncoder.of(MADE[name])
    assert encoder is not None
    whole = MADE[name].encode(text, add_special_tokens=False)
    encoder.encode(text)
    words = encoder.encode(text)  # now every word is remembered
    if words is None:
        assert not text.isascii()
        return
    assert words.ids == whole.ids == WordEncoder.of(MADE[name]).encode(text).ids  # type: ignore[union-attr]
    for place in range(len(text) + 1):
        at = words.token_at(place)
        if at is not None:
            assert place == (whole.offsets[at][0] if at < len(whole) else len(text))


@pytest.mark.parametrize("name", PATTERNS)
def test_both_engines_know_the_class_of_every_known_character(name: str) -> None:
    theirs, ours = Split(Regex(PATTERNS[name]), "isolated"), regex.compile(PATTERNS[name])
    known = re.compile(f"[{KNOWN_CHARACTERS}]")
    characters = [c for c in map(chr, range(0x20000)) if known.match(c)]
    assert len(characters) > 50_000
    for first in range(0, len(characters), 64):
        text = "".join(
            f"a{c}b 1{c}2 {c}{c}\n{c} '{c} {c} x'{c}e" for c in characters[first : first + 64]
        )
        words = list(accumulate(map(len, ours.findall(text))))
        assert words == [end for _, (_, end) in theirs.pre_tokenize_str(text)], ascii(text)


def test_a_way_of_cutting_that_is_not_known_has_no_encoder() -> None:
    for change in (
        lambda t: setattr(t, "pre_tokenizer", ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", Split(Regex(r"\s+"), "isolated")),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: t.add_tokens([AddedToken("<stripping>", lstrip=True, normalized=False)]),
        lambda t: t.add_tokens([AddedToken("<normalized>", normalized=True)]),
        lambda t: t.enable_truncation(8),
    ):
        tokenizer = Tokenizer.from_str(MADE["llama-3"].to_str())
        assert WordEncoder.of(tokenizer) is not None
        change(tokenizer)
        assert WordEncoder.of(tokenizer) is None


def test_a_sentencepiece_tokenizer_has_no_words() -> None:
    assert WordEncoder.of(load_tokenizer(BASE).backend) is None


def test_what_is_remembered_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.data.words.MOST_WORDS", 50)
    encoder = WordEncoder.of(MADE["gpt-2"])
    assert encoder is not None
    for number in range(200):
        text = f" word{number} <|im_end|>"
        words = encoder.encode(text)
        assert words is not None
        assert words.ids == MADE["gpt-2"].encode(text).ids
        assert len(encoder._known) <= 51


@pytest.mark.parametrize("folder", ["llama-3", "qwen2", "gpt-2"])
def test_real_vocabularies_label_the_same_with_and_without_words(
    folder: str, tmp_path: Path
) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real tokenizers at {SHARED}")
    from jobs.data.formats import detect_format, to_conversation
    from jobs.data.read import read_rows
    from jobs.spec import Source

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (SHARED / folder / name).is_file():
            (tmp_path / name).write_bytes((SHARED / folder / name).read_bytes())
    special = {t.content for t in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_added_tokens_decoder().values()}  # fmt: skip
    end = next(t for t in ("<|eot_id|>", "<|im_end|>", "<|endoftext|>") if t in special)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": "{end}"}}')
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content }}"
        f"{{% if m.role == 'assistant' %}}{end}{{% endif %}}\n{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    quick = load_tokenizer(tmp_path, str(template))
    assert quick.words is not None
    slow = ChatTokenizer(quick.backend, quick.template, quick.special_tokens, quick.file_stop_ids)
    slow.__dict__["words"] = None
    served = total = 0
    for source in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
        for row in read_rows(Source(source=str(SHARED.parent / "data" / source), limit=400)):
            conversation = to_conversation(row.value, detect_format(row.value, {}), {})
            one, other = (label(t, conversation, "responses") for t in (quick, slow))
            assert one == other
            total += 1
            served += quick.words.encode(one.text) is not None
    assert served > 0.9 * total  # else the comparison says little
