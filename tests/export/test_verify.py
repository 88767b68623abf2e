"""A planted fault of each kind is found before anything is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.export.comparison import compared_rows
from jobs.export.gguf import Extras, file_name, make_gguf
from jobs.export.llama.build import find_tools
from jobs.export.merge import merge
from jobs.export.verify import Paths, verify
from jobs.observe.events import Observer
from jobs.pipeline.export import what_to_change
from jobs.spec import Spec
from jobs.spec_source import load_spec
from tests.conftest import BASE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_converter")]

Change = Callable[[Path], None]


@pytest.fixture
def found(
    demo: Path, tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Verify a copy of the demo's results after a change to it; returns what was found."""
    monkeypatch.chdir(ROOT)

    def look(
        change: Change | None = None, gguf: list[str] | None = None,
        limits: dict[str, float] | None = None, **export: Any,
    ) -> list[str]:  # fmt: skip
        run = tmp_path / "run"
        shutil.copytree(demo, run)
        if change:
            change(run)
        demo_spec = load_spec("examples/demo.yaml", {}).model_dump()
        if limits:
            demo_spec["verify"].update(limits)
        spec = Spec.model_validate({**demo_spec, "export": {"gguf": gguf or [], **export}})
        paths = Paths(
            BASE, run / ".work/data", run / "adapter", run / ".work/train/probe.safetensors",
            run / "merged", run / "gguf", run / "llama.log",
        )  # fmt: skip
        first = json.loads((run / ".work/data/first.json").read_text())
        return verify(
            spec,
            paths,
            TokenizerFiles(BASE),
            first["eval"],
            find_tools(),
            "cpu",
            2,
            Observer("json"),
            json.loads((run / ".work/stages/gguf.json").read_text())["result"],
        )[1]

    return look


def test_what_is_as_it_should_be_passes(found: Callable[..., list[str]]) -> None:
    assert found(gguf=["q8_0"]) == []


def test_an_adapter_that_does_not_reload_as_trained_is_found(
    found: Callable[..., list[str]],
) -> None:
    def change(run: Path) -> None:
        config = json.loads((run / "adapter/adapter_config.json").read_text())
        config["lora_alpha"] *= 2
        (run / "adapter/adapter_config.json").write_text(json.dumps(config))

    assert any("reloaded" in text for text in found(change))


def remerge(run: Path, scale: float) -> None:
    """Merge anew with the update scaled."""
    scaled = run / "scaled"
    shutil.copytree(run / "adapter", scaled)
    weights = load_file(scaled / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] *= scale
    save_file(weights, scaled / "adapter_model.safetensors")
    quantized = json.loads((run / ".work/stages/train.json").read_text())["result"]
    merge(BASE, scaled, quantized["quantized_modules"], run / "merged", Observer("json"))


@pytest.mark.parametrize(
    ("scale", "message"),
    [(0.0, "has 0.00 times"), (2.0, "has 2.00 times"), (0.9, "has 0.90 times")],
    ids=["not merged", "merged twice", "wrong scale"],
)
def test_a_wrong_merge_is_found_in_every_layer(
    found: Callable[..., list[str]], scale: float, message: str
) -> None:
    assert sum(message in text for text in found(lambda run: remerge(run, scale))) == 28


def to_4_bit(run: Path, quantized: list[str] | None) -> None:
    (run / "merged/model.safetensors").unlink()
    merge(BASE, run / "adapter", quantized, run / "merged", Observer("json"), "4bit")


def test_a_4_bit_result_passes(found: Callable[..., list[str]]) -> None:
    assert found(lambda run: to_4_bit(run, []), merged="4bit") == []


def test_a_4_bit_result_that_lost_some_of_the_update_is_found(
    found: Callable[..., list[str]],
) -> None:
    """Dequantized weights lie on the grid of a second quantizing, and fall back onto it."""
    failures = found(lambda run: to_4_bit(run, None), merged="4bit")
    assert any("times the update that was trained" in text for text in failures)


def test_the_original_base_passes_where_it_was_asked_for(found: Callable[..., list[str]]) -> None:
    def change(run: Path) -> None:
        merge(BASE, run / "adapter", [], run / "merged", Observer("json"))

    assert found(change, merge_base="original") == []


def test_merged_weights_that_are_the_base_are_found(found: Callable[..., list[str]]) -> None:
    def change(run: Path) -> None:
        shutil.copyfile(BASE / "model.safetensors", run / "merged/model.safetensors")

    assert any("nothing was merged" in text for text in found(change))


def regguf(run: Path, change: Change) -> None:
    """Make the GGUF anew from merged files that were changed in between."""
    change(run / "merged")
    tools = find_tools()
    assert tools is not None
    shutil.rmtree(run / "gguf")
    (run / "gguf").mkdir()
    made = make_gguf(
        "demo", run / "merged", ["q8_0"], run / "gguf", run / "llama.log", tools, 2, Observer("json"),
        Extras(rows=compared_rows(run / ".work/data")),
    )  # fmt: skip
    edit_json(run / ".work/stages/gguf.json", result=made)


def edit_json(path: Path, **fields: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **fields}))


def drop_template(merged: Path) -> None:
    path = merged / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))


def lose_eos(merged: Path) -> None:
    edit_json(merged / "tokenizer_config.json", eos_token="<unk>")
    for name in ("config.json", "generation_config.json"):
        edit_json(merged / name, eos_token_id=0)


def swap_tokenizer(merged: Path) -> None:
    """One in which pieces are joined in another order."""
    (merged / "tokenizer.model").unlink()
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))


def lose_scores(merged: Path) -> None:
    """transformers saves no tokenizer.model, from which the converter takes the scores."""
    (merged / "tokenizer.model").unlink()


def swap_padding(merged: Path) -> None:
    edit_json(merged / "tokenizer_config.json", pad_token="</s>")


def no_stop(merged: Path) -> None:
    """Weights that never choose the end-of-turn token."""
    weights = load_file(merged / "model.safetensors")
    weights["model.embed_tokens.weight"][2046] = torch.zeros(256)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_template, "chat template is not the one"),
        (lose_eos, "end-of-sequence token is not the one"),
        (swap_tokenizer, "into other tokens than the tokenizer"),
        (swap_padding, "its padding token is '</s>'"),
        (no_stop, "no answer stops by itself"),
    ],
    ids=["template", "eos", "tokenizer", "padding", "never stops"],
)
def test_a_faulty_gguf_is_found(
    found: Callable[..., list[str]], change: Change, message: str
) -> None:
    failures = found(lambda run: regguf(run, change), gguf=["q8_0"])
    assert any(message in text for text in failures if file_name("demo", "q8_0") in text or text.startswith("q8_0")), failures  # fmt: skip


def test_a_vocabulary_without_scores_gets_them(found: Callable[..., list[str]]) -> None:
    assert found(lambda run: regguf(run, lose_scores), gguf=["q8_0"]) == []


def test_a_file_that_lost_too_much_in_quantizing_is_found(found: Callable[..., list[str]]) -> None:
    limits = {"max_kl": 1e-3, "max_perplexity_increase": 1e-3}
    failures = found(gguf=["q8_0", "q4_k_m"], limits=limits)
    assert len(failures) == 2
    assert all(text.startswith("demo-Q4_K_M.gguf: ") for text in failures)
    assert "verify.max_kl is 0.001" in failures[0]
    assert "verify.max_perplexity_increase is 0.001" in failures[1]


SHORT = "train.epochs or train.learning_rate"


@pytest.mark.parametrize(
    ("failures", "advice"),
    [
        (
            ["q4_k_m: of the 3.900 that training took off the loss it keeps 1.2"],
            "all but q4_k_m is",
        ),
        (["q4_k_m: no answer stops by itself", "q2_k: no answer stops by itself"], "q4_k_m, q2_k"),
        (
            ["a-Q4_K_M.gguf: too far from those of the F16: verify.max_kl is 0.1"],
            "all but q4_k_m is",
        ),
        (["a-Q4_K_M.gguf: its padding token is 1, not 2"], SHORT),
        (["q4_k_m: no answer stops by itself", "merged: no answer stops by itself"], SHORT),
        (["adapter: its answer lacks 'Mira'"], SHORT),
        (["f16: no answer stops by itself"], SHORT),
        (["the f16 GGUF: its loss is nan"], SHORT),
    ],
)
def test_what_to_change_is_what_is_at_fault(failures: list[str], advice: str) -> None:
    tree: dict[str, Any] = {
        "name": "a", "model": {"base": str(BASE)}, "data": {"train": "x.jsonl"},
        "export": {"gguf": ["f16", "q4_k_m", "q2_k"]},
    }  # fmt: skip
    told = what_to_change(Spec.model_validate(tree), failures)
    assert advice in told
    assert ("export.imatrix" in told) == ("larger type" in told) == (advice != SHORT)
    tree["export"]["imatrix"] = True
    assert "export.imatrix" not in what_to_change(Spec.model_validate(tree), failures)
