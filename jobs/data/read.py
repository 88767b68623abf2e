"""Sources -> rows: one pass over the files that never holds more than a piece of one of them.

A row is whatever one record of a file says, with the place it stands at for messages to name. A
line that is no JSON is a row too, one that cannot be used: the lines behind it are whole. In every
other kind of file what is broken breaks all that follows, and is an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from jobs.data.conversation import BadRow
from jobs.data.files import DataFile, endings, source_files
from jobs.data.values import kind_of
from jobs.errors import AccessError, DataError
from jobs.spec import Source

__all__ = ["Row", "read_rows", "source_files"]

CHUNK = 1 << 18  # characters of a .json array that are decoded at a time
SEEN = 1 << 20  # of a .json file that holds something else, to say what it is
BUFFER = 1 << 20
BATCH = 64  # rows of a parquet file
# csv refuses longer fields, so this is what a quote that is never closed can take up.
LONGEST_FIELD = 1 << 28

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(slots=True)
class Row:
    value: Any  # the BadRow itself, where a line is no JSON
    file: str
    unit: str
    number: int

    @property
    def place(self) -> str:
        """Where the row stands: "chats.jsonl, line 7", "chats.json, record 3"."""
        return f"{self.file}, {self.unit} {self.number}"


def read_rows(source: Source, files: Sequence[DataFile] | None = None) -> Iterator[Row]:
    """The rows of all files of a source, one file after another, `source.limit` at most.

    `files` are the source's where they had to be fetched.

    Raises AccessError where something is missing or not allowed, DataError where a file does not
    hold what its ending says; the message names the file, and the line where there is one.
    """
    rows = chain.from_iterable(map(_file_rows, files or source_files(source)))
    return islice(rows, source.limit)


def _file_rows(source: DataFile) -> Iterator[Row]:
    path, name = source.path, source.name
    kind, compression = endings(path)
    rows = None
    with _named(name), _open(path, compression) as file:
        _check_start(name, file)
        match kind:
            case ".json":
                rows = _array(file, name)
            case ".csv" | ".tsv":
                rows = _table(file, name, "," if kind == ".csv" else "\t")
            case ".parquet":
                rows = _parquet(path, file, name, bool(compression))
            case ".txt":
                rows = _texts(file, name)
            case _:
                rows = _lines(file, name)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{name} is empty: it has no rows", "fill it, or leave it out")
        yield first
        yield from rows


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What the file system and the decompressors raise, as errors that name the file."""
    try:
        yield
    except FileNotFoundError:
        raise AccessError(f"{path} is no longer there", "leave the data as it is") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # pyarrow's, about what is in the file
            raise _damaged(path, error) from None
        raise AccessError(f"{path} cannot be read: {error.strerror}", "check its rights") from None


def _damaged(path: str, error: Exception) -> DataError:
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return DataError(f"{path} is damaged or cut off: {reason}", "make or download it again")


def _open(path: Path, compression: str) -> io.BufferedReader:
    if compression == ".gz":
        return io.BufferedReader(gzip.open(path), BUFFER)
    if compression == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), BUFFER)
    return io.BufferedReader(io.FileIO(path), BUFFER)


def _check_start(path: str, file: io.BufferedReader) -> None:
    start = file.peek(len(LFS_POINTER))
    if not start:
        raise DataError(f"{path} is empty", "fill it, or leave it out")
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path} is a Git LFS pointer, not the data", "run `git lfs pull`")
    if start.startswith(UTF16):
        raise DataError(f"{path} is UTF-16, not UTF-8 text", "save it as UTF-8")


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends. A line ends at \\n and nowhere else: JSON strings
    may hold U+2028 and other characters that str.splitlines() splits at."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number} is not UTF-8 text (byte {error.start + 1} of the line)",
                "save the file as UTF-8",
            ) from None


def _lines(file: IO[bytes], name: str) -> Iterator[Row]:
    decode = json.JSONDecoder().decode
    for number, line in enumerate(_decoded(file, name), 1):
        try:
            value = decode(line)
        except json.JSONDecodeError as error:
            if not line.strip():
                continue
            value = BadRow(f"no valid JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            value = BadRow(f"cannot be read: {error}")
        yield Row(value, name, "line", number)


def _texts(file: IO[bytes], name: str) -> Iterator[Row]:
    for number, line in enumerate(_decoded(file, name), 1):
        if line.strip():
            yield Row({"text": line.rstrip("\r\n")}, name, "line", number)


def _table(file: IO[bytes], name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(_decoded(file, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            number, start = start, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                twice = sorted({field for field in header if header.count(field) > 1})
                if twice:
                    raise DataError(
                        f"{name}, line {number}: the header has more than one {twice[0]!r}",
                        "give each column a name of its own",
                    )
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name}, line {number} has {len(fields)} fields, and the header has "
                    f"{len(header)}",
                    'put a field that holds the separator, a quote or a line\'s end into "..."',
                )
            yield Row(dict(zip(header, fields, strict=True)), name, "line", number)
    except csv.Error as error:
        raise DataError(
            f"{name}, line {start}: no valid {'CSV' if delimiter == ',' else 'TSV'}: {error}",
            'put a field that holds a quote into "...", with each quote in it doubled',
        ) from None


def _parquet(path: Path, file: IO[bytes], name: str, compressed: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    number = 0
    with tempfile.TemporaryFile() if compressed else pyarrow.OSFile(str(path)) as plain:
        if compressed:  # parquet is read from its end
            shutil.copyfileobj(file, plain, BUFFER)
        try:
            # With the defaults a whole row group would be held.
            with ParquetFile(plain, pre_buffer=False, buffer_size=BUFFER) as parquet:
                for batch in parquet.iter_batches(BATCH):
                    for value in batch.to_pylist(maps_as_pydicts="strict"):
                        number += 1
                        yield Row(value, name, "row", number)
        except (pyarrow.ArrowException, ValueError, KeyError, OverflowError) as error:
            raise _damaged(f"{name} (after row {number})" if number else name, error) from None


def _array(file: IO[bytes], name: str) -> Iterator[Row]:
    """The records of a JSON array, of which no more than the present chunk is held."""
    text = _Json(file, name)
    if text.next() != "[":
        raise text.no_array()
    text.take()
    number = 0
    while text.next() != "]" or number:
        number += 1
        yield Row(text.value(number), name, "record", number)
        following = text.next()
        if following == "]":
            break
        if following != ",":
            raise text.error(text.position, "Expecting ',' delimiter")
        text.take()
    text.take()
    if text.next():
        raise text.error(text.position, "Extra data")
    if not number:
        raise DataError(f"{name} holds an empty array", "fill it, or leave it out")


class _Json:
    """A growing piece of a JSON text, from which values are decoded as they get whole."""

    # A number or a literal that the piece cuts off is at most this far from the piece's end when
    # the decoder refuses it; and a string that is cut off is refused as unterminated.
    NEAR_END = 16

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file = file
        self.name = name
        self.piece = ""
        self.position = 0  # in the piece
        self.line, self.column = 1, 1  # where the piece begins
        self.ended = False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is no white space, not taken; "" at the end."""
        while True:
            piece, position = self.piece, self.position
            while position < len(piece) and piece[position] in " \t\n\r":
                position += 1
            self.position = position
            if position < len(piece):
                return piece[position]
            if self.ended:
                return ""
            self._more()

    def take(self) -> None:
        self.position += 1

    def value(self, number: int) -> Any:
        """Decode the value that begins here."""
        self.next()
        while True:
            try:
                value, end = self._decode(self.piece, self.position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or (
                    error.pos + self.NEAR_END >= len(self.piece)
                )
                if self.ended or not cut_off:
                    raise self.error(error.pos, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise _unusual(f"{self.name}, record {number}", error) from None
            else:
                # A number, and nothing else, may go on where the piece ends.
                if (
                    self.ended
                    or end + self.NEAR_END < len(self.piece)
                    or not isinstance(value, int | float)
                ):
                    self.position = end
                    return value
            self._more()

    def _more(self) -> None:
        """Drop what is done with, and read on: the piece doubles while a value does not fit."""
        done = self.piece[: self.position]
        lines = done.count("\n")
        self.line += lines
        self.column = len(done) - done.rfind("\n") if lines else self.column + len(done)
        rest = self.piece[self.position :]
        self.position = 0
        content = self.file.read(max(CHUNK, len(rest)))
        self.ended = not content
        try:
            self.piece = rest + self._utf8.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            start = error.object[: error.start].decode()
            self.piece = rest + start
            line, column = self._place(len(self.piece))
            raise DataError(
                f"{self.name}, line {line}, column {column}: not UTF-8 text",
                "save the file as UTF-8",
            ) from None

    def _place(self, position: int) -> tuple[int, int]:
        lines = self.piece.count("\n", 0, position)
        if not lines:
            return self.line, self.column + position
        return self.line + lines, position - self.piece.rfind("\n", 0, position)

    def error(self, position: int, message: str) -> DataError:
        line, column = self._place(position)
        return DataError(
            f"{self.name}, line {line}, column {column}: no valid JSON: {message}",
            "a .json file is one array of objects; one object a line is .jsonl",
        )

    def no_array(self) -> DataError:
        """What the text holds instead of an array, as far as its first value says."""
        start = self.next()
        if not start:
            return DataError(f"{self.name} is empty", "fill it, or leave it out")
        hint = "put the records into [ ... ], or one a line into a .jsonl file"
        while not self.ended and len(self.piece) < SEEN:
            self._more()
        try:
            value, self.position = self._decode(self.piece, self.position)
            following = self.next()
        except json.JSONDecodeError as error:
            if self.ended:
                return self.error(error.pos, error.msg)
            return DataError(f"{self.name} holds no JSON array", hint)
        except (ValueError, RecursionError) as error:
            return _unusual(self.name, error)
        if following and start == "{":
            return DataError(
                f"{self.name} holds one object after another, not a JSON array",
                "if there is one a line, rename it to .jsonl",
            )
        if following:
            return self.error(self.position, "Extra data")
        if not isinstance(value, dict):
            return DataError(f"{self.name} holds {kind_of(value)}, not a JSON array", hint)
        fields = ", ".join(f"`{field}`" for field in islice(value, 8)) or "nothing"
        return DataError(
            f"{self.name} holds no JSON array but one object, with {fields} in it", hint
        )


def _unusual(place: str, error: Exception) -> DataError:
    """Valid JSON that Python does not take: a number of thousands of digits, deep nesting."""
    return DataError(f"{place} cannot be read: {error}", "mend or remove it")
