"""TensorBoard's files: one value a step, however often a run was stopped."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from jobs.observe.tensorboard import TensorBoard


def step(number: int, loss: float | None = None) -> dict[str, float]:
    return {"step": number, "of": 99, "loss": loss or 1 / number, "learning_rate": 1e-3,
            "grad_norm": 0.5, "tokens_per_second": 10.0, "memory_bytes": 3 * 2**30}  # fmt: skip


def trained(folder: Path, steps: Sequence[int], resumed: int | None = None, loss: float | None = None) -> None:  # fmt: skip
    """What one start of a run tells."""
    board = TensorBoard(folder / "tensorboard", folder / "checkpoints")
    board.hear("stage_start", {"stage": "train"})
    if resumed:
        board.hear("resumed", {"checkpoint": f"checkpoint-{resumed}"})
    for number in steps:
        board.hear("train_step", step(number, loss))
    board.hear("eval", {"step": steps[-1], "eval_loss": 0.25})
    board.close()


def records(file: Path) -> Iterator[Event]:
    """TFRecord: length, its checksum, the event, its checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        yield event
        at += 12 + length + 4


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them: files by name, and from a restart on nothing older of its steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in records(file):
            if event.session_log.status == SessionLog.START:
                for name in found:
                    found[name] = [(at, value) for at, value in found[name] if at < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {name: values for name, values in found.items() if values}


def test_the_curves_are_there_by_step(tmp_path: Path) -> None:
    trained(tmp_path, [1, 2, 4])
    found = shown(tmp_path)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert found["eval/loss"] == [(4, 0.25)]
    assert found["memory/process_gib"] == [(1, 3.0), (2, 3.0), (4, 3.0)]
    assert set(found) == {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss",
                          "speed/tokens_per_second", "memory/process_gib"}  # fmt: skip


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    trained(tmp_path, range(1, 9))  # killed at 8, and the last checkpoint is of 5
    time.sleep(1.1)  # files are named by the second
    trained(tmp_path, range(6, 12), resumed=5, loss=4.0)
    found = shown(tmp_path)
    assert [at for at, _ in found["train/loss"]] == list(range(1, 12))
    assert [value for at, value in found["train/loss"] if at > 5] == [4.0] * 6
    assert [at for at, _ in found["eval/loss"]] == [11]


def test_another_training_in_the_same_folder_takes_the_place_of_the_first(tmp_path: Path) -> None:
    trained(tmp_path, range(1, 9))
    time.sleep(1.1)
    trained(tmp_path, [1, 2], loss=7.0)
    assert shown(tmp_path)["train/loss"] == [(1, 7.0), (2, 7.0)]


def test_on_another_machine_the_checkpoint_tells_what_was_before(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    history = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "eval_loss": 8.5}]
    (checkpoint / "progress.json").write_text(json.dumps({"history": history}))
    trained(tmp_path, [3, 4], resumed=2, loss=7.0)
    found = shown(tmp_path)
    assert found["train/loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 7.0)]
    assert found["eval/loss"] == [(2, 8.5), (4, 0.25)]


def test_what_a_model_still_knows_has_a_curve_for_each_source(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard", tmp_path)
    for at, loss in ((0, 1.0), (9, 1.5)):
        board.hear("retention", {"step": at, "source": "wiki", "tokens": 3, "before": 1.0, "loss": loss})  # fmt: skip
    board.close()
    assert shown(tmp_path) == {"retention/wiki": [(0, 1.0), (9, 1.5)]}


def test_a_run_that_trains_nothing_leaves_no_files(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard", tmp_path)
    board.hear("run_start", {"name": "x", "version": "1"})
    board.hear("run_done", {"seconds": 1})
    board.close()
    assert not (tmp_path / "tensorboard").exists()
