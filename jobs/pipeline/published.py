"""A run whose results are in every target already, known from what stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import __version__
from jobs.pipeline.job import Job
from jobs.pipeline.training import checkpoints_of
from jobs.preflight import Ready
from jobs.spec import Spec
from jobs.stages import RECORDS, Done
from jobs.store import manifest
from jobs.store.hashing import key_of
from jobs.store.lease import Lease
from jobs.train.checkpoints import MARKER


def published_before(spec: Spec, ready: Ready, folder: Path) -> dict[str, Any] | None:
    """The manifest, where every target holds all that this run would make, and this folder nothing.

    So it is for a start after one that was killed between publishing and its exit, with its disk
    lost: to train again would cost hours and change nothing.
    """
    if not ready.targets or any((folder / RECORDS).glob("*.json")):
        return None  # what is here is cheaper to go by, and is sent where it is missing
    found = [store.read_json(manifest.NAME) for store in ready.targets]
    said = [_said(contents) for contents in found]
    if not all(said) or set(said) != {identity(spec, ready)}:
        return None
    for store, contents in zip(ready.targets, found, strict=True):
        there = {(entry.key, entry.size) for entry in store.entries()}
        if not {(file["path"], file["size"]) for file in contents["files"]} <= there:
            return None  # somebody has removed some
    first: dict[str, Any] = found[0]
    return first


def _said(contents: Any) -> str | None:
    """Which run a manifest is of; None for one that does not say it."""
    inputs = contents.get("inputs") if isinstance(contents, dict) else None
    identity = inputs.get("identity") if isinstance(inputs, dict) else None
    return identity if isinstance(identity, str) else None


def identity(spec: Spec, ready: Ready) -> str:
    """The same for two runs exactly when all is the same that shapes the results and can be known
    before anything is done. The number of threads is left out: it changes no more than last bits,
    and another node may have another one."""
    template = ready.tokenizer.template
    return key_of(
        {
            # Where results go and how they get there shapes none of them.
            "spec": spec.model_dump(
                mode="json", exclude={"publish", "checkpoints", "limits", "s3", "observe"}
            ),
            "base": [ready.base.commit, ready.base.content_key],
            "data": [[o.commit, o.contents()] for o in ready.origins.found],
            "template": [template.source, str(template.today)],
            "lorajob": __version__,
        }
    )


def forget_checkpoints(job: Job, lease: Lease, contents: dict[str, Any]) -> None:
    """Remove what the start that was killed had not removed yet; those of another training stay."""
    keeper = job.ready.keeper
    if keeper is None:
        return
    checkpoints = checkpoints_of(job, Done("", [], {}, 0, skipped=True), lease)
    ours = {**checkpoints.inputs, "data": contents["inputs"].get("prepared")}
    markers = [
        keeper.read_json(entry.key)
        for entry in keeper.entries()
        if entry.key.startswith("checkpoints/") and entry.key.endswith(f"/{MARKER}")
    ]
    if all(isinstance(found, dict) and found.get("inputs") == ours for found in markers):
        checkpoints.clear()
