"""A model that is being trained: its weights as variables, and how they go back into a file.

1. Weights of recurrent layers, and of others that were pruned, become initializers of their own,
   in the layout in which they are read, so that masks fit them.
2. :class:`GraphModule` makes variables of all constants; those that are weights are trained.
3. Masks multiply gradients: a weight that is zero stays exactly zero, as an optimizer that starts
   from zero moments never moves it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli.calibrate import other_nodes, prepared
from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.find import ROLES, Layout, laid_out, locate, taken_in
from rnnprune_cli.graph import Walker, stored_tensor
from rnnprune_cli.model import Array, BoolArray, OtherLayer, Pruned, StoredWeight, Weight
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.others import at_input
from rnnprune_cli.rewrite.build import MIN_IR_INITIALIZERS, Builder, value_names
from rnnprune_cli.trainer.graph import GraphModule

Place = tuple[str, Layout]
"""Name of a weight, and how it lies where it is read."""

_WEIGHTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "Gather": (0,),
    "PRelu": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2),
}
"""Operator → inputs that training changes. Other constants scale, clip or index."""
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_LAYOUT = (
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Cast",
    "Concat",
    "Slice",
    "Split",
)
"""Operators through which a weight is followed to what reads it."""


class Trainee:
    """A model with variables.

    Args:
        model: The model.
        pruned: What becomes of its weights: values to start from, and masks.
        freeze: Globs of names of constants, or of nodes that read them, that are not trained.
        more: Names of further weights that will get masks.
        carry: Whether sequences are cut, and states carried from one part to the next.

    Attributes:
        module: The model as a TensorFlow module.
        variables: Name → variable, of what is trained.
        masks: Name → mask, of those that have one.

    Raises:
        UsageError: If a glob matches nothing.
        RnnpruneError: If the model has an operator that is not supported.
    """

    def __init__(
        self,
        model: OnnxModel,
        pruned: Pruned,
        freeze: Sequence[str] = (),
        more: Collection[str] = (),
        carry: bool = False,
    ) -> None:
        self._model = model
        self._graph = prepared(model)
        self._places: dict[str, tuple[Weight, Layout]] = {}
        self.masks: dict[str, BoolArray] = {}
        self._bind(pruned, more)
        values = self._constants(freeze)
        self.module = GraphModule(self._graph, trainable=lambda v: v in values, carry=carry)
        # Only what is read is a variable.
        self.variables: dict[str, Any] = {
            name: v for name, v in self.module.weights.items() if v.trainable
        }
        self._values = {name: self.module.values[name] for name in self.variables}
        frozen = set(self.masks) - set(self.variables)
        held = {self._places[name][0].name for name in frozen}
        if not held.isdisjoint(more):
            raise UsageError(
                f"--freeze holds '{min(held)}', which is to lose weights while training",
                "take --schedule one-shot, which removes them before",
            )
        self.masks = {name: m for name, m in self.masks.items() if name not in frozen}

    def _bind(self, pruned: Pruned, more: Collection[str]) -> None:
        """Gives every prunable weight an initializer of its own, with its new values."""
        graph = self._graph
        graph.ir_version = max(graph.ir_version, MIN_IR_INITIALIZERS)
        build = Builder(graph.graph, self._model.opset or 1, True, value_names(graph))
        made: dict[Place, ir.Value] = {}
        for node, index, weight, layout in list(self._reads(graph, {*pruned, *more})):
            if (weight.name, layout) not in made:
                other = made.get((weight.name, "rows" if layout == "columns" else "columns"))
                if other is not None:
                    made[weight.name, layout] = build.node("Transpose", [other], perm=[1, 0])
                else:
                    stored = pruned.get(weight.name)
                    values = weight.read() if stored is None else stored()
                    array = np.ascontiguousarray(laid_out(values, layout))
                    value = build.constant(weight.name, ir.tensor(array))
                    made[weight.name, layout] = value
                    name = value.name or ""
                    self._places[name] = weight, layout
                    if stored is not None or weight.name in more:
                        mask = np.ones(weight.shape, np.bool_) if stored is None else stored.mask
                        self.masks[name] = np.ascontiguousarray(laid_out(mask, layout))
            node.replace_input_with(index, made[weight.name, layout])
        common.RemoveUnusedNodesPass()(graph)
        common.RemoveUnusedOpsetsPass()(graph)

    def _reads(
        self, graph: ir.Model, bound: Collection[str]
    ) -> Iterator[tuple[ir.Node, int, Weight, Layout]]:
        """Yields where weights of recurrent layers, and of others that were pruned, are read."""
        model = self._model
        for located in locate(Walker(graph)):
            layer = model.by_name.get(located.name)
            for index, weight in zip(ROLES, () if layer is None else layer.weights, strict=False):
                yield located.instance.node, index, weight, "stack"
        if set(bound) <= {w.name for layer in model.layers for w in layer.weights}:
            return
        nodes = other_nodes(graph)
        for other in model.others.layers:
            if other.w.name in bound and other.name in nodes:
                node, index = nodes[other.name], model.others.inputs[other.name]
                yield node, index, other.w, at_input(node, index)

    def _constants(self, freeze: Sequence[str]) -> set[ir.Value]:
        """Returns the constants that are to be trained."""
        found: dict[ir.Value, set[str]] = {}
        graph = self._graph.graph
        for part in (graph, *graph.subgraphs()):
            values = list(part.initializers.values())
            values += [n.outputs[0] for n in part if n.op_type == "Constant"]
            for value in values:
                if stored_tensor(value) is not None and not value.is_graph_input():
                    readers = set(_readers(value, value))
                    if readers:
                        found[value] = {value.name or "", *readers}
        for pattern in freeze:
            matching = {
                v for v, names in found.items() if any(fnmatchcase(n, pattern) for n in names)
            }
            if not matching:
                every = sorted(set().union(*found.values())) if found else []
                raise UsageError(f"no weight matches --freeze '{pattern}'", closest(pattern, every))
            found = {v: names for v, names in found.items() if v not in matching}
        return set(found)

    # -- values -----------------------------------------------------------------------------------

    def values(self) -> dict[str, Array]:
        """Returns what the variables hold, by name."""
        return {name: variable.numpy() for name, variable in self.variables.items()}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Gives the variables values."""
        for name, variable in self.variables.items():
            variable.assign(values[name])

    @property
    def parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        sizes = {name: int(np.prod(v.shape)) for name, v in self.module.weights.items()}
        return sum(sizes[name] for name in self.variables), sum(sizes.values())

    @property
    def sparsity(self) -> float:
        """Share of the weights with a mask that are zero."""
        sizes = sum(mask.size for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / sizes if sizes else 0.0

    def prune(self, written: OnnxModel, pruned: Pruned) -> None:
        """Takes over masks, and the values that go with them.

        Args:
            written: What :meth:`write` made.
            pruned: What became of its weights.
        """
        found = {old.name: pruned.get(new.name) for old, new in self._pairs(written)}
        for name, (weight, layout) in self._places.items():
            stored = found.get(weight.name)
            if stored is not None and name in self.variables:
                self.masks[name] = np.ascontiguousarray(laid_out(stored.mask, layout))
                array = np.ascontiguousarray(laid_out(stored(), layout))
                self.variables[name].assign(array.astype(self.variables[name].dtype.name))

    def read_by(self, layer: str) -> dict[int, Any]:
        """Returns the variables that a recurrent layer reads, by the index of its input."""
        names = {id(value): name for name, value in self._values.items()}
        for located in locate(Walker(self._graph)):
            if located.name == layer:
                read = enumerate(located.instance.node.inputs)
                return {k: self.variables[names[id(v)]] for k, v in read if id(v) in names}
        return {}

    def write(self, path: Path, values: Mapping[str, Array]) -> OnnxModel:
        """Writes the model with some values for its variables, and opens it.

        Args:
            path: Where to.
            values: Name → array, as :meth:`values` returns them.
        """
        for name, value in self._values.items():
            _store(value, values[name])
        self._model.write_graph(self._graph, path)
        return OnnxModel(path, self._model.path, self._model.lifts, self._model.resized)

    def masked(self, written: OnnxModel, masks: Mapping[str, BoolArray], before: Pruned) -> Pruned:
        """Returns masks as those of the weights of a model that :meth:`write` made.

        Args:
            written: That model.
            masks: Name → mask.
            before: What the masks came from; of weights that are frozen they are taken from it.
        """
        found: dict[str, StoredWeight] = {}
        own: dict[str, BoolArray] = {w: s.mask for w, s in before.items()}
        for name, mask in masks.items():
            weight, layout = self._places[name]
            own[weight.name] = taken_in(mask, layout)
        for old, new in self._pairs(written):
            if old.name in own:
                found[new.name] = StoredWeight(new, own[old.name])
        return found

    def _pairs(self, written: OnnxModel) -> Iterator[tuple[Weight, Weight]]:
        """Pairs weights with those of a model that was written."""
        for name, layer in self._model.by_name.items():
            yield from zip(layer.weights, written.by_name[name].weights, strict=True)
        bound = {weight.name for weight, _ in self._places.values()}
        if bound - {w.name for layer in self._model.layers for w in layer.weights}:
            others = {layer.name: layer for layer in written.others.layers}
            for old in self._model.others.layers:
                if old.w.name in bound:
                    yield old.w, others[old.name].w

    def others(self, written: OnnxModel, before: Sequence[OtherLayer]) -> tuple[OtherLayer, ...]:
        """Returns other layers as those of a model that was written."""
        if not before:
            return ()
        known = {layer.name: layer for layer in written.others.layers}
        return tuple(known[layer.name] for layer in before)


def _readers(value: ir.Value, origin: ir.Value) -> Iterator[str]:
    """Yields the names of the nodes that read a constant as a weight."""
    tensor = stored_tensor(origin)
    assert tensor is not None
    if not tensor.dtype.is_floating_point() or tensor.size < 2:
        return
    for use in value.uses():
        node, index = use.node, use.idx
        name = node.name or node.outputs[0].name or node.op_type
        if node.domain not in ("", "ai.onnx"):
            continue
        if index in _WEIGHTS.get(node.op_type, ()):
            if node.op_type != "Gather" or len(tensor.shape) > 1:
                yield name
        elif node.op_type == "Add" and _is_product(node.inputs[1 - index]):
            yield name
        elif node.op_type in _LAYOUT and (index == 0 or node.op_type == "Concat"):
            for output in node.outputs:
                yield from _readers(output, origin)


def _is_product(value: ir.Value | None) -> bool:
    """Tells whether a value comes out of a product, so that what is added to it is a bias."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _LAYOUT and node.inputs:
        first = node.inputs[0]
        node = None if first is None else first.producer()
    return node is not None and node.op_type in _PRODUCTS


def _store(value: ir.Value, array: Array) -> None:
    """Replaces a constant."""
    old = stored_tensor(value)
    assert old is not None
    tensor = ir.tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=old.name)
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
        return
    for name in list(producer.attributes):
        del producer.attributes[name]
    producer.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value = tensor
