"""Recurrent cells in plain NumPy, float64, written from the ONNX specification; an oracle.

Nothing of rnnprune is used, so that the two can be held against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from conftest import Graph
from onnx import TensorProto, helper


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


@dataclass(frozen=True)
class Trace:
    """What one direction of a layer went through, one row for each step of each sequence.

    Attributes:
        x: Inputs.
        h: States before the step.
        reset: Reset gates of a GRU; zeros for others.
        y: States after the step, ``[steps, batch, hidden]``; zeros in padding.
    """

    x: np.ndarray
    h: np.ndarray
    reset: np.ndarray
    y: np.ndarray

    @property
    def read(self) -> np.ndarray:
        """What all gates read, ``[samples, inputs + hidden]``."""
        return np.concatenate([self.x, self.h], axis=1)


def trace(
    op: str,
    tensors: dict[str, np.ndarray],
    x: np.ndarray,
    direction: str = "forward",
    linear_before_reset: int = 0,
    lengths: np.ndarray | None = None,
    h0: np.ndarray | None = None,
    c0: np.ndarray | None = None,
) -> list[Trace]:
    """Steps through ``x [steps, batch, inputs]``, sequence after sequence, for each direction."""
    w, r = (tensors[k].astype(np.float64) for k in "WR")
    steps, batch, _ = x.shape
    n = r.shape[2]
    rows = w.shape[1]
    b = tensors["B"].astype(np.float64) if "B" in tensors else np.zeros((len(w), 2 * rows))
    found = []
    for d in range(len(w)):
        xs, hs, resets, y = [], [], [], np.zeros((steps, batch, n))
        for k in range(batch):
            length = steps if lengths is None else int(lengths[k])
            order = range(length)
            if direction == "reverse" or d == 1:
                order = reversed(order)
            h = np.zeros(n) if h0 is None else h0[d, k].astype(np.float64)
            c = np.zeros(n) if c0 is None else c0[d, k].astype(np.float64)
            for t in order:
                now = x[t, k].astype(np.float64)
                xs.append(now)
                hs.append(h)
                h, c, reset = _step(op, w[d], r[d], b[d], now, h, c, linear_before_reset)
                resets.append(reset)
                y[t, k] = h
        found.append(Trace(np.array(xs), np.array(hs), np.array(resets), y))
    return found


def _step(op, w, r, b, x, h, c, linear_before_reset):
    n = len(h)
    wb, rb = np.split(b, 2)
    none = np.zeros(n)
    if op == "RNN":
        return np.tanh(w @ x + wb + r @ h + rb), c, none
    if op == "LSTM":
        i, o, f, g = np.split(w @ x + wb + r @ h + rb, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c, none
    wx = np.split(w @ x + wb, 3)
    (rz, rr, rh), (bz, br, bh) = np.split(r, 3), np.split(rb, 3)
    z, reset = sigmoid(wx[0] + rz @ h + bz), sigmoid(wx[1] + rr @ h + br)
    if linear_before_reset:
        new = np.tanh(wx[2] + reset * (rh @ h + bh))
    else:
        new = np.tanh(wx[2] + rh @ (reset * h) + bh)
    return (1 - z) * new + z * h, c, reset


def second_moment(samples: np.ndarray) -> np.ndarray:
    """``E[v vᵀ]`` over ``[samples, n]``."""
    return samples.T @ samples / len(samples)


def layer_model(
    op: str,
    direction: str,
    tensors: dict[str, np.ndarray],
    reset: int = 0,
    extra: tuple[tuple[int, str], ...] = (),
    dtype: type = np.float32,
    **attributes: object,
) -> onnx.ModelProto:
    """x [batch, steps, inputs] → y; ``extra``: (input of the operator, input of the model)."""
    directions, _, inputs = tensors["W"].shape
    hidden = tensors["R"].shape[2]
    g = Graph(["batch", "time", inputs])
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    g.inputs[0] = helper.make_tensor_value_info("x", elem, ["batch", "time", inputs])
    values: list[str | np.ndarray | None] = [None] * 7
    values[0] = "x" if attributes.get("layout") else g.op("Transpose", "x", perm=[1, 0, 2])
    for index, name in enumerate("WRB", start=1):
        values[index] = tensors[name].astype(dtype) if name in tensors else None
    for index, name in extra:
        if index == 4:
            info = helper.make_tensor_value_info(name, TensorProto.INT32, ["batch"])
            values[4] = name
        else:
            info = helper.make_tensor_value_info(name, elem, ["batch", directions, hidden])
            own = name if attributes.get("layout") else g.op("Transpose", name, perm=[1, 0, 2])
            values[index] = own
        g.inputs.append(info)
    if op == "GRU":
        attributes["linear_before_reset"] = reset
    while values[-1] is None:
        values.pop()
    y = g.op(op, *values, hidden_size=hidden, direction=direction, **attributes)
    if attributes.get("layout"):
        g.outputs.append(helper.make_tensor_value_info(y, elem, None))
        graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=8
        )
    g.output(y)
    return g.model()
