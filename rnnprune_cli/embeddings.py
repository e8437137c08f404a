"""Embeddings: entries that the data never use become zero, and cost nothing when packed.

This is no criterion with a score: what is never read can go without any loss on the data, whatever
the sparsity. An index that occurs only outside the data reads zeros afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import (
    MAX_SAMPLES,
    expose,
    other_nodes,
    prepared,
    run_batches,
    told,
)
from rnnprune_cli.data import Dataset
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Claim,
    OtherLayer,
    Runner,
    StoredWeight,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.verify import run_all, verify_same

CLAIM = "entries of embeddings that the data never use make no difference on the data"


@dataclass(frozen=True, eq=False)
class Unused:
    """What becomes of embeddings.

    Attributes:
        pruned: Weight name → what becomes of it.
        blocked: Layer name → why nothing of it can go.
        claims: What was verified.
        warnings: What the user should know.
    """

    pruned: Mapping[str, StoredWeight]
    blocked: Mapping[str, str]
    claims: tuple[Claim, ...]
    warnings: tuple[str, ...]


def remove_unused(
    model: OnnxModel,
    layers: Sequence[OtherLayer],
    data: Dataset,
    folder: Path,
    threads: int,
    progress: Callable[[str], None],
) -> Unused:
    """Finds entries of embeddings that the data never use.

    1. Run the model on the data and note which entries are read; padded steps count, too, because
       a model may let them reach others.
    2. Run it again, with zeros for the entries that are not, and compare.

    Args:
        model: The model.
        layers: Embeddings of it. One that shares its entries with another loses only what both do
            not use, and nothing if that is not among them.
        data: Real inputs.
        folder: Existing folder, for the model that is run.
        threads: Threads to run with.
        progress: Called with how far it is.
    """
    used = _used(model, data, folder, threads, progress)
    pruned: dict[str, StoredWeight] = {}
    blocked: dict[str, str] = {}
    warnings: list[str] = []
    for weight in dict.fromkeys(layer.w for layer in layers):
        readers = [layer for layer in model.others.layers if layer.w is weight]
        found = _together(readers, layers, used)
        names = [layer.name for layer in readers if layer in layers]
        if isinstance(found, str):
            blocked.update(dict.fromkeys(names, found))
            continue
        gone = len(found) - np.count_nonzero(found)
        if not gone:
            blocked.update(dict.fromkeys(names, "the data use all of its entries"))
            continue
        mask = np.repeat(found[None, :, None], weight.shape[2], axis=2)
        pruned[weight.name] = StoredWeight(weight, mask)
        warnings.append(
            f"'{names[0]}': {gone} of {len(found)} entries never occur in the data and became"
            " zero; inputs that use them read zeros"
        )
    claims = (_verified(model, pruned, data, threads),) if pruned else ()
    return Unused(pruned, blocked, claims, tuple(warnings))


def _together(
    readers: Sequence[OtherLayer],
    chosen: Sequence[OtherLayer],
    used: Mapping[str, BoolArray | str],
) -> BoolArray | str:
    """Returns which entries some layer uses of those that share them, or why it is not known."""
    parts: list[BoolArray] = []
    for layer in readers:
        if layer not in chosen:
            return f"shares its entries with '{layer.name}', not selected"
        found = used[layer.name]
        if isinstance(found, str):
            return found
        parts.append(found)
    every: BoolArray = np.logical_or.reduce(parts)
    return every if every.any() else "the data never reach it"


def _used(
    model: OnnxModel,
    data: Dataset,
    folder: Path,
    threads: int,
    progress: Callable[[str], None],
) -> dict[str, BoolArray | str]:
    """Returns which entries of each embedding the data use, or why that cannot be told."""
    graph = prepared(model)
    nodes = other_nodes(graph)
    embeddings = {o.name: o.w for o in model.others.layers if o.kind == "embedding"}
    indices: dict[str, ir.Value] = {}
    found: dict[str, BoolArray | str] = {}
    for name, weight in embeddings.items():
        value = nodes[name].inputs[1] if name in nodes else None
        found[name] = np.zeros(weight.shape[1], np.bool_)
        if value is not None and value.type is None:
            found[name] = "it is not known of what type its indices are"
        elif value is not None:
            indices[name] = value
    names = expose(graph, list(indices.values()))
    for name, value in list(indices.items()):
        if id(value) not in names:
            found[name] = "it is in a loop, where it cannot be watched"
            del indices[name]
    path = folder / "indices.onnx"
    model.write_graph(graph, path)
    runner = OnnxModel(path, model.path, model.lifts).open(threads)
    outputs = list(dict.fromkeys(names.values()))
    for values in _values(runner, outputs, data, progress):
        for name, value in indices.items():
            marks = found[name]
            assert not isinstance(marks, str)
            marks[values[names[id(value)]].reshape(-1)] = True  # negative ones count from the end
    return found


def _values(
    runner: Runner, outputs: Sequence[str], data: Dataset, progress: Callable[[str], None]
) -> Iterator[Mapping[str, Array]]:
    """Yields what a model makes of data: without their padding, and with it."""
    for batch in told(run_batches(runner, outputs, data, {}), data.count, progress):
        yield batch.values
    if data.lengths is not None:
        for start, stop in data.batches(MAX_SAMPLES):
            (values,) = run_all(runner, [data.feed(start, stop)], outputs)
            yield dict(zip(outputs, values, strict=True))


def _verified(
    model: OnnxModel, pruned: Mapping[str, StoredWeight], data: Dataset, threads: int
) -> Claim:
    """Holds the model without unused entries against the model as it is, on all of the data."""
    original, masked = model.open(threads), model.open_masked(pruned, threads)
    names = [output.name for output in original.outputs]
    claims = []
    for start, stop in data.batches(MAX_SAMPLES):
        feeds = [data.feed(start, stop)]
        both = run_all(original, feeds, names), run_all(masked, feeds, names)
        claims.append(verify_same(CLAIM, *both))
    return max(claims, key=lambda claim: (not claim.passed, claim.max_abs))
