"""Stages: done once, taken again, and never half."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import AccessError, DataError, DoesNotFitError
from jobs.observe.events import Observer
from jobs.stages import RECORDS, Done, Stages


class Bench:
    """A run's folder with one stage, `make`, that writes two files and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.out = io.StringIO()
        self.stages = Stages(self.folder, Observer("json", self.out))
        self.record = self.folder / RECORDS / "make.json"
        self.building = self.folder / ".building-make"
        self.count = 0
        self.error: BaseException | None = None

    def work(self, out: Path) -> dict[str, Any]:
        assert list(out.iterdir()) == [], "a stage starts with an empty folder"
        self.count += 1
        (out / "a.txt").write_text("aaaa")
        (out / "sub").mkdir()
        (out / "sub" / "b.txt").write_text(f"{self.count:04}")
        if self.error:
            raise self.error
        return {"count": self.count, "pair": (1, 2)}

    def run(self, **inputs: Any) -> Done:
        return self.stages.run("make", {"x": 1, **inputs}, self.work, "out")

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.out.getvalue().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_stage_leaves_its_output_a_record_and_nothing_else(bench: Bench) -> None:
    done = bench.run()
    assert not done.skipped
    assert done.result == {"count": 1, "pair": [1, 2]}
    assert [entry["path"] for entry in done.files] == ["out/a.txt", "out/sub/b.txt"]
    assert json.loads(bench.record.read_text())["key"] == done.key
    kept = {path.relative_to(bench.folder).parts[0] for path in bench.folder.rglob("*")}
    assert kept == {"out", Path(RECORDS).parts[0]}


def test_a_stage_is_taken_as_it_is_when_its_inputs_are_the_same(bench: Bench) -> None:
    first, second = bench.run(), bench.run()
    assert second.skipped
    assert bench.count == 1
    assert (second.key, second.files, second.result) == (first.key, first.files, first.result)
    assert bench.events() == ["stage_start", "stage_done", "stage_skipped"]


def test_a_stage_is_redone_when_an_input_changes(bench: Bench) -> None:
    bench.run()
    assert not bench.run(x=2).skipped
    assert not bench.run().skipped
    assert bench.count == 3


def test_its_output_has_another_key_when_it_has_other_content(bench: Bench) -> None:
    assert bench.run().content_key != bench.run(x=2).content_key


def damage_missing(bench: Bench) -> None:
    (bench.folder / "out" / "a.txt").unlink()


def damage_size(bench: Bench) -> None:
    (bench.folder / "out" / "a.txt").write_text("aaa")


def damage_content(bench: Bench) -> None:
    (bench.folder / "out" / "a.txt").write_text("aaab")


def damage_kind(bench: Bench) -> None:
    damage_missing(bench)
    (bench.folder / "out" / "a.txt").mkdir()


@pytest.mark.parametrize("damage", [damage_missing, damage_size, damage_content, damage_kind])
def test_a_stage_is_redone_when_a_file_is_not_as_it_left_it(bench: Bench, damage: Any) -> None:
    bench.run()
    damage(bench)
    assert not bench.run().skipped
    assert (bench.folder / "out" / "a.txt").read_text() == "aaaa"


@pytest.mark.parametrize(
    "junk",
    [b"", b"{", b"[]", b"5", b"null", b"\xff\x00", b"{}", b'{"key": 1}',
     b'{"key": "KEY", "files": 5, "result": {}, "seconds": 1}',
     b'{"key": "KEY", "files": ["out/a.txt"], "result": {}, "seconds": 1}',
     b'{"key": "KEY", "files": [{"path": "out/a.txt"}], "result": {}, "seconds": 1}',
     b'{"key": "KEY", "files": [{"path": 5, "size": 4}], "result": {}, "seconds": 1}'],
)  # fmt: skip
def test_a_stage_is_redone_when_its_record_is_garbage(bench: Bench, junk: bytes) -> None:
    key = bench.run().key
    bench.record.write_bytes(junk.replace(b"KEY", key.encode()))
    assert not bench.run().skipped
    assert bench.run().skipped


def test_a_stage_that_fails_leaves_no_output_and_no_record(bench: Bench) -> None:
    bench.error = DataError("row 7 is wrong", "mend it")
    with pytest.raises(DataError, match="row 7"):
        bench.run()
    assert [path for path in bench.folder.rglob("*") if path.is_file()] == []
    assert not bench.building.exists()
    assert bench.events() == ["stage_start", "stage_failed"]
    bench.error = None
    assert bench.run().result["count"] == 2


def test_a_stage_that_fails_takes_the_record_of_an_earlier_one_with_it(bench: Bench) -> None:
    bench.run()
    bench.error = DataError("wrong")
    with pytest.raises(DataError):
        bench.run(x=2)
    assert not bench.record.exists()


def test_a_bug_in_a_stage_is_not_told_as_anything_else(bench: Bench) -> None:
    bench.error = ZeroDivisionError("division by zero")
    with pytest.raises(ZeroDivisionError):
        bench.run()
    assert not bench.record.exists()
    assert bench.events() == ["stage_start", "stage_failed"]


def test_a_stage_that_is_interrupted_is_redone(bench: Bench) -> None:
    bench.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert not bench.record.exists()
    assert not (bench.folder / "out").exists()
    bench.error = None
    assert not bench.run().skipped


def test_what_a_killed_stage_left_is_not_taken_over(bench: Bench) -> None:
    bench.building.mkdir(parents=True)
    (bench.building / "half").write_text("half")
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / "stale").write_text("stale")
    done = bench.run()
    assert not done.skipped
    assert sorted(path.name for path in (bench.folder / "out").iterdir()) == ["a.txt", "sub"]
    assert not bench.building.exists()


def test_a_stage_killed_before_its_record_was_whole_is_redone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True)
        path.with_name(f".partial-{path.name}").write_text('{"key":')
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr("jobs.stages.write_whole", killed)
        with pytest.raises(SystemExit):
            bench.run()
    assert (bench.folder / "out" / "a.txt").exists()
    assert not bench.run().skipped
    assert bench.run().skipped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/weights"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_is_told_as_such(bench: Bench, error: Exception) -> None:
    bench.error = error
    with pytest.raises(DoesNotFitError, match="the disk is full") as caught:
        bench.run()
    assert caught.value.exit_code == 5
    assert caught.value.hint is not None
    assert not bench.record.exists()
    assert bench.events() == ["stage_start", "stage_failed"]


def test_a_refused_write_names_the_file(bench: Bench) -> None:
    bench.error = PermissionError(errno.EACCES, "Permission denied", "some/file")
    with pytest.raises(AccessError, match="some/file cannot be written: Permission denied"):
        bench.run()


def test_a_file_that_went_away_is_named(bench: Bench) -> None:
    bench.error = FileNotFoundError(errno.ENOENT, "No such file", "run/merged/config.json")
    with pytest.raises(AccessError, match=r"run/merged/config\.json is gone"):
        bench.run()


def test_a_runs_folder_that_was_removed_is_told(bench: Bench) -> None:
    def work(out: Path) -> dict[str, Any]:
        shutil.rmtree(bench.folder)
        raise RuntimeError("some library's words for it")

    with pytest.raises(AccessError, match="was removed while the run used it"):
        bench.stages.run("make", {}, work, "out")


def test_a_stage_without_output_is_kept_by_its_record_alone(bench: Bench) -> None:
    def look(out: Path) -> dict[str, Any]:
        (out / "scratch").write_text("x")
        return {"seen": True}

    first = bench.stages.run("look", {}, look)
    second = bench.stages.run("look", {}, look)
    assert (first.skipped, second.skipped) == (False, True)
    assert second.result == {"seen": True}
    assert [path.name for path in bench.folder.rglob("scratch")] == []
