"""Scores, scope and sparsity → masks: which weights go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.model import Array, BoolArray, RecurrentLayer, Weight

SCOPES = {
    "row": "the weights into each gate of each unit: a row of [W R]",
    "layer": "each matrix by itself: W and R of one direction of a layer",
    "global": "all selected weights together",
}
"""Name → within what the scores compete."""

NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]

DEFAULT_SCOPE = "row"
"""The best scope without data, as measured in the README's table."""


_CHUNK_ELEMENTS = 1 << 22
"""Rows are selected in blocks of about this size, to keep temporaries small."""


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


def families(layers: Iterable[RecurrentLayer]) -> list[tuple[Weight, ...]]:
    """Groups weights whose rows belong together: W and R of a layer, and of layers sharing one.

    All weights of a family have the same directions and rows.
    """
    found: list[list[Weight]] = []
    for layer in layers:
        linked = [family for family in found if any(w in family for w in layer.weights)]
        joined = list(dict.fromkeys(w for family in [*linked, layer.weights] for w in family))
        found = [family for family in found if family not in linked] + [joined]
    return [tuple(family) for family in found]


def select(
    scores: Mapping[str, Array], family: Sequence[Weight], scope: str, sparsity: float
) -> dict[str, BoolArray]:
    """Chooses the weights to keep.

    The smallest scores of each competing group go; of equal scores those that come first. The
    number removed differs from ``sparsity`` by less than one weight in each group.

    Args:
        scores: Weight name → scores, shaped like the weight.
        family: What is selected at once: one of :func:`families`, or all weights for ``global``.
        scope: A key of :data:`SCOPES`.
        sparsity: Share to remove, 0 ≤ s < 1.

    Returns:
        Weight name → True where the weight is kept.
    """
    if scope == "global":
        flat = np.concatenate([scores[w.name].reshape(-1) for w in family])
        kept = _keep_largest(flat[None], removed_per_group(1, flat.size, sparsity))[0]
        ends = np.cumsum([w.size for w in family])[:-1]
        parts = np.split(kept, ends)
        return {w.name: p.reshape(w.shape) for w, p in zip(family, parts, strict=True)}
    masks = {}
    for together in [family] if scope == "row" else [[w] for w in family]:
        directions, rows, _ = together[0].shape
        groups = 1 if scope == "layer" else rows
        matrices = [scores[w.name].reshape(directions * groups, -1) for w in together]
        # Rounding is spread within each direction, so that both lose the same.
        columns = sum(m.shape[1] for m in matrices)
        removed = np.tile(removed_per_group(groups, columns, sparsity), directions)
        for weight, kept in zip(together, _select_rows(matrices, removed), strict=True):
            masks[weight.name] = kept.reshape(weight.shape)
    return masks


def _select_rows(matrices: Sequence[Array], removed: NDArrayInt) -> list[BoolArray]:
    """Selects within each row of matrices laid side by side, some rows at a time."""
    kept = [np.empty(m.shape, np.bool_) for m in matrices]
    ends = np.cumsum([m.shape[1] for m in matrices])
    step = max(1, _CHUNK_ELEMENTS // int(ends[-1]))
    for start in range(0, len(removed), step):
        rows = slice(start, start + step)
        block = np.concatenate([m[rows] for m in matrices], axis=1)
        parts = np.split(_keep_largest(block, removed[rows]), ends[:-1], axis=1)
        for whole, part in zip(kept, parts, strict=True):
            whole[rows] = part
    return kept


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
        # Equal scores at the threshold fill the count from the front; the rest of them stay.
        missing = block.shape[1] - count - above.sum(axis=1)
        for row in np.flatnonzero(missing):
            ties = np.flatnonzero(block[row] == threshold[row])
            above[row, ties[len(ties) - missing[row] :]] = True
        if every:
            kept = above
        else:
            kept[rows] = above
    return kept
