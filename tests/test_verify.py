"""A rewrite that is not what was asked for is never handed over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import GRAPHS, recurrent_model, two_layers

from rnnprune_cli import onnx_model, verify
from rnnprune_cli.errors import ExitCode, NotEquivalentError
from rnnprune_cli.load import load
from rnnprune_cli.model import GATES, UNCHANGED, ExportOptions, StoredWeight
from rnnprune_cli.rewrite import packed, place
from rnnprune_cli.verify import verify_same, verify_weights


def expect_refusal(prune_model, tmp_path, model=None, **options):
    with pytest.raises(NotEquivalentError) as caught:
        prune_model(model or recurrent_model(hidden=40, inputs=24), 0.8, **options)
    assert caught.value.code == ExitCode.NOT_EQUIVALENT
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_corrupted_packed_value_is_refused(prune_model, tmp_path, monkeypatch):
    right = packed.pack

    def wrong(weight, values, opset):
        form = right(weight, values, opset)
        form.values[7] *= np.float32(1.0001)
        return form

    monkeypatch.setattr(packed, "pack", wrong)
    expect_refusal(prune_model, tmp_path, export="packed")


def test_a_misplaced_position_is_refused(prune_model, tmp_path, monkeypatch):
    right = packed.pack

    def wrong(weight, values, opset):
        form = right(weight, values, opset)
        return dataclasses.replace(form, positions=np.roll(form.positions, 1))

    monkeypatch.setattr(packed, "pack", wrong)
    expect_refusal(prune_model, tmp_path, export="packed")


def test_a_weight_that_was_not_masked_is_refused(prune_model, tmp_path, monkeypatch):
    right = place.lazy_tensor
    monkeypatch.setattr(
        place, "lazy_tensor", lambda weight, read, *more: right(weight, weight.read, *more)
    )
    expect_refusal(prune_model, tmp_path, export="dense")


def change(monkeypatch, name):
    """Lets every rewrite change one value of an initializer that is not to be pruned."""
    right = onnx_model.Placer.clean

    def wrong(self):
        right(self)
        value = self._walker.model.graph.initializers[name]
        changed = value.const_value.numpy().copy()
        changed.reshape(-1)[0] += 2e-2
        value.const_value = onnx_model.ir.tensor(changed, name=name)

    monkeypatch.setattr(onnx_model.Placer, "clean", wrong)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_changed_bias_is_refused(prune_model, tmp_path, monkeypatch, dtype):
    change(monkeypatch, "B")
    model = recurrent_model(hidden=40, inputs=24, dtype=dtype)
    expect_refusal(prune_model, tmp_path, model, export="dense")


@pytest.mark.parametrize("name", ["B", "W2"])
def test_a_change_in_a_big_model_is_refused(prune_model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(onnx_model, "BIG_MODEL_BYTES", 0)
    change(monkeypatch, name)
    expect_refusal(prune_model, tmp_path, two_layers(), exclude=["other"], export="dense")


@pytest.mark.parametrize(
    "graph", ["hand_w_constant_nodes", "hand_w_is_output", "hand_w_torch_chain"]
)
@pytest.mark.parametrize("export", ["dense", "packed", "auto"])
def test_a_big_model_is_verified_one_way_or_the_other(prune_model, monkeypatch, graph, export):
    monkeypatch.setattr(onnx_model, "BIG_MODEL_BYTES", 0)
    report = prune_model(GRAPHS / f"{graph}.onnx", 0.5, export=export)
    assert any("masked model" in c.claim or c.claim == UNCHANGED for c in report.verification)


def test_a_big_model_is_held_against_its_file(prune_model, monkeypatch):
    monkeypatch.setattr(onnx_model, "BIG_MODEL_BYTES", 0)
    report = prune_model(two_layers(), 0.5, exclude=["other"], export="dense")
    assert any(c.claim == UNCHANGED for c in report.verification)


def test_comparing_nothing_proves_nothing():
    assert not verify_same("same", [], []).passed


@pytest.mark.parametrize("error", [2e-4, np.nan, np.inf])
def test_differences_beyond_the_tolerance_fail(error):
    a = np.linspace(-1, 1, 50, dtype=np.float32)
    b = a.copy()
    b[10] += error
    assert verify_same("same", [[a]], [[a.copy()]]).passed
    assert not verify_same("same", [[a]], [[b]]).passed
    assert not verify_same("same", [[b]], [[a]]).passed


def test_small_probabilities_may_differ_by_what_a_sigmoid_is_off():
    small = np.array([1e-3, 2e-3], np.float32)
    assert verify_same("p", [[small]], [[small + np.float32(2e-7)]]).passed
    assert not verify_same("p", [[small]], [[small + np.float32(4e-7)]]).passed
    signed = small * np.float32([1, -1])
    assert not verify_same("no p", [[signed]], [[signed + np.float32(2e-7)]]).passed


def test_another_shape_type_or_integer_fails():
    a = np.arange(4, dtype=np.float32)
    assert not verify_same("same", [[a]], [[a[:3]]]).passed
    assert not verify_same("same", [[a]], [[a.astype(np.float64)]]).passed
    assert not verify_same("same", [[np.arange(3)]], [[np.array([0, 1, 3])]]).passed


def test_equal_nans_are_equal():
    a = np.array([1.0, np.nan, np.inf], np.float32)
    assert verify_same("same", [[a]], [[a.copy()]]).passed


@pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_what_is_left_of_each_gate_is_counted(tmp_path, monkeypatch, op, direction, chunk):
    monkeypatch.setattr(verify, "_CHUNK_ELEMENTS", chunk)
    path = tmp_path / "model.onnx"
    path.write_bytes(recurrent_model(op, direction, hidden=10).SerializeToString())
    model, rng = load(path), np.random.default_rng(0)
    weights = model.layers[0].weights
    pruned = {w.name: StoredWeight(w, rng.random(w.shape) < 0.3) for w in weights}
    (tmp_path / "out").mkdir()
    saved = model.save(pruned, tmp_path / "out", "out.onnx", ExportOptions("dense"), "")
    claim, nonzero = verify_weights(model, saved)
    assert claim.passed
    for weight in weights:
        blocks = np.split(pruned[weight.name](), GATES[op], axis=1)
        assert nonzero[weight.name] == tuple(np.count_nonzero(block) for block in blocks)
        whole = np.split(weight.read(), GATES[op], axis=1)
        assert weight.nonzero_by_gate == tuple(np.count_nonzero(block) for block in whole)
        assert weight.nonzero == np.count_nonzero(weight.read())
