"""Merging: base weights + adapter -> 16-bit or 4-bit weights, a piece of a tensor at a time.

The adapter was trained against the base as it was held while training. A quantized base is therefore
quantized and dequantized here exactly as bitsandbytes did it then, and the update is added to that:
merged into the original weights instead, the model is further from what was trained
(bench/results/merge_base.md). The sum is made in float32 and rounded once.

Several tensors are in work at a time, one in each thread, so that reading, reckoning and writing
overlap. What a thread holds is a few pieces, a 4-bit copy of its tensor where the base was quantized,
and its tensor's LoRA matrices: nothing of it grows with the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.base_model import INDEX, weight_files, write_json
from jobs.errors import VerificationError
from jobs.export.held import BLOCK, Nf4, nf4_tensors, through_int8, through_nf4
from jobs.export.layout import Layout, layout_of
from jobs.export.safetensors_stream import Entry, Reader, Writer
from jobs.export.updates import LowRank, Update, Updates
from jobs.observe.events import Observer, Ticker

Form = Literal["16bit", "4bit"]
LoadIn = Literal["4bit", "8bit", "16bit"]
Read = Callable[[int, int], torch.Tensor]

# Elements in a piece: with fewer, threads wait for Python's lock more than they reckon. A GPU wants
# more at once.
PIECE = {"cpu": 2**19, "cuda": 2**24}


def merge(
    base: Path, adapter: Path, quantized: list[str] | None, out: Path, observer: Observer,
    form: Form = "16bit", load_in: LoadIn = "4bit", dtype: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the merged model to `out`: weights, index, config and generation config.

    `quantized` names the modules that are to start from what `load_in` made of them; None stands for
    all that bitsandbytes quantizes. `dtype` is that of the result: unset, float16 where the base is
    float16, else bfloat16.

    Raises VerificationError where the adapter does not belong to the base, SpecError where it is of
    a kind that cannot be merged.
    """
    layout = layout_of(base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    dtype = dtype or _dtype(config)
    with ExitStack() as opened:
        files = {path.name: opened.enter_context(Reader(path)) for path in weight_files(base)}
        updates = opened.enter_context(closing(Updates(adapter, layout)))
        plan = _Plan(files, layout, updates)
        names = layout.linear if quantized is None else quantized
        job = _Job(
            layout=layout,
            updates=updates,
            dtype=dtype,
            form=form,
            load_in=load_in,
            held={layout.stored(f"{name}.weight", plan.there) for name in names},
            packed={layout.stored(f"{name}.weight", plan.there) for name in layout.linear},
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        index = _write(plan, job, out, observer)
    if (base / INDEX).is_file():
        before = json.loads((base / INDEX).read_text("utf-8")).get("metadata") or {}
        index["metadata"] = {**before, **index["metadata"]}
        index["metadata"].pop("total_parameters", None)  # packed ones are counted otherwise
        write_json(out / INDEX, index)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    if form == "4bit":
        config["quantization_config"] = _quantization(dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    return {"dtype": config["dtype"], "form": form, "updated_tensors": len(plan.updated)}


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the result comes from: the base's tensor, and what becomes of it."""

    reader: Reader
    name: str
    parameter: str  # its name in the model
    update: Update | None

    @property
    def entry(self) -> Entry:
        return self.reader.entries[self.name]


class _Plan:
    """Every tensor of the result, by file. Raises VerificationError where an update fits nowhere."""

    def __init__(self, files: dict[str, Reader], layout: Layout, updates: Updates) -> None:
        where = {name: file for file, reader in files.items() for name in reader.entries}
        self.there = set(where)
        self.untied = False
        of = {layout.stored(name, self.there): update for name, update in updates.of.items()}
        parameters = {layout.stored(name, self.there): name for name in updates.of}
        self.files: dict[str, dict[str, _Source]] = {
            file: {
                name: _Source(reader, name, parameters.get(name, name), of.get(name))
                for name in reader.entries
            }
            for file, reader in files.items()
        }
        for head, embedding in layout.tied.items():
            stored = layout.stored(embedding, self.there)
            if stored not in where:
                continue
            tied = updates.same(head, embedding) or (
                bool(updates.config.get("ensure_weight_tying")) and head not in updates.of
            )
            file = where.get(head, where[stored])
            if tied and head in where:
                self.files[file][head] = _Source(files[file], head, embedding, of.get(stored))
            elif not tied:
                # Trained apart, they are two matrices from now on.
                self.untied = True
                source = head if head in where else stored
                reader = files[where[source]]
                self.files[file][head] = _Source(reader, source, head, updates.of.get(head))
            of.pop(head, None)
        done = {name for sources in self.files.values() for name, s in sources.items() if s.update}
        if waiting := sorted(set(of) - done):
            raise VerificationError(
                f"the adapter has layers that the base does not have: {waiting[0]}",
                "merge it into the base model that it was trained on",
            )
        self.updated = done


@dataclass(frozen=True)
class _Job:
    """What is the same for all tensors of a merge."""

    layout: Layout
    updates: Updates
    dtype: torch.dtype
    form: Form
    load_in: LoadIn
    held: set[str]  # names in the base whose weights start from what `load_in` made of them
    packed: set[str]  # names in the base that go in 4 bit where the result does
    device: str

    def outputs(self, name: str, source: _Source) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Types and shapes of the tensors that stand for one in the result."""
        entry = source.entry
        if not entry.dtype.is_floating_point:
            return {name: (entry.dtype, entry.shape)}
        if self.form == "4bit" and name in self.packed:
            shape = entry.shape[::-1] if self.across(source) else entry.shape
            return {name + end: about for end, about in nf4_tensors(shape).items()}
        return {name: (self.dtype, entry.shape)}

    def across(self, source: _Source) -> bool:
        across = self.layout.across
        return source.parameter in across or f"{self.layout.prefix}{source.name}" in across


def _write(plan: _Plan, job: _Job, out: Path, observer: Observer) -> dict[str, Any]:
    """Write all files; returns their index."""
    threads = torch.get_num_threads()
    workers = 2 if job.device == "cuda" else threads
    total, weight_map = 0, {}
    pool = ThreadPoolExecutor(workers, "merge", initializer=torch.set_num_threads, initargs=(1,))
    closed: list[Future[None]] = []
    elements = sum(s.entry.count for sources in plan.files.values() for s in sources.values())
    try:
        with observer.ticker("merging", elements) as ticker:
            for file, sources in plan.files.items():
                outputs = {n: job.outputs(n, source) for n, source in sources.items()}
                writer = Writer(
                    out / file, {k: v for parts in outputs.values() for k, v in parts.items()}
                )
                total += writer.bytes
                weight_map.update(dict.fromkeys(writer.entries, file))
                tasks = {pool.submit(_tensor, n, s, job, writer, ticker) for n, s in _large_first(sources)}  # fmt: skip
                _finish(tasks)
                closed.append(pool.submit(writer.close))
            _finish(set(closed))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _large_first(sources: dict[str, _Source]) -> list[tuple[str, _Source]]:
    """So that no thread begins with the largest when the others are done."""
    return sorted(sources.items(), key=lambda item: -item[1].entry.count)


def _finish(tasks: set[Future[None]]) -> None:
    """Wait for all, or raise what the first that failed raises."""
    while tasks:
        done, tasks = wait(tasks, timeout=1, return_when=FIRST_COMPLETED)
        for task in done:
            task.result()


@torch.no_grad()
def _tensor(name: str, source: _Source, job: _Job, writer: Writer, ticker: Ticker) -> None:
    """Make one tensor of the result and write it."""
    entry, update = source.entry, source.update
    read: Read = lambda start, stop: source.reader.read(source.name, start, stop)  # noqa: E731
    held = source.name in job.held
    if update and update.taken:
        taken = update.taken
        _require_shape(source.name, job.updates.entries[taken].shape, entry.shape)
        read, held = lambda start, stop: job.updates.read(taken, start, stop), False
    if not entry.dtype.is_floating_point:
        writer.write(name, read(0, entry.count))
        return
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1
    rows = entry.count // columns if columns else 0
    form = job.load_in if held else "16bit"
    weight = _Weight(read, rows, columns, form, job.across(source), job.device)
    low = None
    if update and update.matrices:
        low = job.updates.matrices(update.matrices).to(job.device)
        _require_shape(source.name, (len(low.left), low.right.shape[1]), (rows, columns))
    packed = job.form == "4bit" and name in job.packed
    target: _Plain | _Packed = (
        _Packed(name, rows, columns, job, writer, job.across(source))
        if packed
        else _Plain(name, columns, job.dtype, writer)
    )
    ratio = _column_ratio(weight, low, job.device) if low and low.axis == 1 else None
    for start, stop in _pieces(rows, columns, job.device):
        piece = weight.rows(start, stop)
        if low:
            piece = low.add_to(piece, start)
            if ratio is not None:
                piece *= ratio
            elif low.magnitude is not None:
                norm = torch.linalg.vector_norm(piece, dim=1)
                piece *= (low.magnitude[start:stop] / norm).unsqueeze(1)
        if update and update.added:
            added = job.updates.read(update.added).float().to(job.device)
            _require_shape(source.name, (added.numel(),), entry.shape)
            scale = job.updates.scale(source.parameter.removesuffix(".bias"))
            piece += scale * added[start:stop].unsqueeze(1)
        target.put(start, piece)
        ticker.advance((stop - start) * columns)
    target.close()


class _Weight:
    """The weight that the update is added to, in float32, by rows."""

    def __init__(
        self, read: Read, rows: int, columns: int, form: LoadIn, across: bool, device: str
    ) -> None:
        self._read, self._columns, self._form, self._device = read, columns, form, device
        self._nf4: Nf4 | None = None
        self._whole: torch.Tensor | None = None
        if form != "16bit" and across:  # bitsandbytes quantizes it the other way round
            through = through_nf4 if form == "4bit" else through_int8
            whole = read(0, rows * columns).to(device).view(rows, columns)
            self._whole = through(whole.float().T.contiguous()).T
        elif form == "4bit":
            self._nf4 = Nf4((rows, columns), device)
            for start, stop in _pieces(rows, columns, device):
                piece = read(start * columns, stop * columns).to(device).float()
                self._nf4.put(start * columns, piece)
            self._nf4.settle()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy that may be changed."""
        if self._whole is not None:
            return self._whole[start:stop].clone()
        begin, end = start * self._columns, stop * self._columns
        if self._nf4:
            return self._nf4.take(begin, end).view(-1, self._columns)
        values = self._read(begin, end).to(self._device).view(-1, self._columns)
        return through_int8(values) if self._form == "8bit" else values.float()


class _Plain:
    """Where a tensor goes that stays as it is, but for its type."""

    def __init__(self, name: str, columns: int, dtype: torch.dtype, writer: Writer) -> None:
        self._name, self._columns, self._dtype, self._writer = name, columns, dtype, writer

    def put(self, start: int, rows: torch.Tensor) -> None:
        self._writer.write(self._name, rows.to(self._dtype), start * self._columns)

    def close(self) -> None:
        pass


class _Packed:
    """Where a tensor goes that is quantized: the same as loading the 16-bit result in 4 bit gives."""

    def __init__(
        self, name: str, rows: int, columns: int, job: _Job, writer: Writer, across: bool
    ) -> None:
        self._name, self._columns, self._dtype, self._writer = name, columns, job.dtype, writer
        self._nf4 = Nf4((columns, rows) if across else (rows, columns), job.device)
        self._kept: list[torch.Tensor] | None = [] if across else None

    def put(self, start: int, rows: torch.Tensor) -> None:
        rows = rows.to(self._dtype).float()
        if self._kept is not None:
            self._kept.append(rows)
        else:
            self._nf4.put(start * self._columns, rows.reshape(-1))

    def close(self) -> None:
        if self._kept is not None:
            self._nf4.put(0, torch.cat(self._kept).T.contiguous().view(-1))
        self._nf4.settle()
        for end, values in self._nf4.tensors(self._dtype).items():
            self._writer.write(self._name + end, values)


def _column_ratio(weight: _Weight, low: LowRank, device: str) -> torch.Tensor | None:
    """What DoRA scales each column by, where an output is a column: it takes all rows to know."""
    if low.magnitude is None:
        return None
    squares = torch.zeros(low.right.shape[1], dtype=torch.float64, device=device)
    for start, stop in _pieces(len(low.left), low.right.shape[1], device):
        squares += low.add_to(weight.rows(start, stop), start).double().square_().sum(0)
    return low.magnitude / squares.sqrt().float()


def _pieces(rows: int, columns: int, device: str) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows, each a whole number of blocks."""
    if not rows or not columns:
        return
    unit = BLOCK // math.gcd(BLOCK, columns)
    step = max(unit, PIECE[device] // columns // unit * unit)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _require_shape(name: str, adapter: tuple[int, ...], base: tuple[int, ...]) -> None:
    if adapter != base:
        raise VerificationError(
            f"the adapter's {name} is of shape {list(adapter)}, and the base's {list(base)}",
            "merge it into the base model that it was trained on",
        )


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """float16 stays float16; everything else becomes bfloat16."""
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def _quantization(dtype: torch.dtype) -> dict[str, Any]:
    """What config.json has to say for transformers to load 4-bit weights as they are."""
    from transformers import BitsAndBytesConfig

    config: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    return config
