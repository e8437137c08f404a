"""The report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rnnprune_cli.errors import printable
from rnnprune_cli.methods import Method
from rnnprune_cli.model import (
    FineTuned,
    Lift,
    LoadedModel,
    OtherLayer,
    RecurrentLayer,
    RemovableUnits,
    Repair,
    Report,
    Skipped,
)
from rnnprune_cli.options import STRUCTURES


def report_table(report: Report) -> RenderableType:
    """Returns before/after figures, layers, fidelity, verification and warnings."""
    parts: list[RenderableType] = [
        Text.assemble(
            (printable(report.model.path), "bold"),
            " → ",
            (printable(report.output.path), "bold"),
            "   ",
            _plan(report),
        ),
        _figures(report),
        _layers(report),
        *([_repairs(report.repairs)] if report.repairs else []),
        *([_epochs(report.finetune)] if report.finetune else []),
        _fidelity(report),
    ]
    if report.skipped:
        parts.append(skipped_table(report.skipped))
    parts.append(
        Text("\n").join(
            Text.assemble(
                ("✓ " if c.passed else "✗ ", "green" if c.passed else "red"),
                f"{c.claim} (largest difference {c.max_abs:.2g})",
            )
            for c in report.verification
        )
    )
    return stacked([*parts, *warning_lines(report.warnings)])


def family_table(reports: Sequence[Report]) -> RenderableType:
    """Returns a line for each model of a family."""
    table = plain_table("model", "plan", "size", "not zero", "latency", "metric", right=(2, 3, 4))
    for report in reports:
        after, ratios = report.after, report.ratios
        latency = ratios.latency
        table.add_row(
            report.output.path,
            _plan(report),
            f"{ratios.bytes:.3f}",
            f"{ratios.nonzero:.3f}",
            ""
            if latency is None
            else f"{latency.median:.3f}  [{latency.low:.3f}, {latency.high:.3f}]",
            ""
            if after.metric is None or report.before.metric is None
            else f"{after.metric.name} {report.before.metric.value:.4f} → {after.metric.value:.4f}",
        )
    head = Text.assemble((printable(reports[0].model.path), "bold"), "   after ÷ before:")
    warnings = dict.fromkeys(warning for report in reports for warning in report.warnings)
    return stacked([head, table, *warning_lines(list(warnings))])


def _plan(report: Report) -> str:
    if not report.plan.stages:
        return "lifted"
    return "; ".join(
        f"{s.method}, {s.granularity} by {s.scope}, sparsity {s.sparsity:g}"
        for s in report.plan.stages
    )


def _figures(report: Report) -> Table:
    table = plain_table("", "before", "after", "after ÷ before", right=(1, 2, 3))
    before, after, ratios = report.before, report.after, report.ratios
    table.add_row(
        "parameters",
        _count(before.parameters),
        _count(after.parameters),
        f"{ratios.parameters:.3f}",
    )
    table.add_row(
        "  not zero", _count(before.nonzero), _count(after.nonzero), f"{ratios.nonzero:.3f}"
    )
    table.add_row(
        "recurrent weights not zero",
        _count(before.recurrent_nonzero),
        _count(after.recurrent_nonzero),
        f"{after.recurrent_nonzero / max(before.recurrent_nonzero, 1):.3f}",
    )
    table.add_row("size", _size(before.bytes), _size(after.bytes), f"{ratios.bytes:.3f}")
    table.add_row(
        "  gzipped", _size(before.gzip_bytes), _size(after.gzip_bytes), f"{ratios.gzip_bytes:.3f}"
    )
    table.add_row(
        "MACs per step",
        _count(before.macs_per_step),
        _count(after.macs_per_step),
        f"{after.macs_per_step / max(before.macs_per_step, 1):.3f}",
    )
    if before.latency_ms and after.latency_ms and ratios.latency:
        r = ratios.latency
        table.add_row(
            "latency (median)",
            _milliseconds(before.latency_ms.median),
            _milliseconds(after.latency_ms.median),
            f"{r.median:.3f}  [{r.low:.3f}, {r.high:.3f}]",
        )
    for one, two in zip(before.metrics, after.metrics, strict=True):
        whose = f" of {one.output}" if len(before.metrics) > 1 else ""
        table.add_row(
            f"{one.name}{whose} {'↑' if one.higher_is_better else '↓'}",
            f"{one.value:.4f}",
            f"{two.value:.4f}",
            f"{two.value - one.value:+.4f}",
        )
    return table


def _layers(report: Report) -> Table:
    masks = any(stage.granularity not in STRUCTURES for stage in report.plan.stages)
    by_gate = ("by gate",) if masks else ()
    columns = ("layer", "op", "hidden", "weights", "not zero", "sparsity", *by_gate, "stored", "")
    table = plain_table(*columns, right=(2, 3, 4, 5))
    for row in report.layers:
        gates = " ".join(f"{letter} {_share(share)}" for letter, share in row.gates.items())
        table.add_row(
            row.name,
            row.op if row.direction == "forward" else f"{row.op} {row.direction}".strip(),
            str(row.hidden_after)
            if row.hidden_after == row.hidden_before
            else f"{row.hidden_before} → {row.hidden_after}",
            _count(row.weights_after),
            _count(row.nonzero_after),
            f"{row.sparsity:.4f}",
            *((gates,) if masks else ()),
            "/".join(dict.fromkeys(row.stored)),
            row.blocked or (f"was {was}" if (was := _was(row.name, report.lifts)) else ""),
        )
    return table


def _repairs(repairs: Sequence[Repair]) -> Table:
    columns = ("repaired", "on", "left unexplained", "")
    table = plain_table(*columns, right=(1, 2))
    for row in repairs:
        table.add_row(
            row.reader,
            f"{_count(row.samples)} samples" if row.samples else "not repaired",
            "" if row.unexplained is None else f"{100 * row.unexplained:.1f} %",
            row.problem or "",
        )
    return table


MAX_METRICS = 2
MAX_EPOCHS = 12
"""Epochs that are shown; of more, some at equal distances, the best and the last."""


def _epochs(log: FineTuned) -> RenderableType:
    """Returns what training came to, epoch by epoch, and how it went."""
    names = [metric.name for metric in log.start][:MAX_METRICS]
    right = tuple(range(1, 5 + len(names)))
    columns = ("trained", "loss", "validation", *names, "worse by", "sparsity")
    table = plain_table(*columns, right=right)
    table.add_row(
        "before" if log.best else "before, kept",
        "",
        "",
        *(f"{metric.value:.4f}" for metric in log.start[:MAX_METRICS]),
        f"{log.drop:+.4f}",
        "",
    )
    count = len(log.epochs)
    rows = min(count, MAX_EPOCHS)
    shown = {1 + k * (count - 1) // max(rows - 1, 1) for k in range(rows)} | {log.best}
    for number, epoch in enumerate(log.epochs, 1):
        if number in shown:
            table.add_row(
                f"epoch {number}" + (", kept" if number == log.best else ""),
                f"{epoch.loss:.4g}",
                f"{epoch.validation_loss:.4g}",
                *(f"{metric.value:.4f}" for metric in epoch.metrics[:MAX_METRICS]),
                f"{epoch.drop:+.4f}",
                f"{epoch.sparsity:.3g}",
            )
    train, held = log.samples
    ended = f"; ended early: {log.stopped}" if log.stopped else ""
    said = (
        f"{_count(log.steps)} updates of {_count(log.parameters[0])} of {_count(log.parameters[1])}"
        f" parameters in {log.seconds:.0f} s on {_count(train)} samples, validated on"
        f" {_count(held)}; minimized {log.loss}; gradients cut {_count(log.clipped)} times,"
        f" went back {log.rollbacks} times{ended}"
    )
    return stacked([table, Text(printable(said))])


_WAS = {
    "cell": "a hand-written cell",
    "loop": "a loop",
    "chain": "an unrolled chain",
    "directions": "a pair, one for each direction",
}


def _was(name: str, lifts: Sequence[Lift]) -> str:
    """Says what a lifted layer was; the last lift of a name is the one that stands."""
    return next((_WAS[lift.pattern] for lift in reversed(lifts) if lift.name == name), "")


def _fidelity(report: Report) -> Table:
    table = plain_table(
        f"output, {'pruned' if report.plan.stages else 'lifted'} against original",
        "largest",
        "mean difference",
        "cosine",
        "agreement",
        right=(1, 2, 3, 4),
    )
    for row in report.fidelity:
        table.add_row(
            row.name,
            f"{row.max_abs:.3g}",
            f"{row.mean_abs:.3g}",
            f"{row.cosine:.4f}",
            "" if row.agreement is None else f"{row.agreement:.4f}",
        )
    return table


def skipped_table(skipped: Iterable[Skipped]) -> Table:
    """Returns what is recurrent but cannot be pruned."""
    table = plain_table("skipped", "why", "what would help")
    for row in skipped:
        table.add_row(row.name, row.reason, row.hint)
    return table


def inspect_table(
    model: LoadedModel, units: Sequence[RemovableUnits], others: Sequence[OtherLayer]
) -> RenderableType:
    """Returns the recurrent layers of a model, what of them can go, and what blocks the rest."""
    head = " · ".join(
        part
        for part in (model.format, f"opset {model.opset}" if model.opset else "", model.producer)
        if part
    )
    parts: list[RenderableType] = [
        Text.assemble((printable(str(model.path)), "bold"), f"   {head}")
    ]
    columns = ("layer", "op", "inputs", "hidden", "can go", "weights", "zeros", "shares", "was")
    table = plain_table(*columns, right=(2, 3, 4, 5, 6))
    can_go = {layer.layer: layer for layer in units}
    owners: dict[str, str] = {}
    for layer in model.layers:
        shared = sorted({owners[w.name] for w in layer.weights if w.name in owners})
        for weight in layer.weights:
            owners.setdefault(weight.name, layer.name)
        table.add_row(
            layer.name,
            layer.op if layer.direction == "forward" else f"{layer.op} {layer.direction}",
            str(layer.input_size),
            str(layer.hidden_size),
            str(can_go[layer.name].removable) if layer.name in can_go else "",
            _count(layer.macs_per_step),
            f"{zeros(layer):.3f}",
            f"weights of {', '.join(shared)}" if shared else "",
            _was(layer.name, model.lifts),
        )
    if model.layers:
        parts.append(table)
    held = [layer for layer in units if layer.blocked or layer.coupled]
    if held:
        parts.append(_held_units(held))
    if others:
        more = plain_table(
            "with --include", "kind", "op", "rows", "columns", "weights", right=(3, 4, 5)
        )
        for other in others:
            sizes = (other.hidden_size, other.input_size, other.w.size)
            more.add_row(other.name, other.kind, other.op, *map(_count, sizes))
        parts.append(more)
    if model.skipped:
        parts.append(skipped_table(model.skipped))
    return stacked([*parts, *warning_lines(model.warnings)])


def _held_units(layers: Iterable[RemovableUnits]) -> Table:
    table = plain_table(
        "hidden units of", "go with those of", "cannot all go, because", "what helps"
    )
    for layer in layers:
        table.add_row(layer.layer, ", ".join(layer.coupled), layer.blocked or "", layer.hint)
    return table


def zeros(layer: RecurrentLayer) -> float:
    """Returns the share of a layer's weights that is zero."""
    return 1 - sum(w.nonzero for w in layer.weights) / layer.macs_per_step


def methods_table(
    methods: Iterable[Method],
    granularities: Mapping[str, str],
    scopes: Mapping[str, Mapping[str, str]],
    exports: Mapping[str, str],
) -> RenderableType:
    """Returns every method, granularity, scope and export form."""
    criteria = plain_table("--method", "--granularity", "what it scores", "paper")
    for m in methods:
        criteria.add_row(m.name, ", ".join(m.scores), m.summary, m.paper)
    together = plain_table("--granularity", "what is removed together")
    for name, summary in granularities.items():
        together.add_row(name, summary)
    competition = plain_table("--granularity", "--scope", "within what the scores compete")
    for granularity, known in scopes.items():
        for name, summary in known.items():
            competition.add_row(granularity, name, summary)
    forms = plain_table("--export", "how pruned weights are stored")
    for name, summary in exports.items():
        forms.add_row(name, summary)
    return Group(criteria, Text(), together, Text(), competition, Text(), forms)


def warning_lines(warnings: Sequence[str]) -> list[RenderableType]:
    """Returns the warnings, marked as such; nothing if there are none."""
    marked = [Text.assemble(("! ", "yellow"), printable(warning)) for warning in warnings]
    return [Text("\n").join(marked)] if marked else []


def stacked(parts: Sequence[RenderableType]) -> RenderableType:
    """Puts a blank line between parts."""
    return Group(*(item for part in parts for item in (Text(), part)), Text())


class _PlainTable(Table):
    """A table whose cells are text: names in a model are neither markup nor control characters."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:  # noqa: ANN401
        """Adds a row."""
        texts = (c if isinstance(c, Text) else Text(printable(str(c))) for c in cells)
        super().add_row(*texts, **options)


def plain_table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """Returns an empty table without lines; the columns in ``right`` are set to the right."""
    table = _PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k in right else "left", overflow="fold")
    return table


def _count(number: int) -> str:
    return f"{number:,}"


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.2f} GiB"


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.1f} µs" if value < 1 else f"{value:.3f} ms"


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")
