"""Finds the recurrent kernels of a TensorFlow graph by following values, not names.

1. The graph is interpreted once, symbolically: calls are entered, both branches of conditionals are
   taken, and each tensor is described by a :class:`Value`: which weight matrix it is, and on the
   products with which matrices it depends.
2. The body of a loop is interpreted until nothing new comes out of it, each time with what the last
   iteration returned as carried state. A signature that assigns variables is interpreted again with
   what it has stored.
3. A matrix is *recurrent* if a product with it depends on an earlier product with the same matrix:
   through a loop, an unrolled chain of steps, or a variable that outlives the call.
4. The matrix whose product is added to the recurrent one is the input kernel of the layer.

Only protocol buffers are read here, so nothing of the model is executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rnnprune_cli.model import GATES, Op, Skipped

_CALLS = {"PartitionedCall", "StatefulPartitionedCall", "TPUPartitionedCall"}
_LOOPS = {"While", "StatelessWhile"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_OLD_LOOPS = {"Enter", "RefEnter"}
_FUSED = {
    "CudnnRNN",
    "CudnnRNNV2",
    "CudnnRNNV3",
    "BlockLSTM",
    "BlockLSTMV2",
    "LSTMBlockCell",
    "GRUBlockCell",
}
_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"}
_CONVOLUTIONS = {"Conv2D", "Conv3D", "DepthwiseConv2dNative"}
_SAME = {
    "Identity",
    "Cast",
    "StopGradient",
    "PreventGradient",
    "CheckNumerics",
    "EnsureShape",
    "Snapshot",
}
# The operand of which the result is a part, position of that operand.
_PARTS = {"Split": 1, "SplitV": 0, "StridedSlice": 0, "Slice": 0, "Squeeze": 0, "Unpack": 0}
_MOVES = {
    "Reshape",
    "ExpandDims",
    "Transpose",
    "ReverseV2",
    "ReverseSequence",
    "TensorListFromTensor",
    "TensorListGetItem",
    "TensorListStack",
    "TensorListSetItem",
    "ConcatV2",
    "Pack",
}
# The operand through which an index still comes from an input. Keras 3 wraps negative indices:
# where(index < 0, index + rows, index).
_ORIGINS = dict.fromkeys(_MOVES, 0) | {"Select": 2, "SelectV2": 2}
_SUMS = {"Add", "AddV2", "AddN", "BiasAdd", "Sub"}
# A sum of products stays one through these, as far as telling which products were added goes.
_LINEAR = _SUMS | _MOVES | {"Mul", "RealDiv", "Neg", "Select", "SelectV2"}
_GATED = _MOVES | {"Mul", "Select", "SelectV2"}
_ASSIGNS = {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}
_MAX_ITERATIONS = 8

_HINT_ONNX = "export the model to ONNX and prune that"


@dataclass(frozen=True)
class Matrix:
    """A tensor that the graph is given: a captured variable or a constant.

    Attributes:
        name: Variable name without ``:0``, or the node that holds the constant.
        shape: Its shape; empty where it is not known.
        capture: Position among the captured inputs of the signature, the first one where it is
            captured several times; None for a constant.
    """

    name: str
    shape: tuple[int, ...]
    capture: int | None


@dataclass(frozen=True)
class Recurrence:
    """One recurrent layer: captures ``w`` ``[I, g*H]`` and ``r`` ``[H, g*H]``."""

    op: Op
    w: int
    r: int
    reverse: bool


@dataclass(frozen=True)
class Findings:
    """What the graph of a signature tells.

    Attributes:
        layers: The recurrent layers, in the order of execution.
        skipped: Recurrent matrices that cannot be pruned.
        assigned: Captures that a call changes.
        ranges: Signature input → number of rows of the smallest table that it indexes.
    """

    layers: tuple[Recurrence, ...]
    skipped: tuple[Skipped, ...]
    assigned: frozenset[int]
    ranges: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one tensor.

    Attributes:
        matrix: The matrix that it is, or is a part of; None if it is computed from data.
        via: The operator that changed the matrix; empty if these are its plain values.
        static: It depends on matrices and constants only.
        depends: One bit for each matrix on whose products it depends.
        terms: The products that it is a sum of.
        reverse: Its time axis runs backwards.
        carried: It is a loop-carried or stored state, possibly gated.
        origin: The signature input of which it is a part.
    """

    matrix: int | None = None
    via: str = ""
    static: bool = False
    depends: int = 0
    terms: frozenset[int] = frozenset()
    reverse: bool = False
    carried: bool = False
    origin: str = ""


@dataclass
class _Product:
    """A product with a matrix, as the last interpretation of its node saw it."""

    scope: str
    matrix: int
    via: str
    convolution: bool
    reverse: bool = False
    recurrent: bool = False
    carried: bool = False
    origin: str = ""


_Result = Value | tuple[Value, ...]


def find_recurrences(
    graph: Any,  # noqa: ANN401  GraphDef, untyped
    inputs: Sequence[str],
    captures: Sequence[tuple[str, Matrix | None]],
) -> Findings:
    """Searches the graph of a signature.

    Args:
        graph: ``GraphDef`` of the concrete function, with its function library.
        inputs: Placeholders of the signature's own inputs, by node name.
        captures: Placeholder node and matrix of each captured input; None for a capture that is
            neither a variable nor a floating-point constant.

    Returns:
        Recurrent layers, what is recurrent but cannot be pruned, and what else was learnt.
    """
    search = _Search(graph, inputs, captures)
    search.interpret()
    return search.findings()


class _Search:
    """The state of one search."""

    def __init__(
        self,
        graph: Any,  # noqa: ANN401
        inputs: Sequence[str],
        captures: Sequence[tuple[str, Matrix | None]],
    ) -> None:
        self._graph = graph
        self._functions = {f.signature.name: f for f in graph.library.function}
        self._orders: dict[str, list[Any]] = {}
        self._matrices: list[Matrix] = []
        self._constants: dict[tuple[str, str], int] = {}
        self._products: list[_Product] = []
        self._product_of: dict[tuple[str, str], int] = {}
        self._added: dict[int, set[int]] = defaultdict(set)
        self._activations: dict[int, set[str]] = defaultdict(set)
        self._stored: dict[int, int] = {}
        self._ranges: dict[str, int] = {}
        self._refused: dict[str, Skipped] = {}
        self._recording = True
        self._arguments: dict[str, Value] = {name: Value(origin=name) for name in inputs}
        seen: dict[Matrix, int] = {}
        for placeholder, matrix in captures:
            if matrix is None:
                self._arguments[placeholder] = Value()
                continue
            if matrix not in seen:
                seen[matrix] = self._add_matrix(matrix)
            self._arguments[placeholder] = Value(matrix=seen[matrix], static=True)

    # -- interpretation ---------------------------------------------------------------------------

    def interpret(self) -> None:
        """Interprets the graph, and again while the stored variables learn something new."""
        for _ in range(_MAX_ITERATIONS):
            before = dict(self._stored)
            self._run("", self._graph.node, self._arguments, "")
            if self._stored == before:
                break

    def _run(
        self, function: str, nodes: Sequence[Any], arguments: Mapping[str, Value], scope: str
    ) -> dict[str, _Result]:
        """Interprets the nodes of the graph or of one call of a function."""
        results: dict[str, _Result] = dict(arguments)
        if function not in self._orders:
            self._orders[function] = _sorted(nodes)
        for node in self._orders[function]:
            if node.name not in results:
                operands = [_get(results, ref) for ref in node.input if not ref.startswith("^")]
                results[node.name] = self._evaluate(node, operands, function, scope)
        return results

    def _call(self, name: str, arguments: Sequence[Value], scope: str) -> tuple[Value, ...]:
        """Interprets a call of a library function."""
        function = self._functions[name]
        bound = {
            arg.name: value
            for arg, value in zip(function.signature.input_arg, arguments, strict=False)
        }
        results = self._run(name, function.node_def, bound, scope)
        return tuple(_get(results, function.ret[arg.name]) for arg in function.signature.output_arg)

    def _evaluate(
        self,
        node: Any,  # noqa: ANN401
        operands: list[Value],
        function: str,
        scope: str,
    ) -> _Result:
        op = node.op
        inner = f"{scope}/{node.name}"
        if op in _CALLS and node.attr["f"].func.name in self._functions:
            return self._call(node.attr["f"].func.name, operands, inner)
        if op in self._functions:
            return self._call(op, operands, inner)
        if op in _LOOPS:
            return self._loop(node.attr["body"].func.name, operands, inner)
        if op in _BRANCHES:
            return self._branches(node, operands[1:], inner)
        if op in _PRODUCTS or op in _CONVOLUTIONS:
            return self._product(node, operands, scope)
        if op == "Const":
            return self._constant(node, function)
        if op in _FUSED:
            self._refuse(
                node.name,
                f"{op} holds its weights in a form of its own",
                "export the model with plain Keras layers",
            )
        if op in _OLD_LOOPS:
            self._refuse(
                node.attr["frame_name"].s.decode("utf-8", "replace") or node.name,
                "the loop uses TensorFlow 1 control flow",
                "save the model again with TensorFlow 2, or " + _HINT_ONNX,
            )
        if op == "IdentityN":
            return tuple(operands)
        if op == "ReadVariableOp":
            return self._read(operands[0])
        if op in _ASSIGNS:
            self._assign(*operands[:2])
            return Value()
        if op in ("GatherV2", "Gather", "ResourceGather"):
            self._gather(*operands[:2])
        if op in _SAME:
            return operands[0]
        if op in _PARTS:
            return operands[_PARTS[op]]
        return self._combine(op, operands)

    def _combine(self, op: str, operands: list[Value]) -> Value:
        """The result of an operator that is not special."""
        if op in _SUMS and self._recording:
            self._record_sum(operands)
        if op in ("Sigmoid", "Tanh") and self._recording:
            for term in operands[0].terms:
                self._activations[term].add(op)
        static = all(operand.static for operand in operands)
        reverse = any(operand.reverse for operand in operands)
        depends = 0
        for operand in operands:
            depends |= operand.depends
        matrices = [operand.matrix for operand in operands if operand.matrix is not None]
        place = _ORIGINS.get(op, len(operands))
        return Value(
            matrix=matrices[0] if static and matrices else None,
            via=op if static and matrices else "",
            static=static and bool(operands),
            depends=depends,
            terms=frozenset().union(*(operand.terms for operand in operands))
            if op in _LINEAR
            else frozenset(),
            reverse=reverse != (op in ("ReverseV2", "ReverseSequence")),
            carried=op in _GATED and any(operand.carried for operand in operands),
            # Branches of a conditional merge like a Select, but without its condition.
            origin=operands[place].origin if place < len(operands) else "",
        )

    def _record_sum(self, operands: list[Value]) -> None:
        """Notes which products are added to which."""
        for position, left in enumerate(operands):
            for right in operands[position + 1 :]:
                for a in left.terms:
                    for b in right.terms - {a}:
                        self._added[a].add(b)
                        self._added[b].add(a)

    def _loop(self, body: str, operands: list[Value], scope: str) -> tuple[Value, ...]:
        """Interprets the body of a loop until its carried state tells nothing new.

        Dependences start empty, so that what counts as recurrent here is what this loop carries.
        """
        if body not in self._functions:
            return tuple(operands)
        entry = [replace(operand, depends=0, carried=False) for operand in operands]
        recording, self._recording = self._recording, False
        returned = self._call(body, entry, scope)
        carried = [after is not before for after, before in zip(returned, entry, strict=False)]

        def next_entry(returned: tuple[Value, ...]) -> list[Value]:
            return [
                Value(depends=after.depends, reverse=after.reverse, carried=True)
                if changes
                else before
                for after, before, changes in zip(returned, entry, carried, strict=False)
            ]

        state = next_entry(returned)
        for _ in range(_MAX_ITERATIONS):
            following = next_entry(self._call(body, state, scope))
            if following == state:
                break
            state = following
        self._recording = recording
        returned = self._call(body, state, scope)
        depends = 0
        for operand in operands:
            depends |= operand.depends
        return tuple(
            Value(depends=value.depends | depends, reverse=value.reverse) if changes else operand
            for value, changes, operand in zip(returned, carried, operands, strict=False)
        )

    def _branches(
        self,
        node: Any,  # noqa: ANN401
        operands: list[Value],
        scope: str,
    ) -> tuple[Value, ...]:
        """Takes every branch of a conditional and merges what they return."""
        names = [node.attr[key].func.name for key in ("then_branch", "else_branch")]
        names += [func.name for func in node.attr["branches"].list.func]
        outcomes = [
            self._call(name, operands, f"{scope}/{name}")
            for name in names
            if name in self._functions
        ]
        return tuple(
            values[0]
            if all(value == values[0] for value in values)
            else self._combine("Select", list(values))
            for values in zip(*outcomes, strict=False)
        )

    def _product(
        self,
        node: Any,  # noqa: ANN401
        operands: list[Value],
        scope: str,
    ) -> Value:
        """A matrix product or a convolution; the weight is normally the second operand."""
        if len(operands) < 2:
            return self._combine(node.op, operands)
        data, weight = operands[:2]
        via = weight.via
        if weight.matrix is None and data.matrix is not None:
            data, weight = weight, data
            via = f"{node.op} from the left"
        elif node.attr["transpose_b"].b or node.attr["adj_y"].b:
            via = "transposition"
        if weight.matrix is None:
            return self._combine(node.op, operands)
        bit = 1 << weight.matrix
        key = (scope, node.name)
        if key not in self._product_of:
            self._product_of[key] = len(self._products)
            self._products.append(_Product(scope, weight.matrix, via, node.op in _CONVOLUTIONS))
        index = self._product_of[key]
        if self._recording:
            product = self._products[index]
            product.matrix, product.via = weight.matrix, via
            product.recurrent |= bool(data.depends & bit)
            product.carried |= data.carried
            product.reverse = data.reverse
            product.origin = data.origin
        return Value(
            depends=data.depends | weight.depends | bit,
            terms=frozenset((index,)),
            reverse=data.reverse,
        )

    def _constant(self, node: Any, function: str) -> Value:  # noqa: ANN401
        """A constant; one that could be a weight becomes a matrix of its own."""
        tensor = node.attr["value"].tensor
        shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
        if len(shape) < 2:
            return Value(static=True)
        key = (function, node.name)
        if key not in self._constants:
            self._constants[key] = self._add_matrix(Matrix(node.name, shape, None))
        return Value(matrix=self._constants[key], static=True)

    def _read(self, resource: Value) -> Value:
        """The value of a variable: the matrix itself, or a state if a call changes it."""
        if resource.matrix in self._stored:
            return Value(depends=self._stored[resource.matrix], carried=True)
        return resource

    def _assign(self, resource: Value, value: Value) -> None:
        if resource.matrix is not None:
            self._stored[resource.matrix] = self._stored.get(resource.matrix, 0) | value.depends

    def _gather(self, table: Value, indices: Value) -> None:
        """Notes the range of an input that indexes the rows of a table."""
        if table.matrix is None or table.via or not indices.origin:
            return
        shape = self._matrices[table.matrix].shape
        if len(shape) >= 2:
            rows = min(shape[0], self._ranges.get(indices.origin, shape[0]))
            self._ranges[indices.origin] = rows

    def _add_matrix(self, matrix: Matrix) -> int:
        self._matrices.append(matrix)
        return len(self._matrices) - 1

    # -- conclusions ------------------------------------------------------------------------------

    def _refuse(self, name: str, reason: str, hint: str) -> None:
        self._refused.setdefault(name, Skipped(name, reason, hint))

    def findings(self) -> Findings:
        """Pairs the recurrent matrices with their input kernels."""
        pairs: dict[tuple[int, int], Recurrence] = {}
        scopes: set[str] = set()
        unpaired: list[int] = []
        groups: dict[tuple[str, int], list[int]] = {}
        for index, product in enumerate(self._products):
            if product.recurrent:
                groups.setdefault((product.scope, product.matrix), []).append(index)
        feeding = {
            self._products[partner].matrix
            for members in groups.values()
            for member in members
            for partner in self._partners(member)
        }
        for (scope, matrix), members in groups.items():
            partners = {
                self._products[partner].matrix: partner
                for member in members
                for partner in self._partners(member)
            }
            recurrence = self._pair(matrix, members, partners)
            if recurrence is not None:
                # Keras also runs the cell once outside of the loop, on the first step as it is.
                key = (recurrence.w, recurrence.r)
                reverse = recurrence.reverse or (key in pairs and pairs[key].reverse)
                pairs[key] = replace(recurrence, reverse=reverse)
                scopes.add(scope)
            elif matrix not in feeding:
                unpaired.append(members[0])
        for member in unpaired:
            # A projection or an attention query of a loop whose cell was found is no cell itself.
            if self._products[member].scope not in scopes:
                self._refuse_product(member)
        for recurrence in self._step_cells({matrix for _, matrix in groups} | feeding):
            pairs.setdefault((recurrence.w, recurrence.r), recurrence)
        return Findings(
            layers=tuple(pairs.values()),
            skipped=tuple(self._refused.values()),
            assigned=frozenset(
                capture
                for matrix in self._stored
                if (capture := self._matrices[matrix].capture) is not None
            ),
            ranges=dict(self._ranges),
        )

    def _partners(self, index: int) -> list[int]:
        """Products that are added to a recurrent one and could be those with the input."""
        product = self._products[index]
        columns = self._matrices[product.matrix].shape[-1:]
        return [
            other
            for other in sorted(self._added[index])
            if (partner := self._products[other]).matrix != product.matrix
            and self._matrices[partner.matrix].shape[-1:] == columns
            and (not partner.recurrent or (product.carried and not partner.carried))
        ]

    def _pair(
        self, matrix: int, members: list[int], partners: Mapping[int, int]
    ) -> Recurrence | None:
        """A layer of a recurrent matrix and the matrices added to it, or why there is none."""
        if len(partners) != 1:
            return None
        (w, partner), *_ = partners.items()
        product = self._products[members[0]]
        op = _operator(self._matrices[matrix].shape)
        plain = not any(self._products[member].via for member in (*members, partner))
        capture_w, capture_r = self._matrices[w].capture, self._matrices[matrix].capture
        if op is None or len(self._matrices[w].shape) != 2 or product.convolution or not plain:
            return None
        if capture_w is None or capture_r is None:
            return None
        return Recurrence(op, capture_w, capture_r, self._products[partner].reverse)

    def _refuse_product(self, index: int) -> None:
        """Says why a recurrent product is no layer that can be pruned."""
        product = self._products[index]
        matrix = self._matrices[product.matrix]
        partners = {self._products[partner].matrix for partner in self._partners(index)}
        vias = [product.via, *(self._products[partner].via for partner in self._partners(index))]
        computed = next((via for via in vias if via), "")
        constant = matrix.capture is None or any(
            self._matrices[partner].capture is None for partner in partners
        )
        name = layer_path(matrix.name)
        if product.convolution:
            self._refuse(
                name, "a convolutional recurrent layer", "only LSTM, GRU and RNN can be pruned"
            )
        elif computed:
            self._refuse(
                name,
                f"its weights are computed inside the graph ({computed})",
                "strip quantization or weight wrappers and save the model again",
            )
        elif constant:
            self._refuse(
                name,
                "its weights are constants of the graph, not variables",
                "save the model without freezing it, or " + _HINT_ONNX,
            )
        elif not partners:
            self._refuse(
                name,
                "its input and recurrent weights are one matrix, or it has no input weights",
                _HINT_ONNX,
            )
        elif len(partners) > 1:
            self._refuse(name, "it has several input kernels", _HINT_ONNX)
        else:
            shape = "x".join(map(str, matrix.shape))
            self._refuse(
                name,
                f"its recurrent kernel is {shape}, not that of an LSTM, GRU or RNN",
                _HINT_ONNX,
            )

    def _step_cells(self, known: set[int]) -> list[Recurrence]:
        """LSTM and GRU cells of one step whose state is an input of the signature.

        Nothing in the graph links the new state to the input it is fed back to, so these must look
        like a cell: two added products, gate-shaped kernels, a sigmoid and a tanh of their sum.
        """
        cells = []
        taken: set[int] = set()
        for index, product in enumerate(self._products):
            if not product.origin or {"Sigmoid", "Tanh"} - self._activations[index]:
                continue
            op = _operator(self._matrices[product.matrix].shape)
            for other in sorted(self._added[index], reverse=True):
                partner = self._products[other]
                matrices = {product.matrix, partner.matrix}
                captures = [self._matrices[m].capture for m in (partner.matrix, product.matrix)]
                if (
                    op in ("LSTM", "GRU")
                    and len(matrices) == 2
                    and not matrices & (known | taken)
                    and not (product.via or partner.via)
                    and not (product.convolution or partner.convolution)
                    and partner.origin != product.origin
                    # With two inputs of equal size, the first operand is x, as in Keras.
                    and (other < index or _operator(self._matrices[partner.matrix].shape) != op)
                    and captures[0] is not None
                    and captures[1] is not None
                ):
                    cells.append(Recurrence(op, captures[0], captures[1], False))
                    taken |= matrices
        return cells


def layer_path(variable: str) -> str:
    """The layer of a Keras variable: ``rnn/lstm_cell/kernel`` belongs to ``rnn``."""
    parts = variable.split(":")[0].split("/")[:-1]
    if len(parts) > 1 and "cell" in parts[-1]:
        parts = parts[:-1]
    return "/".join(parts) or variable


def _operator(shape: tuple[int, ...]) -> Op | None:
    """The operator with a recurrent kernel of this shape."""
    if len(shape) != 2:
        return None
    return next((op for op, gates in GATES.items() if shape[1] == gates * shape[0]), None)


def _get(results: Mapping[str, _Result], reference: str) -> Value:
    """Resolves ``node``, ``node:0`` or, in a function, ``node:output:0``."""
    name, *rest = reference.split(":")
    result = results.get(name)
    if isinstance(result, tuple):
        position = int(rest[-1]) if rest else 0
        return result[position] if position < len(result) else Value()
    return result if result is not None else Value()


def _sorted(nodes: Sequence[Any]) -> list[Any]:
    """Orders nodes so that operands come first; edges that close an old-style loop are cut."""
    by_name = {node.name: node for node in nodes}
    done: set[str] = set()
    order = []
    for root in nodes:
        stack = [(root, False)]
        entered: set[str] = set()
        while stack:
            node, leaving = stack.pop()
            if leaving:
                if node.name not in done:
                    done.add(node.name)
                    order.append(node)
                continue
            if node.name in done or node.name in entered:
                continue
            entered.add(node.name)
            stack.append((node, True))
            for reference in reversed(node.input):
                operand = by_name.get(reference.lstrip("^").split(":")[0])
                if operand is not None and operand.name not in done:
                    stack.append((operand, False))
    return order
