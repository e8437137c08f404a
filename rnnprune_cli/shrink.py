"""Removing hidden units from a model: choose, repair, cut, and compare with the masked model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli import shapes
from rnnprune_cli.calibrate import expose, run_batches
from rnnprune_cli.compensate import Reading, readings, reads, repair, variances, watch
from rnnprune_cli.coupling import Coupling, Labels
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.find import find, locate
from rnnprune_cli.graph import Walker
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Claim,
    Feed,
    KeptUnits,
    RemovableUnits,
    Repair,
    ResizedState,
    Runner,
    Stage,
    UnitFigures,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.rewrite.branches import settle
from rnnprune_cli.rewrite.build import MIN_IR_INITIALIZERS
from rnnprune_cli.rewrite.units import Folds, mask, shrink
from rnnprune_cli.runtime import first_line
from rnnprune_cli.units import choose
from rnnprune_cli.verify import verify_runs, verify_same

PREPARED = "with no unit removed, the model computes what the original computes"
SHRUNK = "the shrunk model computes what the masked model computes"
STREAMED = "and so it does over {steps} calls with the state handed back"
STREAMED_STEPS = 8

_ALMOST_ALL = 1 - 1e-9

_NORMS = (1, 2, 7)
"""Inputs of recurrent operators that count as weights of a unit: W, R and P."""


@dataclass(frozen=True)
class Shrunk:
    """A model without some of its units.

    Attributes:
        model: The new model; its file lives in the folder that was given.
        claims: What was verified about it.
        units: The units of each layer that stay.
        states: States that changed their public shape.
        repairs: How well the readers of removed units are made up for.
        blocked: Layer name → why none, or not all that were asked for, of its units went.
        warnings: What the user should know.
    """

    model: OnnxModel
    claims: tuple[Claim, ...]
    units: tuple[KeptUnits, ...]
    states: tuple[ResizedState, ...]
    repairs: tuple[Repair, ...]
    blocked: Mapping[str, str]
    warnings: tuple[str, ...]


def coupled(model: OnnxModel, allow_inexact: bool = False, resize_state: bool = False) -> Coupling:
    """Reads a model again, prepared for removing units, and finds out what goes together.

    Functions are inlined, Ifs that always go the same way become that branch, and recurrent
    operators get the names that the model's layers have.

    Args:
        model: The model.
        allow_inexact: Whether normalisation over units lets units go.
        resize_state: Whether states may change their public shape.
    """
    graph = model.fresh()
    names = [located.name for located in locate(Walker(graph))]
    if graph.functions:
        try:
            common.InlinePass()(graph)
        except Exception as error:  # onnx-ir raises many unrelated types
            raise RnnpruneError(
                f"{model.path}: its functions cannot be inlined: {first_line(error)}",
                "inline them when exporting (onnx.inliner.inline_local_functions)",
            ) from error
    for name, located in zip(names, locate(Walker(graph)), strict=True):
        located.instance.node.name = name
    size = sum(file.stat().st_size for file in model.files)
    shapes.complete(graph)
    settle(graph, size)
    return Coupling(graph, find(Walker(graph), size), size, allow_inexact, resize_state)


def remove_units(
    model: OnnxModel,
    stage: Stage,
    names: Sequence[str],
    folder: Path,
    calibration: Dataset | None,
    feeds: Sequence[Feed],
    made_up: bool,
    seed: int,
    threads: int,
    progress: Callable[[str], None],
) -> Shrunk:
    """Removes hidden units and repairs what reads them.

    1. Find what goes with each unit; watch what is read of units on real data.
    2. Score and choose.
    3. Work out the repair.
    4. Write the model that has all sizes and new weights, and the one that is cut.
    5. Hold them against each other.

    Args:
        model: The model.
        stage: What to do.
        names: The layers that may lose units.
        folder: Existing folder for the files.
        calibration: Real inputs, for criteria and repair.
        feeds: Inputs to compare on.
        made_up: Whether these are no real ones.
        seed: Seed of random scores.
        threads: Threads to run with.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If no unit could be removed.
        UsageError: If the criterion needs data and there are none.
    """
    method = find_method(stage.method)
    if method.needs_data and calibration is None:
        raise UsageError(
            f"method '{stage.method}' scores units on data", "give --data, or --calibration"
        )
    assert method.unit is not None  # the options were checked
    progress("finding what goes with each unit")

    def fresh() -> Coupling:
        return coupled(model, stage.allow_inexact, stage.resize_state)

    coupling = fresh()
    found: list[Reading] = []
    if calibration is not None and (stage.compensate or method.needs_data):
        progress(f"running {calibration.count} samples to see what units do")
        found = _watched(model, coupling, calibration, folder, threads)
    figures = _figures(coupling, found)
    scores = method.unit(figures, np.random.default_rng(seed))
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    chosen = choose(coupling, scores[root], names, stage.sparsity, stage.scope)
    removed = chosen.removed
    if stage.sparsity > 0 and not removed.any():
        raise _nothing(model, chosen.blocked, stage)
    folds: Folds = {}
    repairs: list[Repair] = []
    if stage.compensate and found:
        progress("working out the repair")
        folds, repairs = repair(coupling, found, removed)
    progress("cutting")
    prepared = fresh()
    mask(prepared, np.zeros_like(removed), {}, resize_state=False)
    masked = fresh()
    mask(masked, removed, folds, stage.resize_state)
    cut = fresh()
    units = tuple(
        KeptUnits(x.name, tuple(_places(~removed[row]) for row in x.labels)) for x in cut.layers
    )
    states, resized = _states(cut, removed) if stage.resize_state else ((), {})
    paired = {s.input.name or "": s.output.name or "" for s in cut.states if s.input is not None}
    shrink(cut, removed, folds, stage.resize_state)
    result = _opened(model, cut.model, folder / "shrunk.onnx", resized)
    result.skipped = model.skipped
    progress("holding it against the masked model")
    claims = _verified(
        model,
        _opened(model, prepared.model, folder / "prepared.onnx", {}),
        _opened(model, masked.model, folder / "masked.onnx", resized),
        result,
        feeds,
        paired,
        made_up,
        threads,
    )
    return Shrunk(
        result,
        tuple(claims),
        units,
        states,
        tuple(repairs),
        _blocked(model, coupling, chosen.blocked),
        tuple(_warnings(coupling, removed, stage, calibration)),
    )


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


def _opened(
    model: OnnxModel, graph: ir.Model, path: Path, resized: Mapping[str, tuple[BoolArray, int]]
) -> OnnxModel:
    """Writes a changed graph and opens it as a model."""
    graph.ir_version = max(graph.ir_version, MIN_IR_INITIALIZERS)
    model.write_graph(graph, path)
    return OnnxModel(path, model.path, model.lifts, resized)


def _watched(
    model: OnnxModel, coupling: Coupling, data: Dataset, folder: Path, threads: int
) -> list[Reading]:
    """Runs the model on data and adds up what every reader of units reads."""
    found = readings(coupling)
    states = {
        s.input.name or "": s.output.name or "" for s in coupling.states if s.input is not None
    }
    values = [v for r in found for v in (r.source, *r.extra) if v is not None]
    names = expose(coupling.model, values)
    runner = _opened(model, coupling.model, folder / "watched.onnx", {}).open(threads)
    wanted = list(dict.fromkeys(names.values()))
    watch(found, names, run_batches(runner, wanted, data, states))
    return found


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
        squares = np.square(weight, dtype=np.float64).sum(axis=over, keepdims=True)
        np.add.at(group, root[array], squares)
        if cut.role == "reads":
            np.add.at(outgoing, root[array], squares)
    if not found:
        return UnitFigures(outgoing[root], group[root], None)
    variance = variances(coupling, found)
    return UnitFigures(outgoing[root], group[root], variance, reads(coupling, found))


def _nothing(model: OnnxModel, blocked: Mapping[str, str], stage: Stage) -> RnnpruneError:
    for name, reason in blocked.items():
        more = f" ({len(blocked) - 1} more layers)" if len(blocked) > 1 else ""
        why, _, hint = reason.partition("; ")
        return RnnpruneError(
            f"no unit of {model.path} can be removed: '{name}': {why}{more}",
            hint or "'rnnprune inspect' shows what blocks each layer; --granularity weight works",
        )
    return RnnpruneError(
        f"sparsity {stage.sparsity:g} removes not a single unit: the layers are too small",
        "ask for a higher --sparsity",
    )


def _blocked(model: OnnxModel, coupling: Coupling, blocked: Mapping[str, str]) -> dict[str, str]:
    known = {layer.name for layer in coupling.layers}
    gone = {
        layer.name: "in a branch that is never taken; the branch is left out"
        for layer in model.layers
        if layer.name not in known
    }
    return {**gone, **blocked}


def _warnings(
    coupling: Coupling, removed: BoolArray, stage: Stage, calibration: Dataset | None
) -> list[str]:
    found = []
    if stage.sparsity > 0 and calibration is None:
        found.append(
            "nothing was repaired: with --data (labels are not needed) what units leave behind is"
            " made up for, which loses several times less"
        )
    elif stage.sparsity > 0 and not stage.compensate:
        found.append("nothing was repaired: --compensate loses several times less")
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


# Verifying


def _verified(
    model: OnnxModel,
    prepared: OnnxModel,
    masked: OnnxModel,
    result: OnnxModel,
    feeds: Sequence[Feed],
    states: Mapping[str, str],
    made_up: bool,
    threads: int,
) -> list[Claim]:
    original = model.open(threads)
    names = [o.name for o in original.outputs]
    claims = [
        verify_runs(PREPARED, original, prepared.open(threads), feeds, names, made_up),
    ]
    one, two = masked.open(threads), result.open(threads)
    claims.append(verify_runs(SHRUNK, one, two, feeds, names, made_up))
    if states:
        claim = STREAMED.format(steps=STREAMED_STEPS)
        first, second = (_streamed(runner, feeds, names, states) for runner in (one, two))
        claims.append(verify_same(claim, first, second))
    return claims


def _streamed(
    runner: Runner, feeds: Sequence[Feed], names: Sequence[str], states: Mapping[str, str]
) -> list[list[Array]]:
    """Runs a model again and again, each time with the states that it handed out."""
    own = [o.name for o in runner.outputs]
    results: list[list[Array]] = []
    for feed in feeds:
        now = dict(feed)
        for _ in range(STREAMED_STEPS):
            outputs = runner.run(now)
            results.append([outputs[own.index(name)] for name in names])
            now.update({given: outputs[own.index(taken)] for given, taken in states.items()})
    return results
