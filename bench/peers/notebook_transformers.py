"""The QLoRA notebook of transformers, bitsandbytes, peft and TRL: 2 rows at a time, 4 times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from bench.peers import common

LENGTH = 2048


def trainer(base: Path, texts: list[str], out: Path, steps: int, batch_size: int = 2) -> Any:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
    )
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules="all-linear",
        ),
        args=SFTConfig(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4,
            max_length=LENGTH,
            packing=False,
            **common(out, steps),
        ),
    )
