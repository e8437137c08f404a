"""Adding to a graph and replacing in it, anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.model import Array
from rnnprune_cli.rewrite.build import Builder, value_names

_INT64_MIN = -(2**63)


class Editor:
    """Changes a model without functions.

    Args:
        model: The model.
        prefix: Begins the names of what is added.
    """

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self.model = model
        self._prefix = prefix
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self._build = Builder(model.graph, self.opset, True, value_names(model))
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._ints: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
        self._replaced: dict[int, tuple[ir.Value, ir.Value]] = {}

    def constant(self, name: str, array: Array) -> ir.Value:
        """Adds a constant to the main graph, where everything can read it; equal ones once."""
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self._build.constant(name, array)
        return self._constants[key]

    def ints(self, before: ir.Node, values: Sequence[int]) -> ir.Value:
        """Adds a vector of integers to the graph of a node, where shape inference sees it."""
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        key = (id(graph), tuple(values))
        if key not in self._ints:
            name = self.unique(
                f"{self._prefix}/" + "_".join(str(v) if v > _INT64_MIN else "end" for v in values)
            )
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            new = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)])
            )
            new.const_value = tensor
            graph.register_initializer(new)
            self._ints[key] = new
        return self._ints[key]

    def current(self, value: ir.Value) -> ir.Value:
        """Returns what took a value's place since the context was made."""
        while id(value) in self._replaced:
            value = self._replaced[id(value)][1]
        return value

    def unique(self, name: str) -> str:
        """Returns a name that nothing else in the model has, and reserves it."""
        return self._build.unique(name)

    def node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,  # noqa: ANN401  whatever an ONNX attribute can be
    ) -> ir.Node:
        """Adds a node before another."""
        new = ir.node(op_type, inputs, attributes=attributes, num_outputs=outputs, name=name)
        for value in new.outputs:
            value.name = self.unique(
                f"{name or self._prefix}_{op_type}" if name is None else f"{name}/y"
            )
            value.type = ir.TensorType(ir.DataType.FLOAT)
        assert before.graph is not None
        before.graph.insert_before(before, new)
        return new

    def one(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        **attributes: Any,  # noqa: ANN401  whatever an ONNX attribute can be
    ) -> ir.Value:
        """Adds a node with one output before another, and returns the output."""
        return self.node(before, op_type, inputs, **attributes).outputs[0]

    def squeeze(self, before: ir.Node, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Adds a Squeeze."""
        return self._axes(before, "Squeeze", value, axes)

    def unsqueeze(self, before: ir.Node, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Adds an Unsqueeze."""
        return self._axes(before, "Unsqueeze", value, axes)

    def _axes(
        self, before: ir.Node, op_type: str, value: ir.Value, axes: Sequence[int]
    ) -> ir.Value:
        if self.opset >= 13:
            return self.one(before, op_type, [value, self.ints(before, axes)])
        return self.one(before, op_type, [value], axes=list(axes))

    def slice(
        self, before: ir.Node, value: ir.Value, axis: int, start: int, end: int, step: int = 1
    ) -> ir.Value:
        """Adds a Slice along one axis; a reversal needs opset 10."""
        if self.opset < 10:
            assert step == 1, "whoever reverses looks at the opset before"
            return self.one(before, "Slice", [value], axes=[axis], starts=[start], ends=[end])
        inputs = [
            value,
            self.ints(before, [start]),
            self.ints(before, [end]),
            self.ints(before, [axis]),
        ]
        return self.one(
            before, "Slice", [*inputs, self.ints(before, [step])] if step != 1 else inputs
        )

    def reverse(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """Adds the reversal of the first axis."""
        return self.slice(before, value, 0, -1, _INT64_MIN, -1)

    def for_every_row(self, before: ir.Node, state: ir.Value, x: ir.Value) -> ir.Value:
        """Adds the expansion of a state ``[1, 1 or N, H]`` to the rows of ``[·, N, ·]``."""
        shape = self.one(before, "Shape", [x])
        shape.type = ir.TensorType(ir.DataType.INT64)
        rows = self.slice(before, shape, 0, 1, 2)
        one = self.ints(before, [1])
        target = self.one(before, "Concat", [one, rows, one], axis=0)
        rows.type = target.type = shape.type
        return self.one(before, "Expand", [state, target])

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets every reader of a value read another; graph outputs keep their names."""
        users = tuple(old.uses())
        if new.shape is None:
            new.shape = old.shape
        if old.type is not None:
            new.type = old.type
        graph = old.graph
        if old.is_graph_output() and graph is not None:
            name = old.name
            maker = new.producer()
            if new.is_graph_output() or maker is None or maker.graph is not graph:
                node = next(iter(reversed(list(graph)))) if len(graph) else None
                assert node is not None
                new = self.one(node, "Identity", [new])
                new.type, new.shape = old.type, old.shape
            new.shape = old.shape
            old.name = self.unique(f"{name}/{self._prefix}ed")
            new.name = name
            for k, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[k] = new
        for user, position in users:
            user.replace_input_with(position, new)
        self._replaced[id(old)] = (old, new)

    @staticmethod
    def clean(values: Sequence[ir.Value]) -> None:
        """Removes what nothing reads any more, from these values backwards."""
        pending = list(values)
        while pending:
            value = pending.pop()
            node = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            if value.is_initializer() and value.graph is not None and value.name:
                if not value.is_graph_input():
                    value.graph.initializers.pop(value.name, None)
            elif node is not None and node.graph is not None:
                if any(o.uses() or o.is_graph_output() for o in node.outputs):
                    continue
                sources = [v for v in node.inputs if v is not None]
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.GRAPH:
                        for inner in attribute.as_graph().all_nodes():
                            sources.extend(v for v in inner.inputs if v is not None)
                            for k in range(len(inner.inputs)):
                                inner.replace_input_with(k, None)
                node.graph.remove(node, safe=True)
                pending.extend(sources)
