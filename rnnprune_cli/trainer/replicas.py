"""Training on several devices, and on several machines, through ``tf.distribute``.

1. Each replica of the model has the same weights, and sums up the gradients of its part of a batch.
   What sums are divided by is of the whole batch, so that gradients only have to be added.
2. These sums are added up, once an update, and each replica is updated with the same ones.
3. What is decided by figures that were measured is decided by the chief's, for machines may differ
   by how they round; each would else wait for what another never does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from rnnprune_cli.cluster import worker
from rnnprune_cli.data import Dataset
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array
from rnnprune_cli.tensorflow.runtime import first_line, quiet
from rnnprune_cli.trainer.batches import Batch
from rnnprune_cli.trainer.call import tf
from rnnprune_cli.trainer.loop import Gradient, Graph, Values

Stream = Generator[tuple[Any, ...], Values, None]
"""Yields what a gradient is to be taken of, and is sent the states that it has ended with."""


class Replicas:
    """Replicas of a model: those of this process, and how they work together with all others.

    Args:
        strategy: ``tf.distribute.Strategy``.
        workers: Number of processes.
        index: Which of them this is; the first one is the chief.
    """

    def __init__(self, strategy: Any, workers: int, index: int) -> None:  # noqa: ANN401
        self._strategy = strategy
        self._workers = workers
        self.chief = index == 0
        self.count = int(strategy.num_replicas_in_sync)
        """In all processes."""
        self.local = self.count // workers
        """In this one."""
        self._first = index * self.local

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """What is made in it is made for all replicas of this process."""
        return self._strategy.scope()  # type: ignore[no-any-return]

    def shares(self, data: Dataset, parts: Sequence[Batch]) -> list[list[Batch]]:
        """Deals out a batch; returns what each replica of this process is to do.

        Args:
            data: What the batch is of.
            parts: What would go through the model together.
        """
        own: list[list[Batch]] = [[] for _ in range(self.local)]
        turn = 0
        for part in parts:
            size = len(part.samples)
            for rows in np.array_split(np.arange(size), min(self.count, size)):
                place = turn % self.count - self._first
                if 0 <= place < self.local:
                    own[place].append(_rows(data, part, slice(rows[0], rows[-1] + 1)))
                turn += 1
        return own

    def each(self, graph: Graph) -> Graph:
        """Returns a graph that gives what each replica here makes of its own arguments."""

        def run(*given: Any) -> Any:  # noqa: ANN401
            return self._strategy.run(graph, self._dealt(given))

        return run

    def all(self, graph: Graph) -> Graph:
        """Returns a graph in which all replicas do the same, and which gives what it gives."""

        def run(*given: Any) -> Any:  # noqa: ANN401
            return self.results(self._strategy.run(graph, given))[0]

        return run

    def results(self, made: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Returns the result of each replica here."""
        return self._strategy.experimental_local_results(made)  # type: ignore[no-any-return]

    def total(self, values: Sequence[Any]) -> Any:  # noqa: ANN401  a tensor
        """Returns the sum over all replicas; it is the same in all processes.

        Args:
            values: A tensor for each replica here.

        Raises:
            RnnpruneError: If another process has gone.
        """
        try:
            (given,) = self._dealt([(value,) for value in values])
            return self._strategy.reduce("SUM", given, axis=None)
        except tf.errors.OpError as error:
            reason = first_line(error).rpartition("}} ")[2]
            raise RnnpruneError(
                f"another worker does not answer any more: {reason}",
                "start all of them again, with --resume",
            ) from error

    def _dealt(self, given: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Returns the arguments of each replica here as those of all."""
        return tuple(
            self._strategy.experimental_distribute_values_from_function(
                lambda context, k=k: given[context.replica_id_in_sync_group - self._first][k]
            )
            for k in range(len(given[0]))
        )

    # -- the chief's ------------------------------------------------------------------------------

    def chiefs(self, array: Array) -> Array:
        """Returns the chief's numbers."""
        if self._workers == 1:
            return array
        numbers = np.asarray(array, np.float64)
        values = [np.zeros_like(numbers) for _ in range(self.local)]
        if self.chief:
            values[0] = numbers
        found = np.asarray(self.total([tf.constant(v) for v in values]))
        return found.astype(array.dtype)

    def any(self, what: bool) -> bool:
        """Tells whether something is so in any process."""
        return bool(self.total([tf.constant(float(what))] * self.local) > 0)

    def same(self, digest: bytes) -> bool:
        """Tells whether all processes have the same, by a digest of it."""
        own = np.frombuffer(digest, np.uint8)
        return not self.any(bool((self.chiefs(own) != own).any()))


def _rows(data: Dataset, part: Batch, rows: slice) -> Batch:
    """Returns some samples of a part of a batch."""
    if rows.stop - rows.start == len(part.samples):
        return part
    feed = {name: a[rows] if name in data.per_sample else a for name, a in part.feed.items()}
    return dataclasses.replace(part, samples=part.samples[rows], feed=feed, valid=part.valid[rows])


class SharedGradient(Gradient):
    """Gradients of the replicas of this process, each a vector that begins with the loss.

    Args:
        replicas: They.
        given: As for :class:`Gradient`.
    """

    def __init__(self, replicas: Replicas, *given: Any) -> None:  # noqa: ANN401
        self._replicas = replicas
        super().__init__(*given)

    def _traced(self, signature: tuple[Any, ...]) -> Graph:
        double = any(v.dtype == tf.float64 for v in self._variables)
        self._dtype = tf.float64 if double else tf.float32
        self._sizes = [int(np.prod(v.shape)) for v in self._variables]
        return self._function(self._replicas.each(self._flat), (signature,) * self._replicas.local)

    def _flat(self, *given: Any) -> tuple[Any, Any]:  # noqa: ANN401
        loss, gradients, states = self._gradient(*given)
        parts = [tf.reshape(tf.cast(part, self._dtype), [-1]) for part in (loss, *gradients)]
        return tf.concat(parts, 0), states

    def summed(self, streams: Sequence[Stream], flag: bool) -> tuple[bool, float, list[Any]]:
        """Sums up gradients, of all replicas of all processes.

        Args:
            streams: For each replica here, what it is to do.
            flag: Whether something is so in this process.

        Returns:
            Whether it is so in any, the loss, and the gradients.
        """
        sums = [tf.zeros([1 + sum(self._sizes)], self._dtype) for _ in streams]
        given = [next(stream, None) for stream in streams]
        while any(own is not None for own in given):
            # One that has nothing to do does what another does, and takes nothing of it.
            some = next(own for own in given if own is not None)
            idle = (*some[:-1], np.full_like(some[-1], np.inf))
            made = self._called(self._gradients, tuple(idle if g is None else g for g in given))
            results = self._replicas.results(made)
            sums = [total + vector for total, (vector, _) in zip(sums, results, strict=True)]
            given = [
                None if own is None else _sent(stream, states)
                for stream, own, (_, states) in zip(streams, given, results, strict=True)
            ]
        flags = tf.fill([1], tf.cast(flag, self._dtype))
        total = self._replicas.total([tf.concat([flags, own], 0) for own in sums])
        told, loss, *found = tf.split(total, [1, 1, *self._sizes])
        gradients = [
            tf.cast(tf.reshape(g, v.shape), v.dtype)
            for g, v in zip(found, self._variables, strict=True)
        ]
        return float(told[0]) > 0, float(loss[0]), gradients


def _sent(stream: Stream, states: Values) -> tuple[Any, ...] | None:
    with contextlib.suppress(StopIteration):
        return stream.send({name: np.asarray(state) for name, state in states.items()})
    return None


_made: dict[str, Replicas] = {}


def replicas_of(name: str, progress: Callable[[str], None]) -> Replicas | None:
    """Returns the replicas of a strategy of the command line; they are made once per process.

    Those of several processes must be made before TensorFlow does anything else.

    Args:
        name: A key of :data:`rnnprune_cli.options.STRATEGIES`.
        progress: Called with a short text at the beginning of each step.

    Returns:
        None for the strategy that needs none.

    Raises:
        RnnpruneError: If they cannot be made, or other processes do not answer.
    """
    if name == "single":
        return None
    if name not in _made:
        _made[name] = _mirrored() if name == "mirrored" else _multiworker(progress)
    return _made[name]


def _mirrored() -> Replicas:
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return Replicas(tf.distribute.MirroredStrategy([d.name for d in devices]), 1, 0)


def _multiworker(progress: Callable[[str], None]) -> Replicas:
    own = worker()
    own.meet(progress)
    progress("starting TensorFlow on all workers")
    try:
        with quiet():
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, ValueError, tf.errors.OpError) as error:
        raise RnnpruneError(
            f"TensorFlow cannot connect the workers: {first_line(error)}",
            "check the addresses in TF_CONFIG, and that each worker was started anew",
        ) from error
    if threading.current_thread() is threading.main_thread():  # TensorFlow takes this one over
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Replicas(strategy, len(own.addresses), own.index)
