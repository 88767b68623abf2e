"""The report's pictures: drawn by matplotlib, coloured by the page they stand on.

Each colour is drawn as a stand-in and then replaced by a CSS variable, so that one picture fits a
light page and a dark one; text stays text.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from jobs.store.cache import cache_folder

# What the colours stand for: the stand-in, and the light and the dark value.
COLOURS = {
    "text": ("#010203", "#5d6778", "#97a3b4"),
    "line": ("#010204", "#dfe3ea", "#2a3340"),
    "a": ("#010205", "#2f6fed", "#6ea8ff"),
    "b": ("#010206", "#d9720b", "#ffa657"),
}
POINTS = 600  # of a curve; more than there are pixels show nothing more
LOG_FROM = 30.0  # times that the largest value is of the smallest, for a logarithmic scale

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    points: Points
    colour: str
    noisy: bool = False
    """Drawn thin, with its running mean over it."""
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    curves: list[Curve] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # colour and what has it
    bars: list[tuple[str, int]] = field(default_factory=list)
    x: str = "step"
    form: str = ""
    """How values are written: a format specification, or nothing for matplotlib's own."""
    log: bool = False
    zero: bool = False
    """The scale begins at nothing, so that a small change looks small."""

    @property
    def note(self) -> str:
        return ", logarithmic" if self.log else ""

    @property
    def said(self) -> str:
        """For those who cannot see it."""
        if self.bars:
            return f"{self.title}: " + "; ".join(f"up to {to}: {count}" for to, count in self.bars)
        ends = [
            f"from {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}" for curve in self.curves
        ]
        return f"{self.title}: {' and '.join(ends)}"


def is_wide(values: Sequence[float]) -> bool:
    """Whether values are best shown on a logarithmic scale."""
    return bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)


def svg(chart: Chart, width: int, height: int, key: bool = False) -> str:
    """The chart as an <svg> for a page that defines the colours as --chart-text, --chart-a, ...

    `key` says whether it says itself which curve is which.
    """
    out = io.StringIO()
    _drawn(
        chart, width, height, {name: stand_in for name, (stand_in, _, _) in COLOURS.items()}, key,
        lambda figure: figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}),
    )  # fmt: skip
    return _fit_for_a_page(out.getvalue(), f"{chart.name}-{width}", chart.said)


def standalone(chart: Chart, width: int, height: int) -> str:
    """The same as a file of its own, light or dark as the reader's screen is."""
    light, dark = (
        "".join(f"--chart-{name}:{colour[at]};" for name, colour in COLOURS.items())
        for at in (1, 2)
    )
    style = (
        f"<style>svg{{{light}font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    namespace = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, _, rest = svg(chart, width, height, key=True).partition(">")
    return f"{head}{namespace}>{style}{rest}\n"


def png(chart: Chart, width: int, height: int) -> bytes:
    """On white, for pages that show no SVG."""
    out = io.BytesIO()
    _drawn(
        chart, width, height, {name: light for name, (_, light, _) in COLOURS.items()}, True,
        lambda figure: figure.savefig(
            out, format="png", dpi=144, facecolor="white", metadata={"Software": None}
        ),
    )  # fmt: skip
    return out.getvalue()


def _drawn(
    chart: Chart, width: int, height: int, colours: dict[str, str], key: bool,
    save: Callable[[Any], None],
) -> None:  # fmt: skip
    # It keeps its list of fonts in a folder of its own, and the home may be read-only.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text, line = colours["text"], colours["line"]
    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 10.5 if width < 500 else 9.5,
        "axes.edgecolor": line, "axes.labelcolor": text, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "grid.color": line, "grid.linewidth": 0.7,
        "xtick.color": text, "ytick.color": text, "xtick.major.size": 0, "ytick.major.size": 0,
        "ytick.minor.size": 0, "xtick.minor.size": 0,
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5),
        "lines.solid_joinstyle": "round", "savefig.transparent": True,
    }  # fmt: skip
    with mpl.rc_context(look):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes: Any = figure.subplots()
        (_bars if chart.bars else _curves)(chart, axes, colours)
        if key and chart.legend:
            names = dict(chart.legend)
            lines = {line.get_color(): line for line in axes.lines}  # the last, thicker one
            axes.legend(
                [lines[colours[colour]] for colour in names], list(names.values()), frameon=False,
                labelcolor=text, title=f"{chart.title}{chart.note}", alignment="left",
            ).get_title().set_color(text)  # fmt: skip
        save(figure)


def _curves(chart: Chart, axes: Any, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    for curve in chart.curves:
        colour = colours[curve.colour]
        points = thinned(curve.points)
        x, y = [p[0] for p in points], [p[1] for p in points]
        noisy = curve.noisy and len(points) > 20
        marker = {"marker": "o", "markersize": 3.2} if curve.marks or len(points) == 1 else {}
        if noisy:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(x, running_mean(y) if noisy else y, color=colour, linewidth=1.7, **marker)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, at: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        low = min(value for curve in chart.curves for _, value in curve.points)
        high = max(value for curve in chart.curves for _, value in curve.points)
        if chart.zero or 0 <= low < 0.6 * high:
            axes.set_ylim(0, 1.08 * high or 1)
        elif low == high:
            axes.set_ylim(0.9 * low, 1.1 * high)
        if chart.form:
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, at: format(value, chart.form))
            )
    axes.margins(x=0.02)
    axes.set_xlabel(chart.x)


def _bars(chart: Chart, axes: Any, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    places = range(len(chart.bars))
    axes.bar(places, [count for _, count in chart.bars], color=colours["a"], width=0.82)
    axes.set_xticks(list(places), [to for to, _ in chart.bars])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, at: f"{value:,.0f}"))
    axes.set_xlabel(chart.x)


def thinned(points: Points, limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the means of as many neighbours as it takes. The last one stays."""
    if len(points) <= limit:
        return list(points)
    size = -(-(len(points) - 1) // (limit - 1))
    found = []
    for start in range(0, len(points) - 1, size):
        group = points[start : min(start + size, len(points) - 1)]
        found.append((sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)))
    return [*found, points[-1]]


def running_mean(values: Sequence[float]) -> list[float]:
    """Over a twentieth of the values on either side of each."""
    reach = max(2, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for at in range(len(values)):
        near = min(reach, at, len(values) - 1 - at)  # even on both sides, so that no end is bent
        found.append((sums[at + near + 1] - sums[at - near]) / (2 * near + 1))
    return found


def _fit_for_a_page(text: str, name: str, said: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>\*\{[^<]*</style>", "", text)
    for part, (stand_in, _, _) in COLOURS.items():
        text = text.replace(stand_in, f"var(--chart-{part})")
    # A page holds several pictures: an id that is used is made its own, the others go.
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    text = f'<svg {box[0]} role="img" aria-label="{escape(said)}">' + text[text.index(">") + 1 :]
    return re.sub(r"\n\s*", "\n", text).strip()
