"""Random recurrent ONNX graphs, each with the masked graph that removal of units must equal.

Removing a hidden unit is exact when the smaller model equals the original one in which every
consumer (a contraction such as MatMul, Conv, the X or the R of a recurrent operator) has zero
weights for the features the unit reaches. The builder here emits a graph and, beside every
tensor, its own record of which positions belong to removed units. Building twice with one seed,
once without and once with removed units, gives the model and its masked reference. Nothing here
looks at the analysis under test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Kept = Mapping[str, Sequence[Sequence[int]]]
Dim = int | str

OPSETS = (9, 10, 11, 13, 15, 17, 18, 21)
MIN_IR = {9: 4, 10: 5, 11: 7, 13: 7, 15: 8, 17: 8, 18: 8, 21: 10}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {
    "LSTM": (("HardSigmoid", "Tanh", "Tanh"), ("Sigmoid", "Softsign", "Tanh")),
    "GRU": (("HardSigmoid", "Tanh"), ("Sigmoid", "Softsign")),
    "RNN": (("Softsign",), ("HardSigmoid",)),
}


@dataclass(frozen=True)
class RandomGraph:
    """A random model, inputs for it, and its masked references.

    Attributes:
        seed: What it was made from.
        model: The graph, clean for the full checker.
        layers: Recurrent node name -> (directions, hidden size); subgraphs included.
        patterns: The patterns it contains.
        feeds: Two sets of inputs; time steps and batch differ where they are dynamic.
        states: State graph input -> state graph output.
    """

    seed: int
    model: onnx.ModelProto
    layers: dict[str, tuple[int, int]]
    patterns: tuple[str, ...]
    feeds: tuple[dict[str, np.ndarray], ...]
    states: dict[str, str]

    def masked(self, kept: Kept) -> onnx.ModelProto:
        """The same graph with removed units cut off from all that reads them.

        Consumers have zero weights at the features of removed units, a contraction of two
        run-time values and every state output gets a Mul by a 0/1 constant. A feature made of
        several units counts as removed when any of them is. A pattern named "block:..." is left
        as it is, so nothing equals a model that lost units there.

        Args:
            kept: Layer name -> for each direction the kept units; other layers keep all.
        """
        for name, rows in kept.items():
            if len(rows) != self.layers[name][0]:
                raise ValueError(f"{name} has {self.layers[name][0]} directions, not {len(rows)}")
        return _build(self.seed, kept).finish()


def random_graph(seed: int) -> RandomGraph:
    """The random graph of one seed."""
    builder = _build(seed, {})
    return RandomGraph(
        seed,
        builder.finish(),
        builder.layers,
        tuple(dict.fromkeys(builder.patterns)),
        (builder.feeds[0], builder.feeds[1]),
        builder.states,
    )


@dataclass(frozen=True)
class _Tensor:
    """A value of the graph and the positions in it that belong to removed units.

    Attributes:
        name: Its name in the graph.
        axes: A letter per axis: T time, N batch, D direction, F features.
        shape: A size per axis, a name where it is dynamic.
        dead: True where a unit of the position is removed. It has one axis per axis of the
            tensor, of size 1 where all positions are alike. None: no unit reaches the tensor.
    """

    name: str
    axes: str
    shape: tuple[Dim, ...]
    dead: np.ndarray | None = None

    @property
    def width(self) -> int:
        return int(self.shape[self.axes.index("F")])

    def without(self, axis: int) -> tuple[str, tuple[Dim, ...]]:
        """Axes and shape less one axis."""
        return self.axes[:axis] + self.axes[axis + 1 :], self.shape[:axis] + self.shape[axis + 1 :]

    def spread(self, axis: int) -> np.ndarray:
        """The record of removed positions, with this axis at its full size."""
        dead = np.zeros((1,) * len(self.axes), bool) if self.dead is None else self.dead
        size = int(self.shape[axis]) if isinstance(self.shape[axis], int) else 1
        return np.broadcast_to(dead, (*dead.shape[:axis], size, *dead.shape[axis + 1 :]))

    def features(self) -> np.ndarray:
        """True per feature that is removed; features are what a contraction sums over."""
        axis = self.axes.index("F")
        others = tuple(i for i in range(len(self.axes)) if i != axis)
        return np.asarray(self.spread(axis).any(axis=others))


def _union(*tensors: _Tensor) -> np.ndarray | None:
    known = [t.dead for t in tensors if t.dead is not None]
    return functools.reduce(np.logical_or, known) if known else None


@dataclass(frozen=True)
class _Layer:
    name: str
    op: str
    direction: str
    hidden: int

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1


@dataclass(frozen=True)
class _Weighted:
    """A layer with what another one needs to have the same weights."""

    layer: _Layer
    x: _Tensor
    names: tuple[_Argument, ...]
    arrays: tuple[np.ndarray, ...]
    attributes: dict[str, Any]


_Argument = _Tensor | np.ndarray | str
_Pattern = Callable[["_Builder", _Tensor], "_Tensor | None"]


class _Builder:
    """Emits nodes. No choice may depend on `kept`, or the two builds of a seed would differ."""

    def __init__(self, seed: int, kept: Kept) -> None:
        self.rng = np.random.default_rng(seed)
        self.kept = kept
        # In a masked graph a Mul carries the name of a state output, so its producer is renamed.
        self.suffix = "_full" if kept else ""
        self.opset = int(self.rng.choice(OPSETS))
        self.ir_version = int(self.rng.integers(MIN_IR[self.opset], 11))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.read: set[str] = set()
        self.feeds: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        self.layers: dict[str, tuple[int, int]] = {}
        self.patterns: list[str] = []
        self.states: dict[str, str] = {}
        self.count = 0
        self.masks = 0
        self.steps: Dim = "T" if self.chance(0.85) else 5
        self.batch: Dim = "N" if self.chance(0.85) else int(self.rng.integers(1, 4))
        self.sizes = ({"T": 5, "N": 2}, {"T": int(self.rng.integers(3, 9)), "N": 3})
        self.lens: _Tensor | None = None
        self.flag: _Tensor | None = None
        self.twins: list[str] = []
        self.weighted: list[_Weighted] = []  # layers of the main graph
        self.pool: list[_Tensor] = []  # unit-bearing sequences of earlier layers
        self.finals: list[tuple[_Tensor, _Tensor | None]] = []  # Y_h and Y_c of earlier layers
        self.x = self.source()

    # Random choices

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def weights(self, fan_in: int, *shape: int) -> np.ndarray:
        values: np.ndarray = 0.8 / np.sqrt(fan_in) * self.rng.standard_normal(shape)
        return values.astype(np.float32)

    def use(self, pattern: str) -> None:
        if pattern not in PATTERNS:
            raise KeyError(pattern)
        self.patterns.append(pattern)

    def apply(self, table: Mapping[str, _Pattern], tensor: _Tensor) -> _Tensor:
        """A random pattern of the table that fits the tensor."""
        names = list(table)
        for index in self.rng.permutation(len(names)):
            result = table[names[index]](self, tensor)
            if result is not None:
                self.use(names[index])
                return result
        raise AssertionError(f"no pattern fits {tensor}")

    # Graph parts

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}_{self.count}"

    def constant(self, value: np.ndarray) -> str:
        """An initializer, sometimes a Constant node."""
        name = self.fresh("const")
        tensor = numpy_helper.from_array(value, name)
        if self.chance(0.1):
            self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def op(
        self,
        kind: str,
        *arguments: _Argument,
        names: Sequence[str] = (),
        node: str | None = None,
        **attributes: Any,
    ) -> str:
        """One node; returns the name of its first output."""
        inputs = [self.argument(a) for a in arguments]
        while inputs and not inputs[-1]:
            inputs.pop()
        node = node or self.fresh(kind.lower())
        outputs = list(names) or [f"{node}_out"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=node, **attributes))
        self.read.update(inputs)
        return outputs[0]

    def argument(self, argument: _Argument) -> str:
        if isinstance(argument, np.ndarray):
            return self.constant(argument)
        return argument.name if isinstance(argument, _Tensor) else argument

    def axes_op(
        self, kind: str, tensor: _Argument, axes: list[int], since: int, **attributes: Any
    ) -> str:
        """A node whose axes are an attribute before opset `since`, an input from there on."""
        if self.opset < since:
            return self.op(kind, tensor, axes=axes, **attributes)
        return self.op(kind, tensor, np.array(axes, np.int64), **attributes)

    def graph_input(
        self, name: str, axes: str, shape: tuple[Dim, ...], values: Sequence[np.ndarray]
    ) -> _Tensor:
        elem = helper.np_dtype_to_tensor_dtype(values[0].dtype)
        self.inputs.append(helper.make_tensor_value_info(name, elem, shape))
        for feed, value in zip(self.feeds, values, strict=True):
            feed[name] = value
        return _Tensor(name, axes, shape)

    def float_input(self, name: str, axes: str, shape: tuple[Dim, ...]) -> _Tensor:
        concrete = [[s[d] if isinstance(d, str) else d for d in shape] for s in self.sizes]
        values = [self.rng.standard_normal(c).astype(np.float32) for c in concrete]
        return self.graph_input(name, axes, shape, values)

    def graph_output(self, tensor: _Tensor, name: str | None = None) -> None:
        name = name or tensor.name
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.shape))
        self.read.add(name)

    def state_output(self, source: str, parts: Sequence[_Tensor], name: str) -> None:
        """The states of a layer, or a Concat of several, as the output that goes with `source`."""
        state = parts[0] if len(parts) == 1 else self.join(parts, "D", name + self.suffix)
        if self.kept:
            assert state.dead is not None
            mask = numpy_helper.from_array((~state.dead).astype(np.float32), f"{name}_mask")
            self.initializers.append(mask)
            self.op("Mul", state, mask.name, names=[name], node=f"{name}_mul")
        self.graph_output(state, name)
        self.states[source] = name

    def info(self, tensor: _Tensor, shaped: bool = False) -> onnx.ValueInfoProto:
        # Exporters leave shapes in subgraphs out as often as not; onnxruntime's Scan needs them.
        shape = tensor.shape if shaped or self.chance(0.5) else None
        return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)

    def body(
        self,
        build: Callable[[], Sequence[_Tensor]],
        inputs: Sequence[onnx.ValueInfoProto] = (),
        shaped: bool = False,
    ) -> tuple[onnx.GraphProto, list[_Tensor]]:
        """The nodes that `build` emits as a subgraph, with its results as outputs."""
        outer, self.nodes = self.nodes, []
        results = list(build())
        outputs = [self.info(r, shaped) for r in results]
        graph = helper.make_graph(self.nodes, self.fresh("body"), inputs, outputs)
        self.nodes = outer
        self.read.update(r.name for r in results)
        return graph, results

    def finish(self) -> onnx.ModelProto:
        # Only what is read stays an output: layers read through Y_h alone have no Y, and so on.
        for node in self.nodes:
            if node.name in self.layers:
                outputs = [o if o in self.read else "" for o in node.output]
                while len(outputs) > 1 and not outputs[-1]:
                    outputs.pop()
                del node.output[:]
                node.output.extend(outputs)
        graph = helper.make_graph(
            self.nodes, "random", self.inputs, self.outputs, self.initializers
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)
        return onnx.shape_inference.infer_shapes(model) if "value_info" in self.patterns else model

    # What consumers see

    def zeroed(self, weights: np.ndarray, axis: int, tensor: _Tensor) -> np.ndarray:
        """Constant weights, zero along `axis` where the features of the tensor are removed."""
        alive = ~tensor.features()
        shape = [1] * weights.ndim
        shape[axis] = -1
        result: np.ndarray = weights * alive.reshape(shape).astype(weights.dtype)
        return result

    def live(self, tensor: _Tensor, *others: _Tensor) -> _Tensor:
        """A factor of a contraction with others, zero where the features of any are removed."""
        if not self.kept:
            return tensor
        removed = np.logical_or.reduce([t.features() for t in (tensor, *others)])
        self.masks += 1
        mask = self.vector(tensor, (~removed).astype(np.float32))
        named = numpy_helper.from_array(mask, f"mask_{self.masks}")
        self.initializers.append(named)
        result = self.op("Mul", tensor, named.name, names=[f"live_{self.masks}"], node=named.name)
        return replace(tensor, name=result)

    def vector(self, tensor: _Tensor, values: np.ndarray) -> np.ndarray:
        """One value per feature, shaped to broadcast over the tensor."""
        return values.reshape([-1] + [1] * (len(tensor.axes) - 1 - tensor.axes.index("F")))

    # Operators that move positions

    def transpose(self, tensor: _Tensor, axes: str) -> _Tensor:
        if tensor.axes == axes:
            return tensor
        perm = [tensor.axes.index(a) for a in axes]
        name = self.op("Transpose", tensor, perm=perm)
        dead = None if tensor.dead is None else tensor.dead.transpose(perm)
        return _Tensor(name, axes, tuple(tensor.shape[p] for p in perm), dead)

    def squeeze(self, tensor: _Tensor, letter: str) -> _Tensor:
        axis = tensor.axes.index(letter)
        name = self.axes_op("Squeeze", tensor, [axis], 13)
        dead = None if tensor.dead is None else tensor.dead.squeeze(axis)
        return _Tensor(name, *tensor.without(axis), dead)

    def unsqueeze(self, tensor: _Tensor, axis: int, letter: str) -> _Tensor:
        name = self.axes_op("Unsqueeze", tensor, [axis], 13)
        dead = None if tensor.dead is None else np.expand_dims(tensor.dead, axis)
        axes = tensor.axes[:axis] + letter + tensor.axes[axis:]
        return _Tensor(name, axes, (*tensor.shape[:axis], 1, *tensor.shape[axis:]), dead)

    def gather(self, tensor: _Tensor, letter: str, index: int) -> _Tensor:
        """One index of an axis; the axis goes."""
        axis = tensor.axes.index(letter)
        size = tensor.shape[axis]
        if self.opset < 11 and index < 0 and isinstance(size, int):
            index += size
        name = self.op("Gather", tensor, np.array(index, np.int64), axis=axis)
        dead = None if tensor.dead is None else tensor.spread(axis).take(index, axis)
        return _Tensor(name, *tensor.without(axis), dead)

    def slice(self, tensor: _Tensor, letter: str, start: int, stop: int | None) -> _Tensor:
        """A range of an axis; `stop` None is the end."""
        axis = tensor.axes.index(letter)
        end = np.iinfo(np.int64).max if stop is None else stop
        name = self.cut(tensor, start, end, axis)
        size = tensor.shape[axis]
        length = len(range(*slice(start, stop).indices(size if isinstance(size, int) else 3)))
        shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
        if tensor.dead is None:
            return _Tensor(name, tensor.axes, shape)
        index = (slice(None),) * axis + (slice(start, stop),)
        return _Tensor(name, tensor.axes, shape, tensor.spread(axis)[index])

    def cut(self, tensor: _Argument, start: int, end: int, axis: int) -> str:
        """A Slice, whose bounds are attributes before opset 10."""
        if self.opset < 10:
            return self.op("Slice", tensor, starts=[start], ends=[end], axes=[axis])
        return self.op("Slice", tensor, *[np.array([v], np.int64) for v in (start, end, axis)])

    def split(self, tensor: _Tensor, letter: str) -> list[_Tensor]:
        """Two halves of an axis."""
        axis = tensor.axes.index(letter)
        size = int(tensor.shape[axis])
        names = [self.fresh("half"), self.fresh("half")]
        parts = [size // 2, size // 2]
        if self.opset < 13:
            self.op("Split", tensor, names=names, axis=axis, split=parts)
        elif self.opset >= 18 and self.chance(0.5):
            self.op("Split", tensor, names=names, axis=axis, num_outputs=2)
        else:
            self.op("Split", tensor, np.array(parts, np.int64), names=names, axis=axis)
        shape = (*tensor.shape[:axis], size // 2, *tensor.shape[axis + 1 :])
        deads: list[np.ndarray] | list[None] = [None, None]
        if tensor.dead is not None:
            deads = np.split(tensor.spread(axis), 2, axis)
        return [_Tensor(n, tensor.axes, shape, d) for n, d in zip(names, deads, strict=True)]

    def join(self, tensors: Sequence[_Tensor], letter: str, name: str | None = None) -> _Tensor:
        first = tensors[0]
        axis = first.axes.index(letter)
        parts = [self.transpose(t, first.axes) for t in tensors]
        result = self.op("Concat", *parts, axis=axis, names=[name] if name else ())
        size = sum(int(p.shape[axis]) for p in parts)
        shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
        dead = None
        if any(p.dead is not None for p in parts):
            deads = [p.spread(axis) for p in parts]
            sizes = [max(d) for d in zip(*(d.shape for d in deads), strict=True)]
            for i, d in enumerate(deads):
                deads[i] = np.broadcast_to(d, (*sizes[:axis], d.shape[axis], *sizes[axis + 1 :]))
            dead = np.concatenate(deads, axis)
        return _Tensor(result, first.axes, shape, dead)

    # Operators that work per position

    def unary(
        self, tensor: _Tensor, kind: str, *arguments: _Argument, **attributes: Any
    ) -> _Tensor:
        return replace(tensor, name=self.op(kind, tensor, *arguments, **attributes))

    def binary(self, kind: str, left: _Tensor, right: _Tensor | np.ndarray) -> _Tensor:
        """An elementwise operator; the right side has the layout of the left or broadcasts."""
        name = self.op(kind, left, right)
        if isinstance(right, np.ndarray):
            return replace(left, name=name)
        return replace(left, name=name, dead=_union(left, right))

    def reduce(self, tensor: _Tensor, kind: str, letter: str) -> _Tensor:
        """A sum, mean or maximum over an axis, which goes."""
        axis = tensor.axes.index(letter)
        since = 13 if kind == "ReduceSum" else 18
        name = self.axes_op(kind, tensor, [axis], since, keepdims=0)
        dead = None if tensor.dead is None else np.asarray(tensor.spread(axis).any(axis))
        return _Tensor(name, *tensor.without(axis), dead)

    # Shapes

    def size(self, tensor: _Argument, axis: int) -> str:
        """A size at run time, as a tensor of one element."""
        return self.op("Gather", self.op("Shape", tensor), np.array([axis], np.int64), axis=0)

    def pack(self, *parts: int | str) -> str:
        """A shape out of constants and sizes."""
        arguments = [np.array([p], np.int64) if isinstance(p, int) else p for p in parts]
        return self.op("Concat", *arguments, axis=0)

    def flatten(self, tensor: _Tensor, how: str) -> _Tensor:
        """Direction and features, the last two axes, as one feature axis."""
        lead = len(tensor.axes) - 2
        width = int(tensor.shape[-2]) * int(tensor.shape[-1])
        target: _Argument
        if how == "zero_copy":
            target = np.array([0] * lead + [-1], np.int64)
        elif how == "constant":
            sizes = [d if isinstance(d, int) else 0 for d in tensor.shape[:lead]]
            target = np.array([*sizes, width], np.int64)
        elif how == "shape_gather":
            target = self.pack(*[self.size(tensor, i) for i in range(lead)], width)
        else:
            shape = self.op("Shape", tensor)
            sizes_of_lead = self.cut(shape, 0, lead, 0)
            last: int | str = width if self.chance(0.5) else -1
            if how == "shape_mul":
                last = self.op("Gather", shape, np.array([lead + 1], np.int64), axis=0)
                last = self.op("Mul", last, np.array([tensor.shape[-2]], np.int64))
            target = self.pack(sizes_of_lead, last)
        name = self.op("Reshape", tensor, target)
        shape_out = (*tensor.shape[:lead], width)
        axes = tensor.axes[:lead] + "F"
        if tensor.dead is None:
            return _Tensor(name, axes, shape_out)
        full = (*tensor.dead.shape[:lead], int(tensor.shape[-2]), int(tensor.shape[-1]))
        dead = np.broadcast_to(tensor.dead, full).reshape(*full[:lead], width)
        return _Tensor(name, axes, shape_out, dead)

    def zeros(self, *leading: int, width: int) -> str:
        """Zeros [*leading, batch, width] of a computed shape, where the width is a constant."""
        batch = self.size(self.x, 1)
        if self.chance(0.7):
            return self.op("ConstantOfShape", self.pack(*leading, batch, width))
        zero = np.zeros((*leading, 1, width) if self.chance(0.5) else (1,), np.float32)
        return self.op("Expand", zero, self.pack(*leading, batch, width))

    # Inputs

    def source(self) -> _Tensor:
        """The input sequence, as [time, batch, features]."""
        width = int(self.rng.integers(3, 7))
        form = self.pick("time_major", "time_major", "batch_first", "tokens")
        self.use(f"input:{form}")
        if form == "time_major":
            return self.float_input("x", "TNF", (self.steps, self.batch, width))
        if form == "batch_first":
            x = self.float_input("x", "NTF", (self.batch, self.steps, width))
            return self.transpose(x, "TNF")
        shape: tuple[Dim, ...] = (self.steps, self.batch)
        concrete = [[s[d] if isinstance(d, str) else d for d in shape] for s in self.sizes]
        values = [self.rng.integers(0, 10, c) for c in concrete]
        tokens = self.graph_input("tokens", "TN", shape, values)
        table = self.rng.standard_normal((10, width)).astype(np.float32)
        embedded = self.op("Gather", table, tokens, axis=0)
        return _Tensor(embedded, "TNF", (*shape, width))

    def lengths(self) -> _Tensor:
        """The int32 input of sequence lengths, at least one of them the full length."""
        if self.lens is None:
            values: list[np.ndarray] = []
            for sizes in self.sizes:
                steps = sizes[self.steps] if isinstance(self.steps, str) else self.steps
                batch = sizes[self.batch] if isinstance(self.batch, str) else self.batch
                lens = self.rng.integers(1, steps + 1, batch).astype(np.int32)
                lens[0] = steps
                values.append(lens)
            self.lens = self.graph_input("lens", "N", (self.batch,), values)
        return self.lens

    def condition(self) -> str:
        """A bool that is true for the first feed and false for the second."""
        if self.flag is None:
            integer = self.chance(0.5)
            kind = np.int64 if integer else np.bool_
            values: list[np.ndarray] = [np.array(1, kind), np.array(0, kind)]
            self.flag = self.graph_input("mode" if integer else "flag", "", (), values)
        if self.flag.name == "mode":
            return self.op("Greater", self.flag, np.array(0, np.int64))
        return self.flag.name

    def partner(self, tensor: _Tensor) -> _Tensor | None:
        """An earlier sequence with as many features, in the layout of the tensor."""
        if "T" not in tensor.axes:
            return None
        found = [p for p in self.pool if p.width == tensor.width and p.name != tensor.name]
        if not found:
            return None
        return self.transpose(found[int(self.rng.integers(len(found)))], tensor.axes)

    def dense(self, tensor: _Tensor, outputs: int) -> _Tensor:
        """A MatMul on the last axis: the plain consumer."""
        weights = self.zeroed(self.weights(tensor.width, tensor.width, outputs), 0, tensor)
        return self.dense_result(tensor, self.op("MatMul", tensor, weights), outputs)

    def dense_result(self, tensor: _Tensor, name: str, outputs: int) -> _Tensor:
        axis = tensor.axes.index("F")
        shape = (*tensor.shape[:axis], outputs, *tensor.shape[axis + 1 :])
        return _Tensor(name, tensor.axes, shape)

    def outputs_count(self) -> int:
        return int(self.rng.integers(3, 7))

    # Control flow

    def branch(
        self, then: Callable[[], Sequence[_Tensor]], other: Callable[[], Sequence[_Tensor]]
    ) -> list[_Tensor]:
        condition = self.condition()
        then_graph, left = self.body(then)
        else_graph, right = self.body(other)
        names = [self.fresh("if") for _ in left]
        self.op("If", condition, names=names, then_branch=then_graph, else_branch=else_graph)
        pairs = zip(names, left, right, strict=True)
        return [replace(a, name=n, dead=_union(a, b)) for n, a, b in pairs]

    def scan(
        self,
        states: Sequence[_Tensor],
        sequence: _Tensor,
        step: Callable[[list[_Tensor], _Tensor], tuple[list[_Tensor], list[_Tensor]]],
    ) -> tuple[list[_Tensor], list[_Tensor]]:
        """A Scan over time. `step` maps states and one element to new states and outputs."""
        axis = sequence.axes.index("T")
        inner = [replace(s, name=self.fresh("state")) for s in states]
        dead = None if sequence.dead is None else sequence.dead.squeeze(axis)
        element = _Tensor(self.fresh("element"), *sequence.without(axis), dead)
        made: list[list[_Tensor]] = []

        def build() -> list[_Tensor]:
            made.extend(step(inner, element))
            return made[0] + made[1]

        inputs = [self.info(t, shaped=True) for t in (*inner, element)]
        graph, _ = self.body(build, inputs, shaped=True)
        finals, outputs = made
        names = [self.fresh("scan") for _ in (*finals, *outputs)]
        attributes: dict[str, Any] = {"scan_input_axes": [axis]} if axis or self.chance(0.3) else {}
        self.op("Scan", *states, sequence, names=names, body=graph, num_scan_inputs=1, **attributes)
        last = [replace(f, name=n) for f, n in zip(finals, names[: len(finals)], strict=True)]
        stacked = []
        for t, name in zip(outputs, names[len(finals) :], strict=True):
            dead = None if t.dead is None else t.dead[None]
            stacked.append(_Tensor(name, "T" + t.axes, (self.steps, *t.shape), dead))
        return last, stacked

    def loop(
        self, trips: _Argument, carried: _Tensor, step: Callable[[str, _Tensor], _Tensor]
    ) -> _Tensor:
        """A Loop with one carried value; `step` gets the iteration number and the value."""
        number, go_on = self.fresh("iteration"), self.fresh("condition")
        inner = replace(carried, name=self.fresh("carried"))
        inputs = [
            helper.make_tensor_value_info(number, TensorProto.INT64, []),
            helper.make_tensor_value_info(go_on, TensorProto.BOOL, []),
            self.info(inner),
        ]

        def build() -> list[_Tensor]:
            same = _Tensor(self.op("Identity", go_on), "", ())
            return [same, step(number, inner)]

        graph, results = self.body(build, inputs)
        graph.output[0].CopyFrom(
            helper.make_tensor_value_info(results[0].name, TensorProto.BOOL, [])
        )
        condition = "" if self.chance(0.5) else self.constant(np.array(True))
        name = self.op("Loop", trips, condition, carried, body=graph)
        return replace(results[1], name=name, dead=_union(carried, results[1]))

    # Recurrent layers

    def store(self, values: np.ndarray, name: str, how: str) -> str:
        """Recurrent weights as the graph may hold them."""
        if how == "constant_node":
            node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
            self.nodes.append(node)
            return name
        if how == "transposed" and values.ndim == 3:
            stored = self.stored(values.transpose(0, 2, 1), f"{name}_t")
            return self.op("Transpose", stored, perm=[0, 2, 1], names=[name])
        if how == "concat":
            # Directions apart as PyTorch exports them; else a cut between gates or anywhere.
            axis = 0 if values.shape[0] == 2 else int(self.rng.integers(1, values.ndim))
            size = values.shape[axis]
            cut = 1 if axis == 0 else size // 2 if size % 2 == 0 else size // 3
            parts = np.split(values, [cut], axis)
            stored_parts = [self.stored(p, f"{name}_{i}") for i, p in enumerate(parts)]
            return self.op("Concat", *stored_parts, axis=axis, names=[name])
        return self.stored(values, name)

    def stored(self, values: np.ndarray, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def recurrent(
        self,
        x: _Tensor,
        layer: _Layer,
        initial: Sequence[_Tensor] = (),
        whole: bool = True,
        record: bool = False,
    ) -> tuple[_Tensor, _Tensor, _Tensor | None]:
        """One recurrent operator on [time, batch, features]; returns Y, Y_h, Y_c.

        `whole` says that x spans the sequence, so sequence lengths make sense.
        """
        directions, hidden, rows = layer.directions, layer.hidden, GATES[layer.op] * layer.hidden
        lstm = layer.op == "LSTM"
        dead = self.removed(layer)
        for state in initial:  # what a removed unit starts from is as removed as the unit
            if state.dead is not None:
                dead |= state.dead[:, 0, :]

        attributes: dict[str, Any] = {"hidden_size": hidden, "direction": layer.direction}
        self.use(f"layer:{layer.direction}")
        kind = layer.op
        if layer.op == "GRU":
            reset = int(self.rng.integers(2))
            kind = f"GRU_{reset}"
            if reset or self.chance(0.5):
                attributes["linear_before_reset"] = reset
        chosen: tuple[str, ...] = ()
        if self.chance(0.15):
            self.use("layer:activations")
            options = ACTIVATIONS[layer.op]
            chosen = options[int(self.rng.integers(len(options)))]
            kind = "RNN_other" if layer.op == "RNN" else kind
        elif layer.op == "RNN":
            kind = self.pick("RNN_tanh", "RNN_relu")
            chosen = ("Relu",) if kind == "RNN_relu" else ()
        if chosen:
            attributes["activations"] = list(chosen) * directions
        self.use(f"layer:{kind}")

        w = self.zeroed(self.weights(x.width, directions, rows, x.width), 2, x)
        r = self.weights(hidden, directions, rows, hidden) * ~dead[:, None, :]
        how = self.pick("initializer", "initializer", "constant_node", "transposed", "concat")
        self.use(f"weights:{how}")
        arguments: list[_Argument] = [
            x,
            self.store(w, f"{layer.name}_W", how),
            self.store(r.astype(np.float32), f"{layer.name}_R", how),
            *([""] * 5),
        ]
        bias = 0.2 * self.rng.standard_normal((directions, 2 * rows)).astype(np.float32)
        if self.chance(0.75):
            arguments[3] = self.store(bias, f"{layer.name}_B", how)
        else:
            self.use("layer:no_bias")
        if whole and self.chance(0.2):
            self.use("layer:sequence_lens")
            arguments[4] = self.lengths()
        for i, state in enumerate(initial):
            arguments[5 + i] = state
        if lstm and self.chance(0.35):
            self.use("layer:peepholes")
            values = 0.3 * self.rng.standard_normal((directions, 3 * hidden)).astype(np.float32)
            arguments[7] = self.stored(values, f"{layer.name}_P")

        if record:
            self.weighted.append(
                _Weighted(layer, x, tuple(arguments[1:4]), (w, r, bias), attributes)
            )
        return self.recurrent_op(x, layer, arguments, attributes, dead)

    def recurrent_op(
        self,
        x: _Tensor,
        layer: _Layer,
        arguments: Sequence[_Argument],
        attributes: dict[str, Any],
        dead: np.ndarray,
    ) -> tuple[_Tensor, _Tensor, _Tensor | None]:
        lstm = layer.op == "LSTM"
        names = [f"{layer.name}_{s}{self.suffix}" for s in ("yhc" if lstm else "yh")]
        self.op(layer.op, *arguments, names=names, node=layer.name, **attributes)
        y_shape: tuple[Dim, ...] = (x.shape[0], layer.directions, self.batch, layer.hidden)
        y = _Tensor(names[0], "TDNF", y_shape, dead[None, :, None, :])
        h = _Tensor(names[1], "DNF", y_shape[1:], dead[:, None, :])
        return y, h, replace(h, name=names[2]) if lstm else None

    def removed(self, layer: _Layer) -> np.ndarray:
        """A new layer's removed units, [directions, hidden]."""
        self.layers[layer.name] = (layer.directions, layer.hidden)
        dead = np.zeros((layer.directions, layer.hidden), bool)
        for row, units in zip(dead, self.kept.get(layer.name, ()), strict=False):
            row[:] = True
            row[list(units)] = False
        return dead

    def twin(self, other: _Weighted, x: _Tensor) -> tuple[_Tensor, _Tensor, _Tensor | None]:
        """The weights of a layer once more, on another input; the units are the same ones."""
        layer = replace(other.layer, name=f"{other.layer.name}_twin{len(self.layers)}")
        dead = self.removed(layer) | self.removed(other.layer)
        arguments: list[_Argument] = [x, *other.names]
        if self.kept:  # here the weights are stored twice, with zeros at other places
            w, r, _ = other.arrays
            for index, values in ((1, self.zeroed(w, 2, x)), (2, r * ~dead[:, None, :])):
                name = f"{layer.name}_masked_{index}"
                arguments[index] = self.stored(values.astype(np.float32), name)
        return self.recurrent_op(x, layer, arguments, other.attributes, dead)

    def stateful(self, x: _Tensor, layer: _Layer) -> tuple[_Tensor, _Tensor, _Tensor | None]:
        """A layer with initial states of a random kind."""
        letters = "hc" if layer.op == "LSTM" else "h"
        shape: tuple[Dim, ...] = (layer.directions, self.batch, layer.hidden)
        encoders = [f for f in self.finals if f[0].shape == shape]
        kinds = ["none", "computed_zeros", "constant", "inputs"]
        kinds += ["packed_hc"] if letters == "hc" else []
        kinds += ["encoder"] * 2 if encoders else []
        kind = self.pick(*kinds)
        self.use(f"state:{kind}")
        initial: list[_Tensor] = []
        if kind == "computed_zeros":
            zeros = self.zeros(layer.directions, width=layer.hidden)
            initial = [_Tensor(zeros, "DNF", shape)] * len(letters)
        elif kind == "constant":
            target = self.pack(layer.directions, self.size(self.x, 1), layer.hidden)
            for _ in letters:
                values = 0.3 * self.rng.standard_normal((layer.directions, 1, layer.hidden))
                name = self.op("Expand", values.astype(np.float32), target)
                initial.append(_Tensor(name, "DNF", shape))
        elif kind == "inputs":
            initial = [self.float_input(f"{layer.name}_{s}0", "DNF", shape) for s in letters]
        elif kind == "packed_hc":
            packed_shape = (2 * layer.directions, *shape[1:])
            packed = self.float_input(f"{layer.name}_hc0", "DNF", packed_shape)
            limits = ((0, layer.directions), (layer.directions, 2 * layer.directions))
            initial = [self.slice(packed, "D", *limit) for limit in limits]
        elif kind == "encoder":
            h, c = encoders[int(self.rng.integers(len(encoders)))]
            initial = [h, c or h][: len(letters)]

        y, h, c = self.recurrent(x, layer, initial, record=True)
        states = [h] if c is None else [h, c]
        if kind == "inputs":
            for state, letter in zip(states, letters, strict=True):
                self.state_output(f"{layer.name}_{letter}0", [state], f"{layer.name}_{letter}")
        elif kind == "packed_hc":
            self.state_output(f"{layer.name}_hc0", states, f"{layer.name}_hc")
        return y, h, c

    def sequence(self, y: _Tensor) -> _Tensor:
        """Y [time, direction, batch, hidden] as a sequence of feature vectors.

        Now and then an operator reads Y as it is: one vector for both directions ties them.
        """
        draw = self.rng.random()
        if draw < 0.08:
            self.use("raw:elementwise")
            y = self.binary("Mul", y, self.rng.uniform(0.5, 1.5, y.width).astype(np.float32))
        elif draw < 0.12:
            self.use("raw:dense")
            y = self.dense(y, self.outputs_count())
        table = MERGE_TWO if y.shape[1] == 2 else MERGE_ONE
        return self.apply(table, y)

    def plain_layer(self, x: _Tensor, layer: _Layer) -> _Tensor:
        y, h, c = self.stateful(x, layer)
        self.finals.append((h, c))
        return self.sequence(y)

    def if_layer(self, x: _Tensor, layer: _Layer) -> _Tensor:
        """A recurrent operator in each branch of an If; their units are tied by the result."""

        def branch(name: str) -> list[_Tensor]:
            y, h, _ = self.recurrent(x, replace(layer, name=f"{layer.name}_{name}"))
            return [self.flatten(self.transpose(y, "TNDF"), "zero_copy"), h]

        self.use("if:layer")
        result, h = self.branch(
            functools.partial(branch, "then"), functools.partial(branch, "else")
        )
        self.finals.append((h, None))
        return result

    def scan_layer(self, x: _Tensor, layer: _Layer) -> _Tensor:
        """A Scan over time with a recurrent operator of one step as its body."""
        self.use("scan:layer")
        layer = replace(layer, direction="forward")
        shape: tuple[Dim, ...] = (1, self.batch, layer.hidden)
        zero = _Tensor(self.zeros(1, width=layer.hidden), "DNF", shape)

        def step(states: list[_Tensor], x_t: _Tensor) -> tuple[list[_Tensor], list[_Tensor]]:
            one = self.unsqueeze(x_t, 0, "T")
            y, h, c = self.recurrent(one, layer, states, whole=False)
            out = self.squeeze(self.squeeze(y, "T"), "D")
            return ([h] if c is None else [h, c]), [out]

        initial = [zero] * (2 if layer.op == "LSTM" else 1)
        _, outputs = self.scan(initial, x, step)
        return outputs[0]

    def loop_layer(self, x: _Tensor, layer: _Layer) -> _Tensor:
        """A Loop with a recurrent operator of one step, whose last state goes to every step."""
        self.use("loop:layer")
        layer = replace(layer, direction="forward", op="GRU" if layer.op == "LSTM" else layer.op)
        shape: tuple[Dim, ...] = (1, self.batch, layer.hidden)
        zero = _Tensor(self.zeros(1, width=layer.hidden), "DNF", shape)
        steps = self.op("Gather", self.op("Shape", x), np.array(0, np.int64), axis=0)

        def step(number: str, state: _Tensor) -> _Tensor:
            name = self.op("Gather", x, number, axis=0)
            dead = None if x.dead is None else x.dead[0]
            one = self.unsqueeze(_Tensor(name, x.axes[1:], x.shape[1:], dead), 0, "T")
            return self.recurrent(one, layer, [state], whole=False)[1]

        final = self.loop(steps, zero, step)
        self.finals.append((final, None))
        return self.join([self.repeated(self.squeeze(final, "D"), x), x], "F")

    def repeated(self, vector: _Tensor, like: _Tensor) -> _Tensor:
        """A vector [N, F] at every step of a sequence [T, N, F]."""
        one = self.unsqueeze(vector, 0, "T")
        if self.chance(0.5):
            name = self.op("Tile", one, self.pack(self.size(like, 0), 1, 1))
        elif self.chance(0.5):
            width = vector.width if self.chance(0.5) else 1
            name = self.op("Expand", one, self.pack(self.size(like, 0), self.size(like, 1), width))
        else:
            name = self.op("Expand", one, self.pack(self.size(like, 0), 1, 1))
        return replace(one, name=name, shape=(like.shape[0], *one.shape[1:]))


# Y [T, D, N, F] to a sequence of feature vectors


def _merge_squeeze(g: _Builder, y: _Tensor) -> _Tensor:
    return g.squeeze(y, "D")


def _merge_reshape(how: str, axes: str, g: _Builder, y: _Tensor) -> _Tensor:
    return g.flatten(g.transpose(y, axes), how)


def _merge_concat(g: _Builder, y: _Tensor) -> _Tensor:
    if g.chance(0.5):
        parts = [g.squeeze(part, "D") for part in g.split(y, "D")]
    else:
        parts = [g.squeeze(g.slice(y, "D", i, i + 1), "D") for i in range(2)]
    return g.join(parts, "F")


def _merge_gather(g: _Builder, y: _Tensor) -> _Tensor:
    return g.gather(y, "D", int(g.rng.integers(-2, 2)))


def _merge_sum(g: _Builder, y: _Tensor) -> _Tensor:
    return g.reduce(y, "ReduceSum", "D")


MERGE_ONE: dict[str, _Pattern] = {
    "merge:squeeze": _merge_squeeze,
    "merge:zero_copy": functools.partial(_merge_reshape, "zero_copy", "TNDF"),
    "merge:constant": functools.partial(_merge_reshape, "constant", "TNDF"),
    "merge:batch_first": functools.partial(_merge_reshape, "zero_copy", "NTDF"),
}
MERGE_TWO: dict[str, _Pattern] = {
    "merge:zero_copy": functools.partial(_merge_reshape, "zero_copy", "TNDF"),
    "merge:constant": functools.partial(_merge_reshape, "constant", "TNDF"),
    "merge:shape_gather": functools.partial(_merge_reshape, "shape_gather", "TNDF"),
    "merge:shape_slice": functools.partial(_merge_reshape, "shape_slice", "TNDF"),
    "merge:shape_mul": functools.partial(_merge_reshape, "shape_mul", "TNDF"),
    "merge:batch_first": functools.partial(_merge_reshape, "constant", "NTDF"),
    "merge:concat_directions": _merge_concat,
    "merge:gather_direction": _merge_gather,
    "merge:sum_directions": _merge_sum,
}


# Patterns that pass units through


def _unary(kind: str, g: _Builder, t: _Tensor) -> _Tensor:
    return g.unary(t, kind)


def _leaky_relu(g: _Builder, t: _Tensor) -> _Tensor:
    return g.unary(t, "LeakyRelu", alpha=0.2)


def _clip(g: _Builder, t: _Tensor) -> _Tensor:
    if g.opset < 11:
        return g.unary(t, "Clip", min=-0.5, max=0.6)
    return g.unary(t, "Clip", np.array(-0.5, np.float32), np.array(0.6, np.float32))


def _cast(g: _Builder, t: _Tensor) -> _Tensor:
    double = g.unary(t, "Cast", to=TensorProto.DOUBLE)
    scaled = g.binary("Mul", double, g.vector(t, g.rng.uniform(0.5, 1.5, t.width)))
    return g.unary(scaled, "Cast", to=TensorProto.FLOAT)


def _constant(kind: str, g: _Builder, t: _Tensor) -> _Tensor:
    values = g.rng.uniform(0.5, 1.5, t.width).astype(np.float32)
    vector = g.vector(t, values)
    if g.chance(0.3):  # with all axes written out
        vector = vector.reshape([1] * (len(t.axes) - vector.ndim) + list(vector.shape))
    return g.binary(kind, t, vector)


def _scalar(g: _Builder, t: _Tensor) -> _Tensor:
    kind = g.pick("Add", "Mul", "Sub", "Div")
    value = np.array(1.2 if g.chance(0.5) else [0.8], np.float32)
    return g.binary(kind, t, value)


def _channels_first(g: _Builder, t: _Tensor) -> _Tensor:
    return g.transpose(t, "NFT" if "T" in t.axes else "NF")


def _batch_norm(g: _Builder, t: _Tensor) -> _Tensor:
    t = _channels_first(g, t)
    scale, bias, mean, variance = g.rng.uniform(0.5, 1.5, (4, t.width)).astype(np.float32)
    return g.unary(t, "BatchNormalization", scale, bias, mean - 1, variance)


def _instance_norm(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    t = _channels_first(g, t)
    scale, bias = g.rng.uniform(0.5, 1.5, (2, t.width)).astype(np.float32)
    # The epsilon is large, or a unit that hardly changes over time amplifies rounding errors.
    return g.unary(t, "InstanceNormalization", scale, bias, epsilon=0.1)


def _swap_batch(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    return g.transpose(t, "TNF" if t.axes == "NTF" else "NTF")


def _pool(kind: str, g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    return g.unary(_channels_first(g, t), kind, kernel_shape=[3], pads=[1, 1])


def _softmax_time(g: _Builder, t: _Tensor) -> _Tensor | None:
    # Before opset 13 Softmax normalizes over all axes from the given one on.
    if "T" not in t.axes or g.opset < 13:
        return None
    # The product, since a sum over time of the softmax alone would be 1 whatever the units do.
    return g.binary("Mul", t, g.unary(t, "Softmax", axis=t.axes.index("T")))


def _concat_input(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    parts = [t, g.x] if g.chance(0.5) else [g.transpose(g.x, t.axes), t]
    return g.join(parts, "F")


def _concat_layers(g: _Builder, t: _Tensor) -> _Tensor | None:
    others = [p for p in g.pool if p.name != t.name]
    if "T" not in t.axes or not others or t.width > 40:
        return None
    return g.join([t, others[int(g.rng.integers(len(others)))]], "F")


def _residual(g: _Builder, t: _Tensor) -> _Tensor | None:
    other = g.partner(t)
    return None if other is None else g.binary("Add", t, other)


def _gate_layers(g: _Builder, t: _Tensor) -> _Tensor | None:
    other = g.partner(t)
    return None if other is None else g.binary("Mul", t, g.unary(other, "Sigmoid"))


def _add_dense(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    return g.binary("Add", t, g.transpose(g.dense(g.x, t.width), t.axes))


def _gate_dense(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    gate = g.unary(g.transpose(g.dense(g.x, t.width), t.axes), "Sigmoid")
    return g.binary("Mul", t, gate)


def _where(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    if g.opset >= 11 and g.chance(0.5):
        lens = g.op("Cast", g.lengths(), to=TensorProto.INT64)
        steps = g.op("Gather", g.op("Shape", g.x), np.array(0, np.int64), axis=0)
        steps = g.op("Range", np.array(0, np.int64), steps, np.array(1, np.int64))
        name = g.op("Less", g.axes_op("Unsqueeze", steps, [1], 13), lens)
    else:
        name = g.op("Greater", g.gather(g.x, "F", 0), np.array(-0.5, np.float32))
    mask = _Tensor(name, "TN", (g.steps, g.batch))
    mask = g.transpose(mask, t.axes.replace("F", ""))
    mask = g.unsqueeze(mask, t.axes.index("F"), "F")
    return replace(t, name=g.op("Where", mask, t, np.array(0, np.float32)))


def _halves(g: _Builder, t: _Tensor) -> list[_Tensor]:
    if g.chance(0.5):
        return g.split(t, "F")
    middle = t.width // 2
    return [g.slice(t, "F", 0, middle), g.slice(t, "F", middle, None)]


def _halves_combined(kind: str, g: _Builder, t: _Tensor) -> _Tensor | None:
    return None if t.width % 2 else g.binary(kind, *_halves(g, t))


def _halves_view(g: _Builder, t: _Tensor) -> _Tensor | None:
    """Features as [2, half], summed over the two: how PyTorch code adds directions."""
    if t.axes not in ("TNF", "NTF") or t.width % 2:
        return None
    half = t.width // 2
    name = g.op("Reshape", t, np.array([0, 0, 2, half], np.int64))
    dead = None if t.dead is None else t.spread(2).reshape(*t.dead.shape[:2], 2, half)
    view = _Tensor(name, t.axes[:2] + "DF", (*t.shape[:2], 2, half), dead)
    return g.reduce(view, "ReduceSum", "D")


def _attend(g: _Builder, query: _Tensor, key: _Tensor, value: _Tensor) -> _Tensor:
    query, value = g.transpose(query, "NTF"), g.transpose(value, "NTF")
    # Fewer units must not change the scale, so it is a constant and not a computed size.
    scale = np.array(1 / np.sqrt(query.width), np.float32)
    scores = g.op("MatMul", g.live(query, key), g.transpose(key, "NFT"))
    attention = g.op("Softmax", g.op("Mul", scores, scale), axis=2)
    return replace(value, name=g.op("MatMul", attention, value))


def _attention_self(g: _Builder, t: _Tensor) -> _Tensor | None:
    return _attend(g, t, t, t) if "T" in t.axes else None


def _attention_layers(g: _Builder, t: _Tensor) -> _Tensor | None:
    other = g.partner(t)
    return None if other is None else _attend(g, t, other, other if g.chance(0.5) else t)


def _if_elementwise(g: _Builder, t: _Tensor) -> _Tensor:
    def then() -> list[_Tensor]:
        return [g.unary(t, "Tanh")]

    def other() -> list[_Tensor]:
        scaled = _constant("Mul", g, t)
        return [g.unary(scaled, "Neg") if g.chance(0.5) else scaled]

    return g.branch(then, other)[0]


def _if_partner(g: _Builder, t: _Tensor) -> _Tensor | None:
    """One of two layers: their units are tied by the common result."""
    other = g.partner(t)
    if other is None:
        return None
    choices = (lambda: [g.unary(t, "Identity")]), (lambda: [g.unary(other, "Relu")])
    return g.branch(*choices)[0]


def _decay(g: _Builder, total: _Tensor, element: _Tensor) -> _Tensor:
    return g.binary("Add", element, g.binary("Mul", total, np.array(0.5, np.float32)))


def _scan_parts(g: _Builder, t: _Tensor) -> tuple[_Tensor, _Tensor]:
    """A decaying sum over time: its last value and the sequence of its values."""
    t = t if t.axes in ("TNF", "NTF") else g.transpose(t, "TNF")
    zero = _Tensor(g.zeros(width=t.width), "NF", (g.batch, t.width))

    def step(states: list[_Tensor], element: _Tensor) -> tuple[list[_Tensor], list[_Tensor]]:
        total = _decay(g, states[0], element)
        return [total], [g.unary(total, "Identity")]

    finals, outputs = g.scan([zero], t, step)
    return finals[0], outputs[0]


def _scan_sums(g: _Builder, t: _Tensor) -> _Tensor | None:
    return _scan_parts(g, t)[1] if "T" in t.axes else None


def _loop_repeat(g: _Builder, t: _Tensor) -> _Tensor:
    vector = g.vector(t, g.rng.uniform(-0.2, 0.2, t.width).astype(np.float32))

    def step(_: str, value: _Tensor) -> _Tensor:
        half = g.binary("Mul", value, np.array(0.5, np.float32))
        return g.unary(g.binary("Add", half, vector), "Tanh")

    return g.loop(np.array(2, np.int64), t, step)


def _depthwise(g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    t = _channels_first(g, t)
    arguments: list[_Argument] = [g.weights(3, t.width, 1, 3)]
    if g.chance(0.6):
        arguments.append(g.rng.standard_normal(t.width).astype(np.float32))
    return g.unary(t, "Conv", *arguments, kernel_shape=[3], pads=[1, 1], group=t.width)


def _twin(g: _Builder, t: _Tensor) -> _Tensor | None:
    """An earlier layer once more, on another input, beside the sequence."""
    if "T" not in t.axes or not g.weighted or t.width > 40 or g.weighted[-1].layer.name in g.twins:
        return None
    other = g.weighted[-1]
    g.twins.append(other.layer.name)
    y, _, _ = g.twin(other, g.unary(other.x, "Neg"))
    merged = g.flatten(g.transpose(y, "TNDF"), "zero_copy")
    return g.join([t, g.transpose(merged, t.axes)], "F")


def _repeat_final(g: _Builder, t: _Tensor) -> _Tensor | None:
    """The last state of some layer at every step, as decoders read it."""
    found = [h for h, _ in g.finals if h.shape[0] == 1]
    if "T" not in t.axes or not found or t.width > 40:
        return None
    t = g.transpose(t, "TNF")
    vector = g.squeeze(found[int(g.rng.integers(len(found)))], "D")
    return g.join([g.repeated(vector, g.x), t], "F")


def _prelu(g: _Builder, t: _Tensor) -> _Tensor:
    return g.unary(t, "PRelu", g.vector(t, g.rng.uniform(0.1, 0.5, t.width).astype(np.float32)))


def _per_unit_limit(g: _Builder, t: _Tensor) -> _Tensor:
    limit = g.vector(t, g.rng.uniform(0.1, 0.5, t.width).astype(np.float32))
    return g.binary(g.pick("Max", "Min"), t, limit)


def _backwards(g: _Builder, t: _Tensor) -> _Tensor | None:
    """The features in the opposite order."""
    if g.opset < 10:
        return None
    axis = t.axes.index("F")
    bounds = [np.array([v], np.int64) for v in (-1, np.iinfo(np.int64).min, axis, -1)]
    name = g.op("Slice", t, *bounds)
    return replace(t, name=name, dead=None if t.dead is None else np.flip(t.dead, axis))


def _every_other(g: _Builder, t: _Tensor) -> _Tensor | None:
    """Every other feature, by a Slice or a Gather."""
    if g.opset < 10 or t.width < 6:
        return None
    axis = t.axes.index("F")
    count = len(range(0, t.width, 2))
    if g.chance(0.5):
        places = np.arange(0, t.width, 2) - (t.width if g.opset >= 11 and g.chance(0.5) else 0)
        name = g.op("Gather", t, places.astype(np.int64), axis=axis)
    else:
        bounds = [np.array([v], np.int64) for v in (0, t.width, axis, 2)]
        name = g.op("Slice", t, *bounds)
    shape = (*t.shape[:axis], count, *t.shape[axis + 1 :])
    dead = None if t.dead is None else t.spread(axis)[(slice(None),) * axis + (slice(0, None, 2),)]
    return _Tensor(name, t.axes, shape, dead)


def _channel_softmax_gate(g: _Builder, t: _Tensor) -> _Tensor | None:
    """Features weighted by one number a step, made of all of them."""
    if t.axes[-1] != "F":
        return None
    gate = g.unary(g.dense(t, 1), "Sigmoid")
    return replace(t, name=g.op("Mul", t, gate))


# Most of these work on sequences and on vectors alike.
PASS: dict[str, _Pattern] = {
    **{
        f"unary:{k.lower()}": functools.partial(_unary, k)
        for k in ("Relu", "Tanh", "Sigmoid", "Neg", "Abs")
    },
    "unary:leaky_relu": _leaky_relu,
    "unary:clip": _clip,
    "unary:identity": functools.partial(_unary, "Identity"),
    "unary:dropout": functools.partial(_unary, "Dropout"),
    "unary:cast": _cast,
    **{
        f"constant:{k.lower()}": functools.partial(_constant, k)
        for k in ("Mul", "Add", "Sub", "Div")
    },
    "constant:scalar": _scalar,
    "norm:batch": _batch_norm,
    "norm:instance": _instance_norm,
    "layout:swap_batch": _swap_batch,
    "pool:max": functools.partial(_pool, "MaxPool"),
    "pool:average": functools.partial(_pool, "AveragePool"),
    "softmax:time": _softmax_time,
    "concat:input": _concat_input,
    "concat:layers": _concat_layers,
    "add:layers": _residual,
    "mul:layers": _gate_layers,
    "add:dense": _add_dense,
    "mul:dense": _gate_dense,
    "where:mask": _where,
    "halves:add": functools.partial(_halves_combined, "Add"),
    "halves:mul": functools.partial(_halves_combined, "Mul"),
    "halves:view_sum": _halves_view,
    "attention:self": _attention_self,
    "attention:layers": _attention_layers,
    "if:elementwise": _if_elementwise,
    "if:layers": _if_partner,
    "scan:sums": _scan_sums,
    "loop:repeat": _loop_repeat,
    "conv:depthwise": _depthwise,
    "weights:shared": _twin,
    "repeat:final": _repeat_final,
    "constant:prelu": _prelu,
    "constant:limit": _per_unit_limit,
    "order:backwards": _backwards,
    "order:every_other": _every_other,
    "mul:gate_of_one": _channel_softmax_gate,
}


# Consumers: what comes out has no units


def _matmul(g: _Builder, t: _Tensor) -> _Tensor | None:
    if t.axes[-1] != "F":
        return None
    result = g.dense(t, g.outputs_count())
    if g.chance(0.5):
        bias = g.rng.standard_normal(result.width).astype(np.float32)
        result = g.binary("Add", result, bias)
    return result


def _matmul_3d(g: _Builder, t: _Tensor) -> _Tensor | None:
    if t.axes[-1] != "F" or len(t.axes) != 3:
        return None
    count = g.outputs_count()
    weights = g.zeroed(g.weights(t.width, 1, t.width, count), 1, t)
    return g.dense_result(t, g.op("MatMul", t, weights), count)


def _matmul_left(g: _Builder, t: _Tensor) -> _Tensor:
    t = g.transpose(t, "NFT" if "T" in t.axes else "FN")
    count = g.outputs_count()
    weights = g.zeroed(g.weights(t.width, count, t.width), 1, t)
    result = g.dense_result(t, g.op("MatMul", weights, t), count)
    return g.transpose(result, "NTF" if "T" in t.axes else "NF")


def _gemm(transposed: bool, g: _Builder, t: _Tensor) -> _Tensor | None:
    if t.axes[-1] != "F":
        return None
    flat = t.name
    if len(t.axes) == 3:
        flat = g.op("Reshape", t, np.array([-1, t.width], np.int64))
    count = g.outputs_count()
    weights = g.zeroed(g.weights(t.width, t.width, count), 0, t)
    attributes: dict[str, Any] = {"transB": 1} if transposed else {}
    if g.chance(0.4):
        attributes |= {"alpha": 0.5, "beta": 2.0}
    arguments: list[_Argument] = [flat, weights.T if transposed else weights]
    if g.opset < 11 or g.chance(0.7):
        arguments.append(g.rng.standard_normal(count).astype(np.float32))
    name = g.op("Gemm", *arguments, **attributes)
    if len(t.axes) == 3:
        name = g.op("Reshape", name, g.pack(g.size(t, 0), g.size(t, 1), count))
    return g.dense_result(t, name, count)


def _conv(kernel: int, g: _Builder, t: _Tensor) -> _Tensor | None:
    if "T" not in t.axes:
        return None
    t = g.transpose(t, "NFT")
    count = g.outputs_count()
    weights = g.zeroed(g.weights(kernel * t.width, count, t.width, kernel), 1, t)
    arguments: list[_Argument] = [t, weights]
    if g.chance(0.6):
        arguments.append(g.rng.standard_normal(count).astype(np.float32))
    pads = [kernel // 2] * 2
    name = g.op("Conv", *arguments, kernel_shape=[kernel], pads=pads)
    return g.transpose(g.dense_result(t, name, count), "NTF")


def _einsum(g: _Builder, t: _Tensor) -> _Tensor | None:
    if g.opset < 12 or t.axes[-1] != "F":
        return None
    count = g.outputs_count()
    weights = g.zeroed(g.weights(t.width, t.width, count), 0, t)
    letters = t.axes[:-1].lower()
    if g.chance(0.5):
        name = g.op("Einsum", t, weights, equation=f"{letters}h,ho->{letters}o")
    else:
        name = g.op("Einsum", t, weights.T, equation=f"{letters}h,oh->{letters}o")
    return g.dense_result(t, name, count)


def _halves_dense(g: _Builder, t: _Tensor) -> _Tensor | None:
    if t.width % 2 or t.axes[-1] != "F":
        return None
    first, second = [g.dense(half, g.outputs_count()) for half in _halves(g, t)]
    return g.join([first, g.unary(second, "Tanh")], "F")


def _if_dense(g: _Builder, t: _Tensor) -> _Tensor | None:
    if t.axes[-1] != "F":
        return None
    count = g.outputs_count()

    def then() -> list[_Tensor]:
        return [g.dense(t, count)]

    def other() -> list[_Tensor]:
        return [g.unary(g.dense(g.unary(t, "Relu"), count), "Sigmoid")]

    return g.branch(then, other)[0]


def _scan_dense(g: _Builder, t: _Tensor) -> _Tensor | None:
    """A recurrent cell written out as a Scan that reads units."""
    if t.axes not in ("TNF", "NTF"):
        return None
    count = g.outputs_count()
    zero = _Tensor(g.zeros(width=count), "NF", (g.batch, count))

    def step(states: list[_Tensor], element: _Tensor) -> tuple[list[_Tensor], list[_Tensor]]:
        mixed = g.binary("Add", g.dense(element, count), g.dense(states[0], count))
        result = g.unary(mixed, "Tanh")
        return [result], [g.unary(result, "Identity")]

    return g.scan([zero], t, step)[1][0]


def _heads(g: _Builder, t: _Tensor) -> _Tensor | None:
    """Attention of two heads on projections."""
    if t.axes not in ("TNF", "NTF"):
        return None
    t = g.transpose(t, "NTF")
    parts = []
    for _ in range(3):
        split = g.op("Reshape", g.dense(t, 8), np.array([0, 0, 2, 4], np.int64))
        parts.append(g.op("Transpose", split, perm=[0, 2, 1, 3]))
    scores = g.op("MatMul", parts[0], g.op("Transpose", parts[1], perm=[0, 1, 3, 2]))
    context = g.op("MatMul", g.op("Softmax", scores, axis=3), parts[2])
    joint = g.op("Transpose", context, perm=[0, 2, 1, 3])
    return g.dense_result(t, g.op("Reshape", joint, np.array([0, 0, 8], np.int64)), 8)


def _total(g: _Builder, t: _Tensor) -> _Tensor:
    """The sum of weighted features, as additive attention has it."""
    scaled = _constant("Mul", g, t)
    axis = t.axes.index("F")
    name = g.axes_op("ReduceSum", g.live(scaled), [axis], 13, keepdims=1)
    return g.dense_result(t, name, 1)


CONSUME: dict[str, _Pattern] = {
    "consume:heads": _heads,
    "consume:sum": _total,
    "consume:matmul": _matmul,
    "consume:matmul_3d": _matmul_3d,
    "consume:matmul_left": _matmul_left,
    "consume:gemm": functools.partial(_gemm, False),
    "consume:gemm_transposed": functools.partial(_gemm, True),
    "consume:conv1": functools.partial(_conv, 1),
    "consume:conv3": functools.partial(_conv, 3),
    "consume:einsum": _einsum,
    "consume:halves": _halves_dense,
    "if:dense": _if_dense,
    "scan:dense": _scan_dense,
}


# A sequence to one vector


def _last_slice(g: _Builder, t: _Tensor) -> _Tensor | None:
    if g.opset == 10:  # shape inference says T here, and onnxruntime believes it
        return None
    return g.squeeze(g.slice(t, "T", -1, None), "T")


def _last_gather(g: _Builder, t: _Tensor) -> _Tensor | None:
    if g.opset < 11 and g.steps == "T":
        return None
    return g.gather(t, "T", -1)


def _reduce(kind: str, g: _Builder, t: _Tensor) -> _Tensor:
    return g.reduce(t, kind, "T")


def _global_pool(kind: str, g: _Builder, t: _Tensor) -> _Tensor:
    t = _channels_first(g, t)
    pooled = replace(g.unary(t, kind), shape=(*t.shape[:2], 1))
    if g.chance(0.5):
        return g.squeeze(pooled, "T")
    dead = None if t.dead is None else t.dead.squeeze(2)
    return _Tensor(g.op("Flatten", pooled), "NF", t.shape[:2], dead)


def _weighted(g: _Builder, scores: str, t: _Tensor) -> _Tensor:
    """The sum of [N, T, F] over time with the softmax of scores [N, T, 1]."""
    attention = g.op("Transpose", g.op("Softmax", scores, axis=1), perm=[0, 2, 1])
    context = replace(t, name=g.op("MatMul", attention, t), shape=(t.shape[0], 1, t.width))
    return g.squeeze(context, "T")


def _attention_query(g: _Builder, t: _Tensor) -> _Tensor:
    t = g.transpose(t, "NTF")
    query = g.zeroed(g.weights(t.width, t.width, 1), 0, t)
    return _weighted(g, g.op("MatMul", t, query), t)


def _attention_last(g: _Builder, t: _Tensor) -> _Tensor | None:
    if g.opset < 11 and g.steps == "T":
        return None
    t = g.transpose(t, "NTF")
    query = g.unsqueeze(g.gather(t, "T", -1), 2, "S")
    return _weighted(g, g.op("MatMul", g.live(t, query), query), t)


def _scan_final(g: _Builder, t: _Tensor) -> _Tensor:
    return _scan_parts(g, t)[0]


def _loop_sum(g: _Builder, t: _Tensor) -> _Tensor:
    t = g.transpose(t, "TNF")
    zero = _Tensor(g.zeros(width=t.width), "NF", (g.batch, t.width))
    steps = g.op("Gather", g.op("Shape", t), np.array(0, np.int64), axis=0)
    dead = None if t.dead is None else t.dead[0]

    def step(number: str, total: _Tensor) -> _Tensor:
        element = _Tensor(g.op("Gather", t, number, axis=0), "NF", t.shape[1:], dead)
        return _decay(g, total, element)

    return g.loop(steps, zero, step)


def _flat(g: _Builder, t: _Tensor) -> _Tensor | None:
    """All steps side by side."""
    if not isinstance(g.steps, int) or t.width > 40:
        return None
    order = g.pick("NTF", "NFT")
    t = g.transpose(t, order)
    sizes = (g.steps, t.width) if order == "NTF" else (t.width, g.steps)
    if g.chance(0.5):
        name = g.op("Flatten", t, axis=1)
    else:
        name = g.op("Reshape", t, np.array([0, -1], np.int64))
    if t.dead is None:
        return _Tensor(name, "NF", (t.shape[0], g.steps * t.width))
    dead = np.broadcast_to(t.dead, (t.dead.shape[0], *sizes)).reshape(t.dead.shape[0], -1)
    return _Tensor(name, "NF", (t.shape[0], g.steps * t.width), dead)


def _last_valid(how: str, g: _Builder, t: _Tensor) -> _Tensor | None:
    """The last step of each sequence, by its length."""
    if g.opset < 13:
        return None
    t = g.transpose(t, "NTF")
    lens = g.op("Cast", g.lengths(), to=TensorProto.INT64)
    last = g.op("Sub", lens, np.array(1, np.int64))
    dead = None if t.dead is None else t.dead[:, 0]
    result = _Tensor("", "NF", (t.shape[0], t.width), dead)
    if how == "elements":
        index = g.axes_op("Unsqueeze", last, [1, 2], 13)
        index = g.op("Expand", index, g.pack(1, 1, t.width))
        picked = _Tensor(g.op("GatherElements", t, index, axis=1), "NTF", t.shape, t.dead)
        return g.squeeze(replace(picked, shape=(t.shape[0], 1, t.width)), "T")
    index = g.axes_op("Unsqueeze", last, [1], 13)
    if g.chance(0.5):
        return replace(result, name=g.op("GatherND", t, index, batch_dims=1))
    rows = g.op("Squeeze", g.size(t, 0), np.array([0], np.int64))
    rows = g.op("Range", np.array(0, np.int64), rows, np.array(1, np.int64))
    index = g.op("Concat", g.axes_op("Unsqueeze", rows, [1], 13), index, axis=1)
    return replace(result, name=g.op("GatherND", t, index))


SUMMARY: dict[str, _Pattern] = {
    "flat": _flat,
    "last:gather_nd": functools.partial(_last_valid, "nd"),
    "last:gather_elements": functools.partial(_last_valid, "elements"),
    "last:slice": _last_slice,
    "last:gather": _last_gather,
    "reduce:mean": functools.partial(_reduce, "ReduceMean"),
    "reduce:max": functools.partial(_reduce, "ReduceMax"),
    "reduce:sum": functools.partial(_reduce, "ReduceSum"),
    "pool:global_average": functools.partial(_global_pool, "GlobalAveragePool"),
    "pool:global_max": functools.partial(_global_pool, "GlobalMaxPool"),
    "attention:query": _attention_query,
    "attention:last": _attention_last,
    "scan:final": _scan_final,
    "loop:sum": _loop_sum,
}


# Final states [D, N, F] to one vector


def _state_squeeze(g: _Builder, h: _Tensor) -> _Tensor | None:
    return g.squeeze(h, "D") if h.shape[0] == 1 else None


def _state_reshape(g: _Builder, h: _Tensor) -> _Tensor:
    return g.flatten(g.transpose(h, "NDF"), g.pick("zero_copy", "constant", "shape_slice"))


def _state_gather(g: _Builder, h: _Tensor) -> _Tensor:
    return g.gather(h, "D", -1)


def _state_directions(g: _Builder, h: _Tensor) -> _Tensor | None:
    if h.shape[0] == 1:
        return None
    return g.join([g.gather(h, "D", -2), g.gather(h, "D", -1)], "F")


def _state_layers(g: _Builder, h: _Tensor) -> _Tensor | None:
    others = [f for f, _ in g.finals if f.name != h.name and f.shape[0] == h.shape[0]]
    if not others:
        return None
    both = g.join([h, others[int(g.rng.integers(len(others)))]], "F")
    return _state_reshape(g, both)


def _state_stacked(g: _Builder, h: _Tensor) -> _Tensor | None:
    others = [f for f, _ in g.finals if f.name != h.name and f.width == h.width]
    if not others:
        return None
    stacked = g.join([h, others[int(g.rng.integers(len(others)))]], "D")
    return g.gather(stacked, "D", int(g.rng.integers(-1, int(stacked.shape[0]))))


def _state_cell(g: _Builder, h: _Tensor) -> _Tensor | None:
    cells = [c for f, c in g.finals if f.name == h.name and c is not None]
    return _state_reshape(g, cells[0]) if cells else None


def _state_shared_dense(g: _Builder, h: _Tensor) -> _Tensor | None:
    """One weight for both directions, which ties them; the rest is dense already."""
    if h.shape[0] == 1:
        return None
    return g.flatten(g.transpose(g.dense(h, g.outputs_count()), "NDF"), "zero_copy")


STATE: dict[str, _Pattern] = {
    "y_h:squeeze": _state_squeeze,
    "y_h:reshape": _state_reshape,
    "y_h:gather": _state_gather,
    "y_h:concat_directions": _state_directions,
    "y_h:concat_layers": _state_layers,
    "y_h:stacked_gather": _state_stacked,
    "y_h:shared_dense": _state_shared_dense,
    "y_c": _state_cell,
}


# Patterns that must keep every unit that reaches them


def _block_layer_norm(g: _Builder, t: _Tensor) -> _Tensor | None:
    if g.opset < 17 or t.axes[-1] != "F":
        return None
    scale, bias = g.rng.uniform(0.5, 1.5, (2, t.width)).astype(np.float32)
    return g.unary(t, "LayerNormalization", scale, bias, axis=-1, epsilon=0.1)


def _block_decomposed_norm(g: _Builder, t: _Tensor) -> _Tensor:
    axis = [t.axes.index("F")]
    mean = g.axes_op("ReduceMean", t, axis, 18, keepdims=1)
    apart = g.unary(t, "Sub", mean)
    square = g.op("Pow", apart, np.array(2, np.float32))
    spread = g.axes_op("ReduceMean", square, axis, 18, keepdims=1)
    root = g.op("Sqrt", g.op("Add", spread, np.array(0.1, np.float32)))
    return g.unary(apart, "Div", root)


def _block_softmax(g: _Builder, t: _Tensor) -> _Tensor | None:
    return g.unary(t, "Softmax", axis=len(t.axes) - 1) if t.axes[-1] == "F" else None


def _block_reduce_mean(g: _Builder, t: _Tensor) -> _Tensor:
    mean = g.axes_op("ReduceMean", t, [t.axes.index("F")], 18, keepdims=1)
    return g.unary(t, "Sub", mean)


def _block_output(g: _Builder, t: _Tensor) -> _Tensor:
    g.graph_output(g.unary(t, "Identity"))
    return t


BLOCK: dict[str, _Pattern] = {
    "block:layer_norm": _block_layer_norm,
    "block:decomposed_norm": _block_decomposed_norm,
    "block:softmax": _block_softmax,
    "block:reduce_mean": _block_reduce_mean,
    "block:output": _block_output,
}

PATTERNS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *(f"input:{k}" for k in ("time_major", "batch_first", "tokens")),
            *(f"layer:{k}" for k in ("LSTM", "GRU_0", "GRU_1", "RNN_tanh", "RNN_relu")),
            *(f"layer:{k}" for k in ("RNN_other", "forward", "reverse", "bidirectional")),
            *(f"layer:{k}" for k in ("no_bias", "peepholes", "sequence_lens", "activations")),
            *(f"weights:{k}" for k in ("initializer", "constant_node", "transposed", "concat")),
            *(f"state:{k}" for k in ("none", "computed_zeros", "sliced_zeros", "constant")),
            *(f"state:{k}" for k in ("inputs", "packed_inputs", "packed_hc", "encoder")),
            *("if:layer", "scan:layer", "loop:layer", "raw:elementwise", "raw:dense", "value_info"),
            *(*MERGE_ONE, *MERGE_TWO, *PASS, *CONSUME, *SUMMARY, *STATE, *BLOCK),
        ]
    )
)


def _random_layer(g: _Builder, index: int, before: _Layer | None) -> _Layer:
    """A layer, often of the size of the one before so that their units can be tied."""
    op = g.pick("LSTM", "LSTM", "GRU", "GRU", "RNN")
    direction = g.pick("forward", "forward", "reverse", "bidirectional", "bidirectional")
    hidden = int(g.rng.integers(4, 13))
    if before is not None and g.chance(0.5):
        direction, hidden = before.direction, before.hidden
    return _Layer(f"rnn{index}", op, direction, hidden)


def _independent_layers(g: _Builder, count: int, block: int) -> _Tensor | None:
    """A stack of layers with patterns in between; None where Y of the last has no reader."""
    t = g.x
    layer: _Layer | None = None
    for index in range(count):
        layer = _random_layer(g, index, layer)
        x = g.transpose(t, "TNF")
        draw = g.rng.random()
        last = index == count - 1
        if last and draw < 0.15 and index != block:
            g.finals.append(g.stateful(x, layer)[1:])
            return None
        if draw < 0.75:
            t = g.plain_layer(x, layer)
        elif draw < 0.8:
            t = g.loop_layer(x, layer)
        elif draw < 0.9:
            t = g.if_layer(x, layer)
        else:
            t = g.scan_layer(x, layer)
        g.pool.append(t)
        for _ in range(int(g.rng.integers(0, 4))):
            t = g.apply(PASS, t)
        g.pool.append(t)
        if index == block and t.dead is not None:
            t = g.apply(BLOCK, t)
        if not last and g.chance(0.25):
            t = g.apply(CONSUME, t)
    return t


def _packed_layers(g: _Builder, count: int, kind: str) -> _Tensor:
    """Layers of one size whose initial states are slices of one tensor, as PyTorch has them."""
    g.use(f"state:{kind}")
    first = _random_layer(g, 0, None)
    directions = first.directions
    shape: tuple[Dim, ...] = (count * directions, g.batch, first.hidden)
    letters = "hc" if first.op == "LSTM" else "h"
    if kind == "packed_inputs":
        packed = [g.float_input(f"{s}0", "DNF", shape) for s in letters]
    else:
        zeros = g.zeros(count * directions, width=first.hidden)
        packed = [_Tensor(zeros, "DNF", shape)] * len(letters)
    finals: list[list[_Tensor]] = [[] for _ in letters]
    t = g.x
    for index in range(count):
        limits = (index * directions, (index + 1) * directions)
        initial = [g.slice(p, "D", *limits) for p in packed]
        layer = replace(first, name=f"rnn{index}")
        y, h, c = g.recurrent(g.transpose(t, "TNF"), layer, initial)
        g.finals.append((h, c))
        for states, state in zip(finals, [h, c], strict=False):
            assert state is not None
            states.append(state)
        t = g.sequence(y)
        g.pool.append(t)
        for _ in range(int(g.rng.integers(0, 3))):
            t = g.apply(PASS, t)
    if kind == "packed_inputs":
        for letter, states in zip(letters, finals, strict=True):
            g.state_output(f"{letter}0", states, f"{letter}_out")
    return t


def _head(g: _Builder, t: _Tensor) -> None:
    """A sequence, or a vector, to a graph output."""
    if "T" in t.axes and g.chance(0.6):
        t = g.apply(SUMMARY, t)
    if t.dead is not None and g.chance(0.3):
        t = g.apply(PASS, t)
    g.graph_output(g.apply(CONSUME, t))


def _build(seed: int, kept: Kept) -> _Builder:
    g = _Builder(seed, kept)
    count = int(g.rng.integers(2, 5))
    plan = g.rng.random()
    t: _Tensor | None
    if plan < 0.08:
        t = _packed_layers(g, count, "packed_inputs")
    elif plan < 0.16:
        t = _packed_layers(g, count, "sliced_zeros")
    else:
        block = int(g.rng.integers(count)) if g.chance(0.18) else -1
        t = _independent_layers(g, count, block)
    if t is not None:
        _head(g, t)
    if g.finals and (t is None or g.chance(0.6)):
        state = g.finals[-1 if t is None else int(g.rng.integers(len(g.finals)))][0]
        _head(g, g.apply(STATE, state))
    if g.pool and g.chance(0.3):
        _head(g, g.pool[int(g.rng.integers(len(g.pool)))])
    if g.chance(0.3):
        g.use("value_info")
    return g
