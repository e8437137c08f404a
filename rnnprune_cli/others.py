"""What else than recurrent layers can be pruned on request: Dense layers and embeddings.

A Dense layer is a MatMul or Gemm with a constant matrix on either side, an embedding a Gather of
entries of one. A matrix may be read through Transposes, and by several nodes, if all of them are
layers of one kind that take it the same way round: it is one weight then, stored in one place.

Nothing here runs unless somebody asks for it (:attr:`rnnprune_cli.onnx_model.OnnxModel.others`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.find import Layout, Site, all_finite, locate, reader, taken_in
from rnnprune_cli.graph import Instance, Walker, attribute, input_of, stored_tensor, subgraphs
from rnnprune_cli.model import OTHER_KINDS, OtherLayer, Skipped, Stage, Weight

_KINDS = {"MatMul": "dense", "Gemm": "dense", "Gather": "embedding"}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_RELATED = re.compile("MatMul|Gemm|EmbedLayer")
_QUANTIZED = re.compile("Integer|Quant|QLinear|^QGemm|Bits|BnB4|Int8|Fp8")
_FOLD = "fold the model's constants first (onnxsim, or onnxruntime's basic optimization)"


@dataclass(frozen=True, eq=False)
class Operator:
    """An executed MatMul, Gemm or Gather, under the name by which users know it."""

    name: str
    instance: Instance

    @property
    def kind(self) -> str:
        """What it may be: ``dense`` or ``embedding``."""
        return _KINDS[self.instance.node.op_type]


@dataclass(frozen=True, eq=False)
class Others:
    """Result of :func:`find_others`.

    Attributes:
        layers: What can be pruned, in graph order.
        skipped: What cannot, and why.
        inputs: Name → the input that is the weight, of every layer.
        kinds: Name → key of :data:`OTHER_KINDS`, of everything in ``layers`` and ``skipped``.
    """

    layers: tuple[OtherLayer, ...]
    skipped: tuple[Skipped, ...]
    inputs: Mapping[str, int]
    kinds: Mapping[str, str]

    def sites(self, walker: Walker) -> Iterator[tuple[Site, Weight]]:
        """Yields the place of the weight of every layer in a copy of the model."""
        layers = {layer.name: layer for layer in self.layers}
        for operator in operators(walker):
            if operator.name in layers:
                yield (
                    trace(walker, operator.instance, self.inputs[operator.name]),
                    layers[operator.name].w,
                )


def operators(walker: Walker) -> list[Operator]:
    """Finds what may be a Dense layer or an embedding.

    Deterministic: the same file gives the same names in the same order, and so does what
    :meth:`OnnxModel.save` makes of it, because what it adds has names of its own.
    """
    taken = {located.name for located in locate(walker)}
    return [
        Operator(_name(instance, taken), instance)
        for instance in walker.instances()
        if instance.node.op_type in _KINDS and instance.node.domain in ("", "ai.onnx")
    ]


def _name(instance: Instance, taken: set[str]) -> str:
    """Returns a name that nothing else has, and reserves it."""
    node = instance.node
    own = node.name or node.outputs[0].name or node.op_type
    name = plain = "/".join([*(c.name or c.op_type for c in instance.calls), own])
    number = 1
    while name in taken:
        number += 1
        name = f"{plain}#{number}"
    taken.add(name)
    return name


def at_input(node: ir.Node, index: int) -> Layout:
    """Returns how a weight lies where an operator reads it."""
    if node.op_type == "Gather":
        return "rows"
    # The rows of a left factor, and the columns of a right one, are what makes an output.
    return "columns" if (index == 1) != _transposes(node, index) else "rows"


def features(node: ir.Node, index: int, ndim: int) -> int:
    """Returns the axis of the other factor along which a Dense layer reads its features.

    Args:
        node: MatMul or Gemm.
        index: Which input is the weight.
        ndim: Axes of the other factor.
    """
    if ndim == 1:
        return 0
    # Of a left factor the rows are multiplied, of a right one the columns.
    return ndim - 1 if (index == 1) != _transposes(node, 1 - index) else ndim - 2


def _transposes(node: ir.Node, index: int) -> bool:
    """Tells whether a Gemm transposes one of its factors."""
    attr = node.attributes.get("transB" if index else "transA")
    return node.op_type == "Gemm" and attr is not None and not attr.is_ref() and attr.value == 1


def trace(walker: Walker, instance: Instance, index: int) -> Site:
    """Follows an input back to where its matrix is made, through Transposes."""
    layout = at_input(instance.node, index)
    value = instance.node.inputs[index]
    assert value is not None
    value, calls = walker.origin(value, instance.calls)
    while (node := value.producer()) is not None and _is_turn(node):
        if _swaps(node):
            layout = "rows" if layout == "columns" else "columns"
        source = node.inputs[0]
        assert source is not None
        value, calls = walker.origin(source, calls)
    return Site(value, calls, instance.node, index, layout)


def _is_turn(node: ir.Node) -> bool:
    """Tells whether a node is the Transpose of a matrix."""
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return False
    if input_of(node, 0) is None:
        return False
    perm = node.attributes.get("perm")
    return perm is None or (not perm.is_ref() and len(perm.as_ints()) == 2)


def _swaps(node: ir.Node) -> bool:
    return list(node.attributes.get_ints("perm", (1, 0))) == [1, 0]


def find_others(walker: Walker) -> Others:
    """Finds every Dense layer and embedding of a model, and says why something is none.

    1. Each operator by itself: it has one constant matrix, of a type that can be pruned.
    2. All that read one matrix: they are layers of one kind and take it the same way round.
    """
    every = operators(walker)
    sites: dict[str, Site] = {}
    refused: dict[str, tuple[str, str]] = {}
    constants = _Constants()
    for operator in every:
        found = _matrix(walker, operator, constants)
        if isinstance(found, Site):
            sites[operator.name] = found
        elif found is not None:
            refused[operator.name] = found
    kinds = {o.name: o.kind for o in every if o.name in sites or o.name in refused}
    together: dict[int, list[str]] = defaultdict(list)
    for name, site in sites.items():
        together[id(site.value)].append(name)
    layers: list[OtherLayer] = []
    for names in together.values():
        own = [sites[name] for name in names]
        problem = _shared(walker, own, {kinds[name] for name in names})
        if problem is not None:
            refused.update(dict.fromkeys(names, problem))
            continue
        weight = _weight(names[0], own[0])
        layers += [OtherLayer(name, sites[name].node.op_type, weight) for name in names]
    order = {operator.name: k for k, operator in enumerate(every)}
    skipped = [Skipped(name, *refused[name]) for name in sorted(refused, key=order.__getitem__)]
    for name, item in _related(walker):
        skipped.append(item)
        kinds.setdefault(name, "embedding" if "Embed" in item.reason else "dense")
    layers.sort(key=lambda layer: order[layer.name])
    inputs = {layer.name: sites[layer.name].index for layer in layers}
    return Others(tuple(layers), tuple(skipped), inputs, kinds)


def _matrix(
    walker: Walker, operator: Operator, constants: _Constants
) -> Site | tuple[str, str] | None:
    """Returns where the matrix of an operator is stored, or (why it has none, what would help).

    None stands for a Gather that has nothing to do with embeddings.
    """
    instance = operator.instance
    node = instance.node
    places = (0,) if node.op_type == "Gather" else (1, 0)
    if len(node.inputs) < 2 or None in node.inputs[:2]:
        return "it lacks an input", "the model is not valid ONNX; export it again"
    sites = [trace(walker, instance, index) for index in places]
    stored = [site for site in sites if stored_tensor(site.value) is not None]
    if not stored:
        return None if operator.kind == "embedding" else _no_constant(sites, constants)
    if len(stored) > 1:
        return "both of its inputs are constants", _FOLD
    site = stored[0]
    tensor = stored_tensor(site.value)
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    if operator.kind == "embedding":
        axis = attribute(walker, instance, "axis")
        if not tensor.dtype.is_floating_point() or len(shape) < 2:
            return None  # a table of sizes or of places
        if axis is not None and axis.as_int() not in (0, -len(shape)):
            return f"it looks up along axis {axis.as_int()}, not among entries", ""
    if instance.calls:
        return (
            "it is in a model function",
            "inline the model's functions first (onnx.inliner.inline_local_functions)",
        )
    if len(shape) != 2 or 0 in shape:
        return f"its weight has shape {list(shape)}: that is no matrix", ""
    if tensor.dtype not in _FLOATS:
        return f"its weight has type {tensor.dtype.name}", "export the model in float32 or float16"
    if not all_finite(reader(tensor)()):
        return "its weight holds NaN or infinite values", "take an earlier checkpoint"
    return site


def _no_constant(sites: Sequence[Site], constants: _Constants) -> tuple[str, str]:
    """Says why none of two factors is a constant matrix."""
    for site in sites:
        ops = constants.made_with(site.value)
        maker = site.value.producer()
        if ops is None or maker is None:
            continue
        if "DequantizeLinear" in ops:
            return (
                "its weight is already quantized",
                "prune the float model first, then quantize it: --quantize int8",
            )
        return f"its weight is computed by {maker.op_type} '{site.value.name}'", _FOLD
    return "neither of its inputs is a constant: it has no weight", ""


class _Constants:
    """Tells which values depend on constants only."""

    def __init__(self) -> None:
        self._known: dict[int, frozenset[str] | None] = {}

    def made_with(self, value: ir.Value) -> frozenset[str] | None:
        """Returns the operators that make a value of constants; None if it is no constant."""
        pending = [value]
        while pending:
            current = pending[-1]
            if id(current) in self._known:
                pending.pop()
                continue
            node = current.producer()
            if stored_tensor(current) is not None:
                self._known[id(current)] = frozenset()
            elif node is None or not node.inputs or subgraphs(node):
                self._known[id(current)] = None
            else:
                sources = [v for v in node.inputs if v is not None]
                unknown = next((v for v in sources if id(v) not in self._known), None)
                parts = [self._known[id(v)] for v in sources if id(v) in self._known]
                if None in parts:
                    self._known[id(current)] = None
                elif unknown is not None:
                    pending.append(unknown)
                else:
                    ops = frozenset(op for part in parts for op in part or ())
                    self._known[id(current)] = ops | {node.op_type}
        return self._known[id(value)]


def _shared(walker: Walker, sites: Sequence[Site], kinds: set[str]) -> tuple[str, str] | None:
    """Returns why a matrix cannot be pruned in place, and what would help.

    Args:
        walker: The model.
        sites: Of all layers that read it.
        kinds: Of these layers.
    """
    apart = "give each its own copy of the weight when exporting"
    if len(kinds) > 1:
        return "its weight is that of an embedding and of a Dense layer (tied weights)", apart
    if len({site.layout for site in sites}) > 1:
        return "its weight is also read transposed (tied weights)", apart
    own = {(id(site.node), site.index) for site in sites}
    for use in _ends(walker, sites[0].value):
        if use is None:
            return "its weight is also handed out, by the model or by a loop", apart
        node, index = use
        if (id(node), index) not in own:
            name = node.name or node.outputs[0].name
            return f"its weight is also read by {node.op_type} '{name}'", apart
    return None


def _ends(walker: Walker, value: ir.Value) -> Iterator[tuple[ir.Node, int] | None]:
    """Yields what reads a value, directly or through Transposes; None for a graph output."""
    for use in walker.consumers(value):
        if use is not None and _is_turn(use[0]):
            yield from _ends(walker, use[0].outputs[0])
        else:
            yield use


def _weight(name: str, site: Site) -> Weight:
    tensor = stored_tensor(site.value)
    assert tensor is not None
    outer, inner = tensor.shape.numpy()
    rows, columns = (outer, inner) if site.layout == "rows" else (inner, outer)
    read = reader(tensor)
    return Weight(
        f"{name}.weight",
        (1, int(rows), int(columns)),
        tensor.dtype.numpy(),
        lambda: taken_in(read(), site.layout),
    )


def _related(walker: Walker) -> Iterator[tuple[str, Skipped]]:
    """Yields operators that do the same in another form."""
    seen: set[int] = set()
    for instance in walker.instances():
        node = instance.node
        if (
            id(node) in seen
            or not _RELATED.search(node.op_type)
            or (node.op_type in _KINDS and node.domain in ("", "ai.onnx"))
            or node.op_identifier() in walker.model.functions
        ):
            continue
        seen.add(id(node))
        name = node.name or node.outputs[0].name or node.op_type
        what = f"{node.domain or 'ai.onnx'}:{node.op_type}"
        if _QUANTIZED.search(node.op_type):
            reason, hint = (
                "is already quantized",
                "prune the float model first, then quantize it: --quantize int8",
            )
        else:
            reason, hint = "is a custom operator", "prune the model before a runtime optimizes it"
        yield name, Skipped(name, f"{what} {reason}", hint)


def included_layers(
    others: Others, stage: Stage, recurrent: Iterable[str]
) -> tuple[OtherLayer, ...]:
    """Returns the layers that ``--include`` selects, without those of ``--exclude``.

    Args:
        others: What there is.
        stage: What is asked for.
        recurrent: Names of the recurrent layers, which ``--exclude`` may match, too.

    Raises:
        UsageError: If a pattern matches nothing that can be pruned.
    """
    names = [*recurrent, *(layer.name for layer in others.layers)]
    for pattern in stage.exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no layer matches '{pattern}'", closest(pattern, names))
    chosen: set[str] = set()
    for pattern in stage.include:
        matching = {layer.name for layer in others.layers if _matches(layer.name, layer, pattern)}
        if not matching:
            raise _nothing_matches(others, pattern)
        chosen |= matching
    return tuple(
        layer
        for layer in others.layers
        if layer.name in chosen and not any(fnmatchcase(layer.name, p) for p in stage.exclude)
    )


def _matches(name: str, layer: OtherLayer, pattern: str) -> bool:
    return pattern in (layer.kind, name) or fnmatchcase(name, pattern)


def _nothing_matches(others: Others, pattern: str) -> UsageError:
    """Says what a pattern that selects nothing may have meant, or why it cannot be pruned."""
    refused = [
        item
        for item in others.skipped
        if pattern in (others.kinds[item.name], item.name) or fnmatchcase(item.name, pattern)
    ]
    names = [layer.name for layer in others.layers]
    if refused:
        first = refused[0]
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        return UsageError(
            f"--include {pattern}: '{first.name}' cannot be pruned: {first.reason}{more}",
            first.hint or closest(pattern, [*OTHER_KINDS, *names]),
        )
    if pattern in OTHER_KINDS:
        what = "Dense layer" if pattern == "dense" else "embedding"
        return UsageError(
            f"--include {pattern}: the model has no {what}", "leave it out: nothing else changes"
        )
    return UsageError(
        f"--include {pattern}: no Dense layer or embedding matches",
        closest(pattern, [*OTHER_KINDS, *names]),
    )
