"""Group norm: all weights that a unit would take with it."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.methods import Method, register
from rnnprune_cli.model import Array, UnitFigures


def units(figures: UnitFigures, generator: np.random.Generator) -> Array:
    """Scores the squared norm of everything that goes with a unit (Wen et al. 2018, section 3.2).

    That is its rows of W, R and P in all gates, its columns of R, and the weights that read it in
    other layers: the "ISS component" of the paper, whose norm its group lasso drives to zero.
    """
    return figures.group


register(
    Method(
        "group-norm",
        "norm of all weights that go with a unit (ISS); needs no data",
        "Wen et al. 2018, Learning Intrinsic Sparse Structures within LSTM, arXiv:1709.05027",
        unit=units,
    )
)
