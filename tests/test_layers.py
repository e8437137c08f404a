"""Whole layers that go, and input features that no weight reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Graph, initializers, run, weights

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.methods import methods
from rnnprune_cli.model import GATES, Report, Stage
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune

HIDDEN = 6
LAYER_METHODS = [name for name, method in methods().items() if method.layer is not None]
Remove = Callable[..., Report]


@pytest.fixture
def remove(tmp_path: Path) -> Remove:
    """Removes layers or units; returns the report."""

    def call(
        model: onnx.ModelProto,
        granularity: str = "layer",
        sparsity: float = 0.5,
        method: str = "magnitude",
        data: Path | None = None,
    ) -> Report:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        scope = "global" if granularity == "layer" else "layer"
        options = PruneOptions(
            path,
            tmp_path / "out.onnx",
            (Stage(method, granularity, scope, sparsity),),
            data=data,
            force=True,
            latency_seconds=0.0,
        )
        return prune(options, {}, lambda step: None)

    return call


def samples(folder: Path, features: int) -> Path:
    path = folder / "data.npz"
    x = np.random.default_rng(3).standard_normal((30, 12, features)).astype(np.float32)
    np.savez(path, x=x)
    return path


def stack(
    ops: tuple[str, ...] = ("GRU", "LSTM"),
    direction: str = "forward",
    inputs: int = 5,
    attributes: dict[int, dict[str, object]] | None = None,
) -> onnx.ModelProto:
    """[batch, time, inputs] through layers of one direction or two → [time, batch, 3]."""
    g = Graph(["batch", "time", inputs])
    directions = 2 if direction == "bidirectional" else 1
    x, size = g.op("Transpose", "x", perm=[1, 0, 2]), inputs
    for number, op in enumerate(ops):
        w = weights(op, HIDDEN, size, directions, number)
        more = (attributes or {}).get(number, {})
        y = g.op(op, x, w["W"], w["R"], w["B"], hidden_size=HIDDEN, direction=direction, **more)
        g.nodes[-1].name = f"layer{number}"
        turned = g.op("Transpose", y, perm=[0, 2, 1, 3])
        x, size = g.op("Reshape", turned, np.array([0, 0, -1])), HIDDEN * directions
    head = np.random.default_rng(9).standard_normal((size, 3)).astype(np.float32)
    g.output(g.op("MatMul", x, head))
    return g.model()


def ops_of(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


FEED = {"x": np.random.default_rng(1).standard_normal((2, 7, 5)).astype(np.float32)}


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("method", LAYER_METHODS)
def test_a_linear_map_stands_for_a_layer(remove, tmp_path, method, direction):
    report = remove(stack(direction=direction), method=method, data=samples(tmp_path, 5))
    assert sorted(row.hidden_after for row in report.layers) == [0, HIDDEN]
    assert sum(op in GATES for op in ops_of(tmp_path / "out.onnx")) == 1
    assert all(claim.passed for claim in report.verification)
    (repair,) = report.repairs
    assert repair.samples == 30 * 12
    assert 0 < repair.unexplained < 1


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_a_linear_layer_goes_without_loss(remove, tmp_path, direction):
    affine = ["Affine"] * (2 if direction == "bidirectional" else 1)
    model = stack(
        ("LSTM", "RNN"),
        direction,
        attributes={1: {"activations": affine, "activation_alpha": [1.0] * len(affine)}},
    )
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim == 3 and array.shape[1:] == (HIDDEN, HIDDEN):
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * array, tensor.name))  # the RNN's R
    report = remove(model, method="obs", data=samples(tmp_path, 5))
    assert [row.hidden_after for row in report.layers] == [HIDDEN, 0]
    one, two = run(model, FEED)[0], run(tmp_path / "out.onnx", FEED)[0]
    # The ridge of the least squares, not rounding, sets how close they are.
    np.testing.assert_allclose(two, one, atol=1e-3 * np.abs(one).max())


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_without_data_the_input_stands_for_a_layer(remove, tmp_path, direction):
    model = stack(("GRU", "GRU"), direction)
    report = remove(model)
    assert [row.hidden_after for row in report.layers] == [HIDDEN, 0]
    assert report.repairs == ()
    assert "give --data" in report.layers[0].blocked
    assert report.layers[1].blocked == "removed: its input stands for it"
    alone = stack(("GRU",), direction)
    for tensor in alone.graph.initializer:
        for other in model.graph.initializer:
            is_head = len(tensor.dims) == 2 and tensor.dims[1] == 3
            if is_head and list(tensor.dims) == list(other.dims):
                tensor.raw_data = other.raw_data
    one, two = run(alone, FEED)[0], run(tmp_path / "out.onnx", FEED)[0]
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_a_layer_whose_final_state_is_read_stays(remove):
    model = stack(("GRU", "GRU"))
    for node in model.graph.node:
        if node.op_type == "GRU":
            node.output.append(f"{node.name}_state")
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(node.output[1], 1, [1, "batch", HIDDEN])
            )
    with pytest.raises(RnnpruneError, match="its final state is read"):
        remove(model)


def test_the_only_layer_stays(remove, tmp_path):
    with pytest.raises(RnnpruneError, match="not a single layer") as caught:
        remove(stack(("GRU",)), data=samples(tmp_path, 5))
    assert "one layer has to stay" in caught.value.hint


# Features


def fed_by(kind: str) -> onnx.ModelProto:
    """A GRU that reads 4 of 6 features of an input, a Dense layer, or an Embedding."""
    rng = np.random.default_rng(0)
    if kind == "embedding":
        g = Graph(["batch", "time"])
        g.inputs[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
        x = g.op("Gather", rng.standard_normal((9, 6)).astype(np.float32), "x")
    else:
        g = Graph(["batch", "time", 6 if kind == "input" else 5])
        x = "x"
    if kind == "dense":
        made = g.op("MatMul", "x", rng.standard_normal((5, 6)).astype(np.float32))
        x = g.op("Tanh", g.op("Add", made, rng.standard_normal(6).astype(np.float32)))
    turned = g.op("Transpose", x, perm=[1, 0, 2])
    w = weights("GRU", HIDDEN, 6, 1, 0)
    w["W"][:, :, [1, 4]] = 0
    y = g.op("GRU", turned, w["W"], w["R"], w["B"], hidden_size=HIDDEN)
    flat = g.op("Squeeze", y, np.array([1]))
    g.output(g.op("MatMul", flat, rng.standard_normal((HIDDEN, 3)).astype(np.float32)))
    return g.model()


@pytest.mark.parametrize("kind", ["input", "dense", "embedding"])
def test_features_that_no_weight_reads_go(remove, tmp_path, kind):
    report = remove(fed_by(kind), "unit")
    assert any("2 input features" in warning for warning in report.warnings)
    assert any("no weight reads" in claim.claim for claim in report.verification)
    written = onnx.load(str(tmp_path / "out.onnx"))
    onnx.checker.check_model(written, full_check=True)
    shapes = [array.shape for array in initializers(written).values()]
    assert (1, 3 * HIDDEN // 2, 4) in shapes  # W, half of the units, four features
    if kind == "embedding":
        assert (9, 4) in shapes
    if kind == "dense":
        assert (5, 4) in shapes and (4,) in shapes


def test_features_that_something_else_reads_stay(remove, tmp_path):
    model = fed_by("dense")
    tanh = next(node for node in model.graph.node if node.op_type == "Tanh")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(tanh.output[0], 1, ["batch", "time", 6])
    )
    report = remove(model, "unit")
    assert not any("input features" in warning for warning in report.warnings)
    assert (1, 3 * HIDDEN // 2, 6) in [
        a.shape for a in initializers(tmp_path / "out.onnx").values()
    ]


def test_a_layer_that_no_sample_reaches_stays_and_it_is_said(remove, tmp_path):
    model = stack(("GRU", "LSTM"))
    last = next(node for node in model.graph.node if node.op_type == "LSTM")
    inner = onnx.helper.make_graph(
        [last], "taken", [], [onnx.helper.make_empty_tensor_value_info(last.output[0])]
    )
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Unsqueeze", [last.input[0], "axis"], ["plain"])],
        "plain",
        [],
        [onnx.helper.make_empty_tensor_value_info("plain")],
    )
    chosen = onnx.helper.make_node(
        "If", ["flag"], ["either"], then_branch=inner, else_branch=other, name="either"
    )
    made = last.output[0]
    last.CopyFrom(chosen)
    for node in model.graph.node:
        node.input[:] = ["either" if name == made else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("flag", 9, []))
    path = tmp_path / "data.npz"
    x = np.random.default_rng(3).standard_normal((30, 12, 5)).astype(np.float32)
    np.savez(path, x=x, flag=np.array(False))
    report = remove(model, method="obs", data=path)
    assert [row.hidden_after for row in report.layers] == [0, HIDDEN]
    assert "the data never reach it" in report.layers[1].blocked
