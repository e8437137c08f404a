"""Scores, scope and sparsity → masks: which weights go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.model import Array, BoolArray, Weight

SCOPES = {
    "row": "each row of W and of R by itself: every gate of every unit loses the same share",
    "layer": "each matrix by itself: W and R of one direction of a layer",
    "global": "all selected weights together",
}
"""Name → within what the scores compete."""

DEFAULT_SCOPE = "row"
"""The best scope without data, as measured in the README's table."""


def check_scope(scope: str) -> None:
    """Raises UsageError for an unknown scope."""
    if scope not in SCOPES:
        raise UsageError(f"there is no scope '{scope}'", closest(scope, SCOPES))


def removed_per_group(groups: int, size: int, sparsity: float) -> NDArrayInt:
    """Spreads what is to be removed over equal groups.

    Each group loses ``size * sparsity`` rounded up or down, such that all groups together lose
    ``groups * size * sparsity`` rounded (half to even, as in tfmot's PolynomialDecay masks).

    Args:
        groups: Number of groups.
        size: Elements in each.
        sparsity: Share to remove, 0 ≤ s < 1.

    Returns:
        int64 ``[groups]``.
    """
    total = groups * size - int(np.rint(groups * size * (1 - sparsity)))
    ends = np.arange(groups + 1, dtype=np.int64) * total // groups
    return np.diff(ends)


NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]


def select(
    scores: Mapping[str, Array], weights: Sequence[Weight], scope: str, sparsity: float
) -> dict[str, BoolArray]:
    """Chooses the weights to keep.

    The smallest scores of each competing group go; of equal scores those that come first. The
    number removed differs from ``sparsity`` by less than one weight in each group.

    Args:
        scores: Weight name → scores, shaped like the weight.
        weights: What competes, in a fixed order.
        scope: A key of :data:`SCOPES`.
        sparsity: Share to remove, 0 ≤ s < 1.

    Returns:
        Weight name → True where the weight is kept.
    """
    if scope == "global":
        flat = np.concatenate([scores[w.name].reshape(-1) for w in weights])
        kept = _keep_largest(flat[None], removed_per_group(1, flat.size, sparsity))[0]
        ends = np.cumsum([w.size for w in weights])[:-1]
        parts = np.split(kept, ends)
        return {w.name: p.reshape(w.shape) for w, p in zip(weights, parts, strict=True)}
    masks = {}
    for weight in weights:
        directions, rows, columns = weight.shape
        shape = (directions, rows * columns) if scope == "layer" else (directions * rows, columns)
        groups = scores[weight.name].reshape(shape)
        # Rounding is spread within each direction, so that both lose the same.
        removed = removed_per_group(shape[0] // directions, shape[1], sparsity)
        masks[weight.name] = _keep_largest(groups, np.tile(removed, directions)).reshape(
            weight.shape
        )
    return masks


def _keep_largest(scores: Array, removed: NDArrayInt) -> BoolArray:
    """Marks all but the ``removed[i]`` smallest scores of each row i.

    Works on rows with equal counts together; there are at most two counts.
    """
    kept = np.ones(scores.shape, np.bool_)
    for count in np.unique(removed):
        if count == 0:
            continue
        rows = removed == count
        every = bool(rows.all())
        block = scores if every else scores[rows]
        threshold = np.partition(block, count - 1, axis=1)[:, count - 1 : count]
        above = block > threshold
        tied = block == threshold
        # Equal scores at the threshold fill the count from the front; the rest of them stay.
        ties = tied.sum(axis=1)
        short = count - (block.shape[1] - above.sum(axis=1) - ties)
        for row in np.flatnonzero(short < ties):
            above[row, np.flatnonzero(tied[row])[short[row] :]] = True
        if every:
            kept = above
        else:
            kept[rows] = above
    return kept
