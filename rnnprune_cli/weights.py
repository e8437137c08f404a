"""Single weights: score, select, refit; for one stage of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rnnprune_cli.errors import NothingRemovedError, RnnpruneError
from rnnprune_cli.hessians import UNREACHED, LayerInputs
from rnnprune_cli.methods import Method
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Gradients,
    Layer,
    Pruned,
    Repair,
    Stage,
    StoredWeight,
    Weight,
    WeightFigures,
)
from rnnprune_cli.refit import RowInputs, refit, surgeon, work
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
    """

    layers: Sequence[Layer]
    chosen: Sequence[Layer]
    stage: Stage
    seed: int
    progress: Callable[[str], None]
    earlier: Pruned = field(default_factory=dict)
    inputs: Mapping[str, LayerInputs] = field(default_factory=dict)
    gradients: Mapping[str, Gradients] = field(default_factory=dict)

    def share(self, layer: Layer) -> float:
        """Returns what a layer is to lose."""
        return self.stage.shares.get(layer.name, self.stage.sparsity)


def distinct_weights(layers: Sequence[Layer]) -> tuple[Weight, ...]:
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
    # Layers with shares of their own do not compete.
    compete = task.stage.scope == "global" and not task.stage.shares
    repairs: list[Repair] = []
    pruned: dict[str, StoredWeight] = {}
    for competing in [every] if compete else [[family] for family in every]:
        together = [_Joint(task, family) for family in competing]
        _prune(task, method, together, weights)
        for one in together:
            pruned.update(one.result(repairs))
    if not any(_removes(stored, task.earlier) for stored in pruned.values()):
        if blocked and len(blocked) == len(task.layers):
            name, why = next((n, w) for n, w in blocked.items() if w != "not selected")
            raise RnnpruneError(f"nothing can be pruned: '{name}': {why}", "see --method magnitude")
        if task.stage.sparsity > 0 or any(task.stage.shares.values()):
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
            if inputs is None or inputs.problem is None:
                continue
            why = f"method '{method.name}' cannot see what it reads: {inputs.problem}"
            unknown = set(layer.weights)
            if inputs.problem == UNREACHED:
                unknown -= {w for other in _watched(task) for w in other.weights}
            protected.update(dict.fromkeys(unknown, why))
    free: dict[Weight, int] = {}
    for number, weight in enumerate(distinct_weights(task.layers)):
        users = [layer for layer in task.chosen if weight in layer.weights]
        if users and weight not in protected:
            free[weight] = number
        for layer in users:
            if weight in protected:
                blocked[layer.name] = protected[weight]
    return free


def _watched(task: WeightTask) -> list[Layer]:
    """Returns the layers of which it is known what they read."""
    return [
        layer
        for layer in task.chosen
        if layer.name in task.inputs and task.inputs[layer.name].problem is None
    ]


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
        watched = [layer for layer in self._layers if layer in _watched(self._task)]
        for layer in self._layers:
            inputs = self._task.inputs.get(layer.name)
            if layer not in watched and (inputs is None or inputs.problem != UNREACHED):
                return []
        if not watched:
            return []
        directions, rows, _ = self.family[0].shape
        gates, n = self.family[0].gates, int(self._ends[-1])
        parts = [[0, 1], [2]] if gates == 3 else [list(range(gates))]
        found = []
        for d in range(directions):
            for part in parts:
                sums, counts = np.zeros((2, n, n)), np.zeros(2)
                for layer in watched:
                    inputs = self._task.inputs[layer.name]
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

    def _columns(self, layer: Layer) -> tuple[Array, Array]:
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
            mask &= own != 0  # what is zero in the file stays so
            surgery = method.rounds > 1 and work(mask) <= MAX_FLOPS
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

    def result(self, repairs: list[Repair]) -> dict[str, StoredWeight]:
        """Returns what becomes of the weights, and adds what is to be said of the repair."""
        before = {w.name: self.earlier(w) for w in self.family}
        new: dict[str, Array] = {}
        task = self._task
        if task.stage.compensate and task.inputs:
            names = ", ".join(layer.name for layer in self._layers)
            if self.inputs:
                own = self.matrix(before)
                # What is zero in the file stays so: no layer is to become denser than it was.
                told = _Told(f"refitting {names}", task.progress)
                fitted, left = refit(own, self._mask() & (own != 0), self.inputs, told)
                with np.errstate(over="ignore"):
                    parts = self.split(fitted)
                    new = {w.name: parts[w.name].astype(w.dtype) for w in self.family}
                if all(np.isfinite(values).all() for values in new.values()):
                    samples = min(part.samples for part in self.inputs)
                    repairs.append(Repair(names, samples, left))
                else:
                    new = {}
                    why = "what it reads, or its repair, is not finite"
                    repairs.append(Repair(names, 0, None, why))
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
                    # What is gone stays so; a block counts by what is left of it.
                    mask, gates = one.masks[name], figures.weight.gates
                    own[~mask] = 0
                    left = pattern.pool(mask.astype(np.float32), gates)
                    own[~pattern.spread(left > 0, mask.shape, gates)] = -1
                scores[name] = own
        part = turn / method.rounds
        masks = select(scores, family, task.stage.scope, share * part, pattern.part(part))
        for one in together:
            one.masks = {
                w.name: masks[w.name] & one.masks[w.name] if w.name in one.masks else masks[w.name]
                for w in one.family
            }


class _Told:
    """Tells how far something is, every second.

    Args:
        what: What it is.
        progress: Where to tell it.
    """

    def __init__(self, what: str, progress: Callable[[str], None]) -> None:
        self._what = what
        self._progress = progress
        self._begin = self._last = time.perf_counter()
        progress(what)

    def __call__(self, done: float) -> None:
        """Takes the share that is done."""
        now = time.perf_counter()
        if now > self._last + 1:
            self._last, left = now, (now - self._begin) * (1 - done) / done
            self._progress(f"{self._what}, about {left:.0f} s left")


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
    left = sum(
        np.count_nonzero(task.earlier[w.name]()) if w.name in task.earlier else w.nonzero
        for w in weights
    )
    share = 1 - left / sum(w.size for w in weights)
    return NothingRemovedError(
        f"sparsity {task.stage.sparsity:g} removes not a single weight: {share:.2f} of them are"
        " zero already, or the layers are too small, or share their weights with others",
        "ask for a higher --sparsity, or select other --layers",
    )
