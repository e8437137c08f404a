"""What training minimizes: losses of labels, and distances to the original's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.metrics import BATCH
from rnnprune_cli.model import Array, FineTune, Runner
from rnnprune_cli.trainer import losses
from rnnprune_cli.trainer.batches import Batch, Batches
from rnnprune_cli.trainer.call import Value, tf
from rnnprune_cli.trainer.targets import Target, labelled, unlabelled, variance_of

MIXED = 0.9
"""Share of distillation where there are labels. Labels weigh little, as Hinton et al. (2015) found
best: on the sample models they alone overfit soon, and half of them does worse than none."""


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of the loss.

    Attributes:
        target: What it looks at.
        weight: Its factor.
        classes: float32 ``[classes]``: what a label of each class counts; None for the same.
    """

    target: Target
    weight: float
    classes: Array | None = None

    @property
    def taught(self) -> bool:
        """Whether it compares with the original rather than with labels."""
        return self.target.key is None

    def count(self, data: Dataset, batch: Batch) -> int:
        """Returns how many items of a batch it is a mean of."""
        if not (self.target.by_step or batch.last):
            return 0
        counted = batch.valid if self.target.by_step else np.ones((len(batch.samples), 1), np.bool_)
        if self.target.by_step and batch.steps is not None:
            counted = counted[:, : batch.steps]
        if self.target.key is None or not self.target.classes:
            return int(counted.sum())
        labels = batch.labels(data.targets[self.target.key], self.target.by_step) >= 0
        if self.target.by_step:
            labels = labels[:, : counted.shape[1]]
            counted = counted.reshape(*counted.shape, *[1] * (labels.ndim - 2))
            labels = labels & counted
        return int(labels.sum())


class Objective:
    """The loss of a batch, as a TensorFlow expression.

    Args:
        terms: Its summands.
        temperature: Of distillation.
    """

    def __init__(self, terms: Sequence[Term], temperature: float) -> None:
        self.terms = tuple(terms)
        self.temperature = temperature
        self.taught = tuple(t.target.output for t in terms if t.taught)

    def check(self, data: Dataset, what: str) -> None:
        """Raises RnnpruneError if data lack labels that are looked at, or these do not fit.

        Args:
            data: The data set.
            what: It is for: training or validation.
        """
        for target in (term.target for term in self.terms if term.target.key is not None):
            name = f"target:{target.key}" if target.key else "labels"
            labels = data.targets.get(target.key or "")
            if labels is None:
                raise RnnpruneError(
                    f"the data for {what} hold no '{name}', but those for training do",
                    "add them, or leave out --validation: a part of --train then validates",
                )
            if (labels.dtype.kind in "iub") != target.classes:
                raise RnnpruneError(
                    f"'{name}' of the data for {what} has type {labels.dtype}, another kind than"
                    " that of the data for training",
                    "save both as integers for classes, or both as real numbers",
                )
            classes = max(target.shape[-1] or 0, 2)
            if target.classes and labels.size and int(labels.max()) >= classes:
                raise RnnpruneError(
                    f"label {labels.max()} is no class of a model with {classes} of them",
                    "labels count from 0; give steps without one a label below 0",
                )

    def counts(self, data: Dataset, batch: Batch) -> Array:
        """Returns the number of items of each term, float32."""
        return np.array([term.count(data, batch) for term in self.terms], np.float32)

    def labels(self, data: Dataset, batch: Batch) -> dict[str, Array]:
        """Returns what the terms with labels compare with, by output; int64 and float64."""
        return {
            t.output: batch.labels(data.targets[t.key], t.by_step).astype(
                np.int64 if t.classes else np.float64
            )
            for t in (term.target for term in self.terms)
            if t.key is not None
        }

    def given(self, batch: Batch, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the part of what the original gives for whole sequences that is of a batch."""
        if batch.start == 0 and batch.last:
            return dict(outputs)
        stop = batch.start + (batch.steps or 0)
        cut = {term.target.output for term in self.terms if term.target.by_step}
        return {n: a[:, batch.start : stop] if n in cut else a for n, a in outputs.items()}

    def totals(self, counts: Array, batch: Batch) -> Array:
        """Returns by what sums over a part of a batch are divided, float32 ``[terms]``.

        Args:
            counts: Items of each term in the whole batch.
            batch: The part; what says nothing of steps is looked at when a sequence ends.
        """
        waits = [not (term.target.by_step or batch.last) for term in self.terms]
        divisors: Array = np.where(waits, np.inf, np.maximum(counts, 1)).astype(np.float32)
        return divisors

    def __call__(
        self,
        outputs: Mapping[str, Value],
        labels: Mapping[str, Value],
        teacher: Mapping[str, Value],
        valid: Value,
    ) -> Value:
        """Returns the sum of each term over its items, float32 ``[terms]``.

        Args:
            outputs: Of the model.
            labels: Output → labels, for those that have some.
            teacher: Output → what the original gives, for those that are compared with it.
            valid: bool ``[samples, steps]``.
        """
        sums = []
        for term in self.terms:
            target = term.target
            prediction = target.laid_out(outputs[target.output])
            counts = None
            if target.by_step:  # a batch that was cut to its length has fewer than its labels
                steps = tf.shape(prediction)[1]
                counts = valid[:, :steps]
            samples = tf.shape(valid)[0]
            if term.taught:
                mean, number = losses.distilled(
                    prediction,
                    target.laid_out(teacher[target.output]),
                    target.classes,
                    target.probabilities,
                    self.temperature,
                    target.variance,
                    samples,
                    counts,
                )
            else:
                wanted = labels[target.output]
                wanted = wanted if counts is None else wanted[:, :steps]
                if target.classes:
                    mean, number = losses.cross_entropy(
                        prediction, wanted, target.probabilities, counts, term.classes
                    )
                else:
                    mean, number = losses.squared_error(prediction, wanted, samples, counts)
                    mean /= target.variance
            total = tf.cast(mean, tf.float32) * tf.cast(number, tf.float32)
            sums.append(term.weight * total)
        return tf.stack(sums)


def objective(
    data: Dataset, looked: Dataset, original: Runner, states: Sequence[str], options: FineTune
) -> Objective:
    """Decides what to minimize.

    With labels a tenth is their loss, cross-entropy of integers, squared error (in units of the
    output's variance) of others, unless ``distill`` says otherwise. The rest, or without labels all
    of it, is the distance to what the original makes of the same data.

    Args:
        data: What to train on.
        looked: Some of it, which the original is run on to see what its outputs are.
        original: The model before anything was removed.
        states: Outputs that hand back states, which are nobody's result.
        options: The user's.

    Raises:
        UsageError: If there is nothing to minimize, or a weight is for no output.
        RnnpruneError: If labels do not fit the outputs.
    """
    share = options.distill
    if share is None:
        share = MIXED if data.targets else 1.0
    targets: list[tuple[Target, float]] = []
    if share < 1 and data.targets:
        targets += [(target, 1 - share) for target in labelled(looked, original)]
    elif share < 1:
        raise UsageError(
            f"--distill {share:g} mixes with the loss of labels, and the data have none",
            "leave --distill out: without labels all of the loss is distillation",
        )
    if share > 0:
        targets += [(target, share) for target in unlabelled(looked, original, states)]
    weights = _output_weights(options.output_weights, [t.output for t, _ in targets])
    if looked.padded_steps is not None:
        targets = _without_padding(looked, original, targets)
    terms = [
        Term(target, part * weights.get(target.output, 1.0), _balanced(data, target, options))
        for target, part in targets
    ]
    terms = [term for term in terms if term.weight > 0]
    if not terms:
        raise UsageError(
            "there is nothing to train for: no output is a real number or has labels",
            "add labels to the data",
        )
    return Objective(terms, options.temperature)


def _without_padding(
    data: Dataset, original: Runner, targets: Sequence[tuple[Target, float]]
) -> list[tuple[Target, float]]:
    """Returns targets with the variance of outputs that no padding has reached, as in training."""
    batches = Batches(data, BATCH, original, {})
    names = [o.name for o in original.outputs]
    sums = {target.output: np.zeros(3) for target, _ in targets}
    places = {target.output: target for target, _ in targets}
    for samples in batches.epoch(None):
        for part in batches.parts(samples):
            outputs = dict(zip(names, original.run(part.feed), strict=True))
            for name, target in places.items():
                values = outputs[name].swapaxes(0, 1) if target.steps_first else outputs[name]
                if target.by_step:
                    values = values[part.valid[:, : values.shape[1]]]
                values = values.astype(np.float64)
                sums[name] += values.size, values.sum(), np.square(values).sum()
    return [
        (dataclasses.replace(target, variance=variance_of(*sums[target.output])), share)
        for target, share in targets
    ]


def _output_weights(texts: Sequence[str], outputs: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not np.isfinite(weight) or weight < 0:
            raise UsageError(
                f"--loss-weight '{text}' is no OUTPUT=WEIGHT", "such as --loss-weight forecast=0.5"
            )
        if name not in outputs:
            raise UsageError(f"the loss looks at no output '{name}'", closest(name, outputs))
        found[name] = weight
    return found


def _balanced(data: Dataset, target: Target, options: FineTune) -> Array | None:
    """Returns weights of classes that let each count the same in all; their mean label counts 1."""
    if not options.balance or target.key is None or not target.classes:
        return None
    labels = np.asarray(data.targets[target.key])
    classes = max(target.shape[-1] or 0, 2)
    counts = np.bincount(labels[labels >= 0].astype(np.int64).ravel(), minlength=classes)
    present = np.maximum(counts, 1)
    weights: Array = counts.sum() / (np.count_nonzero(counts) * present)
    return weights.astype(np.float32)
