"""Activation: what a unit makes of real data, times how much is read from it."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, UnitFigures


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores the variance of a unit on data times the squared norm of the weights that read it.

    A unit that hardly varies can be replaced by a constant in its readers' biases (Mariet & Sra
    2016; Yu et al. 2018, NISP, arXiv:1711.05908).

    Raises:
        UsageError: Without data.
    """
    if figures.variance is None:
        raise UsageError("method 'activation' needs data", "give --data or --calibration")
    return figures.variance * figures.outgoing


register(
    Method(
        "activation",
        "variance of a unit on data times the norm of the weights that read it",
        "Mariet & Sra 2016, Diversity Networks, arXiv:1511.05077",
        unit=units,
        needs_data=True,
    )
)
