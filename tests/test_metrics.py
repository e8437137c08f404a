from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.metrics import Comparison, Evaluation, check_metric
from rnnprune_cli.model import TensorSpec

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
