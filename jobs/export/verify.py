"""Proving what was made: adapter, merged weights and each GGUF, before anything is published."""

from __future__ import annotations

import io
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import kl_div, log_softmax

from jobs.base_model import weight_files
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.export.answers import Answer, Question, Said, ask, questions
from jobs.export.comparison import compared_rows, comparison, lossy_failures
from jobs.export.gguf import adapter_name, file_name, files_of
from jobs.export.merged_check import merged_failures, merged_weights
from jobs.export.verify_gguf import GgufCheck, adapter_failures
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.train.batches import PadBatch
from jobs.train.engine_transformers import load_model
from jobs.train.loss import evaluate, trained_logits

# The same weights on the same device give the same bits on a CPU. GPU kernels may sum in another
# order, which in bfloat16 (8 bits of mantissa) moves a logit of size 30 by up to 0.125 a rounding.
RELOADED_LOGITS = {"cpu": 1e-4, "cuda": 0.5}

# Rounding the merged weights to 16 bit costs a prediction far less than this (1e-6 where it was
# measured); another base, or no merge at all, costs far more.
MERGED_KL = 1e-2  # nats per token

# An export that has lost more than half of what training gained has not kept what it was made for.
KEEPS = 0.5

# What few bits may cost however little training gained, in nats per trained token: a short training
# may gain less than that, which is no fault of the file. That the update is in all of them the
# unquantized conversion shows, and `verify.max_kl` is for whoever wants less.
TYPE_COSTS = {"8": 0.02, "6": 0.05, "5": 0.1, "4": 0.2, "3": 0.5, "2": 1.0, "1": 2.5}


@dataclass
class Subject:
    """One thing under verification: its loss on trained tokens and its answers."""

    loss: float
    answers: list[Answer]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Paths:
    """Where everything is; `merged` and `gguf` may not have been asked for."""

    base: Path
    data: Path
    adapter: Path
    probe: Path
    merged: Path | None
    gguf: Path | None
    log: Path


def verify(
    spec: Spec, paths: Paths, files: TokenizerFiles, conversations: list[Said],
    tools: Path | None, device: str, threads: int, observer: Observer | None,
    made: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Check everything that will be published. `made` is what `make_gguf` returned.

    Returns losses and answers for the report, and every check that failed.
    """
    observer = observer or Observer("json", stream=io.StringIO())
    tokenizer = files.load()
    asked = questions(spec.verify, conversations)
    rows = compared_rows(paths.data)
    batches = _batches(rows, tokenizer, spec.train.batch_size)
    made = made or {"quality": {}}
    probe = load_file(paths.probe)
    limit = spec.verify.max_new_tokens
    dequantized = spec.export.into_dequantized(spec.model.load_in, spec.lora.loftq)
    failures: list[str] = []
    subjects: dict[str, Subject] = {}
    total = 2 + (paths.merged is not None) + len(spec.export.gguf)
    with observer.ticker("verifying", total) as ticker:
        base = load_model(paths.base, spec.model.load_in, device)
        base.eval()
        subjects["base"] = Subject(
            evaluate(base, batches, base.device)[0], ask(base, tokenizer, asked, limit)
        )
        ticker.advance(note="base")

        tuned = PeftModel.from_pretrained(base, str(paths.adapter))
        tuned.eval()
        difference = (_logits(tuned, probe, device) - probe["logits"]).abs().max().item()
        if not difference <= RELOADED_LOGITS[device]:
            failures.append(
                f"adapter: reloaded from its files it gives other logits than at the end of "
                f"training (off by {difference:.3g}, allowed {RELOADED_LOGITS[device]})"
            )
        subjects["adapter"] = Subject(
            evaluate(tuned, batches, base.device)[0],
            ask(tuned, tokenizer, asked, limit),
            {"reloaded_logits_off_by": difference},
        )
        ticker.advance(note="adapter")
        if paths.merged:
            failures += merged_failures(tuned, paths.base, paths.merged, dequantized)
        del base, tuned

        if paths.merged:
            subjects["merged"] = _merged(paths, probe, batches, tokenizer, asked, limit, device)
            exact = spec.export.merged == "16bit" and (dequantized or spec.model.load_in == "16bit")
            failures += _merged_failures(subjects["merged"], exact)
            ticker.advance(note="merged")
        if spec.export.gguf:
            assert paths.gguf is not None
            assert tools is not None
            check = GgufCheck(
                tools, paths.log, threads, tokenizer, files.folder, conversations, asked, limit
            )
            for kind in spec.export.gguf:
                subjects[kind], found = _gguf(check, paths.gguf, spec, kind, rows, made)
                failures += [f"{file_name(spec.name, kind)}: {text}" for text in found]
                ticker.advance(note=kind)
        if spec.export.adapter_gguf and paths.gguf and "adapter" in made:
            file = paths.gguf / adapter_name(spec.name)
            with safe_open(paths.adapter / "adapter_model.safetensors", "pt") as opened:
                trained = len(opened.keys())
            losses = subjects["base"].loss, subjects["adapter"].loss
            failures += adapter_failures(made["adapter"], file, *losses, trained)
    failures += _answer_failures(subjects, asked)
    found_losses = {name: subject.loss for name, subject in subjects.items()}
    if spec.export.gguf and "reference" in made:
        found_losses[f"the {made['conversion']} GGUF"] = made["reference"]["loss"]
    costs: dict[str, float] = {kind: type_cost(kind) for kind in spec.export.gguf}
    costs["merged"] = type_cost(str(spec.export.merged))
    failures += loss_failures(found_losses, costs)
    result = {
        "questions": [question.text for question in asked],
        "subjects": {
            name: {"loss": round(s.loss, 6), "answers": s.answers, **s.facts}
            for name, s in subjects.items()
        },
        "gguf": comparison(made, subjects),
    }
    return result, failures


def _batches(
    rows: list[dict[str, list[int]]], tokenizer: ChatTokenizer, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    collate = PadBatch(tokenizer.pad_id)
    return [
        collate(rows[start : start + batch_size])  # type: ignore[arg-type]
        for start in range(0, len(rows), batch_size)
    ]


@torch.no_grad()
def _logits(model: Any, probe: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    batch = {name: tensor.to(device) for name, tensor in probe.items() if name != "logits"}
    return trained_logits(model, batch, len(probe["logits"]))[0].cpu()


def _merged(
    paths: Paths, probe: dict[str, torch.Tensor], batches: list[dict[str, torch.Tensor]],
    tokenizer: ChatTokenizer, asked: list[Question], limit: int, device: str,
) -> Subject:  # fmt: skip
    assert paths.merged is not None
    model = load_model(paths.merged, "16bit", device)
    model.eval()
    logits = _logits(model, probe, device)
    # KL(trained || merged), mean over the probed tokens
    divergence = kl_div(
        log_softmax(logits, -1),
        log_softmax(probe["logits"], -1),
        log_target=True,
        reduction="batchmean",
    ).item()
    facts = {"changed_tensors": _changed(paths.base, paths.merged), "kl_to_adapter": divergence}
    return Subject(
        evaluate(model, batches, model.device)[0], ask(model, tokenizer, asked, limit), facts
    )


def _changed(base: Path, merged: Path) -> int:
    """How many tensors of the merged model are other numbers than the base's."""
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(path, "pt")) for path in weight_files(base)]
        before = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        changed = 0
        for name, tensor, form in merged_weights(merged):
            changed += form == "4bit" or (
                name in before
                and not torch.equal(before[name].get_tensor(name).to(tensor.dtype), tensor)
            )
    return changed


def _merged_failures(merged: Subject, exact: bool) -> list[str]:
    """`exact`: nothing but rounding lies between the merged model and the one that was trained."""
    failures = []
    if merged.facts["changed_tensors"] == 0:
        failures.append("merged: every weight equals the base's: nothing was merged")
    if exact and not merged.facts["kl_to_adapter"] <= MERGED_KL:
        failures.append(
            f"merged: it predicts otherwise than the base with the adapter "
            f"(KL {merged.facts['kl_to_adapter']:.3g} nats per token, allowed {MERGED_KL})"
        )
    return failures


def _gguf(
    check: GgufCheck, folder: Path, spec: Spec, kind: str, rows: list[dict[str, list[int]]],
    made: dict[str, Any],
) -> tuple[Subject, list[str]]:  # fmt: skip
    measured = made["quality"].get(kind)  # its loss has been found already, then
    found = check.look(files_of(folder, spec.name, kind), [] if measured else rows)
    loss = measured["loss"] if measured else found.loss
    assert loss is not None
    failures = [*found.failures, *lossy_failures(spec.verify, kind, made)]
    return Subject(loss, found.answers, found.facts), failures


def _answer_failures(subjects: dict[str, Subject], asked: list[Question]) -> list[str]:
    failures = []
    for name, subject in subjects.items():
        if name == "base":
            continue
        stopped = [answer["stopped"] for answer in subject.answers]
        if asked and not any(stopped):
            failures.append(f"{name}: no answer stops by itself")
        for question, answer in zip(asked, subject.answers, strict=True):
            if question.required and any(stopped) and not answer["stopped"]:
                failures.append(f"{name}: its answer to {question.text!r} does not stop by itself")
            if question.expect and question.expect.lower() not in answer["text"].lower():
                failures.append(
                    f"{name}: its answer to {question.text!r} lacks {question.expect!r}: "
                    f"{answer['text'][:120]!r}"
                )
    return failures


def loss_failures(losses: dict[str, float], costs: dict[str, float]) -> list[str]:
    """Each export must keep what training gained on the trained tokens; `costs` are what those in few
    bits may lose in any case."""
    failures = []
    base, tuned = losses["base"], losses["adapter"]
    gained = base - tuned
    for name, loss in losses.items():
        if name in ("base", "adapter"):
            continue
        allowed = max((1 - KEEPS) * gained, costs.get(name, 0.0))
        if not math.isfinite(loss):
            failures.append(f"{name}: its loss is {loss}")
        elif gained > 0 and loss - tuned > allowed:
            failures.append(
                f"{name}: of the {gained:.3f} that training took off the loss ({base:.3f} to "
                f"{tuned:.3f}) it keeps {base - loss:.3f}"
            )
    return failures


def type_cost(kind: str) -> float:
    """What a type of GGUF file, or of merged weights, may lose in any case; nothing in 16 bit."""
    found = re.match(r"i?q?(\d)(?!6bit)", kind)
    return TYPE_COSTS[found[1]] if found else 0.0
