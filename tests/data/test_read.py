from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data import read
from jobs.data.conversation import BadRow
from jobs.data.files import DataFile
from jobs.data.read import Row, read_rows, source_files
from jobs.errors import AccessError, DataError, LorajobError
from jobs.spec import Source

RECORDS = [
    {"q": "say \"hi\",\tor 'ho'", "a": "line\u2028separator \U0001f600"},
    {"q": "two\nlines", "a": "ünïcode"},
    {"q": "plain", "a": ""},
]


def rows(path: Path | str, **settings: Any) -> list[Row]:
    return list(read_rows(Source(source=str(path), **settings)))


def values(path: Path | str, **settings: Any) -> list[Any]:
    return [row.value for row in rows(path, **settings)]


def _lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def _array() -> bytes:
    return json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()


def _table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["q", "a"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


def _parquet(records: list[Any] = RECORDS) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def gz(content: bytes | bytearray) -> bytes:
    # Without the time: some are the names of tests, which must be the same in every process.
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


CONTENT: dict[str, bytes] = {
    ".jsonl": _lines(),
    ".ndjson": _lines(),
    ".json": _array(),
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet(),
}
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gz, ".zst": zstd}
PLACES = {
    ".json": ["record 1", "record 2", "record 3"],
    ".parquet": ["row 1", "row 2", "row 3"],
    ".csv": ["line 2", "line 3", "line 5"],
    ".tsv": ["line 2", "line 3", "line 5"],
}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_every_type_gives_the_same_rows_with_their_places(
    tmp_path: Path, kind: str, compression: str
) -> None:
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(PACK[compression](CONTENT[kind]))
    assert values(path) == RECORDS
    places = PLACES.get(kind, ["line 1", "line 2", "line 3"])
    assert [row.place for row in rows(path)] == [f"{path}, {place}" for place in places]
    # As for one that was fetched, which messages call by its address.
    name = f"s3://bucket/a{kind}{compression}"
    fetched = list(read_rows(Source(source=name), [DataFile(path, name)]))
    assert [row.value for row in fetched] == RECORDS
    assert [row.file for row in fetched] == [name] * len(RECORDS)


@pytest.mark.parametrize("compression", PACK)
def test_a_text_file_has_a_row_for_each_line_that_is_not_empty(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(PACK[compression](b"one\n\n \r\n  two \r\nlast"))
    assert values(path) == [{"text": "one"}, {"text": "  two "}, {"text": "last"}]
    assert [row.number for row in rows(path)] == [1, 4, 5]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": 1}\n \n{"a": 2}')
    assert [row.number for row in rows(path)] == [2, 4]
    path = tmp_path / "a.csv"
    path.write_bytes(b'\na\n\n"1\n\n"\n\n2\n')
    assert values(path) == [{"a": "1\n\n"}, {"a": "2"}]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    content = CONTENT[kind].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    found = [{k: v.replace("\r\n", "\n") for k, v in value.items()} for value in values(path)]
    assert found == RECORDS


def test_nested_columns_become_lists_and_objects(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": str(number)}], "meta": {"tags": ["a", None]}}
        for number in range(200)  # more than a batch
    ]
    path = tmp_path / "a.parquet"
    path.write_bytes(_parquet(records))
    assert values(path) == records
    assert rows(path)[-1].place == f"{path}, row 200"


def test_a_folder_is_read_file_by_file_up_to_the_limit(tmp_path: Path) -> None:
    for number in range(3):
        lines = "".join(f'{{"n": {10 * number + row}}}\n' for row in range(1, 4))
        (tmp_path / f"train-{number}.jsonl").write_text(lines)
    (tmp_path / "validation.json").write_text('[{"n": 99}]')
    numbers = [1, 2, 3, 11, 12, 13, 21, 22, 23]
    assert [value["n"] for value in values(tmp_path)] == [*numbers, 99]
    assert [value["n"] for value in values(tmp_path, split="train")] == numbers
    assert [value["n"] for value in values(f"{tmp_path}/train-*.jsonl", limit=4)] == numbers[:4]
    assert rows(tmp_path, limit=4)[-1].place == f"{tmp_path}/train-1.jsonl, line 1"
    assert len(source_files(Source(source=str(tmp_path), split="validation"))) == 1


def test_what_lies_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    (tmp_path / "b.json").write_text("broken")
    assert len(rows(tmp_path, limit=2)) == 2
    assert isinstance(rows(tmp_path, limit=3)[-1].value, BadRow)
    with pytest.raises(DataError, match=r"b\.json, line 1"):
        rows(tmp_path, limit=4)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', r"no valid JSON: Expecting value \(column \d+\)"),
        (b'{"a": 1} {"a": 2}', r"no valid JSON: Extra data \(column 10\)"),
        (b"[" * 100_000, "cannot be read: "),
        (b"1" * 5000, "cannot be read: "),
    ],
    ids=["cut off", "two", "deep", "long"],
)
def test_a_line_that_is_no_json_is_one_row_that_cannot_be_used(
    tmp_path: Path, name: str, line: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"a": 1}\n' + line + b'\n\n{"a": 4}\n')
    first, bad, last = rows(path)
    assert (first.value, last.value) == ({"a": 1}, {"a": 4})
    assert isinstance(bad.value, BadRow)
    assert re.match(reason, str(bad.value))
    assert bad.place == f"{path}, line 2"
    assert last.number == 4


TABLE = b"q,a\n1,2\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2 is not UTF-8 text \(byte 8 "),
        ("a.jsonl", b"\xff\xfe\x00", "UTF-16"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer"),
        ("a.json", b"", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b"\xef\xbb\xbf", "is empty"),
        ("a.json", b"[]", "empty array"),
        ("a.json", b'{"a": 1, "b": [2]}', "no JSON array but one object, with `a`, `b` in it"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "one object after another"),
        ("a.json", b'"text"', "holds a text, not a JSON array"),
        ("a.json", b'{"a": ', "line 1, column 7: no valid JSON: Expecting value"),
        ("a.json", b"hello", "line 1, column 1: no valid JSON"),
        ("a.json", b'{"a": [' + b"1, " * 500_000, "holds no JSON array"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "line 2, column 7: no valid JSON"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "line 2, column 2: .*Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n', "line 2, column 1: no valid JSON"),
        ("a.json", b"[1, 2", "line 1, column 6: no valid JSON: Expecting ',' delimiter"),
        ("a.json", b"[1, 2]\n3", "line 2, column 1: no valid JSON: Extra data"),
        ("a.json", b'[\n{"a": "x\xff"}]', "line 2, column 9: not UTF-8 text"),
        ("a.json", b'["x\xe2\x82', "line 1, column 4: not UTF-8 text"),
        ("a.json", b"[" * 100_000, "record 1 cannot be read"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "record 1 cannot be read"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"q,a\n", "is empty: it has no rows"),
        ("a.csv", TABLE + b"1,2,3\n", "line 3 has 3 fields, and the header has 2"),
        ("a.csv", TABLE + b'"1\n\n",2\n1\n', "line 6 has 1 fields, and the header has 2"),
        ("a.csv", TABLE + b'3,"4\n5,6\n', "line 3: no valid CSV: unexpected end of data"),
        ("a.csv", TABLE + b'3,"4"x\n', "line 3: no valid CSV"),
        ("a.csv", b"q,q\n1,2\n", "line 1: the header has more than one 'q'"),
        ("a.csv", TABLE + b"\xff,2\n", "line 3 is not UTF-8"),
        ("a.tsv", b'q\n"4\n', "no valid TSV"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"a\n\xff\n", "line 2 is not UTF-8"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1 or not", "damaged or cut off"),
        ("a.parquet", _parquet()[:-20], "damaged or cut off"),
        ("a.parquet", _parquet()[20:], "damaged or cut off"),
        ("a.parquet.gz", gz(b"junk"), "damaged or cut off"),
        ("a.jsonl.gz", b"", "is empty"),
        ("a.jsonl.gz", gz(b""), "is empty"),
        ("a.jsonl.gz", b'{"a": 1}\n', "damaged or cut off: Not a gzipped file"),
        ("a.jsonl.gz", gz(_lines())[:-12], "damaged or cut off"),
        ("a.jsonl.gz", gz(_lines())[:-1], "damaged or cut off"),
        ("a.json.gz", gz(_array())[:-12], "damaged or cut off"),
        ("a.jsonl.zst", b"", "is empty"),
        ("a.jsonl.zst", b'{"a": 1}\n', "damaged or cut off: ZSTD"),
        ("a.csv.zst", zstd(_table(","))[:-3], "damaged or cut off: Truncated"),
    ],
)
def test_wrong_content_says_where_and_why(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        rows(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_missing_file_is_told_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"missing\.jsonl"):
        read_rows(Source(source=str(tmp_path / "missing.jsonl")))


def test_a_file_that_goes_or_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    gone = read_rows(Source(source=str(path)))
    path.unlink()
    with pytest.raises(AccessError, match=r"a\.jsonl is no longer there"):
        next(gone)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    path.write_text("{}")
    monkeypatch.setattr(io, "FileIO", refuse)
    with pytest.raises(AccessError, match=r"a\.jsonl cannot be read: Permission denied"):
        rows(path)


def test_an_error_of_the_reader_stays_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(FileNotFoundError):
        for _ in read_rows(Source(source=str(path))):
            raise FileNotFoundError


# A .json array comes in pieces; wherever one ends, what is read is what json.load reads.

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
PADDING = st.text(" \t\r\n", max_size=30)


def read_in_pieces(content: bytes, chunk: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_bytes(content)
        with patch.object(read, "CHUNK", chunk):
            return values(path)


@settings(deadline=None)
@given(
    array=st.lists(JSON, min_size=1, max_size=6),
    chunk=st.integers(1, 60),
    ascii_only=st.booleans(),
    separators=st.tuples(PADDING, PADDING, PADDING, PADDING),
)
def test_an_array_in_pieces_is_what_json_reads(
    array: list[Any], chunk: int, ascii_only: bool, separators: tuple[str, str, str, str]
) -> None:
    one, two, three, four = separators
    text = json.dumps(
        array, ensure_ascii=ascii_only, separators=(f"{one},{two}", f"{three}:{four}")
    )
    content = f"{one}{text}{four}".encode()
    assert read_in_pieces(content, chunk) == json.loads(content)


@pytest.mark.parametrize("chunk", range(1, 40))
def test_numbers_escapes_and_characters_may_be_cut_anywhere(chunk: int) -> None:
    text = (
        '[12345, -1.5e+10, 1E-7, 0.5, true, false, null, NaN, -Infinity, "\\ud83d\\ude00\\n\\"", '
        '"\U0001f600é\u2028", [-1.5e+10, -Infinity], {"a" : -0.25E-3 , "\\u00e9" : "\\\\" }, 7 ]'
    )
    found = read_in_pieces(text.encode(), chunk)
    assert repr(found) == repr(json.loads(text))


@settings(deadline=None)
@given(
    array=st.lists(JSON, min_size=1, max_size=4),
    chunk=st.integers(1, 60),
    at=st.integers(0, 10_000),
    junk=st.sampled_from(["", ",", "]", "}", '"', "\n", "x", "\\", ":", "1"]),
)
def test_an_array_that_is_broken_in_pieces_has_the_place_that_json_says(
    array: list[Any], chunk: int, at: int, junk: str
) -> None:
    text = json.dumps(array, ensure_ascii=False, indent=0)
    at %= len(text)
    text = text[:at] + junk + text[at + 1 :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        expected = error
    except ValueError:  # an integer of too many digits
        return
    content = text.encode()
    if isinstance(expected, list) and expected:
        assert read_in_pieces(content, chunk) == expected
        return
    with pytest.raises(DataError) as caught:
        read_in_pieces(content, chunk)
    if text.startswith("[") and isinstance(expected, json.JSONDecodeError):
        place = f"line {expected.lineno}, column {expected.colno}:"
        if "trailing comma" not in expected.msg:  # whose place json puts at the comma
            assert place in caught.value.message


@pytest.mark.parametrize("name", [*(f"a{kind}" for kind in CONTENT), "a.txt", "a.json.gz"])
def test_junk_never_ends_in_anything_but_an_error_of_ours(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind, chance = path.suffixes[0], random.Random(name)
    for attempt in range(150):
        content = bytearray(CONTENT.get(kind, b"one\ntwo\n"))
        if name.endswith(".gz"):
            content = bytearray(gz(content))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content) + 1)
            match chance.randrange(3):
                case 0:
                    content[at : at + 1] = chance.randbytes(1)
                case 1:
                    del content[at : at + chance.randint(1, 9)]
                case _:
                    content[at:at] = chance.randbytes(chance.randint(1, 9))
        if attempt % 10 == 0:
            content = bytearray(chance.randbytes(chance.randint(1, 200)))
        path.write_bytes(content)
        try:
            rows(path)
        except LorajobError as error:
            assert name in error.message
            assert error.hint


def test_a_large_array_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    record = json.dumps({"text": "x" * 20_000})
    with path.open("w") as file:
        file.write(f"[{record}")
        for _ in range(1000):  # 20 MB
            file.write(f",\n{record}")
        file.write("]")
    found: Iterator[Row] = read_rows(Source(source=str(path)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in found) == 1001
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


def test_a_record_larger_than_a_piece_is_read_in_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 3_000_000}, {"text": "y"}]))
    assert [len(value["text"]) for value in values(path)] == [3_000_000, 1]


def test_reading_lines_does_not_import_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gz(b"{}\n"))
    program = (
        "import sys; from jobs.data.read import read_rows; from jobs.spec import Source; "
        f"list(read_rows(Source(source={str(path)!r}))); sys.exit('pyarrow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
