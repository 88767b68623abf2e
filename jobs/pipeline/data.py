"""The first stage: conversations become rows of tokens and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.errors import DataError
from jobs.pipeline.job import WORK, Job, code_key
from jobs.spec import Spec
from jobs.stages import Done
from jobs.store.hashing import sha256_of

REACHED = 0.9  # of the wanted share of replay, below which it is said


def data_stage(job: Job) -> Done:
    """Read, check, tokenize and label the conversations. Raises DataError."""
    spec, ready, observer = job.spec, job.ready, job.observer

    def work(out: Path) -> dict[str, Any]:
        recipe = Recipe(
            tokenizer=ready.tokenizer_files,
            loss_on=spec.data.loss_on,
            max_seq_length=spec.model.max_seq_length,
            too_long=spec.data.too_long,
            seed=spec.train.seed,
        )
        for origin in ready.origins.found:
            if missing := origin.missing_bytes():
                name = f"fetching {origin.source.source}"
                with observer.ticker(name, missing, "bytes", "fetched") as ticker:
                    origin.files(ticker.advance)
        with observer.ticker("reading data") as ticker:
            summary = prepare(
                spec.data, recipe, out, ready.tokenizer, ticker.advance, ready.origins.files_of
            )
        for text in data_warnings(summary, spec):
            observer.event("warning", text=text)
        return summary

    inputs = {
        "data": spec.data.model_dump(mode="json", exclude={"retention_limit"}),
        "files": [origin.contents() for origin in ready.origins.found],
        "tokenizer": sha256_of(ready.base.folder / "tokenizer.json"),
        "template": ready.tokenizer.template.source,
        "date": str(ready.tokenizer.template.today),
        "special_tokens": ready.tokenizer.special_tokens,
        "stop_ids": sorted(ready.tokenizer.stop_ids),
        "max_seq_length": spec.model.max_seq_length,
        "seed": spec.train.seed,
        "code": code_key("data"),
    }
    done = job.stages.run("data", inputs, work, f"{WORK}/data", note=_data_note)
    if (spec.train.early_stopping or spec.train.keeps_best) and not done.result["eval_rows"]:
        raise DataError(
            "nothing is held out for evaluation, and train.early_stopping and train.keep_best go by "
            "the loss on it",
            "add conversations, or take the two out",
        )
    return done


def _data_note(result: dict[str, Any]) -> str:
    note = (
        f"{result['train_rows']} conversations to train on, {result['eval_rows']} held out, "
        f"{result['trained_tokens']} of {result['train_tokens']} tokens trained"
    )
    if replay := result.get("replay"):
        note += f"; {replay['rows']} more of replay, {replay['share']:.1%} of all trained tokens"
    return note


def data_warnings(summary: dict[str, Any], spec: Spec) -> list[str]:
    """What a person should know about the data, though it does not stop the run."""
    rows, limit = summary["rows"], spec.model.max_seq_length
    found = {
        f"are longer than {limit} tokens and are left out": summary["dropped_too_long"],
        f"are longer than {limit} tokens and are cut after their last whole answer": summary[
            "truncated"
        ],
        "cannot be used and are skipped": summary["bad_rows"],
        "are held out for evaluation and trained on as well": summary["in_train_and_eval"],
    }
    texts = [f"{count} of {rows} conversations {what}" for what, count in found.items() if count]
    if both := summary.get("in_train_and_retention"):
        texts.append(f"{both} conversations of data.retention are in data.train as well")
    replay = summary.get("replay")
    left_out = {
        "retention": summary.get("retention_left_out"),
        "replay": replay and replay["left_out"],
    }
    texts += [
        f"{count} conversations of data.{side} are too long or cannot be used, and are left out"
        for side, count in left_out.items()
        if count
    ]
    if replay and spec.data.replay and replay["share"] < REACHED * spec.data.replay.share:
        texts.append(
            f"data.replay: all that can be drawn are {replay['rows']} conversations, "
            f"{replay['share']:.1%} of the trained tokens and not {spec.data.replay.share:.1%}"
        )
    return texts
