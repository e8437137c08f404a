"""Models side by side: which figures, in which settings, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SAMPLES, recurrent_model
from test_cli import rnnprune

from rnnprune_cli import bench as benchmark
from rnnprune_cli import memory, onnx_model
from rnnprune_cli.bench import (
    BenchOptions,
    adapted,
    bench,
    check,
    model_runner,
    names,
    work_per_step,
)
from rnnprune_cli.data import FeedSize, feed_size, made_up_feeds, resized
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.model import BenchReport, TensorSpec
from rnnprune_cli.timing import ratio

LARGE, SMALL = 96, 16
"""Hidden units: the second takes a fraction of the first's time."""


def write(path: Path, hidden: int, **more) -> Path:
    path.write_bytes(recurrent_model("LSTM", hidden=hidden, **more).SerializeToString())
    return path


def renamed(path: Path, x: str, y: str) -> Path:
    """Gives the input and the output of a model other names."""
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = x
    model.graph.output[0].name = model.graph.node[0].output[0] = y
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def models(folder) -> tuple[Path, ...]:
    large = write(folder / "large.onnx", LARGE)
    small = write(folder / "small.onnx", LARGE, seed=1)
    proto = recurrent_model("LSTM", hidden=LARGE)
    for tensor in proto.graph.initializer:
        if tensor.name == "R":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[:, ::2] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "R"))
    (folder / "half.onnx").write_bytes(proto.SerializeToString())
    return large, small, folder / "half.onnx"


@pytest.fixture(scope="module")
def data(folder) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((20, 4, 1, 7), dtype=np.float32)
    labels = generator.standard_normal((20, 4, 1, 1, LARGE), dtype=np.float32)
    np.savez(folder / "data.npz", x=x, labels=labels)
    return folder / "data.npz"


@pytest.fixture(scope="module")
def report(models, data) -> BenchReport:
    options = BenchOptions(
        models, data, batches=(1, 3), steps=(4, 9), threads=(1, 2), seconds=0.2, step_seconds=0.01
    )
    return bench(options, {"models": [*map(str, models)]}, lambda step: None)


def test_every_model_is_measured_in_every_setting(report, models):
    settings = {(b, s, t) for b in (1, 3) for s in (4, 9) for t in (1, 2)}
    for model in report.models:
        own = [t for t in report.timings if t.model == model.name]
        assert {(t.batch, t.steps, t.threads) for t in own} == settings
        assert model.latency_ms == own[0].latency_ms
    assert [m.name for m in report.models] == [m.name for m in models]
    assert len(report.ratios) == 2 * len(settings)
    assert len(report.controls) == len(settings)
    assert report.control == report.controls[0]
    assert {r.reference for r in report.ratios} == {"large.onnx"}


def test_throughput_and_real_time_factor_follow_from_the_median(report):
    for timing in report.timings:
        seconds = timing.latency_ms.median / 1e3
        assert timing.samples_per_second == pytest.approx(timing.batch / seconds)
        assert timing.steps_per_second == pytest.approx(timing.batch * timing.steps / seconds)
        assert timing.real_time_factor == pytest.approx(seconds / (0.01 * timing.steps))


def test_ratios_can_be_worked_out_again_from_the_samples(report):
    """Everything that the statistics need is in the report."""
    latencies = {(t.model, t.batch, t.steps, t.threads): t.latency_ms for t in report.timings}

    def rounds(name, held):
        own = latencies[name, held.batch, held.steps, held.threads]
        return np.split(np.array(own.samples), np.cumsum(own.rounds)[:-1])

    for held in report.ratios:
        again = ratio(rounds(held.reference, held), rounds(held.model, held))
        expected = (held.latency.low, held.latency.median, held.latency.high)
        assert (again.low, again.median, again.high) == pytest.approx(expected, rel=1e-2)


def test_figures_of_a_model_are_those_of_its_file(report, models):
    for model, path in zip(report.models, models, strict=True):
        proto = onnx.load(path)
        arrays = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer]
        assert model.parameters == sum(a.size for a in arrays)
        assert model.nonzero == sum(np.count_nonzero(a) for a in arrays)
        assert model.bytes == path.stat().st_size
        assert model.macs_per_step == sum(a.size for a in arrays if a.ndim == 3)
        assert model.bytes_per_step == 4 * model.macs_per_step
        assert model.load_ms > 0
        assert 100_000 < model.peak_bytes < 100_000_000
    assert report.models[2].nonzero < report.models[0].nonzero


def test_metrics_are_those_of_the_data(report, models, data):
    arrays = np.load(data)
    for model, path in zip(report.models, models, strict=True):
        runner = load(path).open()
        errors = [
            runner.run({"x": x})[0] - y for x, y in zip(arrays["x"], arrays["labels"], strict=True)
        ]
        assert model.metric is not None and model.metric.name == "mse"
        assert model.metric.value == pytest.approx(float(np.mean(np.square(errors))), rel=1e-5)


def test_labels_that_are_missing_are_said(models, data, tmp_path):
    bare = tmp_path / "bare.npz"
    np.savez(bare, x=np.load(data)["x"])
    options = BenchOptions(models[:2], bare, seconds=0.1)
    found = bench(options, {}, lambda step: None)
    assert found.models[0].metric is None
    assert any("no labels" in warning for warning in found.warnings)
    with pytest.raises(UsageError, match=r"metric-drop<=0\.1.*no labels") as caught:
        bench(dataclasses.replace(options, require=("metric-drop<=0.1",)), {}, lambda step: None)
    assert "agreement" in caught.value.hint
    found = bench(dataclasses.replace(options, metric="agreement"), {}, lambda step: None)
    assert found.models[1].metric is not None
    assert not any("no labels" in warning for warning in found.warnings)


def test_a_smaller_model_is_faster_and_the_interval_says_so(folder, models):
    small = write(folder / "tiny.onnx", SMALL)
    options = BenchOptions((models[0], renamed(small, "frames", "states")), steps=(50,), seconds=1)
    # Outputs of another size cannot be compared, but both can be timed: no data, no metric.
    found = bench(options, {}, lambda step: None)
    (held,) = found.ratios
    assert held.latency.high < 0.7
    assert found.models[1].macs_per_step == 4 * SMALL * (7 + SMALL)


def test_a_large_model_is_opened_once_for_each_number_of_threads(models, monkeypatch):
    opened: list[int] = []

    def noted(model, threads, providers):
        opened.append(threads)
        return model_runner(model, threads, providers)

    monkeypatch.setattr(onnx_model, "BIG_MODEL_BYTES", 0)
    monkeypatch.setattr(benchmark, "model_runner", noted)
    bench(BenchOptions(models[:1], threads=(1, 2), seconds=0.1), {}, lambda step: None)
    assert opened == [1, 2]


def test_a_single_model_has_a_control_and_no_ratio(models):
    found = bench(BenchOptions(models[:1], seconds=0.1), {}, lambda step: None)
    assert found.ratios == () and len(found.timings) == 1
    assert 0.5 < found.control.latency.median < 2


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.onnx", "b.onnx"], ["a.onnx", "b.onnx"]),
        (["a.onnx", "a.onnx", "a.onnx"], ["a.onnx", "a.onnx (2)", "a.onnx (3)"]),
        (["x/a.onnx", "y/a.onnx"], ["x/a.onnx", "y/a.onnx"]),
        (["x/a.onnx", "y/a.onnx", "x/a.onnx"], ["x/a.onnx", "y/a.onnx", "x/a.onnx (2)"]),
        (["..", "."], ["..", "."]),
    ],
)
def test_names_are_short_and_all_different(paths, expected):
    assert names([*map(Path, paths)]) == expected


def test_no_process_outlives_an_interrupt(models, monkeypatch):
    """Those that measure memory may take minutes."""
    seen: list[subprocess.Popen[str]] = []

    def interrupted(process):
        seen.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "_said", interrupted)
    feed = {"x": np.zeros((4, 1, 7), np.float32)}
    call = memory.Call(load(models[0]), feed, 1, ("CPUExecutionProvider",), None)
    with pytest.raises(KeyboardInterrupt):
        memory.peaks([call] * 3)
    assert [process.returncode for process in seen] == [-signal.SIGKILL]


def test_memory_that_cannot_be_measured_is_explained(models):
    feed = {"x": np.zeros((4, 1, 9), np.float32)}
    provider = ("CPUExecutionProvider",)
    wrong = memory.Call(load(models[0]), feed, 1, provider, None)
    right = dataclasses.replace(wrong, feed={"x": feed["x"][..., :7]})
    found = memory.peaks([right, wrong, right])
    assert [type(size) for size in found] == [int, str, int]
    assert "x" in str(found[1])


# Sizes of a feed

SPECS = {
    "batch first": ([("x", ("batch", "time", 7))], (0, 1)),
    "time first": ([("x", ("seq", "batch", 7))], (1, 0)),
    "time first, one sample": ([("x", ("seq", 576)), ("h", (1, 1, 16))], (None, 0)),
    "nameless": ([("x", (None, None, 7))], (0, 1)),
    "audio": ([("x", ("N", "samples"))], (0, 1)),
    "fixed audio": ([("x", (1, 512))], (0, None)),
    "fixed": ([("x", (1, 100, 7))], (0, 1)),
    "with a state": ([("x", (1, None, 7)), ("h", (2, 1, 16))], (0, 1)),
    "image": ([("x", (1, 1, "S", 32))], (0, 2)),
}


def specs(shapes):
    return [TensorSpec(name, np.dtype(np.float32), shape) for name, shape in shapes]


@pytest.mark.parametrize("name", SPECS)
def test_which_axes_are_the_batch_and_the_steps(name):
    shapes, (batch, steps) = SPECS[name]
    feed = {
        own: np.zeros([d if isinstance(d, int) else 11 + k for k, d in enumerate(shape)])
        for own, shape in shapes
    }
    x = feed["x"].shape
    # The state of one sample says how many there are where the sequence does not.
    expected = 1 if batch is None and len(shapes) > 1 else None if batch is None else x[batch]
    size = feed_size(feed, specs(shapes))
    assert (size.batch, size.steps) == (expected, None if steps is None else x[steps])


def test_a_feed_that_is_too_short_begins_again():
    own = specs([("x", ("batch", "time", 2)), ("h", (1, "batch", 4))])
    feed = {"x": np.arange(12.0).reshape(2, 3, 2), "h": np.arange(8.0).reshape(1, 2, 4)}
    new = resized(feed, own, 3, 5)
    assert new["x"].shape == (3, 5, 2) and new["h"].shape == (1, 3, 4)
    np.testing.assert_array_equal(new["x"][2, 3:], feed["x"][0, :2])
    np.testing.assert_array_equal(resized(feed, own, 1, 2)["x"], feed["x"][:1, :2])
    assert resized(feed, own, None, None).keys() == feed.keys()


PADDED = [
    *specs([("x", ("batch", "time", 2))]),
    TensorSpec("lens", np.dtype(np.int32), ("batch",), is_length=True),
]


def test_lengths_follow_the_steps_and_the_batch():
    feed = {"x": np.zeros((2, 3, 2), np.float32), "lens": np.array([3, 2], np.int32)}
    np.testing.assert_array_equal(resized(feed, PADDED, None, 7)["lens"], [7, 7])
    new = resized(feed, PADDED, 5, None)
    assert new["x"].shape == (5, 3, 2) and new["lens"].shape == (5,)


def test_lengths_of_the_data_stay_and_only_their_steps_count():
    """Padding that the model is told of takes no time, and would make throughput too good."""
    feed = {"x": np.zeros((2, 9, 2), np.float32), "lens": np.array([4, 2], np.int32)}
    assert feed_size(feed, PADDED) == FeedSize(2, 4, 6)
    np.testing.assert_array_equal(resized(feed, PADDED, None, None)["lens"], [4, 2])
    assert feed_size(resized(feed, PADDED, 3, None), PADDED) == FeedSize(3, 4, 10)
    assert feed_size(resized(feed, PADDED, 3, 5), PADDED) == FeedSize(3, 5, 15)


def test_a_size_that_fills_the_memory_is_refused():
    feed = {"x": np.zeros((2, 3, 2), np.float32)}
    with pytest.raises(UsageError, match="--steps 500000 makes 'x' larger") as caught:
        resized(feed, PADDED[:1], 1000, 500_000)
    assert "--steps" in caught.value.hint


def test_padded_samples_run_in_any_batch():
    options = BenchOptions((SAMPLES / "speech.onnx",), batches=(1, 3), seconds=0.1)
    found = bench(options, {}, lambda step: None)
    assert [t.batch for t in found.timings] == [1, 3]


def test_a_call_without_an_axis_of_steps_is_one_step():
    model = Path(__file__).parent / "graphs" / "cells" / "step_gru_merged.onnx"
    options = BenchOptions((model,), seconds=0.1, step_seconds=0.01)
    (timing,) = bench(options, {}, lambda step: None).timings
    assert (timing.batch, timing.steps) == (1, None)
    assert timing.real_time_factor == pytest.approx(timing.latency_ms.median / 10)


def even_only(path: Path) -> Path:
    """Writes a model that pairs steps, and so takes an even number of them."""
    graph = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, time, 4] x) => (float[batch, pairs, 2, 4] y)
        <int64[4] shape = {0, -1, 2, 4}> { y = Reshape(x, shape) }"""
    )
    onnx.save(graph, path)
    return path


def test_a_size_that_a_model_does_not_take_is_said_before_anything_is_timed(tmp_path):
    done: list[str] = []
    options = BenchOptions((even_only(tmp_path / "even.onnx"),), steps=(4, 7), seconds=0.1)
    with pytest.raises(RnnpruneError, match=r"^even\.onnx with --steps 7: ") as caught:
        bench(options, {}, done.append)
    assert "sizes" in caught.value.hint
    assert not any("timing" in step for step in done)


def test_a_fixed_size_is_not_changed():
    own = specs([("x", (1, "time", 2))])
    feed = {"x": np.zeros((1, 3, 2), np.float32)}
    with pytest.raises(UsageError, match="batch of input 'x' cannot be 4") as caught:
        resized(feed, own, 4, None)
    assert "--batch" in caught.value.hint
    assert resized(feed, own, 1, 5)["x"].shape == (1, 5, 2)


# Feeding one model as another


def test_inputs_and_outputs_of_other_names_belong_together_by_place(folder):
    one = load(write(folder / "one.onnx", SMALL)).open()
    other = load(renamed(write(folder / "other.onnx", SMALL), "frames", "states")).open()
    feed = made_up_feeds(one, 0)[0]
    both = adapted(other, one)
    assert [o.name for o in both.outputs] == ["y"]
    np.testing.assert_array_equal(both.run(feed)[0], one.run(feed)[0])
    np.testing.assert_array_equal(both.run(both.prepared(feed))[0], one.run(feed)[0])
    assert adapted(one, one) is one


def test_models_that_take_other_things_are_refused_by_name(models):
    sample = SAMPLES / "language.onnx"
    with pytest.raises(RnnpruneError, match=r"^language\.onnx: ") as caught:
        bench(BenchOptions((models[0], sample), seconds=0.1), {}, lambda step: None)
    assert caught.value.hint


def test_work_per_step_counts_every_execution_and_reads_shared_weights_once(folder):
    from conftest import two_layers

    (folder / "copies.onnx").write_bytes(two_layers(copy=True).SerializeToString())
    model = load(folder / "copies.onnx")
    one = 4 * 12 * (7 + 12)
    assert work_per_step(model) == (2 * one, 4 * one)


# What is refused

REFUSED = {
    "batch": ({"batches": (0,)}, "--batch"),
    "threads": ({"threads": (1, 1000)}, "--threads"),
    "precision": ({"precision": 1.0}, "--precision"),
    "time": ({"seconds": 0.0}, "--time"),
    "step": ({"step_seconds": -1.0}, "--step-seconds"),
    "provider": ({"providers": ("NoExecutionProvider",)}, "no execution provider"),
    "metric without data": ({"metric": "accuracy"}, "needs data"),
    "metric": ({"metric": "acuracy"}, "metric"),
    "requirement": ({"require": ("latencie<=1",)}, "latencie"),
    "requirement without data": ({"require": ("metric-drop<=0.1",)}, "needs data"),
    "requirement on one model": ({"require": ("latency<=0.8",)}, "needs a second model"),
    "no threads": ({"threads": ()}, "--threads"),
    "signature": ({"models": (SAMPLES / "speech.onnx",), "signature": "x"}, "SavedModels"),
    "signature of the suite": ({"models": (), "signature": "x"}, "SavedModels"),
    "too many": ({"models": (Path("a"),) * 65}, "65 models"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name):
    options, words = REFUSED[name]
    with pytest.raises(UsageError, match=words) as caught:
        check(dataclasses.replace(BenchOptions((Path("a.onnx"),)), **options))
    assert caught.value.hint


# As a user runs it


def test_the_command_measures_judges_and_writes_reports(models, folder):
    page, text = folder / "bench.html", folder / "bench.json"
    done = rnnprune(
        "bench", models[0], models[0], "--time", 0.5, "--report", page, "--report", text,
        "--require", "latency<=0.1", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(text.read_text())
    (judged,) = document["checks"]
    assert judged["expression"] == "latency<=0.1" and not judged["passed"]
    assert "large.onnx (2)" in page.read_text()
    again = rnnprune("bench", models[0], "--report", text)
    assert again.returncode == 2 and "--force" in again.stderr


def test_a_saved_model_is_measured_beside_its_onnx_twin(folder):
    """Medicine is a SavedModel with labels; its conversion gives the same metric, sooner."""
    twin, data = folder / "medicine.onnx", SAMPLES / "medicine.test.npz"
    made = rnnprune("prune", SAMPLES / "medicine", "-s", 0, "-o", twin, "--quiet")
    assert made.returncode == 0, made.stderr
    done = rnnprune(
        "bench", SAMPLES / "medicine", twin, "--data", data, "--time", 1, "--format", "json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    one, two = document["models"]
    assert (one["format"], two["format"]) == ("savedmodel", "onnx")
    assert one["metric"]["value"] == pytest.approx(two["metric"]["value"])
    assert one["macs_per_step"] == two["macs_per_step"]
    assert one["peak_bytes"] > 0 and two["peak_bytes"] > 0
    assert document["ratios"][0]["latency"]["high"] < 1
    several = rnnprune("bench", SAMPLES / "medicine", "--threads", "1,2")
    assert several.returncode == 2 and "TensorFlow" in several.stderr
