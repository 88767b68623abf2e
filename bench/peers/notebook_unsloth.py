"""unsloth's notebook for chats with Llama 3: 2 rows at a time, 4 times, only answers trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # first
from unsloth.chat_templates import (  # isort: skip
    train_on_responses_only,
)
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

from bench.peers import common

LENGTH = 2048


def with_lora(base: Path) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(base), max_seq_length=LENGTH, dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )  # fmt: skip
    return model, tokenizer


def trainer(base: Path, texts: list[str], out: Path, steps: int, batch_size: int = 2) -> Any:
    model, tokenizer = with_lora(base)
    made = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
        args=SFTConfig(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4,
            max_length=LENGTH,
            dataset_num_proc=2,
            packing=False,
            **common(out, steps),
        ),
    )
    return train_on_responses_only(
        made,
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
