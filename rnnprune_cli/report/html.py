"""Reports as one HTML file that needs nothing else: no network, light and dark, any width."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence

from rnnprune_cli import __version__
from rnnprune_cli.errors import printable
from rnnprune_cli.model import Curve, SensitivityReport

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.gate { opacity: .75; } .advice { background: var(--soft); padding: .6rem 1rem; }
svg { width: 100%; height: auto; } figure { margin: 1rem 0; } footer { opacity: .6; }
"""
_COLOURS = ((0.01, "#2a94"), (0.05, "#d904"))
"""Loss up to which a cell has a colour; others are red."""
_MOST_PLOTTED = 12
"""Curves in one picture."""


def curves_page(report: SensitivityReport) -> str:
    """Returns the sensitivity of layers and gates as a page: what to do, a plot, a table."""
    dense = report.dense[0]
    arrow = "↑" if dense.higher_is_better else "↓"
    whole = [curve for curve in report.curves if curve.gate is None]
    gates = [curve for curve in report.curves if curve.gate is not None]
    order = sorted(whole, key=lambda curve: -max((p.drop for p in curve.points), default=0.0))
    parts = [
        f"<p>{_text(dense.name)} {arrow} {dense.value:.4f} before;"
        f" {_text(report.stage.method)}, {_text(report.stage.granularity)} by"
        f" {_text(report.stage.scope)}, one layer at a time.</p>",
        f'<p class="advice">{_text(report.advice)}</p>',
    ]
    if order:
        shown = order[:_MOST_PLOTTED]
        more = f" (the {len(shown)} that lose most of {len(order)})" if order != shown else ""
        parts += [
            f"<h2>Layers{more}</h2>",
            _plot([(curve.layer, curve) for curve in shown]),
        ]
    for layer in [curve.layer for curve in order[:_MOST_PLOTTED]]:
        own = [(curve.gate or "", curve) for curve in gates if curve.layer == layer]
        if len(own) > 1:
            parts += [f"<h2>Gates of {_text(layer)}</h2>", _plot(own)]
    parts += ["<h2>Loss by sparsity</h2>", _table(report.curves)]
    parts += [f"<p>! {_text(warning)}</p>" for warning in report.warnings]
    return _page(f"Sensitivity of {report.model.path}", parts)


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<footer><p>rnnprune {__version__}</p></footer></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _table(curves: Sequence[Curve]) -> str:
    sparsities = sorted({p.sparsity for curve in curves for p in curve.points})
    head = "".join(f"<th>{100 * s:g} %</th>" for s in sparsities)
    rows = []
    for curve in curves:
        points = {p.sparsity: p for p in curve.points}
        cells = "".join(
            _cell(points[s].drop, points[s].metrics[0].value) if s in points else "<td></td>"
            for s in sparsities
        )
        name = _text(curve.layer) if curve.gate is None else f"&emsp;gate {_text(curve.gate)}"
        kind = "" if curve.gate is None else ' class="gate"'
        rows.append(f"<tr{kind}><td>{name}</td><td>{curve.size:,}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>layer</th><th>size</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(drop: float, value: float) -> str:
    colour = next((name for limit, name in _COLOURS if drop <= limit), "#d334")
    return f'<td style="background:{colour}" title="{value:.4g}">{100 * drop:+.1f} %</td>'


def _plot(curves: Sequence[tuple[str, Curve]]) -> str:
    """Returns losses over sparsity as an SVG whose lines and text take the page's colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rnnprune", "font.size": 10}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, curve in curves:
            x = [0.0, *(p.sparsity for p in curve.points)]
            y = [0.0, *(100 * p.drop for p in curve.points)]
            axes.plot(x, y, marker="o", markersize=4, label=printable(name))
        axes.set_xlabel("sparsity")
        axes.set_ylabel("loss in %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        axes.patch.set_alpha(0)
        figure.patch.set_alpha(0)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("#000000", "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("<svg ", '<svg fill="currentColor" ', 1)  # black text names no colour
    return f"<figure>{drawing}</figure>"
