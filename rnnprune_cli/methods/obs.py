"""Optimal Brain Surgeon for units and layers: the error that is left after the best repair."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, LayerFigures, Read, UnitFigures

DAMPING = 1e-4
"""Added to the diagonal of a covariance, times its mean."""


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores the error that removing a unit adds, after those that go before it.

    For a reader with output ``w · v`` the least error that is left when ``v_i`` goes and the others
    make up for it is ``‖w_i‖² / [C⁻¹]_ii``, C being the covariance of v (Hassibi & Stork 1993,
    equation 5; for structures, Kurtic et al. 2023, ZipLM, arXiv:2302.04089, section 3.1). The unit
    with the smallest sum over its readers, each as a share of the variance of its output, goes
    first; weights and inverses are then updated, and so on to the last.

    Raises:
        UsageError: Without data.
    """
    if not figures.reads:
        raise UsageError("method 'obs' needs data", "give --data or --calibration")
    readers = [_Reader(read) for read in figures.reads]
    read = np.unique(np.concatenate([reader.units for reader in readers]))
    left = read[figures.outgoing[read] > 0]
    scores = np.zeros(figures.outgoing.shape)
    so_far = 0.0
    while len(left):
        costs = np.zeros(len(figures.outgoing))
        for reader in readers:
            np.add.at(costs, reader.units, reader.costs())
        unit = left[np.argmin(costs[left])]
        # What goes later never counts less: an order must stay one if some units may not go.
        so_far = max(so_far, float(costs[unit]))
        scores[unit] = so_far
        left = left[left != unit]
        for reader in readers:
            reader.remove(int(unit))
    return scores


def layer(figures: LayerFigures, generator: np.random.Generator) -> float:
    """Scores what a linear map of its input leaves unexplained of a layer's output.

    Raises:
        UsageError: Without data.
    """
    if figures.unexplained is None:
        raise UsageError("method 'obs' needs data", "give --data or --calibration")
    return figures.unexplained


class _Reader:
    """One reader's weights and inverse covariance, as units go."""

    def __init__(self, read: Read) -> None:
        covariance = read.covariance
        damped = covariance + DAMPING * max(float(np.diag(covariance).mean()), 1e-12) * np.eye(
            len(covariance)
        )
        self.units = read.units
        self._weights = read.weights()
        total = float(np.einsum("oi,ij,oj->", self._weights, damped, self._weights))
        self._scale = 1 / max(total, 1e-30)
        self._inverse = np.linalg.inv(damped)
        self._norms = np.square(self._weights).sum(axis=0)

    def costs(self) -> Array:
        """Returns the least error that is left without each place, as a share."""
        found: Array = self._scale * self._norms / np.diag(self._inverse)
        return found

    def remove(self, unit: int) -> None:
        """Lets the others make up for a unit (Hassibi & Stork 1993, equation 5)."""
        for place in np.flatnonzero(self.units == unit):
            row = self._inverse[place] / self._inverse[place, place]
            self._weights -= np.outer(self._weights[:, place], row)
            self._inverse -= np.outer(self._inverse[:, place], row)
            self._weights[:, place] = 0
            self._inverse[place], self._inverse[:, place] = 0, 0
            self._inverse[place, place] = 1
        if (self.units == unit).any():
            self._norms = np.square(self._weights).sum(axis=0)


register(
    Method(
        "obs",
        "error that is left after the best repair (Optimal Brain Surgeon)",
        "Hassibi & Stork 1993, Second Order Derivatives for Network Pruning, NeurIPS 5",
        unit=units,
        layer=layer,
        needs_data=True,
    )
)
