"""The recurrent node tests of the onnx package, with their weights bound as initializers."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rnnprune_cli.load import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package computes infinities on import
    from onnx.backend.test.case.node import collect_testcases

    CASES = {
        case.name: case
        for case in collect_testcases("")
        if [node.op_type for node in case.model.graph.node][:1] in (["LSTM"], ["GRU"], ["RNN"])
    }


def bound(case: object) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]]:
    """The case's model with all inputs but X as initializers, its feed, and its outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    feed = {}
    for value, array in zip(list(model.graph.input), inputs, strict=True):
        if value.name == "X":
            feed["X"] = array
        else:
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
            model.graph.input.remove(value)
    model.ir_version = 8
    return model, feed, outputs


def test_all_of_them_are_here():
    assert len(CASES) == 18
    assert {"test_lstm_batchwise", "test_gru_batchwise"} <= CASES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("export", ["dense", "packed"])
def test_node_case(prune_model, tmp_path, name, sparsity, export):
    model, feed, expected = bound(CASES[name])
    report = prune_model(model, sparsity, export=export)
    assert all(claim.passed for claim in report.verification)
    runner = load(tmp_path / "out.onnx").open()
    results = runner.run(feed)
    if sparsity == 0:
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)
        return
    # Masked by hand: of each row of [W R], the smallest half, earlier ones first.
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    joint = np.concatenate([arrays["W"], arrays["R"]], axis=2)
    total = joint.shape[1] * joint.shape[2] // 2
    ends = np.arange(joint.shape[1] + 1) * total // joint.shape[1]
    for direction in joint:
        for row, count in zip(direction, np.diff(ends), strict=True):
            row[np.argsort(np.abs(row), kind="stable")[:count]] = 0
    columns = arrays["W"].shape[2]
    for tensor in masked.graph.initializer:
        if tensor.name in "WR":
            part = joint[..., :columns] if tensor.name == "W" else joint[..., columns:]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(part), tensor.name))
    path = tmp_path / "masked.onnx"
    path.write_bytes(masked.SerializeToString())
    for result, wanted in zip(results, load(path).open().run(feed), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


def test_batch_first_is_kept_in_the_file(prune_model, tmp_path):
    model, _, _ = bound(CASES["test_lstm_batchwise"])
    report = prune_model(model, 0.5)
    node = next(n for n in onnx.load(str(tmp_path / "out.onnx")).graph.node if n.op_type == "LSTM")
    assert any(a.name == "layout" and a.i == 1 for a in node.attribute)
    assert any("layout=1" in warning for warning in report.warnings)
