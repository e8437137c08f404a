"""Targets, families, sensitivities: what is promised is measured again here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SAMPLES, Graph, recurrent_model, weights
from test_cli import rnnprune

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Report, Stage, Target
from rnnprune_cli.options import PruneOptions, complete_stage
from rnnprune_cli.pipeline import prune, prune_family, sensitivity
from rnnprune_cli.report.curves import curves_table
from rnnprune_cli.report.html import curves_page
from rnnprune_cli.search import checked_target, parse_target


def stacked() -> onnx.ModelProto:
    """A first layer of which all is needed, and a second that hardly matters."""
    graph = Graph(["steps", "batch", 5])
    one, two = weights("GRU", 10, 5, 1, seed=1), weights("LSTM", 8, 10, 1, seed=2)
    y = graph.op("GRU", "x", one["W"], one["R"], one["B"], outs=1, hidden_size=10)
    y = graph.op("Squeeze", y, np.array([1]))
    z = graph.op("LSTM", y, two["W"], two["R"], two["B"], outs=1, hidden_size=8)
    z = graph.op("Squeeze", z, np.array([1]))
    rng = np.random.default_rng(3)
    head = rng.standard_normal((10, 3)).astype(np.float32)
    small = 0.05 * rng.standard_normal((8, 3)).astype(np.float32)
    graph.output(graph.op("Add", graph.op("MatMul", y, head), graph.op("MatMul", z, small)))
    return graph.model()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    x = np.random.default_rng(0).standard_normal((20, 6, 1, 5)).astype(np.float32)
    np.savez(path, x=x)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(stacked().SerializeToString())
    return path


def options(model: Path, data: Path | None, *targets: str, **more: object) -> PruneOptions:
    given = {"method": "magnitude", "granularity": "weight", "scope": None, **more}
    fields = {k: given.pop(k) for k in ("trials", "family", "family_of") if k in given}
    return PruneOptions(
        model,
        model.with_name("out.onnx"),
        (complete_stage(**{"sparsity": 0.0, **given}),),
        data=data,
        force=True,
        latency_seconds=0.0,
        targets=tuple(map(parse_target, targets)),
        **fields,
    )


def run(chosen: PruneOptions) -> Report:
    return prune(chosen, {}, lambda step: None)


@pytest.mark.parametrize("granularity", ["weight", "block:2x1", "unit"])
def test_a_limit_of_the_loss_holds_and_is_used(model, data, granularity):
    report = run(options(model, data, "metric-drop=0.05", granularity=granularity))
    (check,) = report.checks
    assert check.passed and 0 < check.actual <= 0.05
    assert check.actual == pytest.approx(report.after.metrics[0].value, abs=1e-12)
    assert report.after.recurrent_nonzero < report.before.recurrent_nonzero
    missed = [trial for trial in report.trials if not trial.met]
    assert missed, "nothing that loses more was tried, so the limit may not have been used"


def test_the_layer_that_hardly_matters_loses_more(model, data):
    report = run(options(model, data, "metric-drop=0.05"))
    first, second = report.layers
    assert second.sparsity > first.sparsity + 0.2
    assert [curve.layer for curve in report.sensitivity] == [first.name, second.name]


@pytest.mark.parametrize("target", ["nonzero=0.5", "bytes=0.6"])
def test_a_limit_of_the_size_holds_with_little_to_spare(model, data, target):
    report = run(options(model, data, target, method="obs"))
    (check,) = report.checks
    assert check.passed and check.limit - 0.06 < check.actual <= check.limit


def test_units_reach_a_limit_of_parameters(model, data):
    report = run(options(model, data, "parameters=0.6", granularity="unit"))
    (check,) = report.checks
    assert check.passed and 0.4 < check.actual <= 0.6
    assert report.ratios.parameters == check.actual


def test_several_targets_hold_together(model, data):
    report = run(options(model, data, "nonzero=0.8", "metric-drop=0.1"))
    assert all(check.passed for check in report.checks) and len(report.checks) == 2


def test_what_is_out_of_reach_is_said_with_by_how_much_and_nothing_is_written(model, data):
    chosen = options(model, data, "nonzero=0.3", "metric-drop=0.0001", trials=12)
    said = r"out of reach: metric-drop reaches \d.*, not 0.0001 where nonzero<=0.3"
    with pytest.raises(RnnpruneError, match=said) as refusal:
        run(chosen)
    assert "models tried" in refusal.value.message
    assert not model.with_name("out.onnx").exists()


def test_a_size_that_nothing_reaches_is_said_to_be_it(model, data):
    chosen = options(model, data, "bytes=0.01", "metric-drop=0.0001", trials=12)
    with pytest.raises(RnnpruneError, match=r"out of reach: bytes reaches .* even with all"):
        run(chosen)


def test_weights_cannot_make_a_model_faster_and_it_is_said(model, data):
    with pytest.raises(RnnpruneError, match="out of reach: latency") as refusal:
        run(options(model, data, "latency=0.3"))
    assert "--granularity unit" in refusal.value.hint


def test_a_loss_needs_data(model):
    with pytest.raises(UsageError, match="needs data"):
        run(options(model, None, "metric-drop=0.1"))


def test_a_size_needs_no_data(model):
    assert run(options(model, None, "nonzero=0.6")).checks[0].passed


def test_a_plan_that_was_found_gives_the_same_bytes_again(model, data):
    first = run(options(model, data, "metric-drop=0.05"))
    again = dataclasses.replace(options(model, data), stages=first.plan.stages)
    assert run(again).output.sha256 == first.output.sha256


@pytest.mark.parametrize(
    "text", ["metric-drop", "latency=2", "bytes=0", "latency=x", "bytes=-1", "bytes=nan"]
)
def test_targets_that_make_no_sense_are_refused(text):
    with pytest.raises(UsageError):
        checked_target(parse_target(text))


def test_an_unknown_target_names_the_closest():
    with pytest.raises(UsageError, match="no target 'byte'") as refusal:
        parse_target("byte=0.5")
    assert "bytes" in refusal.value.hint


# Families


def test_a_family_is_what_its_members_are(model, data):
    chosen = options(model, data, family=(0.3, 0.6))
    reports = prune_family(chosen, {}, lambda step: None)
    assert [r.output.path for r in reports] == [
        str(model.with_name(f"out-{s}.onnx")) for s in (0.3, 0.6)
    ]
    for report, sparsity in zip(reports, (0.3, 0.6), strict=True):
        alone = run(options(model, data, sparsity=sparsity))
        assert alone.output.sha256 == report.output.sha256
        assert report.plan.stages[0].sparsity == sparsity


def test_a_family_over_the_limits_of_a_target(model, data):
    chosen = options(model, data, family=(0.8, 0.5), family_of="nonzero", granularity="unit")
    reports = prune_family(chosen, {}, lambda step: None)
    assert [r.checks[0].limit for r in reports] == [0.8, 0.5]
    assert all(r.checks[0].passed for r in reports)
    assert reports[1].after.nonzero < reports[0].after.nonzero


def test_a_family_on_the_command_line_is_one_document(model, data):
    done = rnnprune("prune", model, "--family", "0.3,0.6", "--data", data, "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [m["plan"]["stages"][0]["sparsity"] for m in document["models"]] == [0.3, 0.6]
    assert model.with_name("model.pruned-0.3.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "bytes"),
        ("--target", "bytes=0.5", "-s", 0.5),
        ("--family", "a,b"),
        ("--family", "0.5", "-s", 0.5),
        ("--family", "0.5", "--granularity", "nm:2:4"),
        ("--target", "bytes=0.5", "--granularity", "layer"),
        ("--target", "bytes", "--target", "nonzero", "--family", "0.5"),
        (),
    ],
)
def test_contradictions_are_wrong_usage(model, arguments):
    done = rnnprune("prune", model, *arguments)
    assert done.returncode == 2 and "rnnprune: " in done.stderr


# Sensitivity


def test_curves_are_what_pruning_that_layer_alone_costs(model, data):
    chosen = options(model, data)
    report = sensitivity(chosen, (0.3, 0.7), True, {}, lambda step: None)
    whole = {curve.layer: curve for curve in report.curves if curve.gate is None}
    for layer, curve in whole.items():
        for point in curve.points:
            stage = Stage("magnitude", "weight", "cell", point.sparsity, layers=(layer,))
            alone = run(dataclasses.replace(chosen, stages=(stage,), metric="relative-error"))
            assert alone.after.metrics[0].value == pytest.approx(point.drop, rel=1e-5)
    gates = [curve.gate for curve in report.curves if curve.layer == next(iter(whole))]
    assert gates == [None, "z", "r", "h"]


def test_one_gate_alone_costs_less_than_all(model, data):
    report = sensitivity(options(model, data), (0.7,), True, {}, lambda step: None)
    for layer in {curve.layer for curve in report.curves}:
        own = {c.gate: c.points[0].drop for c in report.curves if c.layer == layer}
        assert max(drop for gate, drop in own.items() if gate) < own[None] * 1.05


def test_the_layer_to_protect_is_named(model, data):
    report = sensitivity(options(model, data), (0.5, 0.7), False, {}, lambda step: None)
    assert report.protect == (report.curves[0].layer,)
    assert f"--exclude '{report.protect[0]}'" in report.advice


def test_scope_sensitivity_loses_less_than_equal_shares(model, data):
    equal = run(options(model, data, sparsity=0.5, compensate=False))
    divided = run(options(model, data, sparsity=0.5, scope="sensitivity", compensate=False))
    # The fidelity of the only output.
    assert divided.fidelity[0].mean_abs < 0.8 * equal.fidelity[0].mean_abs
    removed = sum(row.weights_before - row.nonzero_after for row in divided.layers)
    total = sum(row.weights_before for row in divided.layers)
    assert removed == pytest.approx(0.5 * total, abs=0.02 * total)


def test_the_command_prints_and_writes_the_same_curves(model, data, tmp_path):
    report, page = tmp_path / "curves.json", tmp_path / "curves.html"
    done = rnnprune(
        "sensitivity", model, "--data", data, "--sparsities", "0.3,0.7",
        "--report", report, "--report", page,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(report.read_text())
    for curve in document["curves"]:
        for point in curve["points"]:
            shown = f"{100 * point['drop']:+.1f} %"
            assert shown in done.stdout and shown in page.read_text()
    text = page.read_text()
    assert "<svg" in text and 'http-equiv="refresh' not in text and "<script" not in text
    assert "src=" not in text and 'href="http' not in text
    assert document["advice"] in " ".join(done.stdout.split())


def test_names_in_a_page_are_text(model, data):
    report = sensitivity(options(model, data), (0.5,), False, {}, lambda step: None)
    curve = dataclasses.replace(report.curves[0], layer="<script>alert(1)</script>")
    page = curves_page(dataclasses.replace(report, curves=(curve,), advice="<b>"))
    assert "<script" not in page and "&lt;b&gt;" in page
    assert curves_table(report)


def test_sensitivity_of_a_single_layer_says_what_it_can_bear(tmp_path, data):
    path = tmp_path / "one.onnx"
    path.write_bytes(recurrent_model(inputs=5).SerializeToString())
    report = sensitivity(options(path, data), (0.3, 0.9), False, {}, lambda step: None)
    assert "there is one layer" in report.advice and report.protect == ()


def test_a_saved_model_is_searched_in_place(tmp_path):
    pytest.importorskip("tensorflow")
    model, test = SAMPLES / "medicine", SAMPLES / "medicine.test.npz"
    chosen = PruneOptions(
        model,
        tmp_path / "out",
        (complete_stage("magnitude", "weight", None, 0.0),),
        data=test,
        calibration=SAMPLES / "medicine.calibration.npz",
        latency_seconds=0.0,
        targets=(Target("nonzero", 0.5),),
    )
    report = run(chosen)
    assert report.checks[0].passed and report.output.format == "savedmodel"


def test_targets_without_a_recurrent_layer_are_refused(model):
    chosen = dataclasses.replace(
        options(model, None, "nonzero=0.9"),
        stages=(Stage("magnitude", "weight", "cell", 0.0, exclude=("*",), include=("dense",)),),
    )
    with pytest.raises(UsageError, match="reached by recurrent layers"):
        run(chosen)


def test_each_output_may_have_a_metric_of_its_own_on_the_command_line(tmp_path):
    graph = Graph(["steps", "batch", 5])
    own = weights("LSTM", 6, 5, 1, seed=4)
    y = graph.op("LSTM", "x", own["W"], own["R"], own["B"], outs=2, hidden_size=6)
    for value in (y, y.replace("_0", "_1")):
        graph.output(value)
    path, data = tmp_path / "two.onnx", tmp_path / "two.npz"
    model = graph.model()
    path.write_bytes(model.SerializeToString())
    first, second = (o.name for o in model.graph.output)
    np.savez(data, x=np.random.default_rng(0).standard_normal((4, 6, 1, 5)).astype(np.float32))
    done = rnnprune(
        "prune", path, "-s", 0.5, "--data", data, "--format", "json",
        "--metric", f"{first}=agreement", "--metric", f"{second}=relative-error",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = {m["output"]: m["name"] for m in json.loads(done.stdout)["after"]["metrics"]}
    assert measured == {first: "agreement", second: "relative-error"}
