"""What flows through a model on real data: inner values as outputs, batch after batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli import shapes
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import locate
from rnnprune_cli.graph import Walker, subgraphs
from rnnprune_cli.model import Array, Runner
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.others import operators
from rnnprune_cli.rewrite.branches import settle
from rnnprune_cli.rewrite.edit import Editor
from rnnprune_cli.runtime import first_line

MAX_SAMPLES = 64
MAX_BYTES = 64 << 20
"""Samples that run at once, and what their outputs may take; a single sample may take more."""


_NAME = "rnnprune_cli.name"
"""Key of a node's ``meta``, which goes into no file."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model made of some samples.

    Attributes:
        values: Output name → array.
        samples: How many samples they are of.
        padded: None if every step counts; else (padded length, valid steps) of the one sample.
    """

    values: Mapping[str, Array]
    samples: int
    padded: tuple[int, int] | None = None

    def steps(self, array: Array) -> Array:
        """Drops padded steps of a value whose first axis is the steps."""
        return array if self.padded is None else array[: self.padded[1]]

    def valid(self, array: Array, units: Sequence[int]) -> Array | None:
        """Drops padded steps: along the axis that is as long as padded sequences are.

        Args:
            array: One of the values.
            units: Axes that hold no steps.

        Returns:
            None if several axes are that long.
        """
        if self.padded is None:
            return array
        length, steps = self.padded
        axes = [k for k, n in enumerate(array.shape) if n == length and k not in units]
        if len(axes) > 1:
            return None
        return array.take(range(steps), axes[0]) if axes else array


def prepared(model: OnnxModel) -> ir.Model:
    """Reads a model again, as units and layers are removed from it.

    Functions are inlined, Ifs that always go the same way become that branch, and recurrent
    operators get the names that the model's layers have; for others see :func:`other_nodes`.
    """
    graph = model.fresh()
    names = [located.name for located in locate(Walker(graph))]
    for operator in operators(Walker(graph)):
        operator.instance.node.meta[_NAME] = operator.name
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
    settle(graph, size_of(model))
    return graph


def other_nodes(graph: ir.Model) -> dict[str, ir.Node]:
    """Returns the nodes that Dense layers and embeddings may be, by the names of these.

    Args:
        graph: Result of :func:`prepared`; what is no longer executed is not in it.
    """
    nodes = graph.graph.all_nodes()
    return {node.meta[_NAME]: node for node in nodes if _NAME in node.meta}


def size_of(model: OnnxModel) -> int:
    """Returns the size of all files of a model, in bytes."""
    return sum(file.stat().st_size for file in model.files)


def expose(model: ir.Model, values: Sequence[ir.Value]) -> dict[int, str]:
    """Makes inner values outputs of a model.

    A value in a branch of an If comes out empty whenever the other branch is taken.

    Args:
        model: A model without functions, changed in place.
        values: Values of it.

    Returns:
        ``id`` of value → name of the new output; values in loops are not in it.
    """
    walker, editor = Walker(model), Editor(model, "rp")
    names: dict[int, str] = {}
    for value in values:
        if id(value) in names:
            continue
        value.name = value.name or editor.unique("rp/value")  # an output that nothing reads
        outer: ir.Value | None = value
        graph = value.graph
        while outer is not None and isinstance(graph, ir.Graph) and graph is not model.graph:
            owner = walker.owner(graph)
            outer = None if owner is None else _out_of_branch(outer, graph, owner, editor)
            graph = None if owner is None else owner.graph
        if outer is None:
            continue
        last = next(iter(reversed(list(model.graph))))
        copy = editor.one(last, "Identity", [outer])
        copy.type, copy.shape = value.type or ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(copy)
        names[id(value)] = copy.name or ""
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.sort()
    return names


def _out_of_branch(
    value: ir.Value, graph: ir.Graph, owner: ir.Node, editor: Editor
) -> ir.Value | None:
    if owner.op_type != "If":
        return None
    dtype = value.type or ir.TensorType(ir.DataType.FLOAT)
    for branch in subgraphs(owner):
        last = next(iter(reversed(list(branch))))
        if branch is graph:
            given = editor.one(last, "Identity", [value])
        else:
            empty = ir.tensor(np.zeros(0, dtype.dtype.numpy()))
            given = editor.one(last, "Constant", [], value=empty)
        given.type = dtype
        branch.outputs.append(given)
    owner.resize_outputs(len(owner.outputs) + 1)
    made = owner.outputs[-1]
    made.name, made.type = editor.unique("rp/branch"), dtype
    return made


def run_batches(
    runner: Runner, names: Sequence[str], data: Dataset, states: Mapping[str, str]
) -> Iterator[Batch]:
    """Runs a model on a data set.

    Samples of one length run together, without their padding. A model that insists on the padded
    length runs one sample at a time. States that are zero in all samples are handed back from one
    sample to the next.

    Args:
        runner: The model.
        names: The outputs to return.
        data: Samples.
        states: Input → output that hold the same state.
    """
    own = [o.name for o in runner.outputs]
    places = {name: own.index(name) for name in names}
    handed = {
        given: own.index(taken)
        for given, taken in states.items()
        if data.count > 1 and given in data.inputs and not data.inputs[given].any()
    }

    def batch(results: list[Array], samples: int, padded: tuple[int, int] | None = None) -> Batch:
        return Batch({name: results[place] for name, place in places.items()}, samples, padded)

    if handed:
        last: list[Array] = []
        for sample in range(data.count):
            steps = None if data.lengths is None else int(data.lengths[sample])
            feed = data.take(np.array([sample]), steps)
            if last:
                feed.update({name: last[place] for name, place in handed.items()})
            last = runner.run(feed)
            yield batch(last, 1)
        return
    longest = data.padded_steps or 0
    lengths = np.full(data.count, -1) if data.lengths is None else data.lengths
    at_once, most = 1, 1 if data.single else MAX_SAMPLES  # one, until it is known what it makes
    insists = False  # on the padded length
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        while len(chosen):
            some = chosen[:at_once]
            cut = length >= 0 and not insists
            first, last_one = int(some[0]), int(some[-1]) + 1
            try:
                feed = data.take(some, int(length)) if cut else data.feed(first, last_one)
                results = runner.run(feed)
            except RnnpruneError:
                if len(some) > 1:
                    at_once = most = 1
                elif cut:
                    insists, at_once, most = True, 1, 1
                else:
                    raise
                continue
            chosen = chosen[at_once:]
            each = sum(result.nbytes for result in results) / len(some)
            at_once = int(np.clip(MAX_BYTES / max(each, 1), 1, most))
            yield batch(results, len(some), (longest, int(length)) if insists else None)


def told(batches: Iterator[Batch], count: int, progress: Callable[[str], None]) -> Iterator[Batch]:
    """Tells how far the run through the data is, and how long it will take."""
    begin, done, last = time.perf_counter(), 0, 0.0
    progress(f"running {count} samples to see what is read")
    for batch in batches:
        yield batch
        done += batch.samples
        elapsed = time.perf_counter() - begin
        if elapsed > last + 1:
            last, left = elapsed, elapsed / done * (count - done)
            progress(f"sample {done} of {count}, about {left:.0f} s left")
