"""Every type from one conversion, and what is found out about each while it is made."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import VerificationError
from jobs.export import gguf as making
from jobs.export.answers import Said
from jobs.export.comparison import comparison, lossy_failures
from jobs.export.gguf import Extras, files_of, imatrix_name, make_gguf
from jobs.export.llama import client
from jobs.export.llama.build import find_tools
from jobs.export.merge import merge
from jobs.export.verify_gguf import GgufCheck, adapter_failures
from jobs.observe.answers_table import types_table
from jobs.observe.events import Observer
from jobs.spec import NEED_IMATRIX, Export, GgufType, Spec, Verify
from jobs.store.hashing import sha256_of
from jobs.store.local import can_punch
from tests.conftest import BASE

TOOLS = find_tools()
built = pytest.mark.skipif(TOOLS is None, reason="llama.cpp is not built: `lorajob tools`")

SAID: list[Said] = [
    {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "The capital of France is Paris."},
        ],
        "tools": [],
    }
]
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(tokenizer: ChatTokenizer) -> list[dict[str, list[int]]]:
    ids = tokenizer.ids_of(tokenizer.template.render(SAID[0]["messages"], []))
    return [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]}] * 2


@pytest.fixture
def make(tmp_path: Path, rows: list[dict[str, list[int]]], warm_converter: None) -> Make:
    """Make GGUF files of a model in tmp_path/gguf."""

    def run(kinds: list[str], merged: Path = BASE, **extras: Any) -> dict[str, Any]:
        assert TOOLS is not None
        out = tmp_path / "gguf"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return make_gguf(
            "tiny", merged, kinds, out, tmp_path / "log", TOOLS, 1, Observer("json"),
            Extras(rows=rows, **extras),
        )  # fmt: skip

    return run


def loss_of(model: Any, row: dict[str, list[int]]) -> float:
    with torch.no_grad():
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        return float(model(input_ids=ids, labels=labels).loss)


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@built
def test_types_are_made_of_one_conversion_and_it_is_not_made_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Any,
    rows: list[dict[str, list[int]]],
) -> None:  # fmt: skip
    done: list[str] = []
    for name in ("convert", "quantize"):
        before = getattr(client, name)

        def counted(*args: Any, name: str = name, before: Any = before) -> Any:
            done.append(name)
            return before(*args)

        monkeypatch.setattr(client, name, counted)
    made = make(["q8_0", "bf16", "q2_k"])
    assert done == ["convert", "quantize"]
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        "tiny-Q8_0.gguf", "tiny-BF16.gguf", "tiny-Q2_K.gguf",
    }  # fmt: skip

    quality = made["quality"]
    assert made["reference"]["loss"] == pytest.approx(loss_of(base, rows[0]), abs=0.02)
    assert quality["bf16"]["kl"] == 0
    assert 0 < 10 * quality["q8_0"]["kl"] < quality["q2_k"]["kl"]
    for kind in ("q8_0", "q2_k"):
        size = (tmp_path / "gguf" / f"tiny-{kind.upper()}.gguf").stat().st_size
        assert made["sizes"][kind] == size
        weights = 8 * size / quality[kind]["bits_per_weight"]
        assert weights == pytest.approx(3.94e6, rel=0.03)  # the header is in the size as well


@built
def test_types_made_together_are_those_made_alone(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    assert TOOLS is not None
    whole, matrix, log = tmp_path / "whole.gguf", tmp_path / "matrix.gguf", tmp_path / "log"
    tokens = tokenizer.ids_of(tokenizer.template.render(SAID[0]["messages"], []) * 4)
    client.convert(TOOLS, BASE, whole, "bf16", log)
    client.imatrix(TOOLS, whole, tokens, 512, matrix, 1, log)

    def made(kinds: list[str]) -> dict[str, str]:
        targets = {kind: tmp_path / f"{len(kinds)}-{kind}.gguf" for kind in kinds}
        client.quantize(TOOLS, whole, targets, 2, log, imatrix=matrix)
        return {kind: sha256_of(path) for kind, path in targets.items()}

    kinds = ["q4_k_m", "iq4_xs", "f16", "q8_0"]
    together = made(kinds)
    assert len(set(together.values())) == len(kinds)
    assert together == {kind: made([kind])[kind] for kind in kinds}


@built
def test_the_conversion_goes_while_types_are_made_of_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Looked at after each tensor: never are all of both there."""
    if not can_punch(tmp_path):
        pytest.skip("this file system cannot give back parts of a file")
    out, quantize = tmp_path / "gguf", client.quantize
    most, sizes = 0, {}

    def look(*_: int) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_blocks * 512 for path in out.glob("*.gguf")))

    def watched(*args: Any) -> Any:
        before = list(args)
        before[5], sizes["whole"] = look, (out / making.WHOLE).stat().st_size
        done = quantize(*before)
        sizes["left"] = (out / making.WHOLE).stat().st_blocks * 512
        return done

    monkeypatch.setattr(client, "quantize", watched)
    kinds = ["q8_0", "q6_k", "q5_k_m", "q4_k_m"]
    made = make(kinds)
    largest = 2048 * 256 * 2  # bytes of the embedding in the conversion
    together = sum(made["sizes"].values())
    assert together > sizes["whole"]
    assert sizes["whole"] < most < together + 2 * largest < sizes["whole"] + together
    assert sizes["left"] < 2**20  # its header, and blocks that two tensors share
    most = 0
    make([*kinds, "bf16"])  # now it stays, being asked for
    assert most > sizes["whole"] + together - 2 * largest
    assert sizes["left"] >= sizes["whole"]


@built
def test_a_type_that_cannot_be_made_is_named_and_ends_the_others(make: Make) -> None:
    with pytest.raises(VerificationError, match=r"to iq2_s \(code 1\)(.|\n)*importance matrix"):
        make(["q8_0", "iq2_s", "q4_k_m"])


@built
def test_who_is_told_to_stop_does_not_wait_for_the_types(tmp_path: Path) -> None:
    assert TOOLS is not None
    whole, log, made = tmp_path / "whole.gguf", tmp_path / "log", tmp_path / "q8_0.gguf"
    client.convert(TOOLS, BASE, whole, "bf16", log)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.quantize(TOOLS, whole, {"q8_0": made}, 1, log, stop)
    size = made.stat().st_size
    assert size < whole.stat().st_size / 2, "the first of 38 tensors was made, not all"
    time.sleep(0.5)
    assert made.stat().st_size == size


@built
def test_kl_is_that_of_the_definition(
    make: Make, tmp_path: Path, rows: list[dict[str, list[int]]]
) -> None:
    """Each file's whole predictions, compared here."""
    assert TOOLS is not None
    made = make(["q4_k_m", "bf16"])
    predictions = []
    for kind in ("BF16", "Q4_K_M"):
        file = tmp_path / f"{kind}.predictions"
        client.score(
            TOOLS, tmp_path / "log", model=str(tmp_path / f"gguf/tiny-{kind}.gguf"), rows=rows,
            context=64, threads=1, limit_bytes=2**24, write=str(file),
        )  # fmt: skip
        predictions.append(np.fromfile(file, np.float32).reshape(-1, 2048).astype(np.float64))
    p, q = predictions
    assert np.exp(p).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert len(p) == 2 * (len(rows[0]["input_ids"]) - 5)
    expected = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert made["quality"]["q4_k_m"]["kl"] == pytest.approx(expected, rel=1e-3)
    share = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert made["quality"]["q4_k_m"]["same_top"] == pytest.approx(share)


@built
def test_predictions_are_kept_only_for_as_many_tokens_as_there_is_room(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "PREDICTIONS_BYTES", 4 * 2048 * 7)
    quality = make(["q8_0"])["quality"]["q8_0"]
    assert quality["compared_tokens"] == 7
    assert quality["tokens"] > 7


@built
def test_the_importance_matrix_is_the_sum_of_squares_of_what_the_layers_get(
    make: Make, tmp_path: Path, base: Any, tokenizer: ChatTokenizer
) -> None:
    text = tokenizer.template.render(SAID[0]["messages"], []) * 12
    tokens = tokenizer.ids_of(text)
    made = make(["iq2_s", "q8_0"], tokens=tokens)
    assert made["imatrix"]["tokens"] == len(tokens)
    assert made["imatrix"]["tensors"] == 28  # seven in each of four layers
    assert (tmp_path / "gguf/tiny-IQ2_S.gguf").is_file()

    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def seen(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            squares = args[0].reshape(-1, args[0].shape[-1]).double().pow(2).sum(dim=0)
            sums[name] = sums.get(name, 0) + squares

        return seen

    names = {"self_attn.o_proj": "attn_output", "self_attn.q_proj": "attn_q",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    handles = [
        base.get_submodule(f"model.layers.{layer}.{ours}").register_forward_pre_hook(
            hook(f"blk.{layer}.{theirs}.weight")
        )
        for layer in (0, 3)
        for ours, theirs in names.items()
    ]
    with torch.no_grad():
        for start in range(0, len(tokens), making.CHUNK_TOKENS):
            base(input_ids=torch.tensor([tokens[start : start + making.CHUNK_TOKENS]]))
    for handle in handles:
        handle.remove()

    import gguf

    reader = gguf.GGUFReader(tmp_path / "gguf" / imatrix_name("tiny"))
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, expected in sums.items():
        assert found[f"{name}.counts"].item() == len(tokens)
        ours = found[f"{name}.in_sum2"].reshape(-1)
        # libllama's activations are rounded in places where torch's float32 is not.
        assert np.corrcoef(ours, expected)[0, 1] > 0.999
        assert ours.sum() == pytest.approx(float(expected.sum()), rel=0.02)


@built
@pytest.mark.parametrize("kind", ["iq2_s", "q2_k_s", "iq4_xs", "iq3_m"])
def test_libllama_refuses_without_a_matrix_what_the_spec_does(
    kind: str, make: Make, tmp_path: Path
) -> None:
    if kind in NEED_IMATRIX:
        with pytest.raises(VerificationError, match=f"could not quantize to {kind}"):
            make([kind])
    else:
        assert make([kind])["sizes"][kind] > 2**20


def test_the_spec_refuses_types_that_need_a_matrix_without_one() -> None:
    with pytest.raises(ValidationError, match="iq2_m cannot be made without an importance matrix"):
        Export(gguf=["q8_0", "iq2_m"])
    assert Export(gguf=["iq2_m"], imatrix=True).gguf == ["iq2_m"]


def test_every_type_of_the_spec_can_be_made() -> None:
    kinds = set(get_args(GgufType))
    assert kinds == set(client.FILE_TYPES)
    from jobs.preflight import GGUF_BITS

    assert kinds == set(GGUF_BITS)


@pytest.mark.parametrize(
    "lora", [{"dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_that_is_more_than_two_matrices_is_refused_as_gguf(
    lora: dict[str, Any],
) -> None:
    spec = {
        "name": "a",
        "model": {"base": "b", "load_in": "16bit"},
        "data": {"train": "c"},
        "lora": lora,
        "export": {"adapter_gguf": True},
    }
    with pytest.raises(ValidationError, match="hold the two low-rank matrices"):
        Spec.model_validate(spec)


@built
def test_tensors_that_cannot_have_the_type_are_counted(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(BASE, narrow, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=2048, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=256),
        dtype=torch.bfloat16,
    ).save_pretrained(narrow)  # fmt: skip
    made = make(["q4_k_m", "q8_0"], narrow)
    assert made["fallen"].keys() == {"q4_k_m"}
    # Rows of 96 weights, all but ffn_down's of 256: six in a layer, the embedding and the head.
    fallen = made["fallen"]["q4_k_m"]["tensors"]
    assert len(fallen) == 2 * 6 + 2
    assert not any("ffn_down" in name for name in fallen)
    assert (
        "q4_k_m: 14 of 21 tensors have rows that are no multiple of 256" in capsys.readouterr().out
    )


@built
def test_a_large_file_is_split_and_loads_from_its_first_part(
    make: Make, tmp_path: Path, tokenizer: ChatTokenizer, rows: list[dict[str, list[int]]]
) -> None:
    assert TOOLS is not None
    made = make(["q8_0"], max_bytes=2**20)
    parts = files_of(tmp_path / "gguf", "tiny", "q8_0")
    assert [part.name for part in parts] == [
        f"tiny-Q8_0-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)
    ]
    assert len(parts) >= 4
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {part.name for part in parts}
    check = GgufCheck(TOOLS, tmp_path / "log", 1, tokenizer, BASE, SAID, [], 8)
    found = check.look(parts, rows)
    assert found.failures == []
    assert found.loss == pytest.approx(made["quality"]["q8_0"]["loss"], abs=1e-5)
    assert found.facts["size"] >= made["sizes"]["q8_0"]


@built
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_alone_does_what_it_does_in_the_merged_model(
    rslora: bool, make: Make, tmp_path: Path, base: Any, rows: list[dict[str, list[int]]]
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", use_rslora=rslora)
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tuned.save_pretrained(adapter)
    shutil.copytree(BASE, merged)
    merge(BASE, adapter, [], merged, Observer("json"))
    losses = loss_of(base, rows[0]), loss_of(tuned.eval(), rows[0])
    assert abs(losses[1] - losses[0]) > 0.2

    made = make(["q8_0"], merged, adapter=adapter)
    file = tmp_path / "gguf/tiny-F16-LoRA.gguf"
    assert made["adapter"] == {
        "size": file.stat().st_size, "tensors": 56, "loss_without": made["adapter"]["loss_without"],
    }  # fmt: skip
    assert adapter_failures(made["adapter"], file, *losses, 56) == []

    if rslora:  # taken for a plain one, it is scaled wrongly, and that is found
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": False}))
        wrong = make(["q8_0"], merged, adapter=adapter)["adapter"]
        assert any("should leave the base" in t for t in adapter_failures(wrong, file, *losses, 56))
    assert "57" in adapter_failures(made["adapter"], file, *losses, 57)[0]


@built
def test_a_file_that_libllama_cannot_load_is_a_failed_check(
    make: Make, tmp_path: Path, tokenizer: ChatTokenizer, rows: list[dict[str, list[int]]]
) -> None:
    assert TOOLS is not None
    make(["q8_0"])
    file = tmp_path / "gguf/tiny-Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-200_000])
    check = GgufCheck(TOOLS, tmp_path / "log", 1, tokenizer, BASE, SAID, [], 8)
    found = check.look([file], rows)
    assert found.loss is not None
    assert math.isnan(found.loss)
    assert "it cannot be used" in found.failures[0]


MADE: dict[str, Any] = {
    "conversion": "bf16",
    "sizes": {"q4_k_m": 5 * 2**20},
    "reference": {"perplexity": 2.0, "tokens": 100},
    "quality": {
        "q4_k_m": {
            "kl": 0.08, "perplexity": 2.2, "same_top": 0.9, "bits_per_weight": 4.9,
            "prompt_tokens_per_second": 100.0,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "messages"),
    [
        ({}, []),
        ({"max_kl": 0.1, "max_perplexity_increase": 0.11}, []),
        ({"max_kl": 0.05}, ["KL 0.08 nats per token, verify.max_kl is 0.05"]),
        ({"max_perplexity_increase": 0.05}, ["2.2, 10.0% above the 2 of the bf16 GGUF"]),
    ],
    ids=["none", "kept", "kl", "perplexity"],
)
def test_limits_on_what_quantizing_may_cost(limits: dict[str, float], messages: list[str]) -> None:
    failures = lossy_failures(Verify(**limits), "q4_k_m", MADE)  # type: ignore[arg-type]
    assert len(failures) == len(messages)
    assert all(message in found for message, found in zip(messages, failures, strict=True))


def test_predictions_that_are_no_numbers_keep_no_limit() -> None:
    broken = {**MADE, "quality": {"q4_k_m": {**MADE["quality"]["q4_k_m"], "kl": math.nan}}}
    assert len(lossy_failures(Verify(max_kl=10.0), "q4_k_m", broken)) == 1


def test_the_table_has_a_row_for_each_type() -> None:
    from io import StringIO

    from rich.console import Console

    table = types_table({"gguf": comparison(MADE, {})})
    assert table is not None
    console = Console(file=StringIO(), width=140)
    console.print(table)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    for figure in ("q4_k_m", "5.0", "4.90", "2.2", "+10.00%", "0.08000", "90.0%", "bf16"):
        assert figure in text
    assert types_table({"gguf": comparison({"quality": {}}, {})}) is None
