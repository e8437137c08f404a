"""``--quantize int8``: operators of a written model → onnxruntime's dynamically quantized ones.

onnxruntime's ``quantize_dynamic`` is given one operator at a time, in a small model of its own, and
what it makes takes the operator's place. Given a whole model it sees no weight that is not an
initializer of the same graph, spoils weights that two LSTMs share, ignores ``layout``, and changes
the opset, the producer and shapes of what it does not quantize.

Weights become int8 with a scale for each row (each gate of each unit): measured on real models, one
scale for a whole matrix is up to a tenth faster and several times less exact. They lie between -64
and 64: processors without VNNI add products of two neighbours in 16 bits, which full eight bits
overflow there (a character model lost 0.008 bits per character by it, and 0.002 by the seventh
bit), so that a model would compute something else where it runs than where it was measured.

Quantized are LSTM, MatMul and Gemm with a constant right factor, and embeddings. Convolutions are
not: they become slower (up to 2.3 times) and much less exact.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import Layout, laid_out, locate
from rnnprune_cli.graph import Walker, attribute, input_of, stored_tensor, subgraphs
from rnnprune_cli.model import Array, Claim, Feed, Runner, Saved, Skipped, Weight
from rnnprune_cli.onnx_file import checker_refuses, deserialize, read_proto
from rnnprune_cli.onnx_model import PROVENANCE, OnnxModel
from rnnprune_cli.others import at_input, operators
from rnnprune_cli.rewrite.build import (
    MIN_IR_INITIALIZERS,
    Builder,
    remove_unread,
    value_names,
)
from rnnprune_cli.runtime import first_line
from rnnprune_cli.verify import run_all

DOMAIN = "com.microsoft"
"""Of the operators that only onnxruntime knows."""
_MIN_OPSET = 11
"""Of DynamicQuantizeLinear; the quantized LSTM needs none."""
_SMALL_OPSET = 17
"""Of the small model of an LSTM, which is the same in all versions."""
_MAX_WEIGHT_BYTES = 1 << 31
"""Of float weights of one operator; protobuf cannot hold more."""
_HALF_STEP = 0.5 + 1e-4
"""Rounding to whole steps, in float32."""
_CHUNK_ELEMENTS = 1 << 20
_SEQUENCE_LENS = 4
_LSTM_WEIGHTS = {1: (8, 9), 2: (10, 11)}
"""Input of an LSTM → inputs of a quantized one that hold its scale and zero point."""


@dataclass(frozen=True, eq=False)
class _Part:
    """An operator that can be quantized.

    Attributes:
        name: Of the layer.
        node: The operator, in a copy of the model.
        weights: Input index → weight, and how it lies there.
    """

    name: str
    node: ir.Node
    weights: Mapping[int, tuple[Weight, Layout]]


@dataclass(frozen=True, eq=False)
class QuantizedFile:
    """A quantized copy of a written model.

    Attributes:
        saved: What was written.
        claims: What was verified.
        operators: Operators that were quantized → how many.
        left: Recurrent operators that were not.
        float_nonzero: Weights that are not zero in what was quantized, before.
        nonzero: Weight name → how many quantized values are not zero, for each gate.
        reopen: Opens it.
    """

    saved: Saved
    claims: tuple[Claim, ...]
    operators: Mapping[str, int]
    left: tuple[Skipped, ...]
    float_nonzero: int
    nonzero: Mapping[str, tuple[int, ...]]
    reopen: Callable[[], Runner]


def require_quantizable(model: OnnxModel) -> None:
    """Raises RnnpruneError if nothing in a model can be quantized, with the first reason."""
    parts, left = _parts(model, Walker(model.fresh()))
    if parts:
        return
    reason, hint = "it has no LSTM, MatMul or Gemm with constant weights", ""
    if left:
        more = f" ({len(left) - 1} more like it)" if len(left) > 1 else ""
        reason, hint = f"'{left[0].name}': {left[0].reason}{more}", left[0].hint
    raise RnnpruneError(f"nothing in {model.path} can be quantized: {reason}", hint)


def warnings_of(left: Sequence[Skipped]) -> Iterator[str]:
    """Yields what the user should know of operators that were left as they are."""
    alike: dict[tuple[str, str], list[str]] = {}
    for item in left:
        alike.setdefault((item.reason, item.hint), []).append(f"'{item.name}'")
    for (reason, hint), names in alike.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        verb = "are" if len(names) > 1 else "is"
        yield "; ".join(
            filter(None, (f"{', '.join(names[:3])}{more} {verb} not quantized: {reason}", hint))
        )


def quantize(
    model: OnnxModel,
    saved: Saved,
    folder: Path,
    note: str,
    feeds: Sequence[Feed],
    threads: int,
) -> QuantizedFile:
    """Writes a quantized copy of what :meth:`OnnxModel.save` wrote, and verifies it.

    1. Find the operators that can be quantized.
    2. Replace each, and remove the float weights that nothing reads any more.
    3. Write; read it back and hold it against the float model.
    4. Run both.

    Args:
        model: The pruned model; its layers are named as in the result.
        saved: What was written of it, with dense weights.
        folder: Where to write; the file is named as the float one.
        note: Provenance for the model's metadata.
        feeds: What to run it on.
        threads: To run it with.

    Raises:
        RnnpruneError: If nothing could be quantized, or onnxruntime does not run it.
    """
    pruned = OnnxModel(saved.path, model.path, model.lifts, model.resized)
    require_quantizable(pruned)
    graph = pruned.fresh()
    walker = Walker(graph)
    parts, left = _parts(pruned, walker)
    surgeon = _Surgeon(walker, parts)
    for part in parts:
        surgeon.replace(part)
    surgeon.finish()
    graph.metadata_props[PROVENANCE] = note
    path = folder / saved.path.name
    pruned.write_graph(graph, path)
    del graph, walker, surgeon

    accepted = checker_refuses(saved.path) is None
    compared = Comparison(pruned, path)
    claims = list(compared.claims())
    if accepted:
        claims.append(
            _claim(
                "onnx.checker accepts the quantized file, with full check",
                checker_refuses(path) is None,
            )
        )
    again = OnnxModel(path, model.path, model.lifts, model.resized)
    reopen = functools.partial(again.open, threads)
    claims.append(_runs(pruned.open(threads), reopen(), feeds))
    names = _names(pruned, model)
    nonzero = {names[name]: counts for name, counts in compared.nonzero.items()}
    return QuantizedFile(
        Saved(
            path,
            again.files,
            "onnx",
            {**saved.exports, **dict.fromkeys(nonzero, "int8")},
            saved.stored,
            (*saved.warnings, *warnings_of(left)),
        ),
        tuple(claims),
        dict(Counter(part.node.op_type for part in parts)),
        tuple(left),
        compared.float_nonzero,
        nonzero,
        reopen,
    )


def _claim(text: str, holds: bool) -> Claim:
    return Claim(text, holds, 0.0 if holds else float("inf"), 0.0)


def _names(pruned: OnnxModel, model: OnnxModel) -> dict[str, str]:
    """Returns weight name in a written file → its name in the model that was written."""
    names = {}
    for name, layer in pruned.by_name.items():
        for weight, own in zip(layer.weights, model.by_name[name].weights, strict=True):
            names[weight.name] = own.name
    others = {layer.name: layer for layer in model.others.layers}
    for other in pruned.others.layers:
        names[other.w.name] = others.get(other.name, other).w.name
    return names


# Finding


def _parts(model: OnnxModel, walker: Walker) -> tuple[list[_Part], list[Skipped]]:
    """Finds what can be quantized in a copy of a model, and the recurrent operators that cannot."""
    parts: list[_Part] = []
    left = list(model.skipped)
    seen: set[int] = set()
    for located in locate(walker):
        node = located.instance.node
        layer = model.by_name.get(located.name)
        if layer is None or id(node) in seen:
            continue
        seen.add(id(node))
        layout = attribute(walker, located.instance, "layout")
        overridable = any(_overridable(walker, site.value) for site in located.sites)
        batch_first = layout is not None and layout.as_int() == 1
        problem = _problem(node, layer.weights, bool(located.instance.calls), overridable)
        if problem is None and batch_first:
            problem = (
                "onnxruntime's quantized LSTM has no layout=1 (batch first)",
                "export it with layout=0",
            )
        if problem is not None:
            left.append(Skipped(located.name, *problem))
            continue
        parts.append(_Part(located.name, node, {1: (layer.w, "stack"), 2: (layer.r, "stack")}))
    return parts + list(_other_parts(model, walker)), left


def _problem(
    node: ir.Node, weights: Sequence[Weight], in_function: bool, overridable: bool
) -> tuple[str, str] | None:
    """Returns why a recurrent operator cannot be quantized, and what would help."""
    if node.op_type != "LSTM":
        return (
            f"onnxruntime has no quantized {node.op_type}",
            "without --quantize, --values int8 stores packed weights in one byte",
        )
    if any(weight.dtype != np.float32 for weight in weights):
        dtype = next(w.dtype for w in weights if w.dtype != np.float32)
        return f"its weights are {dtype}, onnxruntime quantizes float32", "export it in float32"
    if in_function:
        return (
            "it is in a model function",
            "inline the model's functions first (onnx.inliner.inline_local_functions)",
        )
    if overridable:
        return (
            "its weights are also inputs, which callers may override",
            "export the model without its initializers among the inputs",
        )
    if sum(weight.size * 4 for weight in weights) >= _MAX_WEIGHT_BYTES:
        return "its weights take 2 GiB or more, which onnxruntime's quantizer cannot hold", ""
    return None


def _overridable(walker: Walker, value: ir.Value) -> bool:
    return value.is_graph_input() and walker.model.ir_version >= MIN_IR_INITIALIZERS


def _other_parts(model: OnnxModel, walker: Walker) -> Iterator[_Part]:
    """Finds Dense layers and embeddings that can be quantized."""
    if walker.opset(walker.model.graph) < _MIN_OPSET:
        return
    layers = {layer.name: layer for layer in model.others.layers}
    places = {id(site.node): site for site, _ in model.others.sites(walker)}
    for operator in operators(walker):
        layer, node = layers.get(operator.name), operator.instance.node
        if layer is None or layer.w.dtype != np.float32:
            continue
        index = model.others.inputs[operator.name]
        gemm = node.op_type == "Gemm" and (
            node.attributes.get_float("alpha", 1.0) != 1
            or node.attributes.get_float("beta", 1.0) != 1
            or node.attributes.get_int("transA", 0) != 0
        )
        left_factor = node.op_type != "Gather" and index == 0
        size = layer.w.size * 4
        if gemm or left_factor or size >= _MAX_WEIGHT_BYTES:
            continue
        if not _overridable(walker, places[id(node)].value):
            yield _Part(operator.name, node, {index: (layer.w, at_input(node, index))})


# Replacing


class _Surgeon:
    """Puts quantized operators into a model.

    Args:
        walker: The model, which is changed.
        parts: What is to be replaced.
    """

    def __init__(self, walker: Walker, parts: Sequence[_Part]) -> None:
        self._model = walker.model
        self._opset = walker.opset(walker.model.graph)
        self._taken = value_names(walker.model)
        self._constants: dict[str, ir.Value] = {}
        self._replaced: list[ir.Value] = []
        self._readers: dict[str, set[int]] = {}
        for part in parts:
            for weight, _ in part.weights.values():
                self._readers.setdefault(weight.name, set()).add(id(part.node.graph))

    def replace(self, part: _Part) -> None:
        """Replaces one operator by what onnxruntime makes of it."""
        node, graph = part.node, part.node.graph
        assert isinstance(graph, ir.Graph)
        build = self._builder(graph)
        if node.op_type == "LSTM":
            _declare(part)
        made = ir.from_proto(_quantized(part, self._opset)).graph
        known: dict[str, ir.Value | None] = {"": None}
        for index, value in enumerate(node.inputs):
            if index not in part.weights and value is not None:
                known[f"i{index}"] = value
        for name, value in made.initializers.items():
            known[name] = self._constant(name, value, part)
        outputs = {f"o{index}": value for index, value in enumerate(node.outputs)}
        for old in made:
            new = ir.Node(
                old.domain,
                old.op_type,
                [None if v is None else known[v.name or ""] for v in old.inputs],
                list(old.attributes.values()),
                num_outputs=len(old.outputs),
                name=node.name if old.op_type == f"DynamicQuantize{node.op_type}" else None,
            )
            for value, twin in zip(old.outputs, new.outputs, strict=True):
                known[value.name or ""] = twin
                if value.name in outputs:
                    _take_over(outputs[value.name], twin, graph)
                else:
                    twin.name = build.unique(f"{part.name}/q") if value.name else ""
            graph.insert_before(node, new)
        weights = (node.inputs[index] for index in part.weights)
        self._replaced += [value for value in weights if value is not None]
        graph.remove(node, safe=True)

    def _builder(self, graph: ir.Graph) -> Builder:
        initializers = self._model.ir_version >= MIN_IR_INITIALIZERS
        return Builder(graph, self._opset, initializers, self._taken)

    def _constant(self, name: str, value: ir.Value, part: _Part) -> ir.Value:
        """Adds a constant once: the same weight becomes the same tensors wherever it is read.

        It lies where it is read, or, if that is in several graphs, in the main one: onnxruntime
        prepares the weights of a branch for its kernels only if they lie in the branch itself.
        """
        tensor = value.const_value
        assert tensor is not None
        weights = (weight.name for weight, _ in part.weights.values())
        owner = next(own for own in weights if name.startswith(f"{own}_"))
        if name not in self._constants:
            alone = len(self._readers[owner]) == 1
            graph = part.node.graph if alone else self._model.graph
            assert isinstance(graph, ir.Graph)
            build = self._builder(graph)
            self._constants[name] = build.constant(name, ir.tensor(tensor.numpy()))
        return self._constants[name]

    def finish(self) -> None:
        """Removes float weights that nothing reads, and what only made them."""
        remove_unread(self._replaced)
        self._model.opset_imports.setdefault(DOMAIN, 1)


def _declare(part: _Part) -> None:
    """Says of the outputs of an LSTM what ONNX cannot infer of those of a quantized one."""
    directions, _, hidden = part.weights[2][0].shape
    for index, value in enumerate(part.node.outputs):
        if value.is_graph_output():
            continue  # a branch need not say what it returns
        sizes = [directions, None, hidden] if index else [None, directions, None, hidden]
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.shape is None:
            value.shape = ir.Shape(sizes)


def _take_over(old: ir.Value, new: ir.Value, graph: ir.Graph | ir.Function) -> None:
    """Lets one value stand where another stood, with its name."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    for user, position in tuple(old.uses()):
        user.replace_input_with(position, new)
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = new


def _quantized(part: _Part, opset: int) -> onnx.ModelProto:
    """Returns what onnxruntime makes of a model that is nothing but one operator.

    Inputs are called ``i0``, ``i1`` …, outputs ``o0`` …; weights have their own names.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto: Any = ir.to_proto(part.node)
    inputs, tensors = [], []
    for index, name in enumerate(proto.input):
        if index in part.weights:
            weight, layout = part.weights[index]
            array = np.ascontiguousarray(laid_out(weight.read(), layout))
            tensors.append(onnx.numpy_helper.from_array(array, weight.name))
            proto.input[index] = weight.name
        elif name:
            kind = TensorProto.FLOAT
            if part.node.op_type == "LSTM" and index == _SEQUENCE_LENS:
                kind = TensorProto.INT32
            elif part.node.op_type == "Gather":
                kind = TensorProto.INT64
            proto.input[index] = f"i{index}"
            inputs.append(helper.make_tensor_value_info(f"i{index}", kind, None))
    outputs = []
    for index, name in enumerate(proto.output):
        if name:
            proto.output[index] = f"o{index}"
            outputs.append(helper.make_tensor_value_info(f"o{index}", TensorProto.FLOAT, None))
    proto.name = "node"
    if part.node.op_type == "LSTM":
        opset = max(opset, _SMALL_OPSET)
        if "hidden_size" not in part.node.attributes:
            hidden = part.weights[2][0].shape[2]
            proto.attribute.append(helper.make_attribute("hidden_size", hidden))
    graph = helper.make_graph([proto], "part", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="rnnprune-") as folder, _silent():
        path = Path(folder) / "part.onnx"
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["LSTM", "MatMul", "Gather"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # the quantizer raises many unrelated types
            raise RnnpruneError(
                f"onnxruntime cannot quantize '{part.name}': {first_line(error)}",
                "leave out --quantize; --values int8 stores packed weights in one byte",
            ) from error
        return onnx.load(path)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps the quantizer from advertising, and from setting up logging for the whole program."""
    root, handler, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


# Verifying


def _runs(pruned: Runner, quantized: Runner, feeds: Sequence[Feed]) -> Claim:
    """Runs both: the quantized one must answer with as many finite numbers."""
    names = [output.name for output in pruned.outputs]
    holds = bool(feeds)
    both = (run_all(runner, feeds, names) for runner in (pruned, quantized))
    for one, two in zip(*both, strict=True):
        for a, b in zip(one, two, strict=True):
            holds &= a.shape == b.shape and a.dtype == b.dtype
            if holds and a.dtype.kind == "f":
                holds &= bool((np.isfinite(b) | ~np.isfinite(a)).all())
    return _claim("onnxruntime runs the quantized file; its outputs are finite numbers", holds)


class Comparison:
    """A quantized file held against the float model that it was made from.

    It is read back, and nothing is known of how it was made: each node is the same as in the float
    model, or stands for one that is quantized there, in one of the ways in which this can be.

    Args:
        pruned: The float model.
        path: The quantized file.

    Attributes:
        nonzero: Weight name, in the float model → values that are not zero, for each gate.
        float_nonzero: How many of the float weights that were quantized are not zero.
    """

    def __init__(self, pruned: OnnxModel, path: Path) -> None:
        one, two = pruned.fresh(), deserialize(read_proto(path), path)
        self.nonzero: dict[str, tuple[int, ...]] = {}
        self.float_nonzero = 0
        self._furthest = 0.0
        parts, _ = _parts(pruned, Walker(one))
        self._parts = {id(part.node): part for part in parts}
        self._explained: set[int] = set()
        """Nodes and initializers of the quantized file."""
        self._same = self._functions(one, two) and self._graphs(one.graph, two.graph)
        self._same &= all(id(thing) in self._explained for thing in _things(two))
        self._same &= {**one.opset_imports, DOMAIN: 1} == {**two.opset_imports, DOMAIN: 1}

    def claims(self) -> Iterator[Claim]:
        """Yields what holds, or does not."""
        yield _claim("nothing but quantized operators differs from the pruned model", self._same)
        yield Claim(
            "quantized weights are within half a step of the pruned ones, zeros are zeros",
            self._furthest <= _HALF_STEP,
            self._furthest,
            _HALF_STEP,
        )

    def _functions(self, one: ir.Model, two: ir.Model) -> bool:
        protos = [
            {str(key): ir.to_proto(f).SerializeToString(deterministic=True) for key, f in m.items()}
            for m in (one.functions, two.functions)
        ]
        return protos[0] == protos[1]

    def _graphs(self, one: ir.Graph, two: ir.Graph) -> bool:
        """Compares two graphs, and the graphs in them."""
        stored = [
            v.name for v in one.inputs if v.is_initializer() and v.name not in two.initializers
        ]
        inputs = [_declared(v) for v in one.inputs if v.name not in stored]
        if inputs != [_declared(v) for v in two.inputs]:
            return False
        if [_declared(v) for v in one.outputs] != [_declared(v) for v in two.outputs]:
            return False
        for name, value in two.initializers.items():
            before = one.initializers.get(name)
            if before is not None and _equal(before.const_value, value.const_value):
                self._explained.add(id(value))
        made = {v.name: node for node in one for v in node.outputs if v.name}
        for node in two:
            origin = next((made[v.name] for v in node.outputs if v.name in made), None)
            if origin is None:
                continue  # part of something; explained by what it ends in
            if self._nodes(origin, node):
                self._explained.add(id(node))
            elif not self._stands_for(node, origin):
                return False
        return True

    def _nodes(self, one: ir.Node, two: ir.Node) -> bool:
        """Tells whether two nodes are the same."""
        if _outline(one) != _outline(two) or one.attributes.keys() != two.attributes.keys():
            return False
        for a, b in zip(subgraphs(one), subgraphs(two), strict=True):
            if not self._graphs(a, b):
                return False
        return all(
            attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            or _serialized(attr) == _serialized(two.attributes[name])
            for name, attr in one.attributes.items()
        )

    def _stands_for(self, end: ir.Node, origin: ir.Node) -> bool:
        """Tells whether a node ends what stands for a quantized operator; looks at its weights."""
        part = self._parts.get(id(origin))
        if part is None or _names_of(end.outputs) != _names_of(origin.outputs):
            return False
        if origin.op_type == "LSTM":
            return self._lstm(end, part)
        if origin.op_type == "Gather":
            return self._gather(end, part)
        return self._product(end, part)

    def _lstm(self, node: ir.Node, part: _Part) -> bool:
        old = part.node
        known = {name: _serialized(attr) for name, attr in old.attributes.items()}
        known.pop("layout", None)
        found = {name: _serialized(attr) for name, attr in node.attributes.items()}
        if "hidden_size" not in known:
            found.pop("hidden_size", None)
        data = (0, 3, 4, 5, 6, 7)
        if (
            (node.domain, node.op_type) != (DOMAIN, "DynamicQuantizeLSTM")
            or known != found
            or any(_name(input_of(node, k)) != _name(input_of(old, k)) for k in data)
        ):
            return False
        self._explained.add(id(node))
        for index, (scale, zero) in _LSTM_WEIGHTS.items():
            weight, _ = part.weights[index]
            arrays = self._read(node.inputs[index], node.inputs[scale], node.inputs[zero])
            if arrays is None or arrays[0].ndim != 3:
                return False
            values, steps, zeros = arrays
            # [directions, columns, rows] in the file, with a scale for each row.
            self._weight(weight, values.transpose(0, 2, 1), steps[..., None], zeros[..., None])
        return True

    def _gather(self, end: ir.Node, part: _Part) -> bool:
        gather = _maker(end, 0, "Gather")
        if end.op_type != "DequantizeLinear" or gather is None:
            return False
        arrays = self._read(gather.inputs[0], input_of(end, 1), input_of(end, 2))
        known = [{n: _serialized(a) for n, a in g.attributes.items()} for g in (gather, part.node)]
        if (
            arrays is None
            or arrays[1].size != 1
            or known[0] != known[1]
            or _name(gather.inputs[1]) != _name(part.node.inputs[1])
        ):
            return False
        self._explained |= {id(end), id(gather)}
        self._weight(part.weights[0][0], arrays[0][None], arrays[1], arrays[2])
        return True

    def _product(self, end: ir.Node, part: _Part) -> bool:
        """``end = Cast(MatMulInteger(x, w)) * (scale of x * scale of w)``, and a bias of a Gemm."""
        old, chain = part.node, [end]
        if len(old.inputs) > 2 and old.inputs[2] is not None:
            if end.op_type != "Add" or _name(input_of(end, 1)) != _name(old.inputs[2]):
                return False
            product = _maker(end, 0, "Mul")
        else:
            product = end if end.op_type == "Mul" else None
        cast = _maker(product, 0, "Cast")
        scales = _maker(product, 1, "Mul")
        integer = _maker(cast, 0, "MatMulInteger")
        data = _maker(integer, 0, "DynamicQuantizeLinear")
        if product is None or cast is None or scales is None or integer is None or data is None:
            return False
        chain += [product, cast, scales, integer, data]
        arrays = self._read(integer.inputs[1], input_of(scales, 1), input_of(integer, 3))
        if (
            arrays is None
            or _name(data.inputs[0]) != _name(old.inputs[0])
            or cast.attributes.get_int("to") != TensorProto.FLOAT
            or scales.inputs[0] is not data.outputs[1]
            or input_of(integer, 2) is not data.outputs[2]
        ):
            return False
        self._explained |= {id(node) for node in chain}
        values, steps, zeros = arrays
        self._weight(part.weights[1][0], values.T[None], steps[..., None], zeros[..., None])
        return True

    def _read(self, *values: ir.Value | None) -> tuple[Array, Array, Array] | None:
        """Returns weight, scale and zero point; None if they are no constants of these types."""
        arrays = []
        for value in values:
            tensor = None if value is None else stored_tensor(value)
            if value is None or tensor is None:
                return None
            arrays.append(tensor.numpy())
            node = value.producer()
            self._explained.add(id(value) if node is None else id(node))
        weight, scale, zero = arrays
        if (
            weight.dtype.kind not in "iu"
            or weight.dtype.itemsize != 1
            or zero.dtype != weight.dtype
        ):
            return None
        return (weight, scale, zero) if scale.dtype == np.float32 else None

    def _weight(self, weight: Weight, values: Array, scale: Array, zero: Array) -> None:
        """Holds a quantized weight against the float one, some rows at a time."""
        wanted = weight.read()
        directions, rows, columns = weight.shape
        fits = (
            values.shape == wanted.shape
            and all(a.shape in ((directions, rows, 1), (rows, 1), (1,), ()) for a in (scale, zero))
            and bool((np.isfinite(scale) & (scale > 0)).all())
        )
        if not fits or (directions > 1 and scale.ndim == 2):
            self._furthest = float("inf")
            return
        scale = np.broadcast_to(scale.astype(np.float64), (directions, rows, 1))
        zero = np.broadcast_to(zero.astype(np.int64), (directions, rows, 1))
        block, counts = rows // weight.gates, [0] * weight.gates
        step = max(1, min(block, _CHUNK_ELEMENTS // columns))
        for d in range(directions):
            for start in (
                s for g in range(weight.gates) for s in range(g * block, (g + 1) * block, step)
            ):
                gate = start // block
                stop = min(start + step, (gate + 1) * block)
                exact = wanted[d, start:stop].astype(np.float64)
                whole = values[d, start:stop].astype(np.int64) - zero[d, start:stop]
                steps = exact / scale[d, start:stop]
                away = np.where(
                    exact == 0, np.where(whole == 0, 0.0, np.inf), np.abs(steps - whole)
                )
                self._furthest = max(self._furthest, float(away.max(initial=0.0)))
                counts[gate] += int(np.count_nonzero(whole))
        if weight.name not in self.nonzero:
            self.float_nonzero += weight.nonzero
        self.nonzero[weight.name] = tuple(counts)


def _things(model: ir.Model) -> Iterator[ir.Node | ir.Value]:
    """Yields every node and initializer of the main graph and of the graphs in it."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph
        yield from graph.initializers.values()


def _maker(node: ir.Node | None, index: int, op_type: str) -> ir.Node | None:
    """Returns the node that makes an input, if it is a certain standard operator."""
    value = None if node is None else input_of(node, index)
    maker = None if value is None else value.producer()
    return maker if maker is not None and (maker.domain, maker.op_type) == ("", op_type) else None


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _names_of(values: Sequence[ir.Value | None]) -> list[str]:
    return [_name(value) for value in values]


def _outline(node: ir.Node) -> tuple[Any, ...]:
    names = _names_of(node.inputs), _names_of(node.outputs)
    return (*node.op_identifier(), node.name, *names)


def _declared(value: ir.Value) -> bytes:
    return bytes(ir.to_proto(value).SerializeToString(deterministic=True))


def _serialized(attr: ir.Attr) -> bytes:
    return bytes(ir.to_proto(attr).SerializeToString(deterministic=True))


def _equal(one: ir.TensorProtocol | None, two: ir.TensorProtocol | None) -> bool:
    """Tells whether two tensors hold the same bits."""
    if one is None or two is None or one.dtype != two.dtype or one.shape != two.shape:
        return False
    if one.dtype == ir.DataType.STRING:
        return bool(np.array_equal(one.numpy(), two.numpy()))
    return one.tobytes() == two.tobytes()
