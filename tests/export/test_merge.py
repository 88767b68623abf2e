"""Merging as a stream: from quantized bases, to 4 bit, over shards, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jobs.base_model import weight_files
from jobs.errors import VerificationError
from jobs.export.held import STATE, Nf4, through_int8, through_nf4
from jobs.export.layout import layout_of
from jobs.export.merge import merge
from jobs.export.safetensors_stream import DTYPES, Reader, Writer
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.train.engine_transformers import LoadIn, add_lora, load_model, quantized_modules
from tests.conftest import BASE, ROOT
from tests.export.test_merge_options import (
    OPTIONS,
    gpt2,
    llama,
    load,
    saved_adapter,
    saved_base,
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights on every linear layer of the demo's base."""
    return saved_adapter(BASE, tmp_path_factory.mktemp("adapter"))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in weight_files(folder) for name, t in load_file(path).items()}


def as_held(base: Path, load_in: LoadIn, folder: Path) -> Path:
    """The base as bitsandbytes holds it, in float32: what an adapter is trained against."""
    held, plain = load_model(base, load_in, "cpu"), load(base)
    for name, module in held.named_modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            weight = dequantize_module_weight(module).data.float()
            target = plain.get_submodule(name).weight
            turned = module.source_cls.__name__ == "Conv1D"
            target.data = (weight.T if turned else weight).contiguous()
    plain.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
@pytest.mark.parametrize("option", ["plain", "dora", "bias all", "conv1d", "conv1d, dora"])
def test_a_quantized_base_is_what_the_adapter_was_trained_on(
    option: str, load_in: LoadIn, tmp_path: Path
) -> None:
    make, options = OPTIONS[option]
    base = saved_base(make, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", **options)
    held = load(as_held(base, load_in, tmp_path / "held"))
    theirs = PeftModel.from_pretrained(held, str(adapter)).merge_and_unload().state_dict()
    (out := tmp_path / "out").mkdir()
    merge(base, adapter, None, out, Observer("json"), load_in=load_in, dtype=torch.float32)
    for name, tensor in all_tensors(out).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


def test_loftqs_start_is_merged_into_the_weights_that_it_makes_up_for(tmp_path: Path) -> None:
    spec = Spec.model_validate(
        {"name": "t", "model": {"base": str(BASE)}, "data": {"train": "x.jsonl"},
         "lora": {"rank": 8, "alpha": 20, "loftq": True}}
    )  # fmt: skip
    model = add_lora(load_model(BASE, "4bit", "cpu"), spec, BASE)
    model.save_pretrained(tmp_path / "adapter")
    original = all_tensors(BASE)
    off = {}
    for way, quantized in (("dequantized", None), ("original", [])):
        (out := tmp_path / way).mkdir()
        merge(BASE, tmp_path / "adapter", quantized, out, Observer("json"), dtype=torch.float32)
        merged = all_tensors(out)
        off[way] = [(merged[n] - original[n].float()).norm().item() for n in sorted(merged)]
    for name, dequantized, into_original in zip(sorted(original), *off.values(), strict=True):
        if "_proj" in name:  # nearer to the base than 4 bit is; and away from it
            lost = (through_nf4(original[name]) - original[name].float()).norm().item()
            assert dequantized < 0.99 * lost, name
            assert into_original > 0.1 * lost, name


def test_4_bit_merge_of_the_demo_is_the_same_to_the_bit(adapter: Path, tmp_path: Path) -> None:
    quantized = load_model(BASE, "4bit", "cpu")
    names = quantized_modules(quantized)
    assert sorted(layout_of(BASE).linear) == names
    merge(BASE, adapter, names, tmp_path, Observer("json"))
    ours = all_tensors(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in names:
        weight = quantized.get_submodule(name).weight
        held = dequantize_4bit(weight.data, weight.quant_state).float()
        a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = (held + (b @ a) * (20 / 8)).to(torch.bfloat16)
        assert torch.equal(ours[f"{name}.weight"], expected), name


def test_what_has_no_adapter_and_no_4_bit_stays_as_it_was(adapter: Path, tmp_path: Path) -> None:
    merge(BASE, adapter, [], tmp_path, Observer("json"))
    ours, base = all_tensors(tmp_path), all_tensors(BASE)
    untouched = {name for name in base if "_proj" not in name}
    assert "model.embed_tokens.weight" in untouched
    assert all(torch.equal(ours[name], base[name]) for name in untouched)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_4_bit_results_are_what_loading_the_16_bit_ones_in_4_bit_gives(
    make: Any, tmp_path: Path
) -> None:
    base = saved_base(make, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter")
    (whole := tmp_path / "16").mkdir()
    (packed := tmp_path / "4").mkdir()
    merge(base, adapter, [], whole, Observer("json"))
    merge(base, adapter, [], packed, Observer("json"), form="4bit")
    theirs = load_model(whole, "4bit", "cpu")
    ours = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert quantized_modules(ours) == quantized_modules(theirs) != []
    assert ours.config.quantization_config.bnb_4bit_quant_type == "nf4"
    expected = theirs.state_dict()
    assert set(expected) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        if name.endswith(STATE):
            states = [json.loads(bytes(t.tolist())) for t in (tensor, expected[name])]
            assert states[0] | {"dtype": ""} == states[1] | {"dtype": ""}
        else:
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(256, 768), (7, 65), (3, 21), (1, 64 * 1000 + 32)])
def test_nf4_in_pieces_is_bitsandbytes_own(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, :64] = 0  # a block whose scale is nought
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    flat, held, step = weight.reshape(-1), Nf4(shape, "cpu"), 64 * 50
    for start in range(0, len(flat), step):
        held.put(start, flat[start : start + step])
    held.settle()
    pieces = [held.take(at, min(len(flat), at + step)) for at in range(0, len(flat), step)]
    assert torch.equal(torch.cat(pieces), dequantize_4bit(packed, state).reshape(-1))
    assert torch.equal(held.tensors(torch.float32)[""], packed)


def test_int8_by_rows_is_bitsandbytes_own() -> None:
    layer = load_model(BASE, "8bit", "cpu").get_submodule("model.layers.0.mlp.down_proj")
    weight = all_tensors(BASE)["model.layers.0.mlp.down_proj.weight"]
    rows = torch.cat([through_int8(weight[:100]), through_int8(weight[100:])])
    assert torch.equal(rows, dequantize_module_weight(layer).float())


@pytest.mark.parametrize("form", ["16bit", "4bit"])
def test_sharded_bases_are_merged_shard_by_shard(form: Any, adapter: Path, tmp_path: Path) -> None:
    base, out, whole = tmp_path / "base", tmp_path / "out", tmp_path / "whole"
    for folder in (base, out, whole):
        folder.mkdir()
    tensors = load_file(BASE / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, base / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: s for s, own in shards.items() for n in own}}  # fmt: skip
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_bytes((BASE / "config.json").read_bytes())
    merge(base, adapter, None, out, Observer("json"), form)
    merge(BASE, adapter, None, whole, Observer("json"), form)
    assert [path.name for path in weight_files(out)] == sorted(shards)
    one, many = all_tensors(whole), all_tensors(out)
    assert set(one) == set(many)
    assert all(torch.equal(many[name], one[name]) for name in one)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in many.values())}
    assert index["weight_map"] == {
        name: path.name for path in weight_files(out) for name in load_file(path)
    }
    assert not (whole / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("held", "made"),
    [("float16", "float16"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_float16_stays_and_all_else_becomes_bfloat16(held: str, made: str, tmp_path: Path) -> None:
    base = saved_base(llama, tmp_path / "base")
    dtype = getattr(torch, held)
    tensors = {name: t.to(dtype) for name, t in all_tensors(base).items()}
    save_file({**tensors, "model.steps": torch.tensor([7])}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": held}))
    adapter = saved_adapter(base, tmp_path / "adapter")
    (out := tmp_path / "out").mkdir()
    assert merge(base, adapter, [], out, Observer("json"))["dtype"] == made
    merged = all_tensors(out)
    assert torch.equal(merged.pop("model.steps"), torch.tensor([7]))  # no number of the model's
    assert {t.dtype for t in merged.values()} == {getattr(torch, made)}
    assert json.loads((out / "config.json").read_text())["dtype"] == made


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """GPT-2's own checkpoints have `h.0...` where the model has `transformer.h.0...`."""
    base = saved_base(gpt2, tmp_path / "base")
    adapter = saved_adapter(base, tmp_path / "adapter", use_dora=True)
    short = tmp_path / "short"
    shutil.copytree(base, short)
    save_file({n.removeprefix("transformer."): t for n, t in all_tensors(base).items()}, short / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    for folder, out in ((base, tmp_path / "one"), (short, tmp_path / "other")):
        out.mkdir()
        merge(folder, adapter, None, out, Observer("json"))
    one, other = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "other")
    assert len(one) == len(other)
    assert all(torch.equal(one[f"transformer.{name}"], t) for name, t in other.items())


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    foreign = {name.replace("layers.0.", "layers.40."): t for name, t in weights.items()}
    other = tmp_path / "adapter"
    other.mkdir()
    save_file(foreign, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(VerificationError, match=r"layers\.40"):
        merge(BASE, other, [], tmp_path, Observer("json"))


@pytest.mark.parametrize(
    ("export", "loftq", "message"),
    [
        ({"merge_base": "original"}, True, "set export.merge_base to auto"),
        ({"merged": "4bit"}, True, r"with lora\.loftq.*rounds small updates away"),
        ({"merged": "4bit", "merge_base": "dequantized"}, False, "rounds small updates away"),
        ({"merged": "4bit", "gguf": ["q8_0"]}, False, "set merged to 16bit"),
        ({"merged": None, "gguf": ["q8_0"]}, False, "set merged to 16bit"),
    ],
)
def test_what_cannot_go_together_is_the_specs_mistake(
    export: dict[str, Any], loftq: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spec_with(export, loftq)


def spec_with(export: dict[str, Any], loftq: bool = False, load_in: str = "4bit") -> Spec:
    return Spec.model_validate(
        {"name": "t", "model": {"base": "x", "load_in": load_in}, "data": {"train": "x.jsonl"},
         "lora": {"loftq": loftq}, "export": export}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("export", "loftq", "load_in", "dequantized"),
    [
        ({}, False, "4bit", True),
        ({}, False, "8bit", True),
        ({}, False, "16bit", False),
        ({"merge_base": "original"}, False, "4bit", False),
        ({"merged": "4bit"}, False, "4bit", False),
        ({"merged": "4bit", "merge_base": "dequantized"}, False, "8bit", True),
        ({}, True, "4bit", True),
    ],
)
def test_which_base_is_merged_into(
    export: dict[str, Any], loftq: bool, load_in: str, dequantized: bool
) -> None:
    spec = spec_with(export, loftq, load_in)
    assert spec.export.into_dequantized(spec.model.load_in, spec.lora.loftq) is dequantized


def test_a_streamed_file_is_the_librarys_to_the_byte(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(12 + i).to(d) for i, d in enumerate(DTYPES.values())}
    tensors |= {"none": torch.zeros(0, 3), "ümlaut": torch.ones(2, 3, 4), "one": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with Writer(tmp_path / "ours", shapes) as writer:
        for name, tensor in reversed(tensors.items()):
            half = tensor.numel() // 2
            writer.write(name, tensor.reshape(-1)[half:], half)
            writer.write(name, tensor.reshape(-1)[:half])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with Reader(tmp_path / "theirs") as reader:
        for name, tensor in tensors.items():
            assert reader.tensor(name).shape == tensor.shape
            flat = tensor.reshape(-1)
            assert torch.equal(reader.read(name).view(torch.uint8), flat.view(torch.uint8))
            if len(flat) > 7:
                piece = reader.read(name, 3, 7)
                assert torch.equal(piece.view(torch.uint8), flat[3:7].view(torch.uint8))


def test_a_streamed_file_that_lacks_something_is_an_error(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "file", {"a": (torch.float32, (4,)), "b": (torch.uint8, (3,))})
    writer.write("a", torch.zeros(4))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        writer.write("b", torch.zeros(3))
    with pytest.raises(ValueError, match="3 of 19 bytes were not written"):
        writer.close()


BIG = """
import sys
from pathlib import Path
from bench.export import SHAPES, make_base, merge_ours, peak_memory
SHAPES["test"] = {**SHAPES["1B"], "num_hidden_layers": 1, "vocab_size": 64000}
folder = Path(sys.argv[1])
if sys.argv[2] == "make":
    make_base("test", folder)
else:
    from jobs.export.layout import layout_of
    layout_of(folder / "base")  # with the libraries that it takes
    (folder / "out").mkdir()
    before = peak_memory()
    merge_ours(folder, folder / "out", True, sys.argv[2])
    print(peak_memory() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 650 MB: an embedding and a head of 262 MB each, and one layer."""
    folder = tmp_path_factory.mktemp("big") / "model"
    subprocess.run([sys.executable, "-c", BIG, str(folder), "make"], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["16bit", "4bit"])
def test_memory_does_not_grow_with_the_model(form: str, big: Path) -> None:
    size = sum(path.stat().st_size for path in (big / "base").glob("*.safetensors"))
    shutil.rmtree(big / "out", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(big), form], cwd=ROOT, check=True, capture_output=True
    )
    grown = int(done.stdout.split()[-1])
    assert size > 600e6
    assert grown < 220e6, f"{grown / 1e6:.0f} MB"


KILLED = """
import sys
from pathlib import Path
from bench.export import merge_ours
from jobs.observe.events import Observer
from jobs.stages import Stages
folder = Path(sys.argv[1])
def work(out):
    print("begun", flush=True)
    merge_ours(folder, out, True, "16bit")
    return {}
Stages(folder / "run", Observer("json")).run("merge", {}, work, "merged")
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_is_taken_for_whole(big: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(big)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    building = big / "run" / ".building-merge"
    deadline = time.monotonic() + 60
    while not list(building.glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(building.glob("*.safetensors"))  # it was in the middle of it
    assert not (big / "run" / "merged").exists()
    assert not list((big / "run" / ".work" / "stages").glob("*.json"))
