from __future__ import annotations

from pathlib import Path

import pytest

from jobs.data.read import read_rows
from jobs.errors import AccessError, DataError, LorajobError


def test_lines_and_arrays_give_the_same_rows_with_their_places(tmp_path: Path) -> None:
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": 1}\n\n{"a": "line\u2028separator"}\n')
    array.write_text('[{"a": 1}, {"a": "line\u2028separator"}]')
    assert [row.value for row in read_rows(str(lines))] == [r.value for r in read_rows(str(array))]
    assert [row.place for row in read_rows(str(lines))] == [f"{lines}, line 1", f"{lines}, line 3"]
    assert [row.place for row in read_rows(str(array))] == [
        f"{array}, record 1",
        f"{array}, record 2",
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert [row.value for row in read_rows(str(path))] == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", b"", DataError, "is empty"),
        ("a.jsonl", b" \n\n", DataError, "is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', DataError, "line 2, column 7: no valid JSON"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', DataError, "line 2, column 7: no valid JSON"),
        ("a.json", b"[]", DataError, "empty array"),
        ("a.json", b'{"a": 1}', DataError, "no JSON array"),
        ("a.txt", b"hello", DataError, ".txt"),
        ("a.jsonl", b"\xff\xfe\x00", DataError, "no UTF-8"),
        ("missing.jsonl", None, AccessError, "no data file"),
    ],
)
def test_what_cannot_be_read_says_where_and_why(
    tmp_path: Path, name: str, content: bytes | None, kind: type[LorajobError], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        list(read_rows(str(path)))
    assert name in caught.value.message
    assert caught.value.hint
