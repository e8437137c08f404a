"""Hidden units out of a graph: the smaller model, and the model that it has to equal.

Both begin with the same new weights: what reads a removed unit is zero, and what was learnt about
the removed units from the others is folded into the rest. :func:`mask` puts them into the graph as
it is; :func:`shrink` cuts them, and everything else that goes with the units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.coupling import Coupling, Cut, Labels, State
from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.coupling.rules import split_sizes
from rnnprune_cli.graph import input_of
from rnnprune_cli.layout import MAX_INT32, ONE
from rnnprune_cli.model import GATES, Array, BoolArray, compress
from rnnprune_cli.rewrite.build import value_names
from rnnprune_cli.rewrite.edit import Editor

Place = tuple[int, int]
"""(id of node, input index)."""

_GATES: dict[str, int] = {str(op): count for op, count in GATES.items()}


@dataclass(frozen=True, eq=False)
class Fold:
    """What the repair of one reader of units adds to it.

    Attributes:
        weight: The new weight in its full shape; what reads removed units does not matter.
        offset: Added to what the reader gives out, in a shape that is broadcast against it; for
            recurrent operators ``[directions, gates * hidden_size]``.
    """

    weight: Array
    offset: Array


Folds = Mapping[int, Fold]
"""Number of the cut in :attr:`Coupling.cuts` → its repair."""


class _Rewriter:
    """What both rewrites need.

    Args:
        coupling: Of the model, which is changed.
        removed: bool, one for each label: True where its class is removed.
        folds: Repairs.
    """

    def __init__(self, coupling: Coupling, removed: BoolArray, folds: Folds) -> None:
        self.c = coupling
        self.editor = Editor(coupling.model, "rp")
        self._removed = removed
        self._names: list[tuple[ir.Value, str]] = []
        self.replaced: list[ir.Value] = []
        self.weights: dict[Place, Array] = {}
        self.added: list[tuple[ir.Node, Array]] = []
        nodes = {id(cut.node): cut.node for cut in coupling.cuts}
        for number, cut in enumerate(coupling.cuts):
            if cut.role != "reads":
                continue
            fold = folds.get(number)
            place = (id(cut.node), cut.index)
            weight = self.weights.get(place)
            if weight is None:
                weight = fold.weight if fold is not None else coupling.constant(cut.value)
            assert weight is not None
            keep = np.broadcast_to(self.keep(cut.labels.array), weight.shape)
            self.weights[place] = np.where(keep, weight, weight.dtype.type(0))
            if fold is not None:
                self._add(nodes[id(cut.node)], cut.index, fold.offset)

    def keep(self, labels: IntArray) -> BoolArray:
        """Returns which labels stay."""
        kept: BoolArray = ~self._removed[self.c.classes.of(labels)]
        return kept

    def _add(self, node: ir.Node, index: int, offset: Array) -> None:
        """Adds to what a node gives out, where it has a constant for that."""
        if node.op_type in _GATES:
            directions, rows = offset.shape
            bias = self.weights.get((id(node), 3), self.c.constant(input_of(node, 3)))
            if bias is None:
                bias = np.zeros((directions, 2 * rows), offset.dtype)
            part = slice(0, rows) if index == 1 else slice(rows, 2 * rows)
            self.weights[id(node), 3] = bias.copy()
            self.weights[id(node), 3][:, part] += offset
            return
        old = self.c.constant(input_of(node, 2))
        if node.op_type == "Conv" or (node.op_type == "Gemm" and old is not None):
            scale = node.attributes.get_float("beta", 1.0) or 0.0
            if node.op_type == "Conv" or scale != 0:
                old = self.weights.get((id(node), 2), old)
                offset = offset / offset.dtype.type(scale)
                self.weights[id(node), 2] = offset if old is None else old + offset
                return
        users = node.outputs[0].uses()
        if len(users) == 1 and not node.outputs[0].is_graph_output():
            user, position = next(iter(users))
            other = input_of(user, 1 - position)
            old = None if user.op_type != "Add" else self.c.constant(other)
            if old is not None and np.broadcast_shapes(old.shape, offset.shape) == old.shape:
                known = self.weights.get((id(user), 1 - position), old)
                self.weights[id(user), 1 - position] = known + offset
                return
        self.added.append((node, offset))

    def constant(self, array: Array, old: ir.Value | None, name: str) -> ir.Value:
        """Adds a constant, which takes over the name of the one it stands for if it can."""
        own = self.editor.constant(name, np.ascontiguousarray(array))
        if old is not None and old.name and old.is_initializer():
            self._names.append((own, old.name))
        if old is not None:
            self.replaced.append(old)
        return own

    def put(self, node: ir.Node, index: int, array: Array) -> None:
        """Replaces a constant input of a node."""
        old = input_of(node, index)
        name = (old.name if old is not None else None) or f"{node.name}/{index}"
        new = self.constant(array, old, name)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)

    def finish(self) -> None:
        """Removes what nothing reads, and what was known about shapes."""
        self.editor.clean(self.replaced)
        for old in self.replaced:
            graph = old.graph
            both = old.is_initializer() and old.is_graph_input() and not old.is_graph_output()
            if isinstance(graph, ir.Graph) and both and not old.uses():
                graph.initializers.pop(old.name or "", None)
                graph.inputs.remove(old)
        names = value_names(self.c.model)
        for value, name in self._names:
            if name not in names:
                value.name = name
                names.add(name)
        for graph in (self.c.model.graph, *self.c.model.graph.subgraphs()):
            for node in graph:
                for value in node.outputs:
                    if not value.is_graph_output():
                        value.shape = value.type = None
            graph.sort()

    # Run-time values

    def select(self, before: ir.Node, value: ir.Value, labels: Labels) -> ir.Value:
        """Returns the places of a value whose labels stay."""
        return self._by_row(before, value, self.keep(labels.array), labels.axis, self._gather)

    def scatter(self, before: ir.Node, value: ir.Value, labels: Labels) -> ir.Value:
        """Returns a value with zeros at the places whose labels were removed."""
        return self._by_row(before, value, self.keep(labels.array), labels.axis, self._spread)

    def _by_row(
        self, at: ir.Node, value: ir.Value, keep: BoolArray, axis: int, change: _Change
    ) -> ir.Value:
        """Changes each place along the other axes by itself, where they differ."""
        rows = [k for k in range(keep.ndim) if k != axis and (keep != np.take(keep, [0], k)).any()]
        if not rows:
            flat = np.moveaxis(keep, axis, -1).reshape(-1, keep.shape[axis])[0]
            return value if flat.all() else change(at, value, flat, axis, keep.ndim)
        row = rows[0]
        parts = []
        for k in range(keep.shape[row]):
            part = self.editor.slice(at, value, row, k, k + 1)
            part.type = value.type
            parts.append(self._by_row(at, part, np.take(keep, [k], row), axis, change))
        joint = self.editor.one(at, "Concat", parts, axis=row)
        joint.type = value.type
        return joint

    def _gather(
        self, at: ir.Node, value: ir.Value, keep: BoolArray, axis: int, ndim: int
    ) -> ir.Value:
        return self.pick(at, value, np.flatnonzero(keep), axis)

    def pick(self, at: ir.Node, value: ir.Value, places: IntArray, axis: int) -> ir.Value:
        """Returns places of a value along an axis."""
        found = self.editor.ints(at, [int(k) for k in places])
        new = self.editor.one(at, "Gather", [value, found], axis=axis)
        new.type = value.type
        return new

    def _spread(
        self, at: ir.Node, value: ir.Value, keep: BoolArray, axis: int, ndim: int
    ) -> ir.Value:
        ends = [0] * (2 * ndim)
        ends[ndim + axis] = 1
        if self.editor.opset >= 11:
            padded = self.editor.one(at, "Pad", [value, self.editor.ints(at, ends)])
        else:
            padded = self.editor.one(at, "Pad", [value], pads=ends)
        padded.type = value.type
        places = np.where(keep, np.cumsum(keep) - 1, keep.sum())
        return self.pick(at, padded, places, axis)

    def rename(self, graph: ir.Graph, index: int, new: ir.Value) -> None:
        """Gives out another value instead, under the same name."""
        old = graph.outputs[index]
        name, shape = old.name, old.shape
        old.name = self.editor.unique(f"{name}/units")
        new.name, new.shape, new.type = name, shape, old.type
        graph.outputs[index] = new

    def last(self, graph: ir.Graph) -> ir.Node:
        """Returns a node of a graph; what is put before it is sorted in the end."""
        node = next(iter(reversed(list(graph))), None)
        assert node is not None
        return node


_Change = Callable[[ir.Node, ir.Value, BoolArray, int, int], ir.Value]


def mask(coupling: Coupling, removed: BoolArray, folds: Folds, resize_state: bool) -> None:
    """Turns a model into the one that a shrunk model has to equal; all sizes stay.

    1. Weights that read units get their new values; what reads removed units is zero.
    2. Products of two run-time values see zeros in place of removed units.
    3. Normalisation over units leaves the removed ones out.
    4. States that are handed out are zero for removed units; resized ones are cut.

    Args:
        coupling: Of the model, which is changed.
        removed: bool, one for each label: True where its class is removed.
        folds: Repairs.
        resize_state: Whether states are handed in and out without removed units.
    """
    r = _Rewriter(coupling, removed, folds)
    nodes = {id(node): node for node in coupling.model.graph.all_nodes()}
    for (node, index), array in r.weights.items():
        r.put(nodes[node], index, array)
    for inner, offset in r.added:
        _insert_after(r, inner, offset)
    for inner, index in coupling.masked:
        labels = coupling.of(inner.inputs[index])
        value = inner.inputs[index]
        assert labels is not None and value is not None
        inner.replace_input_with(index, _times(r, inner, value, labels))
    for inner in coupling.inexact:
        labels = coupling.of(inner.inputs[0])
        if labels is not None and not r.keep(labels.array).all():
            _without_removed(r, inner)
    for state in coupling.states:
        for index, output in enumerate(coupling.model.graph.outputs):
            labels = coupling.of(output)
            if output is state.output and labels is not None:
                at = r.last(coupling.model.graph)
                made = (r.select if resize_state else _times_of(r))(at, output, labels)
                if made is not output:
                    r.rename(coupling.model.graph, index, made)
                    if resize_state:
                        _resize(made, labels, r)
        given = coupling.of(state.input)
        if resize_state and state.input is not None and given is not None:
            _through(r, state.input, given, r.scatter)
            _resize(state.input, given, r)
    r.finish()


def _times_of(r: _Rewriter) -> Callable[[ir.Node, ir.Value, Labels], ir.Value]:
    return lambda at, value, labels: _times(r, at, value, labels)


def _times(r: _Rewriter, at: ir.Node, value: ir.Value, labels: Labels) -> ir.Value:
    """Returns a value with zeros in place of removed units."""
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    ones = r.editor.constant("rp/mask", r.keep(labels.array).astype(dtype))
    new = r.editor.one(at, "Mul", [value, ones])
    new.type = value.type
    return new


def _through(
    r: _Rewriter,
    value: ir.Value,
    labels: Labels,
    change: Callable[[ir.Node, ir.Value, Labels], ir.Value],
) -> None:
    """Lets everything that reads a value read what becomes of it."""
    users = tuple(value.uses())
    at = next(iter(r.c.model.graph))
    new = change(at, value, labels)
    if new is not value:
        for user, position in users:
            user.replace_input_with(position, new)


def _resize(value: ir.Value, labels: Labels, r: _Rewriter) -> None:
    """Declares how long a state is now."""
    if value.shape is not None and len(value.shape) == labels.array.ndim:
        sizes = list(value.shape)
        sizes[labels.axis] = _kept(r, labels)
        value.shape = ir.Shape(sizes)


def _kept(r: _Rewriter, labels: Labels) -> int:
    """Returns how many places stay along the unit axis: as many everywhere."""
    counts = r.keep(labels.array).sum(axis=labels.axis)
    return int(counts.reshape(-1)[0])


def _insert_after(r: _Rewriter, node: ir.Node, offset: Array) -> None:
    """Adds a constant to what a node gives out."""
    old = node.outputs[0]
    users = tuple(old.uses())
    new = r.editor.one(node, "Add", [old, r.editor.constant("rp/repair", offset)])
    new.type, new.shape = old.type, old.shape
    _put_after(r, old, new, users)


def _put_after(
    r: _Rewriter, old: ir.Value, new: ir.Value, users: Iterable[tuple[ir.Node, int]] | None = None
) -> None:
    """Lets what read a value, or some of that, read another, and a graph give that out."""
    for user, position in tuple(old.uses()) if users is None else users:
        user.replace_input_with(position, new)
    node = old.producer()
    graph = None if node is None else node.graph
    assert isinstance(graph, ir.Graph)
    for index, output in enumerate(graph.outputs):
        if output is old:
            r.rename(graph, index, new)


def _without_removed(r: _Rewriter, node: ir.Node) -> None:
    """Makes a normalisation over units that leaves out removed ones, at full size."""
    value = node.inputs[0]
    labels = r.c.of(value)
    assert value is not None and labels is not None
    keep, axis, e = r.keep(labels.array), labels.axis, r.editor
    own_type = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
    # Runtimes work out means of half-precision numbers in single precision.
    half = own_type == np.float16 and node.op_type == "LayerNormalization"
    dtype = np.dtype(np.float32) if half else own_type
    share = np.asarray(keep.shape[axis] / max(_kept(r, labels), 1), dtype)

    def one(op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        new = e.one(node, op_type, list(inputs), **attributes)
        new.type = value.type
        return new

    def number(array: object) -> ir.Value:
        return e.constant("rp/number", np.asarray(array, dtype))

    ones = number(keep)
    largest = {"ReduceMin": -1.0}.get(node.op_type, 1.0) * float(np.finfo(dtype).min)
    whole = one("Cast", value, to=ir.DataType.FLOAT.value) if half else value
    aside = one("Mul", whole, ones)
    far = one("Add", aside, number(np.where(keep, 0, largest)))
    if node.op_type == "LayerNormalization":
        at = (node.attributes.get_int("axis", -1) or 0) % keep.ndim
        axes = list(range(at, keep.ndim))

        def mean(of: ir.Value) -> ir.Value:
            if e.opset >= 18:
                return one("Mul", one("ReduceMean", of, e.ints(node, axes)), number(share))
            return one("Mul", one("ReduceMean", of, axes=axes), number(share))

        apart = one("Mul", one("Sub", aside, mean(aside)), ones)
        spread = mean(one("Mul", apart, apart))
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        new = one("Div", apart, one("Sqrt", one("Add", spread, number(epsilon))))
        new = one("Cast", new, to=ir.DataType.FLOAT16.value) if half else new
        for op_type, index in (("Mul", 1), ("Add", 2)):
            if (own := input_of(node, index)) is not None:
                new = one(op_type, new, own)
        _put_after(r, node.outputs[0], new)
    elif node.op_type in ("Softmax", "LogSoftmax", "ReduceMax", "ReduceMin", "GlobalMaxPool"):
        node.replace_input_with(0, far)
    else:
        node.replace_input_with(0, aside)
        if node.op_type in ("ReduceMean", "GlobalAveragePool"):
            _scale_output(r, node, number(share))


def _scale_output(r: _Rewriter, node: ir.Node, factor: ir.Value) -> None:
    users = tuple(node.outputs[0].uses())
    new = r.editor.one(node, "Mul", [node.outputs[0], factor])
    new.type = node.outputs[0].type
    _put_after(r, node.outputs[0], new, users)


def shrink(coupling: Coupling, removed: BoolArray, folds: Folds, resize_state: bool) -> None:
    """Takes units out of a model.

    1. Weights and other constants lose what their labels lose; states that are provably zero are
       left out; other run-time values are gathered.
    2. Sizes that operators are told are what is left.
    3. States are gathered on their way in and filled up with zeros on their way out, or change
       their public shape.

    Args:
        coupling: Of the model, which is changed.
        removed: bool, one for each label: True where its class is removed.
        folds: Repairs.
        resize_state: Whether states are handed in and out without removed units.
    """
    r = _Rewriter(coupling, removed, folds)
    changes = list(_size_changes(r))
    cuts: dict[Place, list[Cut]] = defaultdict(list)
    for cut in coupling.cuts:
        if cut.graph is not None:
            new = r.select(r.last(cut.graph), cut.value, cut.labels)
            if new is not cut.value:
                r.rename(cut.graph, cut.index, new)
                _resize(new, cut.labels, r)
        else:
            cuts[id(cut.node), cut.index].append(cut)
    offsets = [(node, _cut_offset(r, node, offset)) for node, offset in r.added]
    for place, array in r.weights.items():
        if place not in cuts and place[1] == 3:  # a bias that the repair brought
            layer = next(x for x in coupling.layers if id(x.node) == place[0])
            times = 2 * _GATES[layer.node.op_type]
            labels = Labels(np.tile(layer.labels, times), 1)
            cuts[place].append(Cut(layer.node, 3, labels, "own"))
        elif place not in cuts:
            node = next(n for n in coupling.model.graph.all_nodes() if id(n) == place[0])
            r.put(node, place[1], array)
    for place, own in cuts.items():
        _cut_input(r, own, r.weights.get(place))
    for node, offset in offsets:
        _insert_after(r, node, offset)
    for change in changes:
        change()
    for layer in coupling.layers:
        size = _kept(r, Labels(layer.labels, 1))
        layer.node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", size)
    for state in coupling.states:
        _cut_state(r, state, resize_state)
    for value in coupling.fed:
        if (given := coupling.of(value)) is not None:
            _through(r, value, given, r.select)
    for graph in coupling.model.graph.subgraphs():
        for value in (*graph.inputs, *graph.outputs):
            if (own_labels := coupling.of(value)) is not None:
                _resize(value, own_labels, r)
    r.finish()


def _cut_state(r: _Rewriter, state: State, resize_state: bool) -> None:
    """Gathers a state on its way in and fills it up on its way out, or changes its shape."""
    graph = r.c.model.graph
    given, labels = r.c.of(state.input), r.c.of(state.output)
    assert labels is not None
    if resize_state:
        _resize(state.output, labels, r)
        if state.input is not None and given is not None:
            _resize(state.input, given, r)
        return
    for index, output in enumerate(graph.outputs):
        if output is state.output:
            new = r.scatter(r.last(graph), output, labels)
            if new is not output:
                r.rename(graph, index, new)
    if state.input is not None and given is not None:
        _through(r, state.input, given, r.select)


def _cut_input(r: _Rewriter, cuts: list[Cut], weight: Array | None) -> None:
    """Cuts one input of a node, along one axis after the other."""
    node, index = cuts[0].node, cuts[0].index
    old = input_of(node, index)
    if cuts[0].role == "initial" and old is not None and r.c.layout.is_zero(old):
        node.replace_input_with(index, None)
        r.replaced.append(old)
        return
    array = weight if weight is not None else r.c.constant(old)
    if array is None:
        assert old is not None
        new = old
        for cut in cuts:
            new = r.select(node, new, cut.labels)
        if new is not old:
            node.replace_input_with(index, new)
        return
    before = array
    for cut in cuts:
        array = compress(array, r.keep(cut.labels.array), cut.labels.axis)
    if array is not before or weight is not None:
        r.put(node, index, array)


def _cut_offset(r: _Rewriter, node: ir.Node, offset: Array) -> Array:
    """Cuts what the repair adds to an output that has units itself."""
    labels = r.c.of(node.outputs[0])
    if labels is None:
        return offset
    own = labels.axis - labels.array.ndim + offset.ndim
    if own < 0 or offset.shape[own] == 1:
        return offset
    return compress(offset, r.keep(labels.array), labels.axis)


def _size_changes(r: _Rewriter) -> Iterator[Callable[[], None]]:
    """Yields the changes of what operators are told about sizes; all is looked up before any."""
    for node in list(r.c.model.graph.all_nodes()):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SIZED:
            continue
        source = None if not node.inputs else r.c.of(node.inputs[0])
        if source is None or r.keep(source.array).all():
            continue
        change = _SIZED[node.op_type](r, node, source)
        if change is not None:
            yield change


def _sized_reshape(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    labels = r.c.of(node.outputs[0])
    if labels is None:
        return None
    target = node.inputs[1]
    assert target is not None
    if node.op_type == "Expand":
        size, count = 1, r.c.size(target, 0)
        assert count is not None  # the rule saw to it
        axis = labels.axis - labels.array.ndim + count
        if axis < 0:
            return None
    else:
        size, count, axis = _kept(r, labels), labels.array.ndim, labels.axis
        sizes = r.c.layout.integers(target)
        now = None if sizes is None else dict(sizes[axis])
        copies = not node.attributes.get_int("allowzero", 0) and source.axis == axis
        if now == {ONE: -1} or (now == {} and copies):
            return None
    stored = r.c.constant(target)

    def change() -> None:
        e = r.editor
        if stored is not None:
            values = [int(k) for k in stored]
            values[axis] = size
            new = e.ints(node, values)
        else:
            parts = [
                e.slice(node, target, 0, 0, axis) if axis else None,
                e.ints(node, [size]),
                e.slice(node, target, 0, axis + 1, count) if axis + 1 < count else None,
            ]
            some = [p for p in parts if p is not None]
            new = e.one(node, "Concat", some, axis=0)
            for value in (*some, new):
                value.type = ir.TensorType(ir.DataType.INT64)
        node.replace_input_with(1, new)

    return change


def _sized_slice(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    bounds = r.c.layout.slice_bounds(node)
    if bounds is None:
        return None
    ndim = source.array.ndim
    own = {k % ndim: bound for k, bound in bounds.items()}
    start, end, step = own.get(source.axis, (0, MAX_INT32, 1))
    keep = r.keep(source.array)
    flat = np.moveaxis(keep, source.axis, -1).reshape(-1, keep.shape[source.axis])[0]
    every = np.arange(len(flat))[start:end:step]
    if len(every) == len(flat) and step == 1:
        return None
    places = np.array([k for k in every if flat[k]], np.int64)
    places = (np.cumsum(flat) - 1)[places]

    def change() -> None:
        value = node.inputs[0]
        assert value is not None
        whole = len(every) == len(flat) and step == -1
        if whole:
            return  # reversed as before
        node.replace_input_with(0, r.pick(node, value, places, source.axis))
        rest = {k: b for k, b in own.items() if k != source.axis} or {0: (0, MAX_INT32, 1)}
        e = r.editor
        if e.opset < 10:
            for name, values in (
                ("axes", list(rest)),
                ("starts", [b[0] for b in rest.values()]),
                ("ends", [b[1] for b in rest.values()]),
            ):
                node.attributes[name] = ir.AttrInt64s(name, values)
            return
        lists = [[b[0] for b in rest.values()], [b[1] for b in rest.values()], list(rest)]
        lists.append([b[2] for b in rest.values()])
        node.resize_inputs(5)
        for k, values in enumerate(lists):
            node.replace_input_with(k + 1, e.ints(node, values))

    return change


def _sized_gather(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    axis = (node.attributes.get_int("axis", 0) or 0) % source.array.ndim
    if axis != source.axis:
        return None
    picked = r.c.layout.constant_ints(node.inputs[1])
    assert picked is not None  # the rule saw to it
    keep = r.keep(source.array)
    flat = np.moveaxis(keep, axis, -1).reshape(-1, keep.shape[axis])[0]
    places = [int(np.cumsum(flat)[k] - 1) for k in picked if flat[k]]
    return lambda: node.replace_input_with(1, r.editor.ints(node, places))


def _sized_squeeze(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    """Names the axes, of which the one of the units could be one if a single unit stays."""
    if r.c.layout.axes(node, source.array.ndim) is not None:
        return None
    value = node.inputs[0]
    assert value is not None
    axes = [k for k in range(source.array.ndim) if r.c.size(value, k) == 1]

    def change() -> None:
        if r.editor.opset < 13:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
            return
        node.resize_inputs(2)
        node.replace_input_with(1, r.editor.ints(node, axes))

    return change


def _sized_split(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    axis = (node.attributes.get_int("axis", 0) or 0) % source.array.ndim
    if axis != source.axis:
        return None
    keep = r.keep(source.array)
    flat = np.moveaxis(keep, axis, -1).reshape(-1, keep.shape[axis])[0]
    sizes = split_sizes(r.c, node, len(flat))
    assert sizes is not None  # the rule saw to it
    left = [int(part.sum()) for part in np.split(flat, np.cumsum(sizes)[:-1])]

    def change() -> None:
        if r.editor.opset < 13:
            node.attributes["split"] = ir.AttrInt64s("split", left)
            return
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(2)
        node.replace_input_with(1, r.editor.ints(node, left))

    return change


def _sized_shape(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    """Tells the size that was: whatever is computed from it stays as it was."""
    ndim = source.array.ndim
    bounds = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))
    places = list(range(ndim))[bounds]
    if source.axis not in places:
        return None
    missing = [0] * len(places)
    missing[places.index(source.axis)] = source.array.shape[source.axis] - _kept(r, source)

    def change() -> None:
        old = node.outputs[0]
        users = tuple(old.uses())
        new = r.editor.one(node, "Add", [old, r.editor.ints(node, missing)])
        new.type = ir.TensorType(ir.DataType.INT64)
        _put_after(r, old, new, users)

    return change


def _sized_conv(r: _Rewriter, node: ir.Node, source: Labels) -> Callable[[], None] | None:
    if node.attributes.get_int("group", 1) == 1 or source.axis != 1:
        return None
    count = _kept(r, source)

    def change() -> None:
        node.attributes["group"] = ir.AttrInt64("group", count)

    return change


_SIZED: dict[str, Callable[[_Rewriter, ir.Node, Labels], Callable[[], None] | None]] = {
    "Reshape": _sized_reshape,
    "Expand": _sized_reshape,
    "Slice": _sized_slice,
    "Gather": _sized_gather,
    "Split": _sized_split,
    "Squeeze": _sized_squeeze,
    "Shape": _sized_shape,
    "Conv": _sized_conv,
}
