"""A folder as a store: a key is absent or complete."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from jobs.errors import AccessError, DoesNotFitError, SpecError
from jobs.store.base import no_advance
from jobs.store.connect import Connections
from jobs.store.hashing import sha256_of
from jobs.store.local import LocalStore

OUTSIDE = ["../x", "a/../../x", "/etc/x", "..", "", ".", "a\0b"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def keys(store: LocalStore) -> list[str]:
    return [entry.key for entry in store.entries()]


def put(store: LocalStore, source: Path, key: str) -> None:
    """The file under this key, which need not be its name."""
    folder = source.parent / "to-send"
    path = folder / key
    if key.startswith("/") or ".." in key or not key or "\0" in key:
        path = source  # the key alone is wrong
    elif source.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
    store.put(folder, [{"path": key, "size": 0, "sha256": ""}], no_advance)


def has(store: LocalStore, key: str, size: int, sha256: str) -> bool:
    return bool(store.held([{"path": key, "size": size, "sha256": sha256}]))


def test_what_is_put_is_there_and_nothing_else(store: LocalStore, source: Path) -> None:
    assert keys(store) == []
    put(store, source, "sub/a")
    assert keys(store) == ["sub/a"]
    assert (store.folder / "sub" / "a").read_bytes() == b"content"
    assert [path.name for path in store.folder.rglob("*")] == ["sub", "a"]


def test_a_key_is_there_only_with_exactly_these_bytes(store: LocalStore, source: Path) -> None:
    put(store, source, "a")
    digest = sha256_of(source)
    assert has(store, "a", 7, digest)
    assert not has(store, "a", 8, digest)
    assert not has(store, "b", 7, digest)
    (store.folder / "a").write_bytes(b"CONTENT")
    assert not has(store, "a", 7, digest)


def fail_after_half(number: int) -> object:
    def copy(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:3])
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DoesNotFitError), (errno.EIO, AccessError)]
)
def test_a_put_that_fails_leaves_the_old_file_and_no_part_of_the_new(
    store: LocalStore,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
) -> None:
    put(store, source, "a")
    source.write_bytes(b"new content")
    monkeypatch.setattr(shutil, "copyfile", fail_after_half(number))
    for key in ("a", "b"):
        with pytest.raises(kind):
            put(store, source, key)
    assert (store.folder / "a").read_bytes() == b"content"
    assert [path.name for path in store.folder.rglob("*")] == ["a"]


def test_a_file_is_not_seen_under_its_key_while_it_is_copied(
    store: LocalStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copyfile(source, target)
        seen.append(keys(store))

    monkeypatch.setattr(shutil, "copyfile", copy)
    put(store, source, "a")
    assert seen == [[]]
    assert keys(store) == ["a"]


def test_what_a_killed_put_left_is_no_key_and_does_not_disturb(
    store: LocalStore, source: Path
) -> None:
    store.folder.mkdir()
    (store.folder / ".partial-a").write_bytes(b"cont")
    assert keys(store) == []
    put(store, source, "a")
    assert [path.name for path in store.folder.iterdir()] == ["a"]


def test_delete_removes_a_key_and_takes_one_that_is_not_there(
    store: LocalStore, source: Path
) -> None:
    put(store, source, "sub/a")
    store.delete({"sub/a"})
    store.delete({"sub/a"})
    store.delete({"never/there"})
    assert keys(store) == []


def folders(store: LocalStore) -> list[str]:
    found = store.folder.rglob("*")
    return sorted(p.relative_to(store.folder).as_posix() for p in found if p.is_dir())


def test_a_key_takes_the_folders_with_it_that_are_empty_then(
    store: LocalStore, source: Path
) -> None:
    for key in ("checkpoints/checkpoint-20/a", "checkpoints/checkpoint-20/deep/b", "gguf/c"):
        put(store, source, key)
    (store.folder / "gguf" / "mine").mkdir()
    store.delete({"checkpoints/checkpoint-20/a"})
    assert "checkpoints/checkpoint-20/deep" in folders(store)
    store.delete({"checkpoints/checkpoint-20/deep/b", "gguf/c"})
    assert folders(store) == ["gguf", "gguf/mine"]
    store.delete({"gguf/mine/never-there"})
    assert folders(store) == ["gguf", "gguf/mine"]
    put(store, source, "d")
    store.delete({"d"})
    assert store.folder.is_dir()


def test_a_folder_is_not_deleted_as_if_it_were_a_file(store: LocalStore, source: Path) -> None:
    put(store, source, "sub/a")
    with pytest.raises(AccessError):
        store.delete({"sub"})
    assert keys(store) == ["sub/a"]


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_key_outside_the_folder_is_refused(store: LocalStore, source: Path, key: str) -> None:
    store.folder.mkdir()
    with pytest.raises(AccessError, match="is no file in"):
        put(store, source, key)
    with pytest.raises(AccessError, match="is no file in"):
        store.delete({key})
    with pytest.raises(AccessError, match="is no file in"):
        has(store, key, 7, "")
    assert keys(store) == []


def test_json_that_is_none_reads_as_nothing(store: LocalStore) -> None:
    store.folder.mkdir()
    assert store.read_json("a.json") is None
    for junk in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (store.folder / "a.json").write_bytes(junk)
        assert store.read_json("a.json") is None
    (store.folder / "a.json").write_bytes(b'{"a": 1}')
    assert store.read_json("a.json") == {"a": 1}


def test_a_proof_of_writing_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "b")
    store.prove_writable(keep=True)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_is_told(source: Path) -> None:
    with pytest.raises(AccessError, match="cannot be written: Not a directory"):
        LocalStore(source / "x").prove_writable(keep=True)


def test_a_full_disk_does_not_pass_for_a_missing_right(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DoesNotFitError, match="the disk is full"):
        store.prove_writable(keep=True)


def test_a_url_of_a_file_is_a_folder_and_others_are_refused(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        store = Connections().target(url)
        assert isinstance(store, LocalStore)
        assert store.folder == tmp_path
    with pytest.raises(SpecError, match="none of s3://, hf:// and file://"):
        Connections().target("ftp://server/x")
