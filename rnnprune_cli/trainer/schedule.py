"""When masks become tighter: the schedules of the TensorFlow Model Optimization toolkit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.trainer.call import tf

SHARE = 0.5
"""Part of all updates after which the final sparsity is reached; the rest recovers from it."""
CHANGES = 10
"""How often masks change on the way."""


def polynomial(final: float) -> Callable[[int, int], float | None]:
    """Sparsity rises from 0, fast at first (Zhu and Gupta 2017, arXiv:1710.01878)."""

    def make(updates: int) -> tuple[Callable[[int], tuple[bool, float]], int]:
        every = max(1, round(updates * SHARE / CHANGES))
        end = every * min(CHANGES, max(1, updates // every))
        pruning = _toolkit().PolynomialDecay(0.0, final, 0, end, frequency=every)
        return _told(pruning), end

    return _sparsity_at(make, final)


def constant(final: float) -> Callable[[int, int], float | None]:
    """All at once, when training has gone on for a tenth of its time."""

    def make(updates: int) -> tuple[Callable[[int], tuple[bool, float]], int]:
        begin = max(1, updates // 10)
        pruning = _toolkit().ConstantSparsity(final, begin, begin, frequency=1)
        return _told(pruning), begin

    return _sparsity_at(make, final)


SCHEDULES = {"polynomial": polynomial, "constant": constant}


def _sparsity_at(
    make: Callable[[int], tuple[Callable[[int], tuple[bool, float]], int]], final: float
) -> Callable[[int, int], float | None]:
    made: dict[int, tuple[Callable[[int], tuple[bool, float]], int]] = {}

    def sparsity(update: int, updates: int) -> float | None:
        told, end = made[updates] if updates in made else made.setdefault(updates, make(updates))
        if update >= end:
            return final  # in float32 the schedule may stop a little short of it
        changes, share = told(update)
        return share if changes and share > 0 else None

    return sparsity


def _told(
    pruning: Callable[[Any], tuple[Any, Any]],
) -> Callable[[int], tuple[bool, float]]:
    def told(update: int) -> tuple[bool, float]:
        changes, share = pruning(tf.constant(update, tf.int64))
        return bool(changes), float(share)

    return told


def _toolkit() -> Any:  # noqa: ANN401  untyped module
    # It wants Keras 2 behind tf.keras, which is first looked at now.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    try:
        import tensorflow_model_optimization as tfmot
    except ImportError as error:
        raise RnnpruneError(
            "gradual pruning takes its schedules from tensorflow-model-optimization, which is not"
            " installed",
            'pip install "rnnprune[tensorflow]"',
        ) from error
    return tfmot.sparsity.keras
