"""Activation: how large what a weight or a unit contributes is on real data."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.errors import UsageError
from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, UnitFigures, WeightFigures


def weights(figures: WeightFigures) -> Array:
    """Scores ``|w| · ‖v‖``, v being what it multiplies, input or state (Sun et al. 2023, eq. 1).

    Raises:
        UsageError: Without data.
    """
    if figures.reads is None:
        raise UsageError("method 'activation' needs data", "give --data or --calibration")
    return np.asarray(np.abs(figures.values) * np.sqrt(figures.reads))


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
        "weight times the norm of what it multiplies on data; variance of a unit times its readers",
        "Sun et al. 2023, Wanda, arXiv:2306.11695; Mariet & Sra 2016, arXiv:1511.05077",
        weights,
        units,
        needs_data=True,
    )
)
