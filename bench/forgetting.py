"""What a fine-tuning forgets, and what replay changes: the demo's data with shares of replay.

    OMP_NUM_THREADS=1 .venv/bin/python -m bench.forgetting      writes bench/results/forgetting.md

Each share is trained with three seeds. What is forgotten is the loss on conversations that the base
never saw (data.retention), and how many questions of its quiz it still answers; what is learned, the
loss on the held-out part of the training data, and questions that are worded so nowhere in it.

Each run takes a minute or more. What is in bench/results/forgetting.json is not run again: remove it
to begin anew.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.data.tokenizer import ChatTokenizer, TokenizerFiles
from jobs.observe.events import Observer
from jobs.spec import Spec
from jobs.spec_source import load_spec
from jobs.train.checkpoints import Checkpoints
from jobs.train.runtime import settle_threads

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
RESULT = ROOT / "bench" / "results" / "forgetting.md"
RUNS = RESULT.with_suffix(".json")
SHARES = (0.0, 0.2, 0.1)
SEEDS = (1, 2, 3)
LONGEST = 60  # tokens of an answer

Question = tuple[str, str]  # and a part of its right answer


def spec_of(share: float, seed: int) -> Spec:
    """examples/demo.yaml with a share of replay and a seed."""
    tree = load_spec("examples/demo.yaml", {}).model_dump()
    data = "examples/demo/data"
    tree["data"]["retention"] = f"{data}/retention.jsonl"
    tree["data"]["replay"] = None
    if share:
        tree["data"]["replay"] = {"sources": f"{data}/replay.jsonl", "share": share}
    tree["train"] |= {"seed": seed, "epochs": 8}  # what the results before were measured with
    return Spec.model_validate(tree)


def trained(spec: Spec, work: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What `prepare` and `train` say, and where the adapter is."""
    from jobs.train.loop import train

    files = TokenizerFiles(Path(spec.model.base))
    recipe = Recipe(
        files, spec.data.loss_on, spec.model.max_seq_length, spec.data.too_long, spec.train.seed
    )
    data, out = work / "data", work / "out"
    data.mkdir(parents=True)
    out.mkdir()
    summary = prepare(spec.data, recipe, data)
    with (work / "log.jsonl").open("w") as log:
        result = train(
            spec, Path(spec.model.base), files.load(), data, out,
            Checkpoints(work / "checkpoints", {}), Observer("json", log),
        )  # fmt: skip
    return summary, result, out / "adapter"


def right(
    model: Any, tokenizer: ChatTokenizer, asked: Sequence[Question], system: str | None
) -> int:
    """How many questions are answered with what the answer must contain, greedily."""
    import torch

    before = [{"role": "system", "content": system}] if system else []
    prompts = [
        tokenizer.ids_of(
            tokenizer.template.render(
                [*before, {"role": "user", "content": question}], add_generation_prompt=True
            )
        )
        for question, _ in asked
    ]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    answers = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST, do_sample=False,
        eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=pad,
    )[:, longest:]  # fmt: skip
    return sum(
        expected.lower() in tokenizer.text_of(answer.tolist()).lower()
        for (_, expected), answer in zip(asked, answers, strict=True)
    )


def questions() -> tuple[list[Question], list[Question], str]:
    """What the base knew, what the training teaches, and the system prompt of the latter."""
    sys.path.insert(0, str(DEMO))
    from corpus import QUIZ  # type: ignore[import-not-found]

    held_out = json.loads((DEMO / "heldout.json").read_text("utf-8"))
    system = load_spec("examples/demo.yaml", {}).verify.prompts[0].system or ""
    return QUIZ, [(q["question"], q["expected"]) for q in held_out], system


def main() -> None:
    settle_threads()
    from peft import PeftModel

    from jobs.train.engine_transformers import load_model
    from jobs.train.runtime import quiet_libraries

    quiet_libraries()
    known, taught, system = questions()
    tokenizer = TokenizerFiles(DEMO / "base").load()

    def asked(adapter: Path | None) -> tuple[int, int]:
        model: Any = load_model(DEMO / "base", "4bit", "cpu").eval()
        if adapter:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        return right(model, tokenizer, known, None), right(model, tokenizer, taught, system)

    runs: list[dict[str, Any]] = json.loads(RUNS.read_text()) if RUNS.exists() else []
    base = asked(None)
    for share in SHARES:
        for seed in SEEDS:
            if any((run["replay"], run["seed"]) == (share, seed) for run in runs):
                continue
            with tempfile.TemporaryDirectory() as name:
                summary, result, adapter = trained(spec_of(share, seed), Path(name))
                quiz, new = asked(adapter)
            (kept,) = result["retention"]
            runs.append(
                {
                    "replay": share, "seed": seed, "before": kept["before"], "after": kept["after"],
                    "quiz": quiz, "taught": new, "eval_before": result["eval_loss_before"],
                    "eval": result["eval_loss"], "steps": result["steps"], "tokens": kept["tokens"],
                    "share": summary.get("replay", {}).get("share", 0.0),
                    "rows": summary.get("replay", {}).get("rows", 0),
                }
            )  # fmt: skip
            print(runs[-1], flush=True)
            RUNS.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n", "utf-8")
        done = {
            share: own
            for share in sorted(SHARES)
            if len(own := [run for run in runs if run["replay"] == share]) == len(SEEDS)
        }
        RESULT.write_text(written(done, base, len(known), len(taught)), "utf-8")


def written(
    found: dict[float, list[dict[str, Any]]], base: tuple[int, int], known: int, taught: int
) -> str:
    def mean(
        runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float], form: str
    ) -> str:
        each = [value(run) for run in runs]
        low, high = (f"{edge(each):{form}}" for edge in (min, max))
        middle = f"{sum(each) / len(each):{form}}"
        return middle if low == high else f"{middle} ({low} to {high})"

    without = found[0.0]
    lines = [
        "# Forgetting",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()} without a GPU, one thread: "
        "`OMP_NUM_THREADS=1 python -m bench.forgetting`",
        "",
        "The demo's spec (8 epochs of its 153 conversations, a tenth of them held out), with "
        f"{len(SEEDS)} seeds; means, and the range in brackets. Retention is "
        f"`examples/demo/data/retention.jsonl`, {without[0]['tokens']} trained tokens of "
        "conversations that the base was not trained on; the quiz are "
        f"{known} questions that it could answer; the persona are {taught} that are worded so "
        "nowhere in the training data. Replay is drawn from 160 conversations that the base was "
        "trained on; its share is of all trained tokens.",
        "",
        "| replay | conversations of it | steps | retention loss | risen by | quiz right | eval loss | persona right |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| the base | | | {mean(without, lambda r: r['before'], '.3f')} | | {base[0]} of {known} "
        f"| {mean(without, lambda r: r['eval_before'], '.2f')} | {base[1]} of {taught} |",
    ]
    for share, runs in found.items():
        name = f"{share:.0%}" if share else "none"
        lines.append(
            f"| {name} | {mean(runs, lambda r: r['rows'], '.0f')} "
            f"| {mean(runs, lambda r: r['steps'], '.0f')} "
            f"| {mean(runs, lambda r: r['after'], '.3f')} "
            f"| {mean(runs, lambda r: r['after'] - r['before'], '.3f')} "
            f"| {mean(runs, lambda r: r['quiz'], '.0f')} "
            f"| {mean(runs, lambda r: r['eval'], '.3f')} "
            f"| {mean(runs, lambda r: r['taught'], '.0f')} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
