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
    BenchReport,
    Check,
    CheckReport,
    FineTuned,
    LoadedModel,
    OtherLayer,
    Quantized,
    RecurrentLayer,
    RemovableUnits,
    Report,
    Skipped,
)
from rnnprune_cli.report import figures


def report_table(report: Report) -> RenderableType:
    """Returns checks, before/after figures, layers, fidelity, verification and warnings."""
    quantized, log = report.quantized, report.finetune
    return stacked(
        [
            Text.assemble(
                (printable(report.model.path), "bold"),
                " → ",
                (printable(report.output.path), "bold"),
                "   ",
                printable(figures.plan(report)),
            ),
            *_checks(report.checks),
            drawn(figures.figure_rows(report.before, report.after, report.ratios)),
            *([] if quantized is None else [_quantized(report, quantized)]),
            drawn(figures.layer_rows(report)),
            *([drawn(figures.repair_rows(report.repairs))] if report.repairs else []),
            *([] if log is None else [_training(log)]),
            drawn(figures.report_fidelity(report)),
            *([skipped_table(report.skipped)] if report.skipped else []),
            Text("\n").join(
                Text.assemble(_mark(claim.passed), printable(figures.claim(claim)))
                for claim in report.verification
            ),
            *warning_lines(report.warnings),
        ]
    )


def family_table(reports: Sequence[Report]) -> RenderableType:
    """Returns a line for each model of a family."""
    head = Text.assemble((printable(reports[0].model.path), "bold"), "   after ÷ before:")
    checks = _checks(figures.family_checks(reports))
    rows = drawn(figures.family_rows(reports))
    return stacked([head, *checks, rows, *warning_lines(figures.family_warnings(reports))])


def bench_table(report: BenchReport) -> RenderableType:
    """Returns checks, a line for each model, every setting, and the machine's noise."""
    reached = figures.first_settings(report).values()
    settings = dict.fromkeys(map(figures.setting_text, reached))
    return stacked(
        [
            Text("; ".join(settings)),
            *_checks(report.checks),
            drawn(figures.bench_rows(report)),
            drawn(figures.cost_rows(report)),
            *([drawn(figures.timing_rows(report))] if figures.several_settings(report) else []),
            drawn(figures.control_rows(report)),
            *warning_lines(report.warnings),
        ]
    )


def check_table(report: CheckReport) -> RenderableType:
    """Returns whether what was asked for holds, and what to do where it does not."""
    head = Text.assemble(
        (printable(report.report), "bold"),
        "" if report.baseline is None else f" against {printable(report.baseline)}",
        f"   {figures.verdict(report.checks)}",
    )
    return stacked([head, *_checks(report.checks), *warning_lines(report.warnings)])


def _checks(checks: Sequence[Check]) -> list[RenderableType]:
    """Returns the checks, and below each that fails what to do; nothing if there are none."""
    if not checks:
        return []
    found = figures.check_rows(checks)
    table = plain_table("", *found.columns[:-1], right=tuple(k + 1 for k in found.right))
    for check, row in zip(checks, found.rows, strict=True):
        table.add_row(Text.assemble(_mark(check.passed)), *row[:-1])
    hints = [
        Text(printable(f"{check.expression}: {check.hint}"))
        for check in checks
        if check.hint and not check.passed
    ]
    return [Group(table, *hints)]


def _mark(passed: bool) -> tuple[str, str]:
    return ("✓ ", "green") if passed else ("✗ ", "red")


def _quantized(report: Report, quantized: Quantized) -> RenderableType:
    """Returns what quantization did to the pruned model."""
    title = f"output, {quantized.kind} against pruned"
    parts: list[RenderableType] = [
        drawn(figures.quantized_rows(report, quantized)),
        Text(printable(figures.quantized_text(quantized))),
        Text(),
        drawn(figures.fidelity_rows(quantized.fidelity, title)),
    ]
    if quantized.left:
        parts += [Text(), skipped_table(quantized.left)]
    return Group(*parts)


def _training(log: FineTuned) -> RenderableType:
    """Returns what training came to, epoch by epoch, and how it went."""
    return stacked([drawn(figures.epoch_rows(log)), Text(printable(figures.training(log)))])


def skipped_table(skipped: Iterable[Skipped]) -> Table:
    """Returns what is recurrent but cannot be pruned."""
    return drawn(figures.skipped_rows(skipped))


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
            figures.count(layer.macs_per_step),
            f"{zeros(layer):.3f}",
            f"weights of {', '.join(shared)}" if shared else "",
            figures.was(layer.name, model.lifts),
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
            more.add_row(other.name, other.kind, other.op, *map(figures.count, sizes))
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


def drawn(rows: figures.Rows) -> Table:
    """Returns texts as a table without lines."""
    table = plain_table(*rows.columns, right=rows.right)
    for row in rows.rows:
        table.add_row(*row)
    return table
