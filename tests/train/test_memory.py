"""The reckoning against what was measured, how it grows, and what `check` proposes where it does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from bench.shapes import SHAPES
from jobs.base_model import BaseModel
from jobs.errors import DoesNotFitError
from jobs.preflight import run_bytes
from jobs.spec import GpuName, Spec
from jobs.train import cards
from jobs.train.cards import CARDS, Card, find_card, known
from jobs.train.engines import Name
from jobs.train.fit import ENOUGH, MARGIN, Plan
from jobs.train.memory import GIB, is_rough, reckon
from jobs.train.room import Room, does_not_fit, smallest_card, ways
from jobs.train.shape import Shape, describes, read_shape


def spec_of(**sections: dict[str, Any]) -> Spec:
    tree: dict[str, Any] = {"name": "t", "model": {"base": "b"}, "data": {"train": "d"}}
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return Spec.model_validate(tree)


def shape_of(name: str) -> Shape:
    shape = read_shape(SHAPES[name])
    assert shape is not None
    return shape


LLAMA_8B = shape_of("llama-3.1-8b")


# bench/results/memory.json: GiB that torch's allocator held at most on an H200, in 4 bit and with LoRA
# of rank 16 on all linear modules: rows of a part and their length, with activations kept, and made
# again.
MEASURED = {
    "llama-3.2-1b": [
        (1, 512, 2.02, 1.54), (1, 2048, 3.51, 1.58), (1, 8192, 9.53, 2.02), (8, 2048, 16.42, 2.72),
    ],
    "llama-3.2-3b": [
        (1, 512, 4.01, 2.9), (1, 2048, 7.27, 2.99), (1, 8192, 20.38, 3.6), (8, 2048, 34.98, 4.47),
    ],
    "llama-3.1-8b": [
        (1, 512, 8.34, 6.47), (1, 2048, 13.86, 6.58), (1, 8192, 36.02, 7.61), (8, 2048, 61.19, 8.92),
    ],
    "qwen2.5-1.5b": [
        (1, 512, 2.56, 1.79), (1, 2048, 4.94, 1.8), (1, 8192, 14.42, 2.15), (8, 2048, 25.65, 2.8),
    ],
}  # fmt: skip

CLOSE = (-0.02, 0.02)  # how far off
# Of what is made again so little stays with small shapes that a buffer more or less counts.
AGAIN = {
    "llama-3.2-1b": (-0.02, 0.03),
    "llama-3.2-3b": (-0.02, 0.03),
    "qwen2.5-1.5b": (-0.025, 0.02),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_reckoned_is_what_was_measured(name: str) -> None:
    for rows, length, *measured in MEASURED[name]:
        for checkpointing, taken in zip((False, True), measured, strict=True):
            plan = Plan(rows * length, checkpointing)
            said = reckon(shape_of(name), spec_of(), plan, length, "unsloth", 139.7 * GIB)
            off = said.allocated / GIB / taken - 1
            least, most = AGAIN.get(name, CLOSE) if checkpointing else CLOSE
            assert least < off < most, (plan, off)


def test_weights_are_those_of_the_tensors() -> None:
    """Counted by hand for Llama-3.2-1B: its card says 1.24 billion."""
    assert shape_of("llama-3.2-1b").weights == pytest.approx(1.2358e9, rel=1e-3)
    assert LLAMA_8B.weights == pytest.approx(8.0303e9, rel=1e-3)
    half = reckon(LLAMA_8B, spec_of(model={"load_in": "16bit"}), Plan(512), 512, "transformers")
    assert half.weights == 2 * LLAMA_8B.weights
    eight = reckon(LLAMA_8B, spec_of(model={"load_in": "8bit"}), Plan(512), 512, "transformers")
    four = reckon(LLAMA_8B, spec_of(), Plan(512), 512, "transformers")
    assert four.weights < eight.weights < half.weights
    assert eight.weights == LLAMA_8B.linear_weights + 2 * LLAMA_8B.outer_weights


def test_lora_and_optimizer() -> None:
    said = reckon(LLAMA_8B, spec_of(), Plan(512), 512)
    trained = 41_943_040  # what peft prints for rank 16 on all linear modules of Llama-3.1-8B
    assert said.lora == 4 * trained
    assert said.optimizer == 12 * trained
    small = reckon(LLAMA_8B, spec_of(train={"optimizer": "adamw_8bit"}), Plan(512), 512)
    assert small.lora == said.lora
    assert 6 * trained < small.optimizer < 6.1 * trained
    paged = reckon(LLAMA_8B, spec_of(train={"optimizer": "paged_adamw"}), Plan(512), 512)
    assert paged.optimizer == 4 * trained  # the gradients
    attention = reckon(LLAMA_8B, spec_of(lora={"target": ["q_proj", "v_proj"]}), Plan(512), 512)
    assert attention.lora == 4 * 32 * 16 * (4096 + 4096 + 4096 + 1024)


def test_whole_modules_that_are_trained_are_counted() -> None:
    without = reckon(LLAMA_8B, spec_of(), Plan(512), 512)
    head = spec_of(lora={"modules_to_save": ["lm_head"]})
    with_head = reckon(LLAMA_8B, head, Plan(512), 512)
    assert with_head.lora - without.lora == 4 * 128_256 * 4096
    assert with_head.optimizer - without.optimizer == 12 * 128_256 * 4096


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
def test_more_tokens_take_more_and_checkpointing_takes_less(name: str, engine: Name) -> None:
    shape, spec = shape_of(name), spec_of()
    sizes = (1024, 2048, 4096, 8192, 16_384)
    for checkpointing in (False, True):
        taken = [
            reckon(shape, spec, Plan(tokens, checkpointing), 512, engine).allocated
            for tokens in sizes
        ]
        # The loss goes by powers of two of rows, so it may take a little less with more tokens: most
        # with the vocabulary of Gemma.
        least = 0.96 if name.startswith("gemma") else 0.98
        assert all(more > least * less for less, more in pairwise(taken))
    for tokens in sizes:
        kept = reckon(shape, spec, Plan(tokens), 512, engine)
        again = reckon(shape, spec, Plan(tokens, checkpointing=True), 512, engine)
        assert again.allocated < kept.allocated
        assert again.weights == kept.weights


def test_a_row_longer_than_the_plan_goes_through_whole() -> None:
    spec = spec_of()
    assert reckon(LLAMA_8B, spec, Plan(512), 4096) == reckon(LLAMA_8B, spec, Plan(4096), 4096)


def test_where_unsloth_takes_no_whole_layers_more_is_kept_and_said_to_be_rough() -> None:
    plain = reckon(LLAMA_8B, spec_of(), Plan(2048), 512)
    assert not is_rough(LLAMA_8B, spec_of(), "unsloth")
    assert is_rough(shape_of("gemma-2-2b"), spec_of(), "unsloth")
    for options in ({"target": ["q_proj", "v_proj"]}, {"bias": "all"}, {"dora": True}):
        spec = spec_of(lora=options)
        assert reckon(LLAMA_8B, spec, Plan(2048), 512).activations > 1.2 * plain.activations
        assert is_rough(LLAMA_8B, spec, "unsloth"), options


def test_large_matrices_and_short_parts_count_both_forms_of_a_parts_gradients() -> None:
    spec = spec_of(lora={"rank": 512})
    said = reckon(LLAMA_8B, spec, Plan(128), 128)
    trained = 32 * 41_943_040
    in_half = 2 * trained
    assert said.activations + said.workspace > in_half + (2 + 4) * trained


def test_one_conversation_takes_more_than_several_of_its_length() -> None:
    """Its attention is another kernel's, whose output is laid out anew."""
    spec = spec_of()
    one = reckon(LLAMA_8B, spec, Plan(8192), 8192)
    several = reckon(LLAMA_8B, spec, Plan(8192), 2048)
    assert one.activations - several.activations == 32 * 8192 * 2 * 4096


def test_soft_capped_scores_cost_the_square_of_a_conversation_for_a_moment() -> None:
    gemma, spec = shape_of("gemma-2-2b"), spec_of()
    plan = Plan(8192, checkpointing=True)
    short, long = (reckon(gemma, spec, plan, longest) for longest in (512, 8192))
    assert long.activations == short.activations
    # Two heads of queries to one of keys; three tensors in 32 bit and one in 16.
    assert long.workspace - 14 * 2 * 8192**2 < 2**29
    assert short.workspace < long.workspace / 2
    plain = reckon(replace(gemma, softcapped=False), spec, plan, 8192)
    assert plain.workspace < long.workspace / 2


def test_dropout_keeps_its_masks() -> None:
    plain = reckon(LLAMA_8B, spec_of(), Plan(2048), 512)
    masked = reckon(LLAMA_8B, spec_of(lora={"dropout": 0.1}), Plan(2048), 512)
    inputs = 3 * 4096 + 4096 + 2 * 4096 + 14336  # of q, k, v; o; gate, up; down
    # Without dropout LoRA's matrices go together: what is multiplied with A is kept, and 16-bit copies.
    together = 32 * 2048 * 2 * 7 * 16 + 2 * 41_943_040
    assert masked.activations - plain.activations == 32 * 2048 * inputs - together


def test_other_architectures_are_not_reckoned() -> None:
    assert read_shape({"model_type": "mamba", "hidden_size": 768}) is None
    assert read_shape({**SHAPES["llama-3.1-8b"], "num_local_experts": 8}) is None
    assert read_shape({**SHAPES["llama-3.1-8b"], "hidden_size": "wide"}) is None


def test_weights_that_are_of_no_such_layers_are_noticed() -> None:
    size = LLAMA_8B.weights
    assert describes(LLAMA_8B, 2 * size)
    assert describes(LLAMA_8B, 4 * size)  # stored in 32 bit
    assert not describes(LLAMA_8B, 3 * size)
    tied = shape_of("llama-3.2-1b")
    assert describes(tied, 2 * (tied.weights + tied.vocabulary * tied.hidden))


def test_a_multimodal_configuration_names_its_text_model() -> None:
    text = dict(SHAPES["qwen2.5-1.5b"])
    assert read_shape({"model_type": "other", "text_config": text}) == shape_of("qwen2.5-1.5b")


def test_what_configurations_leave_out() -> None:
    llama = {k: v for k, v in SHAPES["llama-3.1-8b"].items() if k != "tie_word_embeddings"}
    llama.pop("head_dim")
    llama.pop("num_key_value_heads")
    shape = read_shape(llama)
    assert shape is not None
    assert (shape.head, shape.kv_heads, shape.tied) == (128, 32, False)
    gemma = {k: v for k, v in SHAPES["gemma-2-2b"].items() if k != "tie_word_embeddings"}
    tied = read_shape(gemma)
    assert tied is not None
    assert tied.tied


# --- cards


def test_every_name_of_the_spec_is_a_card() -> None:
    assert set(CARDS) == set(get_args(GpuName))


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_card_is_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 143771, 4, 9.0'; echo 'Other, 1, 1, 1.0'")
    card = find_card()
    assert card is not None
    assert (card.name, card.here, card.bf16, card.used) == ("NVIDIA H200", True, True, 0)
    assert card.bytes / GIB == pytest.approx(139.7, abs=0.5)
    nvidia_smi(tmp_path, monkeypatch, "echo 'Tesla T4, 15360, 5000, 7.5'")
    card = find_card()
    assert card is not None
    assert not card.bf16
    assert card.free == card.bytes - 5000 * 2**20


@pytest.mark.parametrize("script", ["exit 9", "echo nothing", "echo 'MIG, [N/A], [N/A], 9.0'"])
def test_a_card_that_tells_nothing_is_none(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert find_card() is None


def test_a_driver_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr(cards, "PATIENCE", 0.1)
    assert find_card() is None


# --- what fits


def room(card: str, longest: int = 2048, **sections: dict[str, Any]) -> Room:
    return Room(spec_of(**sections), LLAMA_8B, "unsloth", longest, known(card))  # type: ignore[arg-type]


def test_the_plan_is_the_largest_that_fits() -> None:
    large = room("H200", train={"batch_size": 64})
    assert large.plan == Plan(ENOUGH)
    small = room("RTX-4090", train={"batch_size": 64})
    assert not small.plan.checkpointing
    assert small.takes(small.plan).allocated <= MARGIN * small.free
    more = Plan(small.plan.tokens + 1024, small.plan.checkpointing)
    assert small.takes(more).allocated > 0.93 * small.free
    assert room("T4", train={"batch_size": 64}).plan.checkpointing


def test_the_limit_of_the_spec_is_the_card_there_is() -> None:
    free = room("H100", limits={"gpu_memory_gib": 24.0}).free
    assert 23 * GIB < free < 24 * GIB


CHANGES: list[tuple[str, dict[str, dict[str, Any]], str]] = [
    ("T4", {"model": {"load_in": "16bit"}}, "set model.load_in: 4bit"),
    ("RTX-4090", {"lora": {"rank": 1024}}, "set lora.rank: 8"),
    ("L4", {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}}, "leave out lora.modules_to_save"),
    ("T4", {}, "set model.max_seq_length: "),
]  # fmt: skip


@pytest.mark.parametrize(("card", "sections", "proposed"), CHANGES)
def test_what_is_proposed_fits(
    card: str, sections: dict[str, dict[str, Any]], proposed: str
) -> None:
    longest = 2048 if sections else 60_000
    tight = room(card, longest, **sections)
    assert not tight.fits
    error = does_not_fit(tight)
    assert isinstance(error, DoesNotFitError)
    assert error.exit_code == 5
    assert card in error.message
    assert f"takes about {tight.least.total / GIB:.1f} GiB" in error.message
    assert error.hint is not None
    found = [way for way in ways(tight) if way.startswith(proposed)]
    assert len(found) == 1
    assert found[0] in error.hint
    if proposed.endswith("max_seq_length: "):
        length = int(found[0].removeprefix(proposed))
        assert tight.other(longest=length).fits
        assert not tight.other(longest=length + 256).fits


def test_where_one_change_is_not_enough_all_that_are_needed_are_named() -> None:
    tight = room("T4", 2048, model={"load_in": "16bit"}, lora={"rank": 1024})
    [way, card] = ways(tight)
    assert way == "set model.load_in: 4bit and set train.optimizer: adamw_8bit and set lora.rank: 8"
    assert card.startswith("take a GPU with more memory: ")


def test_the_card_that_is_proposed_is_the_smallest_that_fits() -> None:
    tight = room("T4", 2048, model={"load_in": "16bit"})
    name = smallest_card(tight)
    assert name is not None
    assert tight.other(card=known(name)).fits
    smaller = [other for other in CARDS if CARDS[other][0] < CARDS[name][0]]
    assert smaller
    assert not any(tight.other(card=known(other)).fits for other in smaller)


def test_where_the_card_is_large_enough_and_the_limit_is_not_the_limit_is_named() -> None:
    tight = room("H100", 2048, limits={"gpu_memory_gib": 6.0})
    assert any(way.startswith("allow ") and "limits.gpu_memory_gib" in way for way in ways(tight))
    assert "limits.gpu_memory_gib: 6" in does_not_fit(tight).message


def test_what_others_use_is_not_free() -> None:
    alone = room("H100")
    shared = alone.other(card=Card("H100", alone.card.bytes, used=70 * GIB))
    assert alone.free - shared.free == 70 * GIB
    assert "70.0 GiB in use" in does_not_fit(shared).message


def test_reckoning_needs_no_torch() -> None:
    code = "import sys, jobs.train.room, jobs.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_disk_has_room_for_the_checkpoints_of_a_high_rank(tmp_path: Path) -> None:
    base = BaseModel("b", tmp_path, dict(SHAPES["llama-3.1-8b"]))
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 2 * LLAMA_8B.weights)
    small, large = (run_bytes(spec_of(lora={"rank": rank}), base) for rank in (16, 256))
    trained = 16 * 41_943_040
    assert large >= 2 * LLAMA_8B.weights + 3 * 12 * trained  # merged, and three checkpoints
    assert small < 2.3 * LLAMA_8B.weights
