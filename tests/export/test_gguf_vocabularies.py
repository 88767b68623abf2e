"""Models in the shapes of real families, with real vocabularies: merged, converted, proven.

The vocabularies are large and not this project's; where they are not at hand the tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from jobs.base_model import copy_tokenizer, settle_stops
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.export.answers import Said
from jobs.export.gguf import Extras, files_of, make_gguf
from jobs.export.llama.build import find_tools
from jobs.export.merge import merge
from jobs.export.tokenizer_proof import FURTHER, ORDINARY, ids_in_llama_cpp
from jobs.export.verify_gguf import Found, GgufCheck, adapter_failures
from jobs.observe.events import Observer
from tests.conftest import ROOT

TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
TOOLS = find_tools()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_converter"),
    pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no vocabularies in ../shared/tokenizers"),
    pytest.mark.skipif(TOOLS is None, reason="llama.cpp is not built: `lorajob tools`"),
]

SAID: list[Said] = [
    {
        "messages": [
            {"role": "user", "content": "Where's  the übermäßig long 12345-jetty? 漢字\n\n\tΩ 🚢"},
            {"role": "assistant", "content": "It's 3.14 km north; isn't that far?\n```x = 1```"},
        ],
        "tools": [],
    }
]


@dataclass(frozen=True)
class Shape:
    vocabulary: str
    template: str
    config: PreTrainedConfig
    pre: str  # llama.cpp's name of how it splits words
    eos: str


def shapes() -> dict[str, Shape]:
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    return {
        "llama-3": Shape(
            "llama-3",
            "llama-3",
            LlamaConfig(vocab_size=128_256, num_key_value_heads=2, tie_word_embeddings=True, **small),
            "llama-bpe",
            "<|end_of_text|>",
        ),
        "qwen2": Shape(
            "qwen2",
            "chatml",
            Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **small),
            "qwen2",
            "<|endoftext|>",
        ),
        "gpt-2": Shape(
            "gpt-2",
            "alpaca",
            GPT2Config(vocab_size=50_257, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2),
            "gpt-2",
            "<|endoftext|>",
        ),
        "llama-2": Shape(
            "llama-2-spm",
            "llama-2",
            LlamaConfig(vocab_size=32_000, num_key_value_heads=4, tie_word_embeddings=False, **small),
            "default",
            "</s>",
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Made:
    shape: Shape
    folder: Path  # with base, adapter and merged
    tokenizer: ChatTokenizer
    rows: list[dict[str, list[int]]]
    base_loss: float
    tuned_loss: float

    def gguf(self, kinds: list[str], **extras: Any) -> dict[str, Any]:
        assert TOOLS is not None
        out = self.folder / "gguf"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return make_gguf(
            "tiny", self.folder / "merged", kinds, out, self.folder / "log", TOOLS, 2,
            Observer("json"), Extras(rows=self.rows, **extras),
        )  # fmt: skip

    def look(self, kind: str) -> Found:
        assert TOOLS is not None
        check = GgufCheck(
            TOOLS, self.folder / "log", 2, self.tokenizer, self.folder / "base", SAID, [], 8
        )
        return check.look(files_of(self.folder / "gguf", "tiny", kind), self.rows)


def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> float:
    with torch.no_grad():
        ids, labels = (torch.tensor([rows[0][name]]) for name in ("input_ids", "labels"))
        return float(model(input_ids=ids, labels=labels).loss)


def make(name: str, folder: Path, **lora: Any) -> Made:
    """Base, adapter and merged model of a shape."""
    name, _, template = name.partition(":")
    shape = shapes()[name]
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    shutil.copytree(TOKENIZERS / shape.vocabulary, base)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    model.save_pretrained(base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": shape.eos}))
    tokenizer = load_tokenizer(base, template or shape.template)
    ids = tokenizer.ids_of(tokenizer.template.render(SAID[0]["messages"], []))
    model = model.float().eval()
    tuned = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **lora)
    )
    for weight_name, parameter in tuned.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(adapter)
    with torch.no_grad():
        likely = tuned.eval()(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
    # What the tuned model itself would say is far from what any other would.
    rows = [{"input_ids": ids, "labels": [-100, *likely[:-1]]}]
    tuned_loss = loss_of(tuned, rows)
    with tuned.disable_adapter():
        base_loss = loss_of(tuned, rows)
    merged.mkdir()
    merge(base, adapter, [], merged, Observer("json"))
    copy_tokenizer(base, tokenizer, merged)
    settle_stops(merged, tokenizer)
    return Made(shape, folder, tokenizer, rows, base_loss, tuned_loss)


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "gpt-2", "llama-2"])
def test_a_real_vocabulary_goes_through_merging_gguf_and_verification(
    name: str, tmp_path: Path
) -> None:
    made = make(name, tmp_path)
    assert made.base_loss - made.tuned_loss > 1  # else the comparisons below say nothing
    result = made.gguf(["q8_0", "bf16"], adapter=made.folder / "adapter")

    assert result["sizes"].keys() == {"q8_0", "bf16"}
    assert result["quality"]["bf16"]["loss"] == pytest.approx(made.tuned_loss, abs=0.05)
    assert result["quality"]["q8_0"]["loss"] == pytest.approx(made.tuned_loss, abs=0.1)
    assert 0 < result["quality"]["q8_0"]["kl"] < 0.05
    found = made.look("q8_0")
    assert found.failures == []
    assert found.facts["pre"] == made.shape.pre
    assert not list((tmp_path / "gguf").glob(".*")), "what is only on the way must be gone"

    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as opened:
        trained = len(opened.keys())
    losses = made.base_loss, made.tuned_loss
    assert adapter_failures(result["adapter"], Path("adapter.gguf"), *losses, trained) == []


def test_conversations_without_a_beginning_get_none_from_llama_cpp(tmp_path: Path) -> None:
    """SentencePiece vocabularies have one put before every text where the file says nothing else."""
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    made = make(f"llama-2:{template}", tmp_path)
    made.gguf(["q8_0"], begins_with_bos=True)
    assert any("before every conversation" in text for text in made.look("q8_0").failures)
    made.gguf(["q8_0"], begins_with_bos=False)
    assert made.look("q8_0").failures == []


SPACE = "\u2581"
FIRST = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
CHATML = ["<|im_start|>", "<|im_end|>"]
HARD = [
    *ORDINARY, *FURTHER, "", " ", "x" + 9 * " " + "y", "a\n\n\n b\t\tc", "----====****", "<s> </s>x", "<0x0A>",
    "a\u00a0b\u3000\u200bc", "e\u0301 ﷺ \U0001f3f4\u200d\u2620\ufe0f", "\U00012345 \ud7ff\ue000",
]  # fmt: skip


def as_saved(tokenizer: dict[str, Any]) -> str:
    return "llama-2"


def with_a_space_at_the_beginning_only(tokenizer: dict[str, Any]) -> str:
    """As transformers 5 saves what it reads from a tokenizer.model."""
    tokenizer.update(normalizer=None, pre_tokenizer=FIRST)
    return "llama-2"


def with_added_tokens(tokenizer: dict[str, Any]) -> str:
    """As tuned for chat by others: the new tokens are in no tokenizer_config.json."""
    tokens = [(name, True) for name in CHATML] + [("<tool>", False)]
    tokenizer["added_tokens"] += [added(32_000 + n, *token) for n, token in enumerate(tokens)]
    return "chatml"


def with_tokens_that_strip(tokenizer: dict[str, Any]) -> str:
    """As Phi-3's take the newline after them."""
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer["added_tokens"] += [
        added(32_000 + n, name, rstrip=name != "<|endoftext|>") for n, name in enumerate(names)
    ]
    tokenizer["added_tokens"][2]["rstrip"] = True  # </s>
    return "phi-3"


def added(token: int, text: str, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
    return {
        "id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": rstrip,
        "normalized": False, "special": special,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [as_saved, with_a_space_at_the_beginning_only, with_added_tokens, with_tokens_that_strip],
    ids=lambda change: change.__name__,
)
def test_sentencepiece_without_tokenizer_model_splits_alike(change: Any, tmp_path: Path) -> None:
    assert TOOLS is not None
    base = tmp_path / "base"
    shutil.copytree(TOKENIZERS / "llama-2-spm", base)
    config = shapes()["llama-2"].config
    (base / "config.json").write_text(
        json.dumps(
            {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "vocab_size": 32_064}
        )
    )
    said = json.loads((base / "tokenizer.json").read_text())
    template = change(said)
    (base / "tokenizer.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(base, template)
    texts = []
    for text in HARD:
        messages: list[Any] = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"{text}<tool>{text}"},
            {"role": "user", "content": "And now?"},
        ]
        texts.append(tokenizer.template.render(messages, []))
    for text, found in zip(texts, ids_in_llama_cpp(base, tokenizer, TOOLS, texts), strict=True):
        assert found == tokenizer.ids_of(text), text
