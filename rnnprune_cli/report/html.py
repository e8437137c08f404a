"""Reports as one HTML file that needs nothing else: no network, no script, any width, any theme."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rnnprune_cli import __version__
from rnnprune_cli.errors import printable
from rnnprune_cli.model import (
    Array,
    BenchReport,
    Check,
    CheckReport,
    Curve,
    FineTuned,
    Latency,
    LayerRow,
    Report,
    SensitivityReport,
    Trial,
)
from rnnprune_cli.report import charts, figures
from rnnprune_cli.report.figures import Rows, Section
from rnnprune_cli.report.pixels import gate_images
from rnnprune_cli.report.style import STYLE

MOST_ROWS = 100
"""Rows of a table at most."""
MOST_PICTURES = 12
"""Layers whose weights are shown at most."""
_OPEN_PICTURES = 2
_MOST_NAMED = 24
"""Points of a chart that have names at most."""
_MOST_TIMED = 24
"""Models whose latencies are shown at most."""
_BINS = 90
_STALLED = 2
"""Calls that take so many medians were held up; the axis does not reach that far."""
_SHORT = 30
"""Characters of a text that stays on one line."""
_FINE = 64
"""Rows of an image above which it is made smaller to be shown."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_COLOURS = ((0.01, "good"), (0.05, "fair"))
"""Loss up to which a cell has a colour; others are bad."""
_GATES = {
    "LSTM": {"i": "input gate", "o": "output gate", "f": "forget gate", "c": "cell"},
    "GRU": {"z": "update gate", "r": "reset gate", "h": "candidate"},
}


def report_page(report: Report) -> str:
    """Returns a pruned model as a page: checks, the figures that matter, warnings, the details."""
    layers, *others = figures.report_sections(_shortened(report))
    parts = [
        _checks(report.checks),
        _tiles(figures.highlights(report)),
        f"<p>{_text(figures.plan(report))} → {_code(report.output.path)}</p>",
        _before_after(report),
        _warnings(report.warnings),
        _latencies([("before", report.before.latency_ms), ("after", report.after.latency_ms)]),
        _section(layers, total=len(report.layers)),
        _pictures(report),
    ]
    for section in others:
        if section.title == "Fine-tuning" and report.finetune is not None:
            parts += [_section(section), _training(report.finetune)]
        elif section.title == "Models tried":
            parts += [_section(section), _tried(report.trials)]
        else:
            parts.append(_section(section))
    if report.sensitivity:
        parts += ["<h2>Sensitivity of layers</h2>", _curves(report.sensitivity)]
    parts += [_verification(report), _environment(report.environment)]
    return _page(report.model.path, parts)


def family_page(reports: Sequence[Report]) -> str:
    """Returns a family of models as a page: checks, a table, the front, each model's details."""
    parts = [
        _checks(figures.family_checks(reports)),
        _table(figures.family_rows(reports), "after ÷ before of each model"),
        '<p class="note">Size, weights that are not zero, latency: after ÷ before; in brackets'
        " 95 % intervals.</p>",
        _family_front(reports),
        _warnings(figures.family_warnings(reports)),
        _latencies(
            [
                ("original", reports[0].before.latency_ms),
                *((r.output.path, r.after.latency_ms) for r in reports),
            ]
        ),
    ]
    for report in reports[:MOST_PICTURES]:
        inside = [
            _tiles(figures.highlights(report)),
            _before_after(report),
            *map(_section, figures.report_sections(_shortened(report))),
            _pictures(report, most=2),
        ]
        parts.append(_details(report.output.path, inside))
    parts += [_more(len(reports) - MOST_PICTURES, "models"), _environment(reports[0].environment)]
    return _page(f"{reports[0].model.path}: {len(reports)} models", parts)


def curves_page(report: SensitivityReport) -> str:
    """Returns the sensitivity of layers and gates as a page: what to do, plots, a table."""
    sparsities = figures.curve_sparsities(report)
    parts = [
        f'<p class="advice">{_text(report.advice)}</p>',
        f"<p>{_text(figures.curves_title(report))}.</p>",
        _warnings(report.warnings),
        _curves(report.curves),
        "<h2>Loss by sparsity</h2>",
        _losses(report, sparsities),
        _environment(report.environment),
    ]
    return _page(f"Sensitivity of {report.model.path}", parts)


def bench_page(report: BenchReport) -> str:
    """Returns a benchmark as a page: checks, a table, latencies, fronts, the machine's noise."""
    first = figures.first_settings(report)
    settings = dict.fromkeys(map(figures.setting_text, first.values()))
    groups = dict.fromkeys(model.group for model in report.models)
    said = figures.bench_headline(report)
    parts = [
        _checks(report.checks),
        f'<p class="advice">{_text(said)}</p>' if said else "",
        _table(figures.bench_rows(report), "every model"),
        f'<p class="note">{_text("; ".join(settings))}. In brackets: 95 % intervals.</p>',
        _warnings(report.warnings),
    ]
    for group in groups:
        own = [model for model in report.models if model.group == group]
        of = f" of {group}" if group else ""
        parts += [
            _latencies([(model.name, model.latency_ms) for model in own], of),
            _bench_front(report, group),
        ]
    parts += map(_section, figures.bench_sections(report))
    parts.append(_environment(report.environment))
    return _page("Benchmark", parts, "broad")


def check_page(report: CheckReport) -> str:
    """Returns checks as a page: what fails, and what to do."""
    against = "" if report.baseline is None else f" against {_code(report.baseline)}"
    parts = [
        _checks(report.checks) or f"<p>{_text(figures.verdict(report.checks))}</p>",
        f"<p>{_code(report.report)}{against}</p>",
        _warnings(report.warnings),
    ]
    return _page(f"Checks of {report.report}", parts)


# What all pages have


def _page(title: str, parts: Iterable[str], kind: str = "") -> str:
    heading = _text(title).replace("/", "/<wbr>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>"
        f"<main{kind and f' class={kind}'}><h1>{heading}</h1>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><footer>rnnprune {__version__}</footer></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _broken(text: str) -> str:
    """Returns a figure whose interval may go below it."""
    value, gap, bounds = text.partition("  [")
    return f'{_text(value)}<span class="bounds">  [{_text(bounds)}</span>' if gap else _text(text)


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _more(count: int, what: str) -> str:
    return "" if count <= 0 else f'<p class="note">… and {count:,} more {what}.</p>'


def _table(rows: Rows, label: str, total: int | None = None) -> str:
    """Returns a table in a box of its own, which scrolls where it is too wide."""
    shown, more = rows.cut(MOST_ROWS)
    more = more if total is None else total - len(shown.rows)
    kinds = ["n" if k in rows.right else "" for k in range(len(rows.columns))]

    def cell(tag: str, text: str, kind: str, scope: str = "") -> str:
        names = [kind] * bool(kind) + ["in"] * text.startswith("  ")
        names += ["long"] * (len(text) > _SHORT and not kind)
        attributes = f' scope="{scope}"' * bool(scope) + f' class="{" ".join(names)}"' * bool(names)
        return f"<{tag}{attributes}>{_broken(text.strip())}</{tag}>"

    columns = "".join(
        cell("th", text, kind, "col") if text else cell("td", text, kind)
        for text, kind in zip(rows.columns, kinds, strict=True)
    )
    lines = []
    names = rows.columns.index("model") if "model" in rows.columns else 0
    for row in shown.rows:
        cells = "".join(
            cell("th", text, kind, "row") if k == names else cell("td", text, kind)
            for k, (text, kind) in enumerate(zip(row, kinds, strict=True))
        )
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide" role="region" aria-label="{_text(label)}" tabindex="0"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        + _more(more, "rows: the JSON report has all of them")
    )


def _section(section: Section, total: int | None = None) -> str:
    table = "" if section.rows is None else _table(section.rows, section.title, total)
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in section.notes)
    return f"<h2>{_text(section.title)}</h2>{table}{notes}"


def _details(title: str, inside: Iterable[str], opened: bool = False) -> str:
    return (
        f"<details{' open' if opened else ''}><summary>{_text(title)}</summary>"
        f"{''.join(inside)}</details>"
    )


def _checks(checks: Sequence[Check]) -> str:
    """Returns the checks, those that fail first, and what to do; nothing if there are none."""
    if not checks:
        return ""
    failed = [check for check in checks if not check.passed]
    order = [*failed, *(check for check in checks if check.passed)]
    rows = figures.check_rows(order)
    lines = []
    for check, row in zip(order[:MOST_ROWS], rows.rows, strict=False):
        first, *rest = row
        mark = _mark(check.passed)
        cells = "".join(f"<td>{_broken(text)}</td>" for text in rest)
        lines.append(f'<tr><th scope="row">{mark} {_code(first)}</th>{cells}</tr>')
    hints = "".join(
        f"<p><code>{_text(check.expression)}</code>: {_text(check.hint)}</p>"
        for check in failed[:MOST_ROWS]
        if check.hint
    )
    columns = "".join(f'<th scope="col">{_text(c)}</th>' for c in rows.columns)
    return (
        f'<section class="checks {"failed" if failed else "passed"}">'
        f"<h2>{'✗' if failed else '✓'} {_text(figures.verdict(checks))}</h2>"
        f'<div class="wide" role="region" aria-label="checks" tabindex="0"><table><thead><tr>'
        f"{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"{_more(len(order) - MOST_ROWS, 'checks')}{hints}</section>"
    )


def _mark(passed: bool) -> str:
    return f'<span class="{"good" if passed else "bad"}">{"✓" if passed else "✗"}</span>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings[:MOST_ROWS])
    return (
        f'<section class="warnings" aria-label="warnings"><ul>{items}</ul>'
        f"{_more(len(warnings) - MOST_ROWS, 'warnings')}</section>"
    )


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return ""
    return _details("Environment", [_table(figures.environment_rows(environment), "environment")])


# A pruned model


def _shortened(report: Report) -> Report:
    return dataclasses.replace(report, layers=figures.foremost(report.layers, MOST_ROWS))


def _tiles(said: Sequence[tuple[str, str]]) -> str:
    tiles = "".join(
        f"<div><strong>{_text(what)}</strong><span>{_text(figure)}</span></div>"
        for what, figure in said
    )
    return f'<div class="tiles">{tiles}</div>'


def _before_after(report: Report) -> str:
    """Returns what was measured as a table, and the ratios as bars."""
    before, after, ratios = report.before, report.after, report.ratios
    rows = figures.figure_rows(before, after, ratios)
    shares = [
        ("parameters", ratios.parameters),
        ("not zero", ratios.nonzero),
        ("size", ratios.bytes),
        ("gzipped", ratios.gzip_bytes),
        ("MACs per step", after.macs_per_step / max(before.macs_per_step, 1)),
    ]
    if ratios.latency is not None:
        shares.append(("latency", ratios.latency.median))
    longest = max(1.0, *(share for _, share in shares))
    bars = "".join(
        f'<div class="bar"><span>{name}</span>'
        f'<span class="track" style="--whole:{100 / longest:.2f}%">'
        f'<i style="width:{100 * share / longest:.2f}%"></i></span><span>{share:.3f}</span></div>'
        for name, share in shares
    )
    return (
        f'<div class="halves">{_table(rows, "before and after")}'
        f'<figure class="bars"><figcaption>after ÷ before, which is grey</figcaption>{bars}'
        "</figure></div>"
    )


def _latencies(models: Sequence[tuple[str, Latency | None]], of: str = "") -> str:
    """Returns how the calls of each model were spread, over a common axis."""
    timed = [(name, latency) for name, latency in models if latency and latency.samples]
    if not timed:
        return ""
    shown = timed[:_MOST_TIMED]
    low = min(min(latency.samples) for _, latency in shown)
    high = max(
        min(float(np.percentile(latency.samples, 98)), _STALLED * latency.median)
        for _, latency in shown
    )
    high = low + 1.02 * max(high - low, 1e-3 * low, 1e-9)
    by_powers = 0 < charts.WIDE * low < high
    rows = "".join(_spread(name, latency, low, high, by_powers) for name, latency in shown)
    middle = (low * high) ** 0.5 if by_powers else (low + high) / 2
    ends = "".join(f"<span>{figures.milliseconds(end)}</span>" for end in (low, middle, high))
    return (
        f"<h2>Latency{_text(of)}</h2>"
        f'<figure class="spreads">{rows}<div class="axis" aria-hidden="true">{ends}</div>'
        "<figcaption>Single calls, fast ones to the left; the higher, the more of them. The line is"
        " the median, the shade goes from the 5th to the 95th percentile. Calls beyond the right"
        " end are counted there.</figcaption></figure>" + _more(len(timed) - len(shown), "models")
    )


def _spread(name: str, latency: Latency, low: float, high: float, by_powers: bool) -> str:
    """Returns one model's calls between two ends, as a drawing that is as wide as there is room."""

    def places(times: Sequence[float]) -> Array:
        within = np.clip(np.array(times), low, high)
        if by_powers:
            return np.asarray(_BINS * np.log(within / low) / np.log(high / low))
        return np.asarray(_BINS * (within - low) / (high - low))

    counts, _ = np.histogram(places(latency.samples), _BINS, (0, _BINS))
    heights = 30 * np.sqrt(counts / max(counts.max(), 1))  # so that rare calls are seen
    tops = "".join(f"V{30 - height:.4g}h1" for height in heights)
    said = figures.milliseconds(latency.median)
    beyond = np.mean(np.array(latency.samples) > high)
    note = f'<span class="note">{100 * beyond:.2g} % beyond</span>' if beyond else ""
    middle, left, right = places((latency.median, latency.p5, latency.p95))
    said = figures.milliseconds(latency.median)
    beyond = np.mean(np.array(latency.samples) > high)
    note = f'<span class="note">{100 * beyond:.2g} % beyond</span>' if beyond else ""
    return (
        f'<div class="spread"><div><span>{_text(name)} {note}</span><b>{said}</b></div>'
        f'<svg viewBox="0 0 {_BINS} 30" preserveAspectRatio="none" role="img"'
        f' aria-label="{_text(name)}: median {said}, {len(latency.samples):,} calls">'
        f'<rect class="mid" x="{left:.4g}" width="{max(right - left, 0.2):.4g}" height="30"/>'
        f'<path d="M0 30{tops}V30z"/><path class="median" d="M{middle:.4g} 0V30"/></svg></div>'
    )


def _verification(report: Report) -> str:
    claims = report.verification
    held = sum(row.passed for row in claims)
    items = "".join(f"<li>{_mark(row.passed)} {_text(figures.claim(row))}</li>" for row in claims)
    title = f"Verification: {held} of {len(claims)} statements hold"
    return _details(title, [f'<ul class="plain">{items}</ul>'], opened=held < len(claims))


# Pictures of weights


def _pictures(report: Report, most: int = MOST_PICTURES) -> str:
    """Returns the weights of the layers that lost most."""
    having = [row for row in figures.foremost(report.layers, len(report.layers)) if row.pictures]
    if not having:
        return ""
    kept = {row.layer: row.kept for row in report.units}
    shown = figures.foremost(having, most)
    parts = [
        _details(_title(row), [_layer(row, kept.get(row.name))], opened=k < _OPEN_PICTURES)
        for k, row in enumerate(shown)
    ]
    cut = any(row.hidden_after < row.hidden_before for row in shown)
    key = (
        '<p class="key"><span><i class="dense"></i>kept</span><span><i class="thin"></i>zero</span>'
        + '<span><i class="gone"></i>cut out</span>' * cut
        + "</p>"
    )
    return f"<h2>Weights</h2>{key}{''.join(parts)}" + _more(
        len(report.layers) - len(shown), "layers lost less, or nothing"
    )


def _title(row: LayerRow) -> str:
    return f"{row.name}: {100 * row.sparsity:.0f} % gone"


def _layer(row: LayerRow, kept: tuple[tuple[int, ...], ...] | None) -> str:
    """Returns W and R of each direction, gate by gate."""
    directions = sorted({picture.direction for picture in row.pictures})
    parts = []
    for direction in directions:
        own = [picture for picture in row.pictures if picture.direction == direction]
        known = kept is not None and direction < len(kept) and row.hidden_after
        units = kept[direction] if kept is not None and known else None
        images = [gate_images(picture, units, row.hidden_before) for picture in own]
        cells = ["<span></span>"]
        cells += (
            f"<span>{p.weight} {p.shape[0]:,} × {p.shape[1]:,}</span>"  # noqa: RUF001
            for p in own
        )
        names = _GATES.get(row.op, {})
        coarse = ' class="coarse"' if units is None or row.hidden_before <= _FINE else ""
        alike = len({round(share, 2) for share in row.gates.values()}) < 2
        for k, gate in enumerate(own[0].gates):
            name = names.get(gate, "all rows")
            share = "" if alike else f"<br>{100 * row.gates[gate]:.0f} % gone"
            cells.append(f"<span>{name}{share}</span>")
            cells += (
                f'<img{coarse} src="{image[k]}" alt="{p.weight}, {name}">'
                for p, image in zip(own, images, strict=True)
            )
        title = ("forward", "reverse")[direction] if len(directions) > 1 else ""
        parts.append(
            f"<div>{f'<h3>{title}</h3>' if title else ''}"
            f'<div class="weights" style="--n:{len(own)}">{"".join(cells)}</div></div>'
        )
    return f'<div class="directions">{"".join(parts)}</div>'


# Charts


def _figure(chart: str, caption: str, names: Sequence[str] = ()) -> str:
    """Returns a chart with its title above it and the names of its lines below."""
    marks = (
        f'<span><i style="color:var(--c{k % charts.SERIES + 1})" aria-hidden="true">'
        f"{charts.MARKS[k % charts.SERIES]}</i> {_text(name)}</span>"
        for k, name in enumerate(names)
    )
    key = f'<p class="key">{"".join(marks)}</p>' if names else ""
    return f"<figure><figcaption>{_text(caption)}</figcaption>{chart}{key}</figure>"


def _grid(drawn: Iterable[str]) -> str:
    inside = "".join(drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def _training(log: FineTuned) -> str:
    """Returns how the losses, and what the model is worse by, went with the epochs."""
    if not log.epochs:
        return ""
    numbers = range(1, len(log.epochs) + 1)
    losses = [
        charts.Line(numbers, [epoch.loss for epoch in log.epochs], 0),
        charts.Line(numbers, [epoch.validation_loss for epoch in log.epochs], 1),
    ]
    drops = [
        charts.Line([0, *numbers], [100 * log.drop, *(100 * epoch.drop for epoch in log.epochs)], 0)
    ]
    drawn = [
        _figure(
            charts.lines(losses, "epoch", "loss", "loss by epoch", log.best),
            "Loss by epoch; the dotted line marks the weights that are kept",
            ("training", "validation"),
        ),
        _figure(
            charts.lines(drops, "epoch", "worse by, in %", "loss of metric by epoch", log.best),
            "What the model is worse by than the original, on validation data",
        ),
    ]
    if len({epoch.sparsity for epoch in log.epochs}) > 1:
        line = charts.Line(numbers, [epoch.sparsity for epoch in log.epochs], 0)
        chart = charts.lines([line], "epoch", "sparsity", "sparsity by epoch", log.best)
        drawn.append(_figure(chart, "Sparsity by epoch"))
    return _grid(drawn)


def _curves(curves: Sequence[Curve]) -> str:
    """Returns losses over sparsity: of the layers that lose most, and of their gates."""
    whole = [curve for curve in curves if curve.gate is None]
    gates = [curve for curve in curves if curve.gate is not None]
    order = sorted(whole, key=lambda curve: -max((p.drop for p in curve.points), default=0.0))
    shown = order[: charts.SERIES]
    if not shown:
        return ""
    more = f" (the {len(shown)} that lose most of {len(order)})" if len(order) > len(shown) else ""
    drawn = [_lost([(curve.layer, curve) for curve in shown], f"Layers{more}")]
    for layer in [curve.layer for curve in shown]:
        own = [(f"gate {curve.gate}", curve) for curve in gates if curve.layer == layer]
        if len(own) > 1:
            drawn.append(_lost(own, f"Gates of {layer}"))
    return _grid(drawn)


def _lost(curves: Sequence[tuple[str, Curve]], title: str) -> str:
    drawn = [
        charts.Line(
            [0.0, *(p.sparsity for p in curve.points)],
            [0.0, *(100 * p.drop for p in curve.points)],
            k,
        )
        for k, (_, curve) in enumerate(curves)
    ]
    chart = charts.lines(drawn, "sparsity", "loss in %", f"{title}: loss by sparsity")
    return _figure(chart, title, [name for name, _ in curves])


def _losses(report: SensitivityReport, sparsities: Sequence[float]) -> str:
    rows = figures.curve_rows(report)
    columns = "".join(f'<th scope="col">{_text(c)}</th>' for c in rows.columns)
    lines = []
    for curve, row in zip(report.curves[:MOST_ROWS], rows.rows, strict=False):
        drops = {p.sparsity: p.drop for p in curve.points}
        name, gate, size, *cells = row
        kinds = [_kind(drops.get(s)) for s in sparsities]
        inside = "".join(
            f'<td class="n {kind}">{_text(text)}</td>'
            for kind, text in zip(kinds, cells, strict=True)
        )
        lines.append(
            f'<tr><th scope="row">{_text(name)}</th><td>{_text(gate)}</td><td class="n">{size}</td>'
            f"{inside}</tr>"
        )
    return (
        '<div class="wide" role="region" aria-label="loss by sparsity" tabindex="0"><table'
        f' class="losses"><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f"</div>{_more(len(report.curves) - MOST_ROWS, 'rows: the JSON report has all of them')}"
    )


def _kind(drop: float | None) -> str:
    if drop is None:
        return ""
    return next((f"loss-{name}" for limit, name in _COLOURS if drop <= limit), "loss-bad")


def _family_front(reports: Sequence[Report]) -> str:
    """Returns what each model of a family costs against what it reaches."""
    metric = reports[0].before.metric or next(iter(reports[0].before.metrics), None)
    if metric is None:
        return ""
    values = [metric.value]
    values += (r.after.metrics[0].value for r in reports)
    names = ["original", *(r.output.path for r in reports)]
    higher = metric.higher_is_better
    y = figures.metric_name(metric)
    drawn = [
        _front([1.0, *(r.ratios.bytes for r in reports)], values, names, higher, "size", y),
    ]
    times = [r.ratios.latency.median for r in reports if r.ratios.latency is not None]
    if len(times) == len(reports):
        drawn.append(_front([1.0, *times], values, names, higher, "latency", y))
    nonzero = [1.0, *(r.ratios.nonzero for r in reports)]
    drawn.append(_front(nonzero, values, names, higher, "weights not zero", y))
    return "<h2>What is paid, and what is reached</h2>" + _grid(drawn)


def _front(
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    higher: bool,
    what: str,
    metric: str,
    unit: str = "after ÷ before",
) -> str:
    points = list(zip(x, y, strict=True))
    best = charts.front(points, higher)
    named = [k for k in range(len(names)) if best[k] or len(names) <= _MOST_NAMED][:_MOST_NAMED]
    dots = [
        charts.Dot(a, b, str(k) if k in named else "", best[k]) for k, (a, b) in enumerate(points)
    ]
    chart = charts.scatter(dots, f"{what}, {unit}", metric, f"{metric} by {what}")
    key = "".join(
        f"<span><b>{k}</b> {_text(PurePath(names[k]).name or names[k])}</span>" for k in named
    )
    return (
        f"<figure><figcaption>{_text(metric)} by {_text(what)}; joined: no other is better in both"
        f'</figcaption>{chart}<p class="key">{key}</p></figure>'
    )


def _tried(trials: Sequence[Trial]) -> str:
    """Returns what the models of a search lost against what they saved."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.figures))
    drawn = []
    for one in names:
        for two in names:
            if one != "metric-drop" and two == "metric-drop":
                both = [t for t in trials if one in t.figures and two in t.figures]
                numbers = [str(trials.index(t) + 1) for t in both]
                points = [(t.figures[one], 100 * t.figures[two]) for t in both]
                best = charts.front(points, higher_is_better=False)
                dots = [
                    charts.Dot(*point, number, good)
                    for point, number, good in zip(points, numbers, best, strict=True)
                ]
                title = f"What models that were tried lose, by {one}"
                chart = charts.scatter(dots, f"{one}, after ÷ before", "loss in %", title)
                drawn.append(_figure(chart, f"{title}; joined: no other is better in both"))
    if not drawn:
        for one in names:
            line = [(np.mean(list(t.shares.values())), t.figures[one]) for t in trials if t.shares]
            points = [(float(a), float(b)) for a, b in line]
            dots = [charts.Dot(*p, str(k), False) for k, p in enumerate(points, 1)]
            if dots:
                chart = charts.scatter(dots, "mean sparsity", one, f"{one} by sparsity")
                drawn.append(_figure(chart, f"{one} of the models that were tried"))
    return _grid(drawn)


def _bench_front(report: BenchReport, group: str) -> str:
    """Returns what each model takes against what it reaches."""
    own = [model for model in report.models if model.group == group and model.metric is not None]
    if len(own) < 2 or own[0].metric is None:
        return ""
    metric = own[0].metric
    own = [m for m in own if m.metric is not None and m.metric.name == metric.name]
    values = [m.metric.value for m in own if m.metric is not None]
    names, y = [m.name for m in own], figures.metric_name(metric)
    higher = metric.higher_is_better
    times, sizes = [m.latency_ms.median for m in own], [m.bytes / 1024 for m in own]
    return _grid(
        [
            _front(times, values, names, higher, "latency", y, "ms"),
            _front(sizes, values, names, higher, "size", y, "KiB"),
        ]
    )
