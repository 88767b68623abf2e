"""What the preflight counts is what lies on the disk afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from jobs.base_model import INDEX, BaseModel, open_base
from jobs.errors import SpecError
from jobs.export.merge import merge
from jobs.observe.events import Observer
from jobs.preflight import result_bytes, run_bytes
from jobs.spec import Spec
from jobs.store.connect import Connections
from jobs.store.retry import Retries
from jobs.train.best import weights_of
from jobs.train.memory import checkpoint_bytes
from jobs.train.modules import require_modules_of_weights
from jobs.train.shape import read_shape
from tests.conftest import BASE, lorajob


@pytest.fixture
def base() -> BaseModel:
    return open_base(str(BASE), Connections(spec().s3, Retries()))


def spec(**sections: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "a",
            "model": {"base": str(BASE), "load_in": "16bit"},
            "data": {"train": "x.jsonl", "eval": 0.1},
            **sections,
        }
    )


def tuned() -> Any:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))


@pytest.mark.parametrize("form", ["16bit", "4bit"])
def test_the_merged_model_takes_what_is_counted_for_it(
    form: Any, base: BaseModel, tmp_path: Path
) -> None:
    tuned().save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(BASE, tmp_path / "adapter", [], tmp_path / "merged", Observer("json"), form)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    counted = result_bytes(spec(export={"merged": form}), base)
    # What describes a tensor, above all in 4 bit, is up to 2 KB: nothing in models of a real size.
    assert counted * 0.999 <= size <= counted + 38 * 2000


def test_a_model_in_4_bit_needs_less_disk_and_none_the_least(base: BaseModel) -> None:
    needed = [run_bytes(spec(export={"merged": form}), base) for form in ("16bit", "4bit", None)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] - needed[2] == pytest.approx(base.weight_bytes(), abs=1)


def test_the_conversion_is_counted_until_its_types_are_larger(base: BaseModel) -> None:
    def needed(kinds: list[str], punches: bool = True) -> int:
        return run_bytes(spec(export={"gguf": kinds}), base, punches)

    weights, embedding = base.weight_bytes(), 2 * 2048 * 256
    assert needed(["q4_k_m"], False) - needed(["q4_k_m"]) == pytest.approx(
        5.0 / 16 * weights - 6.6 / 16 * embedding, abs=2
    )
    three = ["q8_0", "q5_k_m", "q4_k_m"]  # more than the conversion, together
    assert needed(three, False) - needed(three) == pytest.approx(
        weights - (8.5 + 6.6 + 6.6) / 16 * embedding, abs=2
    )
    # Where it is asked for it is one of the results.
    assert needed([*three, "bf16"]) == needed([*three, "bf16"], False)


def test_weights_whose_shape_is_not_known_count_whole(base: BaseModel) -> None:
    unknown = BaseModel(base.source, base.folder, {**base.config, "num_local_experts": 8})
    in_4_bit = spec(export={"merged": "4bit"})
    assert result_bytes(in_4_bit, unknown) == base.weight_bytes()
    other = BaseModel(base.source, base.folder, {**base.config, "num_hidden_layers": 1})
    assert result_bytes(in_4_bit, other) == base.weight_bytes()


def test_the_best_weights_in_each_checkpoint_are_counted(base: BaseModel, tmp_path: Path) -> None:
    save_file(weights_of(tuned()), tmp_path / "best.safetensors")
    size = (tmp_path / "best.safetensors").stat().st_size
    plain, keeping = spec(), spec(train={"keep_best": True, "eval_every": 1})
    stopping = spec(train={"early_stopping": {}, "eval_every": 1})
    shape = read_shape(base.config)
    assert shape is not None
    more = checkpoint_bytes(shape, keeping) - checkpoint_bytes(shape, plain)
    assert more == pytest.approx(size, rel=0.02)  # without the file's header
    assert checkpoint_bytes(shape, stopping) == checkpoint_bytes(shape, keeping)
    number = plain.checkpoints.keep + 2
    assert run_bytes(keeping, base) - run_bytes(plain, base) == pytest.approx(number * more, abs=2)


PROJECTIONS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (
            {"target": ["q_prj"]},
            ["lora.target", "no module q_prj", "did you mean q_proj", PROJECTIONS],
        ),
        ({"target": ["q_proj", "self_attn"]}, ["lora.target", "no module self_attn", PROJECTIONS]),
        ({"target": ["proj"]}, ["lora.target", "no module proj"]),
        (
            {"target": ["q_proj", "input_layernorm"]},
            ["lora.target", "input_layernorm has no matrix", "lora.modules_to_save", PROJECTIONS],
        ),
        ({"target": ["lm_head"]}, ["lora.target", "the output head", "lora.modules_to_save"]),
        (
            {"modules_to_save": ["embed_token"]},
            ["lora.modules_to_save", "did you mean embed_tokens"],
        ),
    ],
)
def test_a_module_that_the_base_lacks_is_named_with_those_it_has(
    base: BaseModel, lora: Any, words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        require_modules_of_weights(spec(lora=lora).lora, base)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target": ["q_proj", "down_proj"]},
        {"target": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]},
        {"modules_to_save": ["lm_head", "mlp", "model.norm"]},
    ],
)
def test_modules_that_the_base_has_pass(base: BaseModel, lora: Any) -> None:
    require_modules_of_weights(spec(lora=lora).lora, base)


def test_modules_are_known_from_an_index_where_the_weights_are_elsewhere(
    base: BaseModel, tmp_path: Path
) -> None:
    shutil.copyfile(BASE / "config.json", tmp_path / "config.json")
    elsewhere = BaseModel(base.source, tmp_path, base.config)
    wrong, right = spec(lora={"target": ["q_prj"]}).lora, spec(lora={"target": ["q_proj"]}).lora
    require_modules_of_weights(wrong, elsewhere)  # nothing is known of it yet
    with (BASE / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    mapped = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(mapped))
    require_modules_of_weights(right, elsewhere)
    with pytest.raises(SpecError, match="no module q_prj") as caught:
        require_modules_of_weights(wrong, elsewhere)
    assert PROJECTIONS in str(caught.value)
    # Experts' weights have other names than their modules.
    experts = BaseModel(base.source, tmp_path, {**base.config, "num_local_experts": 8})
    require_modules_of_weights(wrong, experts)


def test_check_refuses_a_target_that_is_not_there(tmp_path: Path) -> None:
    result = lorajob(
        "check", "examples/demo.yaml", "--work", str(tmp_path), LORAJOB__LORA__TARGET="[q_prj]",
        LORAJOB__EXPORT__GGUF="[]",
    )  # fmt: skip
    assert result.code == 2
    assert "lora.target" in result.err
    assert "did you mean q_proj?" in result.err
