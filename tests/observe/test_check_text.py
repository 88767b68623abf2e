"""What `check` prints: what is trained can be told in a pipe too, and waiting is no silence."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml

from jobs.observe.events import Observer
from tests.conftest import BASE, lorajob

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}
TOKEN = "hf_9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"


def spec_below(folder: Path, base: str) -> str:
    (folder / "chats.jsonl").write_text(json.dumps(ROW) + "\n")
    tree = {"name": "t", "model": {"base": base}, "data": {"train": "chats.jsonl"}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    return "spec.yaml"


def test_what_is_trained_is_marked_where_there_are_no_colours(tmp_path: Path) -> None:
    arguments = ("check", spec_below(tmp_path, str(BASE)), "--work", "runs", "--rows", "1")
    plain = lorajob(*arguments, cwd=tmp_path)
    assert plain.code == 0, plain.err
    assert "what is trained between [[ and ]]:" in plain.out
    assert "<|im_start|>assistant\n    [[Ahoy<|im_end|>]]" in plain.out
    assert plain.out.count("[[") == 2, "the heading and the answer, and nothing of the prompt"
    coloured = lorajob(*arguments, cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    assert "what is trained in green:" in coloured.out
    assert "[[" not in coloured.out
    assert "\x1b[32mAhoy" in coloured.out


def test_check_says_that_it_waits_and_does_not_promise_to_go_on(tmp_path: Path) -> None:
    result = lorajob(
        "check", spec_below(tmp_path, "owner/name"), "--work", "runs", cwd=tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9", LORAJOB__LIMITS__RETRY_MINUTES="0.1",
    )  # fmt: skip
    assert result.code == 10
    first, *_, last = result.err.splitlines()
    assert first.startswith("waiting: ")
    assert "trying again in" in first
    assert last == "  -> see that it can be reached from here, then check again"
    assert result.out == ""


@pytest.mark.parametrize("log_format", ["json", "terminal"])
def test_a_notice_is_shown_although_the_observer_is_quiet_and_holds_no_secret(
    log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stream = StringIO()
    with Observer(log_format, stream, quiet=True) as observer:  # type: ignore[arg-type]
        observer.warn("for the log alone")
        observer.notice(f"the Hub with {TOKEN}: timed out")
    assert "waiting" in stream.getvalue()
    assert "timed out" in stream.getvalue()
    assert TOKEN not in stream.getvalue()
    assert "for the log alone" not in stream.getvalue()
