"""An ONNX model as a TensorFlow module with trainable weights.

1. Every floating-point constant with several elements that some node reads becomes a variable.
2. A call walks the nodes in order. What follows from constants and known sizes alone is evaluated
   at once and stays a NumPy array, so that axes and sizes are known; the rest becomes part of the
   TensorFlow function that is being traced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.find import is_recurrent
from rnnprune_cli.graph import stored_tensor
from rnnprune_cli.model import Array
from rnnprune_cli.tensorflow.runtime import first_line
from rnnprune_cli.trainer import control, elementwise, layout, products, recurrent, reductions
from rnnprune_cli.trainer.call import Call, Operator, Unsupported, Value, is_known, tf

OPERATORS: dict[str, Operator] = {
    **elementwise.OPERATORS,
    **layout.OPERATORS,
    **reductions.OPERATORS,
    **products.OPERATORS,
    **recurrent.OPERATORS,
    **control.OPERATORS,
}
"""Operator of the default domain → function; others are refused by name."""

_STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that hold what training has measured, and gradients do not change."""

Site = tuple[str, int]
"""Name of a node, and which of its inputs."""
Overrides = Mapping[Site, Any]


def scoped(name: str) -> str:
    """Returns a name as TensorFlow allows it for variables."""
    return re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name).lstrip("_\\/>-") or "weight"


CARRIED = "rnnprune.carried"
"""bool: whether states are those of an earlier call, rather than where the model starts itself."""
_STATES = {"h": 5, "c": 6}
"""Letter of a state → the input of a recurrent operator that it starts with."""


def _names(node: ir.Node) -> list[str]:
    """Returns the names of the states of a recurrent operator; none of any other."""
    letters = ("h", "c") if node.op_type == "LSTM" else ("h",)
    return [f"{node.name}.{letter}" for letter in letters] if is_recurrent(node) else []


def _states(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Returns name → directions and size of all states of a graph.

    Raises:
        RnnpruneError: If they cannot be carried from one part of a sequence to the next.
    """
    found: dict[str, tuple[int, int]] = {}
    for node in graph.all_nodes():
        if not is_recurrent(node):
            continue
        attributes = {name: attr.value for name, attr in node.attributes.items()}
        reason = None
        if node.graph is not graph:
            reason = "runs in a branch or a loop"
        elif attributes.get("direction", "forward") != "forward":
            reason = "reads sequences from their end"
        elif attributes.get("layout", 0):
            reason = "has layout=1"
        if reason is not None:
            raise RnnpruneError(
                f"sequences cannot be cut: {node.op_type} '{node.name}' {reason}",
                "leave out --bptt",
            )
        found |= dict.fromkeys(_names(node), (1, int(attributes["hidden_size"])))
    return found


class GraphModule(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    """A model without functions, such as :func:`rnnprune_cli.shrink.task.prepared` returns.

    It gives what onnxruntime gives, within rounding, for inputs of any size that the model takes,
    and can be called within a ``tf.function``. Values that are half precision in the file are
    single precision here.

    Args:
        model: The model; not changed.
        overrides: (name of a recurrent operator, input index) → variable that it reads there
            instead: W at 1 and R at 2, in ONNX layout.
        dtype: A type for all real numbers; None for those of the file.
        trainable: Tells which constants are trained; by default all but measured statistics.
        carry: Whether a call may start with the states that one before has ended with.

    Attributes:
        weights: Name of an initializer or output of a Constant → its variable.
        values: The same name → that constant.
        inputs: Names of what a call needs.
        carried: Name of a state of a recurrent operator → its directions and size; empty without
            ``carry``. A call that is given them, and :data:`CARRIED`, starts with them; any call
            returns what it ended with.

    Raises:
        RnnpruneError: If the model has an operator that is not supported.
    """

    cannot, instead = "cannot be differentiated here", "methods that need no gradients work"
    """What is said of an operator that is not supported, and what to do about it."""
    operators: ClassVar[Mapping[str, Operator]] = OPERATORS
    trained = True
    """Whether calls are to be differentiated."""

    def __init__(
        self,
        model: ir.Model,
        overrides: Overrides | None = None,
        dtype: np.dtype[Any] | None = None,
        trainable: Callable[[ir.Value], bool] | None = None,
        carry: bool = False,
    ) -> None:
        super().__init__()
        self._graph = model.graph
        self._opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self._overrides = dict(overrides or {})
        self._dtype = dtype
        self._check()
        self.carried = _states(model.graph) if carry else {}
        self._given: Mapping[str, Value] = {}
        self._ends: dict[str, Value] = {}
        self.weights: dict[str, Any] = {}
        self.values: dict[str, ir.Value] = {}
        self._variables: dict[int, Any] = {}
        for value, learns in self._constants():
            name = value.name or "constant"
            while name in self.weights:  # branches may use the same names
                name += "'"
            learns = learns if trainable is None else trainable(value)
            variable = tf.Variable(self._array(value), trainable=learns, name=scoped(name))
            self.weights[name] = self._variables[id(value)] = variable
            self.values[name] = value
        stored = model.graph.initializers
        self.inputs = [v.name or "" for v in model.graph.inputs if v.name not in stored]

    def __call__(self, feed: Mapping[str, Value]) -> dict[str, Any]:
        """Evaluates the model.

        Args:
            feed: Input name → tensor, as the model's inputs say.

        Returns:
            Output name → tensor.

        Raises:
            RnnpruneError: If an operator cannot do what a node asks for, or an input is missing.
        """
        environment: dict[int, Value] = {}
        for value in self._graph.inputs:
            name = value.name or ""
            if name in feed:
                given = tf.convert_to_tensor(feed[name])
                dtype = self._real(np.dtype(given.dtype.as_numpy_dtype))
                environment[id(value)] = tf.cast(given, dtype)
            elif name in self.inputs:
                raise RnnpruneError(f"no value for input '{name}'", "give an array for each input")
        self._given = {name: feed[name] for name in (*self.carried, CARRIED) if name in feed}
        self._ends = {}
        results = self._run(self._graph, environment)
        return self._ends | {
            value.name or "": tf.convert_to_tensor(result)
            for value, result in zip(self._graph.outputs, results, strict=True)
        }

    def _check(self) -> None:
        for node in self._graph.all_nodes():
            default = node.domain in ("", "ai.onnx")
            name = node.op_type if default else f"{node.domain}.{node.op_type}"
            if name not in self.operators:
                raise RnnpruneError(f"operator {name} ('{node.name}') {self.cannot}", self.instead)

    def _constants(self) -> Iterator[tuple[ir.Value, bool]]:
        """Yields the constants that become variables, and whether they are trained."""
        for graph in (self._graph, *self._graph.subgraphs()):
            values = list(graph.initializers.values())
            values += [n.outputs[0] for n in graph if n.op_type == "Constant"]
            for value in values:
                tensor = stored_tensor(value)
                if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
                    continue
                uses = [u for u in value.uses() if self._override(u.node, u.idx) is None]
                if uses or value.is_graph_output():
                    statistics = all(u.idx in _STATISTICS.get(u.node.op_type, ()) for u in uses)
                    yield value, not statistics

    def _override(self, node: ir.Node, index: int) -> Value:
        """Returns what a recurrent operator reads instead of an input; other names may repeat."""
        return self._overrides.get((node.name or "", index)) if is_recurrent(node) else None

    def _real(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Returns the type in which values of a type are computed."""
        if dtype.kind in "iub":
            return dtype
        if self._dtype is not None:
            return self._dtype
        return dtype if dtype == np.float64 else np.dtype(np.float32)

    def _array(self, value: ir.Value) -> Array:
        tensor = stored_tensor(value)
        assert tensor is not None
        array = tensor.numpy()
        return array.astype(self._real(array.dtype))

    def _run(self, graph: ir.Graph, environment: dict[int, Value]) -> list[Value]:
        """Evaluates the nodes of a graph; the environment holds its inputs and what is around."""
        for value in graph.initializers.values():
            if id(value) not in environment:  # not fed
                environment[id(value)] = self._stored(value)
        for node in graph:
            outputs = self._node(node, environment)
            environment.update(
                {id(v): made for v, made in zip(node.outputs, outputs, strict=False)}
            )
        return [environment[id(value)] for value in graph.outputs]

    def _start(self, inputs: list[Value], carried: Sequence[str]) -> list[Value]:
        """Returns the inputs of a recurrent operator, with the states it is to start with."""
        inputs = [*inputs, *[None] * (_STATES["c"] + 1 - len(inputs))]
        for name in carried:
            index = _STATES[name[-1]]
            if name in self._given:
                own, given = inputs[index], tf.convert_to_tensor(self._given[name])
                given = given if own is None else tf.where(self._given[CARRIED], given, own)
                inputs[index] = given
        return inputs

    def _stored(self, value: ir.Value) -> Value:
        if id(value) in self._variables:
            return tf.convert_to_tensor(self._variables[id(value)])
        return self._array(value) if value.uses() or value.is_graph_output() else None

    def _node(self, node: ir.Node, environment: dict[int, Value]) -> Sequence[Value]:
        if node.op_type == "Constant" and id(node.outputs[0]) in self._variables:
            return [self._stored(node.outputs[0])]
        inputs = [None if value is None else environment[id(value)] for value in node.inputs]
        for k in range(len(inputs)):
            override = self._override(node, k)
            inputs[k] = inputs[k] if override is None else override

        def run(graph: ir.Graph, values: Sequence[Value]) -> list[Value]:
            own = {id(v): given for v, given in zip(graph.inputs, values, strict=True)}
            return self._run(graph, {**environment, **own})

        attributes = {name: attr.value for name, attr in node.attributes.items()}
        used = [k for k, v in enumerate(node.outputs) if k == 0 or v.uses() or v.is_graph_output()]
        outputs = used[-1] + 1
        carried = [name for name in _names(node) if name in self.carried]
        if carried:
            outputs = 1 + len(carried)
            inputs = self._start(inputs, carried)
        call = Call(node.op_type, self._opset, attributes, outputs, self._real, run, self.trained)
        operator = self.operators[node.op_type]
        folds = node.op_type not in control.OPERATORS and all(
            value is None or is_known(value) for value in inputs
        )
        try:
            if not folds:
                made = operator(call, *inputs)
                self._ends.update(zip(carried, made[1:] if carried else (), strict=True))
                return made if isinstance(made, (list, tuple)) else [made]
            with tf.init_scope():  # now, not when the traced function runs
                made = operator(call, *inputs)
                made = made if isinstance(made, (list, tuple)) else [made]
                return [np.asarray(value) for value in made]
        except Unsupported as reason:
            raise RnnpruneError(
                f"{node.op_type} '{node.name}' with {reason} {self.cannot}", self.instead
            ) from None
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"TensorFlow cannot evaluate {node.op_type} '{node.name}': {first_line(error)}",
                "check the data against the model's inputs",
            ) from error
