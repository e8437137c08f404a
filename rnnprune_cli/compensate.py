"""Least-squares repair: what reads a removed unit learns to do with the units that stay.

The input of a reader is ``v``; its removed part is predicted from the kept part,
``v_removed ≈ M · v_kept + c``, by least squares over real data, and folded into the reader: the
columns of its weights for kept units gain those for removed ones times M, its bias gains them times
c. The same idea for feed-forward networks: Mariet & Sra 2016, Diversity Networks, arXiv:1511.05077,
section 3.2; for channels of convolutions: He et al. 2017, arXiv:1707.06168.

Every reader is repaired on its own input, whatever lies between it and the units: R on the hidden
states before each step, the next layer's W on what it reads. Where the reset gate of a GRU comes
before the product (``linear_before_reset = 0``), R's rows for the new state read gated states and
are repaired on these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import Batch
from rnnprune_cli.coupling import Coupling, Cut, Labels
from rnnprune_cli.coupling.products import einsum_terms
from rnnprune_cli.graph import input_of
from rnnprune_cli.model import GATES, Array, BoolArray, Read, Repair
from rnnprune_cli.rewrite.units import Fold
from rnnprune_cli.states import fed, gates_first, reset_gate, steps_of

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Added to the diagonal, times the mean variance of the kept units: the one with the smallest error
on held-out samples is taken, the first where there are too few to hold some out."""
HELD_OUT = 5
"""One sample of so many is held out."""
_BLOCKS = 5 * HELD_OUT
MAX_FEATURES = 4096
"""Of one reader: the normal equations take the square of it."""


class Moments:
    """Sums over samples of ``v`` and ``v vᵀ``, for several rows of units.

    Some samples are added up apart, to tell how well a prediction does on data that it was not
    made from.

    Args:
        rows: Rows of units that are told apart.
        n: Units in each.
    """

    def __init__(self, rows: int, n: int) -> None:
        self._calls = 0
        self._counts = np.zeros(2)
        self._first = np.zeros((2, rows, n))
        self._second = np.zeros((2, rows, n, n))

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._counts.sum())

    @property
    def tested(self) -> bool:
        """Tells whether samples were held out."""
        return bool(self._counts[1])

    def add(self, samples: Array) -> None:
        """Adds samples ``[rows, samples, n]``, in their order in time."""
        self._calls += 1
        size = samples.shape[1]
        if size < HELD_OUT:
            held = np.full(size, self._calls % HELD_OUT == 0)
        else:  # from the beginning of sequences to their end, but not next to each other
            held = np.arange(size) * min(size, _BLOCKS) // size % HELD_OUT == HELD_OUT - 1
        values = samples.astype(np.float64)
        for k, part in enumerate((values[:, ~held], values[:, held])):
            self._counts[k] += part.shape[1]
            self._first[k] += part.sum(axis=1)
            self._second[k] += part.transpose(0, 2, 1) @ part

    def sums(self, held: bool) -> tuple[Array, float]:
        """Returns the sums of ``v vᵀ``, ``[rows, n, n]``, and how many they are of.

        Args:
            held: Over the samples that are held out, rather than over the others.
        """
        return self._second[int(held)], float(self._counts[int(held)])

    def of_row(self, row: int) -> Moments:
        """Returns the moments of one row of units."""
        one = Moments(1, self._first.shape[2])
        one._counts = self._counts
        one._first, one._second = self._first[:, row : row + 1], self._second[:, row : row + 1]
        return one

    def covariance(self) -> Array:
        """Returns the covariance over all samples, ``[rows, n, n]``."""
        count = max(self.count, 1)
        mean = self._first.sum(axis=0) / count
        found: Array = self._second.sum(axis=0) / count - mean[:, :, None] * mean[:, None, :]
        return found

    def predict(self, row: int, keep: BoolArray) -> tuple[Array, Array, float]:
        """Predicts the removed part from the kept part, by least squares over all samples.

        Args:
            row: Which row of units.
            keep: bool ``[n]``.

        Returns:
            M ``[removed, kept]``, c ``[removed]``, and the share of the removed part's variance
            that stays unexplained on held-out samples (on all, if none were held out).
        """
        kept, gone = np.flatnonzero(keep), np.flatnonzero(~keep)
        train, held, every = (self._about_mean(row, which) for which in ([0], [1], [0, 1]))
        ridges: tuple[float, ...] = RIDGES[:1]
        shares = [0.0]
        if self._counts[1] and self._counts[0] > 1:
            ridges = RIDGES
            fits = [_least_squares(*train, kept, gone, ridge) for ridge in RIDGES]
            shares = [_unexplained(*fit, *held, kept, gone) for fit in fits]
        best = int(np.argmin(shares))
        matrix, constant = _least_squares(*every, kept, gone, ridges[best])
        if len(shares) == 1:
            shares = [_unexplained(matrix, constant, *every, kept, gone)]
        elif shares[best] > 1:  # the mean does better than any prediction
            matrix, constant, shares[best] = np.zeros_like(matrix), every[0][gone], 1.0
        return matrix, constant, shares[best]

    def _about_mean(self, row: int, which: list[int]) -> tuple[Array, Array]:
        """Returns mean ``[n]`` and covariance ``[n, n]`` over some of the samples."""
        count = max(float(self._counts[which].sum()), 1.0)
        mean = self._first[which, row].sum(axis=0) / count
        return mean, self._second[which, row].sum(axis=0) / count - np.outer(mean, mean)


def _least_squares(
    mean: Array, covariance: Array, kept: Array, gone: Array, ridge: float
) -> tuple[Array, Array]:
    """Returns M and c of ``v_gone ≈ M · v_kept + c``."""
    inner = covariance[np.ix_(kept, kept)]
    scale = ridge * max(float(np.trace(inner)) / max(len(kept), 1), 1e-12)
    across = covariance[np.ix_(gone, kept)]
    matrix: Array = np.linalg.solve(inner + scale * np.eye(len(kept)), across.T).T
    return matrix, mean[gone] - matrix @ mean[kept]


def _unexplained(
    matrix: Array, constant: Array, mean: Array, covariance: Array, kept: Array, gone: Array
) -> float:
    """Returns the mean squared error of a prediction over the variance of what is predicted."""
    inner, across = covariance[np.ix_(kept, kept)], covariance[np.ix_(gone, kept)]
    total = float(np.trace(covariance[np.ix_(gone, gone)]))
    shift = mean[gone] - matrix @ mean[kept] - constant
    error = total - 2 * float((matrix * across).sum()) + float((matrix @ inner * matrix).sum())
    error += float(shift @ shift)
    return max(error, 0.0) / total if total > 0 else float(error > 1e-12)


@dataclass(eq=False)
class Reading:
    """One reader of units, and what it reads.

    Attributes:
        number: Of the cut in :attr:`Coupling.cuts`.
        cut: The cut.
        times: How often a sum over the value's other axes adds its constant.
        extra: What else must be known, for R: the layer's X and initial state.
        weights: For a GRU with ``linear_before_reset = 0``: W, R, B.
        source: What it reads; for R the layer's Y.
        labels: Of the source.
        moments: Of what it reads, ``rows`` as its weight tells them apart.
        gated: For a GRU with ``linear_before_reset = 0``: of the states times the reset gate.
        problem: Why it cannot be repaired.
    """

    number: int
    cut: Cut
    source: ir.Value | None
    labels: Labels | None
    moments: Moments | None = None
    gated: Moments | None = None
    problem: str | None = None
    times: int = 1
    extra: list[ir.Value] = field(default_factory=list)
    weights: tuple[Array | None, ...] = ()

    @property
    def name(self) -> str:
        """What a report calls it."""
        node = self.cut.node
        role = {1: " W", 2: " R"}.get(self.cut.index, "") if node.op_type in GATES else ""
        return f"{node.op_type} '{node.name or node.outputs[0].name}'{role}"

    @property
    def is_recurrent(self) -> bool:
        """Tells whether it is a layer's R."""
        return self.cut.node.op_type in GATES and self.cut.index == 2


def readings(coupling: Coupling) -> list[Reading]:
    """Returns every reader of units with constant weights, and the values to watch for it."""
    found = []
    for number, cut in enumerate(coupling.cuts):
        if cut.role != "reads" or cut.graph is not None:
            continue
        node = cut.node
        if node.op_type in GATES:
            source = node.outputs[0] if cut.index == 2 else node.inputs[0]
        elif node.op_type in ("Conv", "ConvTranspose"):
            source = node.inputs[0]
        else:
            source = (
                node.inputs[1 - cut.index]
                if len(node.inputs) == 2 or (node.op_type == "Gemm" and cut.index < 2)
                else None
            )
        labels = coupling.of(source)
        reading = Reading(number, cut, source, labels)
        if labels is None or source is None:
            reading.problem = "what it reads is not known"
        elif _features(cut.labels)[1] > MAX_FEATURES:
            reading.problem = f"it reads more than {MAX_FEATURES} units at once"
        elif _bias(node) is not None and coupling.constant(_bias(node)) is None:
            reading.problem = "its bias is no constant"
        elif node.op_type == "Einsum":
            times = _summed_besides(coupling, node, cut.index, source)
            reading.times = times or 1
            if times is None:
                reading.problem = "it sums over steps, too, whose number is not known"
        elif node.op_type == "ConvTranspose":
            reading.problem = "what a constant adds to its output differs by place"
        if reading.is_recurrent:
            if gates_first(node):
                reading.weights = tuple(coupling.constant(input_of(node, k)) for k in (1, 2, 3))
            reading.extra.extend(fed(node))
        found.append(reading)
    return found


def _bias(node: ir.Node) -> ir.Value | None:
    """Returns the bias that a repair would be added to."""
    index = 3 if node.op_type in GATES else 2 if node.op_type == "Conv" else None
    return None if index is None else input_of(node, index)


def _summed_besides(coupling: Coupling, node: ir.Node, index: int, value: ir.Value) -> int | None:
    """Returns over how many places an Einsum sums the value that its weight does not tell apart."""
    terms, result = einsum_terms(node)
    times = 1
    for axis, letter in enumerate(terms[1 - index]):
        if letter not in terms[index] and letter not in result:
            size = coupling.size(value, axis)
            if size is None:
                return None
            times *= size
    return times


def _features(labels: Labels) -> tuple[int, int]:
    """Returns (rows, units in each) of labels."""
    n = labels.array.shape[labels.axis]
    return labels.array.size // n, n


def _samples(array: Array, labels: Labels, wanted: Labels) -> Array:
    """Lays a value out as ``[rows, samples, units]``.

    Rows are the axes along which the reader's weight tells units apart; along others, what differs
    in units is just more samples.
    """
    rows, n = _features(wanted)
    apart = [k for k in range(labels.array.ndim) if k != labels.axis and labels.array.shape[k] > 1]
    if rows == 1 or [labels.array.shape[k] for k in apart] != [
        wanted.array.shape[k]
        for k in range(wanted.array.ndim)
        if k != wanted.axis and wanted.array.shape[k] > 1
    ]:
        apart = []
    rest = [k for k in range(array.ndim) if k not in apart and k != labels.axis]
    turned: Array = array.transpose([*apart, *rest, labels.axis])
    return turned.reshape(rows if apart else 1, -1, n)


def watch(found: list[Reading], names: Mapping[int, str], batches: Iterator[Batch]) -> None:
    """Adds up the moments of what every reader reads.

    Args:
        found: The readers; they are given their moments, or a problem.
        names: ``id`` of value → output of the running model.
        batches: What the model makes of real data.
    """
    for reading in found:
        if reading.problem is None and reading.source is not None:
            if id(reading.source) not in names:
                reading.problem = "it is in a loop"
            else:
                reading.moments = Moments(*_features(reading.cut.labels))
                if reading.is_recurrent and gates_first(reading.cut.node):
                    reading.gated = Moments(*_features(reading.cut.labels))
    shared: dict[tuple[int, tuple[int, int]], Moments] = {}
    for batch in batches:
        done: set[int] = set()
        for reading in found:
            if reading.moments is None or reading.source is None or reading.labels is None:
                continue
            array = batch.values[names[id(reading.source)]]
            if array.size == 0:
                continue  # the other branch was taken
            if reading.is_recurrent:
                _watch_states(reading, batch, names)
                continue
            key = (id(reading.source), _features(reading.cut.labels))
            reading.moments = shared.setdefault(key, reading.moments)
            if id(reading.moments) in done:
                continue
            done.add(id(reading.moments))
            steps = batch.valid(array, [reading.labels.axis])
            if steps is None:
                reading.problem = "its padded steps cannot be told from another axis"
                continue
            reading.moments.add(_samples(steps, reading.labels, reading.cut.labels))
    for reading in found:
        if reading.problem is None and reading.moments and not reading.moments.count:
            reading.problem = "the data never reach it"


def _watch_states(reading: Reading, batch: Batch, names: Mapping[int, str]) -> None:
    """Adds the hidden states that a layer's R reads: all of them, and the first."""
    node = reading.cut.node
    found = steps_of(node, batch, names)
    assert reading.moments is not None and found is not None  # its Y is not empty
    valid = found.valid
    reading.moments.add(np.concatenate([found.start, found.y.swapaxes(0, 1)[:, valid]], axis=1))
    if reading.gated is None or found.x is None:
        return
    before = found.before(node)
    gate = reset_gate(node, found.x, before, reading.weights)
    if gate is not None:
        reading.gated.add((gate * before)[:, valid])


def variances(coupling: Coupling, found: Sequence[Reading]) -> Array:
    """Returns how much each unit varies on the data.

    Returns:
        float64, one for each label, the mean over its class; 1 where it is not known.
    """
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    sums, counts = np.zeros(len(root)), np.zeros(len(root))
    nodes = {id(layer.node): layer for layer in coupling.layers}
    for reading in found:
        layer = nodes.get(id(reading.cut.node))
        if layer is None or not reading.is_recurrent or reading.moments is None:
            continue
        if reading.problem is None:
            own = np.einsum("dhh->dh", reading.moments.covariance())
            np.add.at(sums, root[layer.labels], own)
            np.add.at(counts, root[layer.labels], 1)
    known: Array = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)[root]
    return known


def reads(coupling: Coupling, found: Sequence[Reading]) -> tuple[Read, ...]:
    """Returns what readers with constant weights read on the data."""
    made = []
    for reading in found:
        if reading.moments is None or reading.problem is not None:
            continue
        axis = reading.cut.labels.axis
        units = np.moveaxis(coupling.classes.of(reading.cut.labels.array), axis, -1)
        units = units.reshape(-1, units.shape[-1])
        covariances = reading.moments.covariance()
        for row, covariance, where in zip(
            units, covariances, _rows(reading.cut.labels), strict=True
        ):
            made.append(Read(row, covariance, partial(_weights, coupling, reading.cut, where)))
    return tuple(made)


def _weights(coupling: Coupling, cut: Cut, where: tuple[slice | int, ...]) -> Array:
    """Returns the weights that one row of units is read with, as ``[outputs, units]``."""
    weight = coupling.constant(cut.value)
    assert weight is not None
    own: Array = np.moveaxis(weight, cut.labels.axis, -1)[where]
    return own.reshape(-1, own.shape[-1]).astype(np.float64)


def _rows(labels: Labels) -> Iterator[tuple[slice | int, ...]]:
    """Yields where the weights of each row of units are, once the unit axis is the last."""
    sizes = [n for k, n in enumerate(labels.array.shape) if k != labels.axis]
    for index in np.ndindex(*sizes):
        yield tuple(k if n > 1 else slice(None) for k, n in zip(index, sizes, strict=True))


def repair(
    coupling: Coupling, found: Sequence[Reading], removed: BoolArray
) -> tuple[dict[int, Fold], list[Repair]]:
    """Works out the repairs.

    Args:
        coupling: Of the model.
        found: The readers with their moments.
        removed: bool, one for each label: True where its class is removed.

    Returns:
        Number of the cut → repair, and what the report says of each reader of removed units.
    """
    folds: dict[int, Fold] = {}
    report: list[Repair] = []
    for reading in found:
        keep = ~removed[coupling.classes.of(reading.cut.labels.array)]
        if keep.all():
            continue
        if reading.problem is not None or reading.moments is None:
            report.append(Repair(reading.name, 0, None, reading.problem))
            continue
        weight = coupling.constant(reading.cut.value)
        assert weight is not None
        with np.errstate(over="ignore", invalid="ignore"):
            fold, unexplained, problem = _folded(reading, weight, keep)
        if not np.isfinite(fold.weight).all() or not np.isfinite(fold.offset).all():
            problem = "what it reads, or its repair, is not finite"
            report.append(Repair(reading.name, 0, None, problem))
            continue
        folds[reading.number] = fold
        left = unexplained if reading.moments.tested else None
        report.append(Repair(reading.name, reading.moments.count, left, problem))
    for node, index in coupling.masked:
        labels = coupling.of(node.inputs[index])
        if labels is not None and removed[coupling.classes.of(labels.array)].any():
            name = f"{node.op_type} '{node.name or node.outputs[0].name}'"
            problem = "it has no weights: all it reads is computed at run time"
            report.append(Repair(name, 0, None, problem))
    return folds, report


def _folded(reading: Reading, weight: Array, keep: BoolArray) -> tuple[Fold, float, str | None]:
    """Returns a reader's repair, the unexplained share (mean over rows), and what is left out."""
    axis, labels = reading.cut.labels.axis, reading.cut.labels
    assert reading.moments is not None
    new = np.array(weight)
    moved = np.moveaxis(new, axis, -1)  # a view: what is put there is in the new weight
    offset = np.zeros(moved.shape[:-1])
    rows = np.moveaxis(keep, axis, -1).reshape(-1, keep.shape[axis])
    unexplained, problem = [], None
    for number, (row, where) in enumerate(zip(rows, _rows(labels), strict=True)):
        part = moved[where]
        matrix, constant, share = reading.moments.predict(number, row)
        unexplained.append(share)
        gone = part[..., ~row].astype(np.float64)
        inner = part[..., row] + gone @ matrix
        extra = gone @ constant
        if reading.gated is not None:
            # The rows of the new state read what the reset gate lets through.
            start = 2 * part.shape[-2] // 3
            inner[..., start:, :], extra[..., start:] = part[..., start:, row], 0
            if reading.gated.count:
                matrix, constant, _ = reading.gated.predict(number, row)
                inner[..., start:, :] += gone[..., start:, :] @ matrix
                extra[..., start:] = gone[..., start:, :] @ constant
            else:
                problem = "the new state is not repaired: its reset gate has another activation"
        part[..., row] = inner
        offset[where] = extra
    if _is_padded(reading.cut.node):
        problem = "at padded edges what stands for the mean of the removed units is too much"
    return Fold(new, _shaped(reading, offset, weight)), float(np.mean(unexplained)), problem


def _is_padded(node: ir.Node) -> bool:
    """Tells whether a convolution reads zeros beyond the ends."""
    if node.op_type != "Conv":
        return False
    automatic = node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"
    return automatic.startswith("SAME") or any(node.attributes.get_ints("pads", ()) or ())


def _shaped(reading: Reading, offset: Array, weight: Array) -> Array:
    """Lays an offset out as the reader's output wants it."""
    cut = reading.cut
    node, axis = cut.node, cut.labels.axis
    if node.op_type == "Conv":
        offset = offset.reshape(len(offset), -1).sum(axis=1)
    elif node.op_type == "Gemm":
        offset = offset * (node.attributes.get_float("alpha", 1.0) or 0.0)
        offset = offset[:, None] if cut.index == 0 else offset
    elif node.op_type == "Einsum":
        terms, result = einsum_terms(node)
        own = terms[cut.index].replace(terms[cut.index][axis], "")
        # What the weight is summed over besides, and what the value is: each place adds as much.
        offset = reading.times * offset.sum(
            axis=tuple(own.index(x) for x in own if x not in result)
        )
        left = [x for x in own if x in result]
        offset = offset.transpose([left.index(x) for x in result if x in left])
        shape = iter(offset.shape)
        offset = offset.reshape([next(shape) if x in left else 1 for x in result])
    elif node.op_type == "MatMul" and weight.ndim > 1:
        vector = reading.labels is not None and reading.labels.array.ndim == 1
        if not vector:
            offset = np.expand_dims(offset, axis)
        while cut.index == 1 and offset.ndim > 1 and offset.shape[0] == 1:
            offset = offset[0]
    return np.asarray(offset).astype(weight.dtype)
