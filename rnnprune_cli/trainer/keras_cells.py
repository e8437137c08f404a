"""LSTM, GRU and RNN as Keras traces its layers.

Each direction is a loop of its own that does everything step by step, with the very operators that
Keras uses, so that whatever knows these loops (tf2onnx, this package) makes layers of them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rnnprune_cli.trainer import recurrent
from rnnprune_cli.trainer.call import Call, Operator, Value, tf

_State = tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """The weights of one direction, as Keras has them.

    Attributes:
        w: ``[inputs, gates * hidden]``, gates in the order of :mod:`rnnprune_cli.gate_order`.
        r: ``[hidden, gates * hidden]``.
        bias: ``[gates * hidden]``, or ``[2, gates * hidden]`` of a GRU whose reset gate comes last:
            what goes with ``w`` and with ``r``; None for zeros.
    """

    w: Value
    r: Value
    bias: Value


@dataclass(frozen=True, eq=False)
class _Own:
    """What a cell has: the values of a :class:`Kernel`, the halves of the bias apart."""

    w: Value
    r: Value
    biases: Sequence[Value]
    functions: Sequence[recurrent.Function]

    def biased(self, x: Value, half: int = 0) -> Value:
        """Adds a half of the bias."""
        return tf.nn.bias_add(x, self.biases[half]) if self.biases else x


def _lstm(own: _Own, x: Value, states: _State) -> _State:
    f, g, out = own.functions
    h, c = states
    gates = own.biased(tf.matmul(x, own.w) + tf.matmul(h, own.r))
    i, forget, cell, o = tf.split(gates, 4, 1)
    c = f(forget) * c + f(i) * g(cell)
    return f(o) * out(c), c


def _gru_after(own: _Own, x: Value, states: _State) -> _State:
    """The reset gate multiplies what comes out of the product with the state."""
    f, g = own.functions
    (h,) = states
    z, r, new = tf.split(own.biased(tf.matmul(x, own.w)), 3, 1)
    inner_z, inner_r, inner = tf.split(own.biased(tf.matmul(h, own.r), 1), 3, 1)
    z = f(z + inner_z)
    new = g(new + f(r + inner_r) * inner)
    return (z * h + (1 - z) * new,)


def _gru_before(own: _Own, x: Value, states: _State) -> _State:
    """The reset gate multiplies the state."""
    f, g = own.functions
    (h,) = states
    kept = 2 * int(own.r.shape[0])
    z, r, new = tf.split(own.biased(tf.matmul(x, own.w)), 3, 1)
    inner_z, inner_r = tf.split(tf.matmul(h, own.r[:, :kept]), 2, 1)
    z = f(z + inner_z)
    new = g(new + tf.matmul(f(r + inner_r) * h, own.r[:, kept:]))
    return (z * h + (1 - z) * new,)


def _rnn(own: _Own, x: Value, states: _State) -> _State:
    (f,) = own.functions
    return (f(own.biased(tf.matmul(x, own.w)) + tf.matmul(states[0], own.r)),)


def _keras(
    call: Call,
    x: Value,
    kernels: tuple[Kernel, ...],
    _r: Value = None,
    _b: Value = None,
    lengths: Value = None,
    h: Value = None,
    c: Value = None,
) -> _State:
    """Runs an operator; see :func:`recurrent.recurrent`.

    Args:
        call: The node.
        x: The input.
        kernels: One for each direction, in place of W, R and B.
        lengths: Of padded sequences.
        h: Initial state.
        c: Initial state.
    """
    after = bool(call.get("linear_before_reset", 0))
    cell = {"LSTM": _lstm, "GRU": _gru_after if after else _gru_before, "RNN": _rnn}[call.op]
    functions = recurrent.activations(call)
    ends = None if lengths is None else tf.cast(lengths, tf.int32)

    def run(k: int, x: Value, initial: _State) -> _State:
        inputs, steps = recurrent.array_of(x), tf.shape(x)[0]
        w, r = (tf.cast(v, x.dtype) for v in (kernels[k].w, kernels[k].r))
        bias = kernels[k].bias
        biases = [] if bias is None else [tf.cast(bias, x.dtype)]
        if bias is not None and bias.shape.rank > 1:
            biases = tf.unstack(biases[0])
        own = _Own(w, r, biases, functions[k])

        def body(t: Value, states: _State, outputs: Value) -> tuple[Value, _State, Value]:
            new = cell(own, inputs.read(t), states)
            y = new[0]
            if ends is not None:
                valid = (t < ends)[:, None]
                y = tf.where(valid, y, tf.zeros_like(y))
                new = tuple(tf.where(valid, n, s) for n, s in zip(new, states, strict=True))
            return t + 1, new, outputs.write(t, y)

        _, last, outputs = tf.while_loop(
            lambda t, *_: t < steps,
            body,
            (0, initial, tf.TensorArray(x.dtype, steps)),
            maximum_iterations=steps,
        )
        return (outputs.stack(), *last)

    return recurrent.by_direction(call, x, lengths, (h, c), int(kernels[0].r.shape[0]), run)


def _operator(call: Call, x: Value, w: Value, *others: Value) -> _State:
    """Runs an operator as Keras does, if its weights are kernels."""
    run = _keras if isinstance(w, tuple) else recurrent.recurrent
    return run(call, x, w, *others)


OPERATORS: dict[str, Operator] = dict.fromkeys(recurrent.OPERATORS, _operator)
