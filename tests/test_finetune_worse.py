"""Fine-tuning is never worse than no fine-tuning on the data that validate, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import run
from tuning import inputs, network, stored, tune

from rnnprune_cli.errors import UsageError


def error(model: Path | onnx.ModelProto, x: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error against the original's outputs, as onnxruntime gives them."""
    apart = run(model, {"x": x})[0].astype(np.float64) - wanted
    return float(np.sqrt(np.mean(apart**2) / wanted.astype(np.float64).var()))


@pytest.mark.parametrize("schedule", ["one-shot", "polynomial", "constant"])
@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("lr", [1.0, 1e3])
def test_far_too_high_a_rate_makes_nothing_worse(tmp_path, lr, granularity, schedule):
    if (granularity, schedule) == ("unit", "constant"):
        pytest.skip("units fade away, or go at once")
    model = network()
    x, held = inputs(), inputs(20, seed=9)
    wanted = run(model, {"x": held})[0]
    same = {"granularity": granularity, "calibration": {"x": x}}
    tune(tmp_path, model, None, name="one", **same)
    report = tune(
        tmp_path, model, {"x": x}, validation={"x": held}, epochs=6, lr=lr, batch=4,
        schedule=schedule, **same,
    )  # fmt: skip
    one, out = (error(tmp_path / f"{name}.onnx", held, wanted) for name in ("one", "out"))
    assert np.isfinite(out) and out <= one * (1 + 1e-6)
    log = report.finetune
    assert log.drop == pytest.approx(one, rel=1e-5)
    assert report.after.metrics[0].value == pytest.approx(out, rel=1e-5)
    said = " ".join(report.warnings)
    assert ("found no better weights" in said) == (log.best == 0)
    assert (f"diverged {log.rollbacks} time" in said) == (log.rollbacks > 0)


def test_a_loss_that_is_no_number_is_gone_back_from(tmp_path):
    # Relu has no bound, and at this rate the states overflow within a sequence.
    model = network("RNN")
    (node,) = (n for n in model.graph.node if n.op_type == "RNN")
    node.attribute.append(onnx.helper.make_attribute("activations", ["Relu"]))
    x = {"x": inputs(steps=40)}
    report = tune(tmp_path, model, x, validation=x, epochs=8, lr=1e3, batch=4)
    log = report.finetune
    assert log.rollbacks > 0
    assert any("diverged" in warning and "lower --lr" in warning for warning in report.warnings)
    assert all(np.isfinite(values).all() for values in stored(tmp_path / "out.onnx").values())
    assert np.isfinite(run(tmp_path / "out.onnx", x)[0]).all()
    kept = log.drop if log.best == 0 else log.epochs[log.best - 1].drop
    assert kept <= log.drop


def test_labels_beyond_all_numbers_stop_training_early(tmp_path):
    # Their squared error is infinite in float32.
    arrays = {"x": inputs(), "labels": np.full((48, 6, 3), 1e25)}
    tune(tmp_path, network(), None, name="one", calibration={"x": arrays["x"]})
    report = tune(tmp_path, network(), arrays, validation=arrays, epochs=9, batch=8)
    log = report.finetune
    assert (log.best, log.rollbacks) == (0, 8)
    assert "diverged 8 times" in log.stopped
    said = " ".join(report.warnings)
    assert "found no better weights than those it started with: training diverged 8" in said
    one, out = (stored(tmp_path / f"{name}.onnx") for name in ("one", "out"))
    assert all(np.array_equal(out[name], values) for name, values in one.items())


def test_one_sample_is_enough_if_others_validate(tmp_path):
    one, more = {"x": inputs(1)}, {"x": inputs(7, seed=1)}
    report = tune(tmp_path, network(), one, validation=more, epochs=2)
    assert report.finetune.samples == (1, 7) and report.finetune.steps == 2
    report = tune(tmp_path, network(), more, validation=one, epochs=2, name="other")
    assert report.finetune.samples == (7, 1)
    with pytest.raises(UsageError, match="one sample and cannot be split") as caught:
        tune(tmp_path, network(), one, epochs=1, name="none")
    assert "--validation" in caught.value.hint
    report = tune(tmp_path, network(), {"x": inputs(2)}, epochs=1, name="two")
    assert report.finetune.samples == (1, 1)


def test_validation_data_decide_what_is_kept(tmp_path):
    """Trained towards labels that are wrong, a model is worse on data whose labels are right."""
    model = network()
    x, held = inputs(), inputs(30, seed=9)
    right = run(model, {"x": held})[0] + 0.1  # on which the original has an error, too
    wrong = {"x": x, "labels": np.full((48, 6, 3), -9.0, np.float32)}
    report = tune(
        tmp_path, model, wrong, validation={"x": held, "labels": right}, epochs=3, lr=0.003,
        distill=0.0, batch=8,
    )  # fmt: skip
    assert report.finetune.samples == (48, 30) and report.finetune.best == 0
    losses = [e.loss for e in report.finetune.epochs]
    held_losses = [e.validation_loss for e in report.finetune.epochs]
    assert losses[-1] < losses[0] and held_losses[-1] > held_losses[0]
    report = tune(
        tmp_path, model, wrong, validation=wrong, epochs=3, lr=0.01, distill=0.0, batch=8,
        name="other",
    )  # fmt: skip
    assert report.finetune.best == 3
