"""The report: complete, honest, escaped, without secrets, and the same when it is made again."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.data.labels import label
from jobs.data.prepare import first_conversations
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import AccessError
from jobs.observe.report import KEPT_POINTS, kept, render_report, warnings_of
from jobs.observe.report_page import number, size, table
from jobs.observe.report_rows import SHOWN, coloured, example_rows
from tests.observe.runs import MEASURED, answers_of, history_of, make_run, spec_of

TOKEN = "hf_9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"
SECTIONS = ["verdict", "answers", "training", "exports", "data", "time", "warnings", "about"]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser makes of it: text by section, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.links: list[str] = []
        self.trained: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.links += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "action") and v
        ]
        assert not any(name.startswith("on") for name in found), found
        if tag not in VOID:
            self.open.append((tag, found.get("id") or ""))
            if tag == "span" and found.get("class") == "trained":
                self.trained.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self.handle_data(" ")
        assert self.open.pop()[0] == tag

    def handle_data(self, text: str) -> None:
        for _, name in self.open:
            if name:
                self.texts.setdefault(name, []).append(text)

    def text(self, section: str) -> str:
        return " ".join("".join(self.texts.get(section, [])).split())


def page_of(folder: Path) -> Page:
    return Page((folder / "report" / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "a-run", tokenizer)


@pytest.fixture
def again(run: Path, tmp_path: Path) -> Path:
    """A folder whose data are prepared already."""
    shutil.copytree(run / ".work", tmp_path / "a-run" / ".work")
    return tmp_path / "a-run"


def test_every_section_is_there_and_says_what_the_run_said(run: Path) -> None:
    page = page_of(run)
    assert [name for name in page.texts if name in SECTIONS] == SECTIONS
    assert "✓ verified" in page.text("verdict")
    assert "102" in page.text("data")
    for text in ("before I do not know.", "after merged GGUF q8_0 ✓ Mira I am Mira."):
        assert text in page.text("answers")
    assert "Loss, logarithmic training held out" in page.text("training")
    for title in (
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
        "Memory of the process, GiB",
    ):
        assert title in page.text("training"), title
    assert re.search(r"GGUF q8_0 0\.0431 4\.0 MiB 3,753\.2", page.text("exports"))
    assert "train 2 min 05 s" in page.text("time")
    assert "cost" not in page.text("time")
    assert page.text("warnings") == "Warnings None."
    assert "learning_rate: 0.0002" in page.text("about")


def test_nothing_is_loaded_from_anywhere_and_no_script_runs(run: Path) -> None:
    text = (run / "report" / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?!#)[\w/]", text)
    assert "default-src 'none'" in text


def test_it_is_far_below_a_megabyte_also_of_a_long_run(again: Path, tokenizer: ChatTokenizer) -> None:  # fmt: skip
    make_run(again, tokenizer, steps=40000)
    sizes = {file.name: file.stat().st_size for file in (again / "report").iterdir()}
    assert sizes["report.html"] < 300_000
    assert sizes["report.json"] < 500_000


def test_what_a_model_says_is_text_and_no_markup(run: Path) -> None:
    page = page_of(run)
    assert "<script>alert(1)</script>" in page.text("answers")
    assert "What is <b>bold</b> & what is not?" in page.text("answers")
    assert "that & this" in page.text("answers")


def test_the_same_run_gives_the_same_bytes_and_can_be_made_again_from_its_figures(
    run: Path, again: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    make_run(again, tokenizer)
    files = {file.name: file.read_bytes() for file in (run / "report").iterdir()}
    assert {file.name: file.read_bytes() for file in (again / "report").iterdir()} == files
    alone = tmp_path / "published"  # where nothing else is
    (alone / "report").mkdir(parents=True)
    shutil.copy(run / "report" / "report.json", alone / "report")
    assert render_report(alone) == alone / "report" / "report.html"
    for name in ("report.html", "loss.svg", "loss.png"):
        assert (alone / "report" / name).read_bytes() == files[name], name


def test_a_second_start_leaves_it_as_it_is(again: Path, tokenizer: ChatTokenizer) -> None:
    """Though it warns of other things: what was published is not published anew."""
    make_run(again, tokenizer)
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (again / "report").glob("report.*")}  # fmt: skip
    make_run(again, tokenizer, events=({"event": "warning", "text": "again"},))
    after = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (again / "report").glob("report.*")}  # fmt: skip
    assert after == before


def test_a_run_that_failed_says_so_on_top_with_every_reason(
    again: Path, tokenizer: ChatTokenizer
) -> None:
    make_run(again, tokenizer)
    failures = ("q8_0: its answer lacks 'Mira'", "merged: <nothing> was merged")
    make_run(again, tokenizer, answers=answers_of("I am nobody."), failures=failures)
    page = page_of(again)
    verdict = page.text("verdict")
    assert "✗ failed its verification" in verdict
    assert "verified" not in verdict.replace("failed its verification", "")
    for text in failures:
        assert text in verdict
    assert "✗ lacks Mira I am nobody." in page.text("answers")
    assert json.loads((again / "report" / "answers.json").read_text())["failures"] == [*failures]


def test_an_answer_that_did_not_stop_is_marked(again: Path, tokenizer: ChatTokenizer) -> None:
    answers = answers_of()
    answers["subjects"]["q8_0"]["answers"][0]["stopped"] = False
    make_run(again, tokenizer, answers=answers)
    text = page_of(again).text("answers")
    assert "after merged ✓ Mira I am Mira. GGUF q8_0 ✓ Mira did not stop by itself" in text


def test_secrets_are_in_no_file_of_the_report(
    again: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    events = ({"event": "warning", "text": f"refused: Bearer {TOKEN}"},)
    make_run(again, tokenizer, events=events, failures=(f"cannot read with {TOKEN}",))
    for file in (again / "report").glob("report.*"):
        text = file.read_text("utf-8")
        assert TOKEN not in text, file.name
        assert "refused" in text


def test_cost_is_told_where_a_price_is(again: Path, tokenizer: ChatTokenizer) -> None:
    make_run(again, tokenizer, spec_of(observe={"price_per_gpu_hour": 3.6}))
    page = page_of(again)
    assert "2 min 16 s in all, 0.14 at 3.60 an hour" in page.text("time")  # 136.5 s
    assert "0.14 cost" in page.text("verdict")


def test_forgetting_and_quantization_have_tables_where_they_were_measured(
    again: Path, tokenizer: ChatTokenizer
) -> None:
    assert not page_of(make_run(again, tokenizer)).text("retention")
    forgotten = [{"source": "wiki", "tokens": 900, "before": 2.0, "after": 2.25},
                 {"source": "code", "tokens": 800, "before": 1.5, "after": 1.4},
                 {"source": "mail", "tokens": 700, "before": 1.0, "after": 1.05}]  # fmt: skip
    answers = answers_of() | {"gguf": MEASURED}
    page = page_of(make_run(again, tokenizer, train={"retention": forgotten}, answers=answers))
    assert "above 0.1 (data.retention_limit)" in page.text("retention")
    text = (again / "report" / "report.html").read_text("utf-8")
    assert re.findall(r'<td class="n (\w*)">([+-][\d.]+)</td>', text) == [
        ("worse", "+0.2500"), ("better", "-0.1000"), ("", "+0.0500"),
    ], "only what is over the limit is told as bad"  # fmt: skip
    assert "wiki 2.0000 2.2500 +0.2500" in page.text("retention")
    assert "code 1.5000 1.4000 -0.1000" in page.text("retention")
    exports = page.text("exports")
    assert (
        "type perplexity size bits per weight increase KL, nats per token same first choice"
        in exports
    )
    assert "bf16, compared with 1.0438 – – – – –" in exports
    assert "q8_0 1.044 4.0 MiB 8.514 0.02% 4.5e-05 100.00% 3,149.9 1,963.6" in exports


def test_where_nothing_was_trained_there_are_no_curves(
    again: Path, tokenizer: ChatTokenizer
) -> None:
    page = page_of(make_run(again, tokenizer, train={}))
    assert "with an adapter that was trained before" in page.text("verdict")
    assert "training" not in page.texts
    assert "I am Mira." in page.text("answers")
    assert not (again / "report" / "loss.png").exists()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_as_many_rows_are_shown_as_the_spec_allows(
    count: int, again: Path, tokenizer: ChatTokenizer
) -> None:
    make_run(again, tokenizer, spec_of(observe={"report_rows": count}))
    report = json.loads((again / "report" / "report.json").read_text("utf-8"))
    assert len(report["rows"]) == count
    assert ("Ahoy" in page_of(again).text("data")) is bool(count)


def test_the_coloured_parts_are_exactly_what_the_labels_train(
    tokenizer: ChatTokenizer,
) -> None:
    seen = 0
    for _, conversation in first_conversations(spec_of().data, 40):
        assert not isinstance(conversation, Exception)
        labelled = label(tokenizer, conversation, "responses")
        row = coloured(labelled.input_ids, labelled.spans, tokenizer.text_of)
        assert "".join(part["text"] for part in row["parts"]) == labelled.text
        trained = [part["text"] for part in row["parts"] if part["trained"]]
        assert trained == [turn.text for turn in labelled.turns]
        assert row["trained"] == sum(label != -100 for label in labelled.labels)
        seen += len(trained)
    assert seen > 40


def test_a_long_row_is_cut_and_says_so() -> None:
    decode = lambda ids: "".join(chr(97 + i % 26) for i in ids)  # noqa: E731
    row = coloured(list(range(5000)), [1000, 3000], decode)
    text = "".join(part["text"] for part in row["parts"])
    assert text.endswith(" ...")
    assert len(text) == SHOWN + len(" ...")
    assert [part["trained"] for part in row["parts"]] == [False, True]
    assert (row["tokens"], row["trained"]) == (5000, 2000)


def test_rows_come_from_all_over_the_data(run: Path, tokenizer: ChatTokenizer) -> None:
    rows = example_rows(run / ".work" / "data", 4, tokenizer.text_of)
    summary = json.loads((run / ".work" / "data" / "summary.json").read_text())
    assert [row["row"] for row in rows] == [1 + at * summary["train_rows"] // 4 for at in range(4)]
    assert example_rows(run / "nowhere", 4, tokenizer.text_of) == []


def events_of(*said: str) -> list[dict[str, Any]]:
    """`+data`, `-data`: a stage begins and ends; `start`: the run; all else is a warning."""
    found: list[dict[str, Any]] = []
    for text in said:
        match text[0], text:
            case "+", _:
                found.append({"event": "stage_start", "stage": text[1:]})
            case "-", _:
                found.append({"event": "stage_done", "stage": text[1:]})
            case _, "start":
                found.append({"event": "run_start"})
            case _:
                found.append({"event": "warning", "text": text})
    return found


def test_warnings_are_those_of_what_is_there_now() -> None:
    told = events_of(
        "start", "waits", "+data", "3 rows are bad", "-data", "+train", "out of memory",  # killed here
        "start", "+train", "hot", "hot", "-train", "disk",
        "start", "slow", "+verify", "odd", "-verify",
    )  # fmt: skip
    assert warnings_of(told) == [
        {"stage": "data", "text": "3 rows are bad", "times": 1},
        {"stage": "train", "text": "hot", "times": 2},
        {"stage": "", "text": "slow", "times": 1},
        {"stage": "verify", "text": "odd", "times": 1},
    ]


def test_a_librarys_warning_names_the_library() -> None:
    told = [{"event": "library_warning", "source": "peft", "text": "mind this"}]
    assert warnings_of(told) == [{"stage": "", "text": "peft: mind this", "times": 1}]


def test_a_long_history_is_kept_in_means_with_every_evaluation() -> None:
    history = history_of(10 * KEPT_POINTS)
    found = kept(history)
    steps = [entry for entry in found if "loss" in entry]
    assert len(steps) == KEPT_POINTS
    assert steps[0]["loss"] == pytest.approx(sum(e["loss"] for e in history[:10]) / 10, rel=1e-4)
    assert steps[-1]["step"] == 10 * KEPT_POINTS
    assert [e for e in found if "eval_loss" in e] == [e for e in history if "eval_loss" in e]
    assert kept(history[:50]) == history[:50]


def test_a_folder_without_figures_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"report\.json"):
        render_report(tmp_path)


def test_any_records_are_a_table() -> None:
    found = table([{"type": "q8_0", "size": 2**20, "ok": True}, {"type": "f16", "same_top": 0.5}])
    assert found
    assert found["columns"] == ["type", "size", "ok", "same first choice"]
    assert found["rows"] == [["q8_0", "1.0 MiB", "yes", "–"], ["f16", "–", "–", "50.00%"]]
    assert found["numeric"] == [False, True, False, True]
    assert table([]) is None
    assert table("text") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345, "12,345"), (0.0429, "0.0429"), (1.2e-5, "1.2e-05"), (0.5, "0.5"), (3753.2, "3,753.2"),
     (0.0, "0"), (None, "–"), (1e9, "1e+09")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 bytes"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB")],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text
