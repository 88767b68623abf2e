"""What a model's gradients are before its LoRA is taken together and after, in a process of its own.

    python3 -m tests.gpu.fused JSON      {"engine": "unsloth", "bases": {NAME: FOLDER}, "result": FILE}

unsloth changes what it is beside, so the tests themselves never import it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

from tests.train.parity import asked_with_engine

ROWS = (200, 130, 77)  # tokens of each; laid end to end
LOADED = ("4bit", "16bit")


def main() -> None:
    asked = asked_with_engine()
    found = {
        name: {load_in: _compared(Path(base), load_in) for load_in in LOADED}
        for name, base in asked["bases"].items()
    }
    Path(asked["result"]).write_text(json.dumps(found), "utf-8")


def _compared(base: Path, load_in: str) -> dict[str, Any]:
    """The groups that were fused, and of each way the loss and the matrix whose gradient is furthest
    from the one before, with activations kept: its name, and the distance of its own length."""
    import torch

    from jobs.train import engine_unsloth, fused_lora
    from jobs.train.engine_transformers import train_in_float32
    from jobs.train.engines import engine
    from jobs.train.runtime import device_name

    spec, device = _spec(base, load_in), device_name()
    with mock.patch.object(engine_unsloth, "fuse", lambda model: 0):
        model = engine().add_lora(engine().load(base, spec.model, device), spec, base)
    train_in_float32(model)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero else, and with it every gradient of A
            parameter.data = torch.randn_like(parameter) * 0.02
    batch = _batch(model, spec, base, device)

    def gradients(again: bool) -> tuple[float, dict[str, Any]]:
        engine().set_checkpointing(model, again)
        model.zero_grad(set_to_none=True)
        model.train()
        with torch.autocast(device, dtype=torch.bfloat16):
            trained = torch.tensor(sum(ROWS) - len(ROWS), device=device)
            loss = model(**batch, num_items_in_batch=trained).loss
        loss.backward()
        named = model.named_parameters()
        return float(loss.detach()), {
            name: p.grad.float().clone() for name, p in named if p.grad is not None
        }

    expected = gradients(False)
    ways = {"plain": expected, "plain, made again": gradients(True)}
    groups = fused_lora.fuse(model)
    ways |= {"fused": gradients(False), "fused, made again": gradients(True)}
    told: dict[str, Any] = {"groups": groups, "trained": len(expected[1]), "ways": {}}
    told["end to end"] = batch["input_ids"].shape == (1, sum(ROWS))
    for way, (loss, found) in ways.items():
        assert set(found) == set(expected[1]), way
        distance, name = max(
            (float((found[name] - whole).norm() / whole.norm()), name)
            for name, whole in expected[1].items()
        )
        told["ways"][way] = {"loss": loss, "furthest": name, "distance": distance}
    return told


def _spec(base: Path, load_in: str) -> Any:
    from jobs.spec import Spec

    return Spec.model_validate(
        {
            "name": "fused",
            "model": {"base": str(base), "max_seq_length": 512, "load_in": load_in},
            "data": {"train": "none.jsonl"},
            "lora": {"rank": 16},
            "train": {"engine": "unsloth"},
        }
    )


def _batch(model: Any, spec: Any, base: Path, device: str) -> dict[str, Any]:
    import torch

    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.train.isolation import choose_collate

    tokenizer = TokenizerFiles(base).load()
    quiet = Observer("json", stream=io.StringIO())
    collate = choose_collate(model, spec, tokenizer, device, quiet)
    random = torch.Generator().manual_seed(1)
    rows = [torch.randint(10, 2000, (count,), generator=random).tolist() for count in ROWS]
    made = collate([{"input_ids": ids, "labels": ids} for ids in rows])
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in made.items()
    }


if __name__ == "__main__":
    main()
