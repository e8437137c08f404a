"""Scores, granularity, scope and sparsity → masks: which weights go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.model import Array, BoolArray, Layer, Weight

SCOPES = {
    "cell": "all weights of one direction of a layer, W and R; those of sigmoid gates count half",
    "row": "the weights into each gate of each unit: a row of [W R]",
    "layer": "each matrix by itself: W and R of one direction of a layer",
    "global": "all selected weights together; those of sigmoid gates count half",
}
"""Name → within what the scores compete; the first is the default."""
ACROSS_GATES = ("cell", "global")
"""Scopes in which scores of different gates are made comparable by :data:`GATE_SCALES`."""

GATE_SCALES: dict[int, tuple[float, ...]] = {
    4: (0.5, 0.5, 0.5, 1.0),
    3: (0.5, 0.5, 1.0),
    1: (1.0,),
}
"""Number of gates → what the size of a weight counts in each, in ONNX's order (iofc, zrh, h).

``sigmoid(z) = (1 + tanh(z / 2)) / 2``: a sigmoid gate is a tanh of half its input, so that a weight
of it moves the gate half as much, in units of where it saturates. On the sample models at 70 %,
without data, this loses 0.50 bits instead of 0.88 (language) and 1.8 instead of 22 (time series,
mse); 0.35 and 0.6 do about as well.
"""

UNIT_SCOPES = {
    "layer": "the units of each layer, and of layers that must keep the same ones",
    "global": "all units; a score counts as the share of what its layer hands on",
}
"""Name → within what the scores of units compete; the first is the default."""

GRANULARITIES = {
    "weight": "single weights",
    "block:RxC": "blocks of R rows of a gate by C columns, such as block:16x1",
    "bank:N": "single weights, as many in every N neighbours of a row",
    "nm:N:M": "all but N of every M neighbours in a row, such as nm:2:4",
}
"""Name → what is removed together, of weights."""

NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]

_CHUNK_ELEMENTS = 1 << 20
"""Rows are selected in blocks of about this size, to keep temporaries small."""


@dataclass(frozen=True)
class Pattern:
    """What weights are removed together.

    Attributes:
        rows: Rows of a block; none reaches over the end of a gate.
        columns: Columns of a block.
        bank: How many neighbours in a row are a bank, which all lose as many; 0 for none.
        kept: How many of each bank stay, where that is not a matter of sparsity; see :meth:`part`.
    """

    rows: int = 1
    columns: int = 1
    bank: int = 0
    kept: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The only sparsity that there is, for n:m."""
        return None if self.kept is None else 1 - self.kept / self.bank

    def part(self, share: float) -> Pattern:
        """Returns what is removed on the way there; n:m then removes a share of what it will."""
        if self.kept is None:
            return self
        return replace(self, kept=self.bank - round((self.bank - self.kept) * share))

    @property
    def scopes(self) -> Mapping[str, str]:
        """The scopes that it leaves a choice of."""
        return {"row": "each bank by itself"} if self.bank else SCOPES

    def pool(self, scores: Array, gates: int) -> Array:
        """Returns the mean score of each block, ``[directions, blocks down, blocks across]``."""
        if self.rows == self.columns == 1:
            return scores
        starts = [_starts(n, size, g) for n, size, g in self._axes(scores.shape, gates)]
        sums = np.add.reduceat(np.add.reduceat(scores, starts[0], 1), starts[1], 2)
        return np.asarray(sums / self.sizes(scores.shape, gates).astype(scores.dtype))

    def sizes(self, shape: tuple[int, ...], gates: int) -> NDArrayInt:
        """Returns how many weights each block has, ``[blocks down, blocks across]``."""
        down, across = (
            np.diff(_starts(*axis), append=axis[0]) for axis in self._axes(shape, gates)
        )
        return np.asarray(down[:, None] * across)

    def spread(self, kept: BoolArray, shape: tuple[int, int, int], gates: int) -> BoolArray:
        """Returns the mask of the weights of what :meth:`pool` made blocks of."""
        if self.rows == self.columns == 1:
            return kept
        for axis, (n, size, parts) in enumerate(self._axes(shape, gates), start=1):
            kept = np.repeat(kept, np.diff(_starts(n, size, parts), append=n), axis)
        return kept

    def uneven(self, weights: Iterable[Weight]) -> dict[Weight, NDArrayInt] | None:
        """Returns :meth:`sizes` of weights; None if all blocks are of one size."""
        if self.rows == self.columns == 1:
            return None
        sizes = {w: self.sizes(w.shape, w.gates) for w in weights}
        ends = {int(end) for s in sizes.values() for end in (s.min(), s.max())}
        return sizes if len(ends) > 1 else None

    def _axes(self, shape: tuple[int, ...], gates: int) -> list[tuple[int, int, int]]:
        return [(shape[1], self.rows, gates), (shape[2], self.columns, 1)]


def _starts(n: int, size: int, parts: int) -> NDArrayInt:
    """Returns where blocks begin, if each of equal parts of an axis is divided by itself."""
    each = n // parts
    return np.concatenate([np.arange(k * each, (k + 1) * each, size) for k in range(parts)])


def parse_pattern(granularity: str) -> Pattern:
    """Returns what a granularity of weights removes together.

    Raises:
        UsageError: If it is none, with the closest that there is.
    """
    if granularity == "weight":
        return Pattern()
    if found := re.fullmatch(r"block:(\d+)x(\d+)", granularity):
        rows, columns = map(int, found.groups())
        if rows and columns:
            return Pattern(rows, columns)
    if (found := re.fullmatch(r"bank:(\d+)", granularity)) and int(found[1]) > 1:
        return Pattern(bank=int(found[1]))
    if found := re.fullmatch(r"nm:(\d+):(\d+)", granularity):
        kept, bank = map(int, found.groups())
        if 0 < kept < bank:
            return Pattern(bank=bank, kept=kept)
    kind = granularity.split(":")[0]
    forms = {name.split(":")[0]: name for name in GRANULARITIES}
    if kind in forms:
        raise UsageError(
            f"granularity '{granularity}' is not of the form {forms[kind]}",
            "such as block:16x1, bank:32 or nm:2:4",
        )
    names = [*GRANULARITIES, "unit", "layer"]
    raise UsageError(f"there is no granularity '{granularity}'", closest(granularity, names))


def gate_scale(weight: Weight) -> Array:
    """Returns what the size of a weight counts in each row, ``[rows, 1]``; see GATE_SCALES."""
    scales = np.asarray(GATE_SCALES[weight.gates], np.float32)
    return np.repeat(scales, weight.shape[1] // weight.gates)[:, None]


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


def families(layers: Iterable[Layer]) -> list[tuple[Weight, ...]]:
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
    scores: Mapping[str, Array],
    family: Sequence[Weight],
    scope: str,
    sparsity: float,
    pattern: Pattern = Pattern(),
) -> dict[str, BoolArray]:
    """Chooses the weights to keep.

    The smallest scores of each competing group go; of equal scores those that come first. The
    number removed differs from ``sparsity`` by less than one weight, or block, in each group; in
    banks, by up to half a weight, but one weight of each stays.

    Args:
        scores: Weight name → scores, shaped like the weight.
        family: What is selected at once: one of :func:`families`, or all weights for ``global``.
        scope: A key of :data:`SCOPES`.
        sparsity: Share to remove, 0 ≤ s < 1.
        pattern: What is removed together; a block counts by the mean of its scores.

    Returns:
        Weight name → True where the weight is kept.
    """
    if pattern.bank:
        return {w.name: _select_banks(scores[w.name], pattern, sparsity) for w in family}
    blocks = {w: pattern.pool(scores[w.name], w.gates) for w in family}
    found: dict[Weight, BoolArray] = {}
    for together in [[w] for w in family] if scope == "layer" else [family]:
        if scope == "global":
            directions, groups = 1, 1
        else:
            directions, rows, _ = blocks[together[0]].shape
            groups = rows if scope == "row" else 1
        matrices = [blocks[w].reshape(directions * groups, -1) for w in together]
        sizes = pattern.uneven(together)
        if sizes is None:
            # Rounding is spread within each direction, so that both lose the same.
            columns = sum(m.shape[1] for m in matrices)
            removed = np.tile(removed_per_group(groups, columns, sparsity), directions)
            kept = _select_rows(matrices, removed)
        else:
            counts = [
                np.broadcast_to(sizes[w], blocks[w].shape).reshape(m.shape)
                for w, m in zip(together, matrices, strict=True)
            ]
            kept = _select_uneven(matrices, counts, groups, sparsity)
        found.update((w, k.reshape(blocks[w].shape)) for w, k in zip(together, kept, strict=True))
    return {w.name: pattern.spread(found[w], w.shape, w.gates) for w in family}


def _select_uneven(
    matrices: Sequence[Array], sizes: Sequence[NDArrayInt], groups: int, sparsity: float
) -> list[BoolArray]:
    """Marks all but the smallest scores of each row, such that the share of the weights is gone.

    Args:
        matrices: Scores of blocks, laid side by side.
        sizes: How many weights each block has.
        groups: What is rounded in one row is made up for in the next, in so many rows.
        sparsity: Share of the weights to remove.
    """
    order = np.argsort(np.concatenate(matrices, axis=1), axis=1, kind="stable")
    counts = np.take_along_axis(np.concatenate(sizes, axis=1), order, axis=1)
    ends = np.cumsum(counts, axis=1)
    middles = ends - counts / 2  # below it, the block would leave less too few than too many
    kept = np.ones(order.shape, np.bool_)
    left = 0.0
    for row, middle in enumerate(middles):
        left = sparsity * float(ends[row, -1]) + (left if row % groups else 0.0)
        gone = int(np.searchsorted(middle, left))
        kept[row, order[row, :gone]] = False
        left -= float(ends[row, gone - 1]) if gone else 0.0
    return np.split(kept, np.cumsum([m.shape[1] for m in matrices])[:-1], axis=1)


def _select_banks(scores: Array, pattern: Pattern, sparsity: float) -> BoolArray:
    """Keeps as many of every bank; the last one of a row may be shorter."""
    columns = scores.shape[2]
    kept = np.empty(scores.shape, np.bool_)
    whole = columns - columns % pattern.bank
    for part, bank in ((slice(whole), pattern.bank), (slice(whole, None), columns - whole)):
        banks = np.ascontiguousarray(scores[:, :, part]).reshape(-1, max(bank, 1))
        if banks.size:
            share = round(bank * sparsity)
            gone = share if pattern.kept is None else max(0, bank - pattern.kept)
            removed = np.full(len(banks), min(gone, bank - 1), np.int64)
            (chosen,) = _select_rows([banks], removed)
            kept[:, :, part] = chosen.reshape(kept[:, :, part].shape)
    return kept


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
        if columns > _CHUNK_ELEMENTS:
            for row, count in enumerate(removed):
                _keep_of_long([m[row] for m in matrices], int(count), [k[row] for k in kept], pool)
        else:
            list(pool.map(work, range(0, len(removed), step)))
    return kept


def _keep_of_long(
    parts: Sequence[Array], removed: int, kept: Sequence[BoolArray], pool: ThreadPoolExecutor
) -> None:
    """Fills ``kept`` for one row that is too long to be copied; see :func:`_select_rows`."""
    pieces = [
        (part[start : start + _CHUNK_ELEMENTS], mask[start : start + _CHUNK_ELEMENTS])
        for part, mask in zip(parts, kept, strict=True)
        for start in range(0, len(part), _CHUNK_ELEMENTS)
    ]
    if not removed:
        for _, mask in pieces:
            mask[:] = True
        return
    threshold = _smallest([scores for scores, _ in pieces], removed, pool)

    def mark(piece: tuple[Array, BoolArray]) -> int:
        np.greater(piece[0], threshold, out=piece[1])
        return int(np.count_nonzero(piece[1]))

    missing = sum(map(len, parts)) - removed - sum(pool.map(mark, pieces))
    for scores, mask in reversed(pieces):  # of equal scores those that come first go
        if missing:
            ties = np.flatnonzero(scores == threshold)[-missing:]
            mask[ties] = True
            missing -= len(ties)


def _smallest(pieces: Sequence[Array], count: int, pool: ThreadPoolExecutor) -> Array:
    """Returns the ``count``-th smallest of all scores, counted by their first 16 bits.

    The bits of floating-point numbers, read as integers, sort as the numbers do if they are not
    negative; -1 comes before all of them.
    """
    bits = pieces[0].dtype.itemsize * 8
    kind = np.dtype(f"i{bits // 8}")

    def first(scores: Array) -> NDArrayInt:
        found: NDArrayInt = scores.view(kind) >> (bits - 16)
        return found

    def histogram(scores: Array) -> NDArrayInt:
        return np.bincount(first(scores) + (1 << 15), minlength=1 << 16)

    ends = np.cumsum(sum(pool.map(histogram, pieces)))
    place = int(np.searchsorted(ends, count))
    near = list(pool.map(lambda s: s[first(s) == place - (1 << 15)], pieces))
    some = np.concatenate(near)
    rank = count - (int(ends[place - 1]) if place else 0) - 1
    some.partition(rank)
    return np.asarray(some[rank])


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
        ties = np.flatnonzero(np.concatenate([p[row] == threshold[row] for p in parts]))
        stay = np.zeros(block.shape[1], np.bool_)
        stay[ties[len(ties) - missing[row] :]] = True
        ends = np.cumsum([p.shape[1] for p in parts])[:-1]
        for mask, more in zip(kept, np.split(stay, ends), strict=True):
            mask[row] |= more
