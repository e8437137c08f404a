"""An ONNX model as a SavedModel that plain TensorFlow loads.

1. Weights become variables, each stored once. Those of recurrent layers lie as Keras has them (each
   direction by itself, gates in Keras' order) and are named after the layers that they came from,
   so that whatever knows Keras' cells knows these.
2. The graph is traced as a function with the inputs and outputs of the original's signature.
3. What TensorFlow counts up within a process is taken out of ``saved_model.pb``, so that the same
   model gives the same bytes.
4. What was written is read back: the values of the variables bit by bit, and what the function
   computes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from rnnprune_cli.calibrate import prepared, size_of
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import locate
from rnnprune_cli.gate_order import onnx_to_keras
from rnnprune_cli.graph import Folder, Instance, Walker, stored_tensor
from rnnprune_cli.model import (
    Array,
    BoolArray,
    Claim,
    Feed,
    LoadedModel,
    ParameterCount,
    RecurrentLayer,
    Runner,
    Saved,
)
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.runtime import ResizedRunner
from rnnprune_cli.tensorflow.runtime import DAMAGED, first_line, quiet, set_threads
from rnnprune_cli.tensorflow.savedmodel import write_note
from rnnprune_cli.tensorflow.store import same_bits
from rnnprune_cli.tensorflow_model import TensorFlowModel
from rnnprune_cli.tensorflow_model import load as load_tensorflow
from rnnprune_cli.trainer.call import Operator, Value, dtype_of, tf
from rnnprune_cli.trainer.graph import GraphModule, Overrides, Site, scoped
from rnnprune_cli.trainer.keras_cells import OPERATORS, Kernel
from rnnprune_cli.verify import CONVERSION_TOLERANCE, verify_runs

_INSTEAD = "write ONNX instead, with -o NAME.onnx"
_HALF_TOLERANCE = 2 * float(np.finfo(np.float16).eps)
"""Half-precision weights are computed with in single precision, other than by onnxruntime."""


class Exporter:
    """Writes ONNX models as SavedModels with the signature of the model that they came from.

    Args:
        source: The user's model.
        base: The same as ONNX.
        threads: For TensorFlow, which takes them once per process.

    Attributes:
        warnings: What a written model has not of the original.

    Raises:
        RnnpruneError: If TensorFlow has no form for the model.
    """

    def __init__(self, source: LoadedModel, base: LoadedModel, threads: int) -> None:
        assert isinstance(base, OnnxModel)
        warning = set_threads(threads)
        self.warnings: tuple[str, ...] = (warning,) if warning else ()
        self._threads = threads
        self._paths = _paths(source, base)
        self._signature = "serving_default"
        if isinstance(source, TensorFlowModel):
            function, self._signature = source.program.function, source.program.signature
            self._inputs: Mapping[str, Any] = function.structured_input_signature[1]
            self._outputs: Mapping[str, Any] = function.structured_outputs
            self.warnings += tuple(_left_behind(source))
        else:
            graph = base.fresh().graph
            given = [v for v in graph.inputs if v.name not in graph.initializers]
            self._inputs, self._outputs = _specs(given), _specs(graph.outputs)
            for name in self._inputs:
                if scoped(name) != name:
                    raise RnnpruneError(f"TensorFlow cannot call an input '{name}'", _INSTEAD)
        self._traced(base)

    def write(self, model: LoadedModel, saved: Saved, path: Path, note: str) -> Exported:
        """Writes a SavedModel.

        Args:
            model: The model.
            saved: What was written of it as ONNX.
            path: The directory to make.
            note: Provenance, for ``assets.extra/rnnprune.json``.

        Raises:
            RnnpruneError: If TensorFlow has no form for it, or it cannot be written.
        """
        assert isinstance(model, OnnxModel)
        written = OnnxModel(saved.path, model.path, model.lifts, model.resized)
        function, weights = self._traced(written)
        root = tf.Module()
        root.weights = {name: weight.variable for name, weight in weights.items()}
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        try:
            with quiet():
                tf.saved_model.save(root, str(path), {self._signature: function}, options)
            _canonicalize(path)
            write_note(path, note)
        except (*DAMAGED, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"{path.name}: cannot write the SavedModel: {first_line(error)}",
                "check the free space and the permissions, or " + _INSTEAD,
            ) from error
        values = {name: weight.values for name, weight in weights.items()}
        return Exported(path, saved, self._signature, values, model.resized, self._threads)

    def _traced(self, model: OnnxModel) -> tuple[Any, dict[str, _Weight]]:
        """Returns a model as a TensorFlow function, and the weights that it reads."""
        graph = prepared(model)
        weights = _Weights()
        kernels = _take_kernels(model, graph, weights, self._paths)
        specs = self._arguments(model, graph)
        try:
            module = _Module(graph, kernels)
            for name, value in module.values.items():
                weights.add(name, id(value), module.weights[name], module.stored(value))

            def call(*inputs: Value) -> dict[str, Any]:
                made = module(dict(zip(specs, inputs, strict=True)))
                return {name: self._as_declared(name, value) for name, value in made.items()}

            traced = tf.function(call, input_signature=list(specs.values()), autograph=False)
            return traced.get_concrete_function(), weights.by_name
        except RnnpruneError as error:
            raise RnnpruneError(error.message, _INSTEAD, error.code) from error
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"the model cannot be written as TensorFlow: {first_line(error)}", _INSTEAD
            ) from error

    def _arguments(self, model: OnnxModel, graph: ir.Model) -> dict[str, Any]:
        """Returns the inputs of the signature; states may have become shorter."""
        cut = _specs([v for v in graph.graph.inputs if v.name in model.resized])
        return {
            name: tf.TensorSpec(cut.get(name, spec).shape, spec.dtype, _argument(name, spec))
            for name, spec in self._inputs.items()
        }

    def _as_declared(self, name: str, value: Value) -> Value:
        """Returns an output with the type and the known sizes that the original declares."""
        declared = self._outputs[name]
        value = tf.cast(value, declared.dtype)
        if value.shape.is_compatible_with(declared.shape):  # states may have become shorter
            value.set_shape(declared.shape)
        return value


@dataclass(frozen=True, eq=False)
class Exported:
    """A SavedModel that :class:`Exporter` wrote, and what it is meant to hold.

    Attributes:
        path: The directory.
        onnx: The ONNX file that it was made from.
        signature: Name of its only signature.
        values: Name of each variable → its values.
        resized: See :class:`OnnxModel`.
        threads: For TensorFlow.
    """

    path: Path
    onnx: Saved
    signature: str
    values: Mapping[str, Array]
    resized: Mapping[str, tuple[BoolArray, int]]
    threads: int

    @functools.cached_property
    def _model(self) -> TensorFlowModel:
        """The model as its files have it."""
        return load_tensorflow(self.path, self.signature, self.threads)

    @property
    def saved(self) -> Saved:
        """What was written."""
        return Saved(
            self.path,
            self._model.files,
            self._model.format,
            self.onnx.exports,
            self.onnx.stored,
            self.onnx.warnings,
        )

    def open(self) -> Runner:
        """Returns the model, read from its files, ready to run."""
        runner = self._model.open(self.threads)
        return ResizedRunner(runner, self.resized) if self.resized else runner

    def count(self) -> ParameterCount:
        """Counts its floating-point weights."""
        return self._model.count()

    def verify(
        self, reference: Runner, feeds: Sequence[Feed], names: Sequence[str], made_up: bool
    ) -> list[Claim]:
        """Holds it against the ONNX file.

        Args:
            reference: The ONNX file, ready to run.
            feeds: Inputs.
            names: Outputs.
            made_up: Whether the inputs are; see :func:`verify_runs`.
        """
        found = self._model.program.root.weights
        largest = 0.0 if set(found) == set(self.values) else float("inf")
        for name in set(found) & set(self.values):
            largest = max(largest, _difference(found[name].numpy(), self.values[name]))
        claim = "the SavedModel's variables hold exactly the weights of the ONNX model"
        half = any(values.dtype.itemsize < 4 for values in self.values.values())
        return [
            Claim(claim, largest == 0, largest, 0.0),
            verify_runs(
                "the SavedModel computes what the ONNX model computes",
                reference,
                self.open(),
                feeds,
                names,
                made_up,
                _HALF_TOLERANCE if half else CONVERSION_TOLERANCE,
            ),
        ]


def _difference(one: Array, two: Array) -> float:
    """Returns the largest difference; infinite for other bits of equal values, or other shapes."""
    if same_bits(one, two):
        return 0.0
    if one.shape != two.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - two).max()) or float("inf")


def _left_behind(source: TensorFlowModel) -> Iterator[str]:
    """Says what of a model does not go into a SavedModel that is made from its ONNX form."""
    others = sorted(set(source.program.root.signatures) - {source.program.signature})
    if source.format != "savedmodel":
        yield (
            f"the result is a SavedModel with the one signature '{source.program.signature}', not a"
            " Keras file: without the configuration of layers, losses and optimizer"
        )
    elif others:
        yield (
            f"only the signature '{source.program.signature}' is written:"
            f" {', '.join(map(repr, others))} {'are' if len(others) > 1 else 'is'} left out"
        )


def _specs(values: Sequence[ir.Value]) -> dict[str, Any]:
    """Returns name → ``tf.TensorSpec`` of inputs or outputs of a graph."""
    specs = {}
    for value in values:
        assert value.dtype is not None
        shape = None
        if value.shape is not None:
            shape = [size if isinstance(size, int) else None for size in value.shape]
        specs[value.name or ""] = tf.TensorSpec(shape, value.dtype.numpy(), value.name)
    return specs


def _argument(name: str, spec: Any) -> str:  # noqa: ANN401  TensorSpec
    """Returns the name of an argument that TensorFlow makes an input of that name of."""
    own = str(spec.name)
    return own if re.sub(r"\W", "_", own) == name else name


# Weights


@dataclass(frozen=True, eq=False)
class _Weight:
    """A variable, and what it is to hold."""

    variable: Any
    values: Array


class _Weights:
    """The variables of a model."""

    def __init__(self) -> None:
        self.by_name: dict[str, _Weight] = {}
        self._known: dict[Any, Any] = {}

    def add(self, name: str, key: Any, variable: Any, values: Array) -> None:  # noqa: ANN401
        """Adds a variable under a name that none has yet."""
        unique, number = scoped(name), 1
        while unique in self.by_name:
            number += 1
            unique = f"{scoped(name)}_{number}"
        self.by_name[unique] = _Weight(variable, values)
        self._known[key] = variable

    def get(self, name: str, key: Any, values: Array) -> Any:  # noqa: ANN401
        """Returns the variable of a key; makes it when it is first asked for."""
        if key not in self._known:
            self.add(name, key, tf.Variable(values, name=scoped(name)), values)
        return self._known[key]


class _Module(GraphModule):
    """A model whose half-precision weights are stored as such; they are computed with in single."""

    cannot, trained = "cannot be written as TensorFlow", False
    operators: ClassVar[Mapping[str, Operator]] = {**GraphModule.operators, **OPERATORS}

    def stored(self, value: ir.Value) -> Array:
        """Returns the values of a constant."""
        tensor = stored_tensor(value)
        assert tensor is not None
        return tensor.numpy()

    def _array(self, value: ir.Value) -> Array:
        return self.stored(value)

    def _stored(self, value: ir.Value) -> Value:
        made = super()._stored(value)
        if isinstance(made, np.ndarray):
            return made.astype(self._real(made.dtype))
        return None if made is None else tf.cast(made, self._real(dtype_of(made)))


def _paths(source: LoadedModel, base: OnnxModel) -> dict[tuple[str, int], str]:
    """Names each direction of each layer after the TensorFlow layer of the same weights."""
    known = {}
    if isinstance(source, TensorFlowModel):
        known = {_bytes(layer, 0): layer.name for layer in source.layers}
    paths = {}
    for layer in base.layers:
        ends = ("/forward", "/backward") if layer.r.shape[0] > 1 else ("",)
        for k, end in enumerate(ends):
            paths[layer.name, k] = known.get(_bytes(layer, k), layer.name + end)
    return paths


def _bytes(layer: RecurrentLayer, direction: int) -> tuple[bytes, ...]:
    return tuple(w.read()[direction].astype(np.float32).tobytes() for w in layer.weights)


def _take_kernels(
    model: OnnxModel,
    graph: ir.Model,
    weights: _Weights,
    paths: Mapping[tuple[str, int], str],
) -> Overrides:
    """Makes variables of the weights of recurrent operators, which then read them no more.

    Returns:
        What the operators are to be given instead.
    """
    walker = Walker(graph)
    folder = Folder(walker, size_of(model))
    kernels: dict[Site, Any] = {}
    taken = []
    for located in locate(walker):
        layer = model.by_name.get(located.name)
        if layer is None:
            continue
        bias, node = _bias(located.instance, folder), located.instance.node
        peepholes = len(node.inputs) > 7 and node.inputs[7] is not None
        coupled = node.attributes.get_int("input_forget", 0)
        if isinstance(bias, str) or peepholes or coupled:  # none that Keras knows
            continue
        taken.append(node)
        kernels[located.name, 1] = tuple(
            _kernel(layer, k, node, bias, weights, paths.get((layer.name, k), layer.name))
            for k in range(layer.r.shape[0])
        )
    for node in taken:
        node.replace_input_with(1, node.inputs[0])  # the place must stay: it is overridden
        for index in range(2, min(len(node.inputs), 4)):
            node.replace_input_with(index, None)
    common.RemoveUnusedNodesPass()(graph)
    return kernels


def _bias(instance: Instance, folder: Folder) -> Array | str | None:
    """Returns B of a recurrent operator; None if it has none, the reason if it is no constant."""
    node = instance.node
    value = node.inputs[3] if len(node.inputs) > 3 else None
    if value is None:
        return None
    tensor = stored_tensor(value)
    return folder.fold(value, instance.calls) if tensor is None else tensor.numpy()


def _kernel(
    layer: RecurrentLayer,
    direction: int,
    node: ir.Node,
    bias: Array | None,
    weights: _Weights,
    path: str,
) -> Kernel:
    """Makes variables of one direction."""
    op = layer.op

    def variable(name: str, key: object, values: Array) -> Any:  # noqa: ANN401
        return weights.get(f"{path}/{name}", (op, direction, name, key), values)

    w, r = (
        variable(name, weight.name, onnx_to_keras(op, weight.read()[direction][None]))
        for name, weight in zip(("kernel", "recurrent_kernel"), layer.weights, strict=True)
    )
    if bias is None:
        return Kernel(w, r, None)
    halves = bias[direction].reshape(2, -1, 1)
    both = np.concatenate([onnx_to_keras(op, half[None]) for half in halves])
    if not node.attributes.get_int("linear_before_reset", 0):
        both = both[0] + both[1]
    return Kernel(w, r, variable("bias", bias.tobytes(), both))


# The file


def _canonicalize(path: Path) -> None:
    """Numbers the functions of a SavedModel from 0, and sorts what has no order.

    TensorFlow numbers them through all of a process. The fingerprint, which holds a random number,
    goes; loaders do without.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    file = path / "saved_model.pb"
    model = saved_model_pb2.SavedModel()
    model.ParseFromString(file.read_bytes())
    for meta_graph in model.meta_graphs:
        graph = meta_graph.graph_def
        functions = sorted(graph.library.function, key=lambda f: _number(f.signature.name))
        names = {
            f.signature.name: re.sub(r"\d+$", str(k), f.signature.name)
            for k, f in enumerate(functions)
        }
        renamed = functools.partial(_renamed, names)
        for function in functions:
            _without_numbers(function, renamed(function.signature.name))
        for node in (*graph.node, *(node for f in functions for node in f.node_def)):
            node.op = renamed(node.op)
            for attribute in node.attr.values():
                calls = [*attribute.list.func]
                if attribute.HasField("func"):
                    calls.append(attribute.func)
                for called in calls:
                    called.name = renamed(called.name)
        del graph.library.function[:]
        graph.library.function.extend(functions)
        objects = meta_graph.object_graph_def
        for node in objects.nodes:
            concrete = node.function.concrete_functions
            if concrete:
                concrete[:] = map(renamed, concrete)
            if node.HasField("bare_concrete_function"):
                bare = node.bare_concrete_function
                bare.concrete_function_name = renamed(bare.concrete_function_name)
        found = {renamed(name): value for name, value in objects.concrete_functions.items()}
        objects.ClearField("concrete_functions")
        for name, value in found.items():
            objects.concrete_functions[name].CopyFrom(value)
        aliases = meta_graph.meta_info_def.function_aliases
        kept = {renamed(name): alias for name, alias in aliases.items()}
        aliases.clear()
        aliases.update(kept)
    file.write_bytes(model.SerializeToString(deterministic=True))
    (path / "fingerprint.pb").unlink(missing_ok=True)


def _without_numbers(function: Any, name: str) -> None:  # noqa: ANN401  FunctionDef
    """Gives a function another name, also where arguments are named after it or numbered."""
    signature = function.signature
    for place, argument in enumerate(signature.input_arg):
        argument.name = argument.name.replace(signature.name, name)  # of a loop; not read
        if argument.type == tf.resource.as_datatype_enum:
            function.arg_attr[place].attr.pop("_user_specified_name", None)
    signature.name = name


def _renamed(names: Mapping[str, str], name: str) -> str:
    return names.get(name, name)


def _number(name: str) -> int:
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else -1
