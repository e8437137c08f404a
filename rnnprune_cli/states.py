"""What recurrent operators read at each step of a batch, worked out from what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.calibrate import Batch
from rnnprune_cli.graph import input_of
from rnnprune_cli.model import Array, BoolArray

FED = (0, 4, 5)
"""Inputs of a recurrent operator that must be watched besides its Y: X, the lengths of sequences
and the initial state."""


@dataclass(frozen=True, eq=False)
class Steps:
    """One operator in one batch, without padded steps.

    Attributes:
        x: ``[steps, batch, inputs]``; None if it was not watched.
        y: ``[steps, directions, batch, units]``.
        start: The initial state, ``[directions, batch, units]``.
        lengths: Valid steps of each sequence, where the operator is told (``sequence_lens``).
    """

    x: Array | None
    y: Array
    start: Array
    lengths: Array | None = None

    @property
    def valid(self) -> BoolArray:
        """Marks the steps that the operator computes, ``[steps, batch]``."""
        steps, _, samples, _ = self.y.shape
        if self.lengths is None:
            return np.ones((steps, samples), np.bool_)
        return np.asarray(np.arange(steps)[:, None] < self.lengths)

    def before(self, node: ir.Node) -> Array:
        """Returns the states before each step, ``[directions, steps, batch, units]``."""
        backward = node.attributes.get_string("direction", "forward") == "reverse"
        parts = []
        for d, begin in enumerate(self.start[:, None]):
            own = self.y[:, d]
            turned = backward or d == 1
            states = np.concatenate([own[1:], begin] if turned else [begin, own[:-1]])
            if turned and self.lengths is not None:
                samples = np.arange(len(self.lengths))
                states[self.lengths - 1, samples] = begin[0]
            parts.append(states)
        return np.stack(parts)


def fed(node: ir.Node) -> list[ir.Value]:
    """Returns what must be watched to know the steps of an operator, besides its Y."""
    lengths = input_of(node, 4)
    if lengths is not None and lengths.type is None:
        lengths.type = ir.TensorType(ir.DataType.INT32)  # the only one that there is
    return [value for index in FED if (value := input_of(node, index)) is not None]


def steps_of(node: ir.Node, batch: Batch, names: Mapping[int, str]) -> Steps | None:
    """Returns what an operator read and made.

    Args:
        node: LSTM, GRU or RNN.
        batch: What the model made of some samples.
        names: ``id`` of value → its name in there.

    Returns:
        None if it did not run: the other branch was taken.
    """

    def watched(value: ir.Value | None) -> Array | None:
        found = None if value is None else batch.values.get(names.get(id(value), ""))
        return None if found is None or found.size == 0 else found

    y, x, lengths, start = map(watched, (node.outputs[0], *(input_of(node, k) for k in FED)))
    if y is None:
        return None
    if node.attributes.get_int("layout", 0) == 1:
        y = y.transpose(1, 2, 0, 3)
        x = None if x is None else x.transpose(1, 0, 2)
        start = None if start is None else start.transpose(1, 0, 2)
    if start is None:
        start = np.zeros((y.shape[1], *y.shape[2:]), y.dtype)
    y = batch.steps(y)
    if lengths is not None:
        lengths = np.minimum(lengths, len(y))
    return Steps(None if x is None else batch.steps(x), y, start, lengths)


def gates_first(node: ir.Node) -> bool:
    """Tells whether it is a GRU whose reset gate comes before the product with R."""
    return node.op_type == "GRU" and not node.attributes.get_int("linear_before_reset", 0)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda a: (1 + np.tanh(a / 2)) / 2,
    "hardsigmoid": lambda a: np.clip(0.2 * a + 0.5, 0, 1),
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
}


def reset_gate(
    node: ir.Node, x: Array, before: Array, weights: Sequence[Array | None]
) -> Array | None:
    """Returns a GRU's reset gate (ONNX specification of GRU: ``r_t``).

    Args:
        node: The GRU.
        x: ``[steps, batch, inputs]``.
        before: States before each step, ``[directions, steps, batch, units]``.
        weights: W, R and B (or None), in ONNX layout.

    Returns:
        ``[directions, steps, batch, units]``; None if its activation is not known.
    """
    w, r, b = weights
    assert w is not None and r is not None
    n = r.shape[2]
    gates = slice(n, 2 * n)
    names = list(node.attributes.get_strings("activations", ()) or ())
    limit = node.attributes.get_float("clip", None)
    parts = []
    for d in range(len(r)):
        function = _FUNCTIONS.get(names[2 * d].lower() if names else "sigmoid")
        if function is None or (names and node.attributes.get("activation_alpha") is not None):
            return None
        total = x.astype(np.float64) @ w[d, gates].T + before[d] @ r[d, gates].T
        if b is not None:
            total += b[d, gates] + b[d, 4 * n : 5 * n]
        if limit is not None:
            total = np.clip(total, -limit, limit)
        parts.append(function(total))
    return np.stack(parts)
