"""The figures of every report as texts: formatted here once, whatever shows them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rnnprune_cli.model import (
    BenchModel,
    BenchRatio,
    BenchReport,
    Check,
    Claim,
    Control,
    FineTuned,
    Latency,
    LayerRow,
    Lift,
    Measurement,
    MetricValue,
    OutputFidelity,
    Quantized,
    Ratio,
    Ratios,
    Repair,
    Report,
    SensitivityReport,
    Skipped,
    Timing,
    Trial,
)
from rnnprune_cli.options import STRUCTURES

MAX_METRICS = 2
"""Metrics that each epoch of training is shown with."""
MAX_EPOCHS = 12
"""Epochs that are shown; of more, some at equal distances, the best and the last."""
_CLEAR = 1.1
"""Ends of an interval that are no further apart tell that there is no difference."""
SHARES = ("accuracy", "agreement")
"""Metrics that are told in points."""


@dataclass(frozen=True)
class Rows:
    """A table of texts.

    Attributes:
        columns: Its head.
        rows: As many texts each.
        right: Numbers of the columns that are set to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()

    def cut(self, most: int) -> tuple[Rows, int]:
        """Returns the first rows, and how many more there are."""
        return Rows(self.columns, self.rows[:most], self.right), max(len(self.rows) - most, 0)

    def filled(self) -> Rows:
        """Returns it without columns in which nothing is written."""
        keep = [k for k in range(len(self.columns)) if any(row[k] for row in self.rows)]
        return Rows(
            tuple(self.columns[k] for k in keep),
            tuple(tuple(row[k] for k in keep) for row in self.rows),
            tuple(new for new, old in enumerate(keep) if old in self.right),
        )


# Numbers


def count(number: int) -> str:
    """Returns a whole number with commas."""
    return f"{number:,}"


def size(number: float) -> str:
    """Returns bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def milliseconds(value: float) -> str:
    """Returns a time in the unit that suits it."""
    if value >= 10_000:
        return f"{value / 1000:.2f} s"
    return f"{value * 1000:.1f} µs" if value < 1 else f"{value:.3f} ms"


def interval(ratio: Ratio) -> str:
    """Returns a ratio with its 95 % interval."""
    return f"{ratio.median:.3f}  [{ratio.low:.3f}, {ratio.high:.3f}]"


def figure(metric: MetricValue) -> str:
    """Returns the value of a metric."""
    return "no number" if math.isnan(metric.value) else f"{metric.value:.4f}"


def metric_name(metric: MetricValue, among: int = 1) -> str:
    """Returns what a metric is called, of which output if there are several, and what is better."""
    whose = f" of {metric.output}" if among > 1 else ""
    return f"{metric.name}{whose} {'↑' if metric.higher_is_better else '↓'}"


def change(before: MetricValue, after: MetricValue) -> str:
    """Returns a metric before and after."""
    return f"{after.name} {figure(before)} → {figure(after)}"


def _share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# A pruned model


def plan(report: Report) -> str:
    """Returns what was done, stage by stage."""
    if not report.plan.stages:
        return "lifted"
    return "; ".join(
        f"{s.method}, {s.granularity} by {s.scope}, sparsity {s.sparsity:g}"
        for s in report.plan.stages
    )


def headline(report: Report) -> str:
    """Returns in one line what a reader wants to know first."""
    return ", ".join(said for said, _ in highlights(report))


def highlights(report: Report) -> tuple[tuple[str, str], ...]:
    """Returns what a reader wants to know first, each with the figures that it is taken from."""
    before, after = report.before, report.after
    found = [
        (
            _times(report.ratios.bytes, "smaller", "larger", "as large"),
            f"{size(before.bytes)} → {size(after.bytes)}",
        )
    ]
    latency = report.ratios.latency
    if latency is not None and before.latency_ms and after.latency_ms:
        speed = _speed(latency, "faster", "slower", "as fast")
        times = (before.latency_ms.median, after.latency_ms.median)
        found.append((speed, " → ".join(map(milliseconds, times))))
    if before.metric is not None and after.metric is not None:
        values = f"{figure(before.metric)} → {figure(after.metric)}"
        found.append((_changed(before.metric, after.metric), values))
    elif after.metrics:
        metric = after.metrics[0]
        found.append((f"{metric.name} {figure(metric)}", "against the original's outputs"))
    return tuple(found)


def _speed(ratio: Ratio, faster: str, slower: str, same: str) -> str:
    """Says how much faster something became, as far as the interval tells."""
    if not ratio.low <= 1 <= ratio.high:
        return _times(ratio.median, faster, slower, same)
    return (
        same if ratio.high <= _CLEAR * ratio.low else f"not clearly {faster.split()[0]} or {slower}"
    )


def _times(ratio: float, less: str, more: str, same: str) -> str:
    """Says how much less or more something became."""
    if abs(ratio - 1) < 0.005:
        return same
    times, word = (1 / ratio, less) if ratio < 1 else (ratio, more)
    if times < 1.2:
        return f"{100 * abs(ratio - 1):.0f} % {word}"
    return f"{times:.1f}× {word}"  # noqa: RUF001


def _changed(before: MetricValue, after: MetricValue) -> str:
    change = after.value - before.value
    if after.name in SHARES:
        return f"{after.name} {_signed(100 * change, 1)} points"
    return f"{after.name} {_signed(change, 4)}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")  # noqa: RUF001


def figure_rows(before: Measurement, after: Measurement, ratios: Ratios) -> Rows:
    """Returns what was measured before and after."""
    rows = [
        (
            "parameters",
            count(before.parameters),
            count(after.parameters),
            f"{ratios.parameters:.3f}",
        ),
        ("  not zero", count(before.nonzero), count(after.nonzero), f"{ratios.nonzero:.3f}"),
        (
            "recurrent weights not zero",
            count(before.recurrent_nonzero),
            count(after.recurrent_nonzero),
            f"{after.recurrent_nonzero / max(before.recurrent_nonzero, 1):.3f}",
        ),
        ("size", size(before.bytes), size(after.bytes), f"{ratios.bytes:.3f}"),
        ("  gzipped", size(before.gzip_bytes), size(after.gzip_bytes), f"{ratios.gzip_bytes:.3f}"),
        (
            "MACs per step",
            count(before.macs_per_step),
            count(after.macs_per_step),
            f"{after.macs_per_step / max(before.macs_per_step, 1):.3f}",
        ),
    ]
    if before.latency_ms and after.latency_ms and ratios.latency:
        rows.append(
            (
                "latency (median)",
                milliseconds(before.latency_ms.median),
                milliseconds(after.latency_ms.median),
                interval(ratios.latency),
            )
        )
    for one, two in zip(before.metrics, after.metrics, strict=True):
        name = metric_name(one, len(before.metrics))
        rows.append((name, figure(one), figure(two), f"{two.value - one.value:+.4f}"))
    return Rows(("", "before", "after", "after ÷ before"), tuple(rows), (1, 2, 3))


_WAS = {
    "cell": "a hand-written cell",
    "loop": "a loop",
    "chain": "an unrolled chain",
    "directions": "a pair, one for each direction",
}


def was(name: str, lifts: Sequence[Lift]) -> str:
    """Says what a lifted layer was; the last lift of a name is the one that stands."""
    return next((_WAS[lift.pattern] for lift in reversed(lifts) if lift.name == name), "")


def layer_rows(report: Report) -> Rows:
    """Returns what happened to each layer, in the model's order."""
    masks = any(stage.granularity not in STRUCTURES for stage in report.plan.stages)
    by_gate = ("by gate",) if masks else ()
    columns = ("layer", "op", "hidden", "weights", "not zero", "sparsity", *by_gate, "stored", "")
    rows = tuple(_layer(row, masks, report.lifts) for row in report.layers)
    return Rows(columns, rows, (2, 3, 4, 5))


def foremost(layers: Sequence[LayerRow], most: int) -> tuple[LayerRow, ...]:
    """Returns the layers that lost most, in the model's order."""
    lost = sorted(range(len(layers)), key=lambda k: -_lost(layers[k]))
    return tuple(layers[k] for k in sorted(lost[:most]))


def _lost(row: LayerRow) -> float:
    return row.sparsity * row.weights_before


def _layer(row: LayerRow, masks: bool, lifts: Sequence[Lift]) -> tuple[str, ...]:
    gates = " ".join(f"{letter} {_share(share)}" for letter, share in row.gates.items())
    hidden = str(row.hidden_after)
    lifted = was(row.name, lifts)
    return (
        row.name,
        row.op if row.direction == "forward" else f"{row.op} {row.direction}".strip(),
        hidden if row.hidden_after == row.hidden_before else f"{row.hidden_before} → {hidden}",
        count(row.weights_after),
        count(row.nonzero_after),
        f"{row.sparsity:.4f}",
        *((gates,) if masks else ()),
        "/".join(dict.fromkeys(row.stored)),
        row.blocked or (f"was {lifted}" if lifted else ""),
    )


def repair_rows(repairs: Iterable[Repair]) -> Rows:
    """Returns how well what is gone is made up for."""
    rows = tuple(
        (
            row.reader,
            f"{count(row.samples)} samples" if row.samples else "not repaired",
            "" if row.unexplained is None else f"{100 * row.unexplained:.1f} %",
            row.problem or "",
        )
        for row in repairs
    )
    return Rows(("repaired", "on", "left unexplained", ""), rows, (1, 2))


def epoch_rows(log: FineTuned) -> Rows:
    """Returns what training came to, epoch by epoch."""
    names = [metric.name for metric in log.start][:MAX_METRICS]
    columns = ("trained", "loss", "validation", *names, "worse by", "sparsity")
    first = (
        "before" if log.best else "before, kept",
        "",
        "",
        *(figure(metric) for metric in log.start[:MAX_METRICS]),
        f"{log.drop:+.4f}",
        "",
    )
    total = len(log.epochs)
    most = min(total, MAX_EPOCHS)
    shown = {1 + k * (total - 1) // max(most - 1, 1) for k in range(most)} | {log.best}
    rows = (
        (
            f"epoch {number}" + (", kept" if number == log.best else ""),
            f"{epoch.loss:.4g}",
            f"{epoch.validation_loss:.4g}",
            *(figure(metric) for metric in epoch.metrics[:MAX_METRICS]),
            f"{epoch.drop:+.4f}",
            f"{epoch.sparsity:.3g}",
        )
        for number, epoch in enumerate(log.epochs, 1)
        if number in shown
    )
    return Rows(columns, (first, *rows), tuple(range(1, 5 + len(names))))


def training(log: FineTuned) -> str:
    """Returns how training went, in a sentence."""
    train, held = log.samples
    ended = f"; ended early: {log.stopped}" if log.stopped else ""
    return (
        f"{count(log.steps)} updates of {count(log.parameters[0])} of {count(log.parameters[1])}"
        f" parameters in {log.seconds:.0f} s on {count(train)} samples, validated on"
        f" {count(held)}; minimized {log.loss}; gradients cut {count(log.clipped)} times,"
        f" went back {log.rollbacks} times{ended}"
    )


def fidelity_rows(
    fidelity: Iterable[OutputFidelity], title: str = "output, pruned against original"
) -> Rows:
    """Returns how much each output changed."""
    rows = tuple(
        (
            row.name,
            f"{row.max_abs:.3g}",
            f"{row.mean_abs:.3g}",
            f"{row.cosine:.4f}",
            "" if row.agreement is None else f"{row.agreement:.4f}",
        )
        for row in fidelity
    )
    columns = (title, "largest", "mean difference", "cosine", "agreement")
    return Rows(columns, rows, (1, 2, 3, 4))


def report_fidelity(report: Report) -> Rows:
    """Returns how much each output of the written model differs from the original's."""
    what = "pruned" if report.plan.stages else "lifted"
    return fidelity_rows(report.fidelity, f"output, {what} against original")


def quantized_rows(report: Report, quantized: Quantized) -> Rows:
    """Returns the figures of the pruned model, and of the same quantized."""
    rows = figure_rows(quantized.before, report.after, quantized.ratios)
    return Rows(("", "pruned", quantized.kind, f"{quantized.kind} ÷ pruned"), rows.rows, rows.right)


def quantized_text(quantized: Quantized) -> str:
    """Returns which operators were quantized."""
    parts = ", ".join(f"{number} {op}" for op, number in quantized.operators.items())
    return f"{quantized.kind}: {parts or 'no operator'} quantized"


def claim(row: Claim) -> str:
    """Returns a verified statement with its figure."""
    return f"{row.claim} (largest difference {row.max_abs:.2g})"


def skipped_rows(skipped: Iterable[Skipped]) -> Rows:
    """Returns what is recurrent but cannot be pruned."""
    rows = tuple((row.name, row.reason, row.hint) for row in skipped)
    return Rows(("skipped", "why", "what would help"), rows)


def trial_rows(trials: Sequence[Trial]) -> Rows:
    """Returns the models that a search has tried."""
    names = tuple(dict.fromkeys(name for trial in trials for name in trial.figures))
    rows = tuple(
        (
            str(number),
            _shares(trial.shares),
            *(f"{trial.figures[n]:.4g}" if n in trial.figures else "" for n in names),
            "yes" if trial.met else "no",
        )
        for number, trial in enumerate(trials, 1)
    )
    return Rows(
        ("tried", "sparsity", *names, "meets the targets"), rows, tuple(range(1, 2 + len(names)))
    )


def _shares(shares: Mapping[str, float]) -> str:
    if not shares:
        return ""
    low, high = min(shares.values()), max(shares.values())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def environment_rows(environment: Mapping[str, Any]) -> Rows:
    """Returns the machine and versions."""
    rows = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append((name, str(value)))
    return Rows(("environment", ""), tuple(rows))


# Checks


def measured(check: Check) -> str:
    """Returns a check's figure, with its interval and chance where it has them."""
    text = "not known" if math.isnan(check.actual) else f"{check.actual:.4g}"
    if check.low is not None and check.high is not None:
        text += f"  [{check.low:.4g}, {check.high:.4g}]"
    return text if check.p is None else f"{text}, p = {check.p:.2g}"


def check_rows(checks: Iterable[Check]) -> Rows:
    """Returns the conditions that a result was held against."""
    rows = tuple(
        (
            check.expression,
            check.subject,
            measured(check),
            f"{check.limit:.4g}",
            "holds" if check.passed else "fails",
        )
        for check in checks
    )
    return Rows(("check", "of", "measured", "limit", "result"), rows, (2, 3)).filled()


def verdict(checks: Sequence[Check]) -> str:
    """Returns how many checks hold."""
    failed = sum(not check.passed for check in checks)
    if failed:
        return f"{failed} of {len(checks)} {'check fails' if len(checks) == 1 else 'checks fail'}"
    if not checks:
        return "nothing was checked"
    return "the check holds" if len(checks) == 1 else f"all {len(checks)} checks hold"


# Families


def family_rows(reports: Sequence[Report]) -> Rows:
    """Returns a line for each model of a family: after ÷ before."""
    rows = []
    for report in reports:
        after, ratios = report.after, report.ratios
        before_metric, metric = report.before.metric, after.metric
        rows.append(
            (
                report.output.path,
                f"{ratios.bytes:.3f}",
                f"{ratios.nonzero:.3f}",
                "" if ratios.latency is None else interval(ratios.latency),
                "" if metric is None or before_metric is None else change(before_metric, metric),
                plan(report),
            )
        )
    columns = ("model", "size", "not zero", "latency", "metric", "plan")
    return Rows(columns, tuple(rows), (1, 2, 3))


def family_checks(reports: Iterable[Report]) -> tuple[Check, ...]:
    """Returns the checks of all of them, each with the model that it is about."""
    return tuple(
        dataclasses.replace(check, subject=check.subject or report.output.path)
        for report in reports
        for check in report.checks
    )


def family_warnings(reports: Iterable[Report]) -> tuple[str, ...]:
    """Returns what is to be known about any of them, once each."""
    return tuple(dict.fromkeys(warning for report in reports for warning in report.warnings))


# Sensitivity


def curves_title(report: SensitivityReport) -> str:
    """Returns what the curves begin with, and how they were measured."""
    dense = report.dense[0]
    return (
        f"{metric_name(dense)} {figure(dense)}; {report.stage.method},"
        f" {report.stage.granularity} by {report.stage.scope}, one layer at a time"
    )


def drop(value: float) -> str:
    """Returns a loss."""
    return f"{100 * value:+.1f} %"


def curve_sparsities(report: SensitivityReport) -> tuple[float, ...]:
    """Returns where the curves were measured."""
    return tuple(sorted({p.sparsity for curve in report.curves for p in curve.points}))


def curve_rows(report: SensitivityReport) -> Rows:
    """Returns what is lost by layer, gate and sparsity."""
    sparsities = curve_sparsities(report)
    columns = ("layer", "gate", "size", *(f"{100 * s:g} %" for s in sparsities))
    rows = []
    for curve in report.curves:
        points = {p.sparsity: drop(p.drop) for p in curve.points}
        cells = (points.get(s, "") for s in sparsities)
        rows.append((curve.layer, curve.gate or "all", count(curve.size), *cells))
    return Rows(columns, tuple(rows), tuple(range(2, len(columns))))


# Benchmarks

_Setting = tuple[int | None, int | None, int]


def setting(row: Timing | BenchRatio | Control) -> _Setting:
    """Returns batch, steps and threads."""
    return row.batch, row.steps, row.threads


def setting_text(row: Timing | BenchRatio | Control) -> str:
    """Returns the same in words."""
    parts = [] if row.batch is None else [f"batch {row.batch}"]
    parts += [] if row.steps is None else [f"{count(row.steps)} step{'s' * (row.steps != 1)}"]
    return ", ".join([*parts, f"{row.threads} {'thread' if row.threads == 1 else 'threads'}"])


def quantiles(latency: Latency) -> tuple[str, str, str]:
    """Returns median, 95th and 99th percentile."""
    last = "" if latency.p99 is None else milliseconds(latency.p99)
    return milliseconds(latency.median), milliseconds(latency.p95), last


def reference(report: BenchReport, model: str) -> str:
    """Returns what a model was compared with; itself if it is what others were."""
    return next((row.reference for row in report.ratios if row.model == model), model)


def first_settings(report: BenchReport) -> Mapping[str, Timing]:
    """Returns the first setting in which each model was timed."""
    first: dict[str, Timing] = {}
    for row in report.timings:
        first.setdefault(row.model, row)
    return first


def latency_ratio(report: BenchReport, timing: Timing) -> Ratio | None:
    """Returns what a model takes compared with its reference; None for the reference."""
    return next(
        (
            row.latency
            for row in report.ratios
            if row.model == timing.model != row.reference and setting(row) == setting(timing)
        ),
        None,
    )


def bench_rows(report: BenchReport) -> Rows:
    """Returns a line for each model: metric, size, and latency in its first setting."""
    models = {model.name: model for model in report.models}
    first = first_settings(report)
    rows, group = [], ""
    for model in report.models:
        other = models[reference(report, model.name)]
        timing = first.get(model.name)
        ratio = None if timing is None else latency_ratio(report, timing)
        middle, *tail = quantiles(model.latency_ms)
        told = model.group == group or model.name.startswith(model.group)
        rows.append(
            (
                "" if told else model.group,
                model.name,
                bench_metric(model),
                size(model.bytes),
                f"{model.bytes / max(other.bytes, 1):.3f}",
                middle,
                ("reference" if other is model else "") if ratio is None else interval(ratio),
                *tail,
            )
        )
        group = model.group
    columns = (
        "", "model", "metric", "size", "size ÷", "latency p50", "latency ÷", "p95", "p99",
    )  # fmt: skip
    return Rows(columns, tuple(rows), tuple(range(3, 9))).filled()


def cost_rows(report: BenchReport) -> Rows:
    """Returns a line for each model: throughput, what loading takes, and what a step reads."""
    first = first_settings(report)
    rows = tuple(
        (
            model.name,
            *_rates(first.get(model.name)),
            milliseconds(model.load_ms),
            "" if model.peak_bytes is None else size(model.peak_bytes),
            "" if model.macs_per_step is None else count(model.macs_per_step),
            "" if model.bytes_per_step is None else size(model.bytes_per_step),
            count(model.parameters),
            count(model.nonzero),
        )
        for model in report.models
    )
    columns = (
        "model", "samples/s", "steps/s", "real time", "load", "memory", "MACs/step", "bytes/step",
        "parameters", "not zero",
    )  # fmt: skip
    return Rows(columns, rows, tuple(range(1, 10))).filled()


def bench_metric(model: BenchModel) -> str:
    """Returns what a model reaches on the data."""
    return "" if model.metric is None else f"{metric_name(model.metric)} {figure(model.metric)}"


def _rates(timing: Timing | None) -> tuple[str, str, str]:
    if timing is None:
        return "", "", ""
    factor = timing.real_time_factor
    return (
        _rate(timing.samples_per_second),
        _rate(timing.steps_per_second),
        "" if factor is None else f"{factor:.3g}",
    )


def timing_rows(report: BenchReport) -> Rows:
    """Returns a line for each model and setting."""
    rows = []
    for row in report.timings:
        ratio = latency_ratio(report, row)
        alone = reference(report, row.model) == row.model
        middle, *tail = quantiles(row.latency_ms)
        text = ("reference" if alone else "") if ratio is None else interval(ratio)
        rows.append((setting_text(row), row.model, middle, text, *tail, *_rates(row)))
    columns = (
        "setting", "model", "latency p50", "latency ÷", "p95", "p99", "samples/s", "steps/s",
        "real time",
    )  # fmt: skip
    return Rows(columns, tuple(rows), tuple(range(2, 9))).filled()


def control_rows(report: BenchReport) -> Rows:
    """Returns what each reference is against itself: the noise of the machine."""
    rows = tuple(
        (
            row.reference,
            setting_text(row),
            interval(row.latency),
            str(row.rounds),
            f"{row.seconds:.0f} s",
        )
        for row in report.controls
    )
    return Rows(("against itself", "setting", "÷", "rounds", "time"), rows, (2, 3, 4))


def made_rows(report: BenchReport) -> Rows:
    """Returns how each model was made, and what it is."""
    rows = tuple((m.name, m.how, m.path, m.format, m.sha256[:12]) for m in report.models)
    return Rows(("model", "how", "file", "format", "sha256"), rows).filled()


def several_settings(report: BenchReport) -> bool:
    """Tells whether models were timed in more than one setting."""
    return len(report.timings) > len(first_settings(report))


def bench_headline(report: BenchReport) -> str:
    """Returns what is fastest and smallest, where one reference was compared with others."""
    if len({reference(report, model.name) for model in report.models}) != 1:
        groups = len({model.group for model in report.models})
        return f"{len(report.models)} models in {groups} groups"
    if len(report.models) < 2:
        return ""
    base = reference(report, report.models[0].name)
    first = first_settings(report)
    found = []
    for model in report.models:
        timing = first.get(model.name)
        ratio = None if timing is None else latency_ratio(report, timing)
        if ratio is not None:
            found.append((ratio.median, ratio, model))
    if not found:
        return f"{len(report.models)} models"
    _, ratio, best = min(found, key=lambda item: item[0])
    speed = _speed(ratio, "faster than", "slower than", "as fast as")
    whole = next(model for model in report.models if model.name == base)
    small = _times(best.bytes / max(whole.bytes, 1), "smaller", "larger", "as large")
    which = "" if len(report.models) == 2 else "fastest: "
    return f"{which}{best.name} is {speed} {base}, and {small}"


@dataclass(frozen=True)
class Section:
    """A part of a report below its main figures.

    Attributes:
        title: What it is about.
        rows: Its table.
        notes: Sentences below that.
    """

    title: str
    rows: Rows | None = None
    notes: tuple[str, ...] = ()


def report_sections(report: Report) -> tuple[Section, ...]:
    """Returns the details of a pruned model."""
    sections = [Section("Layers", layer_rows(report))]
    if report.quantized is not None:
        kind, own = report.quantized.kind, report.quantized
        rows = quantized_rows(report, own)
        sections.append(Section(f"Quantization to {kind}", rows, (quantized_text(own),)))
        title = f"output, {kind} against pruned"
        sections.append(
            Section(f"Outputs, {kind} against pruned", fidelity_rows(own.fidelity, title))
        )
        if own.left:
            sections.append(Section("Not quantized", skipped_rows(own.left)))
    if report.finetune is not None:
        log = report.finetune
        sections.append(Section("Fine-tuning", epoch_rows(log), (training(log),)))
    if report.repairs:
        sections.append(Section("Repairs", repair_rows(report.repairs)))
    if report.trials:
        sections.append(Section("Models tried", trial_rows(report.trials)))
    sections.append(Section("Outputs against the original", report_fidelity(report)))
    if report.skipped:
        sections.append(Section("Skipped", skipped_rows(report.skipped)))
    return tuple(sections)


def bench_sections(report: BenchReport) -> tuple[Section, ...]:
    """Returns the details of a benchmark."""
    sections = [Section("Throughput, memory and work", cost_rows(report))]
    if several_settings(report):
        sections.append(Section("Every setting", timing_rows(report)))
    sections.append(Section("The machine's noise", control_rows(report)))
    sections.append(Section("The models", made_rows(report)))
    return tuple(sections)
