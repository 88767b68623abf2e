"""`check`: the preflight, and the data read, labelled and looked at, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.data.conversation import BadRow
from jobs.data.labels import label
from jobs.data.prepare import first_conversations
from jobs.export.llama.build import find_tools
from jobs.observe.events import Observer
from jobs.preflight import Ready, preflight, result_bytes
from jobs.run import data_stage, data_warnings
from jobs.spec import Spec
from jobs.stages import Stages


def check(spec: Spec, folder: Path, rows: int, observer: Observer) -> dict[str, Any]:
    """Everything worth knowing before the run, with the first `rows` rows as they are trained.

    The labelled data stay in the run's folder, where `run` takes them.
    """
    warnings: list[str] = []
    ready = preflight(spec, folder, warnings.append, keep=False)
    data = data_stage(spec, ready, Stages(folder, observer))
    template = ready.tokenizer.template
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
        "disk": [
            {"what": n.what, "folder": str(n.folder), "bytes": n.bytes, "free": n.free}
            for n in ready.disk
        ],
        "fetch_bytes": sum(need.bytes for need in ready.disk if need.folder != folder),
        "llama_cpp": "built" if find_tools() else "built on first use",
        "publish": [store.url for store in ready.targets],
        "publish_bytes": result_bytes(spec, ready.base) * len(ready.targets),
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
