"""What the preflight counts is what lies on the disk afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from jobs.base_model import BaseModel, open_base
from jobs.export.merge import merge
from jobs.observe.events import Observer
from jobs.preflight import result_bytes, run_bytes
from jobs.spec import Spec
from jobs.store.connect import Connections
from jobs.store.retry import Retries
from jobs.train.best import weights_of
from jobs.train.memory import checkpoint_bytes
from jobs.train.shape import read_shape
from tests.conftest import BASE


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
