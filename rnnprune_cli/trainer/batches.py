"""Batches to train on: which samples go through a model together, and in what order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.data import Dataset, thinned
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array, BoolArray, Runner

LOOKED_AT = 256
"""Samples that tell the size of features, and what outputs are."""
_BUCKET = 16
"""Batches whose samples are sorted by length together."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that go through a model at once.

    Attributes:
        samples: int64: which.
        feed: Input → array.
        steps: Steps that were kept of padded sequences; None if they are whole.
        valid: bool ``[samples, padded steps]``: which steps are no padding; one column of True if
            nothing is padded.
        start: Step at which a part of longer sequences begins.
        last: Whether it is the last part of its sequences.
    """

    samples: Array
    feed: dict[str, Array]
    steps: int | None
    valid: BoolArray
    start: int = 0
    last: bool = True

    def labels(self, array: Array, by_step: bool) -> Array:
        """Returns the part of a data set's array that belongs to this one.

        Args:
            array: First axis the samples.
            by_step: Whether its second axis is the steps.
        """
        own: Array = array[self.samples]
        whole = self.start == 0 and self.last
        return own if whole or not by_step else own[:, self.start : self.start + (self.steps or 0)]


class Batches:
    """How a data set is cut into batches.

    One update of the weights takes a batch of ``size`` samples. They go through the model together
    where it can be told their lengths, or they have one length; else those of each length do, so
    that no padding reaches anything. A model that takes one sample at a time gets one at a time.

    Samples of a model whose states are zero in all of them follow one another: they run in order,
    and states are handed from one to the next. Gradients stop there (truncated backpropagation).

    Args:
        data: The data set.
        size: Samples of a batch.
        runner: The model.
        states: Input → output that hold the same state.
        noise: What is added to real inputs, in units of the standard deviation of each feature.
    """

    def __init__(
        self,
        data: Dataset,
        size: int,
        runner: Runner,
        states: Mapping[str, str],
        noise: float = 0.0,
    ) -> None:
        self.data = data
        self.size = size
        self.handed = {
            given: taken
            for given, taken in states.items()
            if data.count > 1 and given in data.blank
        }
        self._one = data.single or bool(self.handed)
        lengths = None if data.padded_steps is None else data.lengths
        self._lengths = lengths
        self._told = {s.name for s in runner.inputs if s.is_length and s.name in data.per_sample}
        self._together = lengths is None or bool(self._told)
        self._cut = lengths is not None and self._takes(runner, int(lengths.min()))
        self._noise = _deviations(data, noise) if noise else {}
        self.count = -(-data.count // size)
        """Updates in an epoch."""

    def _takes(self, runner: Runner, length: int) -> bool:
        """Tells whether a model takes sequences that are cut to their length."""
        assert self.data.lengths is not None
        try:
            runner.run(self.data.take(np.flatnonzero(self.data.lengths == length)[:1], length))
        except RnnpruneError:
            return False
        return True

    def epoch(self, seed: Sequence[int] | None) -> list[Array]:
        """Returns the samples of each batch.

        Args:
            seed: Of their order; None for the order of the data.
        """
        order = np.arange(self.data.count)
        if self.handed or seed is None:
            return [order[k : k + self.size] for k in range(0, len(order), self.size)]
        generator = np.random.default_rng(list(seed))
        generator.shuffle(order)
        if self._lengths is not None:
            span = _BUCKET * self.size
            parts = [order[k : k + span] for k in range(0, len(order), span)]
            order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in parts])
        batches = [order[k : k + self.size] for k in range(0, len(order), self.size)]
        return [batches[k] for k in generator.permutation(len(batches))]

    def parts(self, samples: Array, seed: Sequence[int] = ()) -> Iterator[Batch]:
        """Yields what goes through the model together.

        Args:
            samples: Of a batch.
            seed: Of noise.
        """
        generator = np.random.default_rng(list(seed))
        if self._one:
            groups = [samples[k : k + 1] for k in range(len(samples))]
        elif self._together or not self._cut:
            groups = [samples]
        else:
            assert self._lengths is not None
            own = self._lengths[samples]
            groups = [samples[own == length] for length in np.unique(own)]
        for group in groups:
            steps, valid = None, np.ones((len(group), 1), np.bool_)
            if self._lengths is not None:
                lengths = self._lengths[group]
                steps = int(lengths.max()) if self._cut else None
                valid = np.arange(self.data.padded_steps or 1)[None] < lengths[:, None]
            feed = self.data.take(group, steps)
            for name, scale in self._noise.items() if seed else ():
                noise = generator.standard_normal(feed[name].shape, np.float32) * scale
                feed[name] = (feed[name] + noise).astype(feed[name].dtype)
            yield Batch(group, feed, steps, valid)

    def cut(self, batch: Batch, steps: int) -> Iterator[Batch]:
        """Yields parts of the sequences of a batch, each of at most so many steps."""
        arrays = {n: a for n, a in batch.feed.items() if n in self.data.per_sample and a.ndim > 1}
        count = max((a.shape[1] for a in arrays.values()), default=0)
        if count <= steps:
            yield batch
            return
        long = {name for name, array in arrays.items() if array.shape[1] == count}
        told = {name for name in batch.feed if name in self._told}
        for start in range(0, count, steps):
            stop = min(start + steps, count)
            feed = {n: a[:, start:stop] if n in long else a for n, a in batch.feed.items()}
            feed |= {n: np.clip(batch.feed[n] - start, 0, stop - start) for n in told}
            valid = batch.valid
            valid = valid if valid.shape[1] == 1 else valid[:, start:stop]
            yield Batch(batch.samples, feed, stop - start, valid, start, stop == count)


def _deviations(data: Dataset, noise: float) -> dict[str, Array]:
    """Returns input → how much noise each of its features gets; states get none."""
    some = thinned(data, LOOKED_AT)
    valid = some.valid(0, some.count)
    found = {}
    for name, array in some.inputs.items():
        if name in data.per_sample and array.dtype.kind == "f" and name not in data.blank:
            if valid is not None and array.shape[:2] == valid.shape:
                array = array[valid]
            found[name] = noise * np.std(array, tuple(range(array.ndim - 1)), dtype=np.float32)
    return found
