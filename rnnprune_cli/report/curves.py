"""Sensitivity curves for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rnnprune_cli.errors import printable
from rnnprune_cli.model import Curve, SensitivityReport
from rnnprune_cli.report.table import plain_table, stacked, warning_lines

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ((0.01, "green"), (0.05, "yellow"))
"""Loss up to which a figure has a colour; others are red."""


def curves_table(report: SensitivityReport) -> RenderableType:
    """Returns each layer's and gate's figures by sparsity, with a small plot, and what they say."""
    dense = report.dense[0]
    arrow = "↑" if dense.higher_is_better else "↓"
    head = Text.assemble(
        (printable(report.model.path), "bold"),
        f"   {dense.name} {arrow} {dense.value:.4f}; {report.stage.method},"
        f" {report.stage.granularity} by {report.stage.scope}, one layer at a time",
    )
    parts: list[RenderableType] = [head, _figures(report.curves)]
    if len(report.dense) > 1:
        parts.append(Text(f"loss: the largest of {len(report.dense)} outputs'"))
    parts.append(Text(report.advice))
    return stacked([*parts, *warning_lines(report.warnings)])


def _figures(curves: Sequence[Curve]) -> RenderableType:
    sparsities = sorted({p.sparsity for curve in curves for p in curve.points})
    columns = ("layer", "gate", "size", *(f"{100 * s:g} %" for s in sparsities), "loss")
    table = plain_table(*columns, right=tuple(range(2, 3 + len(sparsities))))
    top = max((p.drop for curve in curves for p in curve.points), default=0.0)
    for curve in curves:
        points = {p.sparsity: p for p in curve.points}
        table.add_row(
            curve.layer if curve.gate is None else "",
            curve.gate or "all",
            f"{curve.size:,}",
            *(_cell(points[s].drop) if s in points else Text() for s in sparsities),
            _plot([points[s].drop if s in points else None for s in sparsities], top),
        )
    return Group(table)


def _cell(drop: float) -> Text:
    colour = next((name for limit, name in _COLOURS if drop <= limit), "red")
    return Text(f"{100 * drop:+.1f} %", colour)


def _plot(drops: Sequence[float | None], top: float) -> Text:
    """Returns a bar for each loss, the largest of all curves being a full one."""
    bars = []
    for drop in drops:
        share = 0.0 if drop is None or top <= 0 else max(drop, 0.0) / top
        bars.append(" " if drop is None else _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)])
    return Text("".join(bars))
