"""Random feeds for graphs, and random small changes to graphs that something can be lifted from.

A lift that does not notice a change gives other outputs than the changed graph. Most changes make
another function of a cell, some leave it as it was, and some make a graph that does not run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx import numpy_helper as arrays

Array = np.ndarray
Feed = dict[str, Array]
T = TypeVar("T")
Kind = tuple[int, tuple[int | None, ...] | None]
"""Element type and sizes of a value; 0 and None where they are not known."""

ort.set_default_logger_severity(4)
UNKNOWN: Kind = (0, None)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
INTEGERS = (TensorProto.INT32, TensorProto.INT64)
LIKE_OPS = (
    ("Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softsign", "Elu", "Softplus", "LeakyRelu", "Neg"),
    ("Add", "Sub", "Mul"),
    ("Min", "Max"),
    ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"),
    ("And", "Or", "Xor"),
    ("ReduceAll", "ReduceAny"),
)


# Running


def session(proto: ModelProto, folder: Path | None = None) -> ort.InferenceSession:
    """Opens a model in onnxruntime with one thread; its external data are in the folder."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def outputs(opened: ort.InferenceSession, feed: Mapping[str, Array], limit: float = 2.0) -> Feed:
    """Runs a model; a loop that does not end is stopped after a while, with an exception."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    timer = threading.Timer(limit, setattr, (options, "terminate", True))
    timer.start()
    try:
        found = opened.run(None, dict(feed), options)
    finally:
        timer.cancel()
    return {o.name: value for o, value in zip(opened.get_outputs(), found, strict=True)}


def random_feed(
    proto: ModelProto,
    given: Mapping[str, Array],
    rng: np.random.Generator,
    sizes: Mapping[int, int],
    scale: float = 1.0,
) -> Feed:
    """Draws inputs for other numbers of steps and rows.

    Args:
        proto: The model.
        given: A feed; free axes of equal size in it (the batch, the steps) stay equal.
        rng: Where numbers come from.
        sizes: Size of a free axis in the given feed → size of it in the new one.
        scale: Standard deviation of floating-point inputs.
    """
    feed: Feed = {}
    for value in proto.graph.input:
        if value.name not in given:
            continue
        old = given[value.name]
        dims = value.type.tensor_type.shape.dim
        shape = [
            n if d.HasField("dim_value") else sizes.get(n, n)
            for n, d in zip(old.shape, dims, strict=True)
        ]
        if old.dtype.kind == "f":
            feed[value.name] = np.asarray(scale * rng.standard_normal(shape), old.dtype)
        elif old.dtype.kind == "b":
            feed[value.name] = np.asarray(rng.random(shape) < 0.5)
        else:  # a number of steps, lengths or words
            most = int(old.max(initial=1))
            most = sizes.get(most, most)
            feed[value.name] = np.asarray(rng.integers(1, most + 1, shape), old.dtype)
    return feed


def honest(proto: ModelProto, found: Mapping[str, Array]) -> bool:
    """Tells whether outputs are finite, not empty, and of the types and shapes in the model."""
    for value in proto.graph.output:
        dtype, shape = _kind(value)
        array = found[value.name]
        if not array.size or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            return False
        if shape is not None and not alike((dtype, array.shape), (dtype, shape)):
            return False
    return True


# Changing


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph with what can be read in it.

    Attributes:
        graph: The graph, which changes are made to.
        owner: The node that holds it, or None.
        outside: The scope that the owner is in.
        position: Where in it.
        kinds: What is known of the values in it and around it.
    """

    graph: GraphProto
    owner: NodeProto | None
    outside: Scope | None
    position: int
    kinds: dict[str, Kind]

    def visible(self, before: int) -> list[str]:
        """Returns what a node at a position may read."""
        names = [] if self.outside is None else self.outside.visible(self.position)
        names += [v.name for v in self.graph.input]
        names += [t.name for t in self.graph.initializer]
        names += [o for node in self.graph.node[:before] for o in node.output if o]
        return list(dict.fromkeys(names))

    def like(self, name: str, before: int) -> list[str]:
        """Returns what could be read in the place of a value."""
        wanted = self.kind(name)
        if wanted == UNKNOWN:
            return []
        return [n for n in self.visible(before) if n != name and alike(self.kind(n), wanted)]

    def kind(self, name: str) -> Kind:
        """Returns what is known of a value."""
        return self.kinds.get(name, UNKNOWN)

    def nodes(self, *ops: str) -> list[tuple[int, NodeProto]]:
        """Returns the nodes with some operators, or all, with their positions."""
        return [(k, n) for k, n in enumerate(self.graph.node) if not ops or n.op_type in ops]


def alike(one: Kind, other: Kind) -> bool:
    """Tells whether two values may have the same type and shape."""
    if UNKNOWN in (one, other) or one[0] != other[0]:
        return False
    if one[1] is None or other[1] is None:
        return True
    return len(one[1]) == len(other[1]) and all(
        None in pair or pair[0] == pair[1] for pair in zip(one[1], other[1], strict=True)
    )


def scopes(proto: ModelProto) -> list[Scope]:
    """Returns the main graph and all graphs inside."""
    typed = ModelProto()
    typed.CopyFrom(proto)
    pending = [typed.graph]
    while pending:  # inner graphs do not see the types of outer initializers otherwise
        graph = pending.pop()
        known = {v.name for v in (*graph.input, *graph.value_info)}
        for tensor in graph.initializer:
            if tensor.name not in known:
                info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                graph.value_info.append(info)
        pending += [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    with contextlib.suppress(onnx.shape_inference.InferenceError):  # changed before
        typed = onnx.shape_inference.infer_shapes(typed)
    found: list[Scope] = []

    def add(
        graph: GraphProto, twin: GraphProto, owner: NodeProto | None, outside: Scope | None, at: int
    ) -> None:
        kinds = {} if outside is None else dict(outside.kinds)
        for tensor in graph.initializer:
            kinds[tensor.name] = (tensor.data_type, tuple(tensor.dims))
        for info in (*twin.value_info, *twin.input, *twin.output):
            kinds.setdefault(info.name, _kind(info))
        scope = Scope(graph, owner, outside, at, kinds)
        found.append(scope)
        for k, (node, other) in enumerate(zip(graph.node, twin.node, strict=True)):
            for mine, its in zip(node.attribute, other.attribute, strict=True):
                if mine.HasField("g"):
                    add(mine.g, its.g, node, scope, k)

    add(proto.graph, typed.graph, None, None, 0)
    return found


def _kind(info: onnx.ValueInfoProto) -> Kind:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(
        d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim
    )


Mutation = Callable[[Scope, np.random.Generator], str | None]
"""Changes something in a graph and says what, or finds nothing to change."""


def mutate(
    proto: ModelProto, rng: np.random.Generator, inside: float = 3.0
) -> tuple[ModelProto, str]:
    """Makes one random change.

    Args:
        proto: The model.
        rng: Where numbers come from.
        inside: How likely a graph inside is changed, compared with the main graph.

    Returns:
        The changed copy, which may not run, and what was changed.
    """
    mutant = ModelProto()
    mutant.CopyFrom(proto)
    places = scopes(mutant)
    odds = np.array([1.0 if place.owner is None else inside for place in places])
    while True:
        place = places[rng.choice(len(places), p=odds / odds.sum())]
        change = MUTATIONS[rng.choice(len(MUTATIONS), p=_ODDS)]
        said = change(place, rng)
        if said is not None:
            where = "main" if place.owner is None else place.owner.op_type
            return mutant, f"{where}: {change.__name__.strip('_')}: {said}"


def _pick(options: Sequence[T], rng: np.random.Generator) -> T | None:
    return options[int(rng.integers(len(options)))] if options else None


def _operator(scope: Scope, rng: np.random.Generator) -> str | None:
    """Another operator that takes and gives the same types."""
    groups = {op: group for group in LIKE_OPS for op in group}
    picked = _pick(scope.nodes(*groups), rng)
    if picked is None:
        return None
    node = picked[1]
    old = node.op_type
    node.op_type = str(_pick([op for op in groups[old] if op != old], rng))
    del node.attribute[:]
    return f"{old} → {node.op_type} gives {node.output[0]}"


def _operands(scope: Scope, rng: np.random.Generator) -> str | None:
    """Two operands change places."""
    picked = _pick([n for _, n in scope.nodes() if len(n.input) > 1 and all(n.input)], rng)
    if picked is None or picked.op_type in ("Loop", "Scan"):
        return None
    one, other = (1, 2) if picked.op_type == "Where" else (0, 1)
    names = list(picked.input)
    names[one], names[other] = names[other], names[one]
    picked.input[:] = names
    return f"{picked.op_type} of {names}"


def _rewire(scope: Scope, rng: np.random.Generator) -> str | None:
    """A node reads another value."""
    picked = _pick([(k, n) for k, n in scope.nodes() if any(n.input)], rng)
    if picked is None:
        return None
    position, node = picked
    k = int(rng.integers(len(node.input)))
    old = node.input[k]
    new = _pick(scope.like(old, position), rng)
    if new is None:
        return None
    node.input[k] = new
    return f"{node.op_type} → {node.output[0]} reads {new}, not {old}"


def _attribute(scope: Scope, rng: np.random.Generator) -> str | None:
    """An attribute has another value."""
    options = [
        (n, a)
        for _, n in scope.nodes()
        for a in n.attribute
        if a.type in (AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT)
        and a.name not in ("num_outputs", "num_scan_inputs", "hidden_size")
    ]
    added = [(n, name) for _, n in scope.nodes() for name in _OPTIONAL.get(n.op_type, ())]
    if added and (not options or rng.random() < 0.3):
        node, name = added[rng.integers(len(added))]
        if any(a.name == name for a in node.attribute):
            return None
        value: object = {"alpha": 0.3, "beta": 0.6}.get(name, 1)
        node.attribute.append(helper.make_attribute(name, value))
        return f"{node.op_type} → {node.output[0]} has {name}={value}"
    picked = _pick(options, rng)
    if picked is None:
        return None
    node, attribute = picked
    if attribute.type == AttributeProto.FLOAT:
        attribute.f += float(rng.choice([-0.1, 0.1, 0.5]))
    elif attribute.type == AttributeProto.INTS:
        values = list(attribute.ints)
        if len(values) > 1 and rng.random() < 0.7:
            one, other = rng.choice(len(values), 2, replace=False)
            values[one], values[other] = values[other], values[one]
        elif values:
            k = int(rng.integers(len(values)))
            values[k] = 1 - values[k] if "direction" in attribute.name else values[k] + 1
        if values == list(attribute.ints):
            return None
        attribute.ints[:] = values
    elif attribute.name == "to":
        attribute.i = int(rng.choice([1, 6, 7]))
    else:
        attribute.i = (
            1 - attribute.i if attribute.i in (0, 1) else attribute.i + int(rng.choice([-1, 1]))
        )
    return f"{node.op_type} → {node.output[0]} has {helper.get_attribute_value(attribute)!r} as" + (
        f" {attribute.name}"
    )


_OPTIONAL = {
    "HardSigmoid": ("alpha", "beta"),
    "Elu": ("alpha",),
    "Gemm": ("alpha", "beta", "transA", "transB"),
    "Gather": ("axis",),
    "Softmax": ("axis",),
    "GRU": ("linear_before_reset",),
}


def _parts(scope: Scope, rng: np.random.Generator) -> str | None:
    """Two outputs of a node change places."""
    picked = _pick([n for _, n in scope.nodes() if len(n.output) > 1], rng)
    if picked is None:
        return None
    one, other = rng.choice(len(picked.output), 2, replace=False)
    names = list(picked.output)
    names[one], names[other] = names[other], names[one]
    picked.output[:] = names
    return f"{picked.op_type} gives {names}"


def _stored(scope: Scope) -> list[tuple[str, TensorProto]]:
    found = [(t.name, t) for t in scope.graph.initializer]
    for node in scope.graph.node:
        if node.op_type in ("Constant", "ConstantOfShape"):
            found += [(node.output[0], a.t) for a in node.attribute if a.HasField("t")]
    return found


def _store(tensor: TensorProto, array: Array) -> None:
    tensor.CopyFrom(arrays.from_array(np.array(array, order="C"), tensor.name))


def _constant(scope: Scope, rng: np.random.Generator) -> str | None:
    """A small constant has another value."""
    options = [(n, t) for n, t in _stored(scope) if 0 < np.prod(t.dims, dtype=int) <= 6]
    picked = _pick(options, rng)
    if picked is None:
        return None
    name, tensor = picked
    array = arrays.to_array(tensor).copy()
    flat = array.reshape(-1)
    k = int(rng.integers(flat.size))
    if array.dtype.kind == "b":
        flat[k] = not flat[k]
    elif array.dtype.kind == "f":
        flat[k] = rng.choice([0.9 * flat[k] + 1e-3, -flat[k] - 1e-3, flat[k] + 0.1])
    elif flat.size > 1 and rng.random() < 0.3:
        flat[:] = flat[::-1].copy()
    else:
        flat[k] += rng.choice([-1, 1])
    if (array == arrays.to_array(tensor)).all():
        return None
    _store(tensor, array)
    return f"{name} = {array.tolist()}"


def _weight(scope: Scope, rng: np.random.Generator) -> str | None:
    """A weight has another value somewhere: the cell is the same but for it."""
    options = [
        (n, t)
        for n, t in _stored(scope)
        if t.data_type in FLOATS and np.prod(t.dims, dtype=int) > 1
    ]
    picked = _pick(options, rng)
    if picked is None:
        return None
    name, tensor = picked
    array = arrays.to_array(tensor).copy()
    width = array.shape[-1]
    one, other = rng.integers(width, size=2)
    how = str(rng.choice(["a column times 3", "columns swapped", "one element", "zeros", "turned"]))
    if how == "a column times 3":
        array[..., one] *= 3
    elif how == "columns swapped":
        array[..., [one, other]] = array[..., [other, one]]
    elif how == "one element":
        array.reshape(-1)[rng.integers(array.size)] += 1
    elif how == "zeros":
        array[...] = 0
    else:
        array = array[..., ::-1]
    _store(tensor, array)
    return f"{name}: {how}"


def _results(scope: Scope, rng: np.random.Generator) -> str | None:
    """Two results of a body change places."""
    if scope.owner is None or len(scope.graph.output) < 2:
        return None
    one, other = rng.choice(len(scope.graph.output), 2, replace=False)
    names = [o.name for o in scope.graph.output]
    if not alike(scope.kind(names[one]), scope.kind(names[other])):
        return None
    names[one], names[other] = names[other], names[one]
    for k, name in enumerate(names):
        scope.graph.output[k].name = name
    return f"{names}"


def _result(scope: Scope, rng: np.random.Generator) -> str | None:
    """A body hands on another value."""
    if scope.owner is None:
        return None
    result = scope.graph.output[rng.integers(len(scope.graph.output))]
    old, new = result.name, _pick(scope.like(result.name, len(scope.graph.node)), rng)
    if new is None:
        return None
    result.name = _through(scope, "Identity", [new], len(scope.graph.node))
    return f"{new}, not {old}"


def _initial(scope: Scope, rng: np.random.Generator) -> str | None:
    """A loop starts from other values."""
    if scope.owner is None or scope.outside is None or not scope.owner.input:
        return None
    names = list(scope.owner.input)
    if len(names) > 1 and rng.random() < 0.5:
        one, other = rng.choice(len(names), 2, replace=False)
        names[one], names[other] = names[other], names[one]
        if not alike(scope.outside.kind(names[one]), scope.outside.kind(names[other])):
            return None
    else:
        k = int(rng.integers(len(names)))
        new = _pick(scope.outside.like(names[k], scope.position), rng)
        if new is None:
            return None
        names[k] = new
    scope.owner.input[:] = names
    return f"{scope.owner.op_type} of {names}"


def _insert(scope: Scope, rng: np.random.Generator) -> str | None:
    """Something is done to a value before one of its readers takes it."""
    spots: list[tuple[int, NodeProto | None, int, str]] = [
        (at, node, k, name)
        for at, node in scope.nodes()
        for k, name in enumerate(node.input)
        if name
    ]
    if scope.owner is not None:
        end = len(scope.graph.node)
        spots += [(end, None, k, o.name) for k, o in enumerate(scope.graph.output)]
    picked = _pick(spots, rng)
    if picked is None:
        return None
    at, node, k, name = picked
    made = _done_to(scope, name, at, rng)
    if made is None:
        return None
    new, what = made
    if node is None:
        scope.graph.output[k].name = new
        return f"{what} of {name} before it is handed on"
    node.input[k] = new
    return f"{what} of {name} before {node.op_type} → {node.output[0]}"


def _done_to(scope: Scope, name: str, at: int, rng: np.random.Generator) -> tuple[str, str] | None:
    dtype, shape = scope.kind(name)
    others = scope.like(name, at)
    if dtype in FLOATS:
        real = helper.tensor_dtype_to_np_dtype(dtype)
        ops = ["Neg", "Tanh", "Relu", "Identity", "scale", "shift", "Softmax"]
        ops += [op for op in ("Add", "Mul", "Sub") if others]
        if shape:
            ops += ["reverse", "CumSum", "turn"]
        op = str(rng.choice(ops))
        if op == "scale":
            return _through(scope, "Mul", [name, _new(scope, np.array(0.9, real))], at), "0.9 times"
        if op == "shift":
            return _through(scope, "Add", [name, _new(scope, np.array(0.1, real))], at), "0.1 plus"
        if op in ("Add", "Mul", "Sub"):
            other = str(_pick(others, rng))
            return _through(scope, op, [name, other], at), f"{op} with {other}"
        if op == "Softmax":
            axis = int(rng.choice([0, -1])) if shape else -1
            return _through(scope, op, [name], at, axis=axis), f"Softmax on axis {axis}"
        if op not in ("reverse", "CumSum", "turn"):
            return _through(scope, op, [name], at), op
        assert shape
        axis = int(rng.integers(len(shape)))
        if op == "CumSum":
            return _through(scope, op, [name, _new(scope, np.int64(axis))], at), f"CumSum {axis}"
        if op == "turn" and len(shape) > 1:
            order = [int(k) for k in rng.permutation(len(shape))]
            return _through(scope, "Transpose", [name], at, perm=order), f"Transpose {order}"
        bounds = [_new(scope, np.array([k])) for k in (-1, -(2**40), axis, -1)]
        return _through(scope, "Slice", [name, *bounds], at), f"the reversal on axis {axis}"
    if dtype in INTEGERS:
        one = np.array(rng.choice([-1, 1]), helper.tensor_dtype_to_np_dtype(dtype))
        op = str(rng.choice(["Add", "Add", "Mul"]))
        return _through(scope, op, [name, _new(scope, one)], at), f"{op} {one}"
    if dtype == TensorProto.BOOL:
        if not others or rng.random() < 0.6:
            return _through(scope, "Not", [name], at), "Not"
        op, other = str(rng.choice(["And", "Or"])), str(_pick(others, rng))
        return _through(scope, op, [name, other], at), f"{op} with {other}"
    return None


def _new(scope: Scope, array: Array | np.generic) -> str:
    name = f"mutant/constant_{len(scope.graph.initializer)}"
    scope.graph.initializer.append(arrays.from_array(np.asarray(array), name))
    return name


def _through(scope: Scope, op: str, inputs: list[str], at: int, **attributes: Any) -> str:
    """Adds a node at a position."""
    name = f"mutant/value_{len(scope.graph.node)}"
    scope.graph.node.insert(at, helper.make_node(op, inputs, [name], **attributes))
    return name


def _bypass(scope: Scope, rng: np.random.Generator) -> str | None:
    """A node's input is read in the place of its output."""
    picked = _pick(scope.nodes(), rng)
    if picked is None:
        return None
    node = picked[1]
    options = [n for n in node.input if n and alike(scope.kind(n), scope.kind(node.output[0]))]
    source = _pick(options, rng)
    if source is None:
        return None
    read = False
    for other in scope.graph.node:
        for k, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[k] = source
                read = True
    return f"{source} for {node.op_type} → {node.output[0]}" if read else None


def _expose(scope: Scope, rng: np.random.Generator) -> str | None:
    """A value on the way is an output as well."""
    taken = {o.name for o in scope.graph.output}
    names = [o for n in scope.graph.node for o in n.output if o and o not in taken]
    names = [n for n in names if scope.kind(n)[0] in FLOATS]
    picked = _pick(names, rng)
    if picked is None:
        return None
    name, inner = str(picked), scope
    dtype, shape = scope.kind(name)
    dims = None if shape is None else list(shape)
    while inner.owner is not None and inner.outside is not None:
        if inner.owner.op_type == "If":
            return None  # the other branch has no such value
        inner.graph.output.append(helper.make_tensor_value_info(name, dtype, dims))
        for attribute in inner.owner.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        name = f"mutant/exposed_{name}"
        dims = None if dims is None else [None, *dims]
        inner.owner.output.append(name)
        inner = inner.outside
    inner.graph.output.append(helper.make_tensor_value_info(name, dtype, dims))
    return str(picked)


def _ranks(scope: Scope, rng: np.random.Generator) -> str | None:
    """A constant has another axis of size 1 before the others."""
    used = {n.input[k] for _, n in scope.nodes("Add", "Sub", "Mul", "Div") for k in (0, 1)}
    found = _pick([(n, t) for n, t in _stored(scope) if n in used], rng)
    if found is None:
        return None
    name, tensor = found
    _store(tensor, arrays.to_array(tensor)[None])
    return f"{name} {list(tensor.dims)}"


_TABLE: tuple[tuple[Mutation, int], ...] = (
    (_operator, 3),
    (_operands, 2),
    (_rewire, 5),
    (_attribute, 3),
    (_parts, 2),
    (_constant, 4),
    (_weight, 1),
    (_results, 1),
    (_result, 2),
    (_initial, 1),
    (_insert, 4),
    (_bypass, 2),
    (_expose, 1),
    (_ranks, 1),
)
MUTATIONS = tuple(mutation for mutation, _ in _TABLE)
_ODDS = np.array([odds for _, odds in _TABLE]) / sum(odds for _, odds in _TABLE)


def conditioned(
    opened: ort.InferenceSession, feed: Mapping[str, Array], expected: Mapping[str, Array]
) -> dict[str, float]:
    """Returns how far outputs move where inputs move by rounding errors, times ten."""
    rng = np.random.default_rng(0)
    moved: dict[str, float] = dict.fromkeys(expected, 0.0)
    for _ in range(3):
        nudged = {
            k: (v * (1 + 1e-7 * rng.standard_normal(v.shape))).astype(v.dtype)
            if v.dtype.kind == "f"
            else v
            for k, v in feed.items()
        }
        for name, value in outputs(opened, nudged).items():
            if value.dtype.kind == "f" and value.size:
                gap = float(np.abs(value - expected[name]).max())
                moved[name] = max(moved[name], 10 * gap)
    return moved
