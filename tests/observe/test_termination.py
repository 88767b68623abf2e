"""The termination message: always JSON, never over the limit, and what matters is in it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import DataError, DoesNotFitError, LorajobError, Preempted, ServiceError
from jobs.observe import termination
from jobs.observe.termination import KEPT, LIMIT, outcome_of, write_termination
from jobs.secrets import redact

TOKEN = "hf_9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"
TEXTS = ["message", "what_to_do", "safe", "log", "name", "title"]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the message goes, as a person has set it."""
    path = tmp_path / "message"
    monkeypatch.setenv("LORAJOB_TERMINATION_LOG", str(path))
    return path


def written(path: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    path.unlink(missing_ok=True)
    write_termination(outcome)
    return read(path)


def read(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    assert 0 < len(raw) <= LIMIT

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(raw.decode(), parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_what_an_error_says_is_all_there(path: Path) -> None:
    error = DoesNotFitError("train: the GPU has 24 GB", "lower model.max_seq_length to 2048")
    outcome = outcome_of(
        error, name="support-bot", stage="train", step=120, log=Path("/runs/support-bot/logs"),
        safe="checkpoint of step 120 in s3://bucket/support-bot", seconds=61.2345,
    )  # fmt: skip
    assert written(path, outcome) == {
        "code": 5,
        "title": "it does not fit",
        "stage": "train",
        "step": 120,
        "message": "train: the GPU has 24 GB",
        "what_to_do": "lower model.max_seq_length to 2048",
        "safe": "checkpoint of step 120 in s3://bucket/support-bot",
        "log": "/runs/support-bot/logs",
        "name": "support-bot",
        "seconds": 61.2,
    }


@pytest.mark.parametrize(
    ("error", "code", "title"),
    [
        (None, 0, "done"),
        (DataError("x"), 3, "the data is wrong"),
        (ServiceError("x"), 10, "a service failed"),
        (Preempted("x"), 20, "stopped from outside"),
        (LorajobError("x"), 1, "internal error"),
        (ZeroDivisionError("x"), 1, "internal error"),
        (KeyboardInterrupt(), 130, "stopped from outside"),
    ],
)
def test_code_and_title_are_those_of_the_table(
    error: BaseException | None, code: int, title: str
) -> None:
    outcome = outcome_of(error)
    assert (outcome["code"], outcome["title"]) == (code, title)


def test_a_bug_is_told_by_its_kind_and_first_line() -> None:
    assert "bug in lorajob: ValueError: one" in outcome_of(ValueError("one\ntwo"))["message"]
    assert "two" not in outcome_of(ValueError("one\ntwo"))["message"]
    assert outcome_of(ValueError())["message"].endswith("lorajob: ValueError")
    assert outcome_of(ValueError("x"))["what_to_do"]

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert outcome_of(Mute())["message"].endswith("lorajob: Mute")


# Any character, half ones and controls too; and texts of one kind, which grow the most in JSON.
ANY = st.text(st.characters(exclude_categories=[]))
LONG = st.builds(
    lambda text, times: text * times, st.one_of(ANY, st.sampled_from('\0"\\é漢🙂\ud800')),
    st.integers(0, 3000),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(
        LONG, st.none(), st.booleans(), st.integers(),
        st.floats(), st.binary(max_size=9),
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(ANY, inner)),
    max_leaves=20,
)  # fmt: skip


# Long texts, on a machine that may be busy.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(
    code=st.integers(0, 255),
    stage=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    texts=st.fixed_dictionaries({}, optional=dict.fromkeys(TEXTS, LONG)),
    step=st.one_of(st.none(), st.integers(0, 2**40)),
)
def test_any_texts_give_json_that_fits_and_keep_code_and_stage(
    tmp_path_factory: pytest.TempPathFactory,
    code: int,
    stage: str,
    texts: dict[str, str],
    step: int | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAJOB_TERMINATION_LOG", str(path))
        found = written(path, {"code": code, "stage": stage, "step": step, **texts})
    assert (found["code"], found["stage"], found["step"]) == (code, redact(stage), step)
    assert set(found) == {"code", "stage", "step", *texts}
    for name, text in texts.items():
        whole = redact(text).encode("utf-8", "replace").decode()
        if found[name] != whole:
            head, mark, tail = found[name].partition(" [...] ")
            assert mark and whole.startswith(head) and whole.endswith(tail), name


@PATIENT
@given(st.dictionaries(st.one_of(ANY, st.sampled_from(list(KEPT))), VALUES))
def test_anything_at_all_gives_json_that_fits(
    tmp_path_factory: pytest.TempPathFactory, outcome: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAJOB_TERMINATION_LOG", str(path))
        written(path, outcome)


def test_what_every_field_keeps_fits_together(path: Path) -> None:
    found = written(path, dict.fromkeys(KEPT, "x" * 5000))
    for name, least in KEPT.items():
        assert least - 1 <= len(json.dumps(found[name])) <= 5000, name
        assert " [...] " in found[name]


def test_room_is_used_and_the_message_gives_way_first(path: Path) -> None:
    outcome = outcome_of(DataError("m" * 9000, "h" * 1500), stage="data")
    found = written(path, outcome)
    assert found["what_to_do"] == "h" * 1500
    assert path.stat().st_size == LIMIT
    found = written(path, {**outcome, "what_to_do": "h" * 9000})
    assert len(json.dumps(found["message"])) in range(KEPT["message"] - 1, KEPT["message"] + 1)
    assert len(found["what_to_do"]) > 2000, "the rest is for the one after it"


def test_characters_stay_whole(path: Path) -> None:
    found = written(path, outcome_of(DataError("漢字🙂" * 2000)))
    assert set(found["message"]) == set("漢字🙂 [.]")
    assert found["message"].startswith("漢字🙂漢") and found["message"].endswith("漢字🙂")
    assert path.stat().st_size > LIMIT - 8, "no more is cut than must be"


def test_a_long_list_loses_its_end_and_says_so(path: Path) -> None:
    safe = [f"checkpoint of step {step}" for step in range(1000)]
    found = written(path, outcome_of(DataError("m" * 4000), safe=safe))["safe"]
    assert found[:-1] == safe[: len(found) - 1]
    assert found[-1] == f"... and {1000 - len(found) + 1} more"
    assert len(found) > 10


def test_one_item_that_is_too_long_is_shortened_as_a_text(path: Path) -> None:
    found = written(path, outcome_of(safe=["x" * 9000]))["safe"]
    assert found.startswith('["xxx') and " [...] " in found and found.endswith('xxx"]')


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 10**5000, -(2**70)], ids=range(4))
def test_a_number_that_json_cannot_hold_becomes_a_text(number: float, path: Path) -> None:
    found = written(path, {"code": 3, "stage": "train", "step": number, "other": [number]})
    assert isinstance(found["step"], str) and found["other"] == [found["step"]]


def test_other_fields_go_before_the_known_ones(path: Path) -> None:
    found = written(path, {**outcome_of(DataError("m" * 2000)), "small": 1, "large": "x" * 2500})
    assert found["message"] == "m" * 2000
    assert found["small"] == 1
    assert "large" not in found


def test_secrets_are_not_in_it_whole_or_cut(path: Path) -> None:
    def message(before: int, text: str) -> str:
        outcome = outcome_of(DataError("x" * before + f" {text} " + "y" * 9000, TOKEN), log=TOKEN)
        found = written(path, outcome)
        assert found["log"] == found["what_to_do"] == "***"
        return str(found["message"])

    cut = message(9000, "").index(" [...] ")
    # Wherever the cut would go through the token, and in the part that stays.
    for before in [0, 100, *range(cut - len(TOKEN) - 5, cut + 5, 3)]:
        assert TOKEN[:6] not in message(before, TOKEN)
        assert TOKEN[-6:] not in message(before, TOKEN)
    assert TOKEN[:6] not in outcome_of(ValueError(TOKEN))["message"]


def test_a_value_without_a_text_costs_neither_code_nor_stage(path: Path) -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError

    assert written(path, {**outcome_of(DataError("x"), stage="data"), "log": Mute()}) == {
        "code": 3,
        "stage": "data",
    }
    endless: list[Any] = []
    endless.append(endless)
    assert written(path, {"code": 3, "stage": "data", "safe": endless})["code"] == 3


def test_without_the_variable_only_a_file_that_is_there_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAJOB_TERMINATION_LOG", raising=False)
    path = tmp_path / "termination-log"
    monkeypatch.setattr(termination, "DEFAULT", path)
    write_termination(outcome_of())
    assert not path.exists()
    path.write_text("what stood there before, longer than what comes" * 100)
    before = path.stat().st_ino
    write_termination(outcome_of(DataError("x")))
    assert read(path)["code"] == 3
    # Kubernetes mounts the file: another one in its place would not be read.
    assert path.stat().st_ino == before and list(tmp_path.iterdir()) == [path]


def test_the_default_is_where_kubernetes_reads() -> None:
    assert str(termination.DEFAULT) == "/dev/termination-log"


@pytest.mark.parametrize("where", ["folder", "missing/below", "pipe", "nul", "/dev/full"])
def test_a_place_that_cannot_be_written_raises_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # nobody reads it: opening it must not wait
    if where == "nul":  # no environment can hold such a name
        monkeypatch.setattr(os, "environ", {"LORAJOB_TERMINATION_LOG": "a\0b"})
    else:
        monkeypatch.setenv("LORAJOB_TERMINATION_LOG", str(tmp_path / where))
    writer = threading.Thread(target=write_termination, args=(outcome_of(),), daemon=True)
    writer.start()
    writer.join(10)
    assert not writer.is_alive()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_half_a_message_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, text: whole(file, text[: len(text) // 2]))
    write_termination(outcome_of(DataError("x")))
    assert path.read_bytes() == b""


def test_two_at_once_leave_one_whole_message(path: Path) -> None:
    outcomes = [outcome_of(DataError("m" * size), stage="data") for size in (0, 500, 5000)]
    for _ in range(30):
        writers = [threading.Thread(target=write_termination, args=(o,)) for o in outcomes]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert read(path)["code"] == 3
