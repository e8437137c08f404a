"""What a loop computes row by row besides its recurrence → the same over all steps at once.

A body may hold layers before, between and after its cells: a projection of the input, a Dense layer
on the state. They look at one row at a time, so they give the same for all steps in one batch.
Outside of the loop they run once; what stays in it is the recurrence, which :mod:`.loop` replaces.
"""

from __future__ import annotations

import onnx_ir as ir

from rnnprune_cli.find import is_recurrent
from rnnprune_cli.layout import Linear, is_last_axis, rank, static
from rnnprune_cli.lift.body import choice_of, sequence_of
from rnnprune_cli.lift.context import Context
from rnnprune_cli.lift.iteration import Declined, Interface, Sequence, Stack

_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Neg", "Abs", "Sqrt", "Exp", "Log", "Erf"}
    | {"Sigmoid", "Tanh", "Relu", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Gelu"}
    | {"Softplus", "Softsign", "Clip", "Identity", "Reciprocal", "Sum", "PRelu", "ThresholdedRelu"}
)
_ALONG_ROWS = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "Concat", "Split"})


class Hoister:
    """Moves row-by-row computations out of a loop.

    Args:
        loop: The loop; what is moved becomes known to it as sequences.
        context: The model, which is changed.
    """

    def __init__(self, loop: Interface, context: Context) -> None:
        self._loop = loop
        self._context = context
        self._made_by = {
            id(context.layout.bare(value)): value
            for node in loop.body
            if is_recurrent(node)
            for value in node.outputs[:2]
        }
        self._flat: dict[int, ir.Value] = {}
        self._shape: ir.Value | None = None
        self._batches: list[Linear | None] = []

    def inputs(self) -> None:
        """Moves what is computed on the way to a recurrent operator."""
        for node in self._loop.body:
            x = node.inputs[0] if is_recurrent(node) and node.inputs else None
            bare = None if x is None else self._context.layout.bare(x)
            if bare is None or id(bare) in self._made_by:
                continue
            steps = self._sequence(bare)
            if steps is not None:
                size = self._context.layout.dimension(steps.value, 1 - steps.axis)
                self._batches.append(size)
                continue
            whole = self._hoisted(bare)
            if whole is not None:
                self._loop.scanned[id(bare)] = Sequence(whole, 0, False)
                if self._loop.steps is not None:
                    self._context.layout.measured(whole, 0, self._loop.steps)

    def outputs(self) -> None:
        """Moves what is computed on the way from a recurrent operator to a stacked output."""
        for stack in list(self._loop.scans):
            read = bool(stack.out.uses()) or stack.out.is_graph_output()
            choice = choice_of(stack.value, self._loop, self._context)
            direct = id(self._context.layout.bare(choice.new)) in self._made_by
            if not read or choice.mask is not None or direct or stack.backwards or stack.axis:
                continue
            whole = self._hoisted(self._context.layout.bare(stack.value))
            if whole is not None and rank(stack.value) == 2:
                self._context.replace(stack.out, whole)

    def _sequence(self, bare: ir.Value) -> Sequence | None:
        try:
            return sequence_of(bare, self._loop, self._context)
        except Declined:
            return None

    def _hoisted(self, value: ir.Value) -> ir.Value | None:
        """Returns ``[T, N, ·]`` of a value of one step."""
        order = self._order(value)
        if order is None:
            return None
        before, context = self._loop.node, self._context
        for node in order:
            inputs: list[ir.Value | None] = []
            for source in node.inputs:
                array = context.layout.constant(source)
                if array is not None and source is not None:
                    inputs.append(context.constant(source.name or "constant", array))
                else:
                    inputs.append(None if source is None else self._flat[self._key(source)])
            new = context.node(before, node.op_type, inputs, len(node.outputs))
            for attribute in node.attributes.values():
                new.attributes.add(attribute)
            for old, made in zip(node.outputs, new.outputs, strict=True):
                self._flat[self._key(old)] = made
        flat = self._flat.get(self._key(value))
        if flat is None or self._shape is None:
            return None
        if any(batch is None or batch != self._batches[0] for batch in self._batches):
            return None
        target = context.one(before, "Concat", [self._shape, context.ints(before, [-1])], axis=0)
        target.type = ir.TensorType(ir.DataType.INT64)
        whole = context.one(before, "Reshape", [flat, target])
        whole.shape = ir.Shape([None, None, static(value, -1)])
        return whole

    def _key(self, value: ir.Value) -> int:
        return id(self._context.layout.bare(value))

    def _order(self, value: ir.Value) -> list[ir.Node] | None:
        """Returns the nodes between sequences and a value, or None if one mixes rows."""
        order: list[ir.Node] = []
        pending: list[tuple[ir.Value, bool]] = [(value, False)]
        seen: set[int] = set()
        while pending:
            current, ready = pending.pop()
            current = self._context.layout.bare(current)
            node = current.producer()
            if ready:
                if node is not None and node not in order:
                    order.append(node)
                continue
            if id(current) in seen or id(current) in self._flat:
                continue
            seen.add(id(current))
            leaf = self._leaf(current)
            if leaf is not None:
                self._flat[id(current)] = leaf
                continue
            if node is None or node.graph is not self._loop.body or not self._is_rowwise(node):
                return None
            pending.append((current, True))
            pending += [
                (source, False)
                for source in node.inputs
                if source is not None and self._context.layout.constant(source) is None
            ]
        return order

    def _leaf(self, bare: ir.Value) -> ir.Value | None:
        """Returns ``[T · N, ·]`` of a step of a sequence or of an operator's output."""
        context, before = self._context, self._loop.node
        columns = static(bare, -1)
        if columns is None:
            return None
        if id(bare) in self._made_by:
            whole = ir.Value(
                name=context.unique("lift_stacked"),
                type=ir.TensorType(ir.DataType.FLOAT),
                shape=ir.Shape([None, None, columns]),
            )
            # Y of one step: rows without the axes of size 1 are what the new stack holds.
            self._loop.scans.append(Stack(_rows(bare, self._loop.body, context), whole))
        else:
            steps = self._sequence(bare)
            if steps is None:
                return None
            size = context.layout.dimension(steps.value, steps.axis)
            if steps.backwards or rank(steps.value) != 3 or steps.axis not in (0, 1):
                return None
            if self._loop.steps is not None and size != self._loop.steps:
                return None
            self._batches.append(context.layout.dimension(steps.value, 1 - steps.axis))
            whole = steps.value
            if steps.axis == 1:
                whole = context.one(before, "Transpose", [whole], perm=[1, 0, 2])
        if self._shape is None:
            shape = context.one(before, "Shape", [whole])
            self._shape = context.slice(before, shape, 0, 0, 2)
            shape.type = self._shape.type = ir.TensorType(ir.DataType.INT64)
        return context.one(before, "Reshape", [whole, context.ints(before, [-1, columns])])

    def _is_rowwise(self, node: ir.Node) -> bool:
        """Tells whether every row of a node's output depends on the same row of its inputs."""
        layout = self._context.layout
        constants = [v is None or layout.constant(v) is not None for v in node.inputs]
        values = [v for v, known in zip(node.inputs, constants, strict=True) if not known]
        if node.domain not in ("", "ai.onnx") or any(
            rank(v) != 2 for v in [*node.outputs, *values] if v is not None
        ):
            return False
        for value, known in zip(node.inputs, constants, strict=True):
            array = layout.constant(value) if known else None
            rows = array is not None and array.ndim > 1 and array.size != array.shape[-1]
            if rows and node.op_type in _ELEMENTWISE:
                return False
        if node.op_type in _ELEMENTWISE:
            return True
        if node.op_type == "MatMul":
            return constants == [False, True]
        if node.op_type == "Gemm":
            added = layout.constant(node.inputs[2]) if len(node.inputs) > 2 else None
            return (
                constants[:2] == [False, True]
                and all(constants[2:])
                and not node.attributes.get_int("transA")
                and (added is None or added.size == (added.shape[-1] if added.ndim else 1))
            )
        if node.op_type in _ALONG_ROWS:
            default = 0 if node.op_type == "Split" else -1
            return is_last_axis(node, node.outputs[0], default) and (
                node.op_type in ("Concat",) or all(constants[1:])
            )
        return False


def _rows(bare: ir.Value, body: ir.Graph, context: Context) -> ir.Value:
    """Returns a value ``[N, ·]`` of a body that holds the rows of an operator's output."""
    for node in body:
        for value in node.outputs:
            if rank(value) == 2 and context.layout.bare(value) is bare:
                return value
    raise Declined(f"'{bare.name}' is read with axes that are not known")
