"""Nodes of an ONNX model → recurrent layers, or the reason why one cannot be pruned."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.graph import Calls, Folder, Instance, Walker, attribute, stored_tensor, subgraphs
from rnnprune_cli.model import GATES, Array, Op, RecurrentLayer, Skipped, Weight

ROLES = {1: "W", 2: "R"}
"""Input index of a recurrent operator → name of the weight, as in the ONNX specification."""

_EXPORT_AGAIN = (
    "export the model with its weights stored in it (torch.onnx.export and tf2onnx do so), or bind"
    " them as initializers"
)


Layout = Literal["stack", "rows", "columns"]
"""How a weight ``[directions, rows, columns]`` lies in a tensor: just so; or, where there is one
direction, as a matrix of its rows, or of its columns (the transpose)."""


def laid_out(values: Array, layout: Layout) -> Array:
    """Returns a weight as it lies in a tensor."""
    if layout == "stack":
        return values
    rows: Array = values[0]
    return rows if layout == "rows" else rows.T


def taken_in(array: Array, layout: Layout) -> Array:
    """Undoes :func:`laid_out`."""
    if layout == "stack":
        return array
    return (array if layout == "rows" else array.T)[None]


@dataclass(frozen=True, eq=False)
class Site:
    """Where one weight of one executed node is stored.

    Attributes:
        value: The initializer, output of a Constant, or result of a constant expression.
        calls: The function calls that lead to ``value``.
        node: The node that reads it.
        index: Input index there; of a recurrent node 1 for W, 2 for R.
        layout: How the weight lies in ``value``.
    """

    value: ir.Value
    calls: Calls
    node: ir.Node
    index: int
    layout: Layout = "stack"


@dataclass(frozen=True, eq=False)
class Located:
    """A recurrent operator as it is executed, with the places of its weights."""

    name: str
    instance: Instance
    sites: tuple[Site, ...]


@dataclass(frozen=True, eq=False)
class Found:
    """Result of :func:`find`.

    Attributes:
        layers: What can be pruned, in graph order.
        skipped: What is recurrent and cannot.
        by_name: Name as located → layer; covers every executed prunable node, so that a function
            that is called twice with the same weights is here twice.
    """

    layers: tuple[RecurrentLayer, ...]
    skipped: tuple[Skipped, ...]
    by_name: dict[str, RecurrentLayer]


def is_recurrent(node: ir.Node) -> bool:
    """Tells whether a node is a standard LSTM, GRU or RNN."""
    return node.domain in ("", "ai.onnx") and node.op_type in GATES


def locate(walker: Walker) -> list[Located]:
    """Finds the recurrent operators and where their weights come from, without reading values.

    Deterministic: the same file gives the same names in the same order.
    """
    found: list[Located] = []
    taken: Counter[str] = Counter()
    for instance in walker.instances():
        node = instance.node
        if not is_recurrent(node):
            continue
        own = node.name or f"{node.op_type}_{len(found)}"
        name = "/".join([*(c.name or c.op_type for c in instance.calls), own])
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        sites = []
        for index in ROLES:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None:
                raise RnnpruneError(
                    f"{node.op_type} '{name}' has no weight {ROLES[index]}",
                    "the model is not valid ONNX; export it again",
                )
            origin, calls = walker.origin(value, instance.calls)
            sites.append(Site(origin, calls, node, index))
        found.append(Located(name, instance, tuple(sites)))
    return found


def find(walker: Walker, file_bytes: int) -> Found:
    """Finds every recurrent layer of a model.

    Args:
        walker: The model.
        file_bytes: Size of its files.

    Raises:
        RnnpruneError: If a recurrent operator contradicts its own weights, or holds NaN or
            infinite values (the model could not have worked).
    """
    folder = Folder(walker, file_bytes)
    skipped: list[Skipped] = []
    candidates: list[_Candidate] = []
    for located in locate(walker):
        sources = tuple(_read(site, folder) for site in located.sites)
        refused = [
            f"its weight {ROLES[site.index]} is not a constant: {source}"
            for site, source in zip(located.sites, sources, strict=True)
            if isinstance(source, str)
        ]
        if refused:
            skipped.append(Skipped(located.name, refused[0], _EXPORT_AGAIN))
        else:
            known = tuple(source for source in sources if not isinstance(source, str))
            candidates.append(_Candidate(located, known, *_check(walker, located, known)))
    writable, refusals = _writable(walker, candidates)
    skipped.extend(refusals)
    pool = _Pool()
    layers: list[RecurrentLayer] = []
    by_name: dict[str, RecurrentLayer] = {}
    first: dict[tuple[int, str, str], RecurrentLayer] = {}
    for c in writable:
        name = c.located.name
        w, r = (
            pool.add(f"{name}.{ROLES[site.index]}", site, source)
            for site, source in zip(c.located.sites, c.sources, strict=True)
        )
        layer = RecurrentLayer(name, c.op, c.direction, c.input_size, c.hidden_size, w, r)
        # A function called twice with the same weights is one layer, not two.
        by_name[name] = first.setdefault((id(c.located.instance.node), w.name, r.name), layer)
        if by_name[name] is layer:
            layers.append(layer)
    skipped.extend(_other_recurrence(walker))
    if not layers and not skipped:
        skipped.extend(_unrolled(walker))
    return Found(tuple(layers), tuple(skipped), by_name)


def readers(walker: Walker, found: Found) -> frozenset[tuple[int, int]]:
    """Returns (id of node, input index) of every input that reads a prunable weight."""
    return _readers(located for located in locate(walker) if located.name in found.by_name)


def _readers(located: Iterable[Located]) -> frozenset[tuple[int, int]]:
    return frozenset((id(site.node), site.index) for item in located for site in item.sites)


def exclusive(walker: Walker, value: ir.Value, readers: frozenset[tuple[int, int]]) -> bool:
    """Tells whether only the given inputs read a value, so that it can be changed in place."""
    return all(
        use is not None and (id(use[0]), use[1]) in readers for use in walker.consumers(value)
    )


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A recurrent operator whose weights are known and consistent."""

    located: Located
    sources: tuple[_Source, ...]
    op: Op
    direction: str
    input_size: int
    hidden_size: int


def _writable(
    walker: Walker, candidates: list[_Candidate]
) -> tuple[list[_Candidate], list[Skipped]]:
    """Sorts out the operators whose weights cannot be changed without changing something else."""
    skipped: list[Skipped] = []
    executed = Counter(id(located.instance.node) for located in locate(walker))
    while True:
        prunable = Counter(id(c.located.instance.node) for c in candidates)
        reading = _readers(c.located for c in candidates)
        made: dict[int, Array] = {}
        roles: dict[int, set[int]] = defaultdict(set)
        for site in (site for c in candidates for site in c.located.sites):
            roles[id(site.value)].add(site.index)
        refused: list[_Candidate] = []
        for candidate in candidates:
            located = candidate.located
            for site, source in zip(located.sites, candidate.sources, strict=True):
                through_call = len(site.calls) != len(located.instance.calls)
                if prunable[id(located.instance.node)] < executed[id(located.instance.node)]:
                    reason = "is read in a model function that another call gives other weights"
                elif len(roles[id(site.value)]) > 1:
                    reason = "is one tensor that serves as both W and R"
                elif through_call and not exclusive(walker, site.value, reading):
                    reason = "is passed to a model function that also uses it for something else"
                elif source.computed and not np.array_equal(
                    made.setdefault(id(site.value), source.read()), source.read()
                ):
                    reason = "is computed in a model function from arguments that differ by call"
                else:
                    continue
                hint = "inline the model's functions first (onnx.inliner.inline_local_functions)"
                if not located.instance.calls:
                    hint = "store W and R as two initializers"
                skipped.append(
                    Skipped(located.name, f"its weight {ROLES[site.index]} {reason}", hint)
                )
                refused.append(candidate)
                break
        if not refused:
            return candidates, skipped
        candidates = [c for c in candidates if c not in refused]


@dataclass(frozen=True, eq=False)
class _Source:
    """A weight's shape and type, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    computed: bool


def _read(site: Site, folder: Folder) -> _Source | str:
    tensor = stored_tensor(site.value)
    if tensor is not None:
        dtype = tensor.dtype
        if not dtype.is_floating_point() or dtype.bitwidth < 16:
            return f"'{site.value.name}' has type {dtype.name}"
        shape = tuple(tensor.shape.numpy())
        return _Source(shape, dtype.numpy(), reader(tensor), computed=False)
    folded = folder.fold(site.value, site.calls)
    if isinstance(folded, str):
        return folded
    if folded.dtype.kind != "f":
        return f"'{site.value.name}' has type {folded.dtype}"
    return _Source(folded.shape, folded.dtype, lambda: folded, computed=True)


def reader(tensor: ir.TensorProtocol) -> Callable[[], Array]:
    """Returns a function that reads a stored tensor.

    External data are mapped anew for every read, so that their pages are free again after it; the
    path and the sizes were checked when the model was read. Other tensors are taken out of the
    proto once, which copies them at every look.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        values = tensor.numpy()
        return lambda: values
    path, shape, dtype = tensor.path, tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    return lambda: np.memmap(path, dtype, "r", tensor.offset or 0, shape)


class _Pool:
    """Hands out one Weight for equal contents, wherever they are stored."""

    def __init__(self) -> None:
        self._by_value: dict[tuple[int, int, tuple[int, ...]], Weight] = {}
        self._by_kind: dict[tuple[Any, ...], list[Weight]] = defaultdict(list)
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, site: Site, source: _Source) -> Weight:
        place = (id(site.value), site.index, tuple(id(c) for c in site.calls))
        if place not in self._by_value:
            gates = GATES[cast(Op, site.node.op_type)]
            self._by_value[place] = self._unify(name, site.index, gates, source)
        return self._by_value[place]

    def _unify(self, name: str, role: int, gates: int, source: _Source) -> Weight:
        d, rows, columns = source.shape
        weight = Weight(name, (d, rows, columns), source.dtype, source.read, gates)
        # W and R are never copies of each other, even where their values are equal.
        same_kind = self._by_kind[role, gates, weight.shape, weight.dtype]
        for other in same_kind:
            if self._digest(other) == self._digest(weight):
                return other
        same_kind.append(weight)
        return weight

    def _digest(self, weight: Weight) -> bytes:
        if weight.name not in self._digests:
            data = np.ascontiguousarray(weight.read())
            self._digests[weight.name] = hashlib.sha256(data.view(np.uint8).data).digest()
        return self._digests[weight.name]


def _check(
    walker: Walker, located: Located, sources: tuple[_Source, ...]
) -> tuple[Op, str, int, int]:
    """Holds a node's attributes and weights against each other.

    Returns:
        Operator, direction, input size, hidden size.
    """
    node = located.instance.node
    op: Op = next(o for o in get_args(Op) if o == node.op_type)
    direction = "forward"
    if (given := attribute(walker, located.instance, "direction")) is not None:
        direction = given.as_string()
    if direction not in ("forward", "reverse", "bidirectional"):
        raise RnnpruneError(f"{op} '{located.name}' has an unknown direction '{direction}'")
    directions = 2 if direction == "bidirectional" else 1
    for role, source in zip("WR", sources, strict=True):
        if len(source.shape) != 3 or 0 in source.shape:
            raise RnnpruneError(
                f"weight {role} of {op} '{located.name}' has shape {list(source.shape)};"
                f" [directions, {GATES[op]}·hidden, …] was expected",
                "the model is not valid ONNX; export it again",
            )
    w, r = sources
    hidden = r.shape[2]
    expected = (directions, GATES[op] * hidden)
    for role, source in zip("WR", sources, strict=True):
        if source.shape[:2] != expected:
            raise RnnpruneError(
                f"weight {role} of {op} '{located.name}' has shape {list(source.shape)}; with"
                f" direction {direction} and R of {list(r.shape)} it must begin with"
                f" {list(expected)}",
                "the model is not valid ONNX; export it again",
            )
    size = attribute(walker, located.instance, "hidden_size")
    if size is not None and size.as_int() != hidden:
        raise RnnpruneError(
            f"{op} '{located.name}' says hidden_size={size.as_int()}, but R has {hidden} columns",
            "the model is not valid ONNX; export it again",
        )
    for role, source in zip("WR", sources, strict=True):
        if not all_finite(source.read()):
            raise RnnpruneError(
                f"weight {role} of {op} '{located.name}' holds NaN or infinite values",
                "the model was damaged or its training diverged; take an earlier checkpoint",
            )
    return op, direction, w.shape[2], hidden


def all_finite(values: Array) -> bool:
    """Tells whether an array holds neither NaN nor infinite values."""
    # A sum is finite only if every term is; it needs no temporary. Overflow falls back to looking.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return True
    return all(bool(np.isfinite(block).all()) for block in values.reshape(-1, values.shape[-1]))


_RECURRENT_NAME = re.compile(r"LSTM|GRU|(?<![A-Z])RNN")


def _other_recurrence(walker: Walker) -> Iterable[Skipped]:
    """What computes a recurrence without being a standard recurrent operator."""
    seen: set[int] = set()
    for instance in walker.instances():
        node = instance.node
        if id(node) in seen:
            continue
        seen.add(id(node))
        name = node.name or node.outputs[0].name or node.op_type
        if node.op_type in ("Loop", "Scan"):
            body = [n for sub in subgraphs(node) for n in sub.all_nodes()]
            inner = Counter(n.op_type for n in body)
            if inner["Sigmoid"] + inner["Tanh"] + inner["HardSigmoid"] and (
                inner["MatMul"] + inner["Gemm"]
            ):
                seen.update(id(n) for n in body)  # reported as one
                yield Skipped(
                    name,
                    f"the recurrent cell is written out inside a {node.op_type} "
                    "(MatMul, Sigmoid, Tanh), not an LSTM, GRU or RNN operator",
                    "export it as an operator: Keras 2's LSTM and GRU without masking do,"
                    " and so does torch.onnx.export",
                )
        elif (
            not is_recurrent(node)
            and _RECURRENT_NAME.search(node.op_type)
            and walker.model.functions.get(node.op_identifier()) is None
        ):
            quantized = "Quantize" in node.op_type
            yield Skipped(
                name,
                f"{node.domain or 'ai.onnx'}:{node.op_type} "
                + ("is quantized already" if quantized else "is a custom operator"),
                "prune the float model first, then quantize it: --quantize int8"
                if quantized
                else "export it with standard LSTM, GRU or RNN operators",
            )
        elif (cell := _closes_a_cell(node)) is not None:
            yield Skipped(
                name,
                f"{cell} is written out here as MatMul or Gemm, Sigmoid and Tanh, not as an LSTM,"
                " GRU or RNN operator",
                "export it as an operator (torch.nn.LSTM rather than LSTMCell, Keras layers"
                " rather than single steps or unroll=True)",
            )


def _closes_a_cell(node: ir.Node) -> str | None:
    """Recognises the last operation of a hand-written cell.

    ``h = sigmoid(·) * tanh(f * c + i * g)`` closes an LSTM cell; ``z * h + (1 - z) * tanh(·)`` and
    ``z * (h - n) + n`` with ``n = tanh(·)`` close a GRU cell.
    """
    users = node.outputs[0].consumers()
    if users and all(user.op_type == "Shape" for user in users):
        return None  # Keras runs a masked cell once more, for its shape only
    makers = _makers(node)
    kinds = {maker.op_type for maker in makers}
    if node.op_type == "Mul" and kinds == {"Sigmoid", "Tanh"}:
        cell = next(maker for maker in makers if maker.op_type == "Tanh")
        added = next(iter(_makers(cell)), None)
        if added is not None and added.op_type == "Add":
            terms = _makers(added)
            if len(terms) == 2 and all(term.op_type == "Mul" for term in terms):
                return "an LSTM cell"
    elif node.op_type == "Add" and "Mul" in kinds and kinds <= {"Mul", "Tanh"}:
        factors = {f.op_type for m in makers if m.op_type == "Mul" for f in _makers(m)}
        # An LSTM's f * c + i * g looks alike; its sum goes on into a Tanh.
        into_tanh = any(user.op_type == "Tanh" for user in node.outputs[0].consumers())
        if "Sigmoid" in factors and "Tanh" in factors | kinds and not into_tanh:
            return "a GRU cell"
    return None


def _makers(node: ir.Node) -> list[ir.Node]:
    found = (value.producer() for value in node.inputs if value is not None)
    return [maker for maker in found if maker is not None]


def _unrolled(walker: Walker) -> Iterable[Skipped]:
    """Finds weights that a chain of products applies again and again: an unrolled recurrence."""
    products: dict[int, list[ir.Node]] = defaultdict(list)
    for instance in walker.instances():
        node = instance.node
        if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1:
            weight = node.inputs[1]
            while (made := weight.producer() if weight is not None else None) is not None and (
                made.op_type in ("Transpose", "Identity")
            ):
                weight = made.inputs[0]
            if weight is not None and stored_tensor(weight) is not None:
                products[id(weight)].append(node)
    for nodes in products.values():
        if len(nodes) > 1 and _depends(nodes[1], nodes[0]):
            yield Skipped(
                nodes[0].name or nodes[0].op_type,
                f"an unrolled recurrence: the same weight is multiplied {len(nodes)} times, each"
                " time by what came of the last",
                "export it as an LSTM, GRU or RNN operator (whole layers rather than single steps"
                " or unroll=True)",
            )
            return


def _depends(node: ir.Node, on: ir.Node, limit: int = 5000) -> bool:
    """Tells whether a node is made from another's output, looking back over so many nodes."""
    pending = _makers(node)
    seen: set[int] = set()
    while pending and len(seen) < limit:
        current = pending.pop()
        if current is on:
            return True
        if id(current) not in seen:
            seen.add(id(current))
            pending.extend(_makers(current))
    return False
