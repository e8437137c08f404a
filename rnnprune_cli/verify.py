"""Is what was written what was asked for? Nothing is handed over before these claims hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnprune_cli.errors import NotEquivalentError
from rnnprune_cli.model import Array, Claim, Feed, LoadedModel, Runner, Saved

RELATIVE_TOLERANCE = 1e-5
"""Of an output's largest magnitude; the same weights in the same order should give 0."""
_CHUNK_ELEMENTS = 1 << 22


CONVERSION_TOLERANCE = 1e-4
"""The same between TensorFlow and onnxruntime, which round differently over long sequences."""


def run_all(runner: Runner, feeds: Sequence[Feed], names: Sequence[str]) -> list[list[Array]]:
    """Runs feeds one after the other, each from the initial state.

    Args:
        runner: The model.
        feeds: Its inputs.
        names: The outputs to return, in this order.
    """
    own = [o.name for o in runner.outputs]
    order = [own.index(name) for name in names]
    results = []
    for feed in feeds:
        runner.reset()
        outputs = runner.run(feed)
        results.append([outputs[k] for k in order])
    return results


def verify_weights(model: LoadedModel, saved: Saved) -> tuple[Claim, dict[str, int]]:
    """Reads every pruned weight back from the written file and compares it bit by bit.

    Returns:
        The claim, and weight name → how many written values are not zero.
    """
    largest, equal = 0.0, True
    nonzero: dict[str, int] = {}
    for name, written in model.read_back(saved):
        stored = saved.stored[name]
        weight = stored.weight
        nonzero[name] = 0
        if written.shape != weight.shape or written.dtype != weight.dtype:
            equal, largest = False, float("inf")
            continue
        matrix = written.reshape(-1, weight.shape[2])
        step = max(1, _CHUNK_ELEMENTS // weight.shape[2])
        for start in range(0, len(matrix), step):
            found, wanted = matrix[start : start + step], stored.rows(start, start + step)
            nonzero[name] += int(np.count_nonzero(found))
            if not np.array_equal(_bits(found), _bits(wanted)):
                equal = False
                largest = max(largest, float(np.abs(found.astype(np.float64) - wanted).max()))
    missing = saved.stored.keys() - nonzero.keys()
    claim = "the written file holds exactly the masked weights"
    return Claim(claim, equal and not missing, largest, 0.0), nonzero


def verify_same(
    claim: str,
    reference: Sequence[Sequence[Array]],
    other: Sequence[Sequence[Array]],
    relative: float = RELATIVE_TOLERANCE,
) -> Claim:
    """Compares two runs over the same feeds; the tolerance is relative to the largest magnitude."""
    worst, allowed, passed = 0.0, 0.0, True
    for one, two in zip(reference, other, strict=True):
        for a, b in zip(one, two, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                passed, worst = False, float("inf")
            elif a.dtype.kind != "f":
                passed &= bool(np.array_equal(a, b))
            else:
                finite = np.isfinite(a)
                scale = float(np.abs(a[finite], dtype=np.float64).max(initial=0.0))
                tolerance = relative * max(scale, 1e-3) * _coarseness(a)
                same_kind = np.array_equal(a[~finite], b[~finite], equal_nan=True)
                distance = np.abs(a[finite].astype(np.float64) - b[finite])
                difference = float(distance.max(initial=0.0))
                passed &= same_kind and difference <= tolerance
                worst, allowed = max(worst, difference), max(allowed, tolerance)
    return Claim(claim, passed, worst, allowed)


def require(claims: Sequence[Claim]) -> None:
    """Raises NotEquivalentError if a claim failed."""
    for claim in claims:
        if not claim.passed:
            raise NotEquivalentError(
                f"verification failed: {claim.claim} (difference {claim.max_abs:.3g}, allowed"
                f" {claim.tolerance:.3g}); nothing was written",
                "this is a defect of rnnprune or of the runtime; please report it with the model",
            )


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _coarseness(array: Array) -> float:
    """How much coarser than float32 a type is."""
    return max(1.0, float(np.finfo(array.dtype).eps / np.finfo(np.float32).eps))
