"""Units that fade away during training, so that removing them at the end changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rnnprune_cli.model import BoolArray
from rnnprune_cli.trainer.call import Value, tf
from rnnprune_cli.trainer.trainee import Trainee

_ROWS = (1, 2, 3, 7)
"""Inputs of a recurrent operator that hold rows of a unit: W, R, B and P."""


class Fading:
    """Keeps the weights of each unit that goes in a ball that shrinks to a point.

    A unit's weights are a group, as in the group lasso for LSTMs (Wen et al. 2018,
    arXiv:1709.05027); here of the rows of W, R, B and P only: a unit for which they are zero gives
    zero, whoever reads it. The bound on a group's norm is the constrained form of that penalty, and
    needs no factor to be found by trial.

    Args:
        trainee: What is trained.
        units: Layer → bool ``[directions, hidden]``: True for those that go.
    """

    def __init__(self, trainee: Trainee, units: Mapping[str, BoolArray]) -> None:
        self._parts = []
        count = 0
        for layer, gone in units.items():
            directions, hidden = gone.shape
            numbers = np.where(gone, count + np.cumsum(gone).reshape(gone.shape) - 1, -1)
            count += int(gone.sum())
            for index, variable in trainee.read_by(layer).items():
                if index in _ROWS:
                    blocks = int(variable.shape[1]) // hidden
                    rows = np.tile(numbers[:, None], (1, blocks, 1)).reshape(directions, -1)
                    self._parts.append((variable, tf.constant(rows, tf.int32)))
        self._count = count
        self._first = self._norms()
        self._cut = tf.function(self._graph, autograph=False)

    def __call__(self, radius: float) -> None:
        """Cuts the norms to a share of what they were at first: 1 for all of it, 0 for none."""
        self._cut(tf.constant(radius, tf.float32))

    def _norms(self) -> Value:
        total = tf.zeros([self._count])
        for variable, rows in self._parts:
            squares = tf.square(tf.cast(variable, tf.float32))
            sums = tf.reduce_sum(squares, -1) if squares.shape.rank == 3 else squares
            total += tf.math.unsorted_segment_sum(sums, rows, self._count)
        return tf.sqrt(total)

    def _graph(self, radius: Value) -> None:
        bound = self._first * radius
        factors = tf.math.divide_no_nan(bound, tf.maximum(self._norms(), bound))
        for variable, rows in self._parts:
            own = tf.where(rows < 0, 1.0, tf.gather(factors, tf.maximum(rows, 0)))
            own = own[..., None] if variable.shape.rank == 3 else own
            variable.assign(variable * tf.cast(own, variable.dtype))
