"""What a loss looks at: outputs of a model, and what labels or another model say of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.metrics import BATCH, Evaluation, are_probabilities
from rnnprune_cli.model import Array, Runner
from rnnprune_cli.trainer.call import Value, tf


@dataclass(frozen=True)
class Target:
    """One output that a loss looks at.

    Attributes:
        output: Its name.
        key: Of the data set's target; None if it has none.
        classes: Whether it predicts classes.
        probabilities: Whether as probabilities, rather than logits.
        single: Whether there is no axis of classes: an entry speaks for the second of two.
        by_step: Whether its second axis, and that of its labels, is the steps.
        steps_first: Whether the steps are its first axis instead, before one of a single sample.
        shape: Its axes; of classes, with their number, which a graph does not always tell.
        variance: Of the model's own values, over the data that were looked at.
    """

    output: str
    key: str | None
    classes: bool
    probabilities: bool
    by_step: bool
    shape: tuple[int | None, ...]
    variance: float = 1.0
    single: bool = False
    steps_first: bool = False

    def laid_out(self, output: Value) -> Value:
        """Returns the output as losses take it: samples first, and an axis of classes last."""
        value = tf.ensure_shape(output, self.shape)
        if self.steps_first:
            value = tf.transpose(value, [1, 0, *range(2, len(self.shape))])
        return tf.expand_dims(value, -1) if self.single else value


def labelled(data: Dataset, runner: Runner) -> list[Target]:
    """Runs a model to see what its outputs with a label are, and whether the labels fit them.

    Raises:
        RnnpruneError: If they do not, or the data hold none.
    """
    names = [o.name for o in runner.outputs]
    evaluations = [Evaluation(data, runner.outputs, "auto", target=name) for name in data.targets]
    looked = _look(data, runner, [name or names[0] for name in data.targets], evaluations)
    targets = []
    for (key, values), evaluation in zip(data.targets.items(), evaluations, strict=True):
        evaluation.value()  # refuses data without a label
        look = looked[key or names[0]]
        classes = values.dtype.kind in "iub"
        by_step = values.ndim > 1 and (look.by_step or look.steps_first)
        single = classes and look.is_single(values)
        shape = _axes(look.shape, classes and not single)
        name, likely = key or names[0], evaluation.probabilities
        first = by_step and look.steps_first
        targets.append(
            Target(name, key, classes, likely, by_step, shape, look.variance, single, first)
        )
    return targets


def unlabelled(data: Dataset, runner: Runner, without: Collection[str] = ()) -> list[Target]:
    """Runs a model to see what its outputs are.

    All that are real numbers count: those that are probabilities (or, at each step of a model that
    reads tokens, logits; or what integer labels are for) as predictions of classes.

    Args:
        data: Samples.
        runner: The model.
        without: Outputs that are left out.
    """
    names = [o.name for o in runner.outputs]
    tokens = any(a.dtype.kind in "iu" and a.ndim == 2 for a in data.inputs.values())
    classed = {key or names[0]: a for key, a in data.targets.items() if a.dtype.kind in "iub"}
    chosen = [name for name in names if name not in without]
    targets = []
    for name, look in _look(data, runner, chosen, []).items():
        if look.real:
            classes = look.likely or (tokens and len(look.shape) == 3) or name in classed
            single = name in classed and look.is_single(classed[name])
            likely = look.within if single else look.likely
            shape = _axes(look.shape, classes and not single)
            first = look.steps_first
            by_step = look.by_step or first
            targets.append(
                Target(name, None, classes, likely, by_step, shape, look.variance, single, first)
            )
    return targets


@dataclass
class _Look:
    """What an output was like so far."""

    by_step: bool
    steps_first: bool
    likely: bool = True
    within: bool = True
    """Whether all values are between 0 and 1."""
    real: bool = False
    shape: tuple[int, ...] = ()
    samples: int = 0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Of its values; 1 where they do not vary."""
        return variance_of(self.count, self.total, self.squares)

    def is_single(self, labels: Array) -> bool:
        """Tells whether labels, which are as metrics take them, leave no axis of classes."""
        own = (self.samples, *labels.shape[1:])
        if self.shape[-1:] != (1,) and _long(own) == _long(self.shape[:-1]):
            return False
        return len(own) == len(self.shape)


def variance_of(count: float, total: float, squares: float) -> float:
    """Returns the variance of values, of which the sums are given; 1 where they do not vary."""
    found = squares / count - (total / count) ** 2 if count else 0.0
    return float(found) if np.isfinite(found) and found > 1e-12 else 1.0


def _long(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n > 1]


def _look(
    data: Dataset, runner: Runner, chosen: list[str], evaluations: list[Evaluation]
) -> dict[str, _Look]:
    names = [o.name for o in runner.outputs]
    padded = data.lengths is not None
    looked = {name: _Look(padded, padded and bool(data.stacked)) for name in chosen}
    for start, stop in data.batches(BATCH):
        results = runner.run(data.feed(start, stop))
        for evaluation in evaluations:
            evaluation.add(results, start, stop)
        valid = data.valid(start, stop)
        for name, look in looked.items():
            output = results[names.index(name)]
            look.by_step &= valid is not None and output.shape[:2] == valid.shape
            look.steps_first &= not look.by_step and valid is not None
            look.steps_first &= valid is not None and output.shape[:2] == valid.T.shape
            look.real, look.shape = output.dtype.kind == "f", output.shape
            look.samples = stop - start
            if not look.real:
                look.likely = False
                continue
            kept: Array = output
            if valid is not None and (look.by_step or look.steps_first):
                kept = output[valid if look.by_step else valid.T]
            columns = kept.shape[-1] if kept.ndim > 1 else 0
            look.likely &= columns > 0 and are_probabilities(kept.reshape(-1, columns))
            look.within &= are_probabilities(kept.reshape(-1, 1))
            look.count += kept.size
            look.total += float(kept.sum(dtype=np.float64))
            look.squares += float(np.square(kept, dtype=np.float64).sum())
    return looked


def _axes(shape: tuple[int, ...], classes: bool) -> tuple[int | None, ...]:
    """Returns as many axes, the last one with its size if it holds classes."""
    return tuple(n if classes and k == len(shape) - 1 else None for k, n in enumerate(shape))
