"""Quality of a model on data, labelled or not, and how much two models' outputs differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import (
    Array,
    BoolArray,
    MetricValue,
    OutputFidelity,
    Runner,
    TensorSpec,
)
from rnnprune_cli.verify import run_all

BATCH = 64
"""Samples that are evaluated at once."""
MAX_REMEMBERED_BYTES = 256 << 20
"""Outputs of the original above this are not kept: it is run again for them."""


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
    values = _columns(prediction, probabilities)
    hits = (values.argmax(axis=1) == target) & ~np.isnan(values).any(axis=1)
    return np.asarray(hits, np.float64)


def are_probabilities(prediction: Array) -> bool:
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

RELATIVE_ERROR, AGREEMENT = "relative-error", "agreement"
LABEL_FREE = (RELATIVE_ERROR, AGREEMENT)
"""Metrics that hold outputs against the original's; see :class:`Deviation`."""
SHARES = ("accuracy", AGREEMENT)
"""Metrics that are shares: what is lost of them is counted in their own unit; see :func:`drop`."""


def parse_metrics(texts: Sequence[str], outputs: Sequence[str] | None = None) -> dict[str, str]:
    """Reads what ``--metric`` was given.

    Args:
        texts: ``METRIC``, for every output, or ``OUTPUT=METRIC``; several between commas.
        outputs: Names of the model's outputs; None if they are not known yet.

    Returns:
        Output → metric; ``""`` stands for every other output.

    Raises:
        UsageError: If there is no such metric or output, or an output has two.
    """
    found: dict[str, str] = {}
    for text in (part for given in texts for part in given.split(",")):
        output, _, metric = text.rpartition("=")
        if metric not in ("auto", *LABEL_FREE, *METRICS):
            names = ["auto", *METRICS, *LABEL_FREE]
            raise UsageError(f"there is no metric '{metric}'", closest(metric, names))
        if output and outputs is not None and output not in outputs:
            raise UsageError(f"the model has no output '{output}'", closest(output, outputs))
        if found.setdefault(output, metric) != metric:
            whom = f"output '{output}'" if output else "every output"
            raise UsageError(
                f"two metrics are given for {whom}: {found[output]} and {metric}",
                "give each output one: --metric OUTPUT=METRIC",
            )
    return found


def check_metric(text: str) -> None:
    """Raises UsageError for an unknown metric; see :func:`parse_metrics`."""
    parse_metrics([text])


def drop(before: Sequence[MetricValue], after: Sequence[MetricValue]) -> float:
    """Returns the largest loss over the outputs: what ``metric-drop`` limits.

    The loss of one output is, by its metric,

    - of a share (``accuracy``, ``agreement``): ``before - after``, so 0.98 → 0.97 is 0.01;
    - of ``relative-error``: ``after``, since the original's is 0;
    - of any other: how much worse it became relative to what it was, ``(after - before) / before``
      where lower is better, so 2.0 → 2.1 bits is 0.05.

    It is negative if every output became better, and infinite if any figure is not a finite number,
    or became worse from 0.

    Args:
        before: Of the original.
        after: Of another model: the same outputs and metrics, in any order.

    Raises:
        ValueError: If they are not the same, or there are none.
    """
    found = {(value.output, value.name): value.value for value in after}
    if not before or {(value.output, value.name) for value in before} != found.keys():
        raise ValueError("the two models were not measured by the same metrics")
    return max(_loss(value, found[value.output, value.name]) for value in before)


def _loss(before: MetricValue, after: float) -> float:
    if not (np.isfinite(before.value) and np.isfinite(after)):
        return float("inf")
    if before.name == RELATIVE_ERROR:
        return after
    lost = before.value - after if before.higher_is_better else after - before.value
    if before.name in SHARES or lost == 0:
        return lost
    return lost / abs(before.value) if before.value else float("inf") * np.sign(lost)


class Evaluation:
    """Accumulates a metric of one output of a model over the batches of a labelled data set.

    Padded steps (beyond ``lengths``) and labels below 0 count nowhere.

    Args:
        data: The data set, with targets.
        outputs: The model's outputs.
        name: A key of :data:`METRICS`, or ``auto``: ``accuracy`` for integer labels
            (``bits-per-char`` where the model reads integers and predicts one at each step),
            ``mse`` for others.
        target: Which of the data set's targets; None for the first.

    Raises:
        RnnpruneError: If the target belongs to no output.
    """

    def __init__(
        self, data: Dataset, outputs: Sequence[TensorSpec], name: str, target: str | None = None
    ) -> None:
        self._data = data
        self._name = name
        key = next(iter(data.targets)) if target is None else target
        self._target = data.targets[key]
        self._output = _output_index(outputs, key)
        self.output = outputs[self._output].name
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
            self.probabilities &= are_probabilities(p)
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
            whose = f" for output '{self.output}'" if len(self._data.targets) > 1 else ""
            raise RnnpruneError(
                f"the data set has no labelled step{whose}", "check labels and lengths"
            )
        metric = METRICS[self._name]
        chosen = self.probabilities if probabilities is None else probabilities
        figure = metric.finish(float(self._totals[int(chosen)]) / self._items)
        return MetricValue(self._name, figure, metric.higher_is_better, self.output)


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


def without_padding(array: Array, valid: BoolArray | None) -> Array:
    """Drops padded steps of an output, or of its labels.

    Args:
        array: ``[samples, steps, …]`` or ``[steps, samples, …]``; one by no step stays as it is.
        valid: The steps that are no padding, ``[samples, steps]``; None if all are.
    """
    if valid is not None and array.shape[:2] == valid.shape:
        return np.asarray(array[valid])
    if valid is not None and array.shape[:2] == valid.T.shape:
        return np.asarray(array[valid.T])
    return array


def _fitted(target: Array, shape: tuple[int, ...]) -> Array:
    """Returns labels in a shape that is theirs but for axes of length 1."""
    alike = [n for n in shape if n > 1] == [n for n in target.shape if n > 1]
    return target.reshape(shape) if alike else target


def _items(
    metric: _Metric, prediction: Array, target: Array, valid: BoolArray | None
) -> tuple[Array, Array]:
    """Lines predictions up with targets and drops padded steps and ignored labels."""
    if metric.classes:
        labelled = target[target >= 0]
        if labelled.dtype.kind == "f" and (labelled != np.trunc(labelled)).any():
            raise RnnpruneError(
                f"label {labelled[labelled != np.trunc(labelled)][0]:g} is no class",
                "classes are numbered from 0; --metric mse or mae is for other figures",
            )
        if prediction.shape[-1:] != (1,):
            target = _fitted(target, prediction.shape[:-1])
        if prediction.ndim == target.ndim:
            prediction = prediction[..., None]
        target = _fitted(target, prediction.shape[:-1])
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
    if target.shape[:2] == prediction.shape[:2]:
        prediction, target = (without_padding(a, valid) for a in (prediction, target))
    if metric.classes:
        prediction = prediction.reshape(-1, prediction.shape[-1])
        target = target.reshape(-1)
        counted = target >= 0
        prediction, target = prediction[counted], target[counted].astype(np.int64)
        classes = max(prediction.shape[-1], 2)
        if target.max(initial=0) >= classes:
            raise RnnpruneError(
                f"label {target.max()} is no class of a model with {classes} of them",
                "labels count from 0; give steps without one a label below 0",
            )
    return prediction, target


class Deviation:
    """Accumulates how far one output of a model is from the original's; needs no labels.

    ``relative-error`` is the root mean square of the difference over the root mean square of the
    original's values around their mean: 0 for the original, about 1 for an output that is always
    the mean. ``agreement`` is the share of positions with the same largest entry along the last
    axis; of outputs with a single entry there, the share on the same side (of 0, or of a half where
    the original's are all between 0 and 1), and of integers, the share of equal ones.

    Args:
        output: Its name.
        name: One of :data:`LABEL_FREE`.
    """

    def __init__(self, output: str, name: str) -> None:
        self.output = output
        self._name = name
        self._items = 0  # values or positions
        self._same = np.zeros(2)  # positions, if one entry is a logit, and if it is a probability
        self._probabilities = True
        self._squares = 0.0
        # Of the original, as far as it is finite: count, mean, squares around it.
        self._count, self._mean, self._spread = 0, 0.0, 0.0

    def add(self, original: Array, other: Array, valid: BoolArray | None = None) -> None:
        """Adds what both models make of one feed.

        Args:
            original: The output of the original.
            other: That of the other model.
            valid: The steps that are no padding, ``[samples, steps]``; outputs by step count there.

        Raises:
            RnnpruneError: If the two cannot be compared.
        """
        if original.shape != other.shape or original.dtype.kind not in "fiub":
            shapes = " and ".join(str(list(a.shape)) for a in (original, other))
            raise RnnpruneError(
                f"output '{self.output}' cannot be compared with the original's: shapes {shapes}"
                if original.shape != other.shape
                else f"output '{self.output}' holds no numbers",
                "measure another output, with --metric OUTPUT=METRIC",
            )
        original, other = (without_padding(a, valid) for a in (original, other))
        if self._name == AGREEMENT:
            self._add_agreement(original, other)
        else:
            self._add_error(original.astype(np.float64), other.astype(np.float64))

    def _add_agreement(self, original: Array, other: Array) -> None:
        if original.dtype.kind != "f":
            same = original == other
            self._items += same.size
            self._same += same.sum()
            return
        columns = original.shape[-1] if original.ndim > 1 else 1
        one, two = (a.reshape(-1, columns) for a in (original, other))
        known = ~np.isnan(two).any(axis=1)
        if columns > 1:
            self._same += np.count_nonzero((one.argmax(axis=1) == two.argmax(axis=1)) & known)
        else:  # which of the two a single entry is shows only when all are seen
            self._probabilities &= are_probabilities(one)
            for kind, half in enumerate((0, 0.5)):
                self._same[kind] += np.count_nonzero(((one > half) == (two > half))[:, 0] & known)
        self._items += len(one)

    def _add_error(self, original: Array, other: Array) -> None:
        apart = np.zeros(original.shape)
        np.subtract(original, other, out=apart, where=original != other)  # infinities may be equal
        self._squares += float((apart**2).sum())
        self._items += original.size
        finite = original[np.isfinite(original)]
        if finite.size:
            mean, count = float(finite.mean()), self._count + finite.size
            self._spread += float(((finite - mean) ** 2).sum())
            self._spread += (mean - self._mean) ** 2 * self._count * finite.size / count
            self._mean += (mean - self._mean) * finite.size / count
            self._count = count

    def value(self) -> MetricValue:
        """Returns the figure over everything that was added.

        Raises:
            RnnpruneError: If there was nothing.
        """
        if self._items == 0:
            raise RnnpruneError(
                f"output '{self.output}' is empty on these data", "check the data and its lengths"
            )
        if self._name == AGREEMENT:
            share = float(self._same[int(self._probabilities)]) / self._items
            return MetricValue(AGREEMENT, share, True, self.output)
        spread = self._spread / max(self._count, 1)
        error = self._squares / self._items
        if spread == 0:  # a constant: any difference is beyond measure
            error, spread = float("inf") if error else 0.0, 1.0
        return MetricValue(RELATIVE_ERROR, float(np.sqrt(error / spread)), False, self.output)


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
            a, b = (without_padding(x, valid).astype(np.float64) for x in (one, two))
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


class Quality:
    """Measures models on a data set, as the original is measured.

    Each output with a target has its own metric, and so has each that ``metric`` names. If there
    are none, each output of floating-point numbers is held against the original's, by
    ``relative-error`` unless ``metric`` says otherwise (integers by ``agreement``, where there is
    nothing else). Every model starts each batch from its initial state, and whether its outputs
    are probabilities or logits is taken from the original's.

    Args:
        original: The model before anything was done to it; it is run over the data once.
        data: The data set.
        metric: What ``--metric`` was given, or what :func:`parse_metrics` made of it.
        without: Outputs that are left out unless they are named or have targets, such as states:
            what goes of a state is a loss to nobody by itself, and its size may change.

    Attributes:
        dense: The figures of the original: outputs with a target first, then in the model's order.

    Raises:
        UsageError: If ``metric`` names an output that does not exist.
        RnnpruneError: If data, metric and model do not fit.
    """

    dense: tuple[MetricValue, ...]

    def __init__(
        self,
        original: Runner,
        data: Dataset,
        metric: str | Mapping[str, str] = "auto",
        without: Collection[str] = (),
    ) -> None:
        self._original, self._data = original, data
        self._names = [spec.name for spec in original.outputs]
        texts = [metric] if isinstance(metric, str) else [f"{k}={v}" for k, v in metric.items()]
        asked = parse_metrics(texts, self._names)
        self._measured = _measured(original.outputs, data, asked, without)
        self._remembered: dict[int, list[Array]] = {}
        measures = self._measures()
        size = 0
        for start, stop in data.batches(BATCH):
            results = run_all(original, [data.feed(start, stop)], self._names)[0]
            self._add(measures, results, results, start, stop)
            size += sum(result.nbytes for result in results)
            if size <= MAX_REMEMBERED_BYTES:
                self._remembered[start] = results
        self.dense = tuple(measure.value() for measure in measures)
        self._probabilities = [isinstance(m, Evaluation) and m.probabilities for m in measures]

    def of(self, runner: Runner) -> tuple[MetricValue, ...]:
        """Measures another model; the figures are in the order of :attr:`dense`.

        Raises:
            RnnpruneError: If its outputs cannot be compared with the original's.
        """
        return self._run(runner, None)

    def compared(self, runner: Runner) -> tuple[tuple[MetricValue, ...], Comparison]:
        """Measures another model, and how much each of its outputs differs from the original's."""
        comparison = Comparison(self._original.outputs)
        return self._run(runner, comparison), comparison

    def _run(self, runner: Runner, comparison: Comparison | None) -> tuple[MetricValue, ...]:
        measures, data = self._measures(), self._data
        held = comparison is not None or any(isinstance(m, Deviation) for m in measures)
        for start, stop in data.batches(BATCH):
            feed = data.feed(start, stop)
            results = run_all(runner, [feed], self._names)[0]
            original = results
            if held:
                known = self._remembered.get(start)
                original = known or run_all(self._original, [feed], self._names)[0]
            if comparison is not None:
                comparison.add(original, results, data.valid(start, stop))
            self._add(measures, original, results, start, stop)
        return tuple(
            measure.value(probabilities) if isinstance(measure, Evaluation) else measure.value()
            for measure, probabilities in zip(measures, self._probabilities, strict=True)
        )

    def _measures(self) -> list[Evaluation | Deviation]:
        """Returns something new to add up each figure."""
        outputs = self._original.outputs
        return [
            Deviation(outputs[place].name, name)
            if name in LABEL_FREE
            else Evaluation(self._data, outputs, name, target)
            for place, target, name in self._measured
        ]

    def _add(
        self,
        measures: Sequence[Evaluation | Deviation],
        original: Sequence[Array],
        results: Sequence[Array],
        start: int,
        stop: int,
    ) -> None:
        valid = self._data.valid(start, stop)
        for measure, (place, _, _) in zip(measures, self._measured, strict=True):
            if isinstance(measure, Deviation):
                measure.add(original[place], results[place], valid)
            else:
                measure.add(results, start, stop)


def _measured(
    outputs: Sequence[TensorSpec],
    data: Dataset,
    asked: Mapping[str, str],
    without: Collection[str],
) -> list[tuple[int, str | None, str]]:
    """Returns place, key of the target (None if there is none) and metric of what is measured."""
    targets: dict[int, str] = {}
    for key in data.targets:
        place = _output_index(outputs, key)
        if place in targets:
            raise RnnpruneError(
                f"the data set holds two targets for output '{outputs[place].name}': 'labels', and"
                f" 'target:{outputs[place].name}'",
                "leave one of them",
            )
        targets[place] = key
    general = asked.get("", "auto")
    places = sorted(targets)
    places += [k for k, o in enumerate(outputs) if k not in targets and o.name in asked]
    for kinds in ("f", "iub"):
        places = places or [
            k for k, o in enumerate(outputs) if o.dtype.kind in kinds and o.name not in without
        ]
    if not places:
        raise RnnpruneError(
            "the model has no output to measure", "name one, with --metric OUTPUT=METRIC"
        )
    found = []
    for place in places:
        name = asked.get(outputs[place].name, general)
        target = targets.get(place)
        if target is None and name == "auto":
            name = RELATIVE_ERROR if outputs[place].dtype.kind == "f" else AGREEMENT
        if target is None and name not in LABEL_FREE:
            raise RnnpruneError(
                f"metric '{name}' needs labels for output '{outputs[place].name}'",
                f"add an array 'target:{outputs[place].name}' to the data, or take --metric"
                f" {RELATIVE_ERROR} or {AGREEMENT}",
            )
        found.append((place, target, name))
    return found
