"""The report's pictures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from jobs.observe.charts import Chart, Curve, is_wide, png, running_mean, standalone, svg, thinned

LOSS = Chart(
    "loss", "Loss",
    [Curve([(step, 4 / step) for step in range(1, 200)], "a", noisy=True),
     Curve([(0, 4.0), (100, 1.0), (199, 0.5)], "b", marks=True)],
    legend=[("a", "training"), ("b", "held out")],
)  # fmt: skip


def test_every_colour_is_left_to_the_page() -> None:
    picture = svg(LOSS, 640, 280)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", picture)
    assert {"var(--chart-a)", "var(--chart-b)", "var(--chart-text)", "var(--chart-line)"} <= set(
        re.findall(r"var\(--chart-\w+\)", picture)
    )


def test_the_same_figures_give_the_same_picture() -> None:
    assert svg(LOSS, 640, 280) == svg(LOSS, 640, 280)
    assert png(LOSS, 640, 280) == png(LOSS, 640, 280)


def test_no_two_pictures_share_an_id_and_no_reference_leads_nowhere() -> None:
    other = Chart("norm", "Norm", LOSS.curves)
    pictures = [svg(LOSS, 640, 280), svg(LOSS, 350, 200), svg(other, 350, 200)]
    ids = [found for picture in pictures for found in re.findall(r' id="([^"]*)"', picture)]
    assert ids
    assert len(set(ids)) == len(ids)
    for picture in pictures:
        used = re.findall(r'(?:url\(|href=")#([^")]+)', picture)
        assert used
        assert set(used) <= set(re.findall(r' id="([^"]*)"', picture))


def test_a_file_of_its_own_is_an_image_with_both_colour_schemes() -> None:
    text = standalone(LOSS, 640, 280)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == "0 0 640 280"
    assert "prefers-color-scheme:dark" in text
    for name in ("training", "held out"):  # nothing beside it says so
        assert f">{name}<" in text
        assert f">{name}<" not in svg(LOSS, 640, 280)
    for name in set(re.findall(r"var\((--chart-\w+)\)", text)):
        assert text.count(f"{name}:") == 2, name


def test_a_picture_says_in_words_what_it_shows() -> None:
    bars = Chart("lengths", 'Lengths <"of" rows>', bars=[("32", 5), ("64", 7)])
    root = ElementTree.fromstring(standalone(bars, 350, 200))
    assert root.get("aria-label") == 'Lengths <"of" rows>: up to 32: 5; up to 64: 7'


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 599, 600, 601, 1200, 12345])
def test_a_long_curve_keeps_its_ends_and_its_mean(count: int) -> None:
    points = [(float(at), float(at % 7)) for at in range(count)]
    found = thinned(points, 600)
    assert len(found) <= 600
    assert found[-1] == points[-1]
    assert found == sorted(found)
    if count <= 600:
        assert found == points
    mean = sum(value for _, value in points) / count
    assert sum(value for _, value in found) / len(found) == pytest.approx(mean, abs=0.2)


def test_a_running_mean_bends_no_end_and_keeps_a_line_straight() -> None:
    assert running_mean([3.0] * 50) == [3.0] * 50
    line = [float(at) for at in range(100)]
    assert running_mean(line) == pytest.approx(line)


@pytest.mark.parametrize(
    ("values", "wide"),
    [([1.0, 2.0], False), ([0.01, 2.0], True), ([0.0, 5.0], False), ([-1.0, 99.0], False), ([], False)],
)  # fmt: skip
def test_the_scale_is_logarithmic_where_a_curve_falls_far(values: list[float], wide: bool) -> None:
    assert is_wide(values) is wide
