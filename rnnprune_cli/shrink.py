"""Removing hidden units or layers: choose, repair, cut, and compare with the masked model."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli import shapes
from rnnprune_cli.calibrate import Batch, expose, run_batches
from rnnprune_cli.compensate import (
    Passage,
    Reading,
    readings,
    reads,
    repair,
    variances,
    watch,
)
from rnnprune_cli.coupling import Coupling, Labels
from rnnprune_cli.coupling.features import unread
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.find import find, locate
from rnnprune_cli.graph import Walker
from rnnprune_cli.methods import Method
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.model import (
    GATES,
    Array,
    BoolArray,
    Claim,
    Feed,
    KeptUnits,
    LayerFigures,
    RecurrentLayer,
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
from rnnprune_cli.rewrite.layers import LinearMap, bypass, imitate, obstacle
from rnnprune_cli.rewrite.units import Folds, mask, shrink
from rnnprune_cli.runtime import first_line
from rnnprune_cli.units import choose
from rnnprune_cli.verify import RELATIVE_TOLERANCE, verify_runs, verify_same

PREPARED = "with nothing removed, the model computes what the original computes"
WITHOUT_LAYERS = "the model without layers computes what linear operators in their place compute"
UNREAD = "without the input features that no weight reads, it computes the same"
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


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be removed of which model, and what that is decided and verified on.

    Attributes:
        model: The model.
        stage: What to do.
        names: The layers that may lose units, or be removed.
        folder: Existing folder for files.
        calibration: Real inputs, for criteria and repair.
        feeds: Inputs to compare on.
        made_up: Whether these are no real ones.
        seed: Seed of random scores.
        threads: Threads to run with.
        progress: Called with a short text at the beginning of each step.
    """

    model: OnnxModel
    stage: Stage
    names: Sequence[str]
    folder: Path
    calibration: Dataset | None
    feeds: Sequence[Feed]
    made_up: bool
    seed: int
    threads: int
    progress: Callable[[str], None]

    def coupled(self) -> Coupling:
        """Reads the model again and finds out what goes together."""
        return coupled(self.model, self.stage.allow_inexact, self.stage.resize_state)

    def opened(
        self,
        graph: ir.Model,
        name: str,
        resized: Mapping[str, tuple[BoolArray, int]] | None = None,
    ) -> OnnxModel:
        """Writes a changed graph and opens it as a model."""
        path = self.folder / f"{name}.onnx"
        graph.ir_version = max(graph.ir_version, MIN_IR_INITIALIZERS)
        self.model.write_graph(graph, path)
        return OnnxModel(path, self.model.path, self.model.lifts, resized)

    def changed(
        self,
        name: str,
        change: Callable[[Coupling], None],
        resized: Mapping[str, tuple[BoolArray, int]] | None = None,
    ) -> OnnxModel:
        """Reads the model again, changes it, and opens the result."""
        coupling = self.coupled()
        change(coupling)
        result = self.opened(coupling.model, name, resized)
        del coupling
        if self.model.large:
            gc.collect()  # graphs refer to themselves
        return result

    def batches(
        self, graph: ir.Model, values: Sequence[ir.Value], states: Mapping[str, str]
    ) -> tuple[dict[int, str], Iterator[Batch]]:
        """Runs a graph on the calibration data.

        Returns:
            ``id`` of value → its name in the batches, and the batches.
        """
        assert self.calibration is not None
        names = expose(graph, values)
        runner = self.opened(graph, "watched").open(self.threads)
        wanted = list(dict.fromkeys(names.values()))
        running = run_batches(runner, wanted, self.calibration, states)
        return names, self._told(running, self.calibration.count)

    def _told(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        """Tells how far the run through the data is, and how long it will take."""
        begin, done, told = time.perf_counter(), 0, 0.0
        self.progress(f"running {count} samples to see what units do")
        for batch in batches:
            yield batch
            done += batch.samples
            elapsed = time.perf_counter() - begin
            if elapsed > told + 1:
                told, left = elapsed, elapsed / done * (count - done)
                self.progress(f"sample {done} of {count}, about {left:.0f} s left")


def prepared(model: OnnxModel) -> ir.Model:
    """Reads a model again, as units and layers are removed from it.

    Functions are inlined, Ifs that always go the same way become that branch, and recurrent
    operators get the names that the model's layers have.
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
    shapes.complete(graph)
    settle(graph, _size(model))
    return graph


def coupled(model: OnnxModel, allow_inexact: bool = False, resize_state: bool = False) -> Coupling:
    """Reads a model again and finds out what goes together.

    Args:
        model: The model.
        allow_inexact: Whether normalisation over units lets units go.
        resize_state: Whether states may change their public shape.
    """
    graph, size = prepared(model), _size(model)
    return Coupling(graph, find(Walker(graph), size), size, allow_inexact, resize_state)


def _size(model: OnnxModel) -> int:
    return sum(file.stat().st_size for file in model.files)


def remove_units(task: Task) -> Shrunk:
    """Removes hidden units and repairs what reads them.

    1. Find what goes with each unit; watch what is read of units on real data.
    2. Score and choose.
    3. Work out the repair.
    4. Write the model that has all sizes and new weights, and the one that is cut.
    5. Hold them against each other.

    Raises:
        RnnpruneError: If no unit could be removed.
        UsageError: If the criterion needs data and there are none.
    """
    model, stage = task.model, task.stage
    method = _method(task)
    assert method.unit is not None  # the options were checked
    task.progress("finding what goes with each unit")
    coupling = task.coupled()
    found: list[Reading] = []
    if task.calibration is not None and (stage.compensate or method.needs_data):
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
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    chosen = choose(coupling, scores[root], task.names, stage.sparsity, stage.scope)
    removed = chosen.removed
    if stage.sparsity > 0 and not removed.any():
        raise _nothing(model, chosen.blocked, stage)
    folds: Folds = {}
    repairs: list[Repair] = []
    if stage.compensate and found:
        task.progress("working out the repair")
        folds, repairs = repair(coupling, found, removed)
    blocked = _blocked(model, coupling, chosen.blocked)
    warnings = _warnings(coupling, removed, task, repairs)
    units = tuple(
        KeptUnits(x.name, tuple(_places(~removed[row]) for row in x.labels))
        for x in coupling.layers
    )
    states, resized = _states(coupling, removed) if stage.resize_state else ((), {})
    paired = _paired(coupling)
    del coupling, found, scores  # a large model must not be in memory more often than need be
    task.progress("cutting")
    masked = task.changed("masked", lambda c: mask(c, removed, folds, stage.resize_state), resized)
    result = task.changed(
        "shrunk", lambda c: shrink(c, removed, folds, stage.resize_state), resized
    )
    nothing = np.zeros_like(removed)
    whole = task.changed("prepared", lambda c: mask(c, nothing, {}, resize_state=False))
    result.skipped = model.skipped
    task.progress("holding it against the masked model")
    claims = _verified(task, whole, masked, result, SHRUNK, paired)
    result, unused, more = _without_unread(task, result, resized)
    return Shrunk(
        result,
        (*claims, *more),
        units,
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
    graph, size = prepared(model), _size(model)
    coupling = Coupling(graph, find(Walker(graph), size), size, features=True)
    gone = unread(coupling)
    count = len(np.unique(coupling.classes.of(np.flatnonzero(gone))))
    if not count:
        return model, [], []
    shrink(coupling, gone, {}, resize_state=False)
    result = task.opened(graph, "read", resized)
    result.skipped = model.skipped
    names = [o.name for o in task.model.open(task.threads).outputs]
    runners = model.open(task.threads), result.open(task.threads)
    relative = _tolerance(task.model)
    claim = verify_runs(UNREAD, *runners, task.feeds, names, task.made_up, relative)
    return result, [f"{count} input features that no weight reads are left out, too"], [claim]


def remove_layers(task: Task) -> Shrunk:
    """Removes whole layers: a linear map fitted to data, or the identity, stands for each.

    1. See which layers can go; watch what they make of what they read.
    2. Score and choose; one layer stays.
    3. Write the model without them, and the one whose operators compute the linear maps.
    4. Hold them against each other.

    Raises:
        RnnpruneError: If no layer could be removed.
        UsageError: If the criterion needs data and there are none.
    """
    method, model = _method(task), task.model
    assert method.layer is not None  # the options were checked
    task.progress("finding the layers that can go")
    graph = prepared(model)
    nodes = {n.name or "": n for n in graph.graph.all_nodes() if n.op_type in GATES}
    fit = task.calibration is not None and task.stage.compensate
    blocked: dict[str, str] = {}
    free: list[RecurrentLayer] = []
    for layer in model.layers:
        if layer.name not in nodes or layer.name not in task.names:
            continue
        sizes = layer.input_size, layer.w.shape[0], layer.hidden_size
        why = obstacle(nodes[layer.name], *sizes, data=fit)
        if why:
            blocked[layer.name] = why
        else:
            free.append(layer)
    wanted = min(round(task.stage.sparsity * len(task.names)), len(model.layers) - 1)
    if task.stage.sparsity > 0 and not (wanted and free):
        raise _nothing(model, blocked, task.stage)
    passages: dict[str, Passage] = {}
    if task.calibration is not None and (fit or method.needs_data):
        passages = _passages(task, graph, [nodes[layer.name] for layer in free])
    fitted = {name: passage.fit() for name, passage in passages.items()}
    generator = np.random.default_rng(task.seed)
    scored = [
        method.layer(
            LayerFigures(
                float(np.mean([np.square(w.read(), dtype=np.float64).mean() for w in x.weights])),
                fitted[x.name][2] if x.name in fitted else None,
            ),
            generator,
        )
        for x in free
    ]
    gone = [free[k] for k in np.argsort(scored, kind="stable")[:wanted]]
    chosen: dict[str, LinearMap] = {}
    for x in gone:
        chosen[x.name] = LinearMap()
        if fit:
            weight, bias, _ = fitted[x.name]
            chosen[x.name] = LinearMap(weight.astype(x.w.dtype), bias.astype(x.w.dtype))
    task.progress("taking layers out")
    without, imitating = prepared(model), prepared(model)
    bypass(without, chosen)
    imitate(imitating, chosen)
    result = task.opened(without, "shrunk")
    result.skipped = model.skipped
    whole = task.opened(prepared(model), "prepared")
    imitation = task.opened(imitating, "masked")
    claims = _verified(task, whole, imitation, result, WITHOUT_LAYERS, {})
    stands = "a linear map" if fit else "its input"
    repairs = [
        Repair(f"linear map for '{name}'", passages[name].count, fitted[name][2])
        for name in chosen
        if fit
    ]
    blocked |= dict.fromkeys(chosen, f"removed: {stands} stands for it")
    return Shrunk(result, claims, (), (), tuple(repairs), blocked, ())


def _passages(task: Task, graph: ir.Model, nodes: Sequence[ir.Node]) -> dict[str, Passage]:
    """Runs a model on data and adds up what layers read and make."""
    values = [v for node in nodes for v in (node.inputs[0], node.outputs[0]) if v is not None]
    names, batches = task.batches(graph, values, {})
    found = {node.name or "": Passage() for node in nodes}
    for batch in batches:
        for node in nodes:
            x, y = (
                batch.values.get(names.get(id(value), ""))
                for value in (node.inputs[0], node.outputs[0])
            )
            if x is not None and y is not None and x.size:
                found[node.name or ""].add(batch.valid(x, [1, 2]), batch.valid(y, [1, 2, 3]))
    return found


def _method(task: Task) -> Method:
    method = find_method(task.stage.method)
    if method.needs_data and task.calibration is None:
        raise UsageError(
            f"method '{method.name}' scores what data make of a model",
            "give --data, or --calibration",
        )
    return method


def _paired(coupling: Coupling) -> dict[str, str]:
    """Returns input → output of the states that callers hand in and get back."""
    return {s.input.name or "": s.output.name or "" for s in coupling.states if s.input is not None}


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
        squares = np.square(weight, dtype=np.float64).sum(axis=over, keepdims=True)
        np.add.at(group, root[array], squares)
        if cut.role == "reads":
            np.add.at(outgoing, root[array], squares)
    if not found:
        return UnitFigures(outgoing[root], group[root], None)
    variance = variances(coupling, found)
    return UnitFigures(outgoing[root], group[root], variance, reads(coupling, found))


def _nothing(model: OnnxModel, blocked: Mapping[str, str], stage: Stage) -> RnnpruneError:
    # What holds some units of a layer is no reason for none to go.
    whole = {name: why for name, why in blocked.items() if not re.match(r"\d+ of \d+ units: ", why)}
    for name, reason in whole.items():
        more = f" ({len(whole) - 1} more layers)" if len(whole) > 1 else ""
        why, _, hint = reason.partition("; ")
        return RnnpruneError(
            f"no {stage.granularity} of {model.path} can be removed: '{name}': {why}{more}",
            hint or "'rnnprune inspect' shows what blocks each layer; --granularity weight works",
        )
    return RnnpruneError(
        f"sparsity {stage.sparsity:g} removes not a single {stage.granularity}: there are too few",
        "ask for a higher --sparsity" if stage.granularity == "unit" else "one layer has to stay",
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
    coupling: Coupling, removed: BoolArray, task: Task, repairs: Sequence[Repair]
) -> list[str]:
    found = []
    if task.stage.sparsity > 0 and task.calibration is None:
        found.append(
            "nothing was repaired: with --data (labels are not needed) what units leave behind is"
            " made up for, which loses several times less"
        )
    elif task.stage.sparsity > 0 and not task.stage.compensate:
        found.append("nothing was repaired: --compensate loses several times less")
    kept = [int((~removed[layer.labels]).sum()) for layer in coupling.layers]
    few = [row.samples for row in repairs if row.samples]
    if few and min(few) < 2 * max(kept):
        found.append(
            f"the repair was worked out on {min(few)} steps for up to {max(kept)} units: give more"
            " data, ten times as many steps as units"
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


# Verifying


def _verified(
    task: Task,
    whole: OnnxModel,
    reference: OnnxModel,
    result: OnnxModel,
    claim: str,
    states: Mapping[str, str],
) -> tuple[Claim, ...]:
    """Holds the model that is worked on against the original, and the result against its own."""
    names = [o.name for o in task.model.open(task.threads).outputs]

    def compared(claim: str, first: OnnxModel, second: OnnxModel) -> Claim:
        runners = first.open(task.threads), second.open(task.threads)
        relative = _tolerance(task.model)
        return verify_runs(claim, *runners, task.feeds, names, task.made_up, relative)

    claims = [compared(PREPARED, task.model, whole)]
    claims.append(compared(claim, reference, result))
    if states:
        one, two = (
            _streamed(model.open(task.threads), task.feeds, names, states)
            for model in (reference, result)
        )
        streamed = STREAMED.format(steps=STREAMED_STEPS)
        claims.append(verify_same(streamed, one, two, _tolerance(task.model)))
    return tuple(claims)


def _tolerance(model: OnnxModel) -> float:
    """Returns by how much outputs may differ: two steps of the coarsest type inside."""
    steps = [2 * float(np.finfo(layer.w.dtype).eps) for layer in model.layers]
    return max(RELATIVE_TOLERANCE, *steps)


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
