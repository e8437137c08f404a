"""Which slices go together: classes of labels, joined as operators couple them."""

from __future__ import annotations

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class Classes:
    """Disjoint sets of labels 0, 1, 2, … (union by smallest label)."""

    def __init__(self) -> None:
        self._parent: IntArray = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, shape: tuple[int, ...]) -> IntArray:
        """Returns an array of new labels, each in a class of its own."""
        labels = len(self._parent) + np.arange(int(np.prod(shape)), dtype=np.int64)
        self._parent = np.concatenate([self._parent, labels])
        return labels.reshape(shape)

    def of(self, labels: IntArray) -> IntArray:
        """Returns the class of each label: its smallest member."""
        found = self._parent[labels]
        while not np.array_equal(further := self._parent[found], found):
            found = further
        return found

    def join(self, one: IntArray, other: IntArray) -> None:
        """Joins the classes of labels at the same place; the arrays are broadcast."""
        a, b = np.broadcast_arrays(self.of(one), self.of(other))
        differ = a != b
        for pair in np.unique(np.stack([a[differ], b[differ]], axis=-1), axis=0):
            first, second = self.of(pair)
            self._parent[max(first, second)] = min(first, second)
