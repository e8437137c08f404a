"""Sensitivity curves for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rnnprune_cli.errors import printable
from rnnprune_cli.model import SensitivityReport
from rnnprune_cli.report import figures
from rnnprune_cli.report.table import plain_table, stacked, warning_lines

_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = ((0.01, "green"), (0.05, "yellow"))
"""Loss up to which a figure has a colour; others are red."""


def curves_table(report: SensitivityReport) -> RenderableType:
    """Returns each layer's and gate's figures by sparsity, with a small plot, and what they say."""
    head = Text.assemble(
        (printable(report.model.path), "bold"), f"   {printable(figures.curves_title(report))}"
    )
    parts: list[RenderableType] = [head, _curves(report)]
    if len(report.dense) > 1:
        parts.append(Text(f"loss: the largest of {len(report.dense)} outputs'"))
    parts.append(Text(report.advice))
    return stacked([*parts, *warning_lines(report.warnings)])


def _curves(report: SensitivityReport) -> RenderableType:
    sparsities, found = figures.curve_sparsities(report), figures.curve_rows(report)
    table = plain_table(*found.columns, "loss", right=(*found.right, len(found.columns)))
    top = max((p.drop for curve in report.curves for p in curve.points), default=0.0)
    for curve, row in zip(report.curves, found.rows, strict=True):
        drops = {p.sparsity: p.drop for p in curve.points}
        name, gate, size, *cells = row
        table.add_row(
            name if curve.gate is None else "",
            gate,
            size,
            *(Text(text, _colour(drops.get(s))) for s, text in zip(sparsities, cells, strict=True)),
            _plot([drops.get(s) for s in sparsities], top),
        )
    return Group(table)


def _colour(drop: float | None) -> str:
    if drop is None:
        return ""
    return next((name for limit, name in _COLOURS if drop <= limit), "red")


def _plot(drops: Sequence[float | None], top: float) -> Text:
    """Returns a bar for each loss, the largest of all curves being a full one."""
    bars = []
    for drop in drops:
        share = 0.0 if drop is None or top <= 0 else max(drop, 0.0) / top
        bars.append(" " if drop is None else _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)])
    return Text("".join(bars))
