"""Inputs for a model: from a data set, or made up from its input specifications."""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import Array, BoolArray, Feed, Runner, TensorSpec

MAX_DATA_BYTES = 8 << 30
"""A data set larger than this, unpacked, is refused: a small zip can claim any size."""
_RESERVED = ("labels", "lengths")
_TARGET = "target:"


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
            name: (array[start] if name in self.stacked else array[start:stop])
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
            name: (
                a[samples, :steps] if a.ndim > 1 and a.shape[1] == self.padded_steps else a[samples]
            )
            if name in self.per_sample
            else a
            for name, a in self.inputs.items()
        }

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


def load_dataset(path: Path, specs: Sequence[TensorSpec]) -> Dataset:
    """Reads an ``.npz`` data set for a model.

    One array for each model input, under the input's name (or ``x`` if there is one input), first
    axis the samples; ``labels``, or ``target:<output>`` for each; ``lengths`` of padded sequences.

    Args:
        path: The file. Pickled arrays are refused.
        specs: The model's inputs.

    Raises:
        RnnpruneError: If the file cannot be read or does not fit the model.
    """
    if path.suffix != ".npz":
        raise UsageError(
            f"{path}: data must be an .npz file", "save it with numpy.savez_compressed"
        )
    arrays = _read_npz(path)
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
        n for n in arrays if n not in names and n not in _RESERVED and not n.startswith(_TARGET)
    ]
    if unknown:
        raise RnnpruneError(
            f"{path}: array '{unknown[0]}' is no input of the model", closest(unknown[0], names)
        )
    inputs = {s.name: _fit(arrays[s.name], s, path) for s in specs}
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
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
    targets = {n.removeprefix(_TARGET): a for n, a in arrays.items() if n.startswith(_TARGET)}
    if "labels" in arrays:
        targets[""] = arrays["labels"]
    lengths = arrays.get("lengths")
    if "lengths" in stacked or (lengths is not None and not per_sample):
        lengths = None  # of the sequences inside one feed, not of samples
    if lengths is None:  # the model may be told itself how long sequences are
        told = [inputs[s.name] for s in specs if s.is_length and s.name in per_sample - stacked]
        lengths = next((a for a in told if a.shape == (count,)), None)
    _check_targets(targets, lengths, count, bool(per_sample), path)
    return Dataset(
        inputs, frozenset(per_sample), frozenset(stacked), single, count, targets, lengths
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


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(item.file_size for item in archive.infolist())
            stored = path.stat().st_size
            if claimed > MAX_DATA_BYTES or claimed > 1000 * stored + (64 << 20):
                raise RnnpruneError(
                    f"{path} unpacks to {claimed / 2**30:.1f} GiB from {stored / 2**20:.1f} MiB",
                    "that is no plausible data set; split it if it is one",
                )
        with np.load(path, allow_pickle=False) as archive_arrays:
            return {name: archive_arrays[name] for name in archive_arrays.files}
    except FileNotFoundError as error:
        raise RnnpruneError(f"{path} does not exist", "check the path given with --data") from error
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, MemoryError) as error:
        pickled = "pickle" in str(error).lower() or "object" in str(error).lower()
        raise RnnpruneError(
            f"{path} cannot be read: " + ("it holds pickled objects" if pickled else str(error)),
            "save plain arrays with numpy.savez_compressed",
        ) from error


def _fit(array: Array, spec: TensorSpec, path: Path) -> Array:
    """Casts an array to an input's type where that loses nothing; checks its rank."""
    if array.dtype != spec.dtype:
        if not np.can_cast(array.dtype, spec.dtype, "same_kind") and not (
            array.dtype.kind in "iu" and spec.dtype.kind in "iu"
        ):
            raise RnnpruneError(
                f"{path}: array '{spec.name}' has type {array.dtype}, the model wants {spec.dtype}",
                f"save it as {spec.dtype}",
            )
        with np.errstate(over="ignore"):
            cast = array.astype(spec.dtype)
        if array.dtype.kind in "iu" and not np.array_equal(cast, array):
            raise RnnpruneError(
                f"{path}: array '{spec.name}' holds values that {spec.dtype} cannot hold",
                "check the data against the model's input",
            )
        array = cast
    if spec.shape is not None and array.ndim not in (len(spec.shape), len(spec.shape) + 1):
        raise RnnpruneError(
            f"{path}: array '{spec.name}' has shape {list(array.shape)}, the model wants"
            f" {_shown(spec)}",
            "its first axis must be the samples",
        )
    return array


def _has_sample_axis(array: Array, spec: TensorSpec) -> bool:
    """Tells whether the first axis of an array that has the input's rank counts samples."""
    if not spec.shape or array.ndim != len(spec.shape):
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
