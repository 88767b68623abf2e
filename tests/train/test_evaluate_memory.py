"""What an evaluation takes of memory does not grow with the vocabulary times the batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from jobs.train.loss import BYTES, ROWS, rows_at_once
from tests.conftest import ROOT

VOCABULARY, ROW, COUNT = 131_072, 2048, 2
WHOLE = (
    4 * VOCABULARY * ROW * COUNT
)  # bytes of all logits in float32: 2 GiB, and the loss takes as many again

CHILD = f"""
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from jobs.train.batches import PadBatch
from jobs.train.loss import evaluate
config = LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
ids = torch.randint(0, {VOCABULARY}, ({COUNT}, {ROW})).tolist()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
batch = PadBatch(0)([{{"input_ids": row, "labels": row}} for row in ids])
loss, tokens = evaluate(model, [batch], torch.device("cpu"))
print(tokens, peak() - before)
"""


def test_logits_are_held_some_at_a_time_whatever_the_vocabulary() -> None:
    class Model:
        config = LlamaConfig(vocab_size=2048)

    assert rows_at_once(Model()) == ROWS
    Model.config = LlamaConfig(vocab_size=262_144)
    assert rows_at_once(Model()) == BYTES // 4 // 262_144 == 512


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_the_peak_of_an_evaluation_is_far_below_its_logits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    tokens, took = map(int, done.stdout.split())
    assert tokens == COUNT * (ROW - 1)
    assert took < 3 * BYTES < WHOLE
