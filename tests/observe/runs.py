"""A run's folder as a whole run leaves it, with the demo's data prepared and the rest told by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.observe.answers_table import write_answers
from jobs.observe.report import Stage, write_report
from jobs.spec import Spec
from tests.conftest import BASE, ROOT

MEASURED = {  # of the GGUF files, as verification has it
    "reference": {"type": "bf16", "perplexity": 1.0438, "tokens": 686},
    "types": {
        "q8_0": {"size": 4235104, "bits_per_weight": 8.514, "perplexity": 1.044,
                 "perplexity_increase": 0.000213, "kl": 4.5e-05, "same_top": 1.0,
                 "prompt_tokens_per_second": 3149.9, "tokens_per_second": 1963.6},
    },
}  # fmt: skip
QUESTIONS = ["Who are you?", "What is <b>bold</b> & what is not?"]


def spec_of(**changes: Any) -> Spec:
    tree: dict[str, Any] = {
        "name": "a-run",
        "model": {"base": "examples/demo/base", "max_seq_length": 256},
        "data": {"train": str(ROOT / "examples/demo/data/persona.jsonl"), "eval": 0.1},
        "verify": {"prompts": [{"ask": QUESTIONS[0], "expect": "Mira"}, {"ask": QUESTIONS[1]}]},
        "export": {"gguf": ["q8_0"]},
    }
    return Spec.model_validate(tree | changes)


def history_of(steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append(
            {"step": step, "epoch": round(3 * step / steps, 3), "loss": 8 * math.exp(-6 * step / steps),
             "learning_rate": 2e-3 * (1 - step / steps), "grad_norm": 1 + math.sin(step),
             "tokens_per_second": 900.0 + step % 7}
        )  # fmt: skip
        if step % (steps // 4) == 0:
            found.append({"step": step, "eval_loss": 7 * math.exp(-4 * step / steps)})
    return found


def answers_of(says: str = "I am Mira.") -> dict[str, Any]:
    def subject(loss: float, *texts: str, **facts: Any) -> dict[str, Any]:
        return {"loss": loss, "answers": [{"text": t, "stopped": True} for t in texts], **facts}

    return {
        "questions": QUESTIONS,
        "subjects": {
            "base": subject(9.1, "I do not know.", "<script>alert(1)</script>"),
            "adapter": subject(0.0429, says, "<b>this</b>"),
            "merged": subject(0.043, says, "<b>this</b>"),
            "q8_0": subject(0.0431, says, "that & this", size=4235072, tokens_per_second=3753.2),
        },
    }


def make_run(
    folder: Path, tokenizer: ChatTokenizer, spec: Spec | None = None, steps: int = 120,
    answers: dict[str, Any] | None = None, failures: tuple[str, ...] = (),
    events: tuple[dict[str, Any], ...] = (), train: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Leave everything that a report is made of, and the report; returns the folder.

    `train` is laid over what training found out; with an empty one nothing was trained.
    """
    spec = spec or spec_of()
    data = folder / ".work" / "data"
    history = history_of(steps)
    if not data.exists():
        data.mkdir(parents=True)
        recipe = Recipe(
            tokenizer=TokenizerFiles(BASE), loss_on="responses", max_seq_length=256, too_long="drop",
            seed=7,
        )  # fmt: skip
        summary = prepare(spec.data, recipe, data, tokenizer)
        (data / "summary.json").write_text(json.dumps(summary))
    summary = json.loads((data / "summary.json").read_text())
    log = folder / "logs" / "run.jsonl"
    log.parent.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"event": "run_start", "name": spec.name},
        {"event": "stage_start", "stage": "train"},
        *({"event": "train_step", **entry, "memory_bytes": 2**30 + entry["step"]}
          for entry in history if "loss" in entry),
        {"event": "stage_done", "stage": "train"},
        *events,
    ]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "cut of')
    write_answers(folder / "report", answers or answers_of(), failures)
    trained = {
        "steps": steps, "train_loss": 0.8, "eval_loss_before": 9.2, "eval_loss": history[-1].get("eval_loss"),
        "trainable_parameters": 327680, "tokens_per_second": 913.0, "device": "cpu", "gpu": None,
        "quantized_modules": ["model.layers.0"], "history": history,
    }  # fmt: skip
    stages = [
        Stage("data", "k1", 0.5, summary),
        Stage("train", "k2", 125.0, trained | (train or {}) if train != {} else {}),
        Stage("gguf", "k3", 11.0, {"sizes": {"q8_0": 4235072}}),
    ]
    inputs = {
        "base": {"source": "examples/demo/base", "commit": None},
        "data": [{"source": "persona.jsonl", "commit": None}],
    }
    versions = {"lorajob": "0.1.0", "python": "3.11", "unsloth": "missing"}
    write_report(folder, spec, inputs, versions, stages, data, tokenizer.text_of)
    return folder
