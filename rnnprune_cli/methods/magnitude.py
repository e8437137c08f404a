"""Magnitude: small weights matter least."""

from __future__ import annotations

import numpy as np

from rnnprune_cli.methods import register
from rnnprune_cli.model import Array, Weight


@register(
    "magnitude",
    "absolute value of each weight; needs no data",
    "Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626",
)
def magnitude(weight: Weight, generator: np.random.Generator) -> Array:
    """Scores ``|w|`` (Han et al. 2015, section 3.1; See et al. 2016 for recurrent models)."""
    values = weight.read()
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)
    return np.abs(values)
