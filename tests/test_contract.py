"""Every method on every recurrent variant, scope and export form, through the whole pipeline."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from conftest import initializers, recurrent_model, run, weights

from rnnprune_cli.methods import methods
from rnnprune_cli.model import GATES
from rnnprune_cli.select import SCOPES

DATA_FREE = [name for name, m in methods().items() if m.weight is not None and not m.needs_data]
VARIANTS = [
    (op, direction, bias, reset)
    for op, direction, bias in itertools.product(
        GATES, ("forward", "reverse", "bidirectional"), (True, False)
    )
    for reset in ((0, 1) if op == "GRU" else (0,))
]
FEED = {"x": np.random.default_rng(5).standard_normal((9, 2, 7)).astype(np.float32)}


@pytest.mark.parametrize(("op", "direction", "bias", "reset"), VARIANTS)
@pytest.mark.parametrize("method", DATA_FREE)
def test_pruned_model_equals_masked_model(
    prune_model, tmp_path, method, op, direction, bias, reset
):
    model = recurrent_model(op, direction, bias=bias, linear_before_reset=reset)
    original = initializers(model)
    report = prune_model(model, 0.6, method=method, export="dense")
    written = initializers(tmp_path / "out.onnx")
    for name in ("W", "R"):
        kept = written[name] != 0
        assert np.array_equal(written[name][kept], original[name][kept])
    if bias:
        assert np.array_equal(written["B"], original["B"])
    masked = recurrent_model(op, direction, bias=bias, linear_before_reset=reset, tensors=written)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", FEED)[0], run(masked, FEED)[0])
    row = report.layers[0]
    joint = np.concatenate([written["W"], written["R"]], axis=2)
    assert np.all(np.abs((joint == 0).sum(axis=2) - 0.6 * joint.shape[2]) < 1)
    assert row.nonzero_after == np.count_nonzero(joint) == report.after.recurrent_nonzero
    assert row.sparsity == pytest.approx(0.6, abs=1 / joint.shape[2])
    assert all(claim.passed and claim.max_abs == 0 for claim in report.verification)


@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("export", ["dense", "sparse", "packed", "auto"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_every_export_runs_and_is_valid(prune_model, tmp_path, op, export, scope):
    model = recurrent_model(op, "bidirectional", hidden=40, inputs=24)
    report = prune_model(model, 0.85, scope=scope, export=export)
    dense = tmp_path / "dense.onnx"
    prune_model(model, 0.85, scope=scope, export="dense", output=dense)
    feed = {"x": np.random.default_rng(5).standard_normal((9, 2, 24)).astype(np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", feed)[0], run(dense, feed)[0])
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    if export != "dense":
        assert report.after.bytes < dense.stat().st_size


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_rounded_values_are_what_was_asked_for(prune_model, tmp_path, op, values):
    report = prune_model(recurrent_model(op, hidden=32), 0.5, values=values)
    assert all(claim.passed for claim in report.verification)
    exact = prune_model(
        recurrent_model(op, hidden=32), 0.5, export="packed", output=tmp_path / "exact.onnx"
    )
    assert report.after.bytes < exact.after.bytes


def test_same_input_and_seed_give_the_same_bytes(prune_model, tmp_path):
    for method in DATA_FREE:
        outputs = []
        for name in ("one.onnx", "two.onnx"):
            prune_model(
                recurrent_model(), 0.7, method=method, seed=3, output=tmp_path / f"{method}.{name}"
            )
            outputs.append((tmp_path / f"{method}.{name}").read_bytes())
        assert outputs[0] == outputs[1]


def test_another_seed_gives_another_random_mask(prune_model, tmp_path):
    written = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.onnx"
        prune_model(recurrent_model(), 0.5, method="random", seed=seed, export="dense", output=path)
        written.append(initializers(path)["R"])
    assert not np.array_equal(written[0], written[1])


def test_sparsity_zero_changes_nothing_and_says_so(prune_model, tmp_path):
    model = recurrent_model()
    report = prune_model(model, 0.0, export="dense")
    assert any("removes nothing" in w for w in report.warnings)
    for name, values in initializers(model).items():
        assert np.array_equal(initializers(tmp_path / "out.onnx")[name], values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("export", ["dense", "packed"])
def test_every_precision_stays_what_it_is(prune_model, tmp_path, dtype, export):
    tensors = weights("LSTM", 40, 24, 1, 0, dtype)
    model = recurrent_model(hidden=40, inputs=24, dtype=dtype, tensors=tensors, opset=18)
    report = prune_model(model, 0.8, export=export)
    assert all(claim.passed for claim in report.verification)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.graph.input[0].type == model.graph.input[0].type
    if export == "dense":
        assert initializers(written)["W"].dtype == dtype


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (8, 4), (9, 4), (11, 6), (14, 7), (18, 8), (22, 10), (24, 11)]
)
@pytest.mark.parametrize("export", ["dense", "sparse", "packed"])
def test_every_opset_is_kept(prune_model, tmp_path, opset, ir_version, export):
    model = recurrent_model(hidden=40, inputs=24, opset=opset, ir_version=ir_version)
    if ir_version < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    report = prune_model(model, 0.8, export=export)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.opset_import[0].version == opset
    assert written.ir_version == ir_version
    assert report.model.opset == opset
    if export == "sparse" and opset < 11:
        assert any("is not stored sparse" in w for w in report.warnings)
    if export == "packed" and opset == 7:
        assert any("has no constants" in w for w in report.warnings)


def test_everything_else_of_the_model_is_kept(prune_model, tmp_path):
    model = recurrent_model()
    prune_model(model, 0.5)
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert written.producer_name == "tests"
    assert written.graph.name == "graph"
    assert written.graph.doc_string == "a graph"
    assert list(written.graph.input) == list(model.graph.input)
    assert list(written.graph.output) == list(model.graph.output)
    assert not written.graph.value_info
    props = {p.key: p.value for p in written.metadata_props}
    assert props["owner"] == "tests"
    assert '"sparsity": 0.5' in props["rnnprune"]


def test_pruned_model_can_be_pruned_again(prune_model, tmp_path):
    model = recurrent_model(hidden=40, inputs=24)
    prune_model(model, 0.6, export="packed", output=tmp_path / "first.onnx")
    report = prune_model(tmp_path / "first.onnx", 0.9, export="packed")
    assert report.layers[0].sparsity == pytest.approx(0.9, abs=0.01)
    assert report.ratios.nonzero < 0.32


def test_values_that_are_not_rounded_are_named(prune_model):
    report = prune_model(recurrent_model(hidden=3, inputs=2), 0.5, values="int8")
    assert report.layers[0].stored == ("dense", "dense")
    assert any("not rounded" in warning for warning in report.warnings)
