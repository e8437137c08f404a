"""Small models built with onnx alone, and helpers that every test shares."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli.model import GATES, ExportOptions, Report, Stage
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune

GRAPHS = Path(__file__).parent / "graphs"
SAMPLES = Path(__file__).parent.parent / "sample_models"


def weights(
    op: str, hidden: int, inputs: int, directions: int, seed: int, dtype: type = np.float32
) -> dict[str, np.ndarray]:
    """Seeded W, R, B of one recurrent operator, in ONNX layout."""
    rng = np.random.default_rng(seed)
    rows = GATES[op] * hidden
    shapes = {
        "W": (directions, rows, inputs),
        "R": (directions, rows, hidden),
        "B": (directions, 2 * rows),
    }
    return {k: (0.4 * rng.standard_normal(s)).astype(dtype) for k, s in shapes.items()}


def recurrent_model(
    op: str = "LSTM",
    direction: str = "forward",
    hidden: int = 12,
    inputs: int = 7,
    bias: bool = True,
    linear_before_reset: int = 0,
    opset: int = 17,
    ir_version: int = 8,
    seed: int = 0,
    dtype: type = np.float32,
    tensors: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """One recurrent operator, x [steps, batch, inputs] → y, with its weights as initializers."""
    directions = 2 if direction == "bidirectional" else 1
    values = tensors or weights(op, hidden, inputs, directions, seed, dtype)
    attributes: dict[str, object] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU" and linear_before_reset:
        attributes["linear_before_reset"] = 1
    names = ["x", "W", "R", *(["B"] if bias else [])]
    node = helper.make_node(op, names, ["y"], name="rnn", **attributes)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    initializers = [numpy_helper.from_array(values[n], n) for n in names[1:]]
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", elem, ["steps", "batch", inputs])],
        [helper.make_tensor_value_info("y", elem, ["steps", directions, "batch", hidden])],
        initializers,
        doc_string="a graph",
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="tests",
    )
    helper.set_model_props(model, {"owner": "tests"})
    return model


def two_layers(share_r: bool = False, copy: bool = False) -> onnx.ModelProto:
    """Two LSTMs on the same input; the second may share R or hold an equal copy of everything."""
    model = recurrent_model()
    second = weights("LSTM", 12, 7, 1, seed=0 if copy else 1)
    node = onnx.NodeProto()
    node.CopyFrom(model.graph.node[0])
    node.name = "other"
    node.input[:] = ["x", "W2", "R" if share_r else "R2", "B2"]
    node.output[:] = ["y2"]
    model.graph.node.append(node)
    for name in ("W", "B") if share_r else ("W", "R", "B"):
        model.graph.initializer.append(numpy_helper.from_array(second[name], f"{name}2"))
    output = onnx.ValueInfoProto()
    output.CopyFrom(model.graph.output[0])
    output.name = "y2"
    model.graph.output.append(output)
    return model


def run(model: onnx.ModelProto | Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a model with onnxruntime."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feed)


def initializers(model: onnx.ModelProto | Path) -> dict[str, np.ndarray]:
    """The dense initializers of a model's main graph."""
    proto = onnx.load(str(model)) if isinstance(model, Path) else model
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


class Graph:
    """A graph of float32 x in the making; arrays among a node's inputs become initializers."""

    def __init__(self, shape: Sequence[str | int], opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", 1, list(shape))]
        self.outputs: list[onnx.ValueInfoProto] = []

    def name(self, value: str | np.ndarray | None) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def op(
        self, kind: str, *values: str | np.ndarray | None, outs: int = 1, **attributes: object
    ) -> str:
        """Adds a node; returns the first of its outputs."""
        names = [self.name(v) for v in values]
        made = [f"v{len(self.nodes)}_{k}" for k in range(outs)]
        self.nodes.append(
            helper.make_node(kind, names, made, name=f"n{len(self.nodes)}", **attributes)
        )
        return made[0]

    def output(self, value: str) -> None:
        self.outputs.append(helper.make_empty_tensor_value_info(value))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.tensors)
        opset = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for own, known in zip(model.graph.output, inferred.graph.output, strict=True):
            own.CopyFrom(known)
        return model


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    """Collecting garbage, as every model does, need not look at all that was imported."""
    gc.collect()
    gc.freeze()


Prune = Callable[..., Report]


@pytest.fixture
def prune_model(tmp_path: Path) -> Prune:
    """Prunes a model without spending time on timing; returns the report."""

    def call(
        model: onnx.ModelProto | Path,
        sparsity: float = 0.5,
        *,
        output: Path | None = None,
        method: str = "magnitude",
        granularity: str = "weight",
        scope: str = "row",
        export: str = "auto",
        values: str = "float32",
        layers: Sequence[str] = (),
        exclude: Sequence[str] = (),
        data: Path | None = None,
        calibration: Path | None = None,
        compensate: bool = True,
        seed: int = 0,
        force: bool = False,
        signature: str | None = None,
        metric: str = "auto",
        include: Sequence[str] = (),
    ) -> Report:
        if isinstance(model, onnx.ModelProto):
            path = tmp_path / "model.onnx"
            path.write_bytes(model.SerializeToString())
        else:
            path = model
        options = PruneOptions(
            model=path,
            output=output or tmp_path / "out.onnx",
            stages=(
                Stage(
                    method,
                    granularity,
                    scope,
                    sparsity,
                    tuple(layers),
                    tuple(exclude),
                    compensate,
                    include=tuple(include),
                ),
            ),
            seed=seed,
            data=data,
            calibration=calibration,
            metric=metric,
            export=ExportOptions(export, values),
            signature=signature,
            force=force,
            latency_seconds=0.0,
        )
        return prune(options, {}, lambda step: None)

    return call


__all__ = ["GRAPHS", "SAMPLES", "TensorProto", "initializers", "recurrent_model", "run", "weights"]
