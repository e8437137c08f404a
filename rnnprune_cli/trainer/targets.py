"""What a loss looks at: outputs of a model, and what labels or another model say of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset
from rnnprune_cli.metrics import BATCH, Evaluation, are_probabilities
from rnnprune_cli.model import Array, Runner


@dataclass(frozen=True)
class Target:
    """One output that a loss looks at.

    Attributes:
        output: Its name.
        key: Of the data set's target; None if it has none.
        classes: Whether it predicts classes.
        probabilities: Whether as probabilities, rather than logits.
        by_step: Whether its second axis, and that of its labels, is the steps.
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
        by_step = look.by_step and values.ndim > 1
        shape = _axes(look.shape, classes and len(look.shape) > values.ndim)
        name, likely = key or names[0], evaluation.probabilities
        targets.append(Target(name, key, classes, likely, by_step, shape, look.variance))
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
    classed = {key or names[0] for key, a in data.targets.items() if a.dtype.kind in "iub"}
    chosen = [name for name in names if name not in without]
    targets = []
    for name, look in _look(data, runner, chosen, []).items():
        if look.real:
            classes = look.likely or (tokens and len(look.shape) == 3) or name in classed
            shape = _axes(look.shape, classes)
            targets.append(
                Target(name, None, classes, look.likely, look.by_step, shape, look.variance)
            )
    return targets


@dataclass
class _Look:
    """What an output was like so far."""

    by_step: bool
    likely: bool = True
    real: bool = False
    shape: tuple[int, ...] = ()
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Of its values; 1 where they do not vary."""
        if not self.count:
            return 1.0
        found = self.squares / self.count - (self.total / self.count) ** 2
        return found if np.isfinite(found) and found > 1e-12 else 1.0


def _look(
    data: Dataset, runner: Runner, chosen: list[str], evaluations: list[Evaluation]
) -> dict[str, _Look]:
    names = [o.name for o in runner.outputs]
    looked = {name: _Look(data.lengths is not None) for name in chosen}
    for start, stop in data.batches(BATCH):
        results = runner.run(data.feed(start, stop))
        for evaluation in evaluations:
            evaluation.add(results, start, stop)
        valid = data.valid(start, stop)
        for name, look in looked.items():
            output = results[names.index(name)]
            look.by_step &= valid is not None and output.shape[:2] == valid.shape
            look.real, look.shape = output.dtype.kind == "f", output.shape
            if not look.real or output.ndim < 2:
                look.likely = False
                continue
            kept: Array = output[valid] if look.by_step and valid is not None else output
            look.likely &= are_probabilities(kept.reshape(-1, output.shape[-1]))
            look.count += kept.size
            look.total += float(kept.sum(dtype=np.float64))
            look.squares += float(np.square(kept, dtype=np.float64).sum())
    return looked


def _axes(shape: tuple[int, ...], classes: bool) -> tuple[int | None, ...]:
    """Returns as many axes, the last one with its size if it holds classes."""
    return tuple(n if classes and k == len(shape) - 1 else None for k, n in enumerate(shape))
