"""Charts as SVG for a page: colours are the page's, text is numbers only, sizes suit a phone."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 8
"""An axis whose ends are so many times apart goes by powers."""
SERIES = 8
"""Series that can be told apart, by colour and by mark."""
MARKS = "●■▲◆▼✚✖★"
_MARKERS = "os^DvPX*"
_WIDTH, _HEIGHT = 340 / 72, 230 / 72
"""Inches; on a phone a chart is about as wide as its 340 units, so its text keeps its size."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        x: Places.
        y: Values.
        series: Which colour and mark.
        dashed: Whether it is no main line.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int
    dashed: bool = False


def lines(drawn: Sequence[Line], x: str, y: str, label: str, mark: float | None = None) -> str:
    """Returns lines over a common axis.

    Args:
        drawn: The lines.
        x: What is to the right.
        y: What is upwards.
        label: What it shows, for those who do not see it.
        mark: A place to the right that is marked.
    """
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        if all(float(place).is_integer() for line in drawn for place in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if mark is not None:
            axes.axvline(mark, color=_colour(-1), linewidth=1, linestyle=":")
        for line in drawn:
            axes.plot(
                line.x,
                line.y,
                color=_colour(line.series),
                marker=None if line.dashed else _MARKERS[line.series % SERIES],
                markersize=5,
                linewidth=1.6,
                linestyle="--" if line.dashed else "-",
            )

    return _drawn(draw, x, y, label)


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot.

    Attributes:
        x: To the right; less is better.
        y: Upwards.
        name: A number or letter beside it; may be empty.
        best: Whether no other is better in both.
    """

    x: float
    y: float
    name: str
    best: bool


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> tuple[bool, ...]:
    """Returns which points no other one beats: less to the right, and better upwards.

    Args:
        points: ``(x, y)``.
        higher_is_better: Whether more is better upwards.
    """
    sign = 1 if higher_is_better else -1
    return tuple(
        not any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
        for x, y in points
    )


def scatter(dots: Sequence[Dot], x: str, y: str, label: str) -> str:
    """Returns a scatter plot whose best points are joined.

    Args:
        dots: The points.
        x: What is to the right.
        y: What is upwards.
        label: What it shows, for those who do not see it.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    def draw(axes: Axes) -> None:
        best = sorted({(d.x, d.y) for d in dots if d.best})
        axes.plot([p[0] for p in best], [p[1] for p in best], color=_colour(0), linewidth=1.6)
        for dot in dots:
            colour = _colour(0 if dot.best else -1)
            axes.plot([dot.x], [dot.y], color=colour, marker="o", markersize=6, linestyle="none")
            if not dot.name:
                continue
            axes.annotate(
                dot.name, (dot.x, dot.y), xytext=(5, 5), textcoords="offset points", fontsize=11.5
            )
        if min(d.x for d in dots) > 0 and max(d.x for d in dots) > WIDE * min(d.x for d in dots):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(0.12)

    return _drawn(draw, x, y, label)


def _colour(series: int) -> str:
    """Returns what stands for a colour until the page's own is put in its place."""
    return f"#0102{0 if series < 0 else series % SERIES + 1:02x}"


def _drawn(draw: Callable[[Axes], None], x: str, y: str, label: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "rnnprune",
            "font.size": 12.5,
            "text.parse_math": False,  # names may hold dollar signs
        }
    ):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(color="#010299", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = _own(text.getvalue())
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _own(drawing: str) -> str:
    """Makes a drawing part of a page: without what is a file's, in the page's colours and font."""
    drawing = drawing[drawing.index("<svg") :]
    for part in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        drawing = re.sub(part, "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", drawing)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', drawing))
    drawing = re.sub(
        r' id="([^"]*)"', lambda found: found.group() if found[1] in used else "", drawing
    )
    drawing = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", drawing)
    drawing = re.sub(r"font-family: [^;\"]*;? ?", "", drawing)
    drawing = drawing.replace("#000000", "currentColor").replace("#010299", "var(--line)")
    drawing = re.sub(r"#0102([0-9a-f]{2})", lambda found: f"var(--c{int(found[1], 16)})", drawing)
    return re.sub(r">\s+<", "><", drawing)
