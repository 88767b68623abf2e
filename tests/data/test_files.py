from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.data.files import endings, matches, source_files
from jobs.errors import AccessError, DataError, LorajobError, SpecError
from jobs.spec import Source


def paths(source: Source) -> list[Path]:
    return [file.path for file in source_files(source)]


def found(root: Path, name: str = "", **settings: Any) -> list[str]:
    source = Source(source=f"{root}/{name}" if name else str(root), **settings)
    return [str(path.relative_to(root)) for path in paths(source)]


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n")
    return root


def test_the_type_is_told_by_the_ending_before_the_compressions() -> None:
    assert endings(Path("a.b.JSONL.gz")) == (".jsonl", ".gz")
    assert endings(Path("a.parquet")) == (".parquet", "")
    assert endings(Path("a.tar.gz")) == ("", ".gz")
    assert endings(Path("jsonl")) == ("", "")


def test_a_folder_stands_for_the_files_below_it_that_are_known_and_not_hidden(
    tmp_path: Path,
) -> None:
    tree(tmp_path, "b.jsonl", "a.csv.gz", "sub/deep/c.parquet", "README.md", ".hidden.jsonl")
    tree(tmp_path, ".partial-x.jsonl", ".cache/d.jsonl", "sub/.partial-y/e.jsonl")
    assert found(tmp_path) == ["a.csv.gz", "b.jsonl", "sub/deep/c.parquet"]


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    data = tree(tmp_path / "data", "a.jsonl")
    elsewhere = tree(tmp_path / "elsewhere", "b.jsonl")
    (data / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    assert found(data) == ["a.jsonl", "link/b.jsonl"]


def test_a_glob_stands_for_the_known_files_it_matches(tmp_path: Path) -> None:
    tree(tmp_path, "b.jsonl", "a.jsonl", "c.md", "sub/d.jsonl", "sub/.e.jsonl")
    assert found(tmp_path, "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path, "*") == ["a.jsonl", "b.jsonl"]
    assert found(tmp_path, "**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/d.jsonl"]


def test_a_name_that_exists_is_no_glob(tmp_path: Path) -> None:
    tree(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert found(tmp_path, "a[1].jsonl") == ["a[1].jsonl"]


def test_relative_names_and_file_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "data/train.jsonl", "data/test.jsonl")
    monkeypatch.chdir(tmp_path)
    train = Path("data/train.jsonl")
    for name in ("data/train.jsonl", "./data/train.jsonl", "file://data/train.jsonl"):
        assert paths(Source(source=name)) == [train]
    assert paths(Source(source=f"file://{tmp_path}/data/train.jsonl")) == [tmp_path / train]
    for name in ("data", ".", "*/*", "data/*.jsonl", "**/*.jsonl"):
        assert paths(Source(source=name, split="train")) == [train]


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train.jsonl", ["train"]),
        ("train-00000-of-00002.parquet", ["train"]),
        ("train_sft.jsonl.gz", ["train", "train_sft"]),
        ("train2.csv", ["train"]),
        ("Train.jsonl", ["train"]),
        ("train/x.jsonl", ["train"]),
        ("de/train/x.jsonl", ["train"]),
        ("test/train.jsonl", ["train", "test"]),
        ("trainer.jsonl", []),
        ("a-train.jsonl", []),
        ("val.jsonl", ["validation", "val"]),
        ("valid-0.jsonl", ["validation"]),
        ("dev/x.jsonl", ["validation"]),
        ("validation.jsonl", ["validation"]),
        ("device.jsonl", []),
    ],
)
def test_a_file_is_of_a_split_by_its_name_or_its_folders(
    tmp_path: Path, name: str, splits: list[str]
) -> None:
    root = tree(tmp_path / "train" / "data", name)  # what is above the source says nothing
    for split in ("train", "train_sft", "test", "validation", "val"):
        for pattern in ("", "**/*"):
            if split in splits:
                assert found(root, pattern, split=split) == [name]
            else:
                with pytest.raises(AccessError, match=f"no file of the split {split}"):
                    found(root, pattern, split=split)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("missing.jsonl", AccessError, "no data file at .*missing.jsonl"),
        ("missing", AccessError, "no data file at .*missing"),
        ("a.jsonl/b.jsonl", AccessError, "no data file at"),
        ("x" * 300 + ".jsonl", AccessError, "xxx"),
        ("a.yaml", DataError, "a.yaml: files ending in .yaml are not read"),
        ("bare", DataError, "ending in nothing"),
        ("a.tar.gz", DataError, "ending in .gz"),
        ("pipe.jsonl", AccessError, "neither a file nor a folder"),
        ("others", AccessError, r"(?s)others has no data file; it has.*b\.md"),
        ("empty", AccessError, "no data file: it has no files"),
        ("*.parquet", AccessError, "no data file: it has no files"),
        ("*.yaml", AccessError, r"(?s)no data file; it has.*a\.yaml"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, name: str, kind: type[LorajobError], message: str
) -> None:
    tree(tmp_path, "a.jsonl", "a.yaml", "bare", "a.tar.gz", "others/b.md")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(kind, match=message) as caught:
        found(tmp_path, name)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("data/*.jsonl", ["data/b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]),
        ("data/**", ["data/b.jsonl", "data/deep/c.jsonl"]),
        ("data/?.jsonl", ["data/b.jsonl"]),
        ("data/[!b].jsonl", []),
    ],
)
def test_a_glob_over_keys_means_what_it_means_over_files(
    tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    keys = ["a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]
    assert [key for key in keys if matches(key, pattern)] == expected
    tree(tmp_path, *keys)
    if expected:
        assert found(tmp_path, pattern) == expected


def test_a_split_of_a_single_file_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    tree(tmp_path, "train.jsonl")
    with pytest.raises(SpecError, match="`split` picks files out of a folder"):
        found(tmp_path, "train.jsonl", split="train")


def test_what_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "data/a.jsonl")
    # Tests may run as root, who may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for name in ("data", "data/a.jsonl"):
        with pytest.raises(AccessError, match=r"a\.jsonl cannot be read: permission denied"):
            found(tmp_path, name)

    def refuse(place: str) -> Any:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AccessError, match="data cannot be read: Permission denied"):
        found(tmp_path, "data")
