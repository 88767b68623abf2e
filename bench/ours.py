"""lorajob's own training under the clock, from a spec: what the GPU benches share."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.clock import Clock


def prepared(spec: Any, base: Path, rows: Path) -> Path:
    """The spec's data, labelled, below `rows`; what is there already is taken as it is."""
    from jobs.data.chunks import Recipe
    from jobs.data.prepare import prepare
    from jobs.data.tokenizer import TokenizerFiles

    if not (rows / "train.arrow").exists():
        rows.mkdir(parents=True, exist_ok=True)
        files = TokenizerFiles(base, spec.model.chat_template)
        recipe = Recipe(
            files, spec.data.loss_on, spec.model.max_seq_length, spec.data.too_long, spec.train.seed
        )
        prepare(spec.data, recipe, rows)
    return rows


def time_stages(clock: Clock) -> None:
    """Mark the ends of importing, loading and adding LoRA, in the engine that was started."""
    from jobs.train.engines import engine

    module: Any = engine()
    for name, phase in (("load", "load"), ("add_lora", "lora")):
        setattr(module, name, _marked(getattr(module, name), clock, phase))


def _marked(function: Any, clock: Clock, phase: str) -> Any:
    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if phase == "load":
            clock.mark("imports")
        result = function(*args, **kwargs)
        clock.mark(phase)
        return result

    return marked


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Within, lorajob's trainers are under the clock. The one place that knows the trainer."""
    from jobs.train.trainer import Trainer

    trainer: Any = Trainer
    train = trainer.train

    @functools.wraps(train)
    def on_the_clock(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.attach(self)
        return train(self, *args, **kwargs)

    trainer.train = on_the_clock
    try:
        yield
    finally:
        trainer.train = train


def train(spec: Any, base: Path, rows: Path, work: Path, clock: Clock) -> dict[str, Any]:
    """Train as `lorajob run` does, in this process; the clock's figures, the plan, the kernel.

    The engine is started already: unsloth has to be imported before torch is.
    """
    from jobs.data.tokenizer import TokenizerFiles
    from jobs.observe.events import Observer
    from jobs.train.checkpoints import Checkpoints
    from jobs.train.runtime import quiet_libraries

    quiet_libraries()
    time_stages(clock)
    from jobs.train import loop

    said: list[tuple[str, dict[str, Any]]] = []

    class Listening(Observer):
        def event(self, event: str, **fields: Any) -> None:
            said.append((event, fields))
            if event in ("kernel", "plan"):
                clock.mark({"kernel": "isolation", "plan": "plan"}[event])
            super().event(event, **fields)

    tokenizer = TokenizerFiles(base, spec.model.chat_template).load()
    out = Path(tempfile.mkdtemp(dir=work))
    with watched(clock):
        result = loop.train(
            spec, base, tokenizer, rows, out, Checkpoints(out / "checkpoints", {}),
            Listening("json", stream=io.StringIO()),
        )  # fmt: skip
    kernels = [str(fields.get("attention", fields)) for event, fields in said if event == "kernel"]
    warnings = [str(fields.get("text", fields)) for event, fields in said if event == "warning"]
    return {
        **clock.figures(),
        "plan": result["plan"],
        "kernel": kernels[-1] if kernels else "padded batches",
        "warnings": warnings,
    }
