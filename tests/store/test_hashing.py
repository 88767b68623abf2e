"""Content hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jobs.store.hashing import file_entries, key_of, sha256_of


def test_a_files_hash_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_key_depends_on_values_and_not_on_the_order_of_fields() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    keys = [{"a": 1}, {"a": "1"}, {"a": None}, {"a": [1]}, {"b": 1}, {"a": True}, {"a": "é"}]
    assert len({key_of(value) for value in keys}) == len(keys)


def test_a_key_stays_the_same_between_versions() -> None:
    assert key_of({"é": [1, None]}) == hashlib.sha256('{"é":[1,null]}'.encode()).hexdigest()


def test_a_folder_is_told_file_by_file_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/z.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    entries = file_entries(tmp_path)
    assert [entry["path"] for entry in entries] == ["a.txt", "b.txt", "sub/z.txt"]
    assert [entry["size"] for entry in entries] == [5, 5, 9]
    assert entries[2]["sha256"] == hashlib.sha256(b"sub/z.txt").hexdigest()


def test_paths_can_be_told_from_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "run" / "out").mkdir(parents=True)
    (tmp_path / "run" / "out" / "a").write_text("x")
    entries = file_entries(tmp_path / "run" / "out", within=tmp_path / "run")
    assert [entry["path"] for entry in entries] == ["out/a"]
