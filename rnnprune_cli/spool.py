"""Arrays that are made row after row: in memory if they are small, else mapped from disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array

MAX_IN_MEMORY = 256 << 20
"""Arrays of more bytes are not copied in memory."""
CHUNK_BYTES = 16 << 20
"""What is worked on at once of an array that may be larger than memory."""
_MAX_BESIDE_EMPTY = 1 << 24
"""Elements that an empty array may have beside its empty axes: there are loops over samples."""


class Rows:
    """An array in the making.

    A large one goes to a temporary file that has no name any more (on Windows: that goes when it is
    closed), so that nothing is left behind however the process ends. It is written, not mapped,
    until it is complete: a disk that is full is then an error and not the end of the process.

    Args:
        shape: Of the whole array, the rows first.
        dtype: Its type.
        what: What it is, for messages.

    Raises:
        RnnpruneError: If the disk has no room for it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
        self._shape, self._dtype, self._what = shape, dtype, what
        self._done = 0
        self._memory: Array | None = None
        self._file: IO[bytes] | None = None
        size = dtype.itemsize * math.prod(shape)
        if size <= MAX_IN_MEMORY:
            self._memory = np.empty(shape, dtype)
            return
        try:
            room = shutil.disk_usage(tempfile.gettempdir()).free
            if size > room:
                raise self._no_room(f"{size / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free")
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed once it is mapped
        except OSError as error:
            raise self._no_room(str(error)) from error

    def add(self, rows: Array) -> None:
        """Appends rows of the array's shape and type.

        Raises:
            RnnpruneError: If they cannot be written.
        """
        stop = self._done + len(rows)
        if self._memory is not None:
            self._memory[self._done : stop] = rows
        else:
            assert self._file is not None
            try:
                self._file.write(np.ascontiguousarray(rows, self._dtype).data)
            except OSError as error:
                raise self._no_room(str(error)) from error
        self._done = stop

    def array(self) -> Array:
        """Returns the complete array; from a file it is a read-only ``numpy.memmap``."""
        assert self._done == self._shape[0]
        if self._memory is not None:
            return self._memory
        assert self._file is not None
        try:
            self._file.flush()
        except OSError as error:
            raise self._no_room(str(error)) from error
        with self._file:  # the map keeps it open
            return np.memmap(self._file, self._dtype, "r", shape=self._shape)

    def _no_room(self, reason: str) -> RnnpruneError:
        return RnnpruneError(
            f"{self._what} must be copied to {tempfile.gettempdir()}, which fails: {reason}",
            "set TMPDIR to a folder on a disk with enough room",
        )


def plausible(shape: Sequence[int]) -> bool:
    """Tells whether the axes of an array say anything: beside an empty one, others cost nothing."""
    return 0 not in shape or math.prod(n for n in shape if n) <= _MAX_BESIDE_EMPTY


def bounds(array: Array) -> Iterator[tuple[int, int]]:
    """Yields bounds of consecutive rows of which few enough bytes are worked on at once."""
    count = len(array)
    step = max(1, CHUNK_BYTES // max(array.nbytes // max(count, 1), 1))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def chunks(array: Array) -> Iterator[Array]:
    """Yields all elements of an array in one-dimensional parts, in whatever order they lie."""
    if array.ndim and not (array.flags.c_contiguous or array.flags.f_contiguous):
        for start, stop in bounds(array):
            yield array[start:stop].ravel()
        return
    flat = array.ravel(order="K")
    step = max(1, CHUNK_BYTES // array.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def picked(array: Array, indices: Array, what: str) -> Array:
    """Returns some rows of an array.

    Rows at equal distances are a view, and so stay where they are; others are copied: in memory if
    they are few, else to disk.

    Args:
        array: Any array with at least one axis.
        indices: int64 ``[rows]``: which, within the array's length, not negative.
        what: What the array is, for messages.

    Raises:
        RnnpruneError: If the disk has no room for the copy.
    """
    steps = np.diff(indices)
    step = int(steps[0]) if len(steps) else 1
    if len(indices) and step > 0 and (steps == step).all():
        view: Array = array[int(indices[0]) : int(indices[-1]) + 1 : step]
        return view
    rows = Rows((len(indices), *array.shape[1:]), array.dtype, what)
    each = max(1, array.nbytes // max(len(array), 1))
    at_once = max(1, CHUNK_BYTES // each)
    for start in range(0, len(indices), at_once):
        rows.add(array[indices[start : start + at_once]])
    return rows.array()
