"""How values are laid out: axes of size 1, dimensions as symbols, reversed sequences."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence

import onnx_ir as ir

from rnnprune_cli.graph import Folder, Walker
from rnnprune_cli.model import GATES, Array

Linear = Mapping[Hashable, int]
"""An integer as a sum of symbols times factors; the key :data:`ONE` holds the constant."""

ONE = "1"

MAX_INT32 = 2**31 - 1

_MAX_INTEGERS = 64
"""Tensors up to this size may hold axes, sizes and target shapes."""


def rank(value: ir.Value) -> int | None:
    """Returns the number of dimensions of a value, where it is known."""
    return None if value.shape is None else len(value.shape)


def static(value: ir.Value, axis: int) -> int | None:
    """Returns the size of an axis where the file states or implies it."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def last_dimension(value: ir.Value) -> int | None:
    """Returns the size of the last axis, where it is known."""
    if value.shape is None or not len(value.shape):
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def is_float(value: ir.Value) -> bool:
    """Tells whether a value is known to hold floating-point numbers."""
    return value.dtype is not None and value.dtype.is_floating_point()


def is_last_axis(node: ir.Node, value: ir.Value, default: int | None = None) -> bool:
    """Tells whether the ``axis`` of a node is the last one of a value."""
    axis = node.attributes.get_int("axis", default)
    ndim = rank(value)
    return axis == -1 or (ndim is not None and axis == ndim - 1)


def number(value: int) -> Linear:
    """Returns a constant."""
    return {ONE: value} if value else {}


def combined(one: Linear, other: Linear, factor: int = 1) -> Linear:
    """Returns ``one + factor · other``."""
    total = dict(one)
    for symbol, times in other.items():
        total[symbol] = total.get(symbol, 0) + factor * times
    return {symbol: times for symbol, times in total.items() if times}


def product(sizes: Sequence[Linear]) -> Linear:
    """Returns the product of sizes; what is no number is a product of symbols, in one order."""
    factor, symbols = 1, list[Hashable]()
    for size in sizes:
        times, own = _factors(size)
        factor *= times
        symbols += own
    if not factor:
        return {}
    if not symbols:
        return {ONE: factor}
    first = symbols[0]
    if len(symbols) > 1:
        return {("product", *sorted(symbols, key=repr)): factor}
    if isinstance(first, tuple) and first[0] == "sum":
        return {symbol: factor * times for symbol, times in first[1:]}
    return {first: factor}


def quotient(size: Linear, by: Linear) -> Linear | None:
    """Returns a size divided by another, if that leaves no rest whatever the symbols are."""
    (factor, symbols), (other, gone) = _factors(size), _factors(by)
    left = list(symbols)
    for symbol in gone:
        if symbol not in left:
            return None
        left.remove(symbol)
    if other <= 0 or factor % other:
        return None
    return product([number(factor // other), *({symbol: 1} for symbol in left)])


def _factors(size: Linear) -> tuple[int, list[Hashable]]:
    """Takes a size apart into a number and symbols; a sum is a symbol of its own."""
    if len(size) > 1:
        return 1, [("sum", *sorted(size.items(), key=repr))]
    for symbol, times in size.items():
        if symbol == ONE:
            return times, []
        if isinstance(symbol, tuple) and symbol[0] == "product":
            return times, list(symbol[1:])
        return times, [symbol]
    return 0, []


def is_named(size: Linear) -> bool:
    """Tells whether a size is that of a model input's axis, by its name."""
    return len(size) == 1 and next(iter(size))[0] == "dimension"  # type: ignore[index]


class Layout:
    """Answers questions about the shapes of a model's values.

    Args:
        walker: The model, with shapes inferred.
        folder: Evaluates its constants.
    """

    def __init__(self, walker: Walker, folder: Folder) -> None:
        self._walker = walker
        self._folder = folder
        self._bare: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._sizes: dict[tuple[int, int], Linear | None] = {}

    def origin(self, value: ir.Value) -> ir.Value:
        """Returns where a value is made."""
        return self._walker.origin(value, ())[0]

    def constant(self, value: ir.Value | None) -> Array | None:
        """Returns the value of a constant, or None."""
        if value is None:
            return None
        folded = self._folder.fold(value, ())
        return None if isinstance(folded, str) else folded

    def constant_ints(self, value: ir.Value | None) -> list[int] | None:
        """Returns the elements of an integer constant, or of what depends on fixed sizes only."""
        found = None if value is None else self.integers(value)
        if found is None or any(set(k) - {ONE} for k in found):
            return None
        return [k.get(ONE, 0) for k in found]

    def slice_bounds(self, node: ir.Node) -> dict[int, tuple[int, int, int]] | None:
        """Returns axis → (start, end, step) of a Slice with constant bounds."""
        if node.attributes.get("starts") is not None:
            lists = [
                list(found) if (found := node.attributes.get_ints(name, None)) is not None else None
                for name in ("starts", "ends", "axes")
            ]
        else:
            lists = [self.constant_ints(v) for v in node.inputs[1:]]
            given = [v is not None for v in node.inputs[1:]]
            if any(found is None and g for found, g in zip(lists, given, strict=True)):
                return None
        lists += [None] * (4 - len(lists))
        starts, ends, axes, steps = lists
        if starts is None or ends is None:
            return None
        axes = list(range(len(starts))) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        return dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))

    def axes(self, node: ir.Node, ndim: int | None) -> list[int] | None:
        """Returns the axes of a Squeeze, Unsqueeze or reduction, not negative."""
        axes: list[int] | None = list(node.attributes.get_ints("axes", ())) or None
        if axes is None and len(node.inputs) > 1:
            axes = self.constant_ints(node.inputs[1]) or None
        if axes is None or ndim is None:
            return None
        return [int(a) % ndim for a in axes]

    def bare(self, value: ir.Value) -> ir.Value:
        """Returns the value that holds the same rows, before axes of size 1 came and went."""
        if id(value) not in self._bare:
            self._bare[id(value)] = (value, self._made_bare(value))
        return self._bare[id(value)][1]

    def _made_bare(self, value: ir.Value) -> ir.Value:
        while True:
            value = self.origin(value)
            node = value.producer()
            if node is None or node.domain not in ("", "ai.onnx"):
                return value
            source = node.inputs[0] if node.inputs else None
            if source is None or not self._keeps_rows(node, source, value):
                return value
            value = source

    def is_one(self, value: ir.Value, axis: int) -> bool:
        """Tells whether an axis is known to have size 1."""
        size = self.dimension(value, axis)
        return size is not None and dict(size) == {ONE: 1}

    def _keeps_rows(self, node: ir.Node, source: ir.Value, value: ir.Value) -> bool:
        if node.op_type == "Concat":
            return len(node.inputs) == 1
        if node.op_type == "Split":
            return len(node.outputs) == 1
        ndim = rank(value) if node.op_type == "Unsqueeze" else rank(source)
        if node.op_type in ("Squeeze", "Unsqueeze"):
            axes = self.axes(node, ndim)
            return axes is not None and ndim is not None and ndim - 1 not in axes
        if node.op_type == "Transpose" and source.shape is not None:
            order = list(node.attributes.get_ints("perm", ()) or ())
            moved = [a for a in order if source.shape[a] != 1]
            return len(order) == ndim and moved == sorted(moved) and order[-1] == len(order) - 1
        if node.op_type == "Reshape" and source.shape is not None and value.shape is not None:
            kept = [[d for d in v.shape or () if d != 1] for v in (source, value)]
            known = all(isinstance(d, int) for d in kept[1][1:]) and len(kept[0]) == len(kept[1])
            return known and kept[0][1:] == kept[1][1:] and source.shape[-1] == value.shape[-1]
        return False

    # Dimensions

    def dimension(self, value: ir.Value, axis: int) -> Linear | None:
        """Returns the size of an axis as a number or symbol; equal symbols are equal sizes."""
        value = self.origin(value)
        ndim = rank(value)
        if ndim is None or not -ndim <= axis < ndim:
            return None
        place = (id(value), axis % ndim)
        if place not in self._sizes:
            self._sizes[place] = {("axis", *place): 1}  # stands while it is worked out
            self._sizes[place] = self._dimension(value, axis % ndim)
        return self._sizes[place]

    def measured(self, value: ir.Value, axis: int, size: Linear) -> None:
        """Takes the size of an axis of a new value from someone who knows."""
        self._sizes[id(value), axis] = size

    def _dimension(self, value: ir.Value, axis: int) -> Linear | None:
        while True:
            value = self.origin(value)
            ndim = rank(value)
            if ndim is None or value.shape is None:
                return None
            size = value.shape[axis]
            if isinstance(size, int):
                return number(size)
            node = value.producer()
            if node is None:
                name = size.value if isinstance(size, ir.SymbolicDim) else None
                if name and value.graph is self._walker.model.graph:
                    return {("dimension", name): 1}
                return {("axis", id(value), axis): 1}
            if node.op_type in ("Expand", "ConstantOfShape"):
                target = node.inputs[len(node.inputs) - 1]
                sizes = None if target is None else self.integers(target)
                if sizes is not None and len(sizes) == ndim and dict(sizes[axis]) != {ONE: 1}:
                    return sizes[axis]
            if node.op_type == "Reshape" and node.inputs[0] is not None:
                source = node.inputs[0]
                before = [self.dimension(source, k) for k in range(rank(source) or 0)]
                made = None if source.shape is None else self.reshaped(node, before)
                found = made[axis] if made is not None and len(made) == ndim else None
                if found is not None:
                    return found
            if node.op_type == "Range":
                given = [None if v is None else self.integers(v) for v in node.inputs]
                if given[0] == [{}] and given[2] == [{ONE: 1}] and given[1] is not None:
                    return given[1][0]
            step = self._dimension_before(node, axis, ndim)
            if step is None:
                return {("axis", id(value), axis): 1}
            value, axis = step

    def reshaped(
        self, node: ir.Node, before: Sequence[Linear | None]
    ) -> list[Linear | None] | None:
        """Returns the sizes that a Reshape makes, None for those that are not known.

        Args:
            node: The Reshape.
            before: The sizes of what it reads.
        """
        target = node.inputs[1] if len(node.inputs) > 1 else None
        sizes = None if target is None else self.integers(target)
        if sizes is None:
            return None
        after: list[Linear | None] = []
        for k, size in enumerate(sizes):
            copied = not size and not node.attributes.get_int("allowzero", 0)
            if copied and k >= len(before):
                return None
            after.append(before[k] if copied else None if dict(size) == {ONE: -1} else size)
        rest = [k for k, size in enumerate(sizes) if dict(size) == {ONE: -1}]
        known = [size for k, size in enumerate(after) if size is not None and k not in rest]
        given = [size for size in before if size is not None]
        if len(rest) == 1 and len(known) == len(after) - 1 and len(given) == len(before):
            after[rest[0]] = quotient(product(given), product(known))
        return after

    def _dimension_before(self, node: ir.Node, axis: int, ndim: int) -> tuple[ir.Value, int] | None:
        """Returns the value and axis that an output's axis has its size from."""
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return None
        if node.op_type == "Transpose":
            order = node.attributes.get_ints("perm", ()) or range(ndim)[::-1]
            return source, list(order)[axis]
        if node.op_type == "Slice":
            bounds = self.slice_bounds(node)
            if bounds is None:
                return None
            start, end, step = {a % ndim: bound for a, bound in bounds.items()}.get(axis, (0, 0, 0))
            whole = (start, step) == (0, 1) and end >= MAX_INT32
            backwards = (start, step) == (-1, -1) and end < -MAX_INT32
            return (source, axis) if whole or backwards or step == 0 else None
        if node.op_type in _SAME_SHAPE:
            return source, axis
        if node.op_type in GATES and not node.attributes.get_int("layout"):
            # Y [T, directions, N, H], Y_h and Y_c [directions, N, H] of X [T, N, I]
            return {4: {0: (source, 0), 2: (source, 1)}, 3: {1: (source, 1)}}[ndim].get(axis)
        if node.op_type == "Gemm" and axis == 0:
            return None if node.attributes.get_int("transA") else (source, axis)
        if node.op_type == "Einsum":
            terms, result = einsum_terms(node)
            if "." in "".join([*terms, result]):
                return None
            letter = result[axis]
            pairs = zip(node.inputs, terms, strict=False)
            return self._one_of([(v, t.index(letter)) for v, t in pairs if v and letter in t])
        if node.op_type == "GatherElements" and node.inputs[1] is not None:
            return node.inputs[1], axis
        if node.op_type == "Expand":
            # Where the target says 1, the size stays.
            sizes_asked = None if node.inputs[1] is None else self.integers(node.inputs[1])
            own = (rank(source) or 0) - ndim + axis
            asked = sizes_asked[axis] if sizes_asked and len(sizes_asked) == ndim else None
            stays = asked is not None and dict(asked) == {ONE: 1} and own >= 0
            return (source, own) if stays else None
        if node.op_type in _POOLS and axis < 2:
            return source, axis
        if node.op_type == "Conv" and axis == 0:
            return source, axis
        if node.op_type == "MatMul" and axis < ndim - 1 and rank(source) == ndim:
            other = node.inputs[1]
            return (source, axis) if other is not None and rank(other) == 2 else None
        if node.op_type in _BROADCASTING:
            owns = [(v, (rank(v) or 0) - ndim + axis) for v in node.inputs if v is not None]
            return self._one_of([(v, own) for v, own in owns if own >= 0])
        if node.op_type in _REDUCTIONS:
            axes = self.axes(node, rank(source))
            if axes is None:
                return None
            if node.attributes.get_int("keepdims", 1):
                return None if axis in axes else (source, axis)
            left = [a for a in range(rank(source) or 0) if a not in axes]
            return source, left[axis]
        if node.op_type == "Unsqueeze":
            axes = self.axes(node, ndim)
            if axes is None or axis in axes:
                return None
            return source, axis - sum(a < axis for a in axes)
        if node.op_type == "Squeeze":
            axes = self.axes(node, rank(source))
            if axes is None:
                return None
            left = [a for a in range(rank(source) or 0) if a not in axes]
            return source, left[axis]
        if node.op_type == "Gather" and len(node.inputs) == 2:  # an Embedding
            table, index = node.inputs
            if table is not None and index is not None and rank(table) == 2:
                first = node.attributes.get_int("axis", 0) == 0
                return (index, axis) if first and axis < ndim - 1 else None
        return None

    def _one_of(self, places: Sequence[tuple[ir.Value, int]]) -> tuple[ir.Value, int] | None:
        """Returns one of the axes that are broadcast against each other, if they are as long."""
        long = [(v, k) for v, k in places if v.shape is not None and v.shape[k] != 1]
        sizes = [self.dimension(v, k) for v, k in long]
        return long[0] if long and all(size == sizes[0] for size in sizes) else None

    def integers(
        self, value: ir.Value, known: Mapping[int, Linear] | None = None
    ) -> list[Linear] | None:
        """Returns the elements of a small integer tensor as sums of symbols.

        Args:
            value: A scalar or a vector, such as what Shape gives and what is made of it.
            known: ``id`` of a value → what it holds, such as the number of the iteration.
        """
        value = self.origin(value)
        if known and id(value) in known:
            return [known[id(value)]]
        array = self.constant(value)
        if array is not None:
            if (
                array.size > _MAX_INTEGERS
                or array.dtype.kind not in "iuf"
                or (array != array.round()).any()
            ):
                return None
            return [number(int(k)) for k in array.reshape(-1)]
        node = value.producer()
        found = None if node is None else self._integers_of(node, known)
        if found is None and (rank(value) == 0 or (value.shape is not None and value.shape == [1])):
            return [{("value", id(value)): 1}]
        return found

    def _integers_of(
        self, node: ir.Node, known: Mapping[int, Linear] | None
    ) -> list[Linear] | None:
        if node.op_type == "SequenceLength" and node.inputs[0] is not None:
            split = self.split_of(node.inputs[0])
            length = None if split is None else self.dimension(*split)
            return None if length is None else [length]
        if node.op_type == "Shape" and node.inputs[0] is not None:
            ndim = rank(node.inputs[0])
            if ndim is None:
                return None
            axes = range(ndim)[
                node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)
            ]
            sizes = [self.dimension(node.inputs[0], axis) for axis in axes]
            return [s for s in sizes if s is not None] if None not in sizes else None
        if node.op_type == "ConstantOfShape":
            count = self.constant_ints(node.inputs[0])
            filled = None if node.outputs[0] is None else self.fill(node.outputs[0])
            if count is None or len(count) != 1 or filled is None or filled != round(filled):
                return None
            return [number(int(filled))] * count[0] if count[0] <= _MAX_INTEGERS else None
        if node.op_type == "Where":
            return self._chosen(node, known)
        if node.op_type not in (
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Concat",
            "Gather",
            "Slice",
            "ReduceProd",
            *_SAME_INTEGERS,
        ):
            return None
        if any(
            v is not None and v.dtype == ir.DataType.BOOL for v in (*node.inputs, *node.outputs)
        ):
            return None
        given = [None if v is None else self.integers(v, known) for v in node.inputs]
        first = given[0]
        if first is None:
            return None
        if node.op_type in _SAME_INTEGERS:
            return first
        if node.op_type == "ReduceProd":  # of a vector, or of all axes
            return [product(first)]
        if node.op_type == "Concat":
            return [k for part in given for k in part] if None not in given else None  # type: ignore[union-attr]
        second = given[1] if len(given) > 1 else None
        if node.op_type == "Gather":
            picked = self.constant_ints(node.inputs[1])
            inside = picked is not None and all(-len(first) <= k < len(first) for k in picked)
            return [first[k] for k in picked] if inside and picked is not None else None
        if node.op_type == "Slice":
            bounds = self.slice_bounds(node)
            return first[slice(*bounds[0])] if bounds is not None and set(bounds) == {0} else None
        if second is None or len(first) != len(second) or not _are_vectors(node.inputs, first):
            return None
        each = [self._calculated(node.op_type, a, b) for a, b in zip(first, second, strict=True)]
        return None if None in each else each  # type: ignore[return-value]

    def _chosen(self, node: ir.Node, known: Mapping[int, Linear] | None) -> list[Linear] | None:
        """Returns the elements of a Where on which sizes are equal, as exporters put Expand."""
        equal = None if node.inputs[0] is None else self.origin(node.inputs[0]).producer()
        if equal is None or equal.op_type != "Equal":
            return None
        given = [
            None if v is None else self.integers(v, known)
            for v in (*equal.inputs, *node.inputs[1:])
        ]
        lists = [part for part in given if part is not None]
        length = max(map(len, lists), default=0)
        if len(lists) < 4 or any(len(part) not in (1, length) for part in lists):
            return None
        if not _are_vectors([*equal.inputs, *node.inputs], max(lists, key=len)):
            return None
        rows = zip(*(part * (length // len(part)) for part in lists), strict=True)
        found: list[Linear] = []
        for a, b, then, other in rows:
            same = _are_equal(a, b)
            if same is None:
                return None
            found.append(then if same else other)
        return found

    @staticmethod
    def _calculated(op_type: str, one: Linear, other: Linear) -> Linear | None:
        """Returns the sum, difference, product or quotient of two integers."""
        if op_type == "Div":
            numbers = [part.get(ONE, 0) for part in (one, other)]
            if not (set(one) | set(other)) - {ONE} and min(numbers) >= 0 < numbers[1]:
                return number(numbers[0] // numbers[1])
            return quotient(one, other)
        if op_type == "Mul":
            return product([one, other])
        return combined(one, other, 1 if op_type == "Add" else -1)

    def truth(self, value: ir.Value | None) -> bool | None:
        """Returns what a condition on constants and fixed sizes always is; None if it varies."""
        if value is None:
            return None
        value = self.origin(value)
        array, node = self.constant(value), value.producer()
        if array is not None:
            return bool(array.reshape(-1)[0]) if array.size == 1 else None
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        source = node.inputs[0]
        if node.op_type == "Not":
            return None if (found := self.truth(source)) is None else not found
        if node.op_type in ("Squeeze", "Unsqueeze", "Reshape", "Cast") and (
            source.dtype == ir.DataType.BOOL
        ):
            return self.truth(source)
        if node.op_type in ("And", "Or"):
            both = [self.truth(v) for v in node.inputs]
            return None if None in both else (all if node.op_type == "And" else any)(both)
        given = [self.constant_ints(v) for v in node.inputs]
        if any(numbers is None or len(numbers) != 1 for numbers in given):
            return None
        numbers = [n[0] for n in given if n is not None]
        if node.op_type == "Cast":
            return numbers[0] != 0
        compare = _COMPARISONS.get(node.op_type)
        return None if compare is None else compare(*numbers)

    # Sequences

    def split_of(self, value: ir.Value) -> tuple[ir.Value, int] | None:
        """Returns the tensor and the axis that a list holds the steps of, without the axis."""
        node = self.origin(value).producer()
        if node is None or node.op_type != "SplitToSequence" or node.inputs[0] is None:
            return None
        sizes = self.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        single = len(node.inputs) < 2 or (sizes is not None and sizes.ndim == 0 and sizes == 1)
        if not single or node.attributes.get_int("keepdims", 1) == 1:
            return None
        source = self.origin(node.inputs[0])
        axis = node.attributes.get_int("axis", 0) or 0
        return None if rank(source) is None else (source, axis % (rank(source) or 1))

    def reversed_from(self, value: ir.Value, time_axis: int) -> ir.Value | None:
        """Returns what a value is the full reversal of, along an axis; None if it is none."""
        value = self.origin(value)
        node = value.producer()
        source = node.inputs[0] if node is not None and node.inputs else None
        ndim = rank(value)
        if node is None or source is None or ndim is None:
            return None
        if node.op_type == "Slice":
            bounds = self.slice_bounds(node)
            if bounds is None or len(bounds) != 1:
                return None
            ((axis, (start, end, step)),) = bounds.items()
            size = self.dimension(source, time_axis) or {}
            whole = start == -1 or start >= MAX_INT32 or number(start) == combined(size, {ONE: -1})
            return (
                source
                if axis % ndim == time_axis and step == -1 and whole and (end < -MAX_INT32)
                else None
            )
        if node.op_type == "ReverseSequence" and len(node.inputs) == 2:
            if node.attributes.get_int("time_axis", 0) != time_axis or node.inputs[1] is None:
                return None
            lengths = self._all_elements(node.inputs[1])
            size_now = self.dimension(source, time_axis)
            return source if lengths is not None and lengths == size_now else None
        return None

    def _all_elements(self, value: ir.Value) -> Linear | None:
        """Returns the number that all elements of a vector are."""
        value = self.origin(value)
        array = self.constant(value)
        if array is not None and array.size and (array == array.reshape(-1)[0]).all():
            return number(int(array.reshape(-1)[0]))
        node = value.producer()
        if node is not None and node.op_type in ("Cast", "Expand", "Tile", "Reshape"):
            source = node.inputs[0]
            return None if source is None else self._all_elements(source)
        found = self.integers(value)
        return found[0] if found is not None and all(k == found[0] for k in found) else None

    def is_zero(self, value: ir.Value) -> bool:
        """Tells whether all elements of a value are zero, whatever its shape."""
        return self.fill(value) == 0

    def fill(self, value: ir.Value) -> float | None:
        """Returns the number that all elements of a value are, whatever its shape."""
        while True:
            value = self.origin(value)
            array = self.constant(value)
            if array is not None:
                same = array.size and (array == array.reshape(-1)[0]).all()
                return float(array.reshape(-1)[0]) if same and array.dtype.kind in "fiub" else None
            node = value.producer()
            if node is None:
                return None
            if node.op_type == "ConstantOfShape":
                filled = node.attributes.get_tensor("value", None)
                return 0.0 if filled is None else float(filled.numpy().reshape(-1)[0])
            if node.op_type not in _MOVING or node.inputs[0] is None:
                return None
            value = node.inputs[0]


def einsum_terms(node: ir.Node) -> tuple[list[str], str]:
    """Returns the letters of an Einsum's operands and of its result."""
    equation = (node.attributes.get_string("equation", "") or "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    if not arrow:
        result = "".join(x for x in sorted(set(left) - {","}) if left.count(x) == 1)
    return left.split(","), result


def _are_vectors(values: Sequence[ir.Value | None], elements: Sequence[Linear]) -> bool:
    """Tells whether elements stand where they are listed: matrices would be broadcast otherwise."""
    return len(elements) == 1 or all(v is not None and rank(v) in (0, 1) for v in values)


def _are_equal(one: Linear, other: Linear) -> bool | None:
    """Tells whether two integers are equal; None if that depends. Sizes are not negative."""
    difference = combined(one, other, -1)
    if not set(difference) - {ONE}:
        return not difference
    signs = {times > 0 for times in difference.values()}
    sizes = all(
        symbol == ONE or (isinstance(symbol, tuple) and symbol[0] in ("dimension", "axis"))
        for symbol in difference
    )
    return False if sizes and len(signs) == 1 and ONE in difference else None


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "Greater": operator.gt,
    "LessOrEqual": operator.le,
    "GreaterOrEqual": operator.ge,
}
_SAME_SHAPE = frozenset(
    {"Cast", "Not", "ReverseSequence", "Relu", "Sigmoid", "Tanh", "Dropout", "Abs", "Neg", "Sqrt"}
    | {"LayerNormalization", "Clip", "Softmax", "Exp", "Erf", "Elu", "LeakyRelu", "Softplus"}
    | {"BatchNormalization", "InstanceNormalization", "GroupNormalization", "LogSoftmax", "Log"}
    | {"Selu", "Celu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Softsign", "CumSum", "Sign"}
    | {"Reciprocal", "ThresholdedRelu", "LpNormalization", "PRelu"}
)
_POOLS = frozenset(
    {"AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
)
_BROADCASTING = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Where",
        "Greater",
        "Less",
        "Equal",
        "And",
        "Or",
        "Min",
        "Max",
    }
)
_REDUCTIONS = frozenset({"ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"})
_SAME_INTEGERS = frozenset({"Cast", "Squeeze", "Unsqueeze", "Reshape", "Identity"})
_MOVING = frozenset(
    {"Expand", "Tile", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Slice", "Gather"}
    | {"Split", "Flatten"}
)
