"""What is told of a run when its stages are done: the report, the cards and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.pipeline.job import WORK, Job
from jobs.pipeline.published import identity
from jobs.stages import Done
from jobs.store import manifest
from jobs.store.hashing import FileEntry, file_entries, sha256_of


def report(job: Job, done: dict[str, Done]) -> None:
    """The page about the run. One that cannot be made is a warning: what it tells of is there."""
    from jobs.observe.report import Stage, write_report

    ready = job.ready
    made = [Stage(name, stage.key, stage.seconds, stage.result) for name, stage in done.items()]
    sources = [{"source": o.source.source, "commit": o.commit} for o in ready.origins.found]
    base = {"source": ready.base.source, "commit": ready.base.commit}
    inputs = {"base": base, "data": sources}
    try:
        write_report(
            job.folder, job.spec, inputs, manifest.versions(), made, job.data,
            ready.tokenizer.text_of,
        )  # fmt: skip
    except Exception as error:
        job.observer.warn(f"the report cannot be made: {type(error).__name__}: {error}")


def manifest_of(job: Job, done: dict[str, Done]) -> dict[str, Any]:
    """What the manifest says of the run and of each file that will be published."""
    ready = job.ready
    files: list[FileEntry] = [
        entry
        for stage in done.values()
        for entry in stage.files
        if not entry["path"].startswith(WORK)
    ]
    files += file_entries(job.folder / "report", within=job.folder)
    return manifest.build(
        spec=job.spec.model_dump(mode="json"),
        inputs={
            "base": {"source": ready.base.source, "commit": ready.base.commit},
            "data": [
                {"source": o.source.source, "commit": o.commit, "files": o.contents()}
                for o in ready.origins.found
            ],
            "threads": job.threads,
            # One of a given adapter is not what a run of this spec would make.
            "identity": None if "given" in done["train"].result else identity(job.spec, ready),
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


def add_cards(job: Job, contents: dict[str, Any]) -> None:
    """Write the cards and the Modelfile, and put them into the manifest's files."""
    from jobs.export.card import cards, find_base_card, write_cards
    from jobs.export.modelfile import write_modelfile

    spec, ready, folder = job.spec, job.ready, job.folder
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
