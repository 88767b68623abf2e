"""`check`: the preflight, and the data read, labelled and looked at, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.data.conversation import BadRow
from jobs.data.labels import label
from jobs.data.prepare import first_conversations
from jobs.errors import ServiceError
from jobs.export.llama.build import find_tools
from jobs.observe.events import Observer
from jobs.pipeline.data import data_stage, data_warnings
from jobs.pipeline.job import Job
from jobs.preflight import Ready, preflight, result_bytes
from jobs.spec import Spec
from jobs.stages import Stages
from jobs.train.cards import Card, find_card, known
from jobs.train.engines import choose_engine
from jobs.train.memory import GIB, is_rough
from jobs.train.room import Room, does_not_fit, smallest_card
from jobs.train.shape import describes, read_shape


def check(spec: Spec, folder: Path, rows: int, observer: Observer) -> dict[str, Any]:
    """Everything worth knowing before the run, with the first `rows` rows as they are trained.

    The labelled data stay in the run's folder, where `run` takes them.
    """
    warnings: list[str] = []

    def tell(text: str) -> None:
        warnings.append(text)
        observer.notice(text)  # now, too: waiting for a service takes minutes

    try:
        ready = preflight(spec, folder, tell, keep=False)
        data = data_stage(Job(spec, ready, Stages(folder, observer)))
    except ServiceError as error:
        # What stores say of it is for a run, which goes on where it was.
        error.hint = "see that it can be reached from here, then check again"
        raise
    template = ready.tokenizer.template
    gpu = _gpu(spec, ready, data.result["longest"], warnings)
    return {
        "name": spec.name,
        "base": {
            "source": ready.base.source,
            "architecture": ready.base.config["architectures"][0],
            "commit": ready.base.commit,
            "weight_bytes": ready.base.weight_bytes(),
        },
        "chat_template": {
            "name": template.name,
            "end_of_turn": ready.tokenizer.turns.last_end,
            "date": str(template.today) if template.writes_today else None,
        },
        "data": data.result,
        "warnings": [*warnings, *data_warnings(data.result, spec)],
        "rows": _rows(spec, ready, rows),
        "gpu": gpu,
        "disk": [
            {"what": n.what, "folder": str(n.folder), "bytes": n.bytes, "free": n.free}
            for n in ready.disk
        ],
        "fetch_bytes": sum(need.bytes for need in ready.disk if need.folder != folder),
        "llama_cpp": "built" if find_tools() else "built on first use",
        "publish": [store.url for store in ready.targets],
        "publish_bytes": result_bytes(spec, ready.base) * len(ready.targets),
    }


def _gpu(spec: Spec, ready: Ready, longest: int, warnings: list[str]) -> dict[str, Any]:
    """What training takes of the GPU's memory, and the plan that it would choose there.

    Raises DoesNotFitError where no plan fits.
    """
    shape = read_shape(ready.base.config)
    if shape is None or not describes(shape, ready.base.weight_bytes()):
        kind = ready.base.config["architectures"][0]
        return {"unknown": f"how much memory {kind} takes is not reckoned; the run finds it out"}
    card = known(spec.limits.gpu) if spec.limits.gpu else find_card()
    engine = choose_engine(spec.train.engine, "cuda") if card and card.here else spec.train.engine
    if spec.train.packing:
        longest = spec.model.max_seq_length  # rows are filled up to that
    limit = spec.limits.gpu_memory_gib
    if card is None and limit:
        card = Card(f"a GPU with {limit:g} GiB", int(limit * GIB))
    room = Room(
        spec, shape, "transformers" if engine == "transformers" else "unsloth", longest,
        card or known("B200"),
    )  # fmt: skip
    rough = is_rough(shape, spec, room.engine)
    found: dict[str, Any] = {
        "engine": room.engine,
        "rough": rough,
        "least": room.least.total,
        "smallest_card": smallest_card(room),
        "most": room.takes(room.largest).total,
        "fastest_card": smallest_card(room, room.largest),
        "card": None,
    }
    if card is None:
        return found
    if room.hopeless and not rough:
        raise does_not_fit(room)
    if not room.fits:
        error = does_not_fit(room)
        warnings.append(f"the GPU's memory may not be enough: {error.message}; {error.hint}")
    if not card.bf16:
        warnings.append(f"{card.name} has no bfloat16: float16 is used, which can overflow")
    return found | {
        "card": card.name,
        "here": card.here,
        "bytes": card.bytes,
        "plan": room.plan.as_json(),
        "unpacked": room.unpacked,
        "takes": room.takes(room.plan, room.unpacked).as_json(),
    }


def _rows(spec: Spec, ready: Ready, count: int) -> list[dict[str, Any]]:
    """The first rows: text, token ids, and each trained span as text, characters and tokens."""
    found: list[dict[str, Any]] = []
    for place, conversation in first_conversations(spec.data, count, ready.origins.files_of):
        try:
            if isinstance(conversation, BadRow):
                raise conversation
            labelled = label(ready.tokenizer, conversation, spec.data.loss_on)
        except BadRow as reason:
            found.append({"place": place, "refused": str(reason)})
            continue
        found.append(
            {
                "place": place,
                "text": labelled.text,
                "input_ids": labelled.input_ids,
                "tokens": len(labelled.input_ids),
                "too_long": len(labelled.input_ids) > spec.model.max_seq_length,
                "trained": [
                    {
                        "text": turn.text,
                        "start": turn.start,
                        "end": turn.end,
                        "ids": labelled.input_ids[turn.start : turn.end],
                    }
                    for turn in labelled.turns
                ],
            }
        )
    return found
