"""A rewrite that is not what was asked for is never handed over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import recurrent_model

from rnnprune_cli import onnx_model
from rnnprune_cli.errors import ExitCode, NotEquivalentError
from rnnprune_cli.rewrite import packed, place
from rnnprune_cli.verify import verify_same


def expect_refusal(prune_model, tmp_path, **options):
    with pytest.raises(NotEquivalentError) as caught:
        prune_model(recurrent_model(hidden=40, inputs=24), 0.8, **options)
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
    monkeypatch.setattr(place, "lazy_tensor", lambda weight, read: right(weight, weight.read))
    expect_refusal(prune_model, tmp_path, export="dense")


def test_a_changed_bias_is_refused(prune_model, tmp_path, monkeypatch):
    right = onnx_model.Placer.clean

    def wrong(self):
        right(self)
        value = self._walker.model.graph.initializers["B"]
        changed = value.const_value.numpy().copy()
        changed[0, 0] += 1e-2
        value.const_value = onnx_model.ir.tensor(changed, name="B")

    monkeypatch.setattr(onnx_model.Placer, "clean", wrong)
    expect_refusal(prune_model, tmp_path, export="dense")


@pytest.mark.parametrize("error", [2e-4, np.nan, np.inf])
def test_differences_beyond_the_tolerance_fail(error):
    a = np.linspace(-1, 1, 50, dtype=np.float32)
    b = a.copy()
    b[10] += error
    assert verify_same("same", [[a]], [[a.copy()]]).passed
    assert not verify_same("same", [[a]], [[b]]).passed
    assert not verify_same("same", [[b]], [[a]]).passed


def test_another_shape_type_or_integer_fails():
    a = np.arange(4, dtype=np.float32)
    assert not verify_same("same", [[a]], [[a[:3]]]).passed
    assert not verify_same("same", [[a]], [[a.astype(np.float64)]]).passed
    assert not verify_same("same", [[np.arange(3)]], [[np.array([0, 1, 3])]]).passed


def test_equal_nans_are_equal():
    a = np.array([1.0, np.nan, np.inf], np.float32)
    assert verify_same("same", [[a]], [[a.copy()]]).passed
