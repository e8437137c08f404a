"""LSTM, GRU and RNN.

Source of all semantics: the ONNX operator specification (onnx.ai/onnx/operators), and onnxruntime
where that leaves something open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rnnprune_cli.model import GATES, Op
from rnnprune_cli.trainer.call import Call, Operator, Value, sizes, tf
from rnnprune_cli.trainer.elementwise import ACTIVATIONS, activation

_DEFAULTS: dict[Op, tuple[str, ...]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}

Function = Callable[..., Value]
Values = tuple[Value, ...]
Product = Callable[[int, Value], Value]
"""(k, vector ``[batch, hidden]``) → its product with the k-th recurrent matrix."""
Step = Callable[[Value, Values, Values, Product], Values]
"""(what inputs and biases add to the gates ``[batch, gates * hidden]``, states, vectors, product)
→ new states, h first. The first product is with h."""


@dataclass(frozen=True, eq=False)
class _Cell:
    """One direction of an operator.

    Attributes:
        step: What it does at each step.
        matrices: What states are multiplied with, each ``[hidden, …]``.
        vectors: What else it has that is trained.
    """

    step: Step
    matrices: Values
    vectors: Values


def _lstm(
    call: Call, r: Value, bias: Value, peepholes: Value, functions: Sequence[Function]
) -> _Cell:
    """Gates in the order input, output, forget, cell."""
    f, g, out = functions
    coupled = bool(call.get("input_forget", 0))

    def step(gates: Value, states: Values, vectors: Values, product: Product) -> Values:
        h, c = states
        i, o, forget, cell = tf.split(gates + product(0, h), 4, 1)
        if not vectors:
            i = f(i)
            forget = 1 - i if coupled else f(forget)
            c = forget * c + i * g(cell)
            return f(o) * out(c), c
        pi, po, pf = tf.split(vectors[0], 3)
        i = f(i + pi * c)
        forget = 1 - i if coupled else f(forget + pf * c)
        c = forget * c + i * g(cell)
        return f(o + po * c) * out(c), c

    return _Cell(step, (tf.transpose(r),), () if peepholes is None else (peepholes,))


def _gru(
    call: Call, r: Value, bias: Value, peepholes: Value, functions: Sequence[Function]
) -> _Cell:
    """Gates in the order update, reset, hidden."""
    f, g = functions
    hidden, turned = r.shape[1], tf.transpose(r)

    def before(gates: Value, states: Values, vectors: Values, product: Product) -> Values:
        (h,) = states
        both, new = tf.split(gates, [2 * hidden, hidden], 1)
        update, reset = tf.split(f(both + product(0, h)), 2, 1)
        new = g(new + product(1, reset * h))
        return (new + update * (h - new),)

    def after(gates: Value, states: Values, vectors: Values, product: Product) -> Values:
        (h,) = states
        both, new = tf.split(gates, [2 * hidden, hidden], 1)
        own, inner = tf.split(product(0, h), [2 * hidden, hidden], 1)
        update, reset = tf.split(f(both + own), 2, 1)
        new = g(new + reset * (inner + vectors[0] if vectors else inner))
        return (new + update * (h - new),)

    if call.get("linear_before_reset", 0):
        vectors = () if bias is None else (tf.split(bias, 3)[2],)
        return _Cell(after, (turned,), vectors)
    return _Cell(before, tuple(tf.split(turned, [2 * hidden, hidden], 1)), ())


def _rnn(
    call: Call, r: Value, bias: Value, peepholes: Value, functions: Sequence[Function]
) -> _Cell:
    """One gate."""
    (f,) = functions

    def step(gates: Value, states: Values, vectors: Values, product: Product) -> Values:
        return (f(gates + product(0, states[0])),)

    return _Cell(step, (tf.transpose(r),), ())


_CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def recurrent(
    call: Call,
    x: Value,
    w: Value,
    r: Value,
    b: Value = None,
    lengths: Value = None,
    h: Value = None,
    c: Value = None,
    p: Value = None,
) -> tuple[Value, ...]:
    """Runs an operator.

    Args:
        call: The node.
        x: ``[steps, batch, inputs]``, or ``[batch, steps, inputs]`` with ``layout=1``.
        w: ``[directions, gates * hidden, inputs]``.
        r: ``[directions, gates * hidden, hidden]``.
        b: ``[directions, 2 * gates * hidden]``.
        lengths: int ``[batch]``.
        h: ``[directions, batch, hidden]``, or ``[batch, directions, hidden]`` with ``layout=1``.
        c: Like ``h``.
        p: ``[directions, 3 * hidden]``.

    Returns:
        Y ``[steps, directions, batch, hidden]`` (``[batch, steps, directions, hidden]``), Y_h and,
        of an LSTM, Y_c like ``h``.
    """
    w, r = (tf.convert_to_tensor(v) for v in (w, r))
    rows = GATES[_op(call)] * int(r.shape[2])
    functions = activations(call)

    def run(k: int, x: Value, initial: Values) -> Values:
        bias = None if b is None else b[k]
        second = None if bias is None else bias[rows:]
        cell = _CELLS[_op(call)](call, r[k], second, None if p is None else p[k], functions[k])
        return _steps(cell, _projection(call, x, w[k], bias, rows), initial, lengths, call.trained)

    return by_direction(call, x, lengths, (h, c), int(r.shape[2]), run)


def by_direction(
    call: Call,
    x: Value,
    lengths: Value,
    states: Values,
    hidden: int,
    run: Callable[[int, Value, Values], Values],
) -> Values:
    """Runs each direction of an operator over its steps.

    Args:
        call: The node.
        x: As in :func:`recurrent`.
        lengths: As in :func:`recurrent`.
        states: h and c, as in :func:`recurrent`.
        hidden: Units of a direction.
        run: (direction, x ``[steps, batch, inputs]`` in the order in which it is read, initial
            states) → y ``[steps, batch, hidden]`` in that order, and the last states.

    Returns:
        What :func:`recurrent` does.
    """
    batch_first = bool(call.get("layout", 0))
    x, (h, c) = tf.convert_to_tensor(x), states
    if batch_first:
        x = tf.transpose(x, [1, 0, 2])
        h, c = (None if s is None else tf.transpose(s, [1, 0, 2]) for s in (h, c))
    given = (h, c) if call.op == "LSTM" else (h,)
    results = []
    for k in range(_directions(call)):
        backward = call.get("direction", "forward") == "reverse" or k == 1
        zeros = tf.zeros([sizes(x)[1], hidden], x.dtype)
        initial = tuple(zeros if s is None else tf.convert_to_tensor(s)[k] for s in given)
        y, *last = run(k, flipped(x, lengths) if backward else x, initial)
        results.append((flipped(y, lengths) if backward else y, *last))
    ys, *lasts = zip(*results, strict=True)
    if batch_first:
        y = tf.stack([tf.transpose(v, [1, 0, 2]) for v in ys], 2)
        return y, *(tf.stack(s, 1) for s in lasts)
    return tf.stack(ys, 1), *(tf.stack(s, 0) for s in lasts)


def _op(call: Call) -> Op:
    return next(op for op in GATES if op == call.op)


def _directions(call: Call) -> int:
    return 2 if call.get("direction", "forward") == "bidirectional" else 1


def activations(call: Call) -> list[list[Function]]:
    """Returns the activations of each direction; clipping is part of them."""
    op, directions = _op(call), _directions(call)
    names = call.get("activations", _DEFAULTS[op] * directions)
    alphas: Iterator[float] = iter(call.get("activation_alpha", ()))
    betas: Iterator[float] = iter(call.get("activation_beta", ()))
    limit = call.get("clip", None)
    functions = []
    for place, name in enumerate(names):
        parameters = len(ACTIVATIONS.get(name.lower(), (None, ()))[1])
        alpha = next(alphas, None) if parameters > 0 else None
        beta = next(betas, None) if parameters > 1 else None
        function = activation(name, alpha, beta)
        # The output activation of an LSTM gets the cell state, which is not clipped.
        if limit is not None and place % len(_DEFAULTS[op]) < 2:
            function = _clipped(function, limit)
        functions.append(function)
    count = len(_DEFAULTS[op])
    return [functions[k * count : (k + 1) * count] for k in range(directions)]


def _clipped(function: Function, limit: float) -> Function:
    return lambda x: function(tf.clip_by_value(x, -limit, limit))


def _projection(call: Call, x: Value, w: Value, b: Value, rows: int) -> Value:
    """What inputs and biases add to the gates, for all steps at once, ``[steps, batch, rows]``."""
    steps, batch, inputs = sizes(x)
    gates = tf.matmul(tf.reshape(x, [-1, inputs]), w, transpose_b=True)
    if b is not None:
        bias = b[:rows] + b[rows:]
        if _op(call) == "GRU" and call.get("linear_before_reset", 0):
            kept = 2 * rows // 3  # the reset gate multiplies the rest
            bias = b[:rows] + tf.concat([b[rows : rows + kept], tf.zeros_like(b[kept:rows])], 0)
        gates += bias
    return tf.reshape(gates, [steps, batch, rows])


def flipped(x: Value, lengths: Value) -> Value:
    """Reverses the steps of ``[steps, batch, …]``; only the valid ones if there are lengths."""
    if lengths is None:
        return tf.reverse(x, [0])
    return tf.reverse_sequence(x, lengths, 0, 1)


def _steps(cell: _Cell, gates: Value, initial: Values, lengths: Value, trained: bool) -> Values:
    """Runs a cell over all steps.

    Beyond its length a sequence keeps its states and gives zeros.

    The gradient is written out: of the products with the recurrent matrices it needs one in each
    step back, and makes that of the matrices of all steps at once, where TensorFlow's own adds up
    one for each step.

    Returns:
        ``h`` of every step ``[steps, batch, hidden]``, and the last states.
    """
    ends = None if lengths is None else tf.cast(lengths, tf.int32)
    count, matrices = len(initial), len(cell.matrices)

    def step(t: Value, gates: Value, states: Values, own: Values, product: Product) -> Values:
        """Returns y and the new states."""
        new = cell.step(gates, states, own, product)
        if ends is None:
            return new[0], *new
        valid = (t < ends)[:, None]
        y = tf.where(valid, new[0], tf.zeros_like(new[0]))
        return y, *(tf.where(valid, n, s) for n, s in zip(new, states, strict=True))

    if not trained:
        return _forward(step, gates, initial, cell.vectors, cell.matrices)[0]

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def run(gates: Value, *rest: Value) -> tuple[Values, Function]:
        first, own, products = rest[:count], rest[count:-matrices], rest[-matrices:]
        results, saved = _forward(step, gates, first, own, products)
        return results, lambda *given: _backward(step, gates, own, products, saved, given)

    result: Values = run(gates, *initial, *cell.vectors, *cell.matrices)
    return result


@dataclass(frozen=True, eq=False)
class _Saved:
    """What going back needs of all steps, ``[steps, batch, …]``.

    Attributes:
        states: The states before the step.
        factors: What each recurrent matrix was multiplied with.
        products: What came out.
    """

    states: list[Value]
    factors: list[Value]
    products: list[Value]


def _forward(
    step: Callable[..., Values], gates: Value, first: Values, own: Values, matrices: Values
) -> tuple[Values, _Saved]:
    """Goes through the steps; returns y of all of them and the last states, and what to save."""
    steps, count = tf.shape(gates)[0], len(first)
    inputs = array_of(gates)
    kept = 1 + count + 2 * len(matrices) - 1  # y, states, factors (the first is h), products
    arrays = [tf.TensorArray(gates.dtype, steps) for _ in range(kept)]

    def body(t: Value, states: Values, arrays: list[Value]) -> tuple[Value, Values, list[Value]]:
        factors: list[Value] = []
        made: list[Value] = []

        def product(k: int, vector: Value) -> Value:
            factors.append(vector)
            made.append(tf.matmul(vector, matrices[k]))
            return made[-1]

        y, *new = step(t, inputs.read(t), states, own, product)
        values = [y, *states, *factors[1:], *made]
        written = [array.write(t, v) for array, v in zip(arrays, values, strict=True)]
        return t + 1, tuple(new), written

    _, last, arrays = tf.while_loop(
        lambda t, *_: t < steps, body, (0, first, arrays), maximum_iterations=steps
    )
    y, *stacks = (array.stack() for array in arrays)
    states, others = stacks[:count], stacks[count:]
    split = len(matrices) - 1
    return (y, *last), _Saved(states, [states[0], *others[:split]], others[split:])


def _backward(
    step: Callable[..., Values],
    gates: Value,
    own: Values,
    matrices: Values,
    saved: _Saved,
    given: Values,
) -> list[Value]:
    """Goes through the steps from the last to the first.

    Args:
        step: As in :func:`_steps`.
        gates: What inputs and biases added to the gates.
        own: The vectors of the cell.
        matrices: The matrices of the cell.
        saved: What going forward left.
        given: Gradients of y and the last states.

    Returns:
        Gradients of gates, first states, vectors and matrices.
    """
    steps, count = tf.shape(gates)[0], len(saved.states)
    dy, *dlast = given
    inputs = [array_of(v) for v in (gates, dy, *saved.states, *saved.products)]
    arrays = [tf.TensorArray(gates.dtype, steps) for _ in range(1 + len(matrices))]
    turned = [tf.transpose(matrix) for matrix in matrices]  # once, not in each step

    def body(
        t: Value, dstates: Values, down: Values, arrays: list[Value]
    ) -> tuple[Value, Values, Values, list[Value]]:
        now, back, *kept = (array.read(t) for array in inputs)
        states, made = tuple(kept[:count]), kept[count:]

        def product(k: int, vector: Value) -> Value:
            return _known(vector, made[k], turned[k])

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([now, states, made, own])
            found = step(t, now, states, own, product)
        dnow, dbefore, dmade, more = tape.gradient(
            found, [now, states, made, own], [back, *dstates], tf.UnconnectedGradients.ZERO
        )
        written = [a.write(t, d) for a, d in zip(arrays, [dnow, *dmade], strict=True)]
        return t - 1, dbefore, tuple(a + b for a, b in zip(down, more, strict=True)), written

    zeros = tuple(tf.zeros_like(vector) for vector in own)
    _, dfirst, down, arrays = tf.while_loop(
        lambda t, *_: t >= 0,
        body,
        (steps - 1, tuple(dlast), zeros, arrays),
        maximum_iterations=steps,
    )
    dgates, *dmade = (array.stack() for array in arrays)
    dmatrices = [
        tf.matmul(_rows(factor, matrix.shape[0]), _rows(d, matrix.shape[1]), transpose_a=True)
        for matrix, factor, d in zip(matrices, saved.factors, dmade, strict=True)
    ]
    return [dgates, *dfirst, *down, *dmatrices]


def _known(vector: Value, result: Value, turned: Value) -> Value:
    """A product that was computed before; its gradient goes to the vector and to the result."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def product(vector: Value, result: Value) -> tuple[Value, Function]:
        return tf.identity(result), lambda d: (tf.matmul(d, turned), d)

    return product(vector, result)


def array_of(values: Value) -> Value:
    """Returns a ``tf.TensorArray`` of the steps of a tensor."""
    array = tf.TensorArray(values.dtype, tf.shape(values)[0], element_shape=values.shape[1:])
    return array.unstack(values)


def _rows(values: Value, size: int) -> Value:
    return tf.reshape(values, [-1, size])


OPERATORS: dict[str, Operator] = dict.fromkeys(GATES, recurrent)
