"""The report in a real browser: on a phone and on a desk, light and dark."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.data.tokenizer import ChatTokenizer
from tests.observe.chromium import Browser, find
from tests.observe.runs import MEASURED, answers_of, make_run

LONG = "w" * 300  # a word that no line has room for


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips where there is no Chromium, unless LORAJOB_REQUIRE (`chromium,...`) says there must be."""
    program = find()
    if program is None:
        if "chromium" in os.environ.get("LORAJOB_REQUIRE", "").split(","):
            pytest.fail("there is no Chromium, and LORAJOB_REQUIRE asks for it")
        pytest.skip("there is no Chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    """One with everything that could be too wide, or run."""
    answers = answers_of(f"I am Mira. {LONG}")
    answers["gguf"] = MEASURED
    events = ({"event": "warning", "text": f"{LONG} <img src=x onerror=alert(1)>"},)
    folder = tmp_path_factory.mktemp("page") / "a-run"
    make_run(
        folder, tokenizer, answers=answers, events=events,
        train={"retention": [{"source": f"hf://{LONG}", "before": 1.0, "after": 2.0}]},
    )  # fmt: skip
    return folder / "report" / "report.html"


def average(png: bytes) -> float:
    """How light a picture is, from 0 to 255."""
    pixel = Image.open(io.BytesIO(png)).convert("L").resize((1, 1)).getpixel((0, 0))
    assert isinstance(pixel, int | float)
    return float(pixel)


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_the_console_is_silent(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    browser.show(report, width, scheme)
    assert browser.errors == []
    assert browser.requests == [report.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("innerWidth") == width
    ids = browser.value("[...document.querySelectorAll('main > [id]')].map(e => e.id)")
    assert ids == ["verdict", "answers", "training", "exports", "retention", "data", "time",
                   "warnings", "about"]  # fmt: skip
    hidden = browser.value(
        "[...document.querySelectorAll('main > [id]')].filter(e => e.offsetHeight < 30).map(e => e.id)"
    )
    assert hidden == []


def test_what_is_wider_than_a_phone_scrolls_by_itself(browser: Browser, report: Path) -> None:
    browser.show(report, 390, "light")
    cut = browser.value(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg')"
        " && e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    assert browser.value("document.querySelector('#quantization + .scroll').scrollWidth") > 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_is_cut_has_a_visible_edge_until_its_end(
    browser: Browser, report: Path, scheme: str
) -> None:
    browser.show(report, 390, scheme)

    def edges() -> tuple[float, float]:
        """How far the outermost columns of pixels differ from the card, left and right."""
        left, top, right = browser.value(
            "(() => { const r = document.querySelector('#quantization + .scroll')"
            ".getBoundingClientRect(); return [r.left, r.bottom - 12 + scrollY, r.right]; })()"
        )
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("L")
        at = [picture.getpixel((round(x), round(top))) for x in (left + 3, right - 4)]
        (card,) = browser.value(
            "[getComputedStyle(document.querySelector('.card')).backgroundColor.match(/\\d+/g)"
            ".map(Number).reduce((a, b) => a + b) / 3]"
        )
        return abs(at[0] - card), abs(at[1] - card)

    left, right = edges()
    assert right > 20 > left, "more follows on the right"
    browser.value("document.querySelector('#quantization + .scroll').scrollLeft = 9999")
    left, right = edges()
    assert left > 20 > right, "and then there is nothing more"


def test_the_schemes_differ_and_text_can_be_read_in_both(browser: Browser, report: Path) -> None:
    light = {}
    for scheme in ("light", "dark"):
        browser.show(report, 390, scheme)
        light[scheme] = average(browser.screenshot())
        contrast = browser.value(CONTRAST)
        assert contrast["checked"] > 100
        assert contrast["poor"] == [], scheme
    assert light["light"] > 200
    assert light["dark"] < 60


def test_each_curve_is_drawn_once_and_large_enough(browser: Browser, report: Path) -> None:
    for width, wide in ((390, False), (1280, True)):
        browser.show(report, width, "light")
        shown = browser.value(
            "[...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().width)"
            ".map(e => [e.getAttribute('aria-label'), e.getBoundingClientRect().width])"
        )
        names = [label.split(":")[0] for label, _ in shown]
        assert names == ["Loss", "Learning rate", "Gradient norm", "Tokens a second",
                         "Memory of the process, GiB", "Conversations by their length"]  # fmt: skip
        assert all(drawn >= 300 for _, drawn in shown)
        assert (shown[0][1] > 900) is wide
        smallest = browser.value(
            "Math.min(...[...document.querySelectorAll('figure svg text')].map("
            "e => e.getBoundingClientRect().height).filter(h => h))"
        )
        assert smallest >= 9, width


# The contrast of each text with what is behind it, as WCAG reckons it; 4.5 is what it asks for.
CONTRAST = """(() => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return [...m.slice(0, 3), m[3] ?? 1]; };
  const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const poor = []; let checked = 0;
  for (const e of document.querySelectorAll('main *')) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!text || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const a = lum(rgba(e.closest('svg') ? style.fill : style.color)), b = lum(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    checked++;
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return {checked, poor};
})()"""
