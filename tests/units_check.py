"""Removes hidden units from a graph and tells how far it is from the masked one. No tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from mutate import session

from rnnprune_cli import shapes
from rnnprune_cli.coupling import Coupling, Labels
from rnnprune_cli.find import find, locate
from rnnprune_cli.graph import Walker
from rnnprune_cli.rewrite.branches import settle
from rnnprune_cli.rewrite.runnable import make_runnable
from rnnprune_cli.rewrite.units import mask, shrink
from rnnprune_cli.units import choose

Array = np.ndarray[Any, np.dtype[Any]]
FILE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Removal:
    """What became of a graph without some units.

    Attributes:
        shrunk: The smaller model; None if no unit could go.
        masked: The model that it has to equal.
        kept: Layer → for each direction the units that stay.
        blocked: Layer → why none, or not all, of its units may go.
        inexact: Number of nodes that normalise over units.
        states: Input → its kept places (broadcastable) and unit axis, where its shape changes.
    """

    shrunk: onnx.ModelProto | None
    masked: onnx.ModelProto | None
    kept: Mapping[str, Sequence[Sequence[int]]]
    blocked: Mapping[str, str]
    inexact: int
    states: Mapping[str, tuple[Array, int]]

    def fed(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Returns a feed of the original model as these take it."""
        found = dict(feed)
        for name, (keep, axis) in self.states.items():
            value = found[name]
            mask_ = np.moveaxis(np.broadcast_to(keep, value.shape), axis, -1)
            left = np.moveaxis(value, axis, -1)[mask_].reshape(*mask_.shape[:-1], -1)
            found[name] = np.ascontiguousarray(np.moveaxis(left, -1, axis))
        return found


def coupled(proto: onnx.ModelProto, **options: bool) -> Coupling:
    """Returns the coupling of a model, as the pipeline makes it."""
    own = onnx.ModelProto()
    own.CopyFrom(proto)  # onnx-ir renames the tensors of what it reads
    model = ir.from_proto(own)
    shapes.complete(model)
    settle(model, FILE_BYTES)
    return Coupling(model, find(Walker(model), FILE_BYTES), FILE_BYTES, **options)


def remove(
    proto: onnx.ModelProto, share: float, seed: int, scope: str = "layer", **options: bool
) -> Removal:
    """Removes units with random scores.

    Args:
        proto: The model.
        share: Of units to remove.
        seed: Of the scores.
        scope: See ``choose``.
        options: Of ``Coupling``.
    """
    coupling = coupled(proto, **options)
    classes = coupling.classes
    scores = np.random.default_rng(seed).random(len(classes))[classes.of(np.arange(len(classes)))]
    names = [layer.name for layer in coupling.layers]
    chosen = choose(coupling, scores, names, share, scope)
    kept = {
        layer.name: [[int(k) for k in np.flatnonzero(~chosen.removed[row])] for row in layer.labels]
        for layer in coupling.layers
    }
    inexact = len(coupling.inexact)
    if not chosen.removed.any():
        return Removal(None, None, kept, chosen.blocked, inexact, {})
    resize = options.get("resize_state", False)

    def keeps(labels: Labels | None) -> tuple[Array, int]:
        assert labels is not None
        return ~chosen.removed[classes.of(labels.array)], labels.axis

    states = {
        state.input.name or "": keeps(coupling.of(state.input))
        for state in coupling.states
        if resize and state.input is not None
    }
    shrink(coupling, chosen.removed, {}, resize)
    other = coupled(proto, **options)
    mask(other, chosen.removed, {}, resize)
    shrunk, masked = ir.to_proto(coupling.model), ir.to_proto(other.model)
    return Removal(shrunk, masked, kept, chosen.blocked, inexact, states)


def runnable(proto: onnx.ModelProto) -> ort.InferenceSession:
    """Opens a model, or its equivalent that onnxruntime's CPU kernels run."""
    model = ir.from_proto(proto)
    walker = Walker(model)
    found = find(walker, FILE_BYTES).by_name
    make_runnable(
        walker, [(x.instance.node, found[x.name]) for x in locate(walker) if x.name in found]
    )
    return session(ir.to_proto(model))


def distance(one: Sequence[Array], other: Sequence[Array]) -> float:
    """Returns the largest difference, relative to the largest number; infinity for other shapes."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or np.isnan(a).any() or np.isnan(b).any():
            return float("inf")
        if a.size:
            size = max(float(np.abs(a.astype(np.float64)).max()), 1e-2)
            worst = max(worst, float(np.abs(a.astype(np.float64) - b).max()) / size)
    return worst
