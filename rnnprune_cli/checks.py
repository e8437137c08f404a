"""Requirements and baselines: what makes a build fail.

A requirement is ``NAME OPERATOR LIMIT``. A figure with noise has an interval, and fails only if all
of the interval does; with ``strict`` it passes only if all of it does. What was not measured, or is
not a number, fails. Latency is held against a baseline by a rank test over rounds, each of which
opened the models anew: see :mod:`rnnprune_cli.ranks`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.metrics import LABEL_FREE, METRICS, RELATIVE_ERROR, SHARES, drop, parse_metrics
from rnnprune_cli.model import (
    BenchModel,
    BenchReport,
    Check,
    CheckReport,
    Latency,
    Measurement,
    MetricValue,
    OutputFidelity,
    Ratio,
    Report,
    SensitivityReport,
)
from rnnprune_cli.ranks import Figures, adjusted, chance_of_greater, median_interval, shift

MARGIN = 0.03
"""How much slower than the baseline a model may look: machines drift between two runs."""
TOLERANCE = 0.005
"""How much worse than the baseline a figure without noise may be."""
SIGNIFICANT = 0.01
"""Chance of a false alarm that is accepted for all latencies of a report together."""
BUSY = 0.1
"""Width of the interval of a model against itself from which on a machine is called busy."""
LEAST_ROUNDS = 5
"""Fewer figures cannot differ significantly."""
BLOCK = 10
"""Samples that stand for a round where a report does not tell its rounds, or has too few."""

FIGURES = {
    "latency": "latency, after ÷ before",
    "latency-ms": "median latency of a call in milliseconds",
    "bytes": "size of the files, after ÷ before",
    "gzip-bytes": "the same after gzip",
    "size": "size of the files, such as 512KiB",
    "parameters": "parameters, after ÷ before",
    "nonzero": "parameters that are not zero, after ÷ before",
    "macs": "multiply-accumulates per step, after ÷ before",
    "sparsity": "share of the recurrent weights that is removed or zero",
    "metric-drop": "what the metric lost: points of a share, or relative to what it was",
    "metric": "the metric itself, the worst of all outputs",
    "agreement": "share of positions with the same largest output, the worst of all outputs",
    "cosine": "of the outputs, original against pruned; the worst",
    "max-abs": "largest difference of the outputs, original against pruned",
}
"""Name → what can be required of it."""
_EXAMPLES = {
    "latency": "latency<=0.8",
    "latency-ms": "latency-ms<=5",
    "bytes": "bytes<=0.4",
    "gzip-bytes": "gzip-bytes<=0.4",
    "size": "size<=512KiB",
    "parameters": "parameters<=0.5",
    "nonzero": "nonzero<=0.3",
    "macs": "macs<=0.5",
    "sparsity": "sparsity>=0.7",
    "metric-drop": "metric-drop<=0.01",
    "metric": "metric>=0.95",
    "agreement": "agreement>=0.99",
    "cosine": "cosine>=0.999",
    "max-abs": "max-abs<=0.1",
}
OF_BENCH = tuple(n for n in FIGURES if n not in ("sparsity", "agreement", "cosine", "max-abs"))
"""Figures that ``bench`` measures."""
_ADVICE = {
    "latency": "zeros make nothing faster, removed units do: --granularity unit, or let"
    " --target latency={limit:g} find how many",
    "latency-ms": "remove units (--granularity unit), or let --target latency=0.5 find how many",
    "bytes": "remove more, store less precisely (--values int8), or let --target bytes={limit:g}"
    " find the sparsity",
    "gzip-bytes": "remove more, or store less precisely (--values int8)",
    "size": "remove more, store less precisely (--values int8), or let --target bytes=… find the"
    " sparsity",
    "parameters": "remove more units (--granularity unit), or let --target parameters={limit:g}"
    " find how many",
    "nonzero": "remove more, or let --target nonzero={limit:g} find the sparsity",
    "macs": "remove more units (--granularity unit)",
    "sparsity": "raise --sparsity, or let more layers take part",
    "metric-drop": "lower --sparsity, train what is left (--finetune 5), or let"
    " --target metric-drop={limit:g} find the sparsity",
    "metric": "lower --sparsity, train what is left (--finetune 5), or let --target"
    " metric-drop=0.01 find the sparsity",
    "agreement": "lower --sparsity, train what is left (--finetune 5), or repair it with other"
    " data (--calibration)",
    "cosine": "lower --sparsity, or train what is left (--finetune 5)",
    "max-abs": "lower --sparsity, or train what is left (--finetune 5)",
}
"""Name → what to do if it fails."""
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_FORM = re.compile(r"\s*([\w-]+?)\s*(<=|>=|<|>)\s*([-+.\w]*?)\s*([KMG]?i?B)?\s*", re.ASCII)
_NEW_BASELINE = "if that is meant, save this report as the new baseline"

_JUDGEABLE = (Report, BenchReport, tuple)
Judged = Report | Sequence[Report] | BenchReport
"""Reports that hold figures of models; several are those of a family."""


@dataclass(frozen=True)
class Requirement:
    """What a figure must be.

    Attributes:
        text: As it was written.
        name: A key of :data:`FIGURES`.
        operator: ``<=``, ``>=``, ``<`` or ``>``.
        limit: What is on its right; bytes for ``size``.
    """

    text: str
    name: str
    operator: str
    limit: float

    def holds(self, figure: float) -> bool:
        """Tells whether a figure is as required; NaN never is."""
        return _OPERATORS[self.operator](figure, self.limit)

    @property
    def least(self) -> bool:
        """Tells whether it is a lower limit."""
        return self.operator in (">=", ">")


# Reading requirements


def parse_requirements(
    texts: Sequence[str], known: Sequence[str] = tuple(FIGURES)
) -> tuple[Requirement, ...]:
    """Reads what ``--require`` says.

    Args:
        texts: ``NAME<=LIMIT``, also with ``>=``, ``<`` or ``>``.
        known: The figures that will be measured, such as :data:`OF_BENCH`.

    Raises:
        UsageError: If one is not of that form, or names no such figure.
    """
    return tuple(_requirement(text, known) for text in texts)


def _requirement(text: str, known: Sequence[str]) -> Requirement:
    found = _FORM.fullmatch(text)
    name = re.split(r"[\s<>=]", text.strip(), maxsplit=1)[0]
    if name not in FIGURES:
        raise UsageError(f"requirement '{text}': there is no figure '{name}'", _suggested(name))
    if name not in known:
        raise UsageError(
            f"requirement '{text}': bench does not measure {name}",
            f"rnnprune prune does; here there are: {', '.join(known)}",
        )
    example = f"such as '{_EXAMPLES[name]}', in quotes"
    if found is None:
        raise UsageError(f"requirement '{text}' is not NAME<=LIMIT or NAME>=LIMIT", example)
    _, sign, number, unit = found.groups()
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UsageError(f"requirement '{text}' has no number on its right", example)
    if unit is not None and name != "size":
        raise UsageError(f"requirement '{text}': {name} is not counted in {unit}", example)
    if unit is not None:
        limit *= _UNITS.get(unit, math.nan)
    if not math.isfinite(limit):
        raise UsageError(
            f"requirement '{text}': there is no unit '{unit}'", f"valid: {', '.join(_UNITS)}"
        )
    return Requirement("".join(text.split()), name, sign, limit)


def _suggested(name: str) -> str:
    hint = closest(name, FIGURES)
    near = re.findall(r"'([\w-]+)'", hint)
    return f"{hint} Write it as '{_EXAMPLES[near[0]]}'" if near else hint


def check_measurable(texts: Sequence[str], metric: str, data: bool, labels: bool | None) -> None:
    """Raises UsageError for requirements on what will not be measured.

    Args:
        texts: The requirements.
        metric: What ``--metric`` says.
        data: Whether there are data.
        labels: Whether these have labels; None if that is not known yet.
    """
    for requirement in parse_requirements(texts):
        if requirement.name not in ("metric", "metric-drop"):
            continue
        if not data:
            raise UsageError(
                f"requirement '{requirement.text}' needs data to measure on", "give --data"
            )
        named = set(parse_metrics([metric]).values())
        if requirement.name == "metric":
            if labels is False and not named & set(LABEL_FREE):
                raise UsageError(
                    f"requirement '{requirement.text}': the data has no labels, so there is no"
                    " metric",
                    "add an array 'labels' to it, or require agreement>=0.99",
                )
            for name in named & set(METRICS):
                if METRICS[name].higher_is_better != requirement.least:
                    raise _wrong_way(requirement, name, METRICS[name].higher_is_better)


def _wrong_way(requirement: Requirement, metric: str, higher: bool) -> UsageError:
    return UsageError(
        f"requirement '{requirement.text}': {metric} is better when {_better(higher)}",
        f"write 'metric{'>=' if higher else '<='}{requirement.limit:g}'",
    )


def _better(higher: bool) -> str:
    return "higher" if higher else "lower"


# What reports say


@dataclass(frozen=True)
class _Timed:
    """The latency of a model in one setting.

    Attributes:
        setting: Batch, steps and threads; all None for ``prune``.
        latency: Of a call.
        reference: Of the original, or the reference, timed side by side; None without one.
        ratio: After ÷ before.
    """

    setting: tuple[int | None, int | None, int | None]
    latency: Latency
    reference: Latency | None
    ratio: Ratio | None


@dataclass(frozen=True)
class _Subject:
    """A model that is judged, and what it is held against.

    Attributes:
        name: Where a report is about several.
        original: sha256 of what it is held against; empty if there is nothing.
        figures: Name of a ratio → what the model has, without noise.
        before: The same of the original.
        sparsity: Of its recurrent weights.
        metrics: On data.
        metrics_before: Of the original.
        asked: Whether these are the user's metric, and not only differences from the original.
        fidelity: Of its outputs.
        timed: Its latency.
    """

    name: str
    original: str
    figures: Mapping[str, float | None]
    before: Mapping[str, float | None]
    sparsity: float | None
    metrics: tuple[MetricValue, ...]
    metrics_before: tuple[MetricValue, ...]
    asked: bool
    fidelity: tuple[OutputFidelity, ...]
    timed: tuple[_Timed, ...]


def _subjects(report: Judged) -> tuple[_Subject, ...]:
    if isinstance(report, BenchReport):
        return tuple(_of_bench(report))
    if isinstance(report, Report):
        return (_of_report(report, ""),)
    return tuple(_of_report(member, Path(member.output.path).name) for member in report)


def _sizes(of: Measurement | BenchModel) -> dict[str, float | None]:
    return {
        "bytes": of.bytes,
        "gzip-bytes": of.gzip_bytes,
        "parameters": of.parameters,
        "nonzero": of.nonzero,
        "macs": of.macs_per_step,
    }


def _of_report(report: Report, name: str) -> _Subject:
    before, after, timed = report.before, report.after, tuple[_Timed, ...]()
    if after.latency_ms is not None:
        one = _Timed((None, None, None), after.latency_ms, before.latency_ms, report.ratios.latency)
        timed = (one,)
    recurrent = before.recurrent_parameters
    return _Subject(
        name,
        report.model.sha256,
        _sizes(after),
        _sizes(before),
        1 - after.recurrent_nonzero / recurrent if recurrent else None,
        after.metrics,
        before.metrics,
        after.metric is not None,
        report.fidelity,
        timed,
    )


def _of_bench(report: BenchReport) -> Iterator[_Subject]:
    """Yields every model but the reference of its group; one that is alone is its own."""
    groups: dict[str, list[BenchModel]] = {}
    for model in report.models:
        groups.setdefault(model.group, []).append(model)
    ratios = {(r.model, r.batch, r.steps, r.threads): r.latency for r in report.ratios}
    latencies = {(t.model, t.batch, t.steps, t.threads): t.latency_ms for t in report.timings}
    for reference, *others in groups.values():
        for model in others or [reference]:
            yield _Subject(
                model.name,
                reference.sha256 if others else "",
                _sizes(model),
                _sizes(reference) if others else {},
                None,
                model.metrics,
                reference.metrics if others else (),
                model.metric is not None,
                (),
                tuple(
                    _Timed(
                        (batch, steps, threads),
                        latency,
                        latencies.get((reference.name, batch, steps, threads)) if others else None,
                        ratios.get((name, batch, steps, threads)) if others else None,
                    )
                    for (name, batch, steps, threads), latency in latencies.items()
                    if name == model.name
                ),
            )


def _place(subject: _Subject, timed: _Timed) -> str:
    """Names a model and, where there are several, the setting that it was timed in."""
    if len(subject.timed) == 1:
        return subject.name
    words = zip(timed.setting, ("batch", "steps", "threads"), strict=True)
    setting = ", ".join(f"{word} {value}" for value, word in words if value is not None)
    return f"{subject.name} ({setting})"


# Requirements


def judge(report: Judged, expressions: Sequence[str], strict: bool = False) -> tuple[Check, ...]:
    """Holds a report against requirements.

    Args:
        report: Of one model, of a family (each is judged), or of a benchmark (each model but the
            reference of its group is judged).
        expressions: What ``--require`` says.
        strict: Whether a figure with noise must hold all over its interval.

    Raises:
        UsageError: If a requirement makes no sense, or the report does not measure such a figure.
        RnnpruneError: If there is no model in the report.
    """
    known = OF_BENCH if isinstance(report, BenchReport) else tuple(FIGURES)
    requirements = parse_requirements(expressions, known)
    subjects = _subjects(report)
    if not subjects:
        raise RnnpruneError("the report holds no model to judge", "give one that does")
    return tuple(
        check for r in requirements for subject in subjects for check in _judged(r, subject, strict)
    )


def _judged(requirement: Requirement, subject: _Subject, strict: bool) -> Iterator[Check]:
    name = requirement.name
    if name in ("latency", "latency-ms") and subject.timed:
        for timed in subject.timed:
            yield _timed_check(requirement, subject, timed, strict)
        return
    figure, problem = _figure(requirement, subject)
    passed = requirement.holds(figure)
    advice = problem or _ADVICE[name].format(limit=requirement.limit)
    yield Check(
        requirement.text,
        requirement.limit,
        figure,
        passed,
        subject=subject.name,
        hint="" if passed else advice,
    )


def _timed_check(requirement: Requirement, subject: _Subject, timed: _Timed, strict: bool) -> Check:
    ratio = timed.ratio
    if requirement.name == "latency-ms":
        blocks, _ = _medians(timed.latency)
        low, high = median_interval(blocks) if len(blocks) else (math.nan, math.nan)
        ratio = Ratio(timed.latency.median, low, high)
    if ratio is None:
        ratio = Ratio(math.nan, math.nan, math.nan)
    best, worst = (ratio.high, ratio.low) if requirement.least else (ratio.low, ratio.high)
    passed = requirement.holds(worst if strict else best) and math.isfinite(ratio.median)
    hint = _ADVICE[requirement.name].format(limit=requirement.limit)
    macs, macs_before = subject.figures["macs"], subject.before.get("macs")
    if macs is not None and macs_before is not None and macs < macs_before:  # units went already
        hint = "remove more units, or let --target latency=… find how many"
    if not math.isfinite(ratio.median):
        hint = f"{requirement.name} was not measured: give the model and what it is held against"
    elif requirement.holds(best):
        hint = (
            f"too noisy to say: the interval reaches from {ratio.low:.3g} to {ratio.high:.3g};"
            " measure on a quieter machine, or leave out --strict"
        )
    return Check(
        requirement.text,
        requirement.limit,
        ratio.median,
        passed,
        ratio.low,
        ratio.high,
        subject=_place(subject, timed),
        hint="" if passed else hint,
    )


def _figure(requirement: Requirement, subject: _Subject) -> tuple[float, str]:
    """Returns a figure without noise; NaN and what is missing if it was not measured."""
    name = requirement.name
    if name == "size":
        return float(subject.figures["bytes"] or math.nan), ""
    if name == "sparsity":
        return _or_nan(subject.sparsity, "the model has no recurrent weights")
    if name in subject.figures:
        return _or_nan(
            _divided(subject.figures[name], subject.before.get(name)),
            f"{name} was not measured: give a model to hold it against",
        )
    if name == "metric-drop":
        return _dropped(subject)
    if name == "metric":
        return _worst_metric(requirement, subject)
    if name in ("latency", "latency-ms"):
        return math.nan, "latency was not measured: it is not part of this report"
    found = {
        "agreement": [f.agreement for f in subject.fidelity if f.agreement is not None],
        "cosine": [f.cosine for f in subject.fidelity],
        "max-abs": [f.max_abs for f in subject.fidelity],
    }[name]
    if not found:
        return math.nan, f"{name} was not measured: no output has it; require another figure"
    worst = np.max if name == "max-abs" else np.min
    return float(worst(found)), ""


def _or_nan(figure: float | None, problem: str) -> tuple[float, str]:
    return (math.nan, problem) if figure is None else (figure, "")


def _divided(after: float | None, before: float | None) -> float | None:
    return after / before if before and after is not None else None


def _dropped(subject: _Subject) -> tuple[float, str]:
    problem = "the metric was not measured on both models: give --data, with an array 'labels'"
    if not subject.metrics_before:
        return math.nan, problem
    try:
        return drop(subject.metrics_before, subject.metrics), ""
    except ValueError:
        return math.nan, problem


def _worst_metric(requirement: Requirement, subject: _Subject) -> tuple[float, str]:
    if not subject.asked or not subject.metrics:
        return math.nan, "there is no metric: give --data with an array 'labels'"
    wrong = [m for m in subject.metrics if m.higher_is_better != requirement.least]
    if wrong:
        error = _wrong_way(requirement, wrong[0].name, wrong[0].higher_is_better)
        several = len(wrong) < len(subject.metrics)
        return math.nan, (
            f"{error.message}; "
            + ("outputs differ in that: require metric-drop<=0.01" if several else error.hint)
        )
    worst = np.min if requirement.least else np.max
    return float(worst([m.value for m in subject.metrics])), ""


# Baselines


def compare(
    report: Judged,
    baseline: Judged,
    margin: float = MARGIN,
    tolerance: float = TOLERANCE,
    strict: bool = False,
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Looks for regressions.

    Args:
        report: What is judged.
        baseline: What it must not be worse than.
        margin: How much slower a model may be, as a share.
        tolerance: How much worse any other figure may be: a share, and points for shares.
        strict: Whether what cannot be compared, or is too noisy to tell, fails.

    Returns:
        The checks, and what could not be compared.

    Raises:
        RnnpruneError: If there is nothing to compare.
    """
    for name, value in (("--margin", margin), ("--tolerance", tolerance)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} {value:g} is no share", "such as 0.03")
    subjects, old = _subjects(report), {s.name: s for s in _subjects(baseline)}
    if len(subjects) == len(old) == 1:
        old = {subjects[0].name: next(iter(old.values()))}
    pairs = [(subject, old[subject.name]) for subject in subjects if subject.name in old]
    if isinstance(report, BenchReport) != isinstance(baseline, BenchReport) or not pairs:
        raise RnnpruneError(
            "the report and the baseline have no model in common",
            "give a baseline that the same command wrote, about models of the same names",
        )
    comparison = _Comparison(tolerance, margin, strict)
    for name in {s.name: s for s in subjects}.keys() ^ old.keys():
        where = "report" if name in old else "baseline"
        both = ("in report and baseline", 1.0)
        comparison.leave_out(f"model '{name}'", f"it is not in the {where}", both, name)
    for which, one in (("report", report), ("baseline", baseline)):
        comparison.noise(which, one)
    machines = _environment(report), _environment(baseline)
    for new, earlier in pairs:
        comparison.origin(new, earlier)
        comparison.sizes(new, earlier)
        comparison.metrics(new, earlier)
        comparison.latency(new, earlier, machines)
    return comparison.result()


@dataclass(frozen=True)
class _Test:
    """A latency that was held against that of the baseline; figures are logarithms."""

    place: str
    chance: float
    least: float
    """The chance of the clearest difference that so many rounds can show."""
    ratio: Ratio


class _Comparison:
    """Gathers checks and warnings."""

    def __init__(self, tolerance: float, margin: float, strict: bool) -> None:
        self._tolerance, self._margin, self._strict = tolerance, margin, strict
        self._latency = (f"latency ÷ baseline<={1 + margin:g}", 1 + margin)
        self._checks: list[Check] = []
        self._tests: list[_Test] = []
        self._warnings: dict[str, None] = {}

    def leave_out(
        self, what: str, reason: str, limit: tuple[str, float], subject: str = ""
    ) -> None:
        """Says what cannot be compared; the check of it fails if all has to hold."""
        if self._strict:
            hint = f"not compared: {reason}"
            self._checks.append(Check(*limit, math.nan, False, subject=subject, hint=hint))
        whose = f" of {subject}" if subject and subject not in what else ""
        self._warnings[f"{what}{whose} is not compared with the baseline: {reason}"] = None

    def origin(self, new: _Subject, old: _Subject) -> None:
        """Says if the two were made from different models."""
        if new.original != old.original:
            self._warnings[
                "report and baseline are about different originals (their sha256 differ): what"
                " became worse may be due to that"
            ] = None

    def noise(self, which: str, report: Judged) -> None:
        """Says where a benchmark's reference did not even agree with itself."""
        for control in report.controls if isinstance(report, BenchReport) else ():
            own = control.latency
            if not own.high - own.low <= BUSY * own.median:
                self._warnings[
                    f"the {which} was timed on a busy machine: {control.reference} against itself"
                    f" gave {own.median:.3g} [{own.low:.3g}, {own.high:.3g}]; what is said of"
                    " latency may be due to that: time it again"
                ] = None

    def sizes(self, new: _Subject, old: _Subject) -> None:
        """Compares what has no noise."""
        for name in ("bytes", "parameters", "nonzero"):
            ratio = _divided(new.figures[name], old.figures[name])
            limit = 1 + self._tolerance
            self._add(f"{name} ÷ baseline<={limit:g}", limit, ratio, new.name)

    def metrics(self, new: _Subject, old: _Subject) -> None:
        """Compares metrics, where they are of the same data."""
        if not new.metrics and not old.metrics:
            return
        limit = (f"metric, drop from baseline<={self._tolerance:g}", self._tolerance)
        values, earlier = _by_output(new.metrics), _by_output(old.metrics)
        if values.keys() != earlier.keys():
            self.leave_out("the metric", "it is another one, or of other outputs", limit, new.name)
            return
        if new.original and new.original == old.original:
            first, second = _by_output(new.metrics_before), _by_output(old.metrics_before)
            least = max(self._tolerance, 1e-6)
            if any(abs(_worse(first[k], second[k])) > least for k in first.keys() & second.keys()):
                reason = "the data are others: the original itself scores otherwise on them"
                self.leave_out("the metric", reason, limit, new.name)
                return
        for (output, name), value in values.items():
            of = f" of {output}" if len(values) > 1 else ""
            lost = _worse(value, earlier[output, name])
            expression = f"{name}{of}, drop from baseline<={self._tolerance:g}"
            self._add(expression, self._tolerance, lost, new.name)

    def _add(self, expression: str, limit: float, actual: float | None, subject: str) -> None:
        figure = math.nan if actual is None else actual
        passed = figure <= limit * (1 + 1e-9)  # the limit itself, rounded
        hint = "" if passed else _NEW_BASELINE
        self._checks.append(Check(expression, limit, figure, passed, subject=subject, hint=hint))

    def latency(
        self, new: _Subject, old: _Subject, machines: tuple[Mapping[str, Any], Mapping[str, Any]]
    ) -> None:
        """Tests whether a model became slower, where that can be told."""
        reason = _other_machine(*machines)
        if not reason and new.original != old.original:
            reason = "it is a ratio to the original, and that is another model"
        earlier = {timed.setting: timed for timed in old.timed}
        if len(new.timed) == len(old.timed) == 1:
            earlier = {new.timed[0].setting: old.timed[0]}
        for timed in new.timed:
            place = _place(new, timed)
            if reason or timed.setting not in earlier:
                why = reason or "the baseline has not this setting"
                self.leave_out("latency", why, self._latency, place)
                continue
            found = [_round_figures(t) for t in (timed, earlier[timed.setting])]
            problem = next((problem for _, problem in found if problem), None)
            if problem:
                self.leave_out("latency", problem, self._latency, place)
                continue
            (one, _), (two, _) = found
            if timed.reference is None:
                self._warnings[
                    "latency is compared without a reference that was timed beside it, so any"
                    " change of the machine counts: give bench the original, too"
                ] = None
            chance = chance_of_greater(one - math.log1p(self._margin), two)
            with np.errstate(over="ignore"):
                ends = [float(np.exp(end)) for end in shift(one, two)]
            least = 1 / math.comb(len(one) + len(two), len(two))
            self._tests.append(_Test(place, chance, least, Ratio(*ends)))

    def result(self) -> tuple[tuple[Check, ...], tuple[str, ...]]:
        """Returns all checks, with p-values for all tests together, and all warnings."""
        chances = adjusted([test.chance for test in self._tests])
        expression, limit = self._latency
        blunt = [t.place for t in self._tests if t.least * len(self._tests) >= SIGNIFICANT]
        if blunt:
            whose = f" of {', '.join(blunt[:3])}" if any(blunt) else ""
            self._warnings[
                f"latency{whose} was timed in too few rounds to find anything among"
                f" {len(self._tests)} comparisons: measure longer, or compare fewer"
            ] = None
        for test, p in zip(self._tests, chances, strict=True):
            ratio = test.ratio
            passed = ratio.high <= limit if self._strict else p >= SIGNIFICANT
            hint = f"it became slower: {_NEW_BASELINE}"
            if p >= SIGNIFICANT:
                hint = (
                    f"too noisy to say: the interval reaches from {ratio.low:.3g} to"
                    f" {ratio.high:.3g}; measure longer, or leave out --strict"
                )
            self._checks.append(
                Check(
                    expression,
                    limit,
                    ratio.median,
                    passed,
                    ratio.low,
                    ratio.high,
                    p,
                    test.place,
                    "" if passed else hint,
                )
            )
        return tuple(self._checks), tuple(self._warnings)


def _by_output(metrics: Sequence[MetricValue]) -> dict[tuple[str, str], MetricValue]:
    return {(metric.output, metric.name): metric for metric in metrics}


def _worse(new: MetricValue, old: MetricValue) -> float:
    """Returns how much worse a metric is: in points, or relative to what it was."""
    if new.name == RELATIVE_ERROR:  # which drop() takes for 0 before
        return new.value - old.value
    if new.name not in SHARES and old.value == 0:
        return 0.0 if new.value == 0 else math.inf
    return drop((old,), (new,))


def _environment(report: Judged) -> Mapping[str, Any]:
    return report[0].environment if isinstance(report, Sequence) else report.environment


def _other_machine(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """Says why latencies of two environments cannot be compared; empty if they can."""
    for key, what in (("cpu", "processor"), ("threads", "number of threads")):
        if new.get(key) != old.get(key):
            return f"the {what} is another ({old.get(key)} before, {new.get(key)} now)"
    for name in ("onnxruntime", "tensorflow"):
        one, two = (_version(environment, name) for environment in (new, old))
        if one != two:
            return f"the version of {name} is another ({two} before, {one} now)"
    return ""


def _version(environment: Mapping[str, Any], name: str) -> object:
    versions = environment.get("versions")
    return versions.get(name) if isinstance(versions, dict) else None


def _round_figures(timed: _Timed) -> tuple[Figures, str | None]:
    """Returns a logarithm for each round, and what is wrong with them, if anything is."""
    figures, problem = _medians(timed.latency)
    if timed.reference is not None and problem is None:
        below, problem = _medians(timed.reference)
        if len(below) != len(figures):
            return figures, "it was not timed side by side with the original"
        with np.errstate(all="ignore"):  # what is no time is found below
            figures = figures / below
    if problem is None and not (np.isfinite(figures) & (figures > 0)).all():
        problem = "its samples are no times"
    return (figures if problem else np.log(figures)), problem


def _medians(latency: Latency) -> tuple[Figures, str | None]:
    """Returns the median of each round, and what is wrong with them, if anything is."""
    samples = np.array(latency.samples, np.float64)
    rounds = [size for size in latency.rounds if size > 0]
    if len(rounds) < LEAST_ROUNDS or sum(rounds) != len(samples):
        size = min(BLOCK, max(len(samples) // LEAST_ROUNDS, 1))
        count = len(samples) // size
        rounds = [size] * count
        if count:
            rounds[-1] += len(samples) - size * count
    parts = np.split(samples, np.cumsum(rounds)[:-1]) if rounds else []
    problem = None
    if len(rounds) < LEAST_ROUNDS:
        problem = f"there are {len(samples)} samples, and {LEAST_ROUNDS} are the least to tell by"
    return np.array([np.median(part) for part in parts], np.float64), problem


# Saved reports


def check_saved(
    report: object,
    baseline: object | None,
    expressions: Sequence[str],
    names: tuple[str, str | None],
    arguments: Mapping[str, Any],
    margin: float = MARGIN,
    tolerance: float = TOLERANCE,
    strict: bool = False,
) -> CheckReport:
    """Judges a saved report, as ``rnnprune check`` does.

    Args:
        report: What was read; see :mod:`rnnprune_cli.report.read`.
        baseline: The same of the baseline, if there is one.
        expressions: What ``--require`` says; if there is nothing to judge by, not even a baseline,
            what the report's own run required.
        names: The files.
        arguments: The options as the user gave them.
        margin: See :func:`compare`.
        tolerance: See :func:`compare`.
        strict: See :func:`judge`.

    Raises:
        RnnpruneError: If one of them holds nothing to judge.
    """
    nothing = ("nothing was judged: give --require 'latency<=0.8', or --baseline OLD.json",)
    if not expressions and baseline is None and not isinstance(report, _JUDGEABLE):
        kept = report.checks if isinstance(report, CheckReport) else ()  # which did judge
        return CheckReport(dict(arguments), *names, kept, () if kept else nothing)
    judged = _judgeable(report, names[0])
    own = _arguments(judged)
    if not expressions and baseline is None:
        expressions = required_of(own)
        strict = strict or own.get("strict") is True
    checks, warnings = judge(judged, expressions, strict), tuple[str, ...]()
    if baseline is not None:
        earlier = _judgeable(baseline, str(names[1]))
        more, warnings = compare(judged, earlier, margin, tolerance, strict)
        checks += more
    elif not checks:
        warnings = nothing
    return CheckReport(dict(arguments), names[0], names[1], checks, warnings)


def _arguments(report: Judged) -> Mapping[str, Any]:
    return report[0].arguments if isinstance(report, Sequence) else report.arguments


def _judgeable(report: object, name: str) -> Judged:
    if isinstance(report, _JUDGEABLE):
        return report
    kind = "sensitivity" if isinstance(report, SensitivityReport) else "check"
    raise RnnpruneError(
        f"{name} is a report of rnnprune {kind}, which holds no figures of a model",
        "give a report of rnnprune prune, run or bench",
    )


def judged_anew(report: Report, expressions: Sequence[str], strict: bool) -> Report:
    """Returns a report whose checks on requirements, after those on targets, are made again."""
    required = required_of(report.arguments)
    targets = tuple(check for check in report.checks if check.expression not in required)
    checks = (*targets, *judge(report, expressions, strict))
    return dataclasses.replace(report, checks=checks)


def required_of(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what a run required, as its checks name it."""
    required = arguments.get("require")
    known = required if isinstance(required, list | tuple) else ()
    return tuple("".join(str(text).split()) for text in known)


def passed(report: Report) -> bool:
    """Tells whether all that ``--require`` asked for holds; a missed target is a warning."""
    required = required_of(report.arguments)
    return all(check.passed for check in report.checks if check.expression in required)
