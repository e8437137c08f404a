"""Scores, scope and sparsity → masks: which weights go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rnnprune_cli.model import Array, BoolArray, RecurrentLayer, Weight

SCOPES = {
    "row": "the weights into each gate of each unit: a row of [W R]",
    "layer": "each matrix by itself: W and R of one direction of a layer",
    "global": "all selected weights together",
}
"""Name → within what the scores compete."""

UNIT_SCOPES = {
    "layer": "the units of each layer, and of layers that must keep the same ones",
    "global": "all units; a score counts as the share of what its layer hands on",
}
"""Name → within what the scores of units compete."""

NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]

_CHUNK_ELEMENTS = 1 << 20
"""Rows are selected in blocks of about this size, to keep temporaries small."""


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
        flat = np.concatenate([scores[w.name].reshape(-1) for w in family])[None]
        (kept,) = _select_rows([flat], removed_per_group(1, flat.size, sparsity))
        parts = np.split(kept[0], np.cumsum([w.size for w in family])[:-1])
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
    """Marks, in matrices laid side by side, all but the ``removed[i]`` smallest scores of row i.

    Some rows at a time, on all cores: NumPy computes without holding the interpreter.
    """
    kept = [np.empty(m.shape, np.bool_) for m in matrices]
    columns = sum(m.shape[1] for m in matrices)
    step = max(1, _CHUNK_ELEMENTS // columns)

    def work(start: int) -> None:
        rows = slice(start, start + step)
        _keep_largest([m[rows] for m in matrices], removed[rows], [k[rows] for k in kept])

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, range(0, len(removed), step)))
    return kept


def _keep_largest(parts: Sequence[Array], removed: NDArrayInt, kept: Sequence[BoolArray]) -> None:
    """Fills ``kept`` for a block of rows; see :func:`_select_rows`."""
    block = np.concatenate(parts, axis=1)
    threshold = np.full((len(block), 1), -np.inf, block.dtype)
    # At most two counts, rounded down and up; NumPy is fast for one position at a time.
    for count in np.unique(removed[removed > 0]):
        rows = removed == count
        some = block[rows]
        some.partition(count - 1, axis=1)
        threshold[rows, 0] = some[:, count - 1]
    missing = block.shape[1] - removed
    for part, mask in zip(parts, kept, strict=True):
        np.greater(part, threshold, out=mask)
        missing -= np.count_nonzero(mask, axis=1)
    # Equal scores at the threshold fill the count from the front; the rest of them stay.
    for row in np.flatnonzero(missing):
        ties = np.flatnonzero(np.concatenate([p[row] for p in parts]) == threshold[row])
        stay = np.zeros(block.shape[1], np.bool_)
        stay[ties[len(ties) - missing[row] :]] = True
        ends = np.cumsum([p.shape[1] for p in parts])[:-1]
        for mask, more in zip(kept, np.split(stay, ends), strict=True):
            mask[row] |= more
