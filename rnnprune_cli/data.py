"""Inputs for a model: from a data set, or made up from its input specifications."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import Array, BoolArray, Feed, Runner, TensorSpec
from rnnprune_cli.npz import read_npz
from rnnprune_cli.spool import Rows, bounds, chunks, picked

LABELS, LENGTHS, TARGET = "labels", "lengths", "target:"
"""Names of arrays that are no inputs; the last begins those of one output."""
BLOCKS = 10
"""Into so many parts data are cut to take the last samples of each for validation."""
MAX_COPIED_BYTES = 1 << 30
"""A part of larger data is taken only where that copies nothing."""
_RESERVED = (LABELS, LENGTHS)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples for a model.

    Attributes:
        inputs: An array for each model input. Arrays in ``per_sample`` hold the samples on their
            first axis; others are given whole with every call (an initial state, a mode).
        per_sample: Names of the inputs that differ by sample.
        stacked: Names of per-sample inputs whose samples are whole feeds (one axis more than the
            model's input).
        single: A feed holds one sample only (stacked feeds, a fixed batch, a given state).
        count: Number of samples.
        targets: Output name → expected values, first axis the samples; ``""`` for ``labels``.
        lengths: Valid steps of each sample; None if nothing is padded.
    """

    inputs: Mapping[str, Array]
    per_sample: frozenset[str]
    stacked: frozenset[str]
    single: bool
    count: int
    targets: Mapping[str, Array]
    lengths: Array | None

    def feed(self, start: int, stop: int) -> dict[str, Array]:
        """Returns one feed that holds the samples ``start`` to ``stop`` as a batch."""
        return {
            name: _plain(array[start] if name in self.stacked else array[start:stop])
            if name in self.per_sample
            else array
            for name, array in self.inputs.items()
        }

    def take(self, samples: Array, steps: int | None) -> dict[str, Array]:
        """Returns one feed that holds some samples (the first, if a feed is one), without padding.

        Args:
            samples: int64: which.
            steps: How many of the padded steps to keep; None for all.
        """
        if self.stacked:
            feed = self.feed(int(samples[0]), int(samples[0]) + 1)
            cut = {n for n in self.stacked if self.inputs[n].shape[1] == self.padded_steps}
            return {n: a[:steps] if n in cut else a for n, a in feed.items()}
        return {
            name: _plain(
                a[samples, :steps] if a.ndim > 1 and a.shape[1] == self.padded_steps else a[samples]
            )
            if name in self.per_sample
            else a
            for name, a in self.inputs.items()
        }

    def subset(self, indices: Array) -> Dataset:
        """Returns some of the samples; what is given whole with every call stays.

        Samples at equal distances (a block, every third) are views, which copy nothing, so that
        arrays mapped from files stay there. Others are copied, to disk if they are large.

        Args:
            indices: int64 ``[samples]``: which, in the order wanted.

        Raises:
            RnnpruneError: If the disk has no room for a copy.
        """

        def some(name: str, array: Array) -> Array:
            return picked(array, indices, f"a part of '{name}'")

        part = dataclasses.replace(
            self,
            inputs={n: some(n, a) if n in self.per_sample else a for n, a in self.inputs.items()},
            count=len(indices),
            targets={n: some(n or "labels", a) for n, a in self.targets.items()},
            lengths=None if self.lengths is None else self.lengths[indices],
        )
        # The longest of some samples may be as long as something else that has no steps.
        vars(part)["padded_steps"] = self.padded_steps
        return part

    @functools.cached_property
    def blank(self) -> frozenset[str]:
        """Names of the floating-point inputs that are zero in all samples.

        If one is a state, the samples follow one another, and what the model made of it is handed
        from each to the next.
        """
        return frozenset(
            name
            for name, array in self.inputs.items()
            if array.dtype.kind == "f" and not any(part.any() for part in chunks(array))
        )

    def batches(self, size: int) -> Iterator[tuple[int, int]]:
        """Yields the bounds of consecutive batches."""
        step = 1 if self.single else size
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)

    @functools.cached_property
    def padded_steps(self) -> int | None:
        """To how many steps sequences are padded.

        None if nothing is padded, or the inputs have no steps, or a sample is a whole feed in which
        the steps do not come first (and then the samples, of which there is one).
        """
        if self.lengths is None:
            return None
        arrays = [(n, a) for n, a in self.inputs.items() if n in self.per_sample and a.ndim > 1]
        if self.stacked:
            arrays = [(n, a) for n, a in arrays if n in self.stacked and a.shape[2:3] == (1,)]
        longest = int(self.lengths.max())
        sizes = [
            (a.shape[1] == longest, a.ndim - (n in self.stacked) > 2 or a.dtype.kind in "iu", a)
            for n, a in arrays
            if a.shape[1] >= longest
        ]
        # A state has no steps; what is as long as the longest sample, or has features, does.
        return int(max(sizes, key=lambda size: size[:2])[2].shape[1]) if sizes else None

    def valid(self, start: int, stop: int) -> BoolArray | None:
        """Marks the steps of the samples that are no padding, ``[samples, steps]``.

        None if nothing is padded, or it is not known to how many steps.
        """
        if self.lengths is None or self.padded_steps is None:
            return None
        return np.asarray(np.arange(self.padded_steps)[None] < self.lengths[start:stop, None])


def _plain(array: Array) -> Array:
    """Returns an array as native code expects it; a mapped one may begin at any byte."""
    return np.require(array, requirements=["C", "A", "E"])


def split(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Splits a data set into one to train on and one to validate on; the same each time.

    The last samples of each of :data:`BLOCKS` parts validate. Neighbours in a recording overlap or
    are alike, and blocks have few neighbours among what is trained on; but data are often sorted,
    by class or by who was recorded, and one block at the end would be of one kind. If even so one
    of the two has not all classes, the last samples of each class validate instead. Where samples
    follow one another (:attr:`Dataset.blank`), or the data are so large that what is trained on
    should stay where it is, the last samples of all validate.

    Args:
        data: At least two samples.
        share: How many of them validate, between 0 and 1; at least one does, and one does not.

    Returns:
        What to train on, and what to validate on, both in the order that the samples had.

    Raises:
        UsageError: If there is nothing to split.
        RnnpruneError: If the disk has no room for a copy; only a split by class can need one.
    """
    if not 0 < share < 1:
        raise UsageError(f"a share of {share:g} cannot be split off", "give one between 0 and 1")
    if data.count < 2 or not data.per_sample:
        what = "one sample" if data.per_sample else "one feed, which is no set of samples,"
        raise UsageError(
            f"the data hold {what} and cannot be split for validation",
            "give other data with --validation",
        )
    size = int(np.clip(round(data.count * share), 1, data.count - 1))
    held = np.zeros(data.count, np.bool_)
    large = sum(array.nbytes for array in data.inputs.values()) > MAX_COPIED_BYTES
    parts = 1 if data.blank or large else min(BLOCKS, size)
    ends = np.rint(np.linspace(0, data.count, parts + 1)).astype(np.int64)[1:]
    sizes = np.diff(np.rint(np.linspace(0, size, parts + 1)).astype(np.int64))
    for end, own in zip(ends, sizes, strict=True):
        held[end - own : end] = True
    labels = data.targets.get("", next(iter(data.targets.values()), None))
    if labels is not None and labels.shape == (data.count,) and labels.dtype.kind in "iub":
        held = _by_class(labels, held, share) if not data.blank else held
    return data.subset(np.flatnonzero(~held)), data.subset(np.flatnonzero(held))


def _by_class(labels: Array, held: BoolArray, share: float) -> BoolArray:
    """Marks the last samples of each class, if those that are marked are not of all classes."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # A class of which fewer than two would be expected can be missing by chance.
    frequent = np.minimum(share, 1 - share) * counts >= 2
    there = [np.bincount(classes[part], minlength=len(counts)) > 0 for part in (held, ~held)]
    if (there[0] & there[1])[frequent].all():
        return held
    last = np.minimum(np.maximum(np.rint(counts * share), 1), counts - 1)
    order = np.argsort(classes, kind="stable")
    sorted_classes = classes[order]
    to_come = np.cumsum(counts)[sorted_classes] - 1 - np.arange(len(labels))  # of the same class
    held = np.zeros(len(labels), np.bool_)
    held[order] = to_come < last[sorted_classes]
    return held


def with_lengths(data: Dataset) -> Dataset:
    """Returns a data set whose sequences have lengths: all of their steps, if it had none.

    Raises:
        UsageError: If its samples are no sequences.
    """
    if data.lengths is not None:
        return data
    arrays = [data.inputs[name] for name in sorted(data.per_sample - data.stacked)]
    steps = max((a.shape[1] for a in arrays if a.ndim > 1), default=0)
    if not steps:
        raise UsageError("the data hold no sequences that could be cut", "leave out --bptt")
    return dataclasses.replace(data, lengths=np.full(data.count, steps, np.int64))


def thinned(data: Dataset, at_most: int) -> Dataset:
    """Returns at most so many samples of a data set, at equal distances.

    If samples follow one another (:attr:`Dataset.blank`), they are the first ones instead.

    Args:
        data: Any data set; a single feed stays as it is.
        at_most: At least 1.

    Raises:
        RnnpruneError: If the disk has no room for a copy.
    """
    if data.count <= at_most or not data.per_sample:
        return data
    places = np.arange(at_most)
    return data.subset(places if data.blank else places * data.count // at_most)


def load_dataset(path: Path, specs: Sequence[TensorSpec]) -> Dataset:
    """Reads a data set for a model: an ``.npz`` file, or a folder of ``tf.data.Dataset.save``.

    One array for each model input, under the input's name (or ``x`` if there is one input), first
    axis the samples; ``labels``, or ``target:<output>`` for each; ``lengths`` of padded sequences.
    For what elements of a folder may be see :class:`~rnnprune_cli.tensorflow.saved_data.SavedData`.

    Large arrays are not held in memory, if they can be mapped: from an ``.npz`` that is not
    compressed, or from a temporary file.

    Args:
        path: The file or folder. Pickled arrays are refused. A file must stay as it is as long as
            its data set is used.
        specs: The model's inputs.

    Raises:
        RnnpruneError: If the data cannot be read or do not fit the model.
    """
    if path.is_dir():
        arrays = _read_saved(path, specs)
    elif path.suffix == ".npz":
        arrays = read_npz(path)
    elif not path.suffix and not path.exists():
        raise RnnpruneError(f"{path} does not exist", "check the path given with --data")
    else:
        raise UsageError(
            f"{path}: data must be an .npz file, or a folder written by tf.data.Dataset.save",
            "save them with numpy.savez_compressed, or numpy.savez if they are large",
        )
    for name, array in arrays.items():
        if not array.dtype.isnative:  # which no runtime accepts
            arrays[name] = _cast(array, array.dtype.newbyteorder("="), name, path)
    names = [s.name for s in specs]
    if len(specs) == 1 and "x" in arrays and names[0] not in arrays:
        arrays[names[0]] = arrays.pop("x")
    missing = [n for n in names if n not in arrays]
    if missing:
        given = [n for n in arrays if n not in _RESERVED]
        raise RnnpruneError(
            f"{path} holds no array for input '{missing[0]}'",
            f"name its arrays after the model's inputs: {', '.join(names)}"
            + (f" (it has: {', '.join(given)})" if given else ""),
        )
    unknown = [
        n for n in arrays if n not in names and n not in _RESERVED and not n.startswith(TARGET)
    ]
    if unknown:
        raise RnnpruneError(
            f"{path}: array '{unknown[0]}' is no input of the model", closest(unknown[0], names)
        )
    inputs = {s.name: _fit(arrays[s.name], s, path) for s in specs}
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not all(np.isfinite(part).all() for part in chunks(array)):
            raise RnnpruneError(
                f"{path}: array '{name}' holds NaN or infinite values",
                "pad with zeros and give 'lengths'; a model's answer to NaN says nothing",
            )
    stacked = {s.name for s in specs if s.shape and inputs[s.name].ndim == len(s.shape) + 1}
    per_sample = stacked | {s.name for s in specs if _has_sample_axis(inputs[s.name], s)}
    counts = {name: len(inputs[name]) for name in per_sample}
    if len(set(counts.values())) > 1:
        # A state of one sample is the same for all of them.
        per_sample -= {
            s.name for s in specs if s.name not in stacked and inputs[s.name].shape == s.shape
        }
    single = bool(stacked) or any(
        s.name in per_sample and s.shape is not None and s.shape[0] == 1 for s in specs
    )
    single = single or len(per_sample) < len(specs)
    counts = {name: len(inputs[name]) for name in per_sample}
    if len(set(counts.values())) > 1:
        # Not a set of samples, then: the arrays must be one feed as they are.
        per_sample, stacked, counts = set(), set(), {}
    count = next(iter(counts.values()), 1)
    targets = {n.removeprefix(TARGET): a for n, a in arrays.items() if n.startswith(TARGET)}
    if "labels" in arrays:
        targets[""] = arrays["labels"]
    lengths = arrays.get("lengths")
    if "lengths" in stacked or (lengths is not None and not per_sample):
        lengths = None  # of the sequences inside one feed, not of samples
    if lengths is None:  # the model may be told itself how long sequences are
        told = [inputs[s.name] for s in specs if s.is_length and s.name in per_sample - stacked]
        lengths = next((a for a in told if a.shape == (count,)), None)
    _check_targets(targets, lengths, count, bool(per_sample), path)
    whole = {name: _plain(a) for name, a in inputs.items() if name not in per_sample}
    return Dataset(
        inputs | whole, frozenset(per_sample), frozenset(stacked), single, count, targets, lengths
    )


def _check_targets(
    targets: Mapping[str, Array], lengths: Array | None, count: int, samples: bool, path: Path
) -> None:
    if count == 0:
        raise RnnpruneError(f"{path} holds no samples", "there is nothing to compare on")
    labelled = [(name or "labels", array) for name, array in targets.items()]
    for name, array in [*labelled, *([("lengths", lengths)] if lengths is not None else [])]:
        if samples and (array.ndim == 0 or len(array) != count):
            raise RnnpruneError(
                f"{path}: '{name}' has shape {list(array.shape)}, but there are {count} samples",
                "its first axis must be the samples",
            )
        if array.dtype.kind not in "fiub":
            raise RnnpruneError(f"{path}: '{name}' has type {array.dtype}", "save numbers")
    if lengths is not None and (lengths.ndim != 1 or lengths.dtype.kind not in "iu"):
        raise RnnpruneError(
            f"{path}: 'lengths' has shape {list(lengths.shape)} and type {lengths.dtype}",
            "it must hold an integer for each sample",
        )
    if lengths is not None and len(lengths) and int(lengths.min()) < 1:
        raise RnnpruneError(
            f"{path}: 'lengths' holds {int(lengths.min())}", "every sample has at least one step"
        )


def _fit(array: Array, spec: TensorSpec, path: Path) -> Array:
    """Casts an array to an input's type where that loses nothing; checks its rank."""
    if spec.shape is not None and array.ndim not in (len(spec.shape), len(spec.shape) + 1):
        raise RnnpruneError(
            f"{path}: array '{spec.name}' has shape {list(array.shape)}, the model wants"
            f" {_shown(spec)}",
            "its first axis must be the samples",
        )
    if array.dtype == spec.dtype:
        return array
    if not np.can_cast(array.dtype, spec.dtype, "same_kind") and not (
        array.dtype.kind in "iu" and spec.dtype.kind in "iu"
    ):
        raise RnnpruneError(
            f"{path}: array '{spec.name}' has type {array.dtype}, the model wants {spec.dtype}",
            f"save it as {spec.dtype}",
        )
    return _cast(array, spec.dtype, spec.name, path)


def _cast(array: Array, dtype: np.dtype[Any], name: str, path: Path) -> Array:
    """Casts an array; one that is too large to be copied in memory into a temporary file."""
    rows = np.atleast_1d(array)
    cast = Rows(rows.shape, dtype, f"'{name}' as {dtype}")
    for start, stop in bounds(rows):
        part = rows[start:stop]
        with np.errstate(over="ignore"):
            new = part.astype(dtype)
        if array.dtype.kind in "iu" and not np.array_equal(new, part):
            raise RnnpruneError(
                f"{path}: array '{name}' holds values that {dtype} cannot hold",
                "check the data against the model's input",
            )
        cast.add(new)
    return cast.array().reshape(array.shape)


def _read_saved(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Reads a folder of ``tf.data.Dataset.save``, whose elements are samples or batches.

    They are samples if some input has one axis less than the model's, and batches if some has one
    more (batches of whole feeds). If all have as many, they are batches if the first axis of every
    input of the model is the samples, and whole feeds if that of none is.
    """
    from rnnprune_cli.tensorflow.saved_data import SavedData

    saved = SavedData(path)
    ranks = dict(saved.ranks)
    if len(specs) == 1 and "x" in ranks:
        ranks.setdefault(specs[0].name, ranks["x"])
    known = [(ranks[s.name] - len(s.shape), s) for s in specs if s.shape and s.name in ranks]
    more = [number for number, _ in known]
    if not known or min(more) < 0:
        return saved.arrays(batched=False)
    if max(more) > 0:
        return saved.arrays(batched=True)
    first = {_begins_with_samples(spec) for _, spec in known}
    if len(first) > 1:
        raise RnnpruneError(
            f"{path}: whether an element is a sample or a batch cannot be told",
            "save one sample in each element, without a batch axis (dataset.unbatch())",
        )
    return saved.arrays(batched=first == {True})


def _has_sample_axis(array: Array, spec: TensorSpec) -> bool:
    """Tells whether the first axis of an array that has the input's rank counts samples."""
    return _begins_with_samples(spec) and array.ndim == len(spec.shape or ())


def _begins_with_samples(spec: TensorSpec) -> bool:
    """Tells whether the first axis of an input of a model is the samples."""
    if not spec.shape:
        return False
    first = spec.shape[0]
    if isinstance(first, str) and _STEPS_NAME.search(first):
        return False  # [steps, batch, …]: one sample is a whole feed
    return not isinstance(first, int) or first == 1


def _shown(spec: TensorSpec) -> str:
    return str([d if d is not None else "?" for d in spec.shape or ()]).replace("'", "")


# Steps to try: long enough to be worth timing first, then what common front ends insist on.
_STEPS = (100, 128, 64, 512, 576, 1024, 16000, 16, 8, 4, 2, 1)
_MAX_ELEMENTS = 1 << 24
_MAX_RESIZED = 1 << 28
_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)
_STEPS_NAME = re.compile(r"time|seq|step|frame|len|^(t|s|l)$", re.IGNORECASE)


def made_up_feeds(runner: Runner, seed: int, longest: int = _STEPS[0]) -> list[Feed]:
    """Makes seeded inputs that a model accepts.

    Types, fixed sizes and shared symbolic dimensions are respected; integers stay in the range of
    the tables they index; each value that the graph compares a scalar input with is tried, and one
    other, so that every branch on it runs.

    Args:
        runner: The model; it is run to find sizes that it accepts.
        seed: Seed of the generator.
        longest: Steps to try first, if fewer than usual.

    Returns:
        At least one feed.

    Raises:
        RnnpruneError: If no combination of sizes was accepted.
    """
    odd = [s for s in runner.inputs if s.dtype.kind not in "fiub"]
    if odd:
        raise RnnpruneError(
            f"inputs cannot be made up for '{odd[0].name}': it is no numeric tensor",
            "rnnprune supports models with numeric inputs",
        )
    feeds: list[Feed] = []
    problem: RnnpruneError | None = None
    for modes in _modes(runner.inputs):
        for batch, steps in _sizes(runner, longest):
            feed = _feed(runner.inputs, modes, batch, steps, np.random.default_rng(seed))
            if max((a.size for a in feed.values()), default=0) > _MAX_ELEMENTS:
                continue
            try:
                outputs = runner.run(feed)
            except RnnpruneError as error:
                problem = problem or error
                continue
            if all(o.size for o in outputs) and not any(has_nan(o) for o in outputs):
                feeds.append(feed)
                break
        runner.reset()
    if not feeds:
        shapes = ", ".join(f"{s.name} {_shown(s)}" for s in runner.inputs)
        raise RnnpruneError(
            f"the model accepts no made-up input ({shapes}): "
            + (problem.message if problem else "every output was empty or NaN"),
            "give inputs that it accepts with --data inputs.npz (an array for each input)",
        )
    return feeds


def varied_feeds(runner: Runner, seed: int, longest: int = _STEPS[0]) -> list[Feed]:
    """Makes inputs as :func:`made_up_feeds` does, and some more of other sizes where accepted."""
    feeds = made_up_feeds(runner, seed, longest)
    if not any(not isinstance(d, int) for s in runner.inputs for d in s.shape or ()):
        return feeds
    for modes in _modes(runner.inputs):
        for batch, steps in ((3, 5), (2, 1)):
            feed = _feed(runner.inputs, modes, batch, steps, np.random.default_rng([seed, steps]))
            try:
                outputs = runner.run(feed)
            except RnnpruneError:
                continue
            if not any(has_nan(output) for output in outputs):
                feeds.append(feed)
        runner.reset()
    return feeds


@dataclass(frozen=True)
class FeedSize:
    """How much one call works on; None where that is not known.

    Attributes:
        batch: Samples.
        steps: Of each of them; of the longest if the model is told how long they are.
        total: Steps of all of them, without padding that the model is told of.
    """

    batch: int | None
    steps: int | None
    total: int | None


def feed_size(feed: Feed, specs: Sequence[TensorSpec]) -> FeedSize:
    """Returns how much a feed holds."""
    batch, steps = None, None
    for spec, axis, kind in _axes(specs):
        size = feed[spec.name].shape[axis]
        if kind == "batch":
            batch = size if batch is None else batch
        else:
            steps = size if steps is None else steps
    lengths = next((feed[spec.name] for spec in specs if spec.is_length), None)
    if lengths is not None and lengths.size and steps is not None:
        total = int(lengths.sum()) if lengths.size == batch else None
        return FeedSize(batch, int(lengths.max()), total)
    total = None if batch is None or steps is None else batch * steps
    return FeedSize(batch, steps, total)


def resized(
    feed: Feed, specs: Sequence[TensorSpec], batch: int | None, steps: int | None
) -> dict[str, Array]:
    """Returns a feed of another size; what is too short begins again.

    Lengths that the model is told stay, unless ``steps`` are asked for: then they are these.

    Args:
        feed: Some input of a model.
        specs: The model's inputs.
        batch: Samples; None to keep them.
        steps: Steps of each; None to keep them.

    Raises:
        UsageError: If the model's inputs have one size only, or it would be too large.
    """
    wanted = {"batch": batch, "steps": steps}
    new = dict(feed)
    for kind, size in wanted.items():
        found = [(spec, axis) for spec, axis, own in _axes(specs) if own == kind]
        if size is None:
            continue
        fixed = [spec for spec, axis in found if isinstance((spec.shape or ())[axis], int)]
        if not found or any(new[s.name].shape[axis] != size for s, axis in found if s in fixed):
            name = fixed[0].name if fixed else specs[0].name
            what = f"{kind} of input '{name}' cannot be {size}"
            raise UsageError(
                f"the {what}: its shape is {_shown(fixed[0] if fixed else specs[0])}",
                f"leave out --{kind}, or export the model with a dynamic axis",
            )
        if kind == "batch":
            lengths = [s for s in specs if s.is_length and s.shape]
            found += [(s, 0) for s in lengths if not isinstance((s.shape or ())[0], int)]
        for spec, axis in found:
            array = new[spec.name]
            if array.size // max(array.shape[axis], 1) * size > _MAX_RESIZED:
                raise UsageError(
                    f"--{kind} {size} makes '{spec.name}' larger than {_MAX_RESIZED:,} values",
                    f"give a smaller --{kind}",
                )
            new[spec.name] = np.take(array, np.arange(size) % array.shape[axis], axis)
    if steps is not None:
        for spec in specs:
            if spec.is_length:
                new[spec.name] = np.full_like(new[spec.name], steps)
    return new


def _axes(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, int, str]]:
    """Yields the axes of inputs that are the batch, or the steps, by their names or places."""
    for number, spec in enumerate(specs):
        shape = spec.shape or ()
        if not shape or spec.is_length:
            continue
        named = {
            kind: next(
                (k for k, d in enumerate(shape) if isinstance(d, str) and of.search(d)), None
            )
            for kind, of in (("batch", _BATCH_NAME), ("steps", _STEPS_NAME))
        }
        batch, steps = named["batch"], named["steps"]
        # [layers, batch, hidden] is an initial state, which has no steps.
        state = len(shape) == 3 and number > 0 and isinstance(shape[0], int) and steps is None
        if batch is None and (state or steps == 0):
            features = len(shape) == 2 and isinstance(shape[1], int)
            batch = 1 if len(shape) > 1 and not features else None
        elif batch is None:
            batch = 0
        if steps is None and len(shape) > 1 and not state:
            place = 1 if batch == 0 else 0
            sequence = (
                len(shape) > 2 or spec.dtype.kind in "iu" or not isinstance(shape[place], int)
            )
            steps = place if sequence else None
        if batch is not None:
            yield spec, batch, "batch"
        if steps is not None:
            yield spec, steps, "steps"


def padded_on_the_right(feed: Feed) -> Feed:
    """Returns a feed whose sequences end in zeros, each earlier than the one before it.

    The first axis is taken for the samples and the second for the steps. Zeros elsewhere become
    ones where the values are integers: an Embedding may take them for padding.
    """
    padded: dict[str, Array] = {}
    for name, array in feed.items():
        new = array.copy()
        if array.ndim > 1 and array.shape[1] > 1:
            if array.dtype.kind in "iu":
                new[new == 0] = 1
            for sample in range(1, array.shape[0]):
                new[sample, max(1, array.shape[1] - sample) :] = 0
        padded[name] = new
    return padded


def has_nan(output: Array) -> bool:
    """Tells whether an output holds NaN, which would make every comparison with it empty."""
    return output.dtype.kind == "f" and bool(np.isnan(output).any())


def _modes(specs: Sequence[TensorSpec]) -> list[dict[str, int | float]]:
    """Assignments of the scalar inputs that the graph compares with constants."""
    assignments: list[dict[str, int | float]] = [{}]
    for spec in specs:
        if spec.choices and not any(isinstance(d, int) and d > 1 for d in spec.shape or ()):
            other = max(spec.choices) + 1 if spec.dtype.kind != "b" else False
            values = [*spec.choices[:4], other]
            assignments = [{**a, spec.name: v} for a in assignments for v in values][:16]
    return assignments


def _sizes(runner: Runner, longest: int) -> Iterator[tuple[int, int]]:
    """Yields (batch, steps) to try, the most natural first; batch and steps may be mistaken."""
    dynamic = [d for s in runner.inputs for d in s.shape or () if not isinstance(d, int)]
    if not dynamic:
        yield 1, 1
        return
    first = (longest,) if longest < _STEPS[0] else ()
    steps = tuple(dict.fromkeys((*first, *_STEPS, *runner.size_hints)))
    for batch in dict.fromkeys((1, *runner.size_hints)):
        for step in steps:
            yield batch, step
    for batch in steps:
        yield batch, 1


def _feed(
    specs: Sequence[TensorSpec],
    modes: Mapping[str, int | float],
    batch: int,
    steps: int,
    generator: np.random.Generator,
) -> dict[str, Array]:
    feed: dict[str, Array] = {}
    for spec in specs:
        shape = [
            dim if isinstance(dim, int) else batch if _is_batch(spec, axis) else steps
            for axis, dim in enumerate(spec.shape or ())
        ]
        feed[spec.name] = _values(spec, tuple(shape), modes, steps, generator)
    return feed


def _is_batch(spec: TensorSpec, axis: int) -> bool:
    """Tells whether a dynamic axis is the batch, by its name or else by its place."""
    shape = spec.shape or ()
    name = shape[axis]
    if isinstance(name, str) and _BATCH_NAME.search(name):
        return True
    if isinstance(name, str) and _STEPS_NAME.search(name):
        return False
    # [layers, batch, hidden] is an initial state; elsewhere the batch comes first.
    state = len(shape) == 3 and isinstance(shape[0], int) and isinstance(shape[2], int)
    return axis == (1 if state else 0)


def _values(
    spec: TensorSpec,
    shape: tuple[int, ...],
    modes: Mapping[str, int | float],
    steps: int,
    generator: np.random.Generator,
) -> Array:
    if spec.name in modes:
        return np.full(shape, modes[spec.name], spec.dtype)
    if spec.is_length:
        return np.full(shape, steps, spec.dtype)
    if spec.dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(np.bool_)
    low = spec.minimum if spec.minimum is not None else 0
    high = spec.maximum if spec.maximum is not None else 1
    return generator.integers(low, high, shape, endpoint=True).astype(spec.dtype)
