"""Publishing: who sees a manifest sees all that it lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import AccessError, ServiceError
from jobs.store.base import Advance, Store, no_advance
from jobs.store.hashing import FileEntry, file_entries
from jobs.store.local import LocalStore
from jobs.store.publish import publish, publish_to_all


class Recording(LocalStore):
    """A folder that notes what is done to it, and can fail on the way."""

    def __init__(self, folder: Path, fail_at: str | None = None) -> None:
        super().__init__(folder)
        self.done: list[str] = []
        self.fail_at = fail_at

    def put(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        advance: Advance,
        prefix: str = "",
        threads: int = 1,
    ) -> None:
        for file in files:
            if file["path"] == self.fail_at:
                raise AccessError(f"{file['path']} cannot be written")
            self.done.append(f"put {file['path']}")
            super().put(folder, [file], advance)

    def delete(self, keys: set[str]) -> None:
        self.done += [f"delete {key}" for key in sorted(keys)]
        super().delete(keys)


def keys(store: LocalStore) -> list[str]:
    return [entry.key for entry in store.entries()]


def make_run(folder: Path, **contents: str) -> list[FileEntry]:
    """A run's folder with these files, and the manifest over them."""
    for name, text in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wanted = {name.replace("__", "/") for name in contents}
    files = [entry for entry in file_entries(folder) if entry["path"] in wanted]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return files


def send(folder: Path, files: list[FileEntry], store: LocalStore) -> dict[str, int]:
    return publish(folder, files, store, no_advance)


def test_the_manifest_is_put_last(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", adapter__a="1", gguf__b="2")
    store = Recording(tmp_path / "out")
    assert send(tmp_path / "run", files, store) == {"sent": 2, "kept": 0}
    assert store.done == [
        "delete manifest.json", "put adapter/a", "put gguf/b", "put manifest.json",
    ]  # fmt: skip
    assert keys(store) == ["adapter/a", "gguf/b", "manifest.json"]


def test_publishing_again_sends_nothing(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", a="1", b="2")
    send(tmp_path / "run", files, LocalStore(tmp_path / "out"))
    store = Recording(tmp_path / "out")
    assert send(tmp_path / "run", files, store) == {"sent": 0, "kept": 2}
    assert store.done == []


def test_only_the_file_that_changed_is_sent_and_the_manifest_around_it(tmp_path: Path) -> None:
    send(tmp_path / "run", make_run(tmp_path / "run", a="1", b="2"), LocalStore(tmp_path / "out"))
    files = make_run(tmp_path / "run", a="1", b="3")
    store = Recording(tmp_path / "out")
    assert send(tmp_path / "run", files, store) == {"sent": 1, "kept": 1}
    assert store.done == ["delete manifest.json", "put b", "put manifest.json"]
    assert (tmp_path / "out" / "b").read_text() == "3"


def test_a_file_damaged_at_the_target_is_sent_again(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", a="1", b="2")
    send(tmp_path / "run", files, LocalStore(tmp_path / "out"))
    (tmp_path / "out" / "a").write_text("X")
    assert send(tmp_path / "run", files, LocalStore(tmp_path / "out")) == {"sent": 1, "kept": 1}
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_what_an_earlier_manifest_listed_goes_and_what_others_put_there_stays(
    tmp_path: Path,
) -> None:
    send(
        tmp_path / "run", make_run(tmp_path / "run", a="1", gguf__old="2"),
        LocalStore(tmp_path / "out"),
    )  # fmt: skip
    (tmp_path / "out" / "gguf" / "foreign").write_text("mine")
    files, removed = make_run(tmp_path / "run", a="1"), list[str]()
    for _ in range(2):  # the second finds nothing to do
        out = LocalStore(tmp_path / "out")
        publish(tmp_path / "run", files, out, no_advance, removed.extend)
    assert removed == ["gguf/old"]
    assert keys(LocalStore(tmp_path / "out")) == ["a", "gguf/foreign", "manifest.json"]


def test_a_failure_on_the_way_leaves_no_manifest_and_the_next_run_goes_on(tmp_path: Path) -> None:
    send(tmp_path / "run", make_run(tmp_path / "run", a="1", b="2"), LocalStore(tmp_path / "out"))
    files = make_run(tmp_path / "run", a="8", b="9")
    with pytest.raises(AccessError):
        send(tmp_path / "run", files, Recording(tmp_path / "out", fail_at="b"))
    assert keys(LocalStore(tmp_path / "out")) == ["a", "b"]
    assert send(tmp_path / "run", files, LocalStore(tmp_path / "out")) == {"sent": 1, "kept": 1}
    assert keys(LocalStore(tmp_path / "out")) == ["a", "b", "manifest.json"]


@pytest.mark.parametrize(
    "before", [[], 5, {}, {"files": None}, {"files": 5}, {"files": ["a", {}, None]}]
)
def test_a_manifest_there_that_is_none_of_ours_removes_nothing(tmp_path: Path, before: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "foreign").write_text("mine")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(before))
    files = make_run(tmp_path / "run", b="1")
    assert send(tmp_path / "run", files, LocalStore(tmp_path / "out")) == {"sent": 1, "kept": 0}
    assert keys(LocalStore(tmp_path / "out")) == ["b", "foreign", "manifest.json"]


def test_a_manifest_there_cannot_have_files_outside_its_folder_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    listed = {"files": [{"path": "../precious"}]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(listed))
    files = make_run(tmp_path / "run", b="1")
    with pytest.raises(AccessError, match="is no file in"):
        send(tmp_path / "run", files, LocalStore(tmp_path / "out"))
    assert (tmp_path / "precious").read_text() == "mine"


def test_every_byte_advances_the_progress_once(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", a="1", b="22", c="333")
    for _ in range(2):
        seen: list[int] = []
        publish(tmp_path / "run", files, LocalStore(tmp_path / "out"), seen.append)
        assert sum(seen) == 6


def test_a_target_that_fails_stops_none_of_the_others(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", a="1")
    stores = [
        LocalStore(tmp_path / "one"),
        Recording(tmp_path / "two", fail_at="a"),
        LocalStore(tmp_path / "three"),
    ]
    told: list[str] = []
    with pytest.raises(ServiceError, match="two: a cannot be written") as caught:
        publish_to_all(
            stores,
            lambda store: _send(tmp_path / "run", files, store),
            lambda url, error: told.append(url),
        )
    assert caught.value.exit_code == 10
    assert told == [str(tmp_path / "two")]
    assert keys(stores[0]) == keys(stores[2]) == ["a", "manifest.json"]
    assert keys(stores[1]) == []


def _send(folder: Path, files: list[FileEntry], store: Store) -> None:
    publish(folder, files, store, no_advance)
