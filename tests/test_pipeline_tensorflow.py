"""The whole pipeline on a SavedModel: in place, converted, and refused."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SAMPLES, run

from rnnprune_cli.errors import UsageError
from rnnprune_cli.load import load

pytest.importorskip("tensorflow")

MEDICINE = SAMPLES / "medicine"
DATA = SAMPLES / "medicine.test.npz"


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_savedmodel_is_pruned_in_place(prune_model, tmp_path):
    before = files(MEDICINE)
    report = prune_model(MEDICINE, 0.5, output=tmp_path / "out", data=DATA)
    assert files(MEDICINE) == before
    assert files(tmp_path / "out")["saved_model.pb"] == before["saved_model.pb"]
    assert report.before.metric.value == pytest.approx(0.987, abs=0.002)
    assert report.after.metric.value > 0.93
    assert all(claim.passed and claim.max_abs == 0 for claim in report.verification)
    again = load(tmp_path / "out")
    for layer in again.layers:
        joint = np.concatenate([w.read() for w in layer.weights], axis=2)
        assert np.all(np.abs((joint == 0).sum(axis=2) - 0.5 * joint.shape[2]) < 1)


def test_a_savedmodel_becomes_onnx_with_the_same_masks(prune_model, tmp_path):
    report = prune_model(MEDICINE, 0.5, output=tmp_path / "out.onnx", data=DATA)
    assert report.model.format == "savedmodel"
    assert report.output.format == "onnx"
    assert any("converted" in claim.claim for claim in report.verification)
    prune_model(MEDICINE, 0.5, output=tmp_path / "out", data=DATA)
    in_place = load(tmp_path / "out").open()
    feed = {n: a[:4] for n, a in np.load(DATA).items() if n in [s.name for s in in_place.inputs]}
    np.testing.assert_allclose(
        run(tmp_path / "out.onnx", feed)[0], in_place.run(feed)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "options", [{"export": "packed"}, {"export": "sparse"}, {"values": "int8"}]
)
def test_what_a_savedmodel_cannot_hold_is_refused(prune_model, tmp_path, options):
    with pytest.raises(UsageError) as caught:
        prune_model(MEDICINE, 0.5, output=tmp_path / "out", **options)
    assert ".onnx" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_missing_signature_names_the_closest(prune_model, tmp_path):
    with pytest.raises(UsageError) as caught:
        prune_model(MEDICINE, 0.5, output=tmp_path / "out", signature="serving_defualt")
    assert "'serving_default'" in caught.value.hint


def test_a_full_directory_is_not_replaced(prune_model, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no SavedModel"):
        prune_model(MEDICINE, 0.5, output=folder, force=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_an_older_savedmodel_is_replaced_by_force(prune_model, tmp_path):
    for sparsity in (0.5, 0.8):
        prune_model(MEDICINE, sparsity, output=tmp_path / "out", force=True)
    layer = load(tmp_path / "out").layers[0]
    assert np.count_nonzero(layer.r.read()) / layer.r.size < 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_same_input_gives_the_same_bytes(prune_model, tmp_path):
    for name in ("one", "two"):
        prune_model(MEDICINE, 0.7, output=tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
