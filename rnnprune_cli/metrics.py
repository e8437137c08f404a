"""Quality of a model on labelled data, and how much two models' outputs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import Array, BoolArray, MetricValue, OutputFidelity, TensorSpec

BATCH = 64
"""Samples that are evaluated at once."""


@dataclass(frozen=True)
class _Metric:
    """A metric that is a mean over items (steps or samples).

    ``per_item`` maps (prediction ``[items, …]``, target ``[items, …]``, whether predictions are
    probabilities rather than logits) to ``[items]``; ``finish`` maps the mean to the figure.
    """

    higher_is_better: bool
    classes: bool
    per_item: Callable[[Array, Array, bool], Array]
    finish: Callable[[float], float] = lambda mean: mean


def _columns(prediction: Array, probabilities: bool) -> Array:
    """One column for each class: a single one speaks for the second of two classes."""
    values = prediction.astype(np.float64)
    if values.shape[1] > 1:
        return values
    other = 1 - values if probabilities else np.zeros_like(values)
    return np.concatenate([other, values], axis=1)


def _log_likelihood(prediction: Array, target: Array, probabilities: bool) -> Array:
    """Natural log of the probability of the target class."""
    values = _columns(prediction, probabilities)
    picked = np.take_along_axis(values, target[:, None], axis=1)[:, 0]
    if probabilities:
        return np.asarray(np.log(np.maximum(picked, 1e-12)))
    top = values.max(axis=1)
    return np.asarray(picked - top - np.log(np.exp(values - top[:, None]).sum(axis=1)))


def _hits(prediction: Array, target: Array, probabilities: bool) -> Array:
    return np.asarray(_columns(prediction, probabilities).argmax(axis=1) == target, np.float64)


def _are_probabilities(prediction: Array) -> bool:
    """Tells whether predictions of classes can be probabilities."""
    if prediction.size and (prediction.min() < 0 or prediction.max() > 1):
        return False
    single = prediction.shape[1] == 1
    return single or bool(np.allclose(prediction.sum(axis=1), 1, atol=1e-3))


def _error(prediction: Array, target: Array) -> Array:
    return (prediction.astype(np.float64) - target).reshape(len(target), -1)


METRICS = {
    "accuracy": _Metric(True, True, _hits),
    "bits-per-char": _Metric(False, True, lambda p, t, q: -_log_likelihood(p, t, q) / np.log(2)),
    "perplexity": _Metric(
        False, True, lambda p, t, q: -_log_likelihood(p, t, q), lambda mean: float(np.exp(mean))
    ),
    "mse": _Metric(False, False, lambda p, t, q: (_error(p, t) ** 2).mean(axis=1)),
    "mae": _Metric(False, False, lambda p, t, q: np.abs(_error(p, t)).mean(axis=1)),
}
"""Name → metric; ``auto`` chooses among them by the labels."""


def check_metric(name: str) -> None:
    """Raises UsageError for an unknown metric."""
    if name != "auto" and name not in METRICS:
        raise UsageError(f"there is no metric '{name}'", closest(name, ["auto", *METRICS]))


class Evaluation:
    """Accumulates a metric of one model over the batches of a labelled data set.

    Padded steps (beyond ``lengths``) and labels below 0 count nowhere.

    Args:
        data: The data set, with targets.
        outputs: The model's outputs.
        name: A key of :data:`METRICS`, or ``auto``: ``accuracy`` for integer labels
            (``bits-per-char`` where the model reads integers and predicts one at each step),
            ``mse`` for others.

    Raises:
        RnnpruneError: If a target belongs to no output.
    """

    def __init__(self, data: Dataset, outputs: Sequence[TensorSpec], name: str) -> None:
        self._data = data
        self._name = name
        target, self._target = next(iter(data.targets.items()))
        self._output = _output_index(outputs, target)
        self._totals, self._items = np.zeros(2), 0  # as logits, as probabilities
        self.probabilities = True

    def add(self, results: Sequence[Array], start: int, stop: int) -> None:
        """Adds the outputs for the samples ``start`` to ``stop``.

        Raises:
            RnnpruneError: If labels and outputs do not fit.
        """
        prediction = results[self._output]
        self._name = _choose(self._name, self._data, prediction, self._target)
        metric = METRICS[self._name]
        valid = self._data.valid(start, stop)
        p, t = _items(metric, prediction, self._target[start:stop], valid)
        if len(t) == 0:
            return
        if metric.classes:
            self.probabilities &= _are_probabilities(p)
        # Which of the two it is shows only when all are seen.
        self._totals += [float(metric.per_item(p, t, q).sum()) for q in (False, True)]
        self._items += len(t)

    def value(self, probabilities: bool | None = None) -> MetricValue:
        """Returns the figure over everything that was added.

        Args:
            probabilities: Take outputs for probabilities (or logits), as another model's were;
                None to judge by what was added.

        Raises:
            RnnpruneError: If no step had a label.
        """
        if self._items == 0:
            raise RnnpruneError("the data set has no labelled step", "check labels and lengths")
        metric = METRICS[self._name]
        chosen = self.probabilities if probabilities is None else probabilities
        figure = metric.finish(float(self._totals[int(chosen)]) / self._items)
        return MetricValue(self._name, figure, metric.higher_is_better)


def _output_index(outputs: Sequence[TensorSpec], name: str) -> int:
    names = [o.name for o in outputs]
    if name and name not in names:
        raise RnnpruneError(f"the model has no output '{name}'", closest(name, names))
    return names.index(name) if name else 0


def _choose(name: str, data: Dataset, prediction: Array, target: Array) -> str:
    if name != "auto":
        return name
    if target.dtype.kind not in "iub":
        return "mse"
    tokens = any(a.dtype.kind in "iu" and a.ndim == 2 for a in data.inputs.values())
    return "bits-per-char" if tokens and prediction.ndim == 3 and target.ndim == 2 else "accuracy"


def _items(
    metric: _Metric, prediction: Array, target: Array, valid: BoolArray | None
) -> tuple[Array, Array]:
    """Lines predictions up with targets and drops padded steps and ignored labels."""
    if metric.classes:
        if prediction.ndim == target.ndim:
            prediction = prediction[..., None]
        if prediction.shape[:-1] != target.shape:
            raise RnnpruneError(
                f"labels of shape {list(target.shape)} do not fit an output of shape"
                f" {list(prediction.shape)}",
                "one class for each sample, or for each step, is expected",
            )
    elif prediction.shape != target.shape:
        if prediction.size != target.size:
            raise RnnpruneError(
                f"targets of shape {list(target.shape)} do not fit an output of shape"
                f" {list(prediction.shape)}",
                "they must have the output's shape",
            )
        target = target.reshape(prediction.shape)
    if valid is not None and target.shape[:2] == valid.shape == prediction.shape[:2]:
        prediction, target = prediction[valid], target[valid]
    if metric.classes:
        prediction = prediction.reshape(-1, prediction.shape[-1])
        target = target.reshape(-1)
        labelled = target >= 0
        prediction, target = prediction[labelled], target[labelled].astype(np.int64)
        classes = max(prediction.shape[-1], 2)
        if target.max(initial=0) >= classes:
            raise RnnpruneError(
                f"label {target.max()} is no class of a model with {classes} of them",
                "labels count from 0; give steps without one a label below 0",
            )
    return prediction, target


class Comparison:
    """Accumulates how much one model's outputs differ from another's."""

    def __init__(self, outputs: Sequence[TensorSpec]) -> None:
        self._outputs = outputs
        self._sums = np.zeros((len(outputs), 4))  # |a-b|, a·b, a·a, b·b
        self._largest = np.zeros(len(outputs))
        self._counts = np.zeros((len(outputs), 3), np.int64)  # elements, positions, same argmax

    def add(
        self,
        reference: Sequence[Array],
        other: Sequence[Array],
        valid: BoolArray | None = None,
    ) -> None:
        """Adds the outputs of both models for one feed.

        Args:
            reference: Outputs of one model.
            other: Outputs of the other.
            valid: The steps that are no padding, ``[samples, steps]``; outputs by step count there.
        """
        for k, (one, two) in enumerate(zip(reference, other, strict=True)):
            if one.dtype.kind not in "fiub" or one.shape != two.shape:
                continue
            a, b = one.astype(np.float64), two.astype(np.float64)
            if valid is not None and a.shape[:2] == valid.shape:
                a, b = a[valid], b[valid]
            difference = np.abs(a - b)
            self._largest[k] = max(self._largest[k], difference.max(initial=0.0))
            self._sums[k] += [difference.sum(), (a * b).sum(), (a * a).sum(), (b * b).sum()]
            self._counts[k, 0] += a.size
            if a.ndim >= 2 and a.shape[-1] >= 2:
                same = a.argmax(axis=-1) == b.argmax(axis=-1)
                self._counts[k, 1:] += [same.size, same.sum()]

    def rows(self) -> tuple[OutputFidelity, ...]:
        """Returns the figures of each output."""
        rows = []
        for k, spec in enumerate(self._outputs):
            apart, product, one, two = (float(s) for s in self._sums[k])
            elements, positions, same = (int(c) for c in self._counts[k])
            if elements == 0:
                continue  # no number, or a state of another size: nothing was compared
            norm = np.sqrt(one * two)
            rows.append(
                OutputFidelity(
                    spec.name,
                    float(self._largest[k]),
                    apart / max(elements, 1),
                    float(product / norm) if norm > 0 else float(one == two),
                    same / positions if positions else None,
                )
            )
        return tuple(rows)
