"""Converts a signature to ONNX, in process, through tf2onnx."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import onnx

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.tensorflow.canonical import canonicalize
from rnnprune_cli.tensorflow.runtime import (
    DAMAGED,
    Program,
    first_line,
    import_tensorflow,
    quiet,
)

_HINT = "prune single weights where they are: an output of the input's format, --granularity weight"


class _Errors(logging.Handler):
    """Keeps what the converter logs as errors; it goes on after most of them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the message of a record."""
        self.messages.append(record.getMessage())


def convert(path: Path, program: Program, stateful: bool, opset: int) -> onnx.ModelProto:
    """Converts a signature of a loaded SavedModel.

    Args:
        path: The model, for messages.
        program: The signature.
        stateful: Whether a call changes variables, which ONNX cannot express.
        opset: Version of the default operator set.

    Returns:
        A model whose inputs and outputs have the names of the signature.

    Raises:
        RnnpruneError: If the model cannot be converted, with the first reason.
    """
    if stateful:
        raise RnnpruneError(
            f"{path}: cannot become ONNX: a call changes variables (a stateful layer)",
            "make the states inputs and outputs of the model, or " + _HINT,
        )
    tf = import_tensorflow()
    errors = _Errors()
    logger = logging.getLogger("tf2onnx")
    try:
        with quiet():
            from tf2onnx.convert import from_function
    except ImportError as error:
        raise RnnpruneError(
            f"conversion to ONNX needs the tf2onnx package ({first_line(error)})",
            'pip install "rnnprune[tensorflow]"',
        ) from error
    # The converter logs to the console through handlers of its own module and of the root.
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.ERROR)
    logger.propagate, logger.handlers = False, [errors]
    model: onnx.ModelProto
    try:
        with quiet():
            call, specs = _callable(tf, program)
            model, _ = from_function(call, input_signature=specs, opset=opset)
    except (*DAMAGED, tf.errors.OpError) as error:
        reason = first_line(errors.messages[0] if errors.messages else error)
        raise RnnpruneError(f"{path}: cannot become ONNX: {reason}", _HINT) from error
    finally:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers
    unknown = _unknown_operators(model)
    if unknown:
        raise RnnpruneError(
            f"{path}: cannot become ONNX: no equivalent of {', '.join(unknown)}", _HINT
        )
    _check_names(path, model, program)
    canonicalize(model)
    return model


def _callable(tf: Any, program: Program) -> tuple[Any, list[Any]]:  # noqa: ANN401
    """Wraps the signature in what the converter takes: positional inputs in a fixed order."""
    keywords = program.function.structured_input_signature[1]
    names = list(keywords)
    specs = [tf.TensorSpec(keywords[name].shape, keywords[name].dtype, name) for name in names]

    @tf.function(input_signature=specs, autograph=False)  # type: ignore[untyped-decorator]
    def call(*inputs: Any) -> Any:  # noqa: ANN401
        return program.function(**dict(zip(names, inputs, strict=True)))

    return call, specs


def _unknown_operators(model: onnx.ModelProto) -> list[str]:
    """Operators that the converter left as TensorFlow's, most frequent first."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    counts: collections.Counter[str] = collections.Counter()
    pending = [model.graph]
    while pending:
        for node in pending.pop().node:
            if not onnx.defs.has(node.op_type, versions.get(node.domain, 0), node.domain):
                counts[node.op_type] += 1
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
    return [name for name, _ in counts.most_common(5)]


def _check_names(path: Path, model: onnx.ModelProto, program: Program) -> None:
    """Checks that inputs and outputs kept the names of the signature."""
    expected = (
        list(program.function.structured_input_signature[1]),
        list(program.function.structured_outputs),
    )
    found = ([v.name for v in model.graph.input], [v.name for v in model.graph.output])
    for kind, wanted, got in zip(("inputs", "outputs"), expected, found, strict=True):
        if sorted(wanted) != sorted(got):
            raise RnnpruneError(
                f"{path}: cannot become ONNX: its {kind} {', '.join(wanted)} became "
                f"{', '.join(got) or 'none'}",
                _HINT,
            )
