"""Where the weights of a layer are zero or gone, small enough to keep in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.model import (
    Array,
    BoolArray,
    KeptUnits,
    Picture,
    RecurrentLayer,
    StoredWeight,
    Weight,
)

ROWS = 32
"""Rows of cells that each gate has at most."""
COLUMNS = 48
"""Columns of cells that a picture has at most."""
LAYERS = 32
"""Layers that have pictures at most: those that lost most weights."""


def pictures(
    before: Sequence[RecurrentLayer],
    after: Iterable[RecurrentLayer],
    stored: Mapping[str, StoredWeight],
    units: Iterable[KeptUnits],
    left: Mapping[str, int],
) -> dict[str, tuple[Picture, ...]]:
    """Returns the pictures of the layers that lost something.

    Rows, and the columns of R, are those of the layer before: what was cut out is seen at its old
    place. Which columns of W went with units of layers below is not known here, so a W that became
    narrower is shown with the columns that it has left, side by side.

    Args:
        before: The layers.
        after: Those that are left.
        stored: What became of weights; others are as they were.
        units: The units that stay, of the layers that lost some.
        left: Layer name → how many of its weights are not zero.

    Returns:
        Layer name → a picture of W and of R for each direction.
    """
    now = {layer.name: layer for layer in after}
    kept = {row.layer: row.kept for row in units}
    lost = {
        layer.name: sum(weight.size for weight in layer.weights) - left[layer.name]
        for layer in before
    }
    some = sorted((layer for layer in before if lost[layer.name]), key=lambda x: -lost[x.name])
    return {
        layer.name: tuple(_of_layer(layer, now.get(layer.name), stored, kept.get(layer.name)))
        for layer in some[:LAYERS]
    }


def _of_layer(
    old: RecurrentLayer,
    new: RecurrentLayer | None,
    stored: Mapping[str, StoredWeight],
    kept: tuple[tuple[int, ...], ...] | None,
) -> Iterable[Picture]:
    gates = ONNX_ORDER[old.op]
    for name in ("W", "R"):
        was: Weight = getattr(old, name.lower())
        directions, rows, columns = was.shape
        for direction in range(directions):
            if new is None:
                cells = np.full((_few(rows // len(gates)) * len(gates), 1), "x")
            else:
                weight: Weight = getattr(new, name.lower())
                units = np.arange(new.hidden_size) if kept is None else np.array(kept[direction])
                places, width = (units, columns) if name == "R" else (None, weight.shape[2])
                cells = _cells(
                    weight,
                    stored.get(weight.name),
                    direction,
                    units,
                    old.hidden_size,
                    places,
                    width,
                )
            yield Picture(name, direction, gates, (rows, columns), tuple(map("".join, cells)))


def _few(hidden: int) -> int:
    return min(ROWS, hidden)


def _cells(
    weight: Weight,
    stored: StoredWeight | None,
    direction: int,
    units: Array,
    hidden: int,
    places: Array | None,
    width: int,
) -> Array:
    """Returns the characters of a matrix.

    Args:
        weight: As it is left.
        stored: What became of it; None for nothing.
        direction: Which of its matrices.
        units: Old number of each unit that is left.
        hidden: Units before.
        places: Old number of each column; None if they are counted as they are.
        width: Columns that these numbers are among.
    """
    few, narrow = _few(hidden), min(COLUMNS, width)
    down = units * few // hidden
    across = (np.arange(width) if places is None else places) * narrow // width
    size = np.outer(np.bincount(down, minlength=few), np.bincount(across, minlength=narrow))
    parts = []
    for gate in range(weight.gates):
        count = np.zeros((few, narrow), np.int64)
        some, sums = _summed(_nonzero(weight, stored, direction, gate), down, axis=0)
        columns, sums = _summed(sums, across, axis=1)
        count[np.ix_(some, columns)] = sums
        # The ends of the scale are for all and for nothing.
        shares = np.clip(np.rint(9 * count / np.maximum(size, 1)), 1, 8).astype(int)
        shares = np.where(count == size, 9, np.where(count == 0, 0, shares))
        parts.append(np.where(size == 0, "x", shares.astype(str)))
    return np.concatenate(parts)


def _summed(values: Array, cells: Array, axis: int) -> tuple[Array, Array]:
    """Adds up neighbours that fall into the same cell; returns the cells too."""
    found, first = np.unique(cells, return_index=True)
    return found, np.add.reduceat(values, first, axis=axis, dtype=np.int64)


def _nonzero(weight: Weight, stored: StoredWeight | None, direction: int, gate: int) -> BoolArray:
    """Returns where one gate's rows are not zero."""
    rows = weight.shape[1] // weight.gates
    start = direction * weight.shape[1] + gate * rows
    if stored is not None:
        return np.asarray(stored.rows(start, start + rows) != 0)
    return np.asarray(weight.read()[direction, gate * rows : (gate + 1) * rows] != 0)
