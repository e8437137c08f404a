from __future__ import annotations

import numpy as np
import pytest
from conftest import Graph
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from rnnprune_cli import metrics
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.load import load
from rnnprune_cli.metrics import (
    Comparison,
    Deviation,
    Evaluation,
    Quality,
    check_metric,
    drop,
    parse_metrics,
)
from rnnprune_cli.model import MetricValue, Runner, TensorSpec
from rnnprune_cli.runtime import ResizedRunner

OUT = (TensorSpec("y", np.dtype(np.float32), None),)


def evaluate(data, name):
    """The metric of a model whose predictions are its inputs."""
    evaluation = Evaluation(data, OUT, name)
    for start, stop in data.batches(2):
        evaluation.add([data.feed(start, stop)["x"]], start, stop)
    return evaluation.value()


def compare(one, two):
    comparison = Comparison(OUT)
    comparison.add([one], [two])
    return comparison.rows()


def dataset(predictions, targets, lengths=None, name=""):
    x = np.asarray(predictions, np.float32)
    return Dataset(
        {"x": x}, frozenset({"x"}), frozenset(), False, len(x), {name: np.asarray(targets)}, lengths
    )


def test_accuracy_of_classes():
    data = dataset([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], [1, 0, 0])
    value = evaluate(data, "auto")
    assert (value.name, value.value, value.higher_is_better) == (
        "accuracy",
        pytest.approx(2 / 3),
        True,
    )


def test_accuracy_of_one_logit_is_decided_at_zero():
    assert evaluate(dataset([[2.0], [-3.0]], [1, 0]), "accuracy").value == 1


def test_padded_steps_and_negative_labels_count_nowhere():
    predictions = np.zeros((2, 3, 2))
    predictions[..., 1] = 1
    labels = np.array([[1, 1, 0], [0, -1, 0]])
    data = dataset(predictions, labels, lengths=np.array([2, 2]))
    assert evaluate(data, "accuracy").value == pytest.approx(2 / 3)


def test_bits_and_perplexity_of_a_fair_coin():
    for logits in ([[0.0, 0.0]], [[0.5, 0.5]], [[700.0, 700.0]]):
        assert evaluate(dataset(logits, [1]), "bits-per-char").value == pytest.approx(1)
        assert evaluate(dataset(logits, [1]), "perplexity").value == pytest.approx(2)


def test_errors_of_a_regression():
    data = dataset([[1.0], [4.0]], np.array([[2.0], [2.0]]))
    assert evaluate(data, "auto").value == pytest.approx(2.5)
    assert evaluate(data, "mae").value == pytest.approx(1.5)


def test_target_of_a_named_output():
    data = dataset([[1.0]], np.array([[3.0]]), name="y")
    assert evaluate(data, "mae").value == pytest.approx(2)
    with pytest.raises(RnnpruneError, match="no output 'z'"):
        evaluate(dataset([[1.0]], np.array([[3.0]]), name="z"), "mae")


def test_labels_may_have_an_axis_of_length_one_more():
    assert evaluate(dataset([[0.1, 0.9], [0.8, 0.2]], [[1], [1]]), "auto").value == 0.5
    assert evaluate(dataset([[2.0], [-3.0]], [[1], [1]]), "accuracy").value == 0.5


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(RnnpruneError, match="do not fit"):
        evaluate(dataset(np.zeros((2, 3, 4)), np.zeros((2, 5), int)), "accuracy")


def test_unknown_metric_names_the_closest():
    with pytest.raises(UsageError) as caught:
        check_metric("acuracy")
    assert "accuracy" in caught.value.hint


@given(st.integers(0, 100))
def test_fidelity_of_equal_outputs_is_perfect(seed):
    a = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
    (row,) = compare(a, a)
    assert (row.max_abs, row.mean_abs, row.agreement) == (0, 0, 1)
    assert row.cosine == pytest.approx(1)


def test_fidelity_of_different_outputs():
    one, two = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    (row,) = compare(one, two)
    assert (row.max_abs, row.mean_abs, row.agreement) == (1, 0.5, 0.5)


def test_lengths_apply_to_binary_outputs_of_every_step():
    predictions, labels = np.full((2, 4), -1.0), np.zeros((2, 4), int)
    predictions[:, 3], labels[:, 3] = 1.0, 0
    data = dataset(predictions, labels, lengths=np.array([3, 3]))
    assert evaluate(data, "accuracy").value == 1


def test_lengths_do_not_apply_to_outputs_of_a_sample():
    x = np.zeros((2, 7, 3), np.float32)
    data = Dataset(
        {"x": x}, frozenset({"x"}), frozenset(), False, 2, {"": np.ones((2, 5))}, np.array([3, 3])
    )
    evaluation = Evaluation(data, OUT, "mse")
    evaluation.add([np.zeros((2, 5), np.float32)], 0, 2)
    assert evaluation.value().value == pytest.approx(1)


def test_logits_or_probabilities_is_decided_over_all_batches():
    data = dataset([[0.2], [0.4], [3.0]], [1, 1, 1])
    assert evaluate(data, "accuracy").value == 1


def test_one_column_has_two_classes():
    assert evaluate(dataset([[0.25]], [0]), "perplexity").value == pytest.approx(4 / 3)
    assert evaluate(dataset([[0.0], [-1e3]], [1, 0]), "bits-per-char").value == pytest.approx(0.5)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(RnnpruneError, match="label 9 is no class"):
        evaluate(dataset([[0.0, 1.0]], [9]), "accuracy")


def test_padded_steps_do_not_count_in_the_fidelity():
    comparison = Comparison(OUT)
    one, two = np.zeros((1, 3, 2)), np.zeros((1, 3, 2))
    two[:, 2] = 5
    comparison.add([one], [two], np.array([[True, True, False]]))
    assert comparison.rows()[0].max_abs == 0


# Several outputs, and no labels


def scaled(path, *factors, dtype=np.float32):
    """A model with outputs y0, y1, …: its input times each factor."""
    g = Graph(["batch", "time", 3])
    for k, factor in enumerate(factors):
        g.op("Mul", "x", np.asarray(factor, np.float32))
        if dtype is not np.float32:
            g.op("Cast", g.nodes[-1].output[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        g.nodes[-1].output[0] = f"y{k}"
        g.output(f"y{k}")
    return opened(path, g)


def opened(path, graph):
    path.write_bytes(graph.model().SerializeToString())
    return load(path).open()


def samples(targets=None, lengths=None, count=5, **inputs):
    x = np.random.default_rng(0).standard_normal((count, 4, 3)).astype(np.float32)
    inputs = inputs or {"x": x}
    return Dataset(
        inputs, frozenset(inputs), frozenset(), False, count, dict(targets or {}), lengths
    )


class Watched(Runner):
    """A model whose runs are counted, and that may hand on a state until it is reset."""

    def __init__(self, runner, carried=0.0):
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.runner, self.carried, self.runs, self.state = runner, carried, 0, 0.0

    def run(self, feed):
        self.runs += 1
        results = [np.asarray(r + self.state, r.dtype) for r in self.runner.run(feed)]
        self.state += self.carried
        return results

    def reset(self):
        self.state = 0.0


def test_each_output_with_a_target_has_its_own_metric(tmp_path):
    data = samples()
    x = data.inputs["x"]
    data = samples({"y1": x.argmax(axis=2), "y0": x.astype(np.float64)})
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0, 1.0), data)
    assert quality.dense == (
        MetricValue("mse", 0.0, False, "y0"),
        MetricValue("accuracy", 1.0, True, "y1"),
    )
    first, second = quality.of(scaled(tmp_path / "b.onnx", 3.0, -1.0))
    assert first.value == pytest.approx(4 * float((x.astype(np.float64) ** 2).mean()))
    assert (second.value, second.output) == (0.0, "y1")


def test_labels_are_those_of_the_first_output(tmp_path):
    runner = scaled(tmp_path / "a.onnx", 1.0, 2.0)
    x = samples().inputs["x"]
    (value,) = Quality(runner, samples({"": x})).dense
    assert (value.name, value.value, value.output) == ("mse", 0.0, "y0")
    with pytest.raises(RnnpruneError, match="two targets for output 'y0'"):
        Quality(runner, samples({"": x, "y0": x}))
    with pytest.raises(RnnpruneError, match="no output 'z'"):
        Quality(runner, samples({"z": x}))
    assert [v.output for v in Quality(runner, samples({"y1": x, "": x})).dense] == ["y0", "y1"]


def test_an_output_may_be_given_another_metric_than_the_others(tmp_path):
    x = samples().inputs["x"]
    data = samples({"y0": x + 1, "y1": 2 * x})
    runner = scaled(tmp_path / "a.onnx", 1.0, 1.0, 1.0)
    names = [(v.output, v.name) for v in Quality(runner, data, "mae").dense]
    assert names == [("y0", "mae"), ("y1", "mae")]
    found = Quality(runner, data, {"": "mae", "y1": "relative-error", "y2": "agreement"}).dense
    assert found == (
        MetricValue("mae", pytest.approx(1), False, "y0"),
        MetricValue("relative-error", 0.0, False, "y1"),
        MetricValue("agreement", 1.0, True, "y2"),
    )
    with pytest.raises(UsageError, match="no output 'y7'"):
        Quality(runner, data, "y7=mae")
    with pytest.raises(RnnpruneError, match="'mae' needs labels for output 'y2'"):
        Quality(runner, data, "y2=mae")


def test_without_labels_every_real_output_is_held_against_the_original(tmp_path):
    data = samples()
    x = data.inputs["x"].astype(np.float64)
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0, 2.0), data)
    assert [(v.name, v.value, v.output) for v in quality.dense] == [
        ("relative-error", 0.0, "y0"),
        ("relative-error", 0.0, "y1"),
    ]
    first, second = quality.of(scaled(tmp_path / "b.onnx", 1.5, 2.0))
    assert first.value == pytest.approx(0.5 * np.sqrt((x**2).mean()) / x.std(), rel=1e-6)
    assert second.value == 0
    (only,) = Quality(scaled(tmp_path / "a.onnx", 1.0, 2.0), data, without={"y1"}).dense
    assert only.output == "y0"
    with pytest.raises(RnnpruneError, match="needs labels"):
        Quality(scaled(tmp_path / "a.onnx", 1.0), data, "accuracy")
    with pytest.raises(RnnpruneError, match="no output to measure"):
        Quality(scaled(tmp_path / "a.onnx", 1.0), data, without={"y0"})


def test_the_mean_instead_of_an_output_is_a_relative_error_of_one():
    rng = np.random.default_rng(0)
    measure = Deviation("y", "relative-error")
    values = (1000 + rng.standard_normal((7, 60, 3))).astype(np.float32)
    for part in values:
        measure.add(part, np.full_like(part, values.mean(dtype=np.float64)))
    assert measure.value().value == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("original", "other", "value"),
    [
        ([2.0, 2.0], [2.0, 2.0], 0.0),
        ([2.0, 2.0], [2.0, 3.0], np.inf),
        ([0.0, 2.0, -np.inf], [0.0, 2.0, -np.inf], 0.0),
        ([0.0, 2.0], [0.0, np.nan], np.nan),
    ],
    ids=["equal constants", "a constant that changes", "equal infinities", "NaN"],
)
def test_relative_error_at_the_edges(original, other, value):
    measure = Deviation("y", "relative-error")
    measure.add(np.array(original), np.array(other))
    assert measure.value().value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("original", "other", "value"),
    [
        ([[1.0, 2, 0], [3, 2, 1]], [[1.0, 2, 3], [3, 2, 1]], 0.5),
        ([[1.0, 2, 0], [3, 2, 1]], [[1.0, 2, 0], [np.nan, 2, 1]], 0.5),
        ([[-1.0], [2.0]], [[-0.1], [0.1]], 1.0),
        ([[0.2], [0.9]], [[0.6], [0.9]], 0.5),
        ([0.2, 0.9], [0.4, 0.6], 1.0),
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0]), 0.75),
    ],
    ids=["classes", "NaN agrees with nothing", "one logit", "one probability", "flat", "integers"],
)
def test_agreement_by_kind_of_output(original, other, value):
    measure = Deviation("y", "agreement")
    measure.add(np.asarray(original), np.asarray(other))
    assert measure.value().value == value


def test_agreement_is_that_of_the_fidelity(tmp_path):
    data = samples(count=70)
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0), data, "agreement")
    other = scaled(tmp_path / "b.onnx", [1.0, 1.0, 1.4])
    values, comparison = quality.compared(other)
    assert values == quality.of(other)
    assert 0 < values[0].value == comparison.rows()[0].agreement < 1


def test_integer_outputs_are_held_against_the_original_where_there_is_nothing_else(tmp_path):
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0, dtype=np.int64), samples())
    assert quality.dense == (MetricValue("agreement", 1.0, True, "y0"),)
    (value,) = quality.of(scaled(tmp_path / "b.onnx", 2.0, dtype=np.int64))
    assert 0 < value.value < 1


def test_padded_steps_do_not_count_without_labels_either(tmp_path):
    lengths = np.array([4, 1, 2, 3, 4])
    data = samples(lengths=lengths)
    x = data.inputs["x"].astype(np.float64)[np.arange(4)[None] < lengths[:, None]]
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0), data)
    (value,) = quality.of(scaled(tmp_path / "b.onnx", 1.5))
    assert value.value == pytest.approx(0.5 * np.sqrt((x**2).mean()) / x.std(), rel=1e-6)


@pytest.mark.parametrize("labels", [(5, 4), (5, 4, 1)])
def test_padded_steps_do_not_count_where_the_steps_come_first(tmp_path, labels):
    lengths = np.array([4, 1, 2, 3, 4])
    x = np.random.default_rng(0).standard_normal((5, 4, 1, 3)).astype(np.float32)
    right = x[:, :, 0].argmax(axis=2)
    real = np.arange(4)[None] < lengths[:, None]
    wanted = np.where(real, right, (right + 1) % 3).reshape(labels)
    data = Dataset({"x": x}, frozenset({"x"}), frozenset({"x"}), True, 5, {"y0": wanted}, lengths)
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0, 1.0), data, {"y1": "relative-error"})
    assert [v.value for v in quality.dense] == [1.0, 0.0]
    kept = x[:, :, 0].astype(np.float64)[real]
    _, error = quality.of(scaled(tmp_path / "b.onnx", 1.5, 1.5))
    assert error.value == pytest.approx(0.5 * np.sqrt((kept**2).mean()) / kept.std(), rel=1e-6)


@pytest.mark.parametrize("limit", [0, 3000, 1 << 20])
def test_the_original_is_run_again_only_for_what_was_too_large_to_remember(
    tmp_path, monkeypatch, limit
):
    monkeypatch.setattr(metrics, "MAX_REMEMBERED_BYTES", limit)
    data = samples(count=150)  # three batches, 3072 bytes each of the first two
    original = Watched(scaled(tmp_path / "a.onnx", 1.0))
    other = scaled(tmp_path / "b.onnx", 1.5)
    quality = Quality(original, data)
    assert original.runs == 3
    value = quality.of(other)
    assert original.runs == (3 if limit > 1 << 16 else 6)
    monkeypatch.undo()
    assert Quality(original, data).of(other) == value
    labelled = Quality(original, samples({"": data.inputs["x"]}, count=150))
    before = original.runs
    labelled.of(other)
    assert original.runs == before


def test_every_batch_starts_from_the_initial_state(tmp_path):
    data = samples(count=150)
    runner = scaled(tmp_path / "a.onnx", 1.0)
    quality = Quality(Watched(runner, carried=1.0), data)
    assert quality.of(runner)[0].value == 0
    assert Quality(runner, data).of(Watched(runner, carried=1.0))[0].value == 0


def test_states_of_old_are_cut_for_a_model_that_takes_shorter_ones(tmp_path):
    def model(path, size):
        g = Graph(["batch", "time", 3])
        g.inputs.append(helper.make_tensor_value_info("h", 1, ["batch", size]))
        mean = g.op("ReduceMean", "h", axes=[1], keepdims=1)
        g.op("Add", g.op("ReduceMean", "x", axes=[2], keepdims=0), mean)
        g.nodes[-1].output[0] = "y"
        g.output("y")
        return opened(path, g)

    data = samples(x=samples().inputs["x"], h=np.full((5, 4), 2, np.float32))
    keep = np.array([[True, False, True, False]])
    shorter = ResizedRunner(model(tmp_path / "b.onnx", 2), {"h": (keep, 1)})
    assert Quality(model(tmp_path / "a.onnx", 4), data).of(shorter)[0].value == 0


def test_an_output_of_another_shape_cannot_be_measured(tmp_path):
    g = Graph(["batch", "time", 3])
    g.op("ReduceMean", "x", axes=[2], keepdims=1)
    g.nodes[-1].output[0] = "y0"
    g.output("y0")
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0), samples())
    with pytest.raises(RnnpruneError, match="output 'y0' cannot be compared"):
        quality.of(opened(tmp_path / "b.onnx", g))


def test_probabilities_or_logits_is_taken_from_the_original(tmp_path):
    x = np.tile(np.array([[[0.2, 0.3, 0.5]]], np.float32), (5, 4, 1))
    data = Dataset(
        {"x": x}, frozenset({"x"}), frozenset(), False, 5, {"": np.full((5, 4), 2)}, None
    )
    quality = Quality(scaled(tmp_path / "a.onnx", 1.0), data, "perplexity")
    assert quality.dense[0].value == pytest.approx(2)
    assert quality.of(scaled(tmp_path / "b.onnx", 0.5))[0].value == pytest.approx(4)


def test_a_prediction_of_nan_is_no_hit():
    assert evaluate(dataset([[np.nan, 0.0], [1.0, 0.0]], [0, 0]), "accuracy").value == 0.5


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(RnnpruneError, match=r"label 1\.5 is no class"):
        evaluate(dataset([[0.0, 1.0], [1.0, 0.0]], [0.0, 1.5]), "accuracy")
    assert evaluate(dataset([[0.0, 1.0], [1.0, 0.0]], [1.0, np.nan]), "accuracy").value == 1


def test_a_named_target_without_labelled_steps_is_named(tmp_path):
    x = samples().inputs["x"]
    data = samples({"y0": x, "y1": np.full((5, 4), -1)})
    with pytest.raises(RnnpruneError, match="no labelled step for output 'y1'"):
        Quality(scaled(tmp_path / "a.onnx", 1.0, 1.0), data)


# What is asked for


def test_metrics_are_read_for_all_outputs_and_for_single_ones():
    assert parse_metrics([]) == {}
    assert parse_metrics(["auto"]) == {"": "auto"}
    assert parse_metrics(["mae", "a=b=accuracy", "c=agreement"]) == {
        "": "mae",
        "a=b": "accuracy",
        "c": "agreement",
    }
    assert parse_metrics(["c=mse", "c=mse"], ["b", "c"]) == {"c": "mse"}


@pytest.mark.parametrize(
    ("texts", "message", "hint"),
    [
        (["acuracy"], "no metric 'acuracy'", "'accuracy'"),
        (["logits=relative-eror"], "no metric 'relative-eror'", "'relative-error'"),
        (["logit=mse"], "no output 'logit'", "'logits'"),
        (["mse", "mae"], "two metrics are given for every output: mse and mae", "OUTPUT=METRIC"),
        (["logits=mse", "logits=mae"], "for output 'logits'", "OUTPUT=METRIC"),
    ],
)
def test_unknown_metrics_and_outputs_name_the_closest(texts, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        parse_metrics(texts, ["logits", "states"])
    assert hint in caught.value.hint


# What is lost


def value(name, figure, output=""):
    higher = name in ("accuracy", "agreement")
    return MetricValue(name, figure, higher, output)


@pytest.mark.parametrize(
    ("name", "before", "after", "lost"),
    [
        ("accuracy", 0.98, 0.97, 0.01),
        ("agreement", 1.0, 0.9, 0.1),
        ("accuracy", 0.9, 0.95, -0.05),
        ("bits-per-char", 2.0, 2.1, 0.05),
        ("perplexity", 4.0, 3.0, -0.25),
        ("mse", 8.0, 16.0, 1.0),
        ("mae", 0.0, 0.0, 0.0),
        ("mae", 0.0, 1e-9, np.inf),
        ("relative-error", 0.0, 0.03, 0.03),
        ("mse", 1.0, np.nan, np.inf),
        ("accuracy", np.nan, 1.0, np.inf),
        ("perplexity", np.inf, 3.0, np.inf),
    ],
)
def test_drop_by_metric(name, before, after, lost):
    assert drop([value(name, before)], [value(name, after)]) == pytest.approx(lost)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), min_size=1, max_size=5))
def test_drop_is_the_worst_of_the_outputs(pairs):
    before = [value("accuracy", one, str(k)) for k, (one, _) in enumerate(pairs)]
    after = [value("accuracy", two, str(k)) for k, (_, two) in enumerate(pairs)]
    lost = drop(before, after[::-1])
    assert all(one.value - two.value <= lost for one, two in zip(before, after, strict=True))
    assert lost == max(drop([one], [two]) for one, two in zip(before, after, strict=True))


def test_drop_of_different_measures_is_refused():
    one, other = value("mse", 1.0), value("mse", 1.0, "y")
    for before, after in (
        ([], []),
        ([one], []),
        ([one], [value("mae", 1.0)]),
        ([one], [other]),
        ([one], [one, other]),
        ([one, other], [one]),
    ):
        with pytest.raises(ValueError, match="same metrics"):
            drop(before, after)
