"""The same with unsloth's packing: rows of 2048 tokens, 8 at a time, everything trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.notebook_unsloth import LENGTH, with_lora  # isort: skip  # unsloth comes first
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from bench.peers import common


def trainer(base: Path, texts: list[str], out: Path, steps: int, batch_size: int = 8) -> Any:
    model, tokenizer = with_lora(base)
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            max_length=LENGTH,
            dataset_num_proc=2,
            packing=True,
            **common(out, steps),
        ),
    )
