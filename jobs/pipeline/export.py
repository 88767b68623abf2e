"""The stages after training: adapter, merged model, GGUF files, and the proof of them all."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs.base_model import copy_tokenizer, repository_of, settle_stops, write_json
from jobs.errors import VerificationError, bullet_list, in_field
from jobs.export.gguf import file_name
from jobs.observe.answers_table import ANSWERS, write_answers
from jobs.pipeline.job import Job, code_key
from jobs.secrets import guard_process
from jobs.spec import Spec
from jobs.stages import Done
from jobs.train.engines import is_unsloth
from jobs.train.runtime import settle_threads

UNQUANTIZED = ("f32", "f16", "bf16")


def settle_llama_cpp(job: Job) -> None:
    """Have llama.cpp built, and prove that it splits text as the tokenizer does: what cannot become a
    GGUF file is to be known before hours of training. Raises SpecError."""
    from jobs.export.llama.build import ensure_tools
    from jobs.export.tokenizer_proof import require_same_tokens

    export, ready = job.spec.export, job.ready
    if export.needs_llama_cpp:
        tools = ensure_tools(job.observer)
        with in_field(export.asks_for_llama_cpp):
            require_same_tokens(ready.base.folder, ready.tokenizer, tools, job.observer.warn)


def adapter_stage(job: Job, trained: Done) -> Done:
    """The adapter as peft loads it, with the tokenizer and template it was trained with."""
    ready = job.ready

    def work(out: Path) -> dict[str, Any]:
        source = job.trained / "adapter"
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
    return job.stages.run(
        "adapter", inputs, work, "adapter", note=lambda r: f"{r['size'] / 2**20:.1f} MiB"
    )


def merge_stage(job: Job, adapter: Done, trained: Done) -> Done:
    """The base's weights with the adapter in them."""
    spec, ready = job.spec, job.ready
    form, load_in = spec.export.merged or "16bit", spec.model.load_in
    quantized: list[str] | None = []
    if spec.export.into_dequantized(load_in, spec.lora.loftq):
        # In 8 bit they are all that bitsandbytes quantizes.
        quantized = trained.result["quantized_modules"] if load_in == "4bit" else None

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.merge import merge

        result = merge(
            job.whole_base(), job.folder / "adapter", quantized, out,
            job.observer, form, load_in,
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
        "code": code_key("export"),
    }
    return job.stages.run(
        "merge", inputs, work, "merged",
        note=lambda r: f"{r['updated_tensors']} tensors updated, {r['form']} {r['dtype']}",
    )  # fmt: skip


def gguf_stage(job: Job, done: dict[str, Done]) -> Done:
    """Every type of GGUF file that is asked for."""
    from jobs.export.llama.build import ensure_tools, tools_key

    spec, ready, folder, export = job.spec, job.ready, job.folder, job.spec.export

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.comparison import compared_rows
        from jobs.export.gguf import Extras, calibration, make_gguf
        from jobs.export.verify_gguf import begins_with_bos
        from jobs.train.rows import load_rows

        data = job.data
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
            spec.name, folder / "merged", list(export.gguf), out, job.llama_log,
            ensure_tools(job.observer), job.threads, job.observer, extras,
        )  # fmt: skip

    inputs = {
        "merged": done["merge"].content_key, "data": done["data"].content_key, "name": spec.name,
        "types": list(export.gguf), "imatrix": export.imatrix, "split": export.gguf_max_gib,
        "adapter": done["adapter"].content_key if export.adapter_gguf else None,
        "tools": tools_key(), "code": code_key("export"),
    }  # fmt: skip
    return job.stages.run(
        "gguf", inputs, work, "gguf",
        note=lambda r: ", ".join(f"{k} {size / 2**20:.1f} MiB" for k, size in r["sizes"].items()),
    )  # fmt: skip


def verify_stage(job: Job, done: dict[str, Done]) -> Done:
    """Load all that was made and prove it. Raises VerificationError."""
    spec, ready, folder, observer = job.spec, job.ready, job.folder, job.observer

    def work(out: Path) -> dict[str, Any]:
        from jobs.export.llama.build import ensure_tools
        from jobs.export.verify import Paths, verify
        from jobs.train.runtime import device_name, quiet_libraries

        quiet_libraries()
        (folder / "report" / ANSWERS).unlink(missing_ok=True)  # an earlier verification's
        first = json.loads((job.data / "first.json").read_text("utf-8"))
        paths = Paths(
            base=job.whole_base(),
            data=job.data,
            adapter=folder / "adapter",
            probe=job.trained / "probe.safetensors",
            merged=folder / "merged" if spec.export.merged else None,
            gguf=folder / "gguf" if spec.export.needs_llama_cpp else None,
            log=job.llama_log,
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
                    job.threads, None, made,
                ).result()  # fmt: skip
        else:
            result, failures = verify(
                spec, paths, ready.tokenizer_files, conversations, tools, device_name(), job.threads,
                observer, made,
            )  # fmt: skip
        write_answers(folder / "report", result, failures)  # also of a run that failed, to see why
        if failures:
            checks = "1 check" if len(failures) == 1 else f"{len(failures)} checks"
            raise VerificationError(
                f"{checks} failed, so nothing is published:\n{bullet_list(failures)}",
                f"read {folder / 'report' / 'answers.txt'}; {what_to_change(spec, failures)}",
            )
        return result

    inputs = {
        "made": {name: stage.content_key for name, stage in done.items()},
        "verify": spec.verify.model_dump(mode="json"),
        "code": code_key("export"),
    }
    return job.stages.run("verify", inputs, work, note=_verify_note)


def what_to_change(spec: Spec, failures: list[str]) -> str:
    """What of the spec is most likely at fault."""
    export = spec.export
    lossy = [kind for kind in export.gguf if kind not in UNQUANTIZED]

    def is_of_few_bits(kind: str, failure: str) -> bool:
        """Answers and loss are named by the type; what is said of the file may be any fault of it, but
        for the limits to what a type may lose."""
        of_file = failure.startswith(f"{file_name(spec.name, kind)}: ") and "verify.max_" in failure
        return of_file or failure.startswith(f"{kind}: ")

    at_fault = [kind for kind in lossy if any(is_of_few_bits(kind, each) for each in failures)]
    if not all(any(is_of_few_bits(kind, each) for kind in at_fault) for each in failures):
        return "if training was too short or too hot, change train.epochs or train.learning_rate"
    imatrix = "" if export.imatrix else ", or set export.imatrix"
    return (
        f"all but {', '.join(at_fault)} is right, which has too few bits for what was trained: take a "
        f"larger type in export.gguf{imatrix}"
    )


def _verify_note(result: dict[str, Any]) -> str:
    return "loss " + ", ".join(f"{k} {s['loss']:.3f}" for k, s in result["subjects"].items())


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
