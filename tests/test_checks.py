"""Requirements and baselines, on reports made for the purpose; the statistics against scipy."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rnnprune_cli import cli
from rnnprune_cli.checks import (
    _ADVICE,
    _EXAMPLES,
    FIGURES,
    MARGIN,
    OF_BENCH,
    TOLERANCE,
    check_measurable,
    check_saved,
    compare,
    judge,
    parse_requirements,
)
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import (
    BenchModel,
    BenchRatio,
    BenchReport,
    Control,
    Latency,
    MetricValue,
    OutputFidelity,
    Ratio,
    Timing,
)
from rnnprune_cli.ranks import adjusted, chance_of_greater, median_interval, shift
from rnnprune_cli.report.read import read_report, report_of

REPORTS = Path(__file__).parent / "reports_v1"
BASE = read_report(REPORTS / "prune.json")
FAMILY = read_report(REPORTS / "family.json")
CURVES = read_report(REPORTS / "sensitivity.json")
replace = dataclasses.replace


def measured(side="after", **fields):
    """The report with other figures."""
    return replace(BASE, **{side: replace(getattr(BASE, side), **fields)})


def with_latency(low, median, high):
    return replace(BASE, ratios=replace(BASE.ratios, latency=Ratio(median, low, high)))


def only(report, text, strict=False):
    (check,) = judge(report, [text], strict)
    return check


# Expressions

MALFORMED = {
    "unknown": ("latencies<=1", "no figure 'latencies'", "latency<=0.8"),
    "no operator": ("latency", "is not NAME<=LIMIT", "latency<=0.8"),
    "equal": ("bytes=0.4", "is not NAME<=LIMIT", "bytes<=0.4"),
    "two limits": ("bytes<=0.4<=1", "is not NAME<=LIMIT", "bytes<=0.4"),
    "no number": ("bytes<=", "no number", "bytes<=0.4"),
    "word": ("bytes<=few", "no number", "bytes<=0.4"),
    "nan": ("metric-drop<=nan", "no number", "metric-drop<=0.01"),
    "infinity": ("metric-drop<=inf", "no number", "metric-drop<=0.01"),
    "percent": ("metric-drop<=1%", "is not NAME<=LIMIT", "metric-drop<=0.01"),
    "unit of a ratio": ("bytes<=4KiB", "not counted in KiB", "bytes<=0.4"),
    "unknown unit": ("size<=4iB", "no unit 'iB'", "KiB"),
    "empty": ("", "no figure ''", "latency"),
}


@pytest.mark.parametrize(("text", "message", "hint"), MALFORMED.values(), ids=MALFORMED)
def test_what_makes_no_sense_is_refused_with_an_example(text, message, hint):
    with pytest.raises(UsageError) as caught:
        judge(BASE, [text])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_every_figure_has_an_example_and_advice():
    assert FIGURES.keys() == _EXAMPLES.keys() == _ADVICE.keys()
    for name, (requirement,) in ((n, parse_requirements([e])) for n, e in _EXAMPLES.items()):
        assert requirement.name == name
        _ADVICE[name].format(limit=requirement.limit)


def test_sizes_have_units_and_spaces_are_allowed():
    limits = [parse_requirements([f"size <= {t}"])[0].limit for t in ("512", "512KiB", "1.5 MB")]
    assert limits == [512, 512 * 1024, 1.5e6]
    assert only(BASE, " size  <=  3 KiB ").expression == "size<=3KiB"


# Figures

AFTER, BEFORE = BASE.after, BASE.before
EXACT = {
    "bytes": AFTER.bytes / BEFORE.bytes,
    "gzip-bytes": AFTER.gzip_bytes / BEFORE.gzip_bytes,
    "size": AFTER.bytes,
    "parameters": AFTER.parameters / BEFORE.parameters,
    "nonzero": AFTER.nonzero / BEFORE.nonzero,
    "macs": AFTER.macs_per_step / BEFORE.macs_per_step,
    "sparsity": BASE.layers[0].sparsity,
    "metric-drop": BEFORE.metric.value - AFTER.metric.value,
    "metric": AFTER.metric.value,
    "agreement": BASE.fidelity[0].agreement,
    "cosine": BASE.fidelity[0].cosine,
    "max-abs": BASE.fidelity[0].max_abs,
}


@pytest.mark.parametrize("name", EXACT)
def test_a_limit_above_the_figure_holds_and_one_below_fails(name):
    figure = EXACT[name]
    lower = name != "metric"
    for factor, signs in ((1.01, ("<=", "<")), (0.99, (">=", ">"))):
        for sign in signs:
            if name == "metric" and sign.startswith("<"):
                continue  # an accuracy
            good = only(BASE, f"{name}{sign}{factor * figure!r}")
            bad = only(BASE, f"{name}{sign}{(2 - factor) * figure!r}")
            assert (good.passed, good.hint, bad.passed) == (True, "", False)
            assert good.actual == pytest.approx(figure, rel=1e-12)
            assert bad.hint and bad.limit == (2 - factor) * figure
    assert only(BASE, f"{name}>={figure!r}").passed
    assert not lower or not only(BASE, f"{name}>{figure!r}").passed


def test_figures_in_hand_written_numbers():
    """What the report's table says: 0.425 of the size, 0.6818 removed, accuracy 1 to 0.7344."""
    assert only(BASE, "bytes<=0.43").actual == pytest.approx(0.425, abs=5e-4)
    assert only(BASE, "sparsity>=0.68").actual == pytest.approx(0.6818, abs=5e-5)
    assert only(BASE, "metric-drop<=0.27").actual == pytest.approx(0.2656, abs=5e-5)


def test_the_worst_output_counts():
    rows = [OutputFidelity("a", 0.1, 0, 0.99, 0.9), OutputFidelity("b", 0.3, 0, 0.9, None)]
    report = replace(BASE, fidelity=tuple(rows))
    actual = [only(report, t).actual for t in ("max-abs<=1", "cosine>=0.5", "agreement>=0.5")]
    assert actual == [0.3, 0.9, 0.9]
    metrics = tuple(MetricValue("accuracy", v, True, o) for o, v in (("a", 0.9), ("b", 0.8)))
    report = measured(metrics=metrics, metric=metrics[0])
    assert only(report, "metric>=0.85").actual == 0.8
    mixed = (*metrics, MetricValue("mse", 0.1, False, "c"))
    check = only(measured(metrics=mixed, metric=mixed[0]), "metric>=0.5")
    assert not check.passed and "metric-drop" in check.hint


def test_a_limit_on_the_wrong_side_of_a_metric_fails_and_says_so():
    check = only(BASE, "metric<=0.99")
    assert not check.passed and math.isnan(check.actual)
    assert "accuracy is better when higher" in check.hint and "'metric>=0.99'" in check.hint


NAN = float("nan")
UNMEASURED = {
    "metric": measured(metric=None, metrics=()),
    "metric-drop": measured("before", metrics=()),
    "agreement": replace(BASE, fidelity=(OutputFidelity("a", 0.1, 0, 0.99, None),)),
    "cosine": replace(BASE, fidelity=()),
    "max-abs": replace(BASE, fidelity=(OutputFidelity("a", NAN, 0, 0.99, None),)),
    "latency": replace(BASE, ratios=replace(BASE.ratios, latency=None)),
    "latency-ms": measured(latency_ms=None),
    "macs": measured("before", macs_per_step=0),
    "sparsity": measured("before", recurrent_parameters=0),
}


@pytest.mark.parametrize("name", UNMEASURED)
@pytest.mark.parametrize("strict", [False, True])
def test_what_was_not_measured_never_passes(name, strict):
    for sign in ("<=", ">=", "<", ">"):
        check = only(UNMEASURED[name], f"{name}{sign}0", strict)
        assert not check.passed and check.hint


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("ratio", [(NAN, NAN, NAN), (0.1, NAN, 0.2), (NAN, 0.1, NAN)])
def test_latency_that_is_not_a_number_never_passes(ratio, strict):
    for sign in ("<=", ">="):
        check = only(with_latency(*ratio), f"latency{sign}0.5", strict)
        assert not check.passed


def test_an_infinite_loss_fails():
    after = (MetricValue("accuracy", NAN, True),)
    assert not only(measured(metrics=after), "metric-drop<=1e9").passed


# Noise


@pytest.mark.parametrize(
    ("low", "high", "passed", "strictly"),
    [(0.6, 0.7, True, True), (0.7, 0.9, True, False), (0.81, 0.9, False, False)],
)
def test_latency_fails_only_when_all_of_the_interval_does_and_strictly_the_other_way(
    low, high, passed, strictly
):
    report = with_latency(low, (low + high) / 2, high)
    assert only(report, "latency<=0.8").passed is passed
    assert only(report, "latency<=0.8", strict=True).passed is strictly
    mirrored = with_latency(1.6 - high, 1.6 - (low + high) / 2, 1.6 - low)
    assert only(mirrored, "latency>=0.8").passed is passed
    assert only(mirrored, "latency>=0.8", strict=True).passed is strictly


def test_a_check_that_noise_fails_says_so():
    check = only(with_latency(0.7, 0.8, 0.9), "latency<=0.85", strict=True)
    assert not check.passed and "too noisy" in check.hint
    assert (check.low, check.actual, check.high) == (0.7, 0.8, 0.9)


def test_milliseconds_have_an_interval_over_rounds():
    samples = np.repeat(np.arange(1.0, 11), 4)  # rounds of 1, 2, … 10 ms
    latency = Latency(5.5, 1, 10, tuple(samples), None, (4,) * 10)
    check = only(measured(latency_ms=latency), "latency-ms<=4")
    assert (check.low, check.actual, check.high, check.passed) == (2, 5.5, 9, True)
    assert not only(measured(latency_ms=latency), "latency-ms<=1.9").passed


# Families and benchmarks


def test_each_member_of_a_family_is_judged():
    checks = judge(FAMILY, ["sparsity>=0.5", "size<=1MB"])
    assert [(c.subject, c.passed) for c in checks] == [
        ("model.pruned-0.3.onnx", False),
        ("model.pruned-0.6.onnx", True),
        ("model.pruned-0.3.onnx", True),
        ("model.pruned-0.6.onnx", True),
    ]


def steady(median, rounds=8, turns=5, seed=0, spread=0.002):
    samples = median * np.exp(np.random.default_rng(seed).normal(0, spread, rounds * turns))
    return Latency(median, median, median, tuple(samples.tolist()), None, (turns,) * rounds)


def bench_report(levels, accuracy=None, settings=((1, 20, 1),), groups=None, seed=0):
    """Models of some latency, the first of each group the reference."""
    groups = groups or dict.fromkeys(levels, "")
    models, timings, ratios = [], [], []
    for number, (name, level) in enumerate(levels.items()):
        metric = MetricValue("accuracy", (accuracy or {}).get(name, 0.9), True)
        reference = next(n for n in levels if groups[n] == groups[name])
        models.append(
            BenchModel(
                name, f"{name}.onnx", "onnx", f"sha of {name}", int(1000 * level),
                int(900 * level), int(4000 * level), int(3000 * level), int(800 * level), 0,
                1.0, None, metric, (metric,), steady(level, seed=seed + number), groups[name],
            )
        )  # fmt: skip
        for batch, steps, threads in settings:
            latency = steady(level * batch, seed=seed + number)
            timings.append(Timing(name, batch, steps, threads, latency, None, None, None))
            if name != reference:
                ratio = level / levels[reference]
                interval = Ratio(ratio, ratio - 0.01, ratio + 0.01)
                ratios.append(BenchRatio(name, reference, batch, steps, threads, interval))
    control = Control(next(iter(levels)), 1, 20, 1, Ratio(1, 0.99, 1.01), 8, 1.0)
    environment = {"cpu": "a", "threads": 1, "versions": {"onnxruntime": "1"}}
    return BenchReport(
        {}, tuple(models), tuple(timings), tuple(ratios), control, (control,), (), (), environment
    )


def test_a_benchmark_judges_every_model_but_the_reference():
    report = bench_report({"a": 1.0, "b": 0.5, "c": 0.9}, {"a": 0.95, "c": 0.94})
    found = {(c.subject, c.expression): c for c in judge(report, [
        "latency<=0.8", "bytes<=0.6", "metric-drop<=0.02", "metric>=0.92", "size<=3KB", "macs<=1",
        "latency-ms<=0.7",
    ])}  # fmt: skip
    assert {s for s, _ in found} == {"b", "c"}
    passed = {e: (found["b", e].passed, found["c", e].passed) for _, e in found}
    assert passed == {
        "latency<=0.8": (True, False),
        "bytes<=0.6": (True, False),
        "metric-drop<=0.02": (False, True),
        "metric>=0.92": (False, True),
        "size<=3KB": (True, False),
        "macs<=1": (True, True),
        "latency-ms<=0.7": (True, False),
    }
    assert found["b", "metric-drop<=0.02"].actual == pytest.approx(0.05)


def test_models_are_held_against_the_reference_of_their_own_group():
    levels = {"a": 1.0, "a small": 0.5, "b": 4.0, "b small": 1.0}
    report = bench_report(levels, groups={n: n[0] for n in levels})
    actual = {c.subject: c.actual for c in judge(report, ["bytes<=1"])}
    assert actual == {"a small": 0.5, "b small": 0.25}


def test_every_setting_is_judged_under_its_name():
    report = bench_report({"a": 1.0, "b": 0.5}, settings=((1, 20, 1), (8, 20, 1)))
    subjects = [c.subject for c in judge(report, ["latency<=0.8"])]
    assert subjects == ["b (batch 1, steps 20, threads 1)", "b (batch 8, steps 20, threads 1)"]


def test_a_model_alone_has_absolute_figures_only():
    report = bench_report({"a": 1.0})
    assert only(report, "size<=4KB").passed and only(report, "latency-ms<=1.1").passed
    for text in ("latency<=9", "bytes<=9", "metric-drop<=9"):
        check = only(report, text)
        assert not check.passed and check.hint


@pytest.mark.parametrize("name", sorted(set(FIGURES) - set(OF_BENCH)))
def test_what_bench_does_not_measure_is_refused(name):
    with pytest.raises(UsageError, match="bench does not measure"):
        judge(bench_report({"a": 1.0, "b": 0.5}), [f"{name}>=0"])


# What will not be measured


def test_requirements_on_what_will_not_be_measured_are_refused_in_time():
    def refused(text, metric="auto", data=True, labels=None):
        with pytest.raises(UsageError) as caught:
            check_measurable([text], metric, data, labels)
        return f"{caught.value.message}; {caught.value.hint}"

    assert "--data" in refused("metric-drop<=0.1", data=False)
    assert "--data" in refused("metric>=0.9", data=False)
    assert "labels" in refused("metric>=0.9", labels=False)
    assert "metric<=0.9" in refused("metric>=0.9", "logits=mse")
    assert "metric>=0.9" in refused("metric<=0.9", "accuracy")
    check_measurable(["metric>=0.9", "metric-drop<=1"], "auto", True, True)
    check_measurable(["metric-drop<=1"], "auto", True, False)  # outputs are held against
    check_measurable(["metric>=0.9"], "agreement", True, False)
    check_measurable(["latency<=1", "agreement>=0.9"], "auto", False, False)


# Statistics

RNG = np.random.default_rng(3)
CASES = [(1, 1), (2, 9), (5, 5), (6, 12), (8, 20), (30, 40), (60, 70)]


@pytest.mark.parametrize(("n", "m"), CASES)
@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_the_rank_test_is_scipys(n, m, decimals):
    for _ in range(20):
        one, two = RNG.normal(0.3, 1, n), RNG.normal(0, 2, m)
        if decimals is not None:
            one, two = np.round(one, decimals), np.round(two, decimals)
        tied = len(np.unique([*one, *two])) < n + m
        method = "asymptotic" if tied or n * m > 2500 else "exact"
        expected = stats.mannwhitneyu(one, two, alternative="greater", method=method).pvalue
        if len({*one, *two}) == 1:
            expected = 1.0
        assert chance_of_greater(one, two) == pytest.approx(expected, abs=1e-10)


def test_the_interval_of_a_shift_holds_what_the_test_does_not_refuse():
    for n, m in ((6, 6), (12, 16), (25, 30)):
        one, two = RNG.normal(1, 1, n), RNG.normal(0, 2, m)
        middle, low, high = shift(one, two)
        assert low < middle < high
        for tried in np.linspace(low - 0.5, high + 0.5, 41):
            two_sided = stats.mannwhitneyu(one - tried, two, method="exact").pvalue
            assert (two_sided > 0.05) == (low < tried < high)


@pytest.mark.parametrize("n", [6, 10, 25])
def test_the_interval_of_a_median_holds_it_19_of_20_times(n):
    inside = 0
    for _ in range(1000):
        low, high = median_interval(RNG.exponential(1, n))
        inside += low <= math.log(2) <= high
    assert inside >= 935


def test_holms_correction():
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted([0.5, 0.6]) == [1, 1]
    assert adjusted([]) == []


# Baselines


def timed(generator, ratio, rounds, turns, told=True, between=0.007):
    """A report with samples as a shared machine gives them.

    Speed drifts by a tenth within a run, for both models; up to a third of the samples are hit by
    other work; jitter differs from run to run; each round lies elsewhere in memory (0.8 %), and
    the ratio itself is not quite the same in every run (``between``).
    """
    jitter, busy = generator.uniform(0.005, 0.05), generator.uniform(0, 0.3)
    count = rounds * turns
    drift = np.linspace(0, generator.uniform(-0.1, 0.1), count)
    drift += np.cumsum(generator.normal(0, 0.1 / math.sqrt(count), count))
    sides = []
    for level in (1.0, ratio * math.exp(generator.normal(0, between))):
        place = np.repeat(generator.normal(0, 0.008, rounds), turns)
        samples = level * np.exp(drift + place + generator.normal(0, jitter, count))
        hit = generator.random(count) < busy
        samples *= np.where(hit, generator.uniform(1.2, 2, count), 1)
        sizes = (turns,) * rounds if told else ()
        sides.append(Latency(float(np.median(samples)), 0, 0, tuple(samples.tolist()), None, sizes))
    before, after = sides
    return replace(
        BASE,
        before=replace(BASE.before, latency_ms=before),
        after=replace(BASE.after, latency_ms=after),
    )


def latency_check(report, baseline, **options):
    checks, warnings = compare(report, baseline, **options)
    (check,) = [check for check in checks if check.expression.startswith("latency")]
    return check, warnings


@pytest.mark.parametrize(
    ("rounds", "turns", "told"), [(6, 25, True), (12, 20, True), (16, 25, True), (5, 40, False)]
)
def test_noise_raises_no_alarm_and_a_tenth_slower_is_found(rounds, turns, told):
    generator = np.random.default_rng(7)
    alarms = found = 0
    for _ in range(100):
        old, same, slower = (
            timed(generator, ratio, rounds, turns, told) for ratio in (0.5, 0.5, 0.55)
        )
        alarms += not latency_check(same, old)[0].passed
        found += not latency_check(slower, old)[0].passed
    assert alarms <= 5
    assert found >= 90


@pytest.mark.parametrize(("rounds", "turns"), [(6, 25), (16, 20)])
def test_the_interval_holds_the_ratio_19_of_20_times(rounds, turns):
    generator = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        old, new = (timed(generator, ratio, rounds, turns, between=0) for ratio in (0.5, 0.55))
        check, _ = latency_check(new, old)
        held += check.low <= 1.1 <= check.high
    assert held >= 183  # fewer than 1 time in 200 if it is 95 %


def test_a_regression_says_how_much_slower_and_how_surely():
    generator = np.random.default_rng(0)
    check, warnings = latency_check(timed(generator, 0.6, 16, 20), timed(generator, 0.5, 16, 20))
    assert not check.passed and not warnings
    assert check.low < check.actual < check.high
    assert check.actual == pytest.approx(1.2, abs=0.04) and check.limit == 1.03
    assert check.p < 1e-4 and "slower" in check.hint


def test_a_margin_as_large_as_the_regression_forgives_it():
    generator = np.random.default_rng(0)
    new, old = timed(generator, 0.55, 16, 20), timed(generator, 0.5, 16, 20)
    assert not latency_check(new, old)[0].passed
    assert latency_check(new, old, margin=0.15)[0].passed


def test_strictly_what_is_not_shown_to_be_as_fast_fails():
    generator = np.random.default_rng(0)
    new, old = timed(generator, 0.51, 6, 3), timed(generator, 0.5, 6, 3)
    check, _ = latency_check(new, old)
    assert check.passed and check.high > check.limit
    check, _ = latency_check(new, old, strict=True)
    assert not check.passed and "too noisy" in check.hint


def test_drift_between_runs_cancels_because_the_original_drifts_with_it():
    old, new = measured(), measured()
    slow = {
        side: replace(
            getattr(BASE, side),
            latency_ms=replace(
                getattr(BASE, side).latency_ms,
                samples=tuple(3 * s for s in getattr(BASE, side).latency_ms.samples),
            ),
        )
        for side in ("before", "after")
    }
    check, _ = latency_check(replace(new, **slow), old)
    assert check.passed and check.actual == pytest.approx(1)


def of(checks, start):
    return next(check for check in checks if check.expression.startswith(start))


def test_figures_without_noise_may_be_worse_by_the_tolerance():
    for name in ("bytes", "parameters", "nonzero"):
        figure = getattr(BASE.after, name)
        for factor, passed in ((1.004, True), (1.006, False), (0.5, True)):
            checks, _ = compare(measured(**{name: figure * factor}), BASE)
            assert of(checks, name).passed is passed
            assert of(checks, name).actual == pytest.approx(factor)
    checks, _ = compare(measured(bytes=BASE.after.bytes * 2), BASE, tolerance=1)
    assert of(checks, "bytes").passed


@pytest.mark.parametrize(
    ("name", "higher", "old", "new", "worse"),
    [
        ("accuracy", True, 0.9, 0.88, 0.02),
        ("accuracy", True, 0.9, 0.95, -0.05),
        ("agreement", True, 0.9, 0.89, 0.01),
        ("mse", False, 2.0, 2.1, 0.05),
        ("perplexity", False, 10.0, 9.0, -0.1),
        ("relative-error", False, 0.1, 0.13, 0.03),
        ("mse", False, 0.0, 0.1, math.inf),
        ("mse", False, 0.0, 0.0, 0.0),
        ("accuracy", True, 0.9, NAN, math.inf),
    ],
)
def test_metrics_are_worse_in_points_or_relative_to_what_they_were(name, higher, old, new, worse):
    def report(value):
        metric = MetricValue(name, value, higher, "y")
        report = measured("before", metrics=(replace(metric, value=1.0),))
        after = replace(report.after, metrics=(metric,), metric=metric)
        return replace(report, after=after)

    checks, warnings = compare(report(new), report(old))
    check = of(checks, name)
    assert check.actual == pytest.approx(worse)
    assert check.passed is (worse <= TOLERANCE) and not warnings


INCOMPARABLE = {
    "cpu": ({"cpu": "another"}, "processor"),
    "threads": ({"threads": 2}, "threads"),
    "onnxruntime": ({"versions": {"onnxruntime": "0.1"}}, "onnxruntime"),
}


@pytest.mark.parametrize(("changed", "word"), INCOMPARABLE.values(), ids=INCOMPARABLE)
def test_latency_of_another_machine_is_not_compared(changed, word):
    other = replace(BASE, environment={**BASE.environment, **changed})
    checks, (warning,) = compare(BASE, other)
    assert "latency" in warning and word in warning
    assert all(c.passed for c in checks) and not any(c.p is not None for c in checks)
    checks, _ = compare(BASE, other, strict=True)
    (failed,) = [c for c in checks if not c.passed]
    assert failed.expression.startswith("latency") and word in failed.hint


def test_latency_against_another_original_is_not_compared_but_the_rest_is():
    other = replace(BASE, model=replace(BASE.model, sha256="other"))
    checks, (origin, warning) = compare(measured(bytes=BASE.after.bytes * 2), other)
    assert "different originals" in origin and "another model" in warning
    assert [c.expression.split()[0] for c in checks if not c.passed] == ["bytes"]


def test_metrics_on_other_data_are_not_compared():
    """The same original scores otherwise on them, which nothing else explains."""
    before = (replace(BASE.before.metrics[0], value=0.8),)
    checks, (warning,) = compare(measured("before", metrics=before), BASE)
    assert "data are others" in warning
    assert not any(c.expression.startswith("accuracy") for c in checks)
    checks, _ = compare(measured("before", metrics=before), BASE, strict=True)
    assert not all(c.passed for c in checks)


def test_another_metric_is_not_compared():
    metric = MetricValue("mse", 0.1, False)
    _, (warning,) = compare(measured(metrics=(metric,)), BASE)
    assert "it is another one" in warning


@pytest.mark.parametrize("samples", [(), (1.0, 2.0), (1.0, NAN, 1.0, 1.0, 1.0), (0.0,) * 5])
def test_too_few_samples_and_what_is_no_time_are_not_compared(samples):
    latency = Latency(1, 1, 1, samples)
    report = replace(
        BASE,
        before=replace(BASE.before, latency_ms=replace(latency, samples=(1.0,) * len(samples))),
        after=replace(BASE.after, latency_ms=latency),
    )
    checks, (warning,) = compare(report, BASE)
    assert "latency" in warning and "sample" in warning
    assert not any(c.p is not None for c in checks)


def test_a_family_is_compared_member_by_member():
    first, second = FAMILY
    checks, warnings = compare(
        (replace(first, after=replace(first.after, bytes=10**6)), second), FAMILY
    )
    assert [c.subject for c in checks if not c.passed] == ["model.pruned-0.3.onnx"]
    assert not warnings
    _, (warning,) = compare((first,), FAMILY)
    assert "model.pruned-0.6.onnx" in warning and "not in the report" in warning


def test_benchmarks_are_compared_by_name_and_setting():
    settings = ((1, 20, 1), (8, 20, 1))
    old = bench_report({"a": 1.0, "b": 0.5, "c": 0.4}, settings=settings)
    new = bench_report({"a": 1.0, "b": 0.5, "c": 0.5, "d": 1}, settings=settings, seed=50)
    checks, (warning,) = compare(new, old)
    assert "model 'd'" in warning
    slower = [c.subject for c in checks if c.p is not None and not c.passed]
    assert slower == ["c (batch 1, steps 20, threads 1)", "c (batch 8, steps 20, threads 1)"]
    assert {c.subject for c in checks if not c.passed} == {"c", *slower}


def test_a_benchmark_of_one_model_is_compared_with_a_warning():
    checks, (warning,) = compare(bench_report({"a": 1.2}, seed=9), bench_report({"a": 1.0}))
    assert "reference" in warning
    assert not of(checks, "latency").passed
    assert of(checks, "latency").actual == pytest.approx(1.2, abs=0.01)


def test_a_busy_machine_is_told_by_the_control():
    quiet = bench_report({"a": 1.0, "b": 0.5})
    control = replace(quiet.control, latency=Ratio(0.96, 0.49, 1.02))
    busy = replace(quiet, controls=(control,))
    assert compare(quiet, quiet)[1] == ()
    for one, two, which in ((quiet, busy, "baseline"), (busy, quiet, "report")):
        checks, (warning,) = compare(one, two)
        assert f"the {which} was timed on a busy machine" in warning and "[0.49, 1.02]" in warning
        assert all(check.passed for check in checks)


def test_many_models_raise_no_more_alarms_than_one():
    """A difference that is significant by itself, but not as the greatest of forty."""
    generator = np.random.default_rng(0)

    def latency():
        return steady(1.0, rounds=8, turns=1, seed=int(generator.integers(1 << 30)), spread=0.05)

    alarms = 0
    for _ in range(20):
        reports = []
        for _ in range(2):
            report = bench_report({str(k): 1.0 for k in range(40)})
            timings = tuple(replace(t, latency_ms=latency()) for t in report.timings)
            reports.append(replace(report, timings=timings))
        checks, _ = compare(*reports, margin=0)
        alarms += any(c.p is not None and not c.passed for c in checks)
    assert alarms <= 1


def test_nothing_in_common_is_an_error():
    bench = bench_report({"a": 1.0, "b": 0.5})
    for one, two in (
        (BASE, bench),
        (bench, BASE),
        (bench, bench_report({"x": 1.0, "y": 1.0, "z": 2.0})),
    ):
        with pytest.raises(RnnpruneError, match="no model in common") as caught:
            compare(one, two)
        assert caught.value.code == 3


@pytest.mark.parametrize("option", ["margin", "tolerance"])
@pytest.mark.parametrize("value", [-0.1, NAN, math.inf])
def test_shares_that_are_none_are_refused(option, value):
    with pytest.raises(UsageError, match=option):
        compare(BASE, BASE, **{option: value})


# Saved reports


def test_without_requirements_those_of_the_reports_own_run_count():
    report = replace(BASE, arguments={**BASE.arguments, "require": ["bytes<=0.1"]})
    result = check_saved(report, None, (), ("r.json", None), {})
    assert [c.expression for c in result.checks] == ["bytes<=0.1"] and not result.passed
    result = check_saved(report, None, ("bytes<=0.9",), ("r.json", None), {})
    assert [c.expression for c in result.checks] == ["bytes<=0.9"] and result.passed


def test_a_check_of_nothing_says_so():
    result = check_saved(BASE, None, (), ("r.json", None), {})
    assert not result.checks and "nothing was judged" in result.warnings[0]


def test_a_report_without_figures_cannot_be_judged():
    with pytest.raises(RnnpruneError, match="rnnprune sensitivity") as caught:
        check_saved(CURVES, None, ("bytes<=1",), ("s.json", None), {})
    assert caught.value.code == 3


def test_the_command_line_has_the_same_defaults():
    import inspect

    parameters = inspect.signature(cli.check).parameters
    assert (parameters["margin"].default, parameters["tolerance"].default) == (MARGIN, TOLERANCE)


def test_too_few_rounds_for_so_many_comparisons_are_said():
    """With 6 rounds each no p-value is below 1 in 924, and Holm multiplies it."""

    def found(models):
        document = json.loads((REPORTS / "bench.json").read_text())
        reference, other = document["models"][:2]
        names = [f"model {k}" for k in range(models)]
        few = {"samples": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "rounds": [1] * 6}
        timing = {**document["timings"][0], "batch": 1, "steps": 1, "threads": 1}
        timing["latency_ms"] = {**timing["latency_ms"], **few}
        document["models"] = [reference, *({**other, "name": name} for name in names)]
        every = [reference["name"], *names]
        document["timings"] = [{**timing, "model": name} for name in every]
        document["ratios"] = []
        report = report_of(document, "bench.json")
        return any("too few rounds" in warning for warning in compare(report, report)[1])

    assert not found(9) and found(10)
