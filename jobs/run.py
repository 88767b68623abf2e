"""The pipeline: data -> training -> adapter -> merged -> GGUF -> verification -> publication.

Each step is a stage, taken as it is when it was done before with the same inputs.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs import __version__, stop
from jobs.base_model import copy_tokenizer, repository_of, settle_stops, write_json
from jobs.data.chunks import Recipe
from jobs.data.prepare import prepare
from jobs.errors import DataError, LorajobError, ServiceError, VerificationError, bullet_list
from jobs.observe.answers_table import ANSWERS, write_answers
from jobs.observe.events import Observer
from jobs.observe.watchers import watch
from jobs.preflight import Ready, preflight
from jobs.secrets import guard_process
from jobs.spec import Lora, Spec, Train
from jobs.stages import RECORDS, Done, Stages, write_whole
from jobs.store import manifest
from jobs.store.base import KeyStore, Store
from jobs.store.hashing import FileEntry, file_entries, key_of, sha256_of
from jobs.store.lease import Lease, held_lease
from jobs.store.local import LocalStore
from jobs.store.publish import publish, publish_to_all
from jobs.train.checkpoints import MARKER, Checkpoints, kept_before
from jobs.train.engines import is_unsloth
from jobs.train.runtime import settle_threads

ENGINE_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo")
WORK = ".work"  # what the run needs of its own, below its folder; never published
CHECKPOINTS = f"{WORK}/checkpoints"
REACHED = 0.9  # of the wanted share of replay, below which it is said


def run(spec: Spec, folder: Path, observer: Observer, given: Path | None = None) -> dict[str, Any]:
    """Do the whole job in `folder`; returns the manifest. Raises a LorajobError.

    With an adapter `given` nothing is trained: it is what all else is made of.
    """
    start = time.monotonic()
    observer.reached.log = folder / "logs" / "run.jsonl"
    watch(spec, folder, folder / CHECKPOINTS, observer)
    ready = preflight(spec, folder, observer.warn, keep=True)
    observer.snapshot.retries = lambda: ready.connections.retries.count
    observer.keep_in(folder / "logs" / "run.jsonl")
    observer.event("run_start", version=__version__, name=spec.name, folder=str(folder))
    with ExitStack() as held:
        held.enter_context(_lease(LocalStore(folder / WORK), spec, observer))
        lease = held.enter_context(_lease(ready.keeper, spec, observer))
        stages = Stages(folder, observer)
        if given:
            contents = _stages_of_given(spec, ready, stages, lease, given)
        else:
            contents = _stages(spec, ready, stages, lease)
    observer.event(
        "run_done",
        seconds=round(time.monotonic() - start, 1),
        retries=ready.connections.retries.reasons,
        manifest=str(folder / manifest.NAME),
        published=[store.url for store in ready.targets],
    )
    return contents


def _lease(store: KeyStore | None, spec: Spec, observer: Observer) -> AbstractContextManager[Lease]:
    """The right to write there, which no other run has at the same time."""
    if store is None:
        return nullcontext(Lease())
    who = f"{spec.name} on {platform.node()}"

    def lost(reason: str) -> None:
        stop.because(ServiceError(reason, "look which other run uses the same place"))

    ttl = float(spec.limits.lease_seconds)
    return held_lease(store, who, observer.warn, lost, ttl, wait=1.5 * ttl)


def _stages(spec: Spec, ready: Ready, stages: Stages, lease: Lease) -> dict[str, Any]:
    """Everything from the data to the publication; returns the manifest."""
    folder, observer = stages.folder, stages.observer
    if contents := _published_before(spec, ready, folder):
        observer.event("already_published", where=", ".join(store.url for store in ready.targets))
        _forget_checkpoints(spec, ready, stages, lease, contents)
        return contents
    threads = settle_threads()
    before = kept_before(folder / CHECKPOINTS, ready.keeper)
    observer.reached.safe = lambda: before
    data = data_stage(spec, ready, stages)
    checkpoints = checkpoints_of(spec, ready, stages, data, lease)
    checkpoints.safe = before
    observer.reached.safe = lambda: _safe(stages, checkpoints)
    try:
        trained = _train(spec, ready, stages, data, threads, checkpoints)
        contents = _results(spec, ready, stages, data, trained, threads)
    except stop.Stop:
        if not stop.reason():
            left = stop.seconds_left(spec.limits.grace_seconds)
            checkpoints.wait(max(1.0, left - 10))
        raise
    lease.require()
    _publish(ready, folder, contents["files"], observer)
    stop.check()
    stop.over()  # to end as stopped would have all of it done again
    checkpoints.clear()
    return contents


def _stages_of_given(
    spec: Spec, ready: Ready, stages: Stages, lease: Lease, given: Path
) -> dict[str, Any]:
    """The same without any training."""
    threads = settle_threads()
    data = data_stage(spec, ready, stages)
    adapter = _given(spec, ready, stages, data, given)
    contents = _results(spec, ready, stages, data, adapter, threads)
    lease.require()
    _publish(ready, stages.folder, contents["files"], stages.observer)
    stop.over()
    return contents


def _published_before(spec: Spec, ready: Ready, folder: Path) -> dict[str, Any] | None:
    """The manifest, where every target holds all that this run would make, and this folder nothing.

    So it is for a start after one that was killed between publishing and its exit, with its disk
    lost: to train again would cost hours and change nothing.
    """
    if not ready.targets or any((folder / RECORDS).glob("*.json")):
        return None  # what is here is cheaper to go by, and is sent where it is missing
    found = [store.read_json(manifest.NAME) for store in ready.targets]
    said = [_said(contents) for contents in found]
    if not all(said) or set(said) != {_identity(spec, ready)}:
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


def _identity(spec: Spec, ready: Ready) -> str:
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


def _forget_checkpoints(
    spec: Spec, ready: Ready, stages: Stages, lease: Lease, contents: dict[str, Any]
) -> None:
    """Remove what the start that was killed had not removed yet; those of another training stay."""
    if ready.keeper is None:
        return
    checkpoints = checkpoints_of(spec, ready, stages, Done("", [], {}, 0, skipped=True), lease)
    ours = {**checkpoints.inputs, "data": contents["inputs"].get("prepared")}
    markers = [
        ready.keeper.read_json(entry.key)
        for entry in ready.keeper.entries()
        if entry.key.startswith("checkpoints/") and entry.key.endswith(f"/{MARKER}")
    ]
    if all(isinstance(found, dict) and found.get("inputs") == ours for found in markers):
        checkpoints.clear()


def _safe(stages: Stages, checkpoints: Checkpoints) -> str | None:
    """What another start goes on with: a checkpoint in the store, or whatever is in the folder
    where nothing else was asked for."""
    if checkpoints.remote or checkpoints.safe:
        return checkpoints.safe
    done = stages.done
    return f"the output of the stage {done[-1]} in {stages.folder}" if done else None


def _results(
    spec: Spec, ready: Ready, stages: Stages, data: Done, trained: Done, threads: int
) -> dict[str, Any]:
    """What is made of the trained weights, verified; returns the manifest."""
    observer = stages.observer
    done = {"data": data, "train": trained, "adapter": _adapter(ready, stages, trained)}
    if spec.export.merged:
        done["merge"] = _merge(spec, ready, stages, done["adapter"], trained)
    if spec.export.needs_llama_cpp:
        done["gguf"] = _gguf(spec, ready, stages, done, threads, observer)
    try:
        done["verify"] = _verify(spec, ready, stages, done, threads, observer)
    except VerificationError:
        if (stages.folder / "report" / ANSWERS).is_file():
            _report(spec, ready, stages, done)
        raise
    _report(spec, ready, stages, done)

    contents = _manifest(spec, ready, stages.folder, done, threads)
    _add_cards(spec, ready, stages.folder, contents)
    write_whole(stages.folder / manifest.NAME, contents)
    return contents


def _report(spec: Spec, ready: Ready, stages: Stages, done: dict[str, Done]) -> None:
    """The page about the run. One that cannot be made is a warning: what it tells of is there."""
    from jobs.observe.report import Stage, write_report

    made = [Stage(name, stage.key, stage.seconds, stage.result) for name, stage in done.items()]
    sources = [{"source": o.source.source, "commit": o.commit} for o in ready.origins.found]
    base = {"source": ready.base.source, "commit": ready.base.commit}
    inputs = {"base": base, "data": sources}
    try:
        write_report(
            stages.folder, spec, inputs, manifest.versions(), made, stages.folder / WORK / "data",
            ready.tokenizer.text_of,
        )  # fmt: skip
    except Exception as error:
        stages.observer.warn(f"the report cannot be made: {type(error).__name__}: {error}")


def _publish(ready: Ready, folder: Path, files: list[FileEntry], observer: Observer) -> None:
    size = sum(file["size"] for file in files)

    def send(store: Store) -> None:
        with observer.ticker(f"publishing to {store.url}", size, "bytes", "sent") as ticker:
            sent = publish(folder, files, store, ticker.advance)
        observer.event("published", target=store.url, **sent)

    def failed(url: str, error: LorajobError) -> None:
        observer.event("publish_failed", target=url, error=error.message, what_to_do=error.hint)

    publish_to_all(ready.targets, send, failed)


def data_stage(spec: Spec, ready: Ready, stages: Stages) -> Done:
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
                with stages.observer.ticker(name, missing, "bytes", "fetched") as ticker:
                    origin.files(ticker.advance)
        with stages.observer.ticker("reading data") as ticker:
            summary = prepare(
                spec.data, recipe, out, ready.tokenizer, ticker.advance, ready.origins.files_of
            )
        for text in data_warnings(summary, spec):
            stages.observer.event("warning", text=text)
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
        "code": _code_key("data"),
    }
    done = stages.run("data", inputs, work, f"{WORK}/data", note=_data_note)
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


def _code_key(package: str) -> str:
    """Changes with the code of a package, so that what an older version made is made again."""
    folder = Path(__file__).parent / package
    return key_of(
        [[f["path"], f["sha256"]] for f in file_entries(folder) if f["path"].endswith(".py")]
    )


def _whole_base(ready: Ready, observer: Observer) -> Path:
    """The base's folder with its weights, which are fetched when the first stage needs them."""
    missing = ready.base.missing_bytes()
    if not missing:
        return ready.base.whole()
    with observer.ticker(f"fetching {ready.base.source}", missing, "bytes", "fetched") as ticker:
        return ready.base.whole(ticker.advance)


def _train(
    spec: Spec, ready: Ready, stages: Stages, data: Done, threads: int, checkpoints: Checkpoints
) -> Done:
    def work(out: Path) -> dict[str, Any]:
        from jobs.train.engines import choose_engine, start_engine
        from jobs.train.runtime import device_name, quiet_libraries

        engine = choose_engine(spec.train.engine, device_name())
        start_engine(engine)
        from jobs.train.loop import train

        quiet_libraries()
        stages.observer.event("engine", engine=engine)
        return train(
            spec,
            _whole_base(ready, stages.observer),
            ready.tokenizer,
            stages.folder / WORK / "data",
            out,
            checkpoints,
            stages.observer,
        )

    packages = [p for p in ENGINE_PACKAGES if find_spec(p)]
    inputs = {
        "base": ready.base.content_key,
        "data": data.content_key,
        "load_in": spec.model.load_in,
        "lora": spec.lora.model_dump(mode="json"),
        "train": spec.train.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in packages},
        "code": _code_key("train"),
        "threads": threads,
    }
    return stages.run("train", inputs, work, f"{WORK}/train", note=_train_note)


def _given(spec: Spec, ready: Ready, stages: Stages, data: Done, given: Path) -> Done:
    """An adapter that was there before, in the place of one that was trained."""
    from jobs.export.adapter import weights_and_config

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.adapter import take
        from jobs.train.runtime import device_name, quiet_libraries

        quiet_libraries()
        base = _whole_base(ready, stages.observer)
        return take(
            given, base, spec.model.load_in, ready.tokenizer, stages.folder / WORK / "data", out,
            device_name(),
        )  # fmt: skip

    inputs = {
        "given": [sha256_of(path) for path in weights_and_config(given)],
        "base": ready.base.content_key,
        "load_in": spec.model.load_in,
        "data": data.content_key,
        "code": _code_key("export"),
    }
    return stages.run(
        "given", inputs, work, f"{WORK}/train",
        note=lambda r: f"rank {r['lora']['rank']}, {r['parameters']} parameters",
    )  # fmt: skip


def checkpoints_of(
    spec: Spec, ready: Ready, stages: Stages, data: Done, lease: Lease
) -> Checkpoints:
    """The checkpoints of this training. Versions and threads are no part of what it is made from: a
    run goes on with a newer lorajob, which may know more fields, and on a machine with other cores,
    though not to the same bits.
    """
    return Checkpoints(
        folder=stages.folder / CHECKPOINTS,
        inputs={
            "base": ready.base.content_key,
            "data": data.content_key,
            "load_in": spec.model.load_in,
            "max_seq_length": spec.model.max_seq_length,
            "lora": spec.lora.model_dump(mode="json"),
            "train": spec.train.model_dump(mode="json"),
        },
        defaults={
            "lora": Lora().model_dump(mode="json"),
            "train": Train().model_dump(mode="json"),
        },
        remote=ready.keeper,
        keep=spec.checkpoints.keep,
        if_changed=spec.checkpoints.if_changed,
        tell=stages.observer.warn,
        guard=lease.require,
    )


def _train_note(result: dict[str, Any]) -> str:
    note = f"{result['steps']} steps, loss {result['train_loss']:.3f}"
    if result["eval_loss"] is not None:
        note += f", eval loss {result['eval_loss_before']:.3f} -> {result['eval_loss']:.3f}"
    if result["stopped_early"]:
        note += f", stopped early of {result['max_steps']}"
    if result["best_step"] is not None:
        note += f", those of step {result['best_step']} kept"
    for kept in result["retention"]:
        note += f", {kept['source']} {kept['before']:.3f} -> {kept['after']:.3f}"
    return note


def _adapter(ready: Ready, stages: Stages, trained: Done) -> Done:
    def work(out: Path) -> dict[str, Any]:
        source = stages.folder / WORK / "train" / "adapter"
        shutil.copyfile(source / "adapter_model.safetensors", out / "adapter_model.safetensors")
        config = json.loads((source / "adapter_config.json").read_text("utf-8"))
        # What it was trained on, not where this machine kept that.
        config["base_model_name_or_path"] = repository_of(ready.base.source)
        config["revision"] = ready.base.commit
        write_json(out / "adapter_config.json", config)
        copy_tokenizer(ready.base.folder, ready.tokenizer, out)
        return {"size": (out / "adapter_model.safetensors").stat().st_size}

    inputs = {
        "trained": trained.content_key,
        "template": ready.tokenizer.template.source,
        "base": [ready.base.source, ready.base.commit],
    }
    return stages.run(
        "adapter", inputs, work, "adapter", note=lambda r: f"{r['size'] / 2**20:.1f} MiB"
    )


def _merge(spec: Spec, ready: Ready, stages: Stages, adapter: Done, trained: Done) -> Done:
    form, load_in = spec.export.merged or "16bit", spec.model.load_in
    quantized: list[str] | None = []
    if spec.export.into_dequantized(load_in, spec.lora.loftq):
        # In 8 bit they are all that bitsandbytes quantizes.
        quantized = trained.result["quantized_modules"] if load_in == "4bit" else None

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.merge import merge

        result = merge(
            _whole_base(ready, stages.observer), stages.folder / "adapter", quantized, out,
            stages.observer, form, load_in,
        )  # fmt: skip
        copy_tokenizer(ready.base.folder, ready.tokenizer, out)
        settle_stops(out, ready.tokenizer)
        return result

    inputs = {
        "adapter": adapter.content_key,
        "base": ready.base.content_key,
        "quantized": quantized,
        "load_in": load_in,
        "form": form,
        "code": _code_key("export"),
    }
    return stages.run(
        "merge", inputs, work, "merged",
        note=lambda r: f"{r['updated_tensors']} tensors updated, {r['form']} {r['dtype']}",
    )  # fmt: skip


def _gguf(
    spec: Spec, ready: Ready, stages: Stages, done: dict[str, Done], threads: int, observer: Observer
) -> Done:  # fmt: skip
    from jobs.export.llama.build import ensure_tools, tools_key

    folder, export = stages.folder, spec.export

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.comparison import compared_rows
        from jobs.export.gguf import Extras, calibration, make_gguf
        from jobs.export.verify_gguf import begins_with_bos
        from jobs.train.rows import load_rows

        data = folder / WORK / "data"
        said = json.loads((data / "first.json").read_text("utf-8"))
        render = ready.tokenizer.template.render
        rendered = [render(s["messages"], s["tools"]) for s in said["eval"] or said["train"]]
        extras = Extras(
            rows=compared_rows(data),
            tokens=calibration(load_rows(data / "train.arrow")) if export.imatrix else [],
            adapter=folder / "adapter" if export.adapter_gguf else None,
            max_bytes=int(export.gguf_max_gib * 2**30) if export.gguf_max_gib else None,
            begins_with_bos=begins_with_bos(ready.tokenizer, rendered),
        )
        return make_gguf(
            spec.name, folder / "merged", list(export.gguf), out, folder / "logs" / "llama.log",
            ensure_tools(observer), threads, observer, extras,
        )  # fmt: skip

    inputs = {
        "merged": done["merge"].content_key, "data": done["data"].content_key, "name": spec.name,
        "types": list(export.gguf), "imatrix": export.imatrix, "split": export.gguf_max_gib,
        "adapter": done["adapter"].content_key if export.adapter_gguf else None,
        "tools": tools_key(), "code": _code_key("export"),
    }  # fmt: skip
    return stages.run(
        "gguf", inputs, work, "gguf",
        note=lambda r: ", ".join(f"{k} {size / 2**20:.1f} MiB" for k, size in r["sizes"].items()),
    )  # fmt: skip


def _verify(
    spec: Spec,
    ready: Ready,
    stages: Stages,
    done: dict[str, Done],
    threads: int,
    observer: Observer,
) -> Done:
    folder = stages.folder

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.llama.build import ensure_tools
        from jobs.export.verify import Paths, verify
        from jobs.train.runtime import device_name, quiet_libraries

        quiet_libraries()
        (folder / "report" / ANSWERS).unlink(missing_ok=True)  # an earlier verification's
        first = json.loads((folder / WORK / "data" / "first.json").read_text("utf-8"))
        paths = Paths(
            base=_whole_base(ready, observer),
            data=folder / WORK / "data",
            adapter=folder / "adapter",
            probe=folder / WORK / "train" / "probe.safetensors",
            merged=folder / "merged" if spec.export.merged else None,
            gguf=folder / "gguf" if spec.export.needs_llama_cpp else None,
            log=folder / "logs" / "llama.log",
        )
        tools = ensure_tools(observer) if spec.export.needs_llama_cpp else None
        conversations = first["eval"] or first["train"]
        made = done["gguf"].result if "gguf" in done else None
        if is_unsloth():
            # unsloth has changed what transformers does in this process, and what others will load
            # has to be proven without it.
            with apart() as process:
                result, failures = process.submit(
                    verify, spec, paths, ready.tokenizer_files, conversations, tools, device_name(),
                    threads, None, made,
                ).result()  # fmt: skip
        else:
            result, failures = verify(
                spec, paths, ready.tokenizer_files, conversations, tools, device_name(), threads,
                observer, made,
            )  # fmt: skip
        write_answers(folder / "report", result, failures)  # also of a run that failed, to see why
        if failures:
            raise VerificationError(
                f"{len(failures)} checks failed, so nothing is published:\n{bullet_list(failures)}",
                f"read {folder / 'report' / 'answers.txt'}; if training was too short or too hot, "
                "change train.epochs or train.learning_rate",
            )
        return result

    inputs = {
        "made": {name: stage.content_key for name, stage in done.items()},
        "verify": spec.verify.model_dump(mode="json"),
        "code": _code_key("export"),
    }
    return stages.run("verify", inputs, work, note=_verify_note)


@contextmanager
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, which begins with nothing of this one."""
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_settle)
    try:
        yield process
    finally:
        process.shutdown(wait=False, cancel_futures=True)
        for child in list((process._processes or {}).values()):
            child.kill()


def _settle() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard_process()
    from jobs.train.runtime import quiet_libraries

    settle_threads()
    quiet_libraries()


def _verify_note(result: dict[str, Any]) -> str:
    return "loss " + ", ".join(f"{k} {s['loss']:.3f}" for k, s in result["subjects"].items())


def _add_cards(spec: Spec, ready: Ready, folder: Path, contents: dict[str, Any]) -> None:
    """Write the cards and the Modelfile, and put them into the manifest's files."""
    from jobs.export.card import cards, find_base_card, write_cards
    from jobs.export.modelfile import write_modelfile

    files: list[FileEntry] = contents["files"]

    def add(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        files.append({"path": name, "size": path.stat().st_size, "sha256": sha256_of(path)})

    if spec.export.gguf:
        recipe = write_modelfile(folder / "gguf", spec.name, spec.export.gguf, ready.tokenizer)
        if recipe:
            add(recipe)
    texts = cards(contents, find_base_card(ready.base))
    write_cards(folder, texts)
    for name in texts:
        add(folder / name)
    files.sort(key=lambda entry: entry["path"])


def _manifest(
    spec: Spec, ready: Ready, folder: Path, done: dict[str, Done], threads: int
) -> dict[str, Any]:
    files: list[FileEntry] = [
        entry
        for stage in done.values()
        for entry in stage.files
        if not entry["path"].startswith(WORK)
    ]
    files += file_entries(folder / "report", within=folder)
    return manifest.build(
        spec=spec.model_dump(mode="json"),
        inputs={
            "base": {"source": ready.base.source, "commit": ready.base.commit},
            "data": [
                {"source": o.source.source, "commit": o.commit, "files": o.contents()}
                for o in ready.origins.found
            ],
            "threads": threads,
            # One of a given adapter is not what a run of this spec would make.
            "identity": None if "given" in done["train"].result else _identity(spec, ready),
            "prepared": done["data"].content_key,
            "keys": {name: stage.key for name, stage in done.items()},
        },
        data=done["data"].result,
        stages={
            name: {"seconds": stage.seconds, "result": stage.result}
            for name, stage in done.items()
            if name != "data"
        },
        files=sorted(files, key=lambda entry: entry["path"]),
    )
