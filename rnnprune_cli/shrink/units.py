"""Hidden units: choose, repair, cut, and compare with the masked model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.calibrate import prepared, size_of
from rnnprune_cli.compensate import Reading, readings, reads, repair, variances, watch
from rnnprune_cli.coupling import Coupling, Labels
from rnnprune_cli.coupling.features import unread
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import find
from rnnprune_cli.graph import Walker
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Claim,
    KeptUnits,
    RemovableUnits,
    Repair,
    ResizedState,
    UnitFigures,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.rewrite.units import Folds, mask, shrink
from rnnprune_cli.shrink.task import (
    Shrunk,
    Task,
    compared,
    coupled,
    method_of,
    nothing_removed,
    verified,
)
from rnnprune_cli.units import choose

UNREAD = "without the input features that no weight reads, it computes the same"
SHRUNK = "the shrunk model computes what the masked model computes"

_ALMOST_ALL = 1 - 1e-9

_NORMS = (1, 2, 7)
"""Inputs of recurrent operators that count as weights of a unit: W, R and P."""


@dataclass(frozen=True, eq=False)
class Units:
    """What is known about the units of a model, whatever share of them is to go.

    Attributes:
        coupling: What goes with each unit.
        found: What is read of units on real data; empty without.
        scores: Of each unit.
    """

    coupling: Coupling
    found: list[Reading]
    scores: Array


def look_at_units(task: Task) -> Units:
    """Finds what goes with each unit, watches what is read of units on real data, and scores.

    Raises:
        RnnpruneError: If the data cannot be watched although the criterion needs them.
        UsageError: If the criterion needs data and there are none.
    """
    method = method_of(task)
    assert method.unit is not None  # the options were checked
    task.progress("finding what goes with each unit")
    coupling = task.coupled()
    found: list[Reading] = []
    if task.calibration is not None and (task.stage.compensate or method.needs_data):
        found = readings(coupling)
        values = [v for r in found for v in (r.source, *r.extra) if v is not None]
        watch(found, *task.batches(coupling.model, values, _paired(coupling)))
        problems = [reading.problem for reading in found if reading.problem]
        if method.needs_data and problems and len(problems) == len(found):
            raise RnnpruneError(
                f"method '{method.name}' cannot see what the data make of units: {problems[0]}",
                "--method magnitude needs no data",
            )
    task.progress("scoring units")
    scores = method.unit(_figures(coupling, found), np.random.default_rng(task.seed))
    return Units(coupling, found, scores)


def remove_units(task: Task, known: Units | None = None) -> Shrunk:
    """Removes hidden units and repairs what reads them.

    1. Find what goes with each unit; watch what is read of units on real data; score.
    2. Choose.
    3. Work out the repair.
    4. Write the model that has all sizes and new weights, and the one that is cut.
    5. Hold them against each other.

    Args:
        task: The task.
        known: Result of :func:`look_at_units`, if there is one.

    Raises:
        RnnpruneError: If no unit could be removed.
        UsageError: If the criterion needs data and there are none.
    """
    model, stage = task.model, task.stage
    units = known or look_at_units(task)
    coupling, found = units.coupling, units.found
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    scores = units.scores[root]
    if task.first:
        scores = np.maximum(scores, np.finfo(np.float64).tiny)
        for layer in coupling.layers:
            if layer.name in task.first:
                scores[np.isin(root, root[layer.labels[task.first[layer.name]]])] = 0
    chosen = choose(coupling, scores, task.names, stage.sparsity, stage.scope, stage.shares)
    removed = chosen.removed
    if not removed.any() and (stage.sparsity > 0 or any(stage.shares.values())):
        raise nothing_removed(model, chosen.blocked, stage)
    folds: Folds = {}
    repairs: list[Repair] = []
    if stage.compensate and found:
        task.progress("working out the repair")
        folds, repairs = repair(coupling, found, removed)
    blocked = _blocked(model, coupling, chosen.blocked)
    warnings = _warnings(coupling, removed, task, repairs)
    kept = tuple(
        KeptUnits(x.name, tuple(_places(~removed[row]) for row in x.labels))
        for x in coupling.layers
    )
    states, resized = _states(coupling, removed) if stage.resize_state else ((), {})
    paired = _paired(coupling)
    del coupling, found, units  # a large model must not be in memory more often than need be
    task.progress("cutting")
    masked = task.changed("masked", lambda c: mask(c, removed, folds, stage.resize_state), resized)
    result = task.changed(
        "shrunk", lambda c: shrink(c, removed, folds, stage.resize_state), resized
    )
    nothing = np.zeros_like(removed)
    whole = task.changed("prepared", lambda c: mask(c, nothing, {}, resize_state=False))
    result.skipped = model.skipped
    task.progress("holding it against the masked model")
    claims = verified(task, whole, masked, result, SHRUNK, paired)
    result, unused, more = _without_unread(task, result, resized)
    return Shrunk(
        result,
        (*claims, *more),
        kept,
        states,
        tuple(repairs),
        blocked,
        (*warnings, *unused),
    )


def _without_unread(
    task: Task, model: OnnxModel, resized: Mapping[str, tuple[BoolArray, int]]
) -> tuple[OnnxModel, list[str], list[Claim]]:
    """Leaves out input features that no weight reads any more.

    Returns:
        The model, what to say about it, and what was verified.
    """
    graph, size = prepared(model), size_of(model)
    coupling = Coupling(graph, find(Walker(graph), size), size, features=True)
    gone = unread(coupling)
    count = len(np.unique(coupling.classes.of(np.flatnonzero(gone))))
    if not count:
        return model, [], []
    shrink(coupling, gone, {}, resize_state=False)
    result = task.opened(graph, "read", resized)
    result.skipped = model.skipped
    claim = compared(task, UNREAD, model.open(task.threads), result.open(task.threads))
    return result, [f"{count} input features that no weight reads are left out, too"], [claim]


def removable_units(model: OnnxModel) -> tuple[RemovableUnits, ...]:
    """Returns what could be removed of each layer, one by one, and what blocks the rest."""
    coupling = coupled(model)
    names = [layer.name for layer in coupling.layers]
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    chosen = choose(coupling, np.zeros(len(root)), names, _ALMOST_ALL, "layer")
    found = []
    for layer in coupling.layers:
        own = np.unique(root[layer.labels])
        others = [
            other.name
            for other in coupling.layers
            if other is not layer and np.isin(root[other.labels], own).any()
        ]
        count = int(chosen.removed[layer.labels].sum(axis=1).min())
        why, _, hint = chosen.blocked.get(layer.name, "").partition("; ")
        found.append(RemovableUnits(layer.name, count, tuple(others), why or None, hint))
    return tuple(found)


def _figures(coupling: Coupling, found: Sequence[Reading]) -> UnitFigures:
    """Adds up the squared weights that read each unit, and that go with it; adds what data say."""
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    outgoing, group = np.zeros(len(root)), np.zeros(len(root))
    recurrent = {id(layer.node) for layer in coupling.layers}
    for cut in coupling.cuts:
        own = cut.role == "own" and id(cut.node) in recurrent and cut.index in _NORMS
        weight = coupling.constant(cut.value) if own or cut.role == "reads" else None
        if weight is None:
            continue
        array = cut.labels.array
        over = tuple(k for k in range(array.ndim) if array.shape[k] == 1)
        wide = np.result_type(weight, np.float32)  # squares of half-precision numbers overflow
        squares = np.square(weight, dtype=wide).sum(axis=over, keepdims=True, dtype=np.float64)
        np.add.at(group, root[array], squares)
        if cut.role == "reads":
            np.add.at(outgoing, root[array], squares)
    if not found:
        return UnitFigures(outgoing[root], group[root], None)
    variance = variances(coupling, found)
    return UnitFigures(outgoing[root], group[root], variance, reads(coupling, found))


def _paired(coupling: Coupling) -> dict[str, str]:
    """Returns input → output of the states that callers hand in and get back."""
    return {s.input.name or "": s.output.name or "" for s in coupling.states if s.input is not None}


def _blocked(model: OnnxModel, coupling: Coupling, blocked: Mapping[str, str]) -> dict[str, str]:
    known = {layer.name for layer in coupling.layers}
    gone = {
        layer.name: "in a branch that is never taken; the branch is left out"
        for layer in model.layers
        if layer.name not in known
    }
    return {**gone, **blocked}


def _warnings(
    coupling: Coupling, removed: BoolArray, task: Task, repairs: Sequence[Repair]
) -> list[str]:
    found = []
    if task.stage.sparsity > 0 and task.calibration is None:
        found.append(
            "nothing was repaired: with --data (labels are not needed) what units leave behind is"
            " made up for, which mostly loses several times less"
        )
    elif task.stage.sparsity > 0 and not task.stage.compensate:
        found.append("nothing was repaired: --compensate mostly loses several times less")
    elif task.stage.sparsity > 0 and not method_of(task).needs_data:
        found.append("--method obs chooses units by what the repair leaves, and mostly loses less")
    kept = [int((~removed[layer.labels]).sum()) for layer in coupling.layers]
    few = [row.samples for row in repairs if row.samples]
    if few and min(few) < 2 * max(kept):
        found.append(
            f"the repair was worked out on {min(few)} samples for up to {max(kept)} units: give"
            " more data, ten times as many steps as units"
        )
    inputs = {id(cut.value) for cut in coupling.cuts if cut.graph is None}
    overridable = [
        v.name or "" for v in coupling.model.graph.inputs if v.is_initializer() and id(v) in inputs
    ]
    if overridable:
        found.append(f"weights that callers could override are constants now: {overridable[0]}, …")
    inexact = [
        f"{node.op_type} '{node.name or node.outputs[0].name}'"
        for node in coupling.inexact
        if (own := coupling.of(node.inputs[0])) is not None
        and removed[coupling.classes.of(own.array)].any()
    ]
    if inexact:
        found.append(
            f"not exact: {', '.join(inexact)} now normalises over the units that stay, which"
            " changes what the others become (--allow-inexact)"
        )
    return found


def _places(keep: BoolArray) -> tuple[int, ...]:
    return tuple(int(k) for k in np.flatnonzero(keep))


def _states(
    coupling: Coupling, removed: BoolArray
) -> tuple[tuple[ResizedState, ...], dict[str, tuple[BoolArray, int]]]:
    """Returns which states change their shape, and how to cut what a caller of old hands in."""
    found: list[ResizedState] = []
    cuts: dict[str, tuple[BoolArray, int]] = {}

    def kept(labels: Labels) -> BoolArray:
        return np.asarray(~removed[coupling.classes.of(labels.array)])

    for state in coupling.states:
        labels = coupling.of(state.output)
        if labels is None or kept(labels).all():
            continue
        rows = np.moveaxis(kept(labels), labels.axis, -1).reshape(
            -1, labels.array.shape[labels.axis]
        )
        given = coupling.of(state.input)
        if state.input is not None and given is not None:
            cuts[state.input.name or ""] = (kept(given), given.axis)
        found.append(
            ResizedState(
                None if state.input is None else state.input.name,
                state.output.name or "",
                labels.axis,
                tuple(_places(row) for row in rows),
            )
        )
    return tuple(found), cuts
