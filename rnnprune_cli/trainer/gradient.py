"""Gradients of a loss with respect to the weights W and R of recurrent layers.

1. W and R become variables, one for each :class:`rnnprune_cli.model.Weight`.
2. The loss is that of the labels. Without labels it is the negative log-likelihood of labels drawn
   from the model's own predictions: a loss against the outputs themselves would be at its minimum,
   where every gradient is zero, but the mean square of the drawn labels' gradients is the diagonal
   of the Fisher information, and with it the curvature of that loss: what a change of the weight
   does to the outputs, to second order (Martens 2014, arXiv:1412.1193, section 9; used to prune by
   Theis et al. 2018, arXiv:1801.05787, section 2.1).
3. The data run in small batches of samples of one length, without their padding.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import prepared
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import ROLES, locate
from rnnprune_cli.graph import Walker
from rnnprune_cli.model import Array, Gradients, Runner, Weight
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.tensorflow.runtime import first_line
from rnnprune_cli.trainer import losses
from rnnprune_cli.trainer.call import Value, signature_of, tf
from rnnprune_cli.trainer.graph import GraphModule, Site
from rnnprune_cli.trainer.targets import Target, labelled, unlabelled

MAX_SAMPLES = 16
"""Samples of a batch: what a loss differentiates is kept for all steps of all of them."""


def saliencies(
    model: OnnxModel,
    data: Dataset,
    layers: Sequence[str],
    states: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Gradients]:
    """Differentiates the loss on data with respect to the weights of recurrent layers.

    With labels the loss is the cross-entropy of integers, and the mean squared error of others;
    several targets add up. Without labels see the head of this module: :attr:`Gradients.square` is
    then what tells weights apart. All outputs that are real numbers count then: those that are
    probabilities (or, at each step of a model that reads tokens, logits) as predictions of classes.

    Args:
        model: The model.
        data: Samples, with or without targets.
        layers: Names of layers of the model.
        states: Input → output that hold the same state. States that are zero in all samples are
            handed from one sample to the next.
        seed: Of drawn labels.
        threads: Threads of onnxruntime, which looks at the outputs before.
        progress: Called with a short text from time to time.

    Returns:
        Name of each weight of these layers → its gradients, float64; layers that share a weight
        add up. Batches count by the steps (or samples) that have a label. ``mean`` is the gradient
        of the mean loss (about zero without labels, as drawn ones err to all sides), ``square``
        the mean of the squares of the gradients of batches.

    Raises:
        RnnpruneError: If the model has an operator that cannot be differentiated, the labels do
            not fit the outputs, or the gradient is not finite.
    """
    weights = {w.name: w for x in model.layers if x.name in layers for w in x.weights}
    graph = prepared(model)
    overrides, variables = _variables(model, graph, weights)
    module = GraphModule(graph, overrides)
    runner = model.open(threads)
    progress(f"running {data.count} samples to see what the model predicts")
    targets = labelled(data, runner) if data.targets else unlabelled(data, runner)
    step = _Step(module, variables, targets, data, runner)
    mean = {name: np.zeros(w.shape) for name, w in weights.items()}
    square = {name: np.zeros(w.shape) for name, w in weights.items()}
    total = 0.0
    running = _batches(data, runner, targets, states or {}, step, seed)
    for items, found in _told(running, data.count, progress):
        total += items
        for name, gradient in found.items():
            mean[name] += items * gradient
            square[name] += items * np.square(gradient)
    result = {name: Gradients(mean[name] / total, square[name] / total) for name in weights}
    for name, gradients in result.items():
        if not np.isfinite(gradients.square).all():
            raise RnnpruneError(
                f"the gradient of weight '{name}' is not finite",
                "check the data and the labels for values that are out of all proportion",
            )
    return result


def _variables(
    model: OnnxModel,
    graph: ir.Model,
    weights: Mapping[str, Weight],
) -> tuple[dict[Site, Any], dict[str, Any]]:
    """Makes a variable for each weight; returns what is to be read at which nodes, and them."""
    overrides: dict[Site, Any] = {}
    variables: dict[str, Any] = {}
    for located in locate(Walker(graph)):
        layer = model.by_name.get(located.name)
        for index, weight in zip(ROLES, () if layer is None else layer.weights, strict=False):
            if weight.name not in weights:
                continue
            if weight.name not in variables:
                real = np.float64 if weight.dtype == np.float64 else np.float32
                variables[weight.name] = tf.Variable(weight.read().astype(real), name="weight")
            overrides[located.name, index] = variables[weight.name]
    return overrides, variables


class _Step:
    """The gradient of the loss of one batch, as a TensorFlow function."""

    def __init__(
        self,
        module: GraphModule,
        variables: Mapping[str, Any],
        targets: Sequence[Target],
        data: Dataset,
        runner: Runner,
    ) -> None:
        self._module, self._variables, self._targets = module, variables, targets
        feed = signature_of(runner)
        values = {
            t.output: tf.TensorSpec([None] * data.targets[t.key].ndim, data.targets[t.key].dtype)
            for t in targets
            if t.key is not None
        }
        steps, seed = tf.TensorSpec([None, None], tf.bool), tf.TensorSpec([2], tf.int32)
        self._call = tf.function(self._graph, autograph=False)
        # One function for all sizes; one for each if some operator must know them.
        with contextlib.suppress(RnnpruneError):
            self._call = self._call.get_concrete_function(feed, values, steps, seed)

    def __call__(
        self, feed: Mapping[str, Array], values: Mapping[str, Array], valid: Array, seed: Array
    ) -> tuple[float, dict[str, Array], dict[str, Array]]:
        """Runs one batch.

        Args:
            feed: Input → array.
            values: Output → what it should be.
            valid: bool ``[samples, steps]``: which steps are no padding.
            seed: int32 ``[2]``: of drawn labels.

        Returns:
            Number of labelled items, gradient of their mean loss by weight, outputs.
        """
        given = (
            {k: tf.constant(v) for k, v in feed.items()},
            {k: tf.constant(v) for k, v in values.items()},
            tf.constant(valid),
            tf.constant(seed),
        )
        try:
            items, gradients, outputs = self._call(*given)
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"TensorFlow cannot run the model: {first_line(error)}",
                "check the data against the model's inputs",
            ) from error
        found = {name: np.asarray(g.numpy(), np.float64) for name, g in gradients.items()}
        return float(items), found, {name: o.numpy() for name, o in outputs.items()}

    def _graph(
        self,
        feed: Mapping[str, Any],
        values: Mapping[str, Any],
        valid: Value,
        seed: Value,
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        with tf.GradientTape() as tape:
            outputs = self._module(feed)
            loss, items = tf.zeros([], tf.float64), tf.zeros([], tf.int32)
            for k, target in enumerate(self._targets):
                mean, count = self._loss(target, outputs, values, valid, seed + k)
                loss += tf.cast(mean, tf.float64)
                items += count
        try:
            gradients = tape.gradient(loss, self._variables, None, tf.UnconnectedGradients.ZERO)
        except LookupError as error:
            raise RnnpruneError(
                f"the model cannot be differentiated: {first_line(error)}",
                "methods that need no gradients work",
            ) from error
        return items, gradients, outputs

    def _loss(
        self,
        target: Target,
        outputs: Mapping[str, Any],
        values: Mapping[str, Any],
        valid: Value,
        seed: Value,
    ) -> tuple[Any, Any]:
        prediction = target.laid_out(outputs[target.output])
        wanted = values.get(target.output)
        samples = tf.shape(valid)[0]
        counts = None
        if target.by_step:  # a batch that was cut to its length has fewer steps than its labels
            steps = tf.shape(prediction)[1]
            counts = valid[:, :steps]
            wanted = None if wanted is None else wanted[:, :steps]
        if wanted is None:
            classes, probabilities = target.classes, target.probabilities
            return losses.expected(prediction, classes, probabilities, seed, samples, counts)
        if target.classes:
            return losses.cross_entropy(prediction, wanted, target.probabilities, counts)
        return losses.squared_error(prediction, wanted, samples, counts)


def _batches(
    data: Dataset,
    runner: Runner,
    targets: Sequence[Target],
    states: Mapping[str, str],
    step: _Step,
    seed: int,
) -> Iterator[tuple[int, float, dict[str, Array]]]:
    """Runs the data; yields the samples of each batch, its number of items, and its gradient.

    Samples of one length run together, without their padding, so that it reaches nothing. A model
    that insists on the padded length gets it, and the padded steps are left out of the loss.
    """
    handed = {
        given: taken
        for given, taken in states.items()
        if data.count > 1 and given in data.inputs and not data.inputs[given].any()
    }
    most = 1 if data.single or handed else MAX_SAMPLES
    lengths = None if data.padded_steps is None else data.lengths
    cut = lengths is not None and _takes(runner, data, int(lengths.min()))
    last: dict[str, Array] = {}
    for number, (chosen, length) in enumerate(_groups(data, lengths, most, bool(handed))):
        feed = data.take(chosen, length if cut else None)
        feed.update({given: last[taken] for given, taken in handed.items() if last})
        values = {t.output: data.targets[t.key][chosen] for t in targets if t.key is not None}
        valid = np.ones((len(chosen), 1), np.bool_)
        if lengths is not None:
            valid = np.arange(_longest(data))[None] < lengths[chosen, None]
        seeds = np.array([seed, number * len(targets)], np.int32)
        items, gradients, last = step(feed, values, valid, seeds)
        yield len(chosen), items, gradients


def _groups(
    data: Dataset, lengths: Array | None, most: int, in_order: bool
) -> Iterator[tuple[Array, int | None]]:
    """Yields samples that run together, and their length."""
    if lengths is None or in_order:
        for start in range(0, data.count, most):
            chosen = np.arange(start, min(start + most, data.count))
            yield chosen, None if lengths is None else int(lengths[start])
        return
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for start in range(0, len(alike), most):
            yield alike[start : start + most], int(length)


def _longest(data: Dataset) -> int:
    """Returns the steps of padded samples."""
    return data.padded_steps or 1


def _takes(runner: Runner, data: Dataset, length: int) -> bool:
    """Tells whether a model takes sequences that are cut to their length."""
    assert data.lengths is not None
    try:
        runner.run(data.take(np.flatnonzero(data.lengths == length)[:1], length))
    except RnnpruneError:
        return False
    return True


def _told(
    batches: Iterator[tuple[int, float, dict[str, Array]]],
    count: int,
    progress: Callable[[str], None],
) -> Iterator[tuple[float, dict[str, Array]]]:
    """Tells how far the run through the data is, and how long it will take."""
    progress(f"running {count} samples for the gradient of the loss")
    begin, done, told = time.perf_counter(), 0, 0.0
    for samples, items, gradients in batches:
        yield items, gradients
        done += samples
        elapsed = time.perf_counter() - begin
        if elapsed > told + 1:
            told, left = elapsed, elapsed / done * (count - done)
            progress(f"sample {done} of {count}, about {left:.0f} s left")
