"""LSTM, GRU and RNN written from the ONNX operator specification, for onnx's own evaluator.

The evaluator of onnx leaves out directions, sequence lengths, clipping and most activations of
the recurrent operators, so hand-made graphs are evaluated with these classes in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray
Activation = Callable[[Array], Array]


def sigmoid(x: Array) -> Array:
    """Logistic function."""
    return np.asarray(1 / (1 + np.exp(-x)))


def activation(name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    """Make an activation, taking the parameters it needs from the node's lists."""
    match name:
        case "Sigmoid":
            return sigmoid
        case "Tanh":
            return np.tanh
        case "Relu":
            return lambda x: np.maximum(x, 0)
        case "Softsign":
            return lambda x: x / (1 + np.abs(x))
        case "HardSigmoid":
            gain, offset = next(alphas), next(betas)
            return lambda x: np.clip(gain * x + offset, 0, 1)
        case "ScaledTanh":
            outer, inner = next(alphas), next(betas)
            return lambda x: outer * np.tanh(inner * x)
    raise NotImplementedError(f"activation {name}")


class Direction(NamedTuple):
    """The weights and settings of one direction of a node."""

    w: Array
    r: Array
    b: Array
    peepholes: Array
    activations: list[Activation]
    clip: Activation
    attributes: dict[str, Any]


class Recurrent(OpRun):
    """What the three operators share: directions, layout, sequence lengths."""

    op_domain = ""
    gates: int
    defaults: tuple[str, ...]
    state_count = 1

    def _run(self, *given: Array | None, **attributes: Any) -> tuple[Array, ...]:
        x, w, r, b, lens, h0, c0, p = list(given) + [None] * (8 - len(given))
        if x is None or w is None or r is None:
            raise ValueError("X, W and R must be given")
        initial = [h0, c0][: self.state_count]
        batchwise = bool(attributes.get("layout"))
        if batchwise:
            x = x.swapaxes(0, 1)
            initial = [None if s is None else s.swapaxes(0, 1) for s in initial]
        steps, batch = x.shape[:2]
        dirs, hidden = w.shape[0], r.shape[-1]
        names = attributes.get("activations") or self.defaults * dirs
        alphas = iter(attributes.get("activation_alpha") or ())
        betas = iter(attributes.get("activation_beta") or ())
        activations = [activation(name, alphas, betas) for name in names]
        bound = attributes.get("clip") or np.inf
        b = np.zeros((dirs, 2 * self.gates * hidden), x.dtype) if b is None else b
        p = np.zeros((dirs, 3 * hidden), x.dtype) if p is None else p
        y = np.zeros((steps, dirs, batch, hidden), x.dtype)
        last = [np.zeros((dirs, batch, hidden), x.dtype) for _ in initial]
        for d in range(dirs):
            part = slice(d * len(self.defaults), (d + 1) * len(self.defaults))
            way = Direction(
                w[d], r[d], b[d], p[d], activations[part], partial(clip, bound), attributes
            )
            backward = d == 1 or attributes.get("direction") == "reverse"
            for n in range(batch):
                state = [np.zeros(hidden, x.dtype) if s is None else s[d, n] for s in initial]
                order = range(steps if lens is None else int(lens[n]))
                for t in reversed(order) if backward else order:
                    state = self.step(x[t, n], state, way)
                    y[t, d, n] = state[0]
                for kept, value in zip(last, state, strict=True):
                    kept[d, n] = value
        if batchwise:
            return y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in last)
        return y, *last

    def step(self, x: Array, state: list[Array], way: Direction) -> list[Array]:
        """One time step of one sequence in one direction: the next state, output first."""
        raise NotImplementedError


def clip(bound: float, x: Array) -> Array:
    """Limit what goes into an activation."""
    return np.asarray(np.clip(x, -bound, bound))


class LSTM(Recurrent):
    """Gates in the order input, output, forget, cell."""

    gates = 4
    defaults = ("Sigmoid", "Tanh", "Tanh")
    state_count = 2

    def step(self, x: Array, state: list[Array], way: Direction) -> list[Array]:
        """See the base class."""
        h, c = state
        f, g, out = way.activations
        rows = 4 * len(h)
        pi, po, pf = way.peepholes.reshape(3, -1)
        gates = way.w @ x + way.r @ h + way.b[:rows] + way.b[rows:]
        i, o, forget, cell = gates.reshape(4, -1)
        i = f(way.clip(i + pi * c))
        coupled = way.attributes.get("input_forget")
        forget = 1 - i if coupled else f(way.clip(forget + pf * c))
        c = forget * c + i * g(way.clip(cell))
        return [f(way.clip(o + po * c)) * out(c), c]


class GRU(Recurrent):
    """Gates in the order update, reset, hidden."""

    gates = 3
    defaults = ("Sigmoid", "Tanh")

    def step(self, x: Array, state: list[Array], way: Direction) -> list[Array]:
        """See the base class."""
        (h,) = state
        f, g = way.activations
        rows = 3 * len(h)
        xz, xr, xh = (way.w @ x + way.b[:rows]).reshape(3, -1)
        rz, rr, rh = way.r.reshape(3, len(h), -1)
        bz, br, bh = way.b[rows:].reshape(3, -1)
        z = f(way.clip(xz + rz @ h + bz))
        reset = f(way.clip(xr + rr @ h + br))
        after = way.attributes.get("linear_before_reset")
        inner = reset * (rh @ h + bh) if after else rh @ (reset * h) + bh
        return [(1 - z) * g(way.clip(xh + inner)) + z * h]


class RNN(Recurrent):
    """One gate."""

    gates = 1
    defaults = ("Tanh",)

    def step(self, x: Array, state: list[Array], way: Direction) -> list[Array]:
        """See the base class."""
        (h,) = state
        (f,) = way.activations
        return [f(way.clip(way.w @ x + way.r @ h + way.b[: len(h)] + way.b[len(h) :]))]
