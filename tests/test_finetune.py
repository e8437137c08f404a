"""Fine-tuning: what is removed stays removed, and nothing gets worse."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, Graph, run, two_layers, weights
from onnx import helper, numpy_helper
from tuning import HIDDEN, INPUTS, inputs, network, recurrent, stored, tune

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Report

HELD = 5
"""Of 48 samples a tenth validates."""
VARIANTS = [
    (op, reset, direction)
    for op, reset in (("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0))
    for direction in ("forward", "reverse", "bidirectional")
]
PATTERNS = ("weight", "block:4x1", "bank:8", "nm:2:4", "unit")
CASES = [
    (variant, PATTERNS[(k + 2 * m) % len(PATTERNS)])
    for m in range(2)
    for k, variant in enumerate(VARIANTS)
]


def share(granularity: str) -> float | None:
    return None if granularity == "nm:2:4" else 0.5


@pytest.mark.parametrize(("variant", "granularity"), CASES, ids=str)
def test_removed_weights_stay_exactly_zero_and_others_learn(tmp_path, variant, granularity):
    op, reset, direction = variant
    model = network(op, direction, reset=reset)
    x = {"x": inputs()}
    same = {"granularity": granularity, "sparsity": share(granularity), "compensate": False}
    tune(tmp_path, model, None, name="one", **same)
    report = tune(tmp_path, model, x, validation=x, epochs=2, lr=0.01, batch=8, **same)
    assert report.finetune.best > 0
    assert all(claim.passed for claim in report.verification)
    (before,), (after,) = (recurrent(tmp_path / f"{name}.onnx") for name in ("one", "out"))
    for name, values in after.items():
        kept = before[name] != 0
        assert np.array_equal(values != 0, kept)
        assert np.mean(values[kept] != before[name][kept]) > 0.9
    (row,) = report.layers
    zeros = sum(int((after[name] == 0).sum()) for name in "WR")
    sizes = sum(after[name].size for name in "WR")
    if granularity == "unit":
        assert zeros == 0 and row.hidden_after == after["R"].shape[2] == HIDDEN // 2
    else:
        assert zeros == sizes // 2 and row.nonzero_after == sizes - zeros
        assert row.sparsity == 0.5
        assert [e.sparsity for e in report.finetune.epochs] == [0.5, 0.5]
