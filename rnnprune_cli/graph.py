"""Use-def helpers over onnx-ir: walking, following values to their origin, folding constants.

A value may reach a node through an Identity, an argument of a model function, or an unchanged
loop-carried value. :class:`Walker` knows these routes; nothing else in the package does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array

Calls = tuple[ir.Node, ...]
"""The function calls, outermost first, through which a node is executed."""

MAX_INSTANCES = 200_000
MAX_FOLDED_BYTES = 1 << 32
"""All results of one model together, unless its files are large."""
MAX_EXPANSION = 64
"""What results may take in all, times the size of the files: unpacking takes about 40."""

_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "BitShift", "Less", "Where", "BitwiseAnd", "Expand"}
)
# Ops whose output holds no more elements than their inputs together.
_MOVING = frozenset(
    {"Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Flatten", "Split"}
    | {"Cast", "CastLike", "Identity", "Dropout", "DequantizeLinear", "Neg", "Shape"}
    | {"Scatter", "ScatterElements", "CumSum"}
    | {"ReduceL2", "ReduceSum", "ReduceMean", "Sqrt", "Reciprocal", "Abs"}  # weight normalisation
)
FOLDABLE = _ELEMENTWISE | _MOVING | {"Gather", "MatMul", "NonZero", "ConstantOfShape"}
"""Deterministic ops with one simple bound on their output's size; weights are made with these."""


@dataclass(frozen=True, eq=False)
class Instance:
    """A node as it is executed: the node and the function calls that lead to it."""

    node: ir.Node
    calls: Calls


def attribute(walker: Walker, instance: Instance, name: str) -> ir.Attr | None:
    """Returns an attribute of a node, from the call or a function's default if it refers there."""
    attr = instance.node.attributes.get(name)
    calls = instance.calls
    while attr is not None and attr.is_ref():
        if not calls:
            return None
        function = walker.model.functions[calls[-1].op_identifier()]
        name = attr.ref_attr_name or ""
        attr = calls[-1].attributes.get(name, function.attributes.get(name))
        calls = calls[:-1]
    return attr if attr is not None and attr.value is not None else None


class Walker:
    """Walks a model through subgraphs and function calls, and traces values backwards."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._functions = {id(f.graph): f for f in model.functions.values()}
        self._owners: dict[int, ir.Node] = {}
        for graph in (model.graph, *(f.graph for f in model.functions.values())):
            for node in graph.all_nodes():
                for sub in subgraphs(node):
                    self._owners[id(sub)] = node

    def instances(self) -> Iterator[Instance]:
        """Yields every executed node, depth first, in graph order.

        Raises:
            RnnpruneError: If functions call each other in a circle, or calls nest so deeply that
                the model would never end.
        """
        count = 0
        stack: list[tuple[Iterator[ir.Node], Calls]] = [(iter(self.model.graph), ())]
        while stack:
            nodes, calls = stack[-1]
            node = next(nodes, None)
            if node is None:
                stack.pop()
                continue
            count += 1
            if count > MAX_INSTANCES:
                raise RnnpruneError(
                    f"the model executes more than {MAX_INSTANCES} nodes through nested functions",
                    "inline and simplify it first",
                )
            yield Instance(node, calls)
            inner: list[tuple[Iterator[ir.Node], Calls]] = [
                (iter(sub), calls) for sub in subgraphs(node)
            ]
            function = self.model.functions.get(node.op_identifier())
            if function is not None:
                if any(call.op_identifier() == node.op_identifier() for call in calls):
                    raise RnnpruneError(
                        f"model function '{function.name}' calls itself",
                        "ONNX functions must not be recursive; export the model again",
                    )
                inner.append((iter(function), (*calls, node)))
            stack.extend(reversed(inner))

    def owner(self, graph: ir.Graph) -> ir.Node | None:
        """Returns the node that a branch or body belongs to."""
        return self._owners.get(id(graph))

    def root(self, graph: ir.Graph | None) -> ir.Graph:
        """Returns the outermost graph around a graph: the main graph or a function's."""
        while graph is not None and id(graph) in self._owners:
            graph = self._owners[id(graph)].graph
        return graph if graph is not None else self.model.graph

    def is_function(self, graph: ir.Graph) -> bool:
        """Tells whether a graph is the body of a function, which can hold no initializers."""
        return id(graph) in self._functions

    def opset(self, graph: ir.Graph) -> int:
        """Returns the version of the default operator set in a main graph or function."""
        function = self._functions.get(id(graph))
        imports = self.model.opset_imports if function is None else function.opset_imports
        default = self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1))
        return imports.get("", imports.get("ai.onnx", default))

    def origin(self, value: ir.Value, calls: Calls) -> tuple[ir.Value, Calls]:
        """Follows a value to where it is made.

        Passes Identity, function arguments and loop-carried values that no iteration changes.

        Returns:
            The first value on the way that is none of these, and the calls that lead to it.
        """
        seen: set[tuple[int, int]] = set()
        while (id(value), len(calls)) not in seen:
            seen.add((id(value), len(calls)))
            source = self._one_step_back(value, calls)
            if source is None:
                break
            value, calls = source
        return value, calls

    def _one_step_back(self, value: ir.Value, calls: Calls) -> tuple[ir.Value, Calls] | None:
        producer = value.producer()
        if producer is not None:
            if producer.op_type == "Identity" and producer.domain in ("", "ai.onnx"):
                source = producer.inputs[0] if producer.inputs else None
                return (source, calls) if source is not None else None
            return None
        graph = value.graph
        if value.is_initializer() or graph is None or not value.is_graph_input():
            return None
        position = next(i for i, item in enumerate(graph.inputs) if item is value)
        function = self._functions.get(id(graph))
        if function is not None:
            if not calls or position >= len(calls[-1].inputs):
                return None
            argument = calls[-1].inputs[position]
            return (argument, calls[:-1]) if argument is not None else None
        source = self._loop_invariant(graph, position)
        return (source, calls) if source is not None else None

    def _loop_invariant(self, body: ir.Graph, position: int) -> ir.Value | None:
        """The initial value of a loop-carried input that the body hands on unchanged."""
        owner = self._owners.get(id(body))
        if owner is None or owner.op_type not in ("Loop", "Scan"):
            return None
        if owner.op_type == "Loop":  # body: iteration, condition, carried… → condition, carried…
            source, output = position, position - 1
            if position < 2:
                return None
        else:  # body: state…, scanned… → state…, scanned…
            scanned = owner.attributes.get_int("num_scan_inputs", 0) or 0
            source, output = position, position
            if position >= len(body.inputs) - scanned:
                return None
        if source >= len(owner.inputs) or output >= len(body.outputs):
            return None
        handed_on: ir.Value | None = body.outputs[output]
        while handed_on is not None and (made_by := handed_on.producer()) is not None:
            if made_by.op_type != "Identity":
                return None
            handed_on = made_by.inputs[0]
        return owner.inputs[source] if handed_on is body.inputs[position] else None

    def consumers(self, value: ir.Value) -> Iterator[tuple[ir.Node, int] | None]:
        """Yields the (node, input index) pairs that read a value, through the routes of origin.

        None stands for a reader outside any node: a graph output.
        """
        pending, seen = [value], set()
        while pending:
            current = pending.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            if current.is_graph_output():
                yield None
            for node, index in current.uses():
                function = self.model.functions.get(node.op_identifier())
                if node.op_type == "Identity" and node.domain in ("", "ai.onnx"):
                    pending.append(node.outputs[0])
                elif function is not None and index < len(function.inputs):
                    pending.append(function.inputs[index])
                elif (inner := self._invariant_body_input(node, index)) is not None:
                    pending.append(inner)
                else:
                    yield node, index

    def _invariant_body_input(self, node: ir.Node, index: int) -> ir.Value | None:
        if node.op_type not in ("Loop", "Scan") or "body" not in node.attributes:
            return None
        body = node.attributes["body"].as_graph()
        if index < len(body.inputs) and self._loop_invariant(body, index) is node.inputs[index]:
            return body.inputs[index]
        return None


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Returns an input of a node, None where it has none."""
    return node.inputs[index] if index < len(node.inputs) else None


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Returns the graphs that are attributes of a node (branches and bodies)."""
    found: list[ir.Graph] = []
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            found.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            found.extend(attr.as_graphs())
    return found


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Returns the tensor of an initializer or of a Constant node; None for anything else."""
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.domain == "":
        try:
            return ir.convenience.get_const_tensor(value)
        except (KeyError, ValueError, TypeError, AttributeError):  # a Constant without a value
            return None
    return None


class Folder:
    """Evaluates values that depend on constants only, with onnxruntime, node by node.

    Args:
        walker: The model.
        file_bytes: Size of its files; what they may expand to depends on it.
    """

    def __init__(self, walker: Walker, file_bytes: int) -> None:
        self._walker = walker
        self._limit = max(MAX_FOLDED_BYTES, MAX_EXPANSION * file_bytes)
        self._done: dict[tuple[int, tuple[int, ...]], Array | str] = {}
        self._spent = 0

    def fold(self, value: ir.Value, calls: Calls) -> Array | str:
        """Returns the value of a constant expression, or a sentence saying why it is none.

        Only the operators in :data:`FOLDABLE` are evaluated, and only up to a limit: the model file
        is not trusted.
        """
        value, calls = self._walker.origin(value, calls)
        key = (id(value), tuple(id(call) for call in calls))
        if key not in self._done:
            self._done[key] = "it depends on itself"  # stands while its inputs are evaluated
            self._done[key] = self._evaluate(value, calls)
        return self._done[key]

    def _evaluate(self, value: ir.Value, calls: Calls) -> Array | str:
        tensor = stored_tensor(value)
        if tensor is not None:
            return tensor.numpy()
        node = value.producer()
        if node is None:
            what = "a graph input" if value.is_graph_input() else "undefined"
            if value.is_graph_input() and value.graph is not self._walker.model.graph:
                what = "an input of a loop or function body that changes at run time"
            return f"'{value.name}' is {what}"
        if node.op_type == "Shape" and (static := _static_shape(node)) is not None:
            return static
        if node.domain not in ("", "ai.onnx") or node.op_type not in FOLDABLE:
            return f"'{value.name}' is computed at run time by {node.op_type} '{node.name}'"
        arrays: list[Array | None] = []
        for source in node.inputs:
            folded = None if source is None else self.fold(source, calls)
            if isinstance(folded, str):
                return folded
            arrays.append(folded)
        try:
            self._spent += _bound(node, arrays)
        except (IndexError, ValueError):
            return f"{node.op_type} '{node.name}' has inputs that do not fit together"
        if self._spent > self._limit:
            return f"'{value.name}' would take more than {self._limit >> 30} GiB to compute"
        return _run_node(
            node, arrays, self._walker.opset(self._walker.root(node.graph)), value.index() or 0
        )


def _static_shape(node: ir.Node) -> Array | None:
    """The result of a Shape whose dimensions the file states, whatever its input's values."""
    value = node.inputs[0] if node.inputs else None
    if value is None or value.shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    dims = value.shape.dims[start : node.attributes.get_int("end", None)]
    known = [d for d in dims if isinstance(d, int)]
    return np.array(known, np.int64) if len(known) == len(dims) else None


def _bound(node: ir.Node, arrays: list[Array | None]) -> int:
    """An upper bound of the bytes that a foldable node produces."""
    given = [a for a in arrays if a is not None]
    itemsize = max((a.itemsize for a in given), default=8)
    if node.op_type in _ELEMENTWISE:
        shapes = [a.shape for a in given]
        if node.op_type == "Expand" and len(given) == 2:
            shapes[1] = tuple(int(d) for d in given[1])
        elements = int(np.prod([max(d) for d in _aligned(shapes)], dtype=object))
    elif node.op_type == "ConstantOfShape":
        elements = int(np.prod([int(d) for d in given[0].ravel()], dtype=object))
    elif node.op_type == "Gather" and len(given) == 2:
        axis = node.attributes.get_int("axis", 0) or 0
        data = given[0]
        rows = data.shape[axis] if -data.ndim <= axis < data.ndim else 1
        elements = data.size // max(rows, 1) * given[1].size
    elif node.op_type == "MatMul":
        left, right = (a.shape if a.ndim > 1 else (1, *a.shape, 1) for a in given)
        batch = np.prod([max(d) for d in _aligned([left[:-2], right[:-2]])], dtype=object)
        elements = int(batch) * left[-2] * right[-1]
    elif node.op_type == "NonZero":
        elements = given[0].size * max(given[0].ndim, 1)
    else:
        elements = sum(a.size for a in given)
    return elements * max(itemsize, 8 if node.op_type in ("NonZero", "Cast") else 1)


def _aligned(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    rank = max((len(s) for s in shapes), default=0)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return list(zip(*padded, strict=True)) if padded else []


def _run_node(node: ir.Node, arrays: list[Array | None], opset: int, output: int) -> Array | str:
    """Runs one node on constants with onnxruntime."""
    import onnxruntime as ort

    proto: Any = ir.to_proto(node)
    names = [f"i{k}" if a is not None else "" for k, a in enumerate(arrays)]
    del proto.input[:]
    proto.input.extend(names)
    for k in range(len(proto.output)):
        proto.output[k] = f"o{k}"  # onnxruntime crashes on a Split with unnamed outputs
    feed = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    try:
        inputs = [
            onnx.helper.make_tensor_value_info(
                n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
            )
            for n, a in feed.items()
        ]
        graph = onnx.helper.make_graph(
            [proto], "fold", inputs, [onnx.helper.make_empty_tensor_value_info(f"o{output}")]
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        folded: Array = session.run(None, feed)[0]
    except Exception as error:  # onnxruntime raises many unrelated types
        reason = " ".join(str(error).split())[:200]
        return f"onnxruntime cannot evaluate {node.op_type} '{node.name}': {reason}"
    return folded
