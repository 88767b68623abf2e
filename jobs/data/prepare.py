"""Sources -> labelled examples on disk, split into train and eval, with the counts people ask for.

Rows are read by one process and labelled by all cores, a chunk at a time, and go straight to Arrow
files: a million conversations cost disk, not memory.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.arrow import ExampleWriter, move_one, take_rows
from jobs.data.chunks import KEPT, Chunk, Recipe
from jobs.data.conversation import BadRow, Conversation
from jobs.data.files import DataFile, source_files
from jobs.data.formats import detect_format, to_conversation
from jobs.data.pool import CHUNK, Submit, cores, labelling
from jobs.data.read import Row, read_rows
from jobs.data.replay import draw
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import DataError, bullet_list
from jobs.secrets import redact
from jobs.spec import Data, RecordFormat, Replay, Source

Advance = Callable[[int], None]
FilesOf = Callable[[Source], Sequence[DataFile]]

SHOWN = 20  # bad rows that are told one by one


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    too_long: int = 0
    cut: int = 0
    bad: int = 0
    bad_shown: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)


def prepare(
    data: Data,
    recipe: Recipe,
    out: Path,
    tokenizer: ChatTokenizer | None = None,
    advance: Advance = lambda rows: None,
    files_of: FilesOf = source_files,
) -> dict[str, Any]:
    """Read, label and split everything into `out`; returns the summary that `check` shows.

    `files_of` knows the files of each source, also of one that had to be fetched.

    Writes train.arrow and eval.arrow (see jobs.data.arrow), order.npy where sources have weights,
    and first.json, the first conversations; where the spec has such, retention.arrow with
    retention.json, which says how many rows each source has, and replay.arrow. Raises DataError
    naming each row that cannot be used.
    """
    counts = Counts()
    share = data.eval if isinstance(data.eval, float) else 0.0
    kept: dict[str, list[Conversation]] = {"train": [], "eval": []}
    with (
        ExampleWriter(out / "train.arrow") as train,
        ExampleWriter(out / "eval.arrow") as held_out,
        labelling(recipe, tokenizer) as submit,
    ):

        def take(chunk: Chunk, number: int, sources: Sequence[Source], side: str) -> None:
            held = chunk.places < share if side == "train" else np.ones(len(chunk.places), bool)
            train.add(chunk.ids, chunk.lengths, chunk.spans, chunk.span_counts, chunk.places, ~held, number)  # fmt: skip
            held_out.add(chunk.ids, chunk.lengths, chunk.spans, chunk.span_counts, chunk.places, held, number)  # fmt: skip
            for place, conversation in chunk.conversations:
                is_held = side == "eval" or place < share
                kept["eval" if is_held else "train"].append(conversation)

        _label_all(data.train, "train", data, counts, submit, take, advance, files_of)
        if isinstance(data.eval, list):
            _label_all(data.eval, "eval", data, counts, submit, take, advance, files_of)
    if share and not held_out.rows and train.rows > 1:
        # A small set whose places all fall above the share: the lowest one is held out.
        move_one(train, held_out, int(np.argmin(train.places)))
    if not train.rows:
        raise _nothing_left(data, counts, held_out.rows, recipe.max_seq_length)
    order = _keep_order(data.train, train, recipe.seed, out)
    summary = _summary(counts, train, held_out, recipe.max_seq_length)
    held = held_out.places
    if data.retention or data.replay:
        with labelling(replace(recipe, cut_texts=True), tokenizer) as submit:
            side = _Side(data, counts, submit, advance, files_of)
            if data.retention:
                retained, left_out = side.label(
                    data.retention, "retention", out / "retention.arrow"
                )
                held = np.concatenate([held, retained.places])
                summary["retention"] = _retention(data.retention, retained, out)
                summary["retention_left_out"] = left_out
                summary["in_train_and_retention"] = int(
                    np.isin(retained.places, train.places).sum()
                )
                summary["longest"] = max(summary["longest"], int(retained.lengths.max()))
            if data.replay:
                others = int(train.trained[order].sum())
                summary["replay"] = _replay(data.replay, side, others, held, out)
                summary["longest"] = max(summary["longest"], summary["replay"]["longest"])
    conversations = {
        side: [{"messages": c.messages, "tools": c.tools} for c in found[:KEPT]]
        for side, found in kept.items()
    }
    (out / "first.json").write_text(json.dumps(conversations, ensure_ascii=False), "utf-8")
    return summary


def _nothing_left(data: Data, counts: Counts, held_out: int, max_seq_length: int) -> DataError:
    """What to say where no row can be trained on: why, and what would help."""
    nothing = "nothing is left to train on"
    if held_out and isinstance(data.eval, float):
        return DataError(
            f"{nothing}: all {held_out} conversations are held out for evaluation",
            f"lower data.eval, which is {data.eval:g}, or add data",
        )
    if not counts.too_long:
        return DataError(nothing, "name data that holds conversations or texts")
    # What has no whole answer that fits is not cut, and neither is a text.
    shorter = (
        "make the data shorter" if data.too_long == "truncate" else "set data.too_long to truncate"
    )
    return DataError(
        f"{nothing}: all {counts.too_long} are longer than {max_seq_length} tokens",
        f"raise model.max_seq_length, or {shorter}",
    )


@dataclass(frozen=True)
class _Side:
    """What is labelled beside the training and the evaluation data, and counted apart from them."""

    data: Data
    counts: Counts
    submit: Submit
    advance: Advance
    files_of: FilesOf

    def label(self, sources: list[Source], side: str, path: Path) -> tuple[ExampleWriter, int]:
        """Label all rows of the sources; returns how many had to be left out, too. Raises DataError
        where a source has none that can be used."""
        own = Counts()
        with ExampleWriter(path) as writer:

            def take(chunk: Chunk, number: int, sources: Sequence[Source], side: str) -> None:
                whole = np.ones(len(chunk.places), bool)
                writer.add(chunk.ids, chunk.lengths, chunk.spans, chunk.span_counts, chunk.places, whole, number)  # fmt: skip

            _label_all(
                sources, side, self.data, own, self.submit, take, self.advance, self.files_of
            )
        self.counts.sources += own.sources
        for number, source in enumerate(sources):
            if not (writer.sources == number).any():
                raise DataError(
                    f"data.{side}: no row of {source.source} can be used"
                    + (f": {own.too_long} are too long" if own.too_long else ""),
                    "raise model.max_seq_length, or name other data",
                )
        return writer, own.too_long + own.bad


def _retention(sources: list[Source], writer: ExampleWriter, out: Path) -> list[dict[str, Any]]:
    """Keep which rows are of which source; returns the summary."""
    found = [
        {
            "source": source.source,
            "rows": int((own := writer.sources == number).sum()),
            "tokens": int(writer.lengths[own].sum()),
            "measured_tokens": int(writer.trained[own].sum()),
        }
        for number, source in enumerate(sources)
    ]
    (out / "retention.json").write_text(json.dumps(found), "utf-8")
    return found


def _replay(
    replay: Replay, side: _Side, others: int, held: NDArray[np.float64], out: Path
) -> dict[str, Any]:
    """Draw what is trained beside `others` tokens, none of it `held`; returns the summary."""
    everything = out / "all.arrow"
    writer, left_out = side.label(replay.sources, "replay", everything)
    chosen = draw(writer, replay.sources, replay.share, others, held)
    if not chosen.any():
        raise DataError(
            "data.replay: all of it is held out for evaluation or retention", "name other data"
        )
    take_rows(everything, out / "replay.arrow", chosen)
    everything.unlink()
    trained = int(writer.trained[chosen].sum())
    return {
        "rows": int(chosen.sum()),
        "of": writer.rows,
        "left_out": left_out,
        "held_out": int(np.isin(writer.places, held).sum()),
        "tokens": int(writer.lengths[chosen].sum()),
        "trained_tokens": trained,
        "share": round(trained / (trained + others), 4),
        "longest": int(writer.lengths[chosen].max()),
    }


Take = Callable[[Chunk, int, Sequence[Source], str], None]


def _label_all(
    sources: list[Source],
    side: str,
    data: Data,
    counts: Counts,
    submit: Submit,
    take: Take,
    advance: Advance,
    files_of: FilesOf,
) -> None:
    for number, source in enumerate(sources):
        before = counts.rows
        forms: dict[str, RecordFormat] = {}  # of each file: a folder may hold several kinds
        waiting: deque[tuple[list[Row], Future[Chunk] | Chunk]] = deque()

        def finish(number: int = number, waiting: deque[tuple[list[Row], Any]] = waiting) -> None:
            rows, result = waiting.popleft()
            chunk = result.result() if isinstance(result, Future) else result
            _count(chunk, rows, counts, data)
            take(chunk, number, sources, side)
            advance(len(rows))

        for rows in _chunks(read_rows(source, files_of(source))):
            form = _form_of(rows, source, forms)
            waiting.append((rows, submit(rows, form, source.columns)))
            if len(waiting) > 2 * cores():
                finish()
        while waiting:
            finish()
        form_names = " and ".join(dict.fromkeys(forms.values()))
        rows_read = counts.rows - before
        counts.sources.append(
            {"source": source.source, "side": side, "format": form_names, "rows": rows_read}
        )
    _refuse_bad(counts, data.skip_bad_rows)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Up to CHUNK rows of one file at a time."""
    for _, of_file in groupby(rows, key=attrgetter("file")):
        while chunk := list(islice(of_file, CHUNK)):
            yield chunk


def _form_of(rows: Sequence[Row], source: Source, forms: dict[str, RecordFormat]) -> RecordFormat:
    """The format of the rows' file, seen in the first that can be read unless the spec says it."""
    file = rows[0].file
    if file not in forms:
        if source.format != "auto":
            forms[file] = source.format
        else:
            readable = (row for row in rows if not isinstance(row.value, BadRow))
            forms[file] = _detect(next(readable, rows[0]), source)
    return forms[file]


def _detect(row: Row, source: Source) -> RecordFormat:
    try:
        return detect_format(row.value, source.columns)
    except BadRow as reason:
        hint = "set this source's `format`, and `columns` where names differ"
        if row.value is reason:  # no line can be read
            hint = "each line is one JSON object; one array of all records is a .json file"
        raise DataError(f"{row.place}: {reason}", hint) from None


def _count(chunk: Chunk, rows: list[Row], counts: Counts, data: Data) -> None:
    counts.rows += len(rows)
    counts.cut += chunk.cut
    counts.too_long += len(chunk.too_long)
    if chunk.too_long and data.too_long == "fail":
        raise DataError(
            f"{rows[chunk.too_long[0]].place}: the conversation is longer than "
            "model.max_seq_length",
            "raise it, or set data.too_long to drop or truncate",
        )
    counts.bad += len(chunk.bad)
    for index, text in chunk.bad:
        reason = redact(text)
        counts.reasons[reason] = counts.reasons.get(reason, 0) + 1
        if len(counts.bad_shown) < SHOWN:
            counts.bad_shown.append(f"{rows[index].place}: {reason}")


def _refuse_bad(counts: Counts, allowed: float) -> None:
    if counts.bad <= allowed * counts.rows:
        return
    lines = counts.bad_shown
    if counts.bad == counts.rows and len(counts.reasons) == 1 and counts.rows > 1:
        lines = [f"all of them: {next(iter(counts.reasons))}"]  # the template's fault, most likely
    elif counts.bad > len(lines):
        lines = [*lines, f"... and {counts.bad - len(lines)} more"]
    rows = "1 row" if counts.bad == 1 else f"{counts.bad} rows"
    more = f", and {allowed:.1%} may be (data.skip_bad_rows)" if allowed else ""
    raise DataError(
        f"{rows} of {counts.rows} cannot be used{more}:\n{bullet_list(lines, limit=SHOWN + 1)}",
        "mend or remove them, or let some be skipped with data.skip_bad_rows",
    )


def _keep_order(
    sources: list[Source], train: ExampleWriter, seed: int, out: Path
) -> NDArray[np.int64]:
    """Which examples an epoch has, indices into train; kept where sources have weights: order.npy.

    A weight's whole part is so many copies, its fraction a sample that the seed draws.
    """
    if all(source.weight == 1 for source in sources):
        return np.arange(train.rows)
    random = np.random.default_rng(seed)
    indices = []
    for number, source in enumerate(sources):
        own = np.flatnonzero(train.sources == number)
        whole, fraction = divmod(source.weight, 1)
        sample = random.permutation(own)[: round(fraction * len(own))]
        indices += [own] * int(whole) + [np.sort(sample)]
    order = np.concatenate(indices).astype(np.int64)
    if not len(order):
        raise DataError(
            f"nothing is left to train on: the weights of data.train leave none of {train.rows} "
            "conversations",
            "raise the weights, or add data",
        )
    np.save(out / "order.npy", order)
    return order


def _summary(
    counts: Counts, train: ExampleWriter, held_out: ExampleWriter, max_seq_length: int
) -> dict[str, Any]:
    lengths = np.concatenate([train.lengths, held_out.lengths])
    tokens, trained = int(train.lengths.sum()), int(train.trained.sum())
    edges = [0, *(max_seq_length * step // 8 for step in range(1, 9))]
    histogram = np.histogram(lengths, bins=[*edges[:-1], edges[-1] + 1])[0]
    return {
        "rows": counts.rows,
        "sources": counts.sources,
        "bad_rows": counts.bad,
        "bad_reasons": counts.reasons,
        "bad_shown": counts.bad_shown,
        "dropped_too_long": counts.too_long,
        "truncated": counts.cut,
        "train_rows": train.rows,
        "eval_rows": held_out.rows,
        "train_tokens": tokens,
        "trained_tokens": trained,
        "trained_share": round(trained / tokens, 4),
        "longest": int(lengths.max()),
        "mean_length": round(float(lengths.mean()), 1),
        "near_limit": int((lengths > 0.95 * max_seq_length).sum()),
        "lengths": [
            {"up_to": up_to, "rows": int(rows)}
            for up_to, rows in zip(edges[1:], histogram, strict=True)
        ],
        "duplicates": len(train.places) - len(np.unique(train.places)),
        "in_train_and_eval": int(np.isin(held_out.places, train.places).sum()),
    }


def first_conversations(
    data: Data, count: int, files_of: FilesOf = source_files
) -> Iterator[tuple[str, Conversation | BadRow]]:
    """The first rows of the training sources, with their places: for people to look at."""
    rows = chain.from_iterable(
        ((row, source) for row in read_rows(source, files_of(source))) for source in data.train
    )
    forms: dict[str, RecordFormat] = {}
    for row, source in islice(rows, count):
        if isinstance(row.value, BadRow):
            yield row.place, row.value
            continue
        form = _form_of([row], source, forms)
        try:
            yield row.place, to_conversation(row.value, form, source.columns)
        except BadRow as reason:
            yield row.place, reason
