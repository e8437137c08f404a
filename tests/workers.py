"""Fine-tunes tiny models by one strategy, one after another; run as a process by test_strategy.

Usage: python workers.py FOLDER STRATEGY [DEVICES]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from conftest import recurrent_model
from tuning import INPUTS, inputs, network, tune

from rnnprune_cli.errors import HelpedError
from rnnprune_cli.tensorflow.runtime import import_tensorflow

COUNT = 43
"""Samples; the last batches are smaller than others, and cannot be dealt out evenly."""


def lengths(count: int) -> np.ndarray:
    """Of sequences with up to six steps."""
    return np.random.default_rng(8).integers(2, 7, count)


def padded(count: int) -> dict[str, np.ndarray]:
    """Sequences of different lengths."""
    own = lengths(count)
    own[0] = 6
    x = inputs(count) * (np.arange(6)[None, :, None] < own[:, None, None])
    return {"x": x, "lengths": own}


def classes(count: int) -> dict[str, np.ndarray]:
    """Sequences with a class each."""
    return {"x": inputs(count), "labels": inputs(count)[:, 0, :3].argmax(-1)}


def cases() -> dict[str, dict[str, Any]]:
    """Name → what to give to :func:`tune`."""
    x = {"x": inputs(COUNT)}
    gru, told = network("GRU", reset=1), network(lengths=True)
    steps_first = recurrent_model(hidden=8, inputs=INPUTS)
    return {
        "units": {"model": network(), "train": x, "granularity": "unit", "schedule": "polynomial"},
        "masks": {"model": gru, "train": x, "schedule": "polynomial", "epochs": 4},
        "classes": {"model": network(last=True), "train": classes(COUNT), "epochs": 3},
        "by length": {"model": gru, "train": padded(COUNT), "batch": 5},
        "cut": {"model": told, "train": padded(COUNT), "bptt": 4, "noise": 0.1},
        "one by one": {"model": steps_first, "train": {"x": inputs(COUNT)[:, :, None]}},
        "double": {"model": network(dtype=np.float64), "train": {"x": inputs(COUNT).astype(float)}},
        "diverging": {"model": network(), "train": x, "lr": 30.0, "epochs": 4},
    }


def main() -> None:
    folder, strategy, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = import_tensorflow().config
    if devices > 1:
        one = config.list_physical_devices("CPU")[0]
        each = config.LogicalDeviceConfiguration()
        config.set_logical_device_configuration(one, [each] * devices)
    found: dict[str, Any] = {}
    for name, case in cases().items():
        same = {"epochs": 2, "lr": 0.01, "batch": 8, "compensate": False, "strategy": strategy}
        try:
            report = tune(folder, **{**same, **case}, name=name)
        except HelpedError as error:
            found[name] = error.message
        else:
            log = report.finetune
            assert log is not None
            losses = [[e.loss, e.validation_loss, e.drop] for e in log.epochs]
            found[name] = {"best": log.best, "losses": losses, "rollbacks": log.rollbacks}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
