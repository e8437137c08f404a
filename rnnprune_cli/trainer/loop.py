"""Training: updates, what keeps them stable, and what is kept of them.

1. An update adds up the gradients of the parts of a batch, cuts their norm, and leaves masked
   weights where they are: at zero.
2. The learning rate rises after the start, each change of masks and each roll-back, and falls along
   a cosine to zero.
3. Where the loss is no number, or far above what it was, training goes back to the best weights,
   forgets its momenta and goes on with a lower rate.
4. After each epoch the model is written and measured as a user would; the best one is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array, BoolArray, Epoch, Runner
from rnnprune_cli.tensorflow.runtime import first_line
from rnnprune_cli.trainer.batches import Batch, Batches
from rnnprune_cli.trainer.call import Value, signature_of, tf
from rnnprune_cli.trainer.graph import CARRIED
from rnnprune_cli.trainer.objective import Objective
from rnnprune_cli.trainer.trainee import Trainee

WARM_UP = 0.05
"""Share of all updates over which the learning rate rises after a disturbance."""
MAX_WARM_UP = 100
LOWER = 0.3
"""Factor of the learning rate after a roll-back."""
MAX_ROLLBACKS = 8
DIVERGED = 5.0
"""Factor by which the smoothed loss may rise above its least, and above that at the start."""
SMALL = 0.1
"""Losses below (nats, or parts of an output's variance) are as good as none."""
WORSE = 1.5
"""Factor by which the loss on validation data may be above that at the start of training."""
SMOOTH = 0.9
"""Share of the past in a smoothed loss."""
LEAST_UPDATES = 10
"""Updates after a disturbance before losses are compared."""

Values = Mapping[str, Array]
Graph = Callable[..., Any]
"""A function of tensors that is traced."""


class Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), on cut and masked gradients.

    Args:
        trainee: What is trained.
        clip: Norm to which gradients are cut.
        everywhere: Makes a graph one that does the same on all devices.
    """

    def __init__(
        self, trainee: Trainee, clip: float, everywhere: Callable[[Graph], Graph] = lambda g: g
    ) -> None:
        import tf_keras

        self._variables = trainee.variables
        self._clip = clip
        self._adam = tf_keras.optimizers.Adam(jit_compile=False)
        self._adam.build(list(self._variables.values()))
        self._masks = {
            name: tf.Variable(np.ones(v.shape, np.float32), trainable=False)
            for name, v in self._variables.items()
            if name in trainee.masks
        }
        self.mask(trainee.masks)
        self._apply = tf.function(everywhere(self._graph), autograph=False)

    def mask(self, masks: Mapping[str, BoolArray]) -> None:
        """Takes other masks; what moves weights towards where they must not be is forgotten."""
        for name, variable in self._masks.items():
            variable.assign(masks[name].astype(np.float32))
        self.reset()

    def reset(self) -> None:
        """Forgets the momenta."""
        for variable in self._adam.variables:
            variable.assign(tf.zeros_like(variable))

    def state(self) -> list[Array]:
        """Returns what it remembers."""
        return [variable.numpy() for variable in self._adam.variables]

    def restore(self, state: Sequence[Array]) -> None:
        """Remembers what :meth:`state` returned."""
        for variable, value in zip(self._adam.variables, state, strict=True):
            variable.assign(value)

    def __call__(self, gradients: Sequence[Any], rate: float) -> float:
        """Updates the variables; returns the norm of the gradient before it was cut."""
        self._adam.learning_rate.assign(rate)
        return float(self._apply(list(gradients)))

    def _graph(self, gradients: list[Any]) -> Any:  # noqa: ANN401  a tensor
        masked = [
            g * tf.cast(self._masks[name], g.dtype) if name in self._masks else g
            for name, g in zip(self._variables, gradients, strict=True)
        ]
        norm = tf.linalg.global_norm(masked)
        # Of a gradient that is no number nothing is taken; the caller goes back.
        factor = tf.where(tf.math.is_finite(norm), self._clip / tf.maximum(norm, self._clip), 0.0)
        cut = [tf.math.multiply_no_nan(g, tf.cast(factor, g.dtype)) for g in masked]
        self._adam.apply_gradients(
            zip(cut, self._variables.values(), strict=True), skip_gradients_aggregation=True
        )
        return norm


class Gradient:
    """Loss of a part of a batch and its gradient, as TensorFlow functions.

    Args:
        trainee: What is trained.
        objective: The loss.
        batches: What it is given; for the types of labels.
        runner: The model, for its inputs.
    """

    def __init__(
        self, trainee: Trainee, objective: Objective, batches: Batches, runner: Runner
    ) -> None:
        self._module = trainee.module
        self._variables = list(trainee.variables.values())
        self._objective = objective
        carried = trainee.module.carried
        self._handed = batches.handed or {name: name for name in carried}
        feed = signature_of(runner)
        for name, (directions, size) in carried.items():
            feed[name] = tf.TensorSpec([directions, None, size], tf.float32)
            feed[CARRIED] = tf.TensorSpec([], tf.bool)
        labels = {
            t.target.output: tf.TensorSpec(None, tf.int64 if t.target.classes else tf.float64)
            for t in objective.terms
            if t.target.key is not None
        }
        given = {
            spec.name: tf.TensorSpec(
                None if spec.shape is None else [None] * len(spec.shape), spec.dtype
            )
            for spec in runner.outputs
            if spec.name in objective.taught
        }
        counts = tf.TensorSpec([len(objective.terms)], tf.float32)
        signature = (feed, labels, given, tf.TensorSpec([None, None], tf.bool), counts)
        self._sums = self._function(self._terms, signature[:-1])
        self._gradients = self._traced(signature)

    def _traced(self, signature: tuple[Any, ...]) -> Graph:
        """Returns the function that gives gradients."""
        return self._function(self._gradient, signature)

    @staticmethod
    def _function(graph: Graph, signature: tuple[Any, ...]) -> Graph:
        """One function for all sizes; one for each if some operator must know them."""
        made = tf.function(graph, autograph=False)
        with contextlib.suppress(RnnpruneError):
            return made.get_concrete_function(*signature)  # type: ignore[no-any-return]
        return made  # type: ignore[no-any-return]

    def losses(self, *given: Any) -> tuple[Array, Values]:  # noqa: ANN401
        """Returns the sums of the terms over a part of a batch, and the states it ends with.

        Args:
            given: As for a gradient, but for the totals.
        """
        terms, states = self._called(self._sums, given)
        return terms.numpy(), {name: state.numpy() for name, state in states.items()}

    def __call__(self, *given: Any) -> tuple[Any, list[Any], Values]:  # noqa: ANN401
        """Returns the loss of a part of a batch, its gradient, and the states that it ends with.

        Args:
            given: Feed, labels and what the original gives (by output), valid steps, and by what
                the sum of each term is divided.
        """
        loss, gradients, states = self._called(self._gradients, given)
        return loss, gradients, {name: state.numpy() for name, state in states.items()}

    def _called(self, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:  # noqa: ANN401
        tensors = tf.nest.map_structure(tf.constant, given)
        try:
            return function(*tensors)
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise RnnpruneError(
                f"TensorFlow cannot run the model: {first_line(error)}",
                "check the data against the model's inputs",
            ) from error

    def _terms(self, feed: Value, labels: Value, given: Value, valid: Value) -> Value:
        outputs = self._module(feed)
        terms = self._objective(outputs, labels, given, valid)
        return terms, {name: outputs[name] for name in self._handed.values()}

    def _gradient(
        self, feed: Value, labels: Value, given: Value, valid: Value, totals: Value
    ) -> Value:
        with tf.GradientTape() as tape:
            terms, states = self._terms(feed, labels, given, valid)
            loss = tf.reduce_sum(terms / totals)
        try:
            found = tape.gradient(loss, self._variables, None, tf.UnconnectedGradients.ZERO)
        except LookupError as error:
            raise RnnpruneError(
                f"the model cannot be differentiated: {first_line(error)}",
                "leave out --finetune",
            ) from error
        return loss, [tf.convert_to_tensor(g) for g in found], states


class Teacher:
    """What the original makes of batches.

    Args:
        original: The model before anything was removed.
        outputs: Those that are asked for.
        handed: Input → output of states that are handed on.
    """

    def __init__(self, original: Runner, outputs: Sequence[str], handed: Mapping[str, str]) -> None:
        self._original = original
        self._outputs = outputs
        self._handed = handed
        self._names = [o.name for o in original.outputs]
        self.states: dict[str, Array] = {}

    def __call__(self, batch: Batch) -> dict[str, Array]:
        """Returns its outputs."""
        if not self._outputs:
            return {}
        self._original.reset()
        results = self._original.run({**batch.feed, **self.states})
        found = dict(zip(self._names, results, strict=True))
        self.states = {given: found[taken] for given, taken in self._handed.items()}
        return {name: found[name] for name in self._outputs}


@dataclass
class Progress:
    """Where training is; all that a run needs to go on, besides arrays.

    Attributes:
        epoch: Whole epochs that are done.
        update: Updates of the current one that are done.
        done: Updates altogether.
        factor: Of the learning rate.
        since: Updates since the last disturbance.
        final: Updates that were done when the masks became final; None before.
        smooth: Smoothed loss; None right after a disturbance.
        least: The least of it.
        total: Sum of the losses of the current epoch.
        seconds: Of the current epoch, and of all before it.
        best: Epoch whose weights are kept; 0 for those at the start.
        score: Its drop and its loss on the validation data.
        clipped: See :class:`FineTuned`.
        rollbacks: See :class:`FineTuned`.
        stopped: See :class:`FineTuned`.
        epochs: What was measured.
    """

    epoch: int = 0
    update: int = 0
    done: int = 0
    factor: float = 1.0
    since: int = 0
    final: int | None = None
    smooth: float | None = None
    least: float = float("inf")
    total: float = 0.0
    seconds: float = 0.0
    best: int = 0
    score: tuple[float, float] = (float("inf"), float("inf"))
    clipped: int = 0
    rollbacks: int = 0
    stopped: str | None = None
    epochs: list[Epoch] = field(default_factory=list)


def score_of(lost: float, loss: float) -> tuple[float, float]:
    """Returns what is compared to find the best model: small is good, and no number is worst."""
    return tuple(x if np.isfinite(x) else float("inf") for x in (lost, loss))  # type: ignore


def rate_at(progress: Progress, updates: int, lr: float) -> float:
    """Returns the learning rate of the next update of all.

    Args:
        progress: Where training is.
        updates: Of the whole run.
        lr: The user's.
    """
    warm = int(np.clip(WARM_UP * updates, 1, MAX_WARM_UP))
    rise = min(1.0, (progress.since + 1) / warm)
    fall = 1.0
    if progress.final is not None:  # until masks are final there is still much to learn
        left = max(updates - progress.final, 1)
        fall = 0.5 * (1 + np.cos(np.pi * min((progress.done - progress.final) / left, 1.0)))
    return float(lr * progress.factor * rise * fall)
