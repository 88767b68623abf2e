"""The pipeline: data -> training -> adapter -> merged -> GGUF -> verification -> publication.

Each step is a stage, taken as it is when it was done before with the same inputs.
"""

from __future__ import annotations

import platform
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import __version__, stop
from jobs.errors import LorajobError, ServiceError, VerificationError
from jobs.observe.answers_table import ANSWERS
from jobs.observe.events import Observer
from jobs.observe.watchers import watch
from jobs.pipeline.ahead import sending_ahead
from jobs.pipeline.data import data_stage
from jobs.pipeline.export import (
    adapter_stage,
    gguf_stage,
    merge_stage,
    settle_llama_cpp,
    verify_stage,
)
from jobs.pipeline.job import CHECKPOINTS, WORK, Job
from jobs.pipeline.published import forget_checkpoints, published_before
from jobs.pipeline.results import add_cards, manifest_of, report
from jobs.pipeline.training import checkpoints_of, given_stage, train_stage
from jobs.preflight import preflight
from jobs.spec import Spec
from jobs.stages import Done, Stages, write_whole
from jobs.store import manifest
from jobs.store.base import KeyStore, Store
from jobs.store.hashing import FileEntry
from jobs.store.lease import Lease, held_lease
from jobs.store.local import LocalStore
from jobs.store.publish import publish, publish_to_all
from jobs.train.checkpoints import Checkpoints, kept_before
from jobs.train.runtime import settle_gpu, settle_threads

NAMED = 5  # files that a place loses, by name; more are counted


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: its manifest, and where that and all it lists are."""

    contents: dict[str, Any]
    manifest: str
    here: bool = (
        True  # in the run's folder; else in its targets alone, where an earlier start put it
    )


def run(spec: Spec, folder: Path, observer: Observer, given: Path | None = None) -> Outcome:
    """Do the whole job in `folder`. Raises a LorajobError.

    With an adapter `given` nothing is trained: it is what all else is made of.
    """
    start = time.monotonic()
    observer.reached.log = folder / "logs" / "run.jsonl"
    watch(spec, folder, folder / CHECKPOINTS, observer)
    ready = preflight(spec, folder, observer.warn, keep=True)
    observer.snapshot.retries = lambda: ready.connections.retries.count
    observer.keep_in(folder / "logs" / "run.jsonl")
    observer.event("run_start", version=__version__, name=spec.name, folder=str(folder))
    if (gpus := settle_gpu()) > 1:
        observer.warn(f"{gpus} GPUs are visible, and a run trains on one: the others do nothing")
    with ExitStack() as held:
        held.enter_context(_lease(LocalStore(folder / WORK), spec, observer))
        lease = held.enter_context(_lease(ready.keeper, spec, observer))
        job = Job(spec, ready, Stages(folder, observer), settle_threads())
        outcome = _stages_of_given(job, lease, given) if given else _stages(job, lease)
    observer.event(
        "run_done",
        seconds=round(time.monotonic() - start, 1),
        retries=ready.connections.retries.reasons,
        manifest=outcome.manifest,
        published=[store.url for store in ready.targets],
    )
    return outcome


def _lease(store: KeyStore | None, spec: Spec, observer: Observer) -> AbstractContextManager[Lease]:
    """The right to write there, which no other run has at the same time."""
    if store is None:
        return nullcontext(Lease())
    who = f"{spec.name} on {platform.node()}"

    def lost(reason: str) -> None:
        stop.because(ServiceError(reason, "look which other run uses the same place"))

    ttl = float(spec.limits.lease_seconds)
    return held_lease(store, who, observer.warn, lost, ttl, wait=1.5 * ttl)


def _stages(job: Job, lease: Lease) -> Outcome:
    """Everything from the data to the publication."""
    spec, ready, observer = job.spec, job.ready, job.observer
    if contents := published_before(spec, ready, job.folder):
        observer.event("already_published", where=", ".join(store.url for store in ready.targets))
        forget_checkpoints(job, lease, contents)
        return Outcome(contents, f"{ready.targets[0].url}/{manifest.NAME}", here=False)
    before = kept_before(job.folder / CHECKPOINTS, ready.keeper)
    observer.reached.safe = lambda: before
    data = data_stage(job)
    settle_llama_cpp(job)
    checkpoints = checkpoints_of(job, data, lease)
    checkpoints.safe = before
    observer.reached.safe = lambda: _safe(job.stages, checkpoints)
    try:
        with stop.recognized():
            trained = train_stage(job, data, checkpoints)
            contents = _results(job, data, trained, lease)
    except stop.Stop:
        if not stop.reason():
            left = stop.seconds_left(spec.limits.grace_seconds)
            checkpoints.wait(max(1.0, left - 10))
        raise
    _publish(job, lease, contents["files"])
    stop.check()
    stop.over()  # to end as stopped would have all of it done again
    checkpoints.clear()
    return Outcome(contents, str(job.folder / manifest.NAME))


def _stages_of_given(job: Job, lease: Lease, given: Path) -> Outcome:
    """The same without any training."""
    data = data_stage(job)
    settle_llama_cpp(job)
    contents = _results(job, data, given_stage(job, data, given), lease)
    _publish(job, lease, contents["files"])
    stop.over()
    return Outcome(contents, str(job.folder / manifest.NAME))


def _safe(stages: Stages, checkpoints: Checkpoints) -> str | None:
    """What another start goes on with: a checkpoint in the store, or whatever is in the folder
    where nothing else was asked for."""
    if checkpoints.remote or checkpoints.safe:
        return checkpoints.safe
    done = stages.done
    return f"the output of the stage {done[-1]} in {stages.folder}" if done else None


def _results(job: Job, data: Done, trained: Done, lease: Lease) -> dict[str, Any]:
    """What is made of the trained weights, verified; returns the manifest."""
    export = job.spec.export
    done = {"data": data, "train": trained, "adapter": adapter_stage(job, trained)}
    with sending_ahead(job.folder, job.ready.targets, lease) as ahead:
        ahead.add(done["adapter"])
        if export.merged:
            done["merge"] = merge_stage(job, done["adapter"], trained)
            ahead.add(done["merge"])
        if export.needs_llama_cpp:
            done["gguf"] = gguf_stage(job, done)
            ahead.add(done["gguf"])
        try:
            done["verify"] = verify_stage(job, done)
        except VerificationError:
            if (job.folder / "report" / ANSWERS).is_file():
                report(job, done)
            raise
    report(job, done)

    contents = manifest_of(job, done)
    add_cards(job, contents)
    write_whole(job.folder / manifest.NAME, contents)
    return contents


def _publish(job: Job, lease: Lease, files: list[FileEntry]) -> None:
    lease.require()
    observer = job.observer
    size = sum(file["size"] for file in files)

    def send(store: Store) -> None:
        def removed(names: list[str]) -> None:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            observer.warn(
                f"{store.url} had {len(names)} files of an earlier manifest that this one does not "
                f"list; they are removed: {', '.join(names[:NAMED])}{more}"
            )

        with observer.ticker(f"publishing to {store.url}", size, "bytes", "sent") as ticker:
            sent = publish(job.folder, files, store, ticker.advance, removed)
        observer.event("published", target=store.url, **sent)

    def failed(url: str, error: LorajobError) -> None:
        observer.event("publish_failed", target=url, error=error.message, what_to_do=error.hint)

    publish_to_all(job.ready.targets, send, failed)
