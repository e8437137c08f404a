"""Imports TensorFlow quietly, loads SavedModels and runs their signatures."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import Array, Feed, Runner, TensorSpec
from rnnprune_cli.tensorflow.recurrence import Findings, Matrix, find_recurrences
from rnnprune_cli.tensorflow.safety import check_signature, check_stored

DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
)
"""What TensorFlow's and Keras's readers raise on files that are damaged or too new, beside
``tf.errors.OpError``; these readers document no error type."""

_NO_GIST = ("Graph execution error:", "Detected at node", "<stack traces", "[[{{", "[[", 'File "')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what native code writes to stderr away from the user.

    TensorFlow's C++ logs a few lines before its log level can be set, so that only redirecting the
    file descriptor keeps them out.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def import_tensorflow() -> Any:  # noqa: ANN401  untyped module
    """Imports TensorFlow, silent and without looking for GPUs unless the user chose one.

    Raises:
        RnnpruneError: If it is not installed or does not start.
    """
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        with quiet():
            import tensorflow as tf
            from absl import logging  # type: ignore[import-untyped]
    except ImportError as error:
        raise RnnpruneError(
            f"TensorFlow models need the tensorflow package ({first_line(error)})",
            'pip install "rnnprune[tensorflow]"',
        ) from error
    logging.set_verbosity(logging.FATAL)
    tf.get_logger().setLevel("CRITICAL")
    return tf


def set_threads(threads: int) -> str | None:
    """Sets how many threads TensorFlow uses; it can be told only before its first operation.

    Args:
        threads: Number of threads; 0 lets TensorFlow decide.

    Returns:
        A warning if TensorFlow already runs with another number.
    """
    config = import_tensorflow().config.threading
    try:
        config.set_intra_op_parallelism_threads(threads)
        config.set_inter_op_parallelism_threads(threads)
    except RuntimeError:
        running = config.get_intra_op_parallelism_threads()
        if running != threads:
            return (
                f"TensorFlow already runs with {running or 'all'} threads in this process, "
                f"not with {threads or 'all'}"
            )
    return None


def first_line(error: BaseException | str) -> str:
    """The gist of an exception in one plain line of at most 200 characters.

    TensorFlow puts headings and the place in the graph around what has happened.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NO_GIST)]
    text = telling[0] if telling else type(error).__name__
    text = re.sub(r"\s*\[Op:\w+\].*", "", " ".join(text.split()))
    # A damaged file can put anything into the message, even what no terminal can show.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 200 else text[:199] + "…"


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type holds real numbers; NumPy does not know bfloat16 for what it is."""
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, eq=False)
class Program:
    """A signature of a loaded SavedModel.

    Attributes:
        root: The loaded object; it keeps the variables alive.
        function: The concrete function of the signature.
        signature: Its name.
        variables: The variable behind each captured input; None where it is none.
    """

    root: Any
    function: Any
    signature: str
    variables: tuple[Any | None, ...]

    @classmethod
    def load(cls, path: Path, signature: str | None, label: Path) -> Program:
        """Loads a SavedModel; runs none of the Python code that may have made it.

        Args:
            path: The SavedModel directory.
            signature: Name of the signature; None for ``serving_default`` or the only one.
            label: What the user named, for messages.

        Raises:
            RnnpruneError: If the model cannot be loaded, has no signature, or could touch files or
                run code.
            UsageError: If the signature does not exist, or is needed and was not given.
        """
        tf = import_tensorflow()
        check_stored(path, label)
        try:
            with quiet():
                root = tf.saved_model.load(str(path))
        except (*DAMAGED, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"{label}: TensorFlow cannot load it: {first_line(error)}",
                "check that the copy is complete and was not made by a newer TensorFlow",
            ) from error
        signatures = getattr(root, "signatures", {})
        name = _choose_signature(label, list(signatures), signature)
        function = signatures[name]
        check_signature(label, name, function.graph.as_graph_def())
        handles = {id(variable.handle): variable for variable in function.variables}
        captured = tuple(handles.get(id(handle)) for handle in function.captured_inputs)
        return cls(root, function, name, captured)

    def matrices(self) -> list[Matrix | None]:
        """Describes each captured input; one variable captured twice gives equal entries."""
        first: dict[int, int] = {}
        found: list[Matrix | None] = []
        pairs = zip(self.variables, self.function.captured_inputs, strict=True)
        for position, (variable, captured) in enumerate(pairs):
            if variable is not None:
                position = first.setdefault(id(variable), position)
                shape = tuple(variable.shape) if variable.shape.rank is not None else ()
                found.append(Matrix(variable.name.split(":")[0], shape, position))
            elif captured.dtype.is_floating:
                found.append(Matrix(captured.name.split(":")[0], tuple(captured.shape), None))
            else:
                found.append(None)
        return found

    def analyse(self) -> Findings:
        """Searches the graph for recurrent layers.

        Raises:
            RnnpruneError: If its functions are nested beyond reason.
        """
        inputs = [tensor.name.split(":")[0] for tensor in self.function.inputs]
        captures = inputs[len(inputs) - len(self.variables) :]
        own = inputs[: len(inputs) - len(self.variables)]
        graph = self.function.graph.as_graph_def()
        try:
            return find_recurrences(graph, own, list(zip(captures, self.matrices(), strict=True)))
        except RecursionError as error:
            raise RnnpruneError(
                f"the functions of the signature '{self.signature}' call one another too deeply",
                "save the model again without recursive functions",
            ) from error

    def name(self, capture: int) -> str:
        """Name of a captured variable."""
        return str(self._variable(capture).name)

    def values(self, capture: int) -> Array:
        """Current value of a captured variable."""
        return np.asarray(self._variable(capture).numpy())

    def assign(self, capture: int, value: Array) -> None:
        """Gives a captured variable another value of the same shape."""
        self._variable(capture).assign(value)

    def _variable(self, capture: int) -> Any:  # noqa: ANN401
        variable = self.variables[capture]
        if variable is None:
            raise KeyError(capture)
        return variable


def _choose_signature(path: Path, names: Sequence[str], wanted: str | None) -> str:
    """Picks the signature to work on."""
    if not names:
        raise RnnpruneError(
            f"{path}: the SavedModel has no signatures, so there is nothing to call",
            "save it again with signatures=…, or with model.export(…) in Keras",
        )
    if wanted is not None:
        if wanted not in names:
            raise UsageError(f"{path}: no signature '{wanted}'", closest(wanted, names))
        return wanted
    if "serving_default" in names:
        return "serving_default"
    if len(names) == 1:
        return names[0]
    raise UsageError(
        f"{path}: the SavedModel has several signatures: {', '.join(names)}",
        "choose one with --signature",
    )


class TensorFlowRunner(Runner):
    """Runs a signature.

    Args:
        program: The loaded signature.
        assigned: Captures that a call changes; :meth:`reset` restores them.
        ranges: Placeholder of an input → number of valid values, where it is an index.
    """

    def __init__(
        self, program: Program, assigned: frozenset[int], ranges: Mapping[str, int]
    ) -> None:
        self._tf = import_tensorflow()
        self._function = program.function
        self._states = [
            (variable, self._tf.identity(variable))
            for capture in sorted(assigned)
            if (variable := program.variables[capture]) is not None
        ]
        batch = self._batch()
        # The keyword is what a caller uses; the placeholder, after which ranges are named, may
        # have a name of its own.
        keywords = self._function.structured_input_signature[1]
        self.inputs = tuple(
            _spec(name, spec, ranges.get(name, ranges.get(spec.name, 0)), batch)
            for name, spec in keywords.items()
        )
        self.outputs = tuple(
            _spec(name, spec) for name, spec in self._function.structured_outputs.items()
        )
        self._names = tuple(spec.name for spec in self.outputs)

    def _batch(self) -> int | None:
        """The batch size that stored states prescribe; the signature itself may leave it open."""
        sizes = {
            variable.shape[0]
            for variable, _ in self._states
            if variable.dtype.is_floating and variable.shape.rank == 2
        }
        return sizes.pop() if len(sizes) == 1 else None

    def run(self, feed: Feed) -> list[Array]:
        """Runs the signature once.

        Args:
            feed: An array for each input, under its keyword.

        Returns:
            The outputs, in the order of :attr:`outputs`.

        Raises:
            RnnpruneError: If TensorFlow rejects the feed or fails.
        """
        constant = self._tf.constant
        try:
            results = self._function(**{name: constant(array) for name, array in feed.items()})
            return [results[name].numpy() for name in self._names]
        except (self._tf.errors.OpError, TypeError, ValueError) as error:
            names = {spec.name for spec in self.inputs}
            reason = first_line(error)
            if names != set(feed):
                wrong = [f"no value for {name}" for name in sorted(names - set(feed))]
                wrong += [f"no input {name}" for name in sorted(set(feed) - names)]
                reason = ", ".join(wrong)
            expected = ", ".join(f"{s.name} {s.dtype} {_shown(s.shape)}" for s in self.inputs)
            raise RnnpruneError(
                f"TensorFlow cannot run the model on this input: {reason}",
                f"the inputs are: {expected}",
            ) from error

    def reset(self) -> None:
        """Restores the variables that the calls have changed."""
        for variable, initial in self._states:
            variable.assign(initial)


def _spec(name: str, spec: Any, rows: int = 0, batch: int | None = None) -> TensorSpec:  # noqa: ANN401
    """Describes an input or output.

    Args:
        name: Its keyword.
        spec: ``tf.TensorSpec``.
        rows: Number of valid values of an index; 0 if it is none.
        batch: Size of the first axis, where the specification leaves it open.
    """
    shape = None if spec.shape.rank is None else tuple(spec.shape.as_list())
    if shape and shape[0] is None:
        shape = (batch, *shape[1:])
    dtype = np.dtype(spec.dtype.as_numpy_dtype)
    if not rows or dtype.kind not in "iu":
        return TensorSpec(name, dtype, shape)
    return TensorSpec(name, dtype, shape, minimum=0, maximum=rows - 1)


def _shown(shape: tuple[int | str | None, ...] | None) -> str:
    if shape is None:
        return "[…]"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
