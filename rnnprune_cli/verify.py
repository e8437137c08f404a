"""Is what was written what was asked for? Nothing is handed over before these claims hold."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rnnprune_cli.errors import NotEquivalentError
from rnnprune_cli.model import Array, Claim, Feed, LoadedModel, Runner, Saved, StoredWeight

RELATIVE_TOLERANCE = 1e-5
"""Of an output's largest magnitude, or two steps of its type if that is more; the same weights in
the same order should give 0."""
_CHUNK_ELEMENTS = 1 << 20


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


def verify_weights(model: LoadedModel, saved: Saved) -> tuple[Claim, dict[str, tuple[int, ...]]]:
    """Reads every pruned weight back from the written file and compares it bit by bit.

    Returns:
        The claim, and weight name → how many written values are not zero, for each gate (block of
        rows), over both directions.
    """
    largest = 0.0
    nonzero: dict[str, tuple[int, ...]] = {}
    for name, written in model.read_back(saved):
        stored = saved.stored[name]
        if written.shape != stored.weight.shape or written.dtype != stored.weight.dtype:
            nonzero[name], largest = (0,) * stored.weight.gates, float("inf")
            continue
        nonzero[name], difference = _compare_rows(written, stored)
        largest = max(largest, difference)
    if saved.stored.keys() - nonzero.keys():
        largest = float("inf")
    claim = "the written file holds exactly the masked weights"
    return Claim(claim, largest == 0, largest, 0.0), nonzero


def _compare_rows(written: Array, stored: StoredWeight) -> tuple[tuple[int, ...], float]:
    """Counts what is not zero, and measures the largest difference (infinite for other bits).

    Some rows of a gate at a time, on all cores: NumPy computes without holding the interpreter.
    """
    directions, rows, columns = written.shape
    matrix, gates = written.reshape(-1, columns), stored.weight.gates
    step, block = max(1, _CHUNK_ELEMENTS // columns), rows // gates
    places = [
        (gate, start, min(start + step, (gate + 1) * block))
        for gate in range(directions * gates)
        for start in range(gate * block, (gate + 1) * block, step)
    ]

    def work(place: tuple[int, int, int]) -> tuple[int, float]:
        _, start, stop = place
        found, wanted = matrix[start:stop], stored.rows(start, stop)
        count = int(np.count_nonzero(found))
        if np.array_equal(_bits(found), _bits(wanted)):
            return count, 0.0
        # Where even -0.0 and 0.0 count as different, no difference can be called none.
        return count, float(np.abs(found.astype(np.float64) - wanted).max()) or float("inf")

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(work, places))
    counts = [0] * gates
    for (gate, _, _), (count, _) in zip(places, done, strict=True):
        counts[gate % gates] += count
    return tuple(counts), max(difference for _, difference in done)


def verify_same(
    claim: str,
    reference: Sequence[Sequence[Array]],
    other: Sequence[Sequence[Array]],
    relative: float = RELATIVE_TOLERANCE,
) -> Claim:
    """Compares two runs over the same feeds.

    The tolerance is relative to the largest magnitude; at least two steps of 1 for probabilities.
    """
    worst, allowed, passed = 0.0, 0.0, bool(reference)  # nothing compared proves nothing
    for one, two in zip(reference, other, strict=True):
        for a, b in zip(one, two, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                passed, worst = False, float("inf")
            elif a.dtype.kind != "f":
                passed &= bool(np.array_equal(a, b))
            else:
                finite = np.isfinite(a)
                scale = float(np.abs(a[finite], dtype=np.float64).max(initial=0.0))
                step = 2 * float(np.finfo(a.dtype).eps)
                tolerance = max(relative, step) * max(scale, 1e-3)
                if finite.all() and a.size and a.min() >= 0 and a.max() <= 1:
                    # Probabilities: onnxruntime's Sigmoid is off by up to 1.3e-7, however small
                    # what it returns, and so the smallest differ by that much.
                    tolerance = max(tolerance, step)
                same_kind = np.array_equal(a[~finite], b[~finite], equal_nan=True)
                distance = np.abs(a[finite].astype(np.float64) - b[finite])
                difference = float(distance.max(initial=0.0)) if same_kind else float("inf")
                passed &= difference <= tolerance
                worst, allowed = max(worst, difference), max(allowed, tolerance)
    return Claim(claim, passed, worst, allowed)


def verify_runs(
    claim: str,
    original: Runner,
    other: Runner,
    feeds: Sequence[Feed],
    names: Sequence[str],
    made_up: bool,
    relative: float = RELATIVE_TOLERANCE,
) -> Claim:
    """Compares two models that compute the same in another order.

    Far from the inputs that it was trained on, a recurrent network can be chaotic and amplify the
    last bit of a long sequence to any size. Made-up inputs are therefore tried smaller, too.
    """
    for scale in (1.0, 0.1) if made_up else (1.0,):
        scaled = [
            {n: (a * scale).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in f.items()}
            for f in feeds
        ]
        found = verify_same(
            claim + (f" (inputs times {scale:g})" if scale != 1 else ""),
            run_all(original, scaled, names),
            run_all(other, scaled, names),
            relative,
        )
        if found.passed:
            break
    return found


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
