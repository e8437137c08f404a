"""The committed sample models are what their README says, and prune as it promises."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SAMPLES

from rnnprune_cli.load import load

# Metric of the committed file on its test set, and how much worse 50 % by rows may make it.
MODELS = {
    "language.onnx": ("bits-per-char", 2.2041, 0.25),
    "speech.onnx": ("accuracy", 0.9838, 0.02),
    "timeseries.onnx": ("mse", 6.0425, 1.0),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_metric_before_and_after(prune_model, name):
    metric, value, loss = MODELS[name]
    stem = name.removesuffix(".onnx")
    report = prune_model(SAMPLES / name, 0.5, data=SAMPLES / f"{stem}.test.npz")
    before, after = report.before.metric, report.after.metric
    assert before.name == metric
    assert before.value == pytest.approx(value, rel=2e-3)
    worse = before.value - after.value if before.higher_is_better else after.value - before.value
    assert worse <= loss


@pytest.mark.parametrize("name", sorted(MODELS))
def test_report_tells_before_from_after(prune_model, tmp_path, name):
    data = SAMPLES / f"{name.removesuffix('.onnx')}.test.npz"
    report = prune_model(SAMPLES / name, 0.9, data=data, export="packed")
    assert report.fidelity[0].max_abs > 0.1
    assert report.fidelity[0].cosine < 0.999
    assert report.after.metric.value != report.before.metric.value
    assert report.after.gzip_bytes < 0.5 * report.before.gzip_bytes
    assert report.after.bytes < 0.5 * report.before.bytes
    assert report.layers[0].stored == ("packed", "packed")
    made_up = prune_model(SAMPLES / name, 0.9, export="dense", force=True)
    assert made_up.fidelity[0].max_abs > 0.1
    count = load(tmp_path / "out.onnx").count()
    after = (made_up.after.parameters, made_up.after.nonzero)
    assert (count.parameters, count.nonzero) == after


@pytest.mark.parametrize("name", ["language", "speech", "timeseries", "medicine"])
def test_data_hold_no_sample_twice_in_test_and_calibration(name):
    test, calibration = (
        np.load(SAMPLES / f"{name}.{part}.npz") for part in ("test", "calibration")
    )
    assert set(test.files) == set(calibration.files)
    key = next(k for k in test.files if k not in ("labels", "lengths"))
    seen = {sample.tobytes() for sample in test[key]}
    assert not any(sample.tobytes() in seen for sample in calibration[key])


def test_packed_language_model_meets_the_size_bounds(prune_model):
    for sparsity, bound in ((0.7, 0.345), (0.9, 0.14)):
        report = prune_model(SAMPLES / "language.onnx", sparsity, export="packed", force=True)
        dense = 4 * report.before.recurrent_parameters
        rest = report.before.bytes - dense
        assert report.after.bytes - rest <= bound * dense


def test_all_sample_files_stay_small():
    assert sum(p.stat().st_size for p in SAMPLES.rglob("*") if p.is_file()) < 12 << 20
