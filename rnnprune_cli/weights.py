"""Single weights: score, select, refit; for one stage of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.hessians import LayerInputs
from rnnprune_cli.methods import Method
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Gradients,
    Pruned,
    RecurrentLayer,
    Repair,
    Stage,
    StoredWeight,
    Weight,
    WeightFigures,
)
from rnnprune_cli.refit import RowInputs, error, refit, surgeon
from rnnprune_cli.select import ACROSS_GATES, families, gate_scale, parse_pattern, select

MAX_FLOPS = 1e12
"""Of the inverses of one round, about half a minute; above it a round does without."""

Family = tuple[Weight, ...]


@dataclass(frozen=True, eq=False)
class PrunedWeights:
    """What becomes of the weights.

    Attributes:
        pruned: Weight name → what becomes of it.
        blocked: Layer name → why it was not pruned.
        repairs: How well the layers make up for what is gone.
    """

    pruned: dict[str, StoredWeight]
    blocked: dict[str, str]
    repairs: tuple[Repair, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightTask:
    """Which weights are to go, and what is known about them.

    Attributes:
        layers: All prunable layers of the model.
        chosen: Those that may lose weights.
        stage: What to do.
        seed: Of random scores; each weight has a stream of its own.
        progress: Called with a short text at the beginning of each step.
        earlier: What earlier stages made of weights.
        inputs: Layer name → what it reads on data; empty without data.
        gradients: Weight name → gradients on data; empty where nobody asks for them.
        shares: Layer name → sparsity, where it is not that of the stage.
    """

    layers: Sequence[RecurrentLayer]
    chosen: Sequence[RecurrentLayer]
    stage: Stage
    seed: int
    progress: Callable[[str], None]
    earlier: Pruned = field(default_factory=dict)
    inputs: Mapping[str, LayerInputs] = field(default_factory=dict)
    gradients: Mapping[str, Gradients] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def share(self, layer: RecurrentLayer) -> float:
        """Returns what a layer is to lose."""
        return self.shares.get(layer.name, self.stage.sparsity)


def distinct_weights(layers: Sequence[RecurrentLayer]) -> tuple[Weight, ...]:
    """Returns the weights of layers, each once, in order."""
    return tuple(dict.fromkeys(w for layer in layers for w in layer.weights))


def prune_weights(task: WeightTask) -> PrunedWeights:
    """Scores, selects and, with data, refits what stays.

    A weight that a layer outside the selection also uses is left alone.

    Raises:
        RnnpruneError: If no weight would be removed although some were to be.
        UsageError: If the method needs what is not there.
    """
    method = find_method(task.stage.method)
    blocked = {layer.name: "not selected" for layer in task.layers if layer not in set(task.chosen)}
    weights = _free_weights(task, method, blocked)
    every = [tuple(w for w in f if w in weights) for f in families(task.layers)]
    every = [family for family in every if family]
    joint = [_Joint(task, family) for family in every]
    for together in [joint] if task.stage.scope == "global" else [[one] for one in joint]:
        _prune(task, method, together, weights)
    repairs: list[Repair] = []
    pruned: dict[str, StoredWeight] = {}
    for one in joint:
        pruned.update(one.result(repairs))
    if not any(_removes(stored, task.earlier) for stored in pruned.values()):
        if blocked and len(blocked) == len(task.layers):
            name, why = next((n, w) for n, w in blocked.items() if w != "not selected")
            raise RnnpruneError(f"nothing can be pruned: '{name}': {why}", "see --method magnitude")
        if task.stage.sparsity > 0:
            raise _nothing_removed(task)
    return PrunedWeights(pruned, blocked, tuple(repairs))


def _free_weights(task: WeightTask, method: Method, blocked: dict[str, str]) -> dict[Weight, int]:
    """Returns the weights that may be pruned, with their numbers; says why others may not."""
    chosen = set(task.chosen)
    protected = {
        w: f"shares weights with '{layer.name}', not selected"
        for layer in task.layers
        if layer not in chosen
        for w in layer.weights
    }
    if method.needs_data:
        for layer in task.chosen:
            inputs = task.inputs.get(layer.name)
            if inputs is not None and inputs.problem is not None:
                why = f"method '{method.name}' cannot see what it reads: {inputs.problem}"
                protected.update(dict.fromkeys(layer.weights, why))
    free: dict[Weight, int] = {}
    for number, weight in enumerate(distinct_weights(task.layers)):
        users = [layer for layer in task.chosen if weight in layer.weights]
        if users and weight not in protected:
            free[weight] = number
        for layer in users:
            if weight in protected:
                blocked[layer.name] = protected[weight]
    return free


class _Joint:
    """A family of weights, laid side by side as far as data ask for it.

    Args:
        task: The task.
        family: Weights whose rows belong together.
    """

    def __init__(self, task: WeightTask, family: Family) -> None:
        self.family = family
        self._task = task
        self._layers = [layer for layer in task.chosen if any(w in family for w in layer.weights)]
        self.share = min(task.share(layer) for layer in self._layers)
        self.masks: dict[str, BoolArray] = {
            w.name: task.earlier[w.name].mask for w in family if w.name in task.earlier
        }
        self._ends = np.cumsum([w.shape[2] for w in family])
        self.inputs = self._row_inputs()

    def earlier(self, weight: Weight) -> Array:
        """Returns the values that a weight had before this stage."""
        before = self._task.earlier.get(weight.name)
        return weight.read() if before is None else before()

    def _row_inputs(self) -> list[RowInputs]:
        """Returns what the rows of the family read, added up over the layers that use it."""
        known = [self._task.inputs.get(layer.name) for layer in self._layers]
        if any(inputs is None or inputs.problem is not None for inputs in known):
            return []
        directions, rows, _ = self.family[0].shape
        gates, n = self.family[0].gates, int(self._ends[-1])
        parts = [[0, 1], [2]] if gates == 3 else [list(range(gates))]
        found = []
        for d in range(directions):
            for part in parts:
                sums, counts = np.zeros((2, n, n)), np.zeros(2)
                for layer, inputs in zip(self._layers, known, strict=True):
                    assert inputs is not None
                    own, read = self._columns(layer)
                    for held in (0, 1):
                        total, count = inputs.of_gate(part[0]).sums(bool(held))
                        sums[held][np.ix_(own, own)] += total[d][np.ix_(read, read)]
                        counts[held] += count
                each = rows // gates
                places = [np.arange(g * each, (g + 1) * each) + d * rows for g in part]
                found.append(
                    RowInputs(
                        np.concatenate(places),
                        sums[0] / max(counts[0], 1),
                        sums[1] / counts[1] if counts[0] > 1 and counts[1] else None,
                        sums.sum(axis=0) / max(counts.sum(), 1),
                        int(counts.sum()),
                    )
                )
        return found

    def _columns(self, layer: RecurrentLayer) -> tuple[Array, Array]:
        """Returns which columns of the family a layer reads with, and at which places of [x, h]."""
        own, read, start = [], [], 0
        for weight in layer.weights:
            if weight in self.family:
                place = self.family.index(weight)
                own.append(np.arange(self._ends[place] - weight.shape[2], self._ends[place]))
                read.append(np.arange(start, start + weight.shape[2]))
            start += weight.shape[2]
        return np.concatenate(own), np.concatenate(read)

    def matrix(self, arrays: Mapping[str, Array]) -> Array:
        """Lays arrays of the weights side by side, as ``[rows of all directions, columns]``."""
        parts = [arrays[w.name].reshape(-1, w.shape[2]) for w in self.family]
        return np.concatenate(parts, axis=1)

    def _mask(self) -> BoolArray:
        """Returns what stays so far, laid out as by :meth:`matrix`."""
        whole = {w.name: self.masks.get(w.name, np.ones(w.shape, np.bool_)) for w in self.family}
        return self.matrix(whole)

    def split(self, matrix: Array) -> dict[str, Array]:
        """Undoes :meth:`matrix`."""
        parts = np.split(matrix, self._ends[:-1], axis=1)
        return {w.name: p.reshape(w.shape) for w, p in zip(self.family, parts, strict=True)}

    def figures(self, method: Method, numbers: Mapping[Weight, int]) -> dict[str, WeightFigures]:
        """Returns what is known about each weight now."""
        values: Mapping[str, Array] = {w.name: self.earlier(w) for w in self.family}
        reads: Mapping[str, Array] = {}
        inverse: Mapping[str, Array] = {}
        if self.inputs and method.needs_data and not method.needs_gradients:
            own = self.matrix(values)
            squares, inverses = np.empty(own.shape), np.empty(own.shape)
            mask = self._mask()
            surgery = method.rounds > 1 and self._flops(mask) <= MAX_FLOPS
            new = np.empty(own.shape) if surgery else own
            for part in self.inputs:
                squares[part.rows] = np.diag(part.every)
                if surgery:
                    new[part.rows], inverses[part.rows] = surgeon(own, mask, part)
            values, reads = self.split(new), self.split(squares)
            inverse = self.split(inverses) if surgery else {}
        return {
            w.name: WeightFigures(
                w,
                values[w.name],
                np.random.default_rng([self._task.seed, numbers[w]]),
                reads.get(w.name),
                inverse.get(w.name),
                self._task.gradients.get(w.name),
            )
            for w in self.family
        }

    def _flops(self, mask: BoolArray) -> float:
        """Returns what the inverses of a round take; rows that are whole share one."""
        left = mask.sum(axis=1)
        return 2 * float((left[left < mask.shape[1]].astype(np.float64) ** 3).sum())

    def result(self, repairs: list[Repair]) -> dict[str, StoredWeight]:
        """Returns what becomes of the weights, and adds what is to be said of the repair."""
        before = {w.name: self.earlier(w) for w in self.family}
        new: dict[str, Array] = {}
        task = self._task
        if task.stage.compensate and task.inputs:
            names = ", ".join(layer.name for layer in self._layers)
            if self.inputs:
                task.progress(f"refitting {names}")
                own, mask = self.matrix(before), self._mask()
                fitted = refit(own, mask, self.inputs)
                if np.isfinite(fitted).all():
                    new = {w.name: self.split(fitted)[w.name].astype(w.dtype) for w in self.family}
                    held = all(part.held is not None for part in self.inputs)
                    left = error(own, fitted, self.inputs, held=True) if held else None
                    samples = min(part.samples for part in self.inputs)
                    repairs.append(Repair(names, samples, left))
                else:
                    repairs.append(Repair(names, 0, None, "what it reads is not finite"))
            else:
                problem = next(
                    task.inputs[layer.name].problem
                    for layer in self._layers
                    if task.inputs[layer.name].problem
                )
                repairs.append(Repair(names, 0, None, problem))
        return {
            w.name: StoredWeight(
                w,
                self.masks[w.name],
                new.get(w.name, before[w.name] if w.name in task.earlier else None),
            )
            for w in self.family
        }


def _prune(
    task: WeightTask, method: Method, together: Sequence[_Joint], numbers: Mapping[Weight, int]
) -> None:
    """Chooses what stays of families that compete, in as many rounds as the method wants."""
    assert method.weight is not None  # the options were checked
    pattern = parse_pattern(task.stage.granularity)
    family = tuple(w for one in together for w in one.family)
    share = together[0].share if pattern.sparsity is None else pattern.sparsity
    for turn in range(1, method.rounds + 1):
        last = turn == method.rounds
        task.progress(
            f"scoring {', '.join(w.name for w in family[:2])}"
            + (f", round {turn} of {method.rounds}" if method.rounds > 1 else "")
        )
        scores: dict[str, Array] = {}
        for one in together:
            for name, figures in one.figures(method, numbers).items():
                own = method.weight(figures)
                if task.stage.scope in ACROSS_GATES and not method.in_loss:
                    own *= gate_scale(figures.weight)
                if name in one.masks:
                    own[~one.masks[name]] = -1  # what is gone stays so
                scores[name] = own
        asked = pattern if last else dataclasses.replace(pattern, kept=None)
        masks = select(scores, family, task.stage.scope, share * turn / method.rounds, asked)
        for one in together:
            one.masks = {
                w.name: masks[w.name] & one.masks[w.name] if w.name in one.masks else masks[w.name]
                for w in one.family
            }


def _removes(stored: StoredWeight, earlier: Pruned) -> bool:
    """Tells whether anything goes that is not zero yet; looks no further than needed."""
    before = earlier.get(stored.weight.name)
    values = stored.weight.read() if before is None else before()
    mask = stored.mask
    return any(
        bool(np.any(values[:, start : start + 64][~mask[:, start : start + 64]]))
        for start in range(0, mask.shape[1], 64)
    )


def _nothing_removed(task: WeightTask) -> RnnpruneError:
    weights = distinct_weights(task.layers)
    share = 1 - sum(w.nonzero for w in weights) / sum(w.size for w in weights)
    return RnnpruneError(
        f"sparsity {task.stage.sparsity:g} removes not a single weight: {share:.2f} of them are"
        " zero already, or the layers are too small, or share their weights with others",
        "ask for a higher --sparsity, or select other --layers",
    )
