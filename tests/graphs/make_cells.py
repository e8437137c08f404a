"""Graphs in which a recurrent cell is written out with primitive operators.

`step_*` is one step with the states as inputs and outputs of the graph, `loop_*` and `scan_*`
run a cell in the body of a Loop or Scan, `unrolled_*` repeats it in the graph. Where the idiom
starts with DECLINED no part of the graph is one of the operators LSTM, GRU and RNN; where it
starts with CELL ONLY one step is, but not the loop or chain around it.

`Graph` emits nodes, `Style` says how a cell is written, `Cell` holds weights in the layout of the
operators and writes itself in its style. Expected outputs come from the operators in
`reference.py`, in double; graphs that equal no operator take those of onnxruntime. onnxruntime
must agree with all others.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import HERE, Case, write_cases
from make_handmade import Draw
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from reference import GRU, LSTM, RNN

Array = np.ndarray
Dims = Sequence[int | str]
Turn = tuple[Sequence[str], Sequence[str], str | None]
"""States after a turn, what it scans out, and the condition if it is not the one before."""
T, N, IN, H = 7, 3, 5, 6
LETTERS = {"LSTM": "iofg", "GRU": "zrn", "RNN": "n"}
"""Gates in the order of the operators."""
SIGMOIDS = "iofzr"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "float16": 5e-3}


class Graph:
    """A graph under construction, with its feed and the outputs expected for it."""

    def __init__(
        self,
        opset: int = 18,
        dtype: type[np.floating[Any]] = np.float32,
        *,
        swap: bool = False,
        copies: bool = False,
        inside: bool = False,
        outer: Graph | None = None,
    ) -> None:
        """Start an empty graph.

        Args:
            opset: Opset to write for.
            dtype: Type of all numbers that are not counts.
            swap: Give the operands of Add and Mul in the other order.
            copies: Store equal constants once for every use.
            inside: Let the bodies of subgraphs hold the constants they use.
            outer: The graph around this one.
        """
        self.opset, self.dtype = opset, np.dtype(dtype)
        self.swap, self.copies, self.inside = swap, copies, inside
        self.root: Graph = outer.root if outer else self
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = outer.constants if outer and not inside else {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.renamed: dict[str, str] = {}
        self.feeds: dict[str, Array] = {}
        self.expected: dict[str, Array | None] = {}
        self.count = 0

    # Inputs, outputs, constants

    def fresh(self, kind: str) -> str:
        """A name not used so far."""
        self.root.count += 1
        return f"{kind.lower()}_{self.root.count}"

    def info(self, name: str, dims: Dims | None, dtype: Any = None) -> onnx.ValueInfoProto:
        """Type and shape of a tensor."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        return helper.make_tensor_value_info(name, kind, dims)

    def feed(self, name: str, array: Array, *dims: int | str) -> str:
        """Declare an input and what is fed to it."""
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        self.feeds[name] = array
        self.inputs.append(self.info(name, dims or array.shape, array.dtype))
        return name

    def give(self, name: str, value: str, expected: Array | None, *dims: int | str) -> None:
        """Declare an output and what is expected of it; None leaves that to onnxruntime."""
        produced = {output for node in self.nodes for output in node.output}
        if value not in produced or value in self.renamed:
            value = self.op("Identity", value)
        self.renamed[value] = name
        self.expected[name] = None if expected is None else expected.astype(self.dtype)
        self.outputs.append(
            self.info(name, dims or (expected.shape if expected is not None else None))
        )

    def constant(self, value: Any) -> str:
        """An initializer."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        for name, known in self.constants.items():
            same = known.dtype == array.dtype and known.shape == array.shape
            if same and np.array_equal(known, array) and not self.copies:
                return name
        name = self.fresh("const")
        self.constants[name] = array
        return name

    # Nodes

    def ops(self, kind: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
        """Emit a node and give the names of its outputs."""
        name = self.fresh(kind)
        outputs = [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, **attributes))
        return outputs

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Emit a node with one output."""
        return self.ops(kind, *inputs, count=1, **attributes)[0]

    def add(self, left: str, right: str | None) -> str:
        """Sum; None adds nothing."""
        if right is None:
            return left
        return self.op("Add", *((right, left) if self.swap else (left, right)))

    def mul(self, left: str, right: str) -> str:
        """Product."""
        return self.op("Mul", *((right, left) if self.swap else (left, right)))

    def squeeze(self, value: str, axis: int) -> str:
        """Drop an axis."""
        if self.opset < 13:
            return self.op("Squeeze", value, axes=[axis])
        return self.op("Squeeze", value, self.constant([axis]))

    def unsqueeze(self, value: str, axis: int) -> str:
        """Insert an axis."""
        if self.opset < 13:
            return self.op("Unsqueeze", value, axes=[axis])
        return self.op("Unsqueeze", value, self.constant([axis]))

    def split(self, value: str, sizes: list[int], axis: int) -> list[str]:
        """Split into parts of given sizes."""
        if self.opset < 13:
            return self.ops("Split", value, count=len(sizes), axis=axis, split=sizes)
        return self.ops("Split", value, self.constant(sizes), count=len(sizes), axis=axis)

    def slice(self, value: str, start: int, end: int, axis: int) -> str:
        """A range of positions."""
        ranges = [self.constant([number]) for number in (start, end, axis)]
        return self.op("Slice", value, *ranges)

    def gather(self, value: str, index: str | int, axis: int = 0) -> str:
        """The entry at a scalar position."""
        place = self.constant(index) if isinstance(index, int) else index
        return self.op("Gather", value, place, axis=axis)

    def concat(self, values: Sequence[str], axis: int) -> str:
        """Join tensors."""
        return self.op("Concat", *values, axis=axis)

    def stack(self, values: Sequence[str], axis: int = 0) -> str:
        """Join tensors along a new axis."""
        return self.concat([self.unsqueeze(value, axis) for value in values], axis)

    # Subgraphs

    def body(self) -> Graph:
        """Start a subgraph."""
        return Graph(
            self.opset,
            self.dtype.type,
            swap=self.swap,
            copies=self.copies,
            inside=self.inside,
            outer=self,
        )

    def close(self, values: Sequence[str], dtypes: Sequence[Any] = ()) -> onnx.GraphProto:
        """Finish a subgraph; values that it did not make itself, or only once, are copied."""
        results: list[str] = []
        for value in values:
            made = {output for node in self.nodes for output in node.output}
            own = value in made and value not in results
            results.append(value if own else self.op("Identity", value))
        kinds = itertools.chain(dtypes, itertools.repeat(None))
        self.outputs = [self.info(v, None, k) for v, k in zip(results, kinds, strict=False)]
        return self.proto(self.fresh("body"))

    def branch(
        self,
        flag: str,
        then: Callable[[Graph], Sequence[str]],
        other: Callable[[Graph], Sequence[str]],
    ) -> list[str]:
        """Emit an If."""
        closed = []
        for maker in (then, other):
            inner = self.body()
            closed.append(inner.close(maker(inner)))
        count = len(closed[0].output)
        return self.ops("If", flag, count=count, then_branch=closed[0], else_branch=closed[1])

    def loop(
        self,
        trip: str,
        on: str,
        states: Sequence[str],
        dims: Sequence[Dims | None],
        turn: Callable[[Graph, str, str, list[str]], Turn],
    ) -> list[str]:
        """Emit a Loop whose `turn` is given the body, the counter, the condition and the states."""
        b = self.body()
        counter, go, *names = [b.fresh(kind) for kind in ("turn", "go", *("state" for _ in dims))]
        b.inputs = [b.info(counter, (), np.int64), b.info(go, (), np.bool_)]
        b.inputs += [b.info(name, shape) for name, shape in zip(names, dims, strict=True)]
        after, scans, more = turn(b, counter, go, names)
        body = b.close([more or go, *after, *scans], [np.bool_])
        return self.ops("Loop", trip, on, *states, count=len(body.output) - 1, body=body)

    def scan(
        self,
        states: Sequence[str],
        sequences: Sequence[str],
        dims: Sequence[Dims | None],
        turn: Callable[[Graph, list[str], list[str]], tuple[Sequence[str], Sequence[str]]],
        **attributes: Any,
    ) -> list[str]:
        """Emit a Scan whose `turn` is given the body, the states and an entry of each sequence."""
        b = self.body()
        names = [b.fresh("state") for _ in states]
        pieces = [b.fresh("entry") for _ in sequences]
        b.inputs = [b.info(n, shape) for n, shape in zip(names + pieces, dims, strict=True)]
        after, scans = turn(b, names, pieces)
        body = b.close([*after, *scans])
        attributes |= {"num_scan_inputs": len(pieces), "body": body}
        return self.ops("Scan", *states, *sequences, count=len(body.output), **attributes)

    def proto(self, name: str) -> onnx.GraphProto:
        """The graph as a protobuf message."""
        own = self.root is self or self.inside
        stored = self.constants.items() if own else ()
        initializers = [numpy_helper.from_array(array, name) for name, array in stored]
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, initializers)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        for info, name in zip(self.outputs, self.expected, strict=True):
            info.name = name
        graph = self.proto("main")
        rename(graph, self.renamed)
        opsets = [helper.make_opsetid("", self.opset)]
        ir = 10 if self.opset > 12 else 6
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors in the nodes of a graph and of those in it."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename(attribute.g, names)


@dataclass(frozen=True)
class Style:
    """How a cell is written."""

    product: str = "two"
    """`joint` kernel over x and h, `two` products, one for all `gates` apart, or `hoisted`: what
    arrives as x is already multiplied."""
    linear: str = "matmul"
    """`matmul` and Add, `gemm` with transB and bias, or `transpose`: MatMul by a Transpose."""
    parts: str = "split"
    """Gates are taken apart by one `split` or a `slice` each."""
    order: str = ""
    """Order of the gates in the kernels; that of the operator if empty."""
    merged: bool = False
    """Apply the sigmoid once to gates that lie side by side, and split after it."""
    bias: str = "one"
    """`one` bias beside x, `two`, or one that comes `last`, after the sum."""
    axis: int = -1
    """The axis of features, as it is written in attributes."""
    mix: str = "n first"
    """How a GRU mixes old and new: one of the keys of `MIXES`."""
    sigmoid: str = "Sigmoid"
    """One of the keys of `SIGMOID`."""
    tanh: str = "Tanh"
    """An operator."""
    forget: bool = False
    """Add 1 to the forget gate apart from its bias."""


# Ways to write the mix of a GRU: (1 - z) * n + z * h. Without h, the first of a chain, h is zero.


def mix_n_first(g: Graph, z: str, n: str, h: str | None) -> str:
    """`(1 - z) * n + z * h`."""
    new = g.mul(g.op("Sub", g.constant(1.0), z), n)
    return g.add(new, h and g.mul(z, h))


def mix_h_first(g: Graph, z: str, n: str, h: str | None) -> str:
    """`z * h + (1 - z) * n`."""
    old = h and g.mul(z, h)
    new = g.mul(g.op("Sub", g.constant(1.0), z), n)
    return g.add(old, new) if old else new


def mix_lerp(g: Graph, z: str, n: str, h: str | None) -> str:
    """`n + z * (h - n)`."""
    if h is None:
        return g.op("Sub", n, g.mul(z, n))
    return g.add(n, g.mul(z, g.op("Sub", h, n)))


def mix_flipped(g: Graph, z: str, n: str, h: str | None) -> str:
    """`(1 - z) * h + z * n`, where z is one minus that of the operator."""
    new = g.mul(z, n)
    old = h and g.mul(g.op("Sub", g.constant(1.0), z), h)
    return g.add(old, new) if old else new


def mix_flipped_lerp(g: Graph, z: str, n: str, h: str | None) -> str:
    """`h + z * (n - h)`, where z is one minus that of the operator."""
    return g.add(h, g.mul(z, g.op("Sub", n, h))) if h else g.mul(z, n)


MIXES = {
    "n first": mix_n_first,
    "h first": mix_h_first,
    "lerp": mix_lerp,
    "flipped": mix_flipped,
    "flipped lerp": mix_flipped_lerp,
}


# Ways to write the sigmoid, each with the operator's activation and its alpha and beta.


def ramp(g: Graph, value: str) -> str:
    """`0.2 * x + 0.5`."""
    return g.add(g.mul(value, g.constant(0.2)), g.constant(0.5))


def clip_ramp(g: Graph, value: str) -> str:
    """Hard sigmoid as Clip of a ramp."""
    return g.op("Clip", ramp(g, value), g.constant(0.0), g.constant(1.0))


def clip_six(g: Graph, value: str) -> str:
    """Hard sigmoid as ReLU6(x + 3) / 6."""
    shifted = g.add(value, g.constant(3.0))
    clipped = g.op("Clip", shifted, g.constant(0.0), g.constant(6.0))
    return g.op("Div", clipped, g.constant(6.0))


def min_max(g: Graph, value: str) -> str:
    """Hard sigmoid as Max(0, Min(1, ramp))."""
    below = g.op("Min", g.constant(1.0), ramp(g, value))
    return g.op("Max", g.constant(0.0), below)


Emitter = Callable[[Graph, str], str]
HARD = {"activation_alpha": [0.2], "activation_beta": [0.5]}
SIGMOID: dict[str, tuple[Emitter, str, dict[str, list[float]]]] = {
    "Sigmoid": (lambda g, v: g.op("Sigmoid", v), "Sigmoid", {}),
    "HardSigmoid": (lambda g, v: g.op("HardSigmoid", v, alpha=0.2, beta=0.5), "HardSigmoid", HARD),
    "clip": (clip_ramp, "HardSigmoid", HARD),
    "clip six": (clip_six, "HardSigmoid", HARD | {"activation_alpha": [1 / 6]}),
    "min max": (min_max, "HardSigmoid", HARD),
}


@dataclass(frozen=True)
class Cell:
    """The weights of a cell, in the layout of its operator but without directions."""

    op: str
    w: Array
    r: Array
    b: Array | None
    p: Array | None = None
    after: bool = False
    """A GRU applies its reset gate after the product (`linear_before_reset=1`)."""
    style: Style = Style()

    # What the operator gives

    def run(
        self,
        x: Array,
        states: Sequence[Array] | None = None,
        *,
        reverse: bool = False,
        lengths: Array | None = None,
    ) -> list[Array]:
        """All outputs of the operator for a sequence, without the axis of directions."""
        given = {"X": x, "W": self.w[None], "R": self.r[None]}
        given |= {} if self.b is None else {"B": self.b[None]}
        given |= {} if lengths is None else {"lens": lengths}
        given |= {f"s{i}": state[None] for i, state in enumerate(states or ())}
        given |= {} if self.p is None else {"P": self.p[None]}
        feeds = {k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in given.items()}
        names = ["X", "W", "R", "B", "lens", "s0", "s1", "P"][: 8 if self.op == "LSTM" else 6]
        outputs = ["Y", "Y_h", "Y_c"][: 3 if self.op == "LSTM" else 2]
        node = helper.make_node(
            self.op,
            [name if name in feeds else "" for name in names],
            outputs,
            hidden_size=self.r.shape[-1],
            direction="reverse" if reverse else "forward",
            **self.attributes(),
        )
        kind = onnx.TensorProto.DOUBLE
        graph = helper.make_graph(
            [node],
            "operator",
            [helper.make_tensor_value_info(name, kind, None) for name in feeds],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        values = ReferenceEvaluator(model, new_ops=[LSTM, GRU, RNN]).run(None, feeds)
        return [np.squeeze(v, 1 if i == 0 else 0) for i, v in enumerate(map(np.asarray, values))]

    def attributes(self) -> dict[str, Any]:
        """The attributes of the operator."""
        _, sigmoid, numbers = SIGMOID[self.style.sigmoid]
        tanh = self.style.tanh
        if self.op == "LSTM":
            return {"activations": [sigmoid, tanh, tanh], **numbers}
        if self.op == "GRU":
            found = {"activations": [sigmoid, tanh], **numbers}
            return found | {"linear_before_reset": int(self.after)}
        return {"activations": [tanh]}

    # Weights as they are stored

    def order(self, letters: str = "") -> str:
        """The chosen gates in the order in which they are stored."""
        every = self.style.order or LETTERS[self.op]
        return "".join(letter for letter in every if letter in (letters or every))

    def rows(self, tensor: Array, letters: str) -> Array:
        """The rows of some gates, in the order of the letters."""
        blocks = dict(zip(LETTERS[self.op], np.split(tensor, len(LETTERS[self.op])), strict=True))
        if self.style.mix.startswith("flipped"):
            blocks["z"] = -blocks["z"]
        return np.concatenate([blocks[letter] for letter in letters])

    def biases(self, letters: str) -> tuple[Array | None, Array | None]:
        """The biases of some gates beside x and beside h."""
        if self.b is None:
            return None, None
        beside_x, beside_h = (self.rows(half, letters) for half in np.split(self.b, 2))
        if self.style.forget and "f" in letters:
            size, place = self.r.shape[-1], letters.index("f")
            beside_x = beside_x - np.repeat(np.arange(len(letters)) == place, size)
        if self.style.bias == "two" or (self.after and "n" in letters):
            return beside_x, beside_h
        return beside_x + beside_h, None

    # Emission

    def linear(self, g: Graph, value: str, rows: Array, bias: Array | None) -> str:
        """A product with stored rows, and a bias."""
        if self.style.linear == "gemm":
            biases = [] if bias is None else [g.constant(bias)]
            return g.op("Gemm", value, g.constant(rows), *biases, transB=1)
        if self.style.linear == "transpose":
            kernel = g.op("Transpose", g.constant(rows), perm=[1, 0])
        else:
            kernel = g.constant(rows.T)
        product = g.op("MatMul", value, kernel)
        return g.add(product, None if bias is None else g.constant(bias))

    def project(self, g: Graph, value: str) -> str:
        """The product of x with the rows of all gates."""
        letters = self.order()
        return self.linear(g, value, self.rows(self.w, letters), self.biases(letters)[0])

    def groups(self, letters: str = "") -> list[str]:
        """The parts that are cut out of a tensor of some gates."""
        chosen = self.order(letters)
        if not self.style.merged:
            return list(chosen)
        return ["".join(k) for _, k in itertools.groupby(chosen, lambda each: each in SIGMOIDS)]

    def cut(self, g: Graph, value: str, groups: Sequence[str]) -> dict[str, str]:
        """Take a tensor of gates apart."""
        sizes = [len(group) * self.r.shape[-1] for group in groups]
        if len(groups) == 1:
            return {groups[0]: value}
        if self.style.parts == "split":
            parts = g.split(value, sizes, self.style.axis)
        else:
            ends = itertools.accumulate(sizes)
            places = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
            parts = [g.slice(value, *place, self.style.axis) for place in places]
        return dict(zip(groups, parts, strict=True))

    def total(self, g: Graph, x: str, h: str | None, letters: str) -> str:
        """What goes into the activations of some gates."""
        w, r = self.rows(self.w, letters), self.rows(self.r, letters)
        beside_x, beside_h = self.biases(letters)
        if self.style.product == "hoisted":
            if h is None:
                return g.add(x, None if beside_h is None else g.constant(beside_h))
            return g.add(x, self.linear(g, h, r, beside_h))
        both = beside_x if beside_h is None or beside_x is None else beside_x + beside_h
        if h is None:
            return self.linear(g, x, w, both)
        if self.style.product == "joint":
            joined = g.concat([x, h], self.style.axis)
            return self.linear(g, joined, np.concatenate([w, r], axis=1), both)
        if self.style.bias == "last" and both is not None:
            products = [self.linear(g, value, rows, None) for value, rows in ((x, w), (h, r))]
            return g.add(g.add(*products), g.constant(both))
        return g.add(self.linear(g, x, w, beside_x), self.linear(g, h, r, beside_h))

    def totals(self, g: Graph, x: str, h: str | None, letters: str = "") -> dict[str, str]:
        """What goes into the activations, by gate or by gates that share one."""
        chosen = self.order(letters)
        if self.style.product == "gates":
            return {letter: self.total(g, x, h, letter) for letter in chosen}
        return self.cut(g, self.total(g, x, h, chosen), self.groups(chosen))

    def squash(self, g: Graph, totals: dict[str, str]) -> dict[str, str]:
        """The gates after the sigmoid, by letter."""
        gates: dict[str, str] = {}
        for group, value in totals.items():
            if group[0] in SIGMOIDS:
                gates |= self.cut(g, SIGMOID[self.style.sigmoid][0](g, value), list(group))
        return gates

    def tanh(self, g: Graph, value: str) -> str:
        """The activation of what is neither gate."""
        return g.op(self.style.tanh, value)

    def step(self, g: Graph, x: str, states: Sequence[str | None]) -> list[str]:
        """Write one step; a state of None is zero and leaves out what it makes zero."""
        if self.op == "LSTM":
            return self.lstm(g, x, *states)
        if self.op == "GRU":
            return [self.gru(g, x, *states)]
        return [self.tanh(g, self.total(g, x, states[0], "n"))]

    def lstm(self, g: Graph, x: str, h: str | None, c: str | None) -> list[str]:
        """One step of an LSTM."""
        return self.lstm_of_totals(g, self.totals(g, x, h), c)

    def lstm_of_totals(self, g: Graph, totals: dict[str, str], c: str | None) -> list[str]:
        """What follows the products of an LSTM."""
        if self.style.forget:
            totals["f"] = g.add(totals["f"], g.constant(1.0))
        peep_i, peep_o, peep_f = (None,) * 3 if self.p is None else np.split(self.p, 3)
        if peep_i is not None and peep_f is not None and c:
            totals["i"] = g.add(totals["i"], g.mul(g.constant(peep_i), c))
            totals["f"] = g.add(totals["f"], g.mul(g.constant(peep_f), c))
        late = {} if peep_o is None else {"o": totals.pop("o")}
        gates = self.squash(g, totals)
        new = g.mul(gates["i"], self.tanh(g, totals["g"]))
        new = g.add(g.mul(gates["f"], c), new) if c else new
        if peep_o is not None:
            late["o"] = g.add(late["o"], g.mul(g.constant(peep_o), new))
            gates |= self.squash(g, late)
        return [g.mul(gates["o"], self.tanh(g, new)), new]

    def gru(self, g: Graph, x: str, h: str | None) -> str:
        """One step of a GRU."""
        if self.style.product in ("joint", "gates"):
            gates = self.squash(g, self.totals(g, x, h, "zr"))
            new = self.new_of_products(g, x, h, gates["r"])
        else:
            from_x = x if self.style.product == "hoisted" else self.project(g, x)
            parts = self.cut(g, from_x, self.groups())
            mine = self.beside_h(g, h)
            sums = {k: g.add(v, mine.get(k)) for k, v in parts.items() if k != "n"}
            gates = self.squash(g, sums)
            new = self.new_of_parts(g, parts["n"], mine.get("n"), h, gates["r"])
        return MIXES[self.style.mix](g, gates["z"], self.tanh(g, new), h)

    def beside_h(self, g: Graph, h: str | None) -> dict[str, str]:
        """The parts of a GRU that are made of h at once, and not of the reset h."""
        letters = self.order("zrn" if self.after else "zr")
        groups = self.groups(letters)
        bias = self.biases(letters)[1]
        if h:
            return self.cut(g, self.linear(g, h, self.rows(self.r, letters), bias), groups)
        if bias is None:
            return {}
        pieces = np.split(bias, np.cumsum([len(k) for k in groups])[:-1] * self.r.shape[-1])
        return {k: g.constant(piece) for k, piece in zip(groups, pieces, strict=True)}

    def new_of_parts(
        self, g: Graph, from_x: str, from_h: str | None, h: str | None, reset: str
    ) -> str:
        """What goes into the tanh of a GRU whose products hold several gates."""
        if self.after:
            return g.add(from_x, from_h and g.mul(reset, from_h))
        bias = self.biases("n")[1]
        if h is None:
            return g.add(from_x, None if bias is None else g.constant(bias))
        return g.add(from_x, self.linear(g, g.mul(reset, h), self.rows(self.r, "n"), bias))

    def new_of_products(self, g: Graph, x: str, h: str | None, reset: str) -> str:
        """What goes into the tanh of a GRU that has products for this gate alone."""
        if not self.after:
            return self.total(g, x, h and g.mul(reset, h), "n")
        beside_x, beside_h = self.biases("n")
        from_x = self.linear(g, x, self.rows(self.w, "n"), beside_x)
        if h:
            from_h: str | None = self.linear(g, h, self.rows(self.r, "n"), beside_h)
        else:
            from_h = None if beside_h is None else g.constant(beside_h)
        return g.add(from_x, from_h and g.mul(reset, from_h))


def draw_cell(
    draw: Draw,
    op: str,
    style: Style,
    *,
    inputs: int = IN,
    hidden: int = H,
    bias: bool = True,
    peepholes: bool = False,
) -> Cell:
    """A cell with random weights; `GRU0` is the GRU with `linear_before_reset=0`."""
    kind = op.removesuffix("0")
    names = "WRB" if bias else "WR"
    stored = draw.weights(kind, inputs, hidden, names=names)
    weights = {name: array[0].astype(np.float64) for name, array in stored.items()}
    p = draw.normal(3 * hidden, scale=0.5) if peepholes else None
    return Cell(kind, weights["W"], weights["R"], weights.get("B"), p, op == "GRU", style)


STATES = ("h", "c")


def state_count(op: str) -> int:
    """How many states a cell carries."""
    return 2 if op == "LSTM" else 1


def draw_states(draw: Draw, count: int, *shape: int) -> list[Array]:
    """Random states."""
    return [draw.normal(*(shape or (N, H)), scale=0.5) for _ in range(count)]


Maker = Callable[[Draw], Graph]

JOINT = Style("joint")
TWO = Style("two")
GEMM = Style("two", "gemm", bias="two", axis=1)
GATES = Style("gates")
SLICED = Style("two", parts="slice", axis=1)


# A: one step


def step(
    op: str,
    style: Style,
    draw: Draw,
    *,
    opset: int = 18,
    dtype: type[np.floating[Any]] = np.float32,
    rank: int = 2,
    swap: bool = False,
    bias: bool = True,
    peepholes: bool = False,
) -> Graph:
    """One step whose states are inputs and outputs of the graph."""
    g = Graph(opset, dtype, swap=swap)
    cell = draw_cell(draw, op, style, bias=bias, peepholes=peepholes)
    x, states = draw.x(N, IN), draw_states(draw, state_count(op))
    lead = (1,) * (rank - 2)
    x_in = g.feed("x", x.reshape(*lead, N, IN), *lead, "N", IN)
    given = [
        g.feed(name, state.reshape(*lead, N, H), *lead, "N", H)
        for name, state in zip(STATES, states, strict=False)
    ]
    _, *expected = cell.run(x[None], states)
    for name, value, array in zip(STATES, cell.step(g, x_in, given), expected, strict=False):
        g.give(f"{name}_out", value, array.reshape(*lead, N, H), *lead, "N", H)
    return g


def feed_step(
    g: Graph, draw: Draw, op: str = "LSTM", inputs: int = IN
) -> tuple[Array, list[Array], list[str]]:
    """Draw x and the states of a step; give them, and the names of those fed: x, states."""
    x, states = draw.x(N, inputs), draw_states(draw, state_count(op))
    names = [g.feed("x", x, "N", inputs)]
    names += [g.feed(k, state, "N", H) for k, state in zip(STATES, states, strict=False)]
    return x, states, names


def give_states(g: Graph, values: Sequence[str], expected: Sequence[Array | None]) -> None:
    """Give the states after a step."""
    for name, value, array in zip(STATES, values, expected, strict=False):
        g.give(f"{name}_out", value, array, "N", H)


def step_lstm_packed_slice(draw: Draw) -> Graph:
    """State [2, N, H] cut by Slice and Squeeze, joined again by Concat of Unsqueeze."""
    return packed(draw, lambda g, s, i: g.squeeze(g.slice(s, i, i + 1, 0), 0))


def step_lstm_packed_gather(draw: Draw) -> Graph:
    """State [2, N, H] taken apart by Gather, joined again by Concat of Unsqueeze."""
    return packed(draw, lambda g, s, i: g.gather(s, i))


def packed(draw: Draw, take: Callable[[Graph, str, int], str]) -> Graph:
    """One tensor holds both states of an LSTM."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", TWO)
    x, states = draw.x(N, IN), draw_states(draw, 2)
    x_in = g.feed("x", x, "N", IN)
    state = g.feed("state", np.stack(states), 2, "N", H)
    after = cell.step(g, x_in, [take(g, state, i) for i in range(2)])
    _, *expected = cell.run(x[None], states)
    g.give("y", after[0], expected[0], "N", H)
    g.give("state_out", g.stack(after), np.stack(expected), 2, "N", H)
    return g


def step_lstm_stacked(draw: Draw) -> Graph:
    """Two stacked steps; h and c of both layers in [2, N, H] each, taken by Gather."""
    return stacked(draw, "LSTM", Style("joint", order="ifgo"), split=False)


def step_gru_stacked(draw: Draw) -> Graph:
    """Two stacked steps; h of both layers in [2, N, H], taken by Split and Squeeze."""
    return stacked(draw, "GRU", GEMM, split=True)


def stacked(draw: Draw, op: str, style: Style, *, split: bool) -> Graph:
    """One step of two layers, whose states lie in one tensor for each kind of state."""
    g = Graph()
    cells = [draw_cell(draw, op, style, inputs=size) for size in (IN, H)]
    x = draw.x(N, IN)
    value = g.feed("x", x, "N", IN)
    arrays = draw_states(draw, state_count(op), 2, N, H)
    fed = [g.feed(k, state, 2, "N", H) for k, state in zip(STATES, arrays, strict=False)]
    if split:
        taken = [[g.squeeze(part, 0) for part in g.split(name, [1, 1], 0)] for name in fed]
    else:
        taken = [[g.gather(name, i) for i in range(2)] for name in fed]
    layers, expected, flow = [], [], x
    for i, cell in enumerate(cells):
        layers.append(cell.step(g, value, [parts[i] for parts in taken]))
        expected.append(cell.run(flow[None], [array[i] for array in arrays])[1:])
        value, flow = layers[-1][0], expected[-1][0]
    for i, name in enumerate(STATES[: len(fed)]):
        joined = g.stack([layer[i] for layer in layers])
        g.give(f"{name}_out", joined, np.stack([e[i] for e in expected]), 2, "N", H)
    return g


def step_lstm_if_shared(draw: Draw) -> Graph:
    """A cell in both branches of an If with the same outer weights, on x and on half of x."""
    cell = draw_cell(draw, "LSTM", JOINT)
    return in_branches(draw, [cell, cell])


def step_lstm_if_different(draw: Draw) -> Graph:
    """A cell in both branches of an If with different outer weights, on x and on half of x."""
    return in_branches(draw, [draw_cell(draw, "LSTM", JOINT) for _ in range(2)], flag=False)


def step_gru_if_inside(draw: Draw) -> Graph:
    """A cell in both branches of an If, each with its own weights as initializers in the branch."""
    return in_branches(draw, [draw_cell(draw, "GRU", GEMM) for _ in range(2)], inside=True)


def step_gru_if_one(draw: Draw) -> Graph:
    """A cell in one branch of an If, the other passes the state on."""
    return in_branches(draw, [draw_cell(draw, "GRU", TWO), None])


def in_branches(
    draw: Draw, cells: Sequence[Cell | None], *, inside: bool = False, flag: bool = True
) -> Graph:
    """A cell in each branch of an If; the second sees half of x, None leaves the states."""
    op = next(cell.op for cell in cells if cell)
    g = Graph(inside=inside)
    x, states, (x_in, *given) = feed_step(g, draw, op)
    chosen = g.feed("flag", np.array(flag))

    def then(b: Graph) -> list[str]:
        return cells[0].step(b, x_in, given) if cells[0] else given

    def other(b: Graph) -> list[str]:
        return cells[1].step(b, b.mul(x_in, b.constant(0.5)), given) if cells[1] else given

    cell, scale = (cells[0], 1.0) if flag else (cells[1], 0.5)
    expected = cell.run(scale * x[None], states)[1:] if cell else states
    give_states(g, g.branch(chosen, then, other), expected)
    return g


def step_lstm_residual(draw: Draw) -> Graph:
    """h' + x goes on to a head, but the state is h'."""
    return residual(draw, "LSTM", JOINT)


def step_gru_residual(draw: Draw) -> Graph:
    """h' + x goes on to a head, but the state is h'."""
    return residual(draw, "GRU", TWO)


def residual(draw: Draw, op: str, style: Style) -> Graph:
    """A step with a residual sum after it."""
    g = Graph()
    cell = draw_cell(draw, op, style, inputs=H)
    x, states, (x_in, *given) = feed_step(g, draw, op, H)
    after = cell.step(g, x_in, given)
    _, *expected = cell.run(x[None], states)
    head = draw.normal(H, 2)
    summed = g.add(after[0], x_in)
    g.give("y", g.op("MatMul", summed, g.constant(head)), (expected[0] + x) @ head, "N", 2)
    give_states(g, after, expected)
    return g


def step_lstm_two_inputs(draw: Draw) -> Graph:
    """A joint kernel over the Concat of two inputs and h."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", replace(JOINT, axis=1))
    x, states = draw.x(N, IN), draw_states(draw, 2)
    parts = [g.feed("x1", x[:, :2], "N", 2), g.feed("x2", x[:, 2:], "N", IN - 2)]
    given = [g.feed(name, state, "N", H) for name, state in zip(STATES, states, strict=True)]
    joined = g.concat([*parts, given[0]], 1)
    kernel = np.concatenate([cell.rows(cell.w, "iofg"), cell.rows(cell.r, "iofg")], axis=1)
    total = cell.linear(g, joined, kernel, cell.biases("iofg")[0])
    after = cell.lstm_of_totals(g, cell.cut(g, total, cell.groups()), given[1])
    give_states(g, after, cell.run(x[None], states)[1:])
    return g


def step_lstm_three_uses(draw: Draw) -> Graph:
    """h' is read by a head, a Relu and the output of the graph."""
    return three_uses(draw, "LSTM", JOINT)


def step_gru_three_uses(draw: Draw) -> Graph:
    """h' is read by a head, a Relu and the output of the graph."""
    return three_uses(draw, "GRU", GEMM)


def three_uses(draw: Draw, op: str, style: Style) -> Graph:
    """A step whose new h has three readers."""
    g = Graph()
    cell = draw_cell(draw, op, style)
    x, states, (x_in, *given) = feed_step(g, draw, op)
    after = cell.step(g, x_in, given)
    _, *expected = cell.run(x[None], states)
    head = draw.normal(H, 2)
    g.give("y", g.op("MatMul", after[0], g.constant(head)), expected[0] @ head, "N", 2)
    g.give("positive", g.op("Relu", after[0]), np.maximum(expected[0], 0), "N", H)
    give_states(g, after, expected)
    return g


def step_lstm_norm(draw: Draw) -> Graph:
    """DECLINED: LayerNormalization between the products and the gates."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", TWO)
    _, _, (x_in, h, c) = feed_step(g, draw)
    total = normalise(g, draw, cell.total(g, x_in, h, "iofg"), 4 * H)
    give_states(g, cell.lstm_of_totals(g, cell.cut(g, total, cell.groups()), c), (None, None))
    return g


def normalise(g: Graph, draw: Draw, value: str, size: int) -> str:
    """Layer normalisation over the last axis."""
    scale, shift = 1 + draw.normal(size, scale=0.2), draw.normal(size, scale=0.2)
    return g.op("LayerNormalization", value, g.constant(scale), g.constant(shift))


def step_lstm_tanh_forget(draw: Draw) -> Graph:
    """DECLINED: the forget gate alone has another activation."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", JOINT)
    _, _, (x_in, h, c) = feed_step(g, draw)
    totals = cell.totals(g, x_in, h)
    kept = g.mul(g.op("Tanh", totals.pop("f")), c)
    gates = cell.squash(g, totals)
    new = g.add(kept, g.mul(gates["i"], g.op("Tanh", totals["g"])))
    give_states(g, [g.mul(gates["o"], g.op("Tanh", new)), new], (None, None))
    return g


def step_lstm_wrong_state(draw: Draw) -> Graph:
    """DECLINED: the forget gate multiplies h instead of c."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", TWO)
    _, _, (x_in, h, c) = feed_step(g, draw)
    _, new = cell.lstm_of_totals(g, cell.totals(g, x_in, h), h)
    give_states(g, [g.mul(new, c), new], (None, None))
    return g


def step_lstm_projection(draw: Draw) -> Graph:
    """DECLINED: h' is a projection of o * tanh(c') to 4 units, which the operator lacks."""
    g = Graph()
    weights = draw.weights()
    r = draw.normal(4 * H, 4, scale=0.4)
    cell = Cell("LSTM", weights["W"][0], r, weights["B"][0], style=JOINT)
    x_in = g.feed("x", draw.x(N, IN), "N", IN)
    h = g.feed("h", draw.normal(N, 4, scale=0.5), "N", 4)
    c = g.feed("c", draw.normal(N, H, scale=0.5), "N", H)
    parts = g.split(cell.total(g, x_in, h, "iofg"), [H] * 4, -1)
    wide, new = cell.lstm_of_totals(g, dict(zip("iofg", parts, strict=True)), c)
    projected = g.op("MatMul", wide, g.constant(draw.normal(H, 4, scale=0.4)))
    g.give("h_out", projected, None, "N", 4)
    g.give("c_out", new, None, "N", H)
    return g


def step_lstm_gate_output(draw: Draw) -> Graph:
    """DECLINED: the output gate itself is an output of the graph as well."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", replace(TWO, order="ogif"))
    x, states, (x_in, h, c) = feed_step(g, draw)
    totals = cell.totals(g, x_in, h)
    gates = cell.squash(g, totals)
    new = g.add(g.mul(gates["f"], c), g.mul(gates["i"], g.op("Tanh", totals["g"])))
    give_states(g, [g.mul(gates["o"], g.op("Tanh", new)), new], cell.run(x[None], states)[1:])
    g.give("gate", gates["o"], None, "N", H)
    return g


def step_lstm_weights_fed(draw: Draw) -> Graph:
    """DECLINED: the joint kernel is an input of the graph."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", JOINT)
    x, states, (x_in, h, c) = feed_step(g, draw)
    kernel = g.feed("kernel", np.concatenate([cell.w, cell.r], axis=1).T)
    bias = cell.biases("iofg")[0]
    total = g.add(g.op("MatMul", g.concat([x_in, h], -1), kernel), g.constant(bias))
    after = cell.lstm_of_totals(g, cell.cut(g, total, cell.groups()), c)
    give_states(g, after, cell.run(x[None], states)[1:])
    return g


def step_gru_wrong_mix(draw: Draw) -> Graph:
    """DECLINED: the old state is multiplied by r instead of z."""
    g = Graph()
    cell = draw_cell(draw, "GRU0", JOINT)
    _, _, (x_in, h) = feed_step(g, draw, "GRU")
    gates = cell.squash(g, cell.totals(g, x_in, h, "zr"))
    new = g.op("Tanh", cell.new_of_products(g, x_in, h, gates["r"]))
    kept = g.mul(gates["r"], h)
    mixed = g.add(g.mul(g.op("Sub", g.constant(1.0), gates["z"]), new), kept)
    give_states(g, [mixed], [None])
    return g


def step_gru_one_gate(draw: Draw) -> Graph:
    """DECLINED: a minimal gated unit, where one gate both resets and mixes."""
    g = Graph()
    cell = draw_cell(draw, "GRU0", JOINT)
    _, _, (x_in, h) = feed_step(g, draw, "GRU")
    gate = g.op("Sigmoid", cell.total(g, x_in, h, "z"))
    new = g.op("Tanh", cell.new_of_products(g, x_in, h, gate))
    give_states(g, [mix_flipped(g, gate, new, h)], [None])
    return g


def step_highway(draw: Draw) -> Graph:
    """DECLINED: a highway layer, which mixes x with a layer of x and has no state."""
    g = Graph()
    x_in = g.feed("x", draw.normal(N, H), "N", H)
    cell = draw_cell(draw, "GRU", TWO, inputs=H)
    gate, new = (cell.linear(g, x_in, cell.rows(cell.w, k), cell.biases(k)[0]) for k in "zn")
    g.give("y", mix_flipped(g, g.op("Sigmoid", gate), g.op("Tanh", new), x_in), None, "N", H)
    return g


def step_dense(draw: Draw) -> Graph:
    """DECLINED: a tanh layer over two inputs, of which neither has the size of the output."""
    g = Graph()
    names = [g.feed(name, draw.normal(N, size), "N", size) for name, size in (("x", IN), ("z", 4))]
    products = [
        g.op("MatMul", name, g.constant(draw.normal(size, H, scale=0.5)))
        for name, size in zip(names, (IN, 4), strict=True)
    ]
    total = g.add(g.add(*products), g.constant(draw.normal(H)))
    g.give("y", g.op("Tanh", total), None, "N", H)
    return g


STYLES = {
    "joint": (JOINT, "One kernel over Concat of x and h: MatMul, Add, Split"),
    "gemm": (GEMM, "Gemm with transB for x and for h, each with a bias"),
    "gates": (GATES, "A MatMul for each gate and input"),
    "split": (TWO, "MatMul of x with a bias, MatMul of h; gates by Split"),
    "slice": (SLICED, "MatMul of x and of h; gate by gate by Slice"),
    "bias_last": (replace(TWO, bias="last"), "The bias comes after the sum of both products"),
    "transpose": (Style("two", "transpose"), "Weights as the operator has them, via Transpose"),
}
ORDERS = {"LSTM": "fgoi", "GRU": "nrz", "GRU0": "rnz"}
MERGED = {"LSTM": "ifog", "GRU": "rzn", "GRU0": "rzn"}
RECURRENCES = {
    "lstm": ("LSTM", "LSTM"),
    "gru": ("GRU", "GRU with linear_before_reset=1"),
    "gru0": ("GRU0", "GRU with linear_before_reset=0"),
    "rnn": ("RNN", "RNN with tanh"),
}
SIGMOID_STYLES = {
    "op": ("HardSigmoid", "the operator HardSigmoid"),
    "clip": ("clip", "Clip(0.2 * x + 0.5, 0, 1)"),
    "clip_six": ("clip six", "Clip(x + 3, 0, 6) / 6"),
    "min_max": ("min max", "Max(0, Min(1, 0.2 * x + 0.5))"),
}
MIX_STYLES = {
    "h_first": "z * h + (1 - z) * n",
    "lerp": "n + z * (h - n)",
    "flipped": "(1 - z) * h + z * n",
    "flipped_lerp": "h + z * (n - h)",
}
STEP_FUNCTIONS: tuple[Maker, ...] = (
    step_lstm_packed_slice,
    step_lstm_packed_gather,
    step_lstm_stacked,
    step_gru_stacked,
    step_lstm_if_shared,
    step_lstm_if_different,
    step_gru_if_inside,
    step_gru_if_one,
    step_lstm_residual,
    step_gru_residual,
    step_lstm_two_inputs,
    step_lstm_three_uses,
    step_gru_three_uses,
    step_lstm_norm,
    step_lstm_tanh_forget,
    step_lstm_wrong_state,
    step_lstm_projection,
    step_lstm_gate_output,
    step_lstm_weights_fed,
    step_gru_wrong_mix,
    step_gru_one_gate,
    step_highway,
    step_dense,
)

Makers = dict[str, tuple[str, Maker]]


def documented(functions: Sequence[Maker]) -> Makers:
    """Makers whose name and idiom are those of a function."""
    return {f.__name__: (f.__doc__ or "", f) for f in functions}


def step_styles() -> Makers:
    """One step of each cell in each style."""
    made: Makers = {}
    for short, (op, long) in RECURRENCES.items():
        for name, (style, idiom) in STYLES.items():
            absent = {"RNN": ("split", "slice"), "LSTM": ()}.get(op, ("bias_last",))
            if name not in absent:
                made[f"step_{short}_{name}"] = (f"{long}. {idiom}.", partial(step, op, style))
        many: dict[str, tuple[str, Style, dict[str, Any]]] = {
            "no_bias": ("No bias", JOINT, {"bias": False}),
            "gemm_no_bias": ("Gemm without C", GEMM, {"bias": False}),
            "swapped": ("Operands of Add and Mul the other way round", TWO, {"swap": True}),
            "rank3": ("x and states of rank 3", JOINT if op == "LSTM" else TWO, {"rank": 3}),
            "rank3_axis": (
                "Rank 3, gates by Slice on axis 2",
                replace(SLICED, axis=2),
                {"rank": 3},
            ),
            "opset11": ("Opset 11", replace(TWO, axis=1), {"opset": 11}),
            "opset11_gemm": ("Opset 11, Gemm", GEMM, {"opset": 11}),
        }
        for name, (idiom, style, options) in many.items():
            if op != "RNN" or name != "rank3_axis":
                maker = partial(step, op, style, **options)
                made[f"step_{short}_{name}"] = (f"{long}. {idiom}.", maker)
        for name, kind in (("double", np.float64), ("half", np.float16)):
            idiom = f"DECLINED: {long} in {name}."
            made[f"step_{short}_{name}"] = (idiom, partial(step, op, JOINT, dtype=kind))
    return made


def step_gates() -> Makers:
    """Variants of cells that have gates."""
    made: Makers = {}
    for short, op in (("lstm", "LSTM"), ("gru", "GRU"), ("gru0", "GRU0")):
        styles = {
            "merged": (replace(JOINT, merged=True, order=MERGED[op]), "Joint kernel"),
            "merged_gemm": (replace(GEMM, merged=True, order=MERGED[op]), "Gemm"),
            "merged_slice": (replace(SLICED, merged=True, order=MERGED[op]), "Gates by Slice"),
        }
        for name, (style, idiom) in styles.items():
            text = f"{idiom}, one Sigmoid for all gates that have one, in the order {style.order}."
            made[f"step_{short}_{name}"] = (text, partial(step, op, style))
        for name, style in (("order", TWO), ("order_joint", JOINT), ("order_gemm", GEMM)):
            ordered = replace(style, order=ORDERS[op])
            text = f"Gates in the order {ordered.order}."
            made[f"step_{short}_{name}"] = (text, partial(step, op, ordered))
    for short, op in (("gru", "GRU"), ("gru0", "GRU0")):
        for name, formula in MIX_STYLES.items():
            style = replace(JOINT if op == "GRU0" else TWO, mix=name.replace("_", " "))
            idiom = f"The new state is {formula}."
            made[f"step_{short}_{name}"] = (idiom, partial(step, op, style))
    for name, (key, formula) in SIGMOID_STYLES.items():
        idiom = f"Hard sigmoid written as {formula}."
        for short, op, style in (("lstm", "LSTM", JOINT), ("gru", "GRU", TWO)):
            hard = replace(style, sigmoid=key)
            made[f"step_{short}_hard_{name}"] = (idiom, partial(step, op, hard))
        merged = replace(JOINT, sigmoid=key, merged=True, order=MERGED["LSTM"])
        made[f"step_lstm_hard_{name}_merged"] = (
            f"{idiom} Once for all gates.",
            partial(step, "LSTM", merged),
        )
    relu = replace(JOINT, tanh="Relu")
    forget = replace(JOINT, forget=True)
    made |= {
        "step_lstm_relu": ("Relu instead of Tanh.", partial(step, "LSTM", relu)),
        "step_gru_relu": ("Relu instead of Tanh.", partial(step, "GRU", replace(TWO, tanh="Relu"))),
        "step_rnn_relu": ("RNN with Relu.", partial(step, "RNN", relu)),
        "step_lstm_forget": (
            "Add of scalar 1.0 to the forget gate.",
            partial(step, "LSTM", forget),
        ),
        "step_lstm_forget_gates": (
            "Add of scalar 1.0 to the forget gate; a MatMul for each gate and input.",
            partial(step, "LSTM", replace(GATES, forget=True)),
        ),
        "step_lstm_peepholes": (
            "Peepholes: i and f see the old c, o the new one.",
            partial(step, "LSTM", JOINT, peepholes=True),
        ),
        "step_lstm_peepholes_gates": (
            "Peepholes; a MatMul for each gate and input.",
            partial(step, "LSTM", GATES, peepholes=True),
        ),
    }
    return made


# C: unrolled


STEPS = 5


def entries(g: Graph, value: str, by: str, axis: int, count: int = STEPS) -> list[str]:
    """Take a sequence apart: by `gather`, by `split` and Squeeze, or by `slice` and Squeeze."""
    if by == "gather":
        return [g.gather(value, i, axis) for i in range(count)]
    if by == "split":
        parts = g.split(value, [1] * count, axis)
    else:
        parts = [g.slice(value, i, i + 1, axis) for i in range(count)]
    return [g.squeeze(part, axis) for part in parts]


def chain(
    g: Graph, cells: Sequence[Cell], xs: Sequence[str], states: Sequence[str | None]
) -> list[list[str]]:
    """Steps of cells one after the other; the states after each."""
    after: list[list[str]] = []
    for cell, x in zip(cells, xs, strict=True):
        after.append(cell.step(g, x, after[-1] if after else states))
    return after


def first_states(g: Graph, start: str, states: Sequence[Array]) -> list[str | None]:
    """The states before a chain.

    Args:
        g: The graph.
        start: `input` of the graph, constant `zeros`, constant zeros of one row (`row`), or
            `simplified`: none at all.
        states: The states before the first step.
    """
    if start == "simplified":
        return [None for _ in states]
    if start == "input":
        return [g.feed(k, s, "N", H) for k, s in zip(STATES, states, strict=False)]
    rows = 1 if start == "row" else N
    return [g.constant(np.zeros((rows, H), np.float32)) for _ in states]


def draw_first(draw: Draw, op: str, start: str) -> list[Array]:
    """States before a chain or loop; zeros unless they are inputs."""
    states = draw_states(draw, state_count(op))
    return states if start == "input" else [np.zeros_like(state) for state in states]


def feed_sequence(
    g: Graph, draw: Draw, *, batch_first: bool = False, batch: int | str = "N"
) -> tuple[Array, str, int]:
    """Draw and feed a short sequence; give it (time first), its name and its axis of time."""
    x = draw.x(STEPS, N, IN)
    if batch_first:
        return x, g.feed("X", x.swapaxes(0, 1), batch, STEPS, IN), 1
    return x, g.feed("X", x, STEPS, batch, IN), 0


def give_sequence(
    g: Graph, hs: Sequence[str], expected: Array, axis: int, batch: int | str = "N"
) -> None:
    """Give stacked outputs."""
    size = expected.shape[-1]
    dims = (batch, len(hs), size) if axis else (len(hs), batch, size)
    g.give("Y", g.stack(hs, axis), expected.swapaxes(0, 1) if axis else expected, *dims)


def unrolled(
    op: str,
    style: Style,
    draw: Draw,
    *,
    by: str = "gather",
    batch_first: bool = False,
    start: str = "zeros",
    gives: str = "Y",
    reverse: bool = False,
    opset: int = 18,
    copies: bool = False,
) -> Graph:
    """One layer, unrolled; `gives` names the outputs: Y, h, c."""
    g = Graph(opset, copies=copies)
    cell = draw_cell(draw, op, style)
    batch = N if start == "zeros" else "N"
    x, sequence, axis = feed_sequence(g, draw, batch_first=batch_first, batch=batch)
    if style.product == "hoisted":
        sequence = cell.project(g, sequence)
    xs = entries(g, sequence, by, axis)
    first = draw_first(draw, op, start)
    states = first_states(g, start, first)
    after = chain(g, [cell] * STEPS, xs[::-1] if reverse else xs, states)
    y, *last = cell.run(x, first, reverse=reverse)
    if "Y" in gives:
        hs = [states[0] for states in after]
        give_sequence(g, hs[::-1] if reverse else hs, y, axis, batch)
    for name, value, array in zip(STATES, after[-1], last, strict=False):
        if name in gives:
            g.give(f"{name}_last", value, array, batch, H)
    return g


def unrolled_lstm_two_layers(draw: Draw) -> Graph:
    """Two stacked layers, unrolled layer by layer; only h of the last step of the upper one."""
    return two_layers(draw, "LSTM", TWO, by_layer=True)


def unrolled_gru_two_layers(draw: Draw) -> Graph:
    """Two stacked layers, unrolled step by step; all outputs of the upper one."""
    return two_layers(draw, "GRU", GEMM, by_layer=False)


def two_layers(draw: Draw, op: str, style: Style, *, by_layer: bool) -> Graph:
    """Two stacked layers, unrolled."""
    g = Graph()
    cells = [draw_cell(draw, op, style, inputs=size) for size in (IN, H)]
    x, sequence, axis = feed_sequence(g, draw)
    xs = entries(g, sequence, "split", axis)
    none = [None] * state_count(op)
    if by_layer:
        lower = chain(g, [cells[0]] * STEPS, xs, none)
        upper = chain(g, [cells[1]] * STEPS, [states[0] for states in lower], none)
    else:
        lower, upper = [], []
        for x_in in xs:
            lower.append(cells[0].step(g, x_in, lower[-1] if lower else none))
            upper.append(cells[1].step(g, lower[-1][0], upper[-1] if upper else none))
    y, h, *_ = cells[1].run(cells[0].run(x)[0])
    if by_layer:
        g.give("h_last", upper[-1][0], h, "N", H)
    else:
        give_sequence(g, [states[0] for states in upper], y, axis)
    return g


def unrolled_lstm_bidirectional(draw: Draw) -> Graph:
    """A second chain runs over the reversed order; outputs joined for each step, then stacked."""
    return two_ways(draw, "LSTM", JOINT, start="zeros", joined=True)


def unrolled_gru_bidirectional(draw: Draw) -> Graph:
    """A second chain runs over the reversed order; both stacks joined, and the last states."""
    return two_ways(draw, "GRU", GEMM, start="simplified", joined=False)


def two_ways(draw: Draw, op: str, style: Style, *, start: str, joined: bool) -> Graph:
    """A bidirectional layer, unrolled."""
    g = Graph()
    ways = [draw_cell(draw, op, style) for _ in range(2)]
    batch = N if start == "zeros" else "N"
    x, sequence, axis = feed_sequence(g, draw, batch=batch)
    xs = entries(g, sequence, "gather", axis)
    first = first_states(g, start, draw_first(draw, op, start))
    ahead = [states[0] for states in chain(g, [ways[0]] * STEPS, xs, first)]
    back = [states[0] for states in chain(g, [ways[1]] * STEPS, xs[::-1], first)][::-1]
    expected = [way.run(x, reverse=i == 1)[0] for i, way in enumerate(ways)]
    both = np.concatenate(expected, axis=-1)
    if joined:
        pairs = zip(ahead, back, strict=True)
        give_sequence(g, [g.concat(pair, -1) for pair in pairs], both, axis, batch)
    else:
        value = g.concat([g.stack(ahead), g.stack(back)], -1)
        g.give("Y", value, both, STEPS, batch, 2 * H)
        last = np.concatenate([expected[0][-1], expected[1][0]], axis=-1)
        g.give("last", g.concat([ahead[-1], back[0]], -1), last, batch, 2 * H)
    return g


def unrolled_lstm_odd_step(draw: Draw) -> Graph:
    """CELL ONLY: the step in the middle has other weights; runs before and after it are alike."""
    return odd_step(draw, "LSTM", JOINT)


def unrolled_gru_odd_step(draw: Draw) -> Graph:
    """CELL ONLY: the step in the middle has other weights; runs before and after it are alike."""
    return odd_step(draw, "GRU", GEMM)


def odd_step(draw: Draw, op: str, style: Style) -> Graph:
    """A chain whose middle step is another cell."""
    g = Graph()
    usual, odd = (draw_cell(draw, op, style) for _ in range(2))
    cells = [usual, usual, odd, usual, usual]
    x, sequence, axis = feed_sequence(g, draw)
    arrays = draw_states(draw, state_count(op))
    states = first_states(g, "input", arrays)
    after = chain(g, cells, entries(g, sequence, "gather", axis), states)
    ys = []
    for cell, value in zip(cells, x, strict=True):
        _, *arrays = cell.run(value[None], arrays)
        ys.append(arrays[0])
    give_sequence(g, [states[0] for states in after], np.stack(ys), axis)
    return g


def unrolled_lstm_autoregressive(draw: Draw) -> Graph:
    """CELL ONLY: each next x is a layer of h."""
    return feedback(draw, "LSTM", JOINT)


def unrolled_gru_autoregressive(draw: Draw) -> Graph:
    """CELL ONLY: each next x is a layer of h."""
    return feedback(draw, "GRU", GEMM)


def decode(
    cell: Cell, head: Array, bias: Array, x: Array, states: Sequence[Array], steps: int
) -> tuple[Array, list[Array]]:
    """What a cell that reads its own outputs gives: all x, last states."""
    ys = []
    for _ in range(steps):
        _, *states = cell.run(x[None], states)
        x = states[0] @ head + bias
        ys.append(x)
    return np.stack(ys), list(states)


def feedback(draw: Draw, op: str, style: Style) -> Graph:
    """A decoder, unrolled."""
    g = Graph()
    cell = draw_cell(draw, op, style)
    head, bias = draw.normal(H, IN), draw.normal(IN)
    x, arrays = draw.x(N, IN), draw_states(draw, state_count(op))
    value = g.feed("x", x, "N", IN)
    before: Sequence[str | None] = first_states(g, "input", arrays)
    ys = []
    for _ in range(STEPS):
        after = cell.step(g, value, before)
        value = g.op("Gemm", after[0], g.constant(head), g.constant(bias))
        before = after
        ys.append(value)
    give_sequence(g, ys, decode(cell, head, bias, x, arrays, STEPS)[0], 1)
    return g


def unrolled_lstm_middle_h(draw: Draw) -> Graph:
    """h of one step in the middle is an output as well as the last."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", TWO)
    x, sequence, axis = feed_sequence(g, draw)
    after = chain(g, [cell] * STEPS, entries(g, sequence, "slice", axis), [None, None])
    y, h, _ = cell.run(x)
    g.give("h_middle", after[2][0], y[2], "N", H)
    g.give("h_last", after[-1][0], h, "N", H)
    return g


def unrolled_lstm_middle_c(draw: Draw) -> Graph:
    """CELL ONLY: c of one step in the middle is an output; runs up to it and after it are alike."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", TWO)
    x, sequence, axis = feed_sequence(g, draw)
    states = draw_states(draw, 2)
    given = first_states(g, "input", states)
    after = chain(g, [cell] * STEPS, entries(g, sequence, "slice", axis), given)
    _, h, _ = cell.run(x, states)
    g.give("c_middle", after[2][1], cell.run(x[:3], states)[2], "N", H)
    g.give("h_last", after[-1][0], h, "N", H)
    return g


def unrolled_gru_every_other(draw: Draw) -> Graph:
    """The chain reads positions 0, 2 and 4 of the sequence only."""
    g = Graph()
    cell = draw_cell(draw, "GRU", GEMM)
    x, sequence, axis = feed_sequence(g, draw)
    xs = [g.gather(sequence, i, axis) for i in (0, 2, 4)]
    after = chain(g, [cell] * 3, xs, [None])
    give_sequence(g, [states[0] for states in after], cell.run(x[::2])[0], axis)
    return g


def unrolled_lstm_separate_inputs(draw: Draw) -> Graph:
    """x of each step is an input of its own."""
    g = Graph()
    cell = draw_cell(draw, "LSTM", JOINT)
    x = draw.x(STEPS, N, IN)
    xs = [g.feed(f"x{i}", value, "N", IN) for i, value in enumerate(x)]
    arrays = draw_states(draw, 2)
    after = chain(g, [cell] * STEPS, xs, first_states(g, "input", arrays))
    give_states(g, after[-1], cell.run(x, arrays)[1:])
    return g


UNROLLED_FUNCTIONS: tuple[Maker, ...] = (
    unrolled_lstm_two_layers,
    unrolled_gru_two_layers,
    unrolled_lstm_bidirectional,
    unrolled_gru_bidirectional,
    unrolled_lstm_odd_step,
    unrolled_gru_odd_step,
    unrolled_lstm_autoregressive,
    unrolled_gru_autoregressive,
    unrolled_lstm_middle_h,
    unrolled_lstm_middle_c,
    unrolled_gru_every_other,
    unrolled_lstm_separate_inputs,
)
UNROLLED: dict[str, tuple[str, str, Style, dict[str, Any]]] = {
    "lstm_batch_gather": (
        "Batch first by Gather; outputs stacked batch first.",
        "LSTM",
        TWO,
        {"batch_first": True, "start": "simplified"},
    ),
    "gru_batch_split": (
        "Batch first by Split; outputs stacked batch first.",
        "GRU",
        TWO,
        {"batch_first": True, "by": "split"},
    ),
    "lstm_last_h": ("Only the last h.", "LSTM", JOINT, {"start": "simplified", "gives": "h"}),
    "lstm_last_c": ("Only the last c.", "LSTM", JOINT, {"by": "split", "gives": "c"}),
    "gru0_last_h": ("Only the last h.", "GRU0", JOINT, {"start": "simplified", "gives": "h"}),
    "lstm_zero_row": (
        "Zero states are constants of one row that is broadcast.",
        "LSTM",
        GEMM,
        {"start": "row"},
    ),
    "gru_zero_row": (
        "The zero state is a constant of one row that is broadcast.",
        "GRU",
        GEMM,
        {"start": "row"},
    ),
    "lstm_copies": (
        "Each step has its own copies of equal weights.",
        "LSTM",
        TWO,
        {"copies": True, "start": "input"},
    ),
    "lstm_gates": (
        "A MatMul for each gate and input.",
        "LSTM",
        GATES,
        {"start": "simplified"},
    ),
    "lstm_merged": (
        "One Sigmoid for the gates that have one, in each step.",
        "LSTM",
        replace(JOINT, merged=True, order="ifog"),
        {"by": "split"},
    ),
    "gru_lerp_simplified": (
        "The new state is n + z * (h - n), and n - z * n in the first step.",
        "GRU",
        replace(TWO, mix="lerp"),
        {"start": "simplified"},
    ),
    "gru0_flipped_simplified": (
        "The new state is (1 - z) * h + z * n, and z * n in the first step.",
        "GRU0",
        replace(JOINT, mix="flipped"),
        {"start": "simplified"},
    ),
    "lstm_hoisted_simplified": (
        "The product of x is taken of the whole sequence; no products with zero states.",
        "LSTM",
        Style("hoisted"),
        {"by": "split", "start": "simplified"},
    ),
    "gru_hoisted_simplified": (
        "The product of x is taken of the whole sequence; no products with zero states.",
        "GRU",
        Style("hoisted"),
        {"by": "split", "start": "simplified"},
    ),
    "lstm_reversed": (
        "The chain runs from the last x to the first.",
        "LSTM",
        TWO,
        {"reverse": True},
    ),
    "lstm_opset11": (
        "Opset 11, where Split and Squeeze have attributes.",
        "LSTM",
        replace(TWO, axis=1),
        {"opset": 11, "by": "split"},
    ),
}


def unrolled_layers() -> Makers:
    """Layers unrolled in several ways."""
    made: Makers = {}
    hoisted = Style("hoisted")
    tanh = {"lstm": "LSTM", "gru": "GRU", "gru0": "GRU0", "rnn": "RNN"}
    for short, op in (*tanh.items(), ("rnn_relu", "RNN")):
        kind = "Relu" if short == "rnn_relu" else "Tanh"
        joint, two, gemm = (replace(style, tanh=kind) for style in (JOINT, TWO, GEMM))
        made |= {
            f"unrolled_{short}_zeros": (
                "Gather; zero states are constants; all outputs.",
                partial(unrolled, op, joint, by="gather"),
            ),
            f"unrolled_{short}_simplified": (
                "Split and Squeeze; no products with zero states; all outputs and last states.",
                partial(unrolled, op, two, by="split", start="simplified", gives="Yhc"),
            ),
            f"unrolled_{short}_state_batch_first": (
                "Batch first; Slice and Squeeze; states are inputs; only last states.",
                partial(
                    unrolled, op, gemm, by="slice", start="input", batch_first=True, gives="hc"
                ),
            ),
        }
    for short, op in tanh.items():
        text = "The product of x is taken of the whole sequence, which is then sliced."
        made[f"unrolled_{short}_hoisted"] = (
            text,
            partial(unrolled, op, hoisted, by="slice", start="input"),
        )
    for name, (idiom, op, style, options) in UNROLLED.items():
        made[f"unrolled_{name}"] = (idiom, partial(unrolled, op, style, **options))
    return made


# B: Loop and Scan


def loop_states(
    g: Graph, draw: Draw, op: str, start: str, sequence: str, axis: int = 1
) -> tuple[list[Array], list[str]]:
    """Draw the states before a loop.

    Args:
        g: The graph.
        draw: Random numbers.
        op: The cell.
        start: `input` of the graph, `constant`, zeros by ConstantOfShape (`zeros`) or by Expand
            (`expand`), or one stored row repeated by Expand (`learned`).
        sequence: The tensor whose batch the computed states have.
        axis: The axis of that batch.
    """
    count = state_count(op)
    arrays = draw_states(draw, count)
    if start == "input":
        pairs = zip(STATES, arrays, strict=False)
        return arrays, [g.feed(f"{name}0", array, "N", H) for name, array in pairs]
    if start == "constant":
        return arrays, [g.constant(array) for array in arrays]
    batch = g.slice(g.op("Shape", sequence), axis, axis + 1, 0)
    shape = g.concat([batch, g.constant([H])], 0)
    if start == "learned":
        rows = [array[:1] for array in arrays]
        expanded = [g.op("Expand", g.constant(row), shape) for row in rows]
        return [np.repeat(row, N, 0) for row in rows], expanded
    zeros = [np.zeros_like(array) for array in arrays]
    if start == "zeros":
        return zeros, [g.op("ConstantOfShape", shape) for _ in arrays]
    return zeros, [g.op("Expand", g.constant(0.0), shape) for _ in arrays]


@dataclass(frozen=True)
class Course:
    """How a Loop runs over a sequence."""

    trip: str | int = "shape"
    """`shape` of the sequence, its `size` (Shape, Slice, Squeeze), a constant, an `input`, or
    `none`."""
    on: str = "same"
    """The condition stays the `same`, is a `constant`, `count`s the steps, or is `missing` at the
    start."""
    axis: int = 0
    """The axis of time."""
    reverse: bool = False
    rank: int = 2
    """Rank of x and the states in the body."""
    typed: bool = True
    """Whether the inputs of the body have shapes."""


FED_STEPS = 5


def run_course(
    g: Graph,
    course: Course,
    sequence: str,
    states: Sequence[str],
    turn: Callable[[Graph, str, list[str]], tuple[Sequence[str], Sequence[str]]],
    batch: int | str = "N",
) -> list[str]:
    """Emit a Loop over a sequence; `turn` is given the body, x and the states."""
    length = ""
    if course.trip == "shape" or course.reverse or course.on == "count":
        length = g.gather(g.op("Shape", sequence), course.axis)
    elif course.trip == "size":
        size = g.slice(g.op("Shape", sequence), course.axis, course.axis + 1, 0)
        length = g.squeeze(size, 0)
    trips = {"none": "", "input": "steps"}
    trip = (
        g.constant(course.trip) if isinstance(course.trip, int) else trips.get(course.trip, length)
    )
    start = "" if course.on == "missing" else g.constant(True)
    last = g.op("Sub", length, g.constant(1)) if course.reverse else ""

    def whole(b: Graph, counter: str, go: str, names: list[str]) -> Turn:
        place = b.op("Sub", last, counter) if course.reverse else counter
        x = b.gather(sequence, place, course.axis)
        after, scans = turn(b, b.unsqueeze(x, 0) if course.rank == 3 else x, names)
        if course.on == "count":
            return after, scans, b.op("Less", b.add(counter, b.constant(1)), length)
        return after, scans, b.constant(True) if course.on == "constant" else None

    lead = (1,) * (course.rank - 2)
    shape = (*lead, batch, H) if course.typed else None
    return g.loop(trip, start, states, [shape] * len(states), whole)


def looped(
    op: str,
    style: Style,
    draw: Draw,
    *,
    start: str = "input",
    gives: str = "Yhc",
    inside: bool = False,
    opset: int = 18,
    flip: bool = False,
    steps: int | str = "T",
    **course: Any,
) -> Graph:
    """One layer in a Loop; `gives` names the outputs: Y, h, c; `flip` turns Y round after it."""
    g = Graph(opset, inside=inside)
    cell = draw_cell(draw, op, style)
    way = Course(**course)
    x, batch = draw.x(), N if start == "constant" else "N"
    dims = (batch, steps, IN) if way.axis else (steps, batch, IN)
    sequence = g.feed("X", x.swapaxes(0, way.axis), *dims)
    arrays, states = loop_states(g, draw, op, start, sequence, 1 - way.axis)
    if way.trip == "input":
        g.feed("steps", np.array(FED_STEPS))
    if way.rank == 3:
        states = [g.unsqueeze(state, 0) for state in states]
    if style.product == "hoisted":
        sequence = cell.project(g, sequence)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names)
        return after, after[:1] if "Y" in gives else []

    *last, y = run_course(g, way, sequence, states, turn, batch)
    if "Y" not in gives:
        last.append(y)
    taken = {"input": FED_STEPS}.get(str(way.trip), way.trip if isinstance(way.trip, int) else T)
    expected, *finals = cell.run(x[:taken], arrays, reverse=way.reverse)
    lead = (1,) * (way.rank - 2)
    if "Y" in gives:
        if flip:
            y = backwards(g, y)
        elif way.reverse:
            expected = expected[::-1]
        if way.axis:
            y = g.op("Transpose", y, perm=[1, 0, 2])
            g.give("Y", y, expected.swapaxes(0, 1), batch, "S", H)
        else:
            g.give("Y", y, expected.reshape(-1, *lead, N, H), "S", *lead, batch, H)
    for name, value, array in zip(STATES, last, finals, strict=False):
        if name in gives:
            g.give(f"{name}_last", value, array.reshape(*lead, N, H), *lead, batch, H)
    return g


def backwards(g: Graph, value: str) -> str:
    """Turn a tensor round along its first axis."""
    ranges = [g.constant([number]) for number in (-1, -(2**31), 0, -1)]
    return g.op("Slice", value, *ranges)


def scanned(
    op: str,
    style: Style,
    draw: Draw,
    *,
    start: str = "input",
    gives: str = "Yhc",
    inside: bool = False,
    batch_first: bool = False,
    reverse: bool = False,
    reverse_output: bool = False,
    typed: bool = True,
    opset: int = 18,
) -> Graph:
    """One layer in a Scan; `gives` names the outputs: Y, h, c."""
    g = Graph(opset, inside=inside)
    cell = draw_cell(draw, op, style)
    x, batch = draw.x(), N if start == "constant" else "N"
    axis = int(batch_first)
    dims = (batch, "T", IN) if axis else ("T", batch, IN)
    sequence = g.feed("X", x.swapaxes(0, axis), *dims)
    arrays, states = loop_states(g, draw, op, start, sequence, 1 - axis)
    if style.product == "hoisted":
        sequence = cell.project(g, sequence)

    def turn(b: Graph, names: list[str], pieces: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, pieces[0], names)
        return after, after[:1] if "Y" in gives else []

    attributes: dict[str, list[int]] = {}
    if batch_first:
        attributes["scan_input_axes"] = [1]
    if reverse:
        attributes["scan_input_directions"] = [1]
    if "Y" in gives and batch_first:
        attributes["scan_output_axes"] = [1]
    if "Y" in gives and (reverse or reverse_output):
        attributes["scan_output_directions"] = [int(reverse_output)]
    width = len(cell.w) if style.product == "hoisted" else IN
    known: list[Dims] = [*((batch, H) for _ in states), (batch, width)]
    shapes = known if typed else [None] * len(known)
    results = g.scan(states, [sequence], shapes, turn, **attributes)
    y, *finals = cell.run(x, arrays, reverse=reverse)
    if "Y" in gives:
        y = y[::-1] if reverse != reverse_output else y
        dims = (batch, "T", H) if axis else ("T", batch, H)
        g.give("Y", results[len(states)], y.swapaxes(0, axis), *dims)
    for name, value, array in zip(STATES, results, finals, strict=False):
        if name in gives:
            g.give(f"{name}_last", value, array, batch, H)
    return g


def start_loop(
    draw: Draw, op: str, style: Style, *, start: str = "input", inputs: int = IN
) -> tuple[Graph, Cell, Array, str, list[Array], list[str]]:
    """What functions with a body of their own begin with: graph, cell, X and states."""
    g = Graph()
    cell = draw_cell(draw, op, style, inputs=inputs)
    x = draw.x(T, N, inputs)
    sequence = g.feed("X", x, "T", "N", inputs)
    return g, cell, x, sequence, *loop_states(g, draw, op, start, sequence)


def loop_lstm_early_exit(draw: Draw) -> Graph:
    """DECLINED: the loop ends when some h is large."""
    return early_exit(draw, "LSTM", JOINT)


def loop_gru_early_exit(draw: Draw) -> Graph:
    """DECLINED: the loop ends when some h is large."""
    return early_exit(draw, "GRU", TWO)


def early_exit(draw: Draw, op: str, style: Style) -> Graph:
    """A Loop whose condition depends on the state."""
    g = Graph()
    cell = draw_cell(draw, op, style)
    x = draw.x() * np.linspace(0.2, 2, T, dtype=np.float32)[:, None, None]
    sequence = g.feed("X", x, "T", "N", IN)
    arrays, states = loop_states(g, draw, op, "zeros", sequence)
    y = cell.run(x, arrays)[0]
    peaks = np.abs(y).max(axis=(1, 2))
    end = max(i for i in range(1, T - 1) if peaks[i] > peaks[:i].max())
    limit = g.constant((peaks[end] + peaks[:end].max()) / 2)
    length = g.gather(g.op("Shape", sequence), 0)

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        after = cell.step(b, b.gather(sequence, counter), names)
        peak = b.op("ReduceMax", b.op("Abs", after[0]), keepdims=0)
        return after, after[:1], b.op("Less", peak, limit)

    shapes = [("N", H)] * len(states)
    results = g.loop(length, g.constant(True), states, shapes, turn)
    _, *finals = cell.run(x[: end + 1], arrays)
    g.give("Y", results[-1], y[: end + 1], "S", "N", H)
    g.give("h_last", results[0], finals[0], "N", H)
    return g


def loop_lstm_sum(draw: Draw) -> Graph:
    """CELL ONLY: a further state adds up h."""
    g, cell, x, sequence, arrays, states = start_loop(draw, "LSTM", TWO)
    zeros = g.op("Sub", states[0], states[0])

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names[:2])
        return [*after, b.add(names[2], after[0])], []

    *_, total = run_course(g, Course(), sequence, [*states, zeros], turn)
    g.give("total", total, cell.run(x, arrays)[0].sum(0), "N", H)
    return g


def loop_lstm_dense_output(draw: Draw) -> Graph:
    """What is scanned out is a layer of h."""
    return dense_output(draw, "LSTM", JOINT, scan=False)


def scan_gru_dense_output(draw: Draw) -> Graph:
    """What is scanned out is a layer of h."""
    return dense_output(draw, "GRU", GEMM, scan=True)


def dense_output(draw: Draw, op: str, style: Style, *, scan: bool) -> Graph:
    """A body with a layer after the cell."""
    g, cell, x, sequence, arrays, states = start_loop(draw, op, style)
    head, bias = draw.normal(H, 2), draw.normal(2)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names)
        product = b.op("MatMul", after[0], b.constant(head))
        return after, [b.add(product, b.constant(bias))]

    if scan:
        shapes = [("N", H)] * len(states) + [("N", IN)]
        *last, y = g.scan(states, [sequence], shapes, lambda b, s, p: turn(b, p[0], s))
    else:
        *last, y = run_course(g, Course(), sequence, states, turn)
    expected, *finals = cell.run(x, arrays)
    g.give("Y", y, expected @ head + bias, "T", "N", 2)
    g.give("h_last", last[0], finals[0], "N", H)
    return g


def loop_lstm_prenet(draw: Draw) -> Graph:
    """A layer before the cell."""
    return prenet(draw, "LSTM", GEMM, scan=False)


def scan_gru_prenet(draw: Draw) -> Graph:
    """A layer before the cell."""
    return prenet(draw, "GRU", JOINT, scan=True)


def prenet(draw: Draw, op: str, style: Style, *, scan: bool) -> Graph:
    """A body with a layer before the cell."""
    g, cell, x, sequence, arrays, states = start_loop(draw, op, style)
    front = draw.normal(IN, IN)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        value = b.op("Tanh", b.op("MatMul", value, b.constant(front)))
        after = cell.step(b, value, names)
        return after, after[:1]

    if scan:
        shapes = [("N", H)] * len(states) + [("N", IN)]
        *last, y = g.scan(states, [sequence], shapes, lambda b, s, p: turn(b, p[0], s))
    else:
        *last, y = run_course(g, Course(), sequence, states, turn)
    expected, *finals = cell.run(np.tanh(x @ front), arrays)
    g.give("Y", y, expected, "T", "N", H)
    g.give("h_last", last[0], finals[0], "N", H)
    return g


def loop_lstm_norm(draw: Draw) -> Graph:
    """DECLINED: LayerNormalization between the products and the gates."""
    g, cell, _, sequence, _, states = start_loop(draw, "LSTM", TWO)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        total = normalise(b, draw, cell.total(b, value, names[0], "iofg"), 4 * H)
        after = cell.lstm_of_totals(b, cell.cut(b, total, cell.groups()), names[1])
        return after, after[:1]

    *_, y = run_course(g, Course(), sequence, states, turn)
    g.give("Y", y, None, "T", "N", H)
    return g


def loop_lstm_decoder(draw: Draw) -> Graph:
    """CELL ONLY: each next x is a layer of h, for a constant number of steps."""
    return decoder(draw, "LSTM", JOINT)


def loop_gru_decoder(draw: Draw) -> Graph:
    """CELL ONLY: each next x is a layer of h, for a constant number of steps."""
    return decoder(draw, "GRU", GEMM)


def decoder(draw: Draw, op: str, style: Style) -> Graph:
    """A Loop that reads its own outputs."""
    g = Graph()
    cell = draw_cell(draw, op, style)
    head, bias = draw.normal(H, IN), draw.normal(IN)
    x = draw.x(N, IN)
    first = g.feed("x", x, "N", IN)
    arrays, states = loop_states(g, draw, op, "input", first)

    def turn(b: Graph, _counter: str, _go: str, names: list[str]) -> Turn:
        after = cell.step(b, names[0], names[1:])
        value = b.op("Gemm", after[0], b.constant(head), b.constant(bias))
        return [value, *after], [value], None

    shapes = [("N", IN)] + [("N", H)] * len(states)
    results = g.loop(g.constant(T), g.constant(True), [first, *states], shapes, turn)
    y, finals = decode(cell, head, bias, x, arrays, T)
    g.give("Y", results[-1], y, T, "N", IN)
    g.give("h_last", results[1], finals[0], "N", H)
    return g


def masked_run(
    cell: Cell, x: Array, states: Sequence[Array], mask: Array
) -> tuple[Array, list[Array]]:
    """A cell that keeps its states where the mask is false: h after all steps, last states."""
    ys = []
    for value, keep in zip(x, mask, strict=True):
        after = cell.run(value[None], states)[1:]
        pairs = zip(after, states, strict=True)
        states = [np.where(keep[:, None], new, old) for new, old in pairs]
        ys.append(states[0])
    return np.stack(ys), list(states)


LENGTHS = np.array([7, 4, 2])


def loop_lstm_mask(draw: Draw) -> Graph:
    """CELL ONLY: Where keeps the states by a mask that is an input of the graph."""
    return masked(draw, "LSTM", JOINT, by="mask", gives="Yhc")


def loop_gru_mask(draw: Draw) -> Graph:
    """CELL ONLY: Where keeps the state by a mask that is an input of the graph."""
    return masked(draw, "GRU", TWO, by="mask", gives="Yhc")


def loop_lstm_lengths_last(draw: Draw) -> Graph:
    """Where keeps the states unless step < lengths; only the last states."""
    return masked(draw, "LSTM", TWO, by="lengths", gives="hc")


def loop_gru_lengths_zeros(draw: Draw) -> Graph:
    """Where keeps the state unless step < lengths; outputs are zero there."""
    return masked(draw, "GRU", GEMM, by="lengths", gives="Yhc", zeros=True)


def loop_lstm_lengths_hold(draw: Draw) -> Graph:
    """Where keeps the states unless step < lengths; outputs are the kept h there."""
    return masked(draw, "LSTM", JOINT, by="lengths", gives="Yhc")


def loop_gru_lengths_outside(draw: Draw) -> Graph:
    """The mask Range < lengths is made before the loop, its rows are gathered in the body."""
    return masked(draw, "GRU", TWO, by="range", gives="h")


def masked(draw: Draw, op: str, style: Style, *, by: str, gives: str, zeros: bool = False) -> Graph:
    """A body that keeps its states in the padding of sequences."""
    g, cell, x, sequence, arrays, states = start_loop(draw, op, style)
    mask = np.arange(T)[:, None] < LENGTHS
    length = g.gather(g.op("Shape", sequence), 0)
    if by == "mask":
        mask = draw.rng.random((T, N)) < 0.6
        masks = g.feed("mask", mask, "T", "N")
    else:
        lengths = g.feed("lengths", LENGTHS, "N")
    if by == "range":
        steps = g.op("Range", g.constant(0), length, g.constant(1))
        masks = g.op("Less", g.unsqueeze(steps, 1), g.unsqueeze(lengths, 0))

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        new = cell.step(b, b.gather(sequence, counter), names)
        row = b.op("Less", counter, lengths) if by == "lengths" else b.gather(masks, counter)
        keep = b.unsqueeze(row, 1)
        after = [b.op("Where", keep, *pair) for pair in zip(new, names, strict=True)]
        scans = [b.op("Where", keep, new[0], b.constant(0.0))] if zeros else after[:1]
        return after, scans if "Y" in gives else [], None

    results = g.loop(length, g.constant(True), states, [("N", H)] * len(states), turn)
    y, finals = masked_run(cell, x, arrays, mask)
    if "Y" in gives:
        g.give("Y", results[-1], np.where(mask[:, :, None], y, 0) if zeros else y, "T", "N", H)
    for name, value, array in zip(STATES, results, finals, strict=False):
        if name in gives:
            g.give(f"{name}_last", value, array, "N", H)
    return g


def scan_lstm_mask(draw: Draw) -> Graph:
    """CELL ONLY: Where keeps the states by a mask that is scanned beside the sequence."""
    g, cell, x, sequence, arrays, states = start_loop(draw, "LSTM", TWO)
    mask = draw.rng.random((T, N)) < 0.6
    masks = g.feed("mask", mask, "T", "N")
    flags = g.op("Cast", g.unsqueeze(masks, 2), to=onnx.TensorProto.FLOAT)

    def turn(b: Graph, names: list[str], pieces: list[str]) -> tuple[list[str], list[str]]:
        new = cell.step(b, pieces[0], names)
        keep = b.op("Cast", pieces[1], to=onnx.TensorProto.BOOL)
        after = [b.op("Where", keep, *pair) for pair in zip(new, names, strict=True)]
        return after, after[:1]

    shapes = [("N", H), ("N", H), ("N", IN), ("N", 1)]
    results = g.scan(states, [sequence, flags], shapes, turn)
    y, finals = masked_run(cell, x, arrays, mask)
    give_run(g, results, y, finals)
    return g


def give_run(g: Graph, results: Sequence[str], y: Array, finals: Sequence[Array]) -> None:
    """Give all outputs and the last states of a loop, which come the other way round."""
    g.give("Y", results[-1], y, "T", "N", H)
    for name, value, array in zip(STATES, results, finals, strict=False):
        g.give(f"{name}_last", value, array, "N", H)


def loop_lstm_stacked(draw: Draw) -> Graph:
    """Two stacked cells in one body."""
    return stacked_body(draw, "LSTM", JOINT, scan=False)


def scan_gru_stacked(draw: Draw) -> Graph:
    """Two stacked cells in one body."""
    return stacked_body(draw, "GRU", GEMM, scan=True)


def loop_gru_stacked_between(draw: Draw) -> Graph:
    """Two stacked cells in one body, a layer between them."""
    return stacked_body(draw, "GRU", TWO, scan=False, between=True)


def stacked_body(draw: Draw, op: str, style: Style, *, scan: bool, between: bool = False) -> Graph:
    """Two stacked layers that run step by step."""
    g, lower, x, sequence, arrays, states = start_loop(draw, op, style, start="zeros")
    upper = draw_cell(draw, op, style, inputs=H)
    count = state_count(op)
    more_arrays, more = loop_states(g, draw, op, "input", sequence)
    middle = draw.normal(H, H)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        below = lower.step(b, value, names[:count])
        handed = below[0]
        if between:
            handed = b.op("Relu", b.op("MatMul", handed, b.constant(middle)))
        above = upper.step(b, handed, names[count:])
        return [*below, *above], above[:1]

    if scan:
        shapes = [("N", H)] * (2 * count) + [("N", IN)]
        start = states + more
        *last, y = g.scan(start, [sequence], shapes, lambda b, s, p: turn(b, p[0], s))
    else:
        *last, y = run_course(g, Course(), sequence, states + more, turn)
    below, h_lower, *_ = lower.run(x, arrays)
    if between:
        below = np.maximum(below @ middle, 0)
    expected, h_upper, *_ = upper.run(below, more_arrays)
    g.give("Y", y, expected, "T", "N", H)
    g.give("h_lower", last[0], h_lower, "N", H)
    g.give("h_upper", last[count], h_upper, "N", H)
    return g


def loop_lstm_two_ways(draw: Draw) -> Graph:
    """Two cells in one body, one of which reads the sequence from its end."""
    g, ahead, x, sequence, _, states = start_loop(draw, "LSTM", JOINT, start="zeros")
    back = draw_cell(draw, "LSTM", JOINT)
    more = loop_states(g, draw, "LSTM", "zeros", sequence)[1]
    length = g.gather(g.op("Shape", sequence), 0)

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        place = b.op("Sub", b.op("Sub", length, counter), b.constant(1))
        first = ahead.step(b, b.gather(sequence, counter), names[:2])
        second = back.step(b, b.gather(sequence, place), names[2:])
        return [*first, *second], [first[0], second[0]], None

    shapes = [("N", H)] * 4
    *_, y, y_back = g.loop(length, g.constant(True), states + more, shapes, turn)
    g.give("Y", y, ahead.run(x)[0], "T", "N", H)
    g.give("Y_back", y_back, back.run(x, reverse=True)[0][::-1], "T", "N", H)
    return g


def scan_gru_two_ways(draw: Draw) -> Graph:
    """Two cells in one body, one of which is given the sequence reversed; outputs joined."""
    g, ahead, x, sequence, _, states = start_loop(draw, "GRU", TWO, start="zeros")
    back = draw_cell(draw, "GRU", TWO)
    more = loop_states(g, draw, "GRU", "zeros", sequence)[1]

    def turn(b: Graph, names: list[str], pieces: list[str]) -> tuple[list[str], list[str]]:
        after = [ahead.step(b, pieces[0], names[:1])[0], back.step(b, pieces[1], names[1:])[0]]
        return after, after

    *_, y, y_back = g.scan(
        states + more,
        [sequence, sequence],
        [("N", H), ("N", H), ("N", IN), ("N", IN)],
        turn,
        scan_input_directions=[0, 1],
        scan_output_directions=[0, 1],
    )
    expected = [ahead.run(x)[0], back.run(x, reverse=True)[0]]
    g.give("Y", g.concat([y, y_back], -1), np.concatenate(expected, -1), "T", "N", 2 * H)
    return g


def loop_lstm_in_if(draw: Draw) -> Graph:
    """A Loop in a branch of an If, all in the branch; the other branch gives zeros."""
    return in_branch(draw, "LSTM", JOINT, inside=False)


def loop_gru_in_if_inside(draw: Draw) -> Graph:
    """A Loop in a branch of an If, its body holds the weights; the other branch gives zeros."""
    return in_branch(draw, "GRU", TWO, inside=True)


def in_branch(draw: Draw, op: str, style: Style, *, inside: bool) -> Graph:
    """A Loop nested in an If."""
    g = Graph(inside=inside)
    cell = draw_cell(draw, op, style)
    x = draw.x()
    sequence = g.feed("X", x, "T", "N", IN)
    flag = g.feed("flag", np.array(True))

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names)
        return after, after[:1]

    def then(b: Graph) -> list[str]:
        states = loop_states(b, draw, op, "zeros", sequence)[1]
        return run_course(b, Course(), sequence, states, turn)[-1:]

    def other(b: Graph) -> list[str]:
        size = b.slice(b.op("Shape", sequence), 0, 2, 0)
        return [b.op("ConstantOfShape", b.concat([size, b.constant([H])], 0))]

    g.give("Y", g.branch(flag, then, other)[0], cell.run(x)[0], "T", "N", H)
    return g


def loop_lstm_all_c(draw: Draw) -> Graph:
    """CELL ONLY: c is scanned out, of which the operator gives only the last."""
    g, cell, x, sequence, arrays, states = start_loop(draw, "LSTM", JOINT)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names)
        return after, after

    *_, y, cs = run_course(g, Course(), sequence, states, turn)
    g.give("Y", y, cell.run(x, arrays)[0], "T", "N", H)
    expected = [cell.run(x[: i + 1], arrays)[2] for i in range(T)]
    g.give("C", cs, np.stack(expected), "T", "N", H)
    return g


def loop_lstm_states_crossed(draw: Draw) -> Graph:
    """CELL ONLY: the body gives c where h comes in, and h where c does."""
    g, cell, x, sequence, states, given = start_loop(draw, "LSTM", JOINT)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = cell.step(b, value, names)
        return after[::-1], after[:1]

    results = run_course(g, Course(), sequence, given, turn)
    ys = []
    for value in x:
        _, h, c = cell.run(value[None], states)
        states = [c, h]
        ys.append(h)
    give_run(g, results, np.stack(ys), states)
    return g


def loop_gru_residual_state(draw: Draw) -> Graph:
    """CELL ONLY: the state that goes on is h' + x."""
    return changed_state(draw, lambda b, new, old, x: b.add(new, x), lambda new, old, x: new + x)


def loop_gru_zoneout(draw: Draw) -> Graph:
    """CELL ONLY: the state that goes on is 0.9 h' + 0.1 h."""

    def emit(b: Graph, new: str, old: str, _: str) -> str:
        return b.add(b.mul(new, b.constant(0.9)), b.mul(old, b.constant(0.1)))

    return changed_state(draw, emit, lambda new, old, x: 0.9 * new + 0.1 * old)


def changed_state(
    draw: Draw,
    emit: Callable[[Graph, str, str, str], str],
    compute: Callable[[Array, Array, Array], Array],
) -> Graph:
    """A GRU in a Loop, where another state goes on than the one it gives."""
    g, cell, x, sequence, (h,), states = start_loop(draw, "GRU", TWO, inputs=H)

    def turn(b: Graph, value: str, names: list[str]) -> tuple[list[str], list[str]]:
        after = emit(b, cell.step(b, value, names)[0], names[0], value)
        return [after], [after]

    results = run_course(g, Course(), sequence, states, turn)
    ys = []
    for value in x:
        h = compute(cell.run(value[None], [h])[1], h, value)
        ys.append(h)
    give_run(g, results, np.stack(ys), [h])
    return g


def loop_gru_previous_x(draw: Draw) -> Graph:
    """CELL ONLY: step t reads X at t - 1, the first thus the last entry."""
    g, cell, x, sequence, arrays, states = start_loop(draw, "GRU", GEMM)
    length = g.gather(g.op("Shape", sequence), 0)

    def turn(b: Graph, counter: str, _go: str, names: list[str]) -> Turn:
        place = b.op("Sub", counter, b.constant(1))
        after = cell.step(b, b.gather(sequence, place), names)
        return after, after, None

    results = g.loop(length, g.constant(True), states, [("N", H)], turn)
    y, *finals = cell.run(np.roll(x, 1, axis=0), arrays)
    give_run(g, results, y, finals)
    return g


LOOP_FUNCTIONS: tuple[Maker, ...] = (
    loop_lstm_early_exit,
    loop_gru_early_exit,
    loop_lstm_sum,
    loop_lstm_dense_output,
    scan_gru_dense_output,
    loop_lstm_prenet,
    scan_gru_prenet,
    loop_lstm_norm,
    loop_lstm_decoder,
    loop_gru_decoder,
    loop_lstm_mask,
    loop_gru_mask,
    loop_lstm_lengths_last,
    loop_gru_lengths_zeros,
    loop_lstm_lengths_hold,
    loop_gru_lengths_outside,
    scan_lstm_mask,
    loop_lstm_stacked,
    loop_gru_stacked_between,
    scan_gru_stacked,
    loop_lstm_two_ways,
    scan_gru_two_ways,
    loop_lstm_in_if,
    loop_gru_in_if_inside,
    loop_lstm_all_c,
    loop_lstm_states_crossed,
    loop_gru_residual_state,
    loop_gru_zoneout,
    loop_gru_previous_x,
)
LOOPED: dict[str, tuple[str, str, Style, dict[str, Any]]] = {
    "lstm_joint": ("Gather by the counter; joint kernel.", "LSTM", JOINT, {}),
    "lstm_gemm": ("Gather by the counter; Gemm.", "LSTM", GEMM, {}),
    "lstm_gates": ("Gather by the counter; a MatMul for each gate.", "LSTM", GATES, {}),
    "gru_gemm": ("Gather by the counter; Gemm.", "GRU", GEMM, {}),
    "gru_split": ("Gather by the counter; MatMul, Split.", "GRU", TWO, {"start": "zeros"}),
    "gru0_joint": ("Gather by the counter; joint kernel.", "GRU0", JOINT, {}),
    "rnn_joint": ("Gather by the counter; joint kernel.", "RNN", JOINT, {}),
    "rnn_relu": ("Relu.", "RNN", replace(TWO, tanh="Relu"), {"start": "expand"}),
    "lstm_batch_first": ("Batch first, Gather on axis 1.", "LSTM", TWO, {"axis": 1}),
    "gru_batch_first": (
        "Batch first, Gather on axis 1; zero state.",
        "GRU",
        GEMM,
        {"axis": 1, "start": "zeros"},
    ),
    "lstm_reverse": ("Reads T - 1 - t; outputs as they come.", "LSTM", JOINT, {"reverse": True}),
    "gru_reverse_flipped": (
        "Reads T - 1 - t; outputs turned round by Slice with step -1.",
        "GRU",
        GEMM,
        {"reverse": True, "flip": True},
    ),
    "lstm_last": ("Only last states.", "LSTM", JOINT, {"gives": "hc"}),
    "lstm_last_h": ("Only the last h.", "LSTM", TWO, {"gives": "h", "start": "zeros"}),
    "gru_all": ("Only all outputs, the last state is not used.", "GRU", TWO, {"gives": "Y"}),
    "lstm_zeros": ("Zero states by ConstantOfShape.", "LSTM", JOINT, {"start": "zeros"}),
    "gru0_expand": ("Zero state by Expand.", "GRU0", TWO, {"start": "expand"}),
    "lstm_constant_state": ("Constant states.", "LSTM", TWO, {"start": "constant"}),
    "gru_learned_state": ("One stored row, expanded.", "GRU", GEMM, {"start": "learned"}),
    "lstm_trip_7": ("Constant trip count, all of X.", "LSTM", JOINT, {"trip": 7}),
    "gru_trip_7_of_7": (
        "Constant trip count, the length that X is declared to have.",
        "GRU",
        GEMM,
        {"trip": 7, "steps": 7},
    ),
    "lstm_trip_4": ("Constant trip count, fewer than X has.", "LSTM", JOINT, {"trip": 4}),
    "gru_trip_input": ("The trip count is an input.", "GRU", GEMM, {"trip": "input"}),
    "gru_trip_size": ("Trip count by Shape, Slice, Squeeze.", "GRU", TWO, {"trip": "size"}),
    "lstm_on_constant": ("The body gives a constant condition.", "LSTM", TWO, {"on": "constant"}),
    "lstm_on_missing": ("No condition at the start.", "LSTM", TWO, {"on": "missing"}),
    "lstm_on_count": ("The condition is t + 1 < T.", "LSTM", JOINT, {"on": "count"}),
    "gru_while": (
        "No trip count, the condition is t + 1 < T.",
        "GRU",
        GEMM,
        {"trip": "none", "on": "count"},
    ),
    "lstm_hoisted": ("The product of x is taken before.", "LSTM", Style("hoisted"), {}),
    "gru_hoisted": ("The product of x is taken before.", "GRU", Style("hoisted"), {}),
    "gru0_hoisted": ("The product of x is taken before.", "GRU0", Style("hoisted"), {}),
    "rnn_hoisted": ("The product of x is taken before.", "RNN", Style("hoisted"), {}),
    "lstm_hoisted_batch_first": (
        "The product of x is taken before, batch first.",
        "LSTM",
        Style("hoisted", merged=True, order="ifog"),
        {"axis": 1, "start": "zeros"},
    ),
    "lstm_rank3": ("States of rank 3 in the body.", "LSTM", JOINT, {"rank": 3}),
    "gru_rank3": ("State of rank 3 in the body.", "GRU", TWO, {"rank": 3}),
    "lstm_inside": ("The body holds the weights.", "LSTM", JOINT, {"inside": True}),
    "gru_untyped": ("Inputs of the body have no shapes.", "GRU", TWO, {"typed": False}),
    "lstm_opset11": ("Opset 11.", "LSTM", replace(TWO, axis=1), {"opset": 11}),
}
SCANNED: dict[str, tuple[str, str, Style, dict[str, Any]]] = {
    "lstm_joint": ("Joint kernel.", "LSTM", JOINT, {}),
    "lstm_gates": ("A MatMul for each gate and input.", "LSTM", GATES, {"start": "zeros"}),
    "gru_gemm": ("Gemm.", "GRU", GEMM, {}),
    "gru0_joint": ("Joint kernel.", "GRU0", JOINT, {"start": "expand"}),
    "rnn_joint": ("Joint kernel.", "RNN", JOINT, {}),
    "lstm_batch_first": ("Axis 1 in and out.", "LSTM", TWO, {"batch_first": True}),
    "lstm_reverse": (
        "Both directions 1.",
        "LSTM",
        JOINT,
        {"reverse": True, "reverse_output": True},
    ),
    "gru_reverse": (
        "Both directions 1; zero state.",
        "GRU",
        GEMM,
        {"reverse": True, "reverse_output": True, "start": "zeros"},
    ),
    "gru_reverse_input": ("Only the input reversed.", "GRU", TWO, {"reverse": True}),
    "lstm_reverse_output": ("Only the output reversed.", "LSTM", TWO, {"reverse_output": True}),
    "lstm_last": ("Only last states.", "LSTM", TWO, {"gives": "hc"}),
    "gru_all": ("The last state is not used.", "GRU", GEMM, {"gives": "Y", "start": "zeros"}),
    "lstm_constant_state": ("Constant states.", "LSTM", TWO, {"start": "constant"}),
    "lstm_hoisted": ("The product of x is taken before.", "LSTM", Style("hoisted"), {}),
    "gru_hoisted": ("The product of x is taken before.", "GRU", Style("hoisted"), {}),
    "lstm_inside": ("The body holds the weights.", "LSTM", JOINT, {"inside": True}),
    "gru_untyped": ("Inputs of the body have no shapes.", "GRU", TWO, {"typed": False}),
    "gru_opset11": ("Opset 11.", "GRU", replace(TWO, axis=1), {"opset": 11}),
}


def loops() -> Makers:
    """Layers in Loop and Scan."""
    made: Makers = {}
    for name, (idiom, op, style, options) in LOOPED.items():
        made[f"loop_{name}"] = (idiom, partial(looped, op, style, **options))
    for name, (idiom, op, style, options) in SCANNED.items():
        made[f"scan_{name}"] = (idiom, partial(scanned, op, style, **options))
    return made


def makers() -> Makers:
    """All graphs by name: idiom and maker."""
    steps = step_styles() | step_gates() | documented(STEP_FUNCTIONS)
    chains = unrolled_layers() | documented(UNROLLED_FUNCTIONS)
    return steps | chains | loops() | documented(LOOP_FUNCTIONS)


def make(name: str, idiom: str, maker: Maker) -> Case:
    """Make one graph, and compare what is expected with onnxruntime."""
    g = maker(Draw(zlib.crc32(name.encode())))
    model = g.model()
    atol = TOLERANCE[g.dtype.name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    outputs = {}
    for (key, array), got in zip(g.expected.items(), session.run(None, g.feeds), strict=True):
        outputs[key] = np.asarray(got) if array is None else array
        if outputs[key].shape != got.shape or np.max(np.abs(outputs[key] - got)) > atol:
            raise ValueError(f"{name}: onnxruntime disagrees on {key}")
    return Case(
        name=name,
        model=model,
        feeds=g.feeds,
        outputs=outputs,
        exporter=f"onnx {onnx.__version__}, by hand",
        idiom=idiom,
        atol=atol,
    )


if __name__ == "__main__":
    made = (make(name, *entry) for name, entry in makers().items())
    write_cases(made, "make_cells.py", HERE / "cells")
