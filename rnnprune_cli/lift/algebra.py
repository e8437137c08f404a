"""What the values of a graph compute, as sums of products.

A value is seen as rows along its last axis; everything before that axis is a batch. Each row is
written as a sum of terms, and each term as a coefficient times a product, element by element, of

- columns of another value (:class:`Leaf`),
- another value times a constant matrix (:class:`Product`),
- an activation function of such a sum (:class:`Activation`).

However a cell is spelled (one joint kernel or eight, Split or Slice, ``z * (h - n) + n`` or
``z * h + (1 - z) * n``), the sum is the same, so that matching it needs no list of spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.layout import MAX_INT32, Layout, is_float, is_last_axis, last_dimension, rank
from rnnprune_cli.model import Array

Key = tuple[Any, ...]

MAX_TERMS = 24
"""No cell has more; a value with more terms is taken as it is."""

_PARAMETERS: dict[str, tuple[float | None, float | None]] = {
    "Sigmoid": (None, None),
    "Tanh": (None, None),
    "Relu": (None, None),
    "Softsign": (None, None),
    "Softplus": (None, None),
    "LeakyRelu": (0.01, None),
    "ThresholdedRelu": (1.0, None),
    "Elu": (1.0, None),
    "HardSigmoid": (0.2, 0.5),
}
"""ONNX's activation functions of recurrent operators that are operators, too, with their defaults
of alpha and beta."""


@dataclass(frozen=True, order=True)
class Function:
    """An activation function as the recurrent operators name it."""

    name: str
    alpha: float | None = None
    beta: float | None = None

    def odd_about_half(self) -> bool:
        """Tells whether ``1 - f(x) = f(-x)``."""
        return self.name == "Sigmoid" or (self.name == "HardSigmoid" and self.beta == 0.5)


@dataclass(frozen=True, eq=False)
class Leaf:
    """Columns ``start … start + width`` of a value."""

    value: ir.Value
    start: int
    width: int

    @cached_property
    def key(self) -> Key:
        """Equal for equal leaves."""
        return ("leaf", id(self.value), self.start, self.width)

    def columns(self, low: int, high: int) -> Leaf:
        """Returns some of the columns."""
        return self if self.width == 1 else Leaf(self.value, self.start + low, high - low)


@dataclass(frozen=True, eq=False)
class Product:
    """A value times a constant matrix ``[columns of the value, width]``, and that one's name."""

    value: ir.Value
    matrix: Array
    name: str = ""

    @cached_property
    def key(self) -> Key:
        """Equal for the same value and the same place in the same constant."""
        place = self.matrix.__array_interface__["data"][0]
        return ("product", id(self.value), place, self.matrix.shape, self.matrix.strides)

    def columns(self, low: int, high: int) -> Product:
        """Returns some of the columns."""
        return Product(self.value, self.matrix[:, low:high], self.name)


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation function of a sum.

    Attributes:
        function: Which one.
        argument: What it is applied to.
        source: The value that holds the argument, where it is all of its columns.
    """

    function: Function
    argument: Expression
    source: ir.Value | None

    @cached_property
    def key(self) -> Key:
        """Equal for equal functions of equal sums."""
        f = self.function
        return ("activation", f.name, f.alpha or 0.0, f.beta or 0.0, self.argument.key)

    def columns(self, low: int, high: int) -> Activation:
        """Returns some of the columns."""
        if (low, high) == (0, self.argument.width):
            return self
        return Activation(self.function, self.argument.columns(low, high), None)


Factor = Leaf | Product | Activation


@dataclass(frozen=True, eq=False)
class Term:
    """A coefficient ``[1]`` or ``[width]`` (float64) times a product of factors."""

    coefficient: Array
    factors: tuple[Factor, ...]

    def is_one(self, sign: float = 1.0) -> bool:
        """Tells whether the coefficient is 1 (or -1) up to float32 rounding."""
        return bool(np.allclose(self.coefficient, sign, rtol=0, atol=3e-7))


@dataclass(frozen=True, eq=False)
class Expression:
    """A sum of terms; a width of 1 stands for any width."""

    width: int
    terms: Mapping[Key, Term] = field(default_factory=dict)

    @cached_property
    def key(self) -> Key:
        """Equal for sums with the same factors and coefficients."""
        return tuple(
            (place, self.terms[place].coefficient.tobytes()) for place in sorted(self.terms)
        )

    @property
    def degree(self) -> int:
        """The most factors that a term has."""
        return max((len(term.factors) for term in self.terms.values()), default=0)

    def columns(self, low: int, high: int) -> Expression:
        """Returns some of the columns."""
        return _collect(
            high - low,
            (
                Term(
                    t.coefficient if t.coefficient.size == 1 else t.coefficient[low:high],
                    tuple(f.columns(low, high) for f in t.factors),
                )
                for t in self.terms.values()
            ),
        )

    def scaled(self, by: Array) -> Expression:
        """Returns the sum times a constant ``[1]`` or ``[width]``."""
        return self.times(constant(by))

    def plus(self, other: Expression) -> Expression:
        """Returns the sum of both."""
        return _collect(_width(self, other), [*self.terms.values(), *other.terms.values()])

    def times(self, other: Expression) -> Expression:
        """Returns the product of both, element by element."""
        return _collect(
            _width(self, other),
            (
                Term(
                    a.coefficient * b.coefficient,
                    tuple(sorted((*a.factors, *b.factors), key=lambda f: f.key)),
                )
                for a in self.terms.values()
                for b in other.terms.values()
            ),
        )


def _width(one: Expression, other: Expression) -> int:
    if 1 not in (one.width, other.width) and one.width != other.width:
        raise ValueError("widths differ")
    return max(one.width, other.width)


def _collect(width: int, terms: Any) -> Expression:  # noqa: ANN401
    found: dict[Key, Term] = {}
    for term in terms:
        key = tuple(factor.key for factor in term.factors)
        if key in found:
            term = Term(found[key].coefficient + term.coefficient, term.factors)
        found[key] = term
    kept = {k: t for k, t in found.items() if t.coefficient.any()}
    if len(kept) > MAX_TERMS:
        raise ValueError("too many terms")
    return Expression(width, kept)


def constant(values: Array) -> Expression:
    """Returns a constant ``[1]`` or ``[width]``."""
    return _collect(values.size, [Term(values.astype(np.float64), ())])


class Algebra:
    """Finds the sums that the values of a model stand for.

    Args:
        layout: The model, with shapes inferred.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[int, Expression | None] = {}
        self._keep: list[object] = []  # keys hold ids: what they belong to must live

    def of(self, value: ir.Value) -> Expression | None:
        """Returns the sum that a value stands for; None where its columns are not known.

        Operations that act on rows are followed back, everything else is a leaf.
        """
        value = self._layout.origin(value)
        if id(value) not in self._known:
            self._known[id(value)] = self.leaf(value)  # stands while it is worked out
            self._keep.append(value)
            try:
                found = self._work_out(value)
            except ValueError:
                found = None
            if found is not None:
                self._known[id(value)] = found
        return self._known[id(value)]

    def settle(self, value: ir.Value) -> None:
        """Lets what is made of a value take it as it is: a new state is where a cell ends."""
        value = self._layout.origin(value)
        self._known[id(value)] = self.leaf(value)

    def leaf(self, value: ir.Value) -> Expression | None:
        """Returns a value as it is."""
        width = last_dimension(value)
        if width is None or not is_float(value):
            return None
        one = np.ones(1)
        return _collect(width, [Term(one, (Leaf(value, 0, width),))])

    def _work_out(self, value: ir.Value) -> Expression | None:
        array = self._layout.constant(value)
        if array is not None:
            return self._coefficients(array)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        rule = _RULES.get(node.op_type)
        if rule is not None:
            return rule(self, node, value)
        if node.op_type in ("ConstantOfShape", "Expand", "Tile") and is_float(value):
            fill = self._layout.fill(value)
            return None if fill is None else constant(np.full(1, fill))
        if node.op_type in _PARAMETERS:
            return self._activation(node)
        return None

    @staticmethod
    def _coefficients(array: Array) -> Expression | None:
        """A constant whose rows are all equal; another one is a leaf."""
        if array.dtype.kind != "f" or not array.size:
            return None
        rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        return constant(rows[0]) if (rows == rows[0]).all() else None

    def _operands(self, node: ir.Node) -> list[Expression]:
        found = [None if v is None else self.of(v) for v in node.inputs]
        if any(e is None for e in found):
            raise ValueError("an operand's columns are not known")
        return [e for e in found if e is not None]

    # One method an operator

    def _activation(self, node: ir.Node) -> Expression | None:
        defaults = _PARAMETERS[node.op_type]
        alpha, beta = (
            None if d is None else _float(node, name, d)
            for name, d in zip(("alpha", "beta"), defaults, strict=True)
        )
        source = node.inputs[0]
        return self._applied(Function(node.op_type, alpha, beta), source)

    def _applied(self, function: Function, source: ir.Value | None) -> Expression | None:
        argument = None if source is None else self.of(source)
        if argument is None or source is None:
            return None
        source = self._layout.origin(source)
        term = Term(np.ones(1), (Activation(function, argument, source),))
        return _collect(argument.width, [term])

    def _add(self, node: ir.Node, _: ir.Value) -> Expression:
        first, *others = self._operands(node)
        for other in others:
            first = first.plus(other)
        return first

    def _sub(self, node: ir.Node, _: ir.Value) -> Expression:
        one, other = self._operands(node)
        return one.plus(other.scaled(-np.ones(1)))

    def _neg(self, node: ir.Node, _: ir.Value) -> Expression:
        return self._operands(node)[0].scaled(-np.ones(1))

    def _mul(self, node: ir.Node, _: ir.Value) -> Expression | None:
        operands = self._operands(node)
        if all(e.degree for e in operands):
            # A state of the step before is itself a sum of products: here it is what it is.
            for k, expression in enumerate(operands):
                if expression.degree > 1:
                    value = node.inputs[k]
                    assert value is not None
                    whole = self.leaf(self._layout.origin(value))
                    if whole is None:
                        return None
                    operands[k] = whole
        return operands[0].times(operands[1])

    def _div(self, node: ir.Node, _: ir.Value) -> Expression | None:
        divisor = self._layout.constant(node.inputs[1])
        dividend = self.of(node.inputs[0]) if node.inputs[0] is not None else None
        if dividend is None or divisor is None or divisor.ndim > 1 or not divisor.all():
            return None
        return dividend.scaled(1 / divisor.reshape(-1).astype(np.float64))

    def _same(self, node: ir.Node, _: ir.Value) -> Expression | None:
        return None if node.inputs[0] is None else self.of(node.inputs[0])

    def _cast(self, node: ir.Node, value: ir.Value) -> Expression | None:
        source = node.inputs[0]
        if source is None or source.dtype is None or source.dtype != value.dtype:
            return None
        return self.of(source)

    def _matmul(self, node: ir.Node, _: ir.Value) -> Expression | None:
        matrix = self._layout.constant(node.inputs[1])
        if matrix is None or matrix.ndim != 2 or node.inputs[0] is None:
            return None
        return self._product(
            node.inputs[0], self._kept(node.inputs[1], matrix), self._constant_name(node.inputs[1])
        )

    def _gemm(self, node: ir.Node, _: ir.Value) -> Expression | None:
        matrix = self._layout.constant(node.inputs[1])
        attributes = node.attributes
        if matrix is None or node.inputs[0] is None or attributes.get_int("transA"):
            return None
        matrix = self._kept(node.inputs[1], matrix)
        if attributes.get_int("transB"):
            matrix = matrix.T
        total = self._product(node.inputs[0], matrix, self._constant_name(node.inputs[1]))
        alpha, beta = (_float(node, name, 1.0) for name in ("alpha", "beta"))
        if total is not None and alpha != 1:
            total = total.scaled(np.full(1, alpha))
        if total is not None and len(node.inputs) > 2 and node.inputs[2] is not None:
            added = self.of(node.inputs[2])
            return None if added is None else total.plus(added.scaled(np.full(1, beta)))
        return total

    def _kept(self, value: ir.Value | None, matrix: Array) -> Array:
        """One array for a constant, however often it is read, so that its place names it."""
        self._keep.extend((value, matrix))
        return matrix

    def _constant_name(self, value: ir.Value | None) -> str:
        """The name of the initializer that a constant is, or is made of alone."""
        while value is not None:
            value = self._layout.origin(value)
            node = value.producer()
            if node is None or node.op_type not in ("Transpose", "Slice", "Cast", "Reshape"):
                return value.name or "" if node is None else ""
            value = node.inputs[0]
        return ""

    def _product(self, value: ir.Value, matrix: Array, name: str) -> Expression | None:
        """A value times a matrix; what was joined along the rows is taken apart."""
        if matrix.ndim != 2:
            return None
        value = self._layout.origin(value)
        node = value.producer()
        if node is not None and node.op_type == "Concat" and is_last_axis(node, value):
            total, start = None, 0
            for part in node.inputs:
                width = None if part is None else last_dimension(part)
                if part is None or width is None:
                    return None
                found = self._product(part, matrix[start : start + width], name)
                if found is None:
                    return None
                total, start = found if total is None else total.plus(found), start + width
            return total if start == matrix.shape[0] else None
        row = self.of(value)
        if row is not None and row.degree == 0:
            coefficient = row.terms[()].coefficient if row.terms else np.zeros(1)
            return constant(np.broadcast_to(coefficient, matrix.shape[0]) @ matrix)
        term = Term(np.ones(1), (Product(self._unscaled(value), matrix, name),))
        return _collect(matrix.shape[1], [term])

    def _unscaled(self, value: ir.Value) -> ir.Value:
        """Returns what a value is a copy of: what dropout leaves at inference."""
        node = value.producer()
        found = self.of(value) if node is not None and node.op_type in ("Mul", "Add") else None
        if found is None or len(found.terms) != 1:
            return value
        (term,) = found.terms.values()
        whole = len(term.factors) == 1 and isinstance(term.factors[0], Leaf)
        leaf = term.factors[0] if whole else None
        if not isinstance(leaf, Leaf) or leaf.start or (term.coefficient != 1).any():
            return value
        return leaf.value if last_dimension(leaf.value) == leaf.width else value

    def _split(self, node: ir.Node, value: ir.Value) -> Expression | None:
        source = node.inputs[0]
        whole = None if source is None else self.of(source)
        if source is None or whole is None or not is_last_axis(node, source, 0):
            return None
        sizes = list(node.attributes.get_ints("split", ())) or None
        if sizes is None and len(node.inputs) > 1:
            sizes = self._layout.constant_ints(node.inputs[1])
            if sizes is None:
                return None
        if sizes is None:
            if whole.width % len(node.outputs):
                return None
            sizes = [whole.width // len(node.outputs)] * len(node.outputs)
        ends = np.cumsum(sizes)
        index = value.index()
        if index is None or int(ends[-1]) != whole.width:
            return None
        return whole.columns(int(ends[index]) - sizes[index], int(ends[index]))

    def _slice(self, node: ir.Node, _: ir.Value) -> Expression | None:
        source = node.inputs[0]
        whole = None if source is None else self.of(source)
        if source is None or whole is None:
            return None
        bounds = self._layout.slice_bounds(node)
        ndim = rank(source)
        if bounds is None or ndim is None:
            return None
        low, high = 0, whole.width
        for axis, (start, end, step) in bounds.items():
            if axis in (-1, ndim - 1):
                if step != 1:
                    return None
                columns = range(whole.width)[start:end]
                low, high = columns.start, columns.stop
            elif (start, step) != (0, 1) or end < MAX_INT32:
                return None  # some of the rows
        return whole.columns(low, high) if high > low else None

    def _clip(self, node: ir.Node, value: ir.Value) -> Expression | None:
        """``clip(a · x + b, 0, top)`` is a HardSigmoid of x with a/top and b/top, times top."""
        found = self._limits(node)
        if found is None:
            return None
        source, low, high = found
        if low != 0:
            return None
        if high == np.inf:
            return self._applied(Function("Relu"), source)
        if high <= 0:
            return None
        source, slope, offset = self._peeled(source)
        function = Function("HardSigmoid", _near(slope / high), _near(offset / high))
        applied = self._applied(function, source)
        return None if applied is None else applied.scaled(np.full(1, high))

    def _limits(self, node: ir.Node) -> tuple[ir.Value, float, float] | None:
        """Returns the value that is limited and the limits, through nested Min, Max and Clip."""
        low, high = -np.inf, np.inf
        source: ir.Value | None = None
        current: ir.Node | None = node
        while current is not None and current.op_type in ("Clip", "Min", "Max"):
            limited = self._limited(current)
            if limited is None:
                break
            source, least, most = limited
            # The outer limit was found first and has the last word.
            if least > high or most < low:
                return None
            low, high = max(low, least), min(high, most)
            source = self._layout.origin(source)
            current = source.producer()
        return None if source is None else (source, low, high)

    def _limited(self, node: ir.Node) -> tuple[ir.Value, float, float] | None:
        low, high = -np.inf, np.inf
        if node.op_type == "Clip":
            limits = [_float(node, "min", low), _float(node, "max", high)]
            for k in (1, 2):
                if len(node.inputs) > k and node.inputs[k] is not None:
                    array = self._layout.constant(node.inputs[k])
                    if array is None or array.size != 1:
                        return None
                    limits[k - 1] = float(array.reshape(-1)[0])
            source = node.inputs[0]
            return None if source is None else (source, limits[0], limits[1])
        scalars = [self._scalar(v) for v in node.inputs]
        if len(scalars) != 2 or (scalars[0] is None) == (scalars[1] is None):
            return None
        k = 0 if scalars[0] is None else 1
        limit, source = scalars[1 - k], node.inputs[k]
        assert limit is not None
        if source is None:
            return None
        return (source, limit, high) if node.op_type == "Max" else (source, low, limit)

    def _scalar(self, value: ir.Value | None) -> float | None:
        array = self._layout.constant(value)
        if array is None or array.dtype.kind != "f" or not array.size:
            return None
        first = float(array.reshape(-1)[0])
        return first if (array == array.reshape(-1)[0]).all() else None

    def _peeled(self, value: ir.Value) -> tuple[ir.Value, float, float]:
        """Returns a value x and numbers a and b such that the given value is ``a · x + b``."""
        slope, offset = 1.0, 0.0
        while True:
            value = self._layout.origin(value)
            node = value.producer()
            if node is None or node.op_type not in ("Add", "Sub", "Mul", "Div"):
                return value, slope, offset
            one, other = (self._scalar(v) for v in node.inputs)
            inner = node.inputs[1] if one is not None else node.inputs[0]
            number = one if one is not None else other
            if number is None or inner is None:
                return value, slope, offset
            if node.op_type == "Add":
                offset += slope * number
            elif node.op_type == "Mul":
                slope *= number
            elif node.op_type == "Sub" and one is None:
                offset -= slope * number
            elif node.op_type == "Sub":
                offset += slope * number
                slope = -slope
            elif one is None and number:
                slope /= number
            else:
                return value, slope, offset
            value = inner


Rule = Callable[[Algebra, ir.Node, ir.Value], Expression | None]

_RULES: dict[str, Rule] = {
    "Add": Algebra._add,
    "Sum": Algebra._add,
    "Sub": Algebra._sub,
    "Neg": Algebra._neg,
    "Mul": Algebra._mul,
    "Div": Algebra._div,
    "Identity": Algebra._same,
    "Dropout": Algebra._same,
    "Cast": Algebra._cast,
    "MatMul": Algebra._matmul,
    "Gemm": Algebra._gemm,
    "Split": Algebra._split,
    "Slice": Algebra._slice,
    "Clip": Algebra._clip,
    "Min": Algebra._clip,
    "Max": Algebra._clip,
}


def _float(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get_float(name, default)
    return default if found is None else float(found)


def _near(number: float) -> float:
    """A number as it was typed, where float32 only blurred it."""
    short = float(f"{number:.6g}")
    return short if abs(short - number) <= 1e-7 * max(1.0, abs(number)) else number
