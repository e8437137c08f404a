"""What removing units and removing layers share: the model, prepared, and its verification."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import Batch, expose, prepared, run_batches, size_of, told
from rnnprune_cli.coupling import Coupling
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import NothingRemovedError, RnnpruneError, UsageError
from rnnprune_cli.find import find
from rnnprune_cli.graph import Walker
from rnnprune_cli.methods import Method
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Claim,
    Feed,
    KeptUnits,
    Repair,
    ResizedState,
    Runner,
    Stage,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.rewrite.build import MIN_IR_INITIALIZERS
from rnnprune_cli.verify import RELATIVE_TOLERANCE, verify_runs, verify_same

PREPARED = "with nothing removed, the model computes what the original computes"
STREAMED = "and so it does over {steps} calls with the state handed back"
STREAMED_STEPS = 8


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
        first: Layer → units ``[directions, hidden]`` that go before all others.
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
    first: Mapping[str, BoolArray] = field(default_factory=dict)

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
        return names, told(running, self.calibration.count, self.progress)


def coupled(model: OnnxModel, allow_inexact: bool = False, resize_state: bool = False) -> Coupling:
    """Reads a model again and finds out what goes together.

    Args:
        model: The model.
        allow_inexact: Whether normalisation over units lets units go.
        resize_state: Whether states may change their public shape.
    """
    graph, size = prepared(model), size_of(model)
    return Coupling(graph, find(Walker(graph), size), size, allow_inexact, resize_state)


def method_of(task: Task) -> Method:
    """Returns the criterion.

    Raises:
        UsageError: If it needs data and there are none.
    """
    method = find_method(task.stage.method)
    if method.needs_data and task.calibration is None:
        raise UsageError(
            f"method '{method.name}' scores what data make of a model",
            "give --data, or --calibration",
        )
    return method


def nothing_removed(model: OnnxModel, blocked: Mapping[str, str], stage: Stage) -> RnnpruneError:
    """Returns the error that says why nothing could be removed."""
    # What holds some units of a layer is no reason for none to go.
    layers = stage.granularity == "layer"
    whole = {name: why for name, why in blocked.items() if not re.match(r"\d+ of \d+ units: ", why)}
    for name, reason in whole.items():
        more = f" ({len(whole) - 1} more layers)" if len(whole) > 1 else ""
        why, _, hint = reason.partition("; ")
        return RnnpruneError(
            f"no {stage.granularity} of {model.path} can be removed: '{name}': {why}{more}",
            hint or ("--granularity weight works" + (" and so may unit" if layers else "")),
        )
    return NothingRemovedError(
        f"sparsity {stage.sparsity:g} removes not a single {stage.granularity}: there are too few",
        "ask for a higher --sparsity" if stage.granularity == "unit" else "one layer has to stay",
    )


def compared(task: Task, claim: str, one: Runner, two: Runner) -> Claim:
    """Holds two models against each other on the task's inputs."""
    names = [o.name for o in one.outputs]
    relative = tolerance(task.model)
    return verify_runs(claim, one, two, task.feeds, names, task.made_up, relative)


def verified(
    task: Task,
    whole: OnnxModel,
    reference: OnnxModel,
    result: OnnxModel,
    claim: str,
    states: Mapping[str, str],
) -> tuple[Claim, ...]:
    """Holds the model that is worked on against the original, and the result against its own."""
    threads = task.threads
    claims = [compared(task, PREPARED, task.model.open(threads), whole.open(threads))]
    one, two = reference.open(threads), result.open(threads)
    claims.append(compared(task, claim, one, two))
    if states:
        first, second = (_streamed(runner, task.feeds, states) for runner in (one, two))
        streamed = STREAMED.format(steps=STREAMED_STEPS)
        claims.append(verify_same(streamed, first, second, tolerance(task.model)))
    return tuple(claims)


def tolerance(model: OnnxModel) -> float:
    """Returns by how much outputs may differ: two steps of the coarsest type inside."""
    steps = [2 * float(np.finfo(layer.w.dtype).eps) for layer in model.layers]
    return max(RELATIVE_TOLERANCE, *steps)


def _streamed(
    runner: Runner, feeds: Sequence[Feed], states: Mapping[str, str]
) -> list[list[Array]]:
    """Runs a model again and again, each time with the states that it handed out."""
    own = [o.name for o in runner.outputs]
    results: list[list[Array]] = []
    for feed in feeds:
        now = dict(feed)
        for _ in range(STREAMED_STEPS):
            results.append(runner.run(now))
            now.update({given: results[-1][own.index(taken)] for given, taken in states.items()})
    return results
