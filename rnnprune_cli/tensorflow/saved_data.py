"""Reads folders that ``tf.data.Dataset.save`` wrote, whoever wrote them.

Such a folder holds no code and no pickled objects: ``dataset_spec.pb`` is a protocol buffer that
tells how an element is nested (``StructuredValue``), ``snapshot.metadata`` another that names the
folder of the run, and ``<run>/*.shard/*.snapshot`` are TFRecord files, optionally in gzip, with a
``TensorProto`` for each tensor of each element. ``tf.data.Dataset.load`` trusts these: it looks up
type names, makes tensors of the shape that a record claims, and sizes buffers by the length that a
record claims. So it is not used.

1. The structure is read here; only dense tensors of numbers in dictionaries and tuples are let
   through.
2. All records are walked through here: their lengths are held against the file, their shapes
   against their contents.
3. They are read by TensorFlow's own reader of records, which works out their checksums, and become
   arrays here. No operation of TensorFlow runs, so that its threads can still be set.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from rnnprune_cli.data import LABELS, LENGTHS, TARGET
from rnnprune_cli.errors import RnnpruneError, printable
from rnnprune_cli.model import Array
from rnnprune_cli.spool import Rows, plausible
from rnnprune_cli.tensorflow.runtime import first_line, import_tensorflow

SPEC_FILE = "dataset_spec.pb"
"""What is in every folder that ``tf.data.Dataset.save`` wrote."""

_METADATA_FILE = "snapshot.metadata"
_VERSION = 2
_MAX_METADATA_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_AGAIN = "write it again with tf.data.Dataset.save, compression GZIP or none"
_DENSE = "save elements that are dictionaries of dense tensors, or tuples (features, labels)"


class SavedData:
    """A folder written by ``tf.data.Dataset.save``.

    Elements are a dictionary of tensors, a tuple ``(features, labels)`` of tensors or dictionaries,
    or one tensor. Features that have no name are ``x``; labels are ``labels``, or in a dictionary
    ``target:<output>``.

    Args:
        path: The folder.

    Attributes:
        ranks: Name of each tensor of an element → its number of axes.

    Raises:
        RnnpruneError: If TensorFlow is not installed, or the folder is damaged or holds something
            else than dense numbers.
    """

    ranks: Mapping[str, int]

    def __init__(self, path: Path) -> None:
        self._path = path
        if not (path / SPEC_FILE).is_file():
            raise RnnpruneError(
                f"{path} is no data set: it holds no {SPEC_FILE}",
                "give an .npz file, or a folder written by tf.data.Dataset.save",
            )
        try:
            self._tf = import_tensorflow()
        except RnnpruneError as error:
            raise RnnpruneError(
                f"{path} is a saved tf.data set, which needs the tensorflow package", error.hint
            ) from error
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorflow.core.framework import tensor_pb2

        self._proto = tensor_pb2.TensorProto
        self._damaged = (
            DecodeError,
            EOFError,
            OSError,
            TypeError,
            ValueError,
            struct.error,
            zlib.error,
            self._tf.errors.OpError,
        )
        try:
            names = self._structure()
            self._dtypes, self._files = self._contents(names)
            self._limit = 1000 * sum(file.stat().st_size for file in self._files) + (64 << 20)
            self._shapes = self._walk()
        except self._damaged as error:
            raise self._unreadable(first_line(error)) from error
        if self._count == 0:
            raise RnnpruneError(f"{path} holds no samples", "there is nothing to compare on")
        self.ranks = {name: len(shapes[0]) for name, shapes in self._shapes.items()}
        for name, shapes in self._shapes.items():
            if any(len(shape) != self.ranks[name] for shape in shapes):
                raise RnnpruneError(
                    f"{path}: '{printable(name)}' has elements with different numbers of axes",
                    _DENSE,
                )

    def arrays(self, batched: bool) -> dict[str, Array]:
        """Returns the arrays of all samples, as an ``.npz`` would hold them.

        Samples of different lengths are padded on the right: with zeros, labels of classes with -1,
        which counts nowhere. If inputs have different lengths, ``lengths`` is made of them.

        Args:
            batched: Elements are batches, whose first axis is the samples; else each is a sample.

        Returns:
            Name → array, first axis the samples; large ones are a read-only ``numpy.memmap``.

        Raises:
            RnnpruneError: If the samples cannot be padded so, there is no room for them, or their
                checksums are wrong.
        """
        begin = 1 if batched else 0
        shapes = {name: [s[begin:] for s in found] for name, found in self._shapes.items()}
        sizes = self._batches() if batched else [1] * self._count
        lengths = self._lengths(shapes, max(sizes) > 1)
        full = {
            name: (sum(sizes), *(max(along) for along in zip(*set(found), strict=True)))
            for name, found in shapes.items()
        }
        size = sum(math.prod(full[n]) * dtype.itemsize for n, dtype in self._dtypes.items())
        if size > self._limit:
            raise RnnpruneError(
                f"{self._path}, padded to its longest sample, takes {size / 2**30:.1f} GiB",
                "cut samples that are much longer than the others",
            )
        rows = {
            name: Rows(full[name], dtype, f"'{printable(name)}' of {self._path}")
            for name, dtype in self._dtypes.items()
        }
        try:
            for element in self._read():
                for name, tensor in element.items():
                    samples = tensor if batched else tensor[None]
                    rows[name].add(_padded(samples, full[name][1:], _filler(name, tensor)))
        except self._damaged as error:
            raise self._unreadable(first_line(error)) from error
        arrays = {name: row.array() for name, row in rows.items()}
        return arrays if lengths is None else {**arrays, LENGTHS: lengths}

    def _batches(self) -> list[int]:
        """Returns how many samples each element holds."""
        sizes = {name: [shape[:1] for shape in found] for name, found in self._shapes.items()}
        first = next(iter(sizes.values()))
        if () in first or any(found != first for found in sizes.values()):
            raise RnnpruneError(
                f"{self._path}: the tensors of an element have different numbers of samples",
                "save one sample in each element, without a batch axis (dataset.unbatch())",
            )
        return [size for (size,) in first]

    def _lengths(
        self, shapes: Mapping[str, Sequence[tuple[int, ...]]], several: bool
    ) -> Array | None:
        """Returns the steps of each sample, if they differ and are not given.

        Args:
            shapes: Of the samples of each element.
            several: An element may hold several.
        """
        steps: dict[str, list[int]] = {}
        for name, found in shapes.items():
            differs = [len(set(along)) > 1 for along in zip(*set(found), strict=True)]
            if any(differs[1:]):
                raise RnnpruneError(
                    f"{self._path}: samples of '{printable(name)}' differ in more than their steps",
                    "pad them to one size, and add 'lengths'; the first axis is the steps",
                )
            if any(differs):
                steps[name] = [shape[0] for shape in found]
        if LENGTHS in self._dtypes:
            return None
        inputs = {name: found for name, found in steps.items() if not _is_target(name)}
        length = next(iter(inputs.values()), None)
        if length is not None and several:
            raise RnnpruneError(
                f"{self._path}: batches are padded to different lengths, so that those of the"
                " samples are not known",
                "add 'lengths' to the elements, or save them before they are batched",
            )
        for name, other in inputs.items():
            if other != length:
                raise RnnpruneError(
                    f"{self._path}: samples of '{printable(name)}' have other lengths than those of"
                    f" '{printable(next(iter(inputs)))}'",
                    "pad them, and add 'lengths', which says how many steps count",
                )
        for name in steps:
            if length is None and self._dtypes[name].kind != "i":
                raise RnnpruneError(
                    f"{self._path}: samples of '{printable(name)}' have different lengths, but"
                    " those of no input have",
                    "pad it, and add 'lengths', which says how many steps count",
                )
        return None if length is None else np.array(length, np.int64)

    def _structure(self) -> list[str]:
        """Reads how an element is nested; returns the names of its tensors, in their order."""
        from tensorflow.core.protobuf import struct_pb2

        element = struct_pb2.StructuredValue.FromString(self._small_file(SPEC_FILE))
        kind = element.WhichOneof("kind")
        if kind in ("tuple_value", "named_tuple_value"):
            values = [*element.tuple_value.values]
            values += [pair.value for pair in element.named_tuple_value.values]
            if len(values) not in (1, 2):
                raise RnnpruneError(
                    f"{self._path}: an element is a tuple of {len(values)}",
                    "save (features, labels); sample weights are not supported",
                )
            names = self._tensors(values[0], "x", "")
            names += self._tensors(values[1], LABELS, TARGET) if len(values) > 1 else []
        else:
            names = self._tensors(element, "x", "")
        if len(set(names)) < len(names) or not names:
            raise RnnpruneError(f"{self._path}: an element has no tensor, or two of a name", _DENSE)
        return names

    def _tensors(self, value: Any, alone: str, prefix: str) -> list[str]:  # noqa: ANN401  protobuf
        """Returns the names of the tensors of a value: ``alone``, or the keys of a dictionary."""
        kind = value.WhichOneof("kind")
        dense = ("tensor_spec_value", "bounded_tensor_spec_value")
        if kind in dense:
            return [alone]
        fields = dict(value.dict_value.fields) if kind == "dict_value" else {}
        if not fields or any(field.WhichOneof("kind") not in dense for field in fields.values()):
            held = value.type_spec_value.type_spec_class_name or "something else than dense tensors"
            odd = [f.type_spec_value.type_spec_class_name for f in fields.values()]
            raise RnnpruneError(
                f"{self._path}: an element holds {next(filter(None, odd), held)}", _DENSE
            )
        return [prefix + key for key in sorted(fields)]  # as tf.nest orders them

    def _contents(self, names: Sequence[str]) -> tuple[dict[str, np.dtype[Any]], list[Path]]:
        """Reads the metadata; returns the type of each tensor of an element, and the files."""
        from tensorflow.core.protobuf import snapshot_pb2

        content = self._small_file(_METADATA_FILE)
        metadata = snapshot_pb2.SnapshotMetadataRecord.FromString(content)
        if not re.fullmatch(r"\w+", metadata.run_id) or metadata.version != _VERSION:
            raise ValueError(f"its {_METADATA_FILE} is of another kind")
        if not metadata.finalized:
            raise ValueError("it was not written to its end")
        dtypes = {}
        for name, number in zip(names, metadata.dtype, strict=True):
            kind = self._tf.dtypes.as_dtype(number)
            dtypes[name] = np.dtype(kind.as_numpy_dtype)
            if dtypes[name].kind not in "fiub":
                raise RnnpruneError(
                    f"{self._path}: '{printable(name)}' has type {kind.name}", "save numbers"
                )
        self._numbers, self._count = [*metadata.dtype], metadata.num_elements
        return dtypes, sorted((self._path / metadata.run_id).glob("*.shard/*.snapshot"))

    def _small_file(self, name: str) -> bytes:
        with (self._path / name).open("rb") as file:
            content = file.read(_MAX_METADATA_BYTES + 1)
        if len(content) > _MAX_METADATA_BYTES:
            raise ValueError(f"its {name} is too large")
        return content

    def _walk(self) -> dict[str, list[tuple[int, ...]]]:
        """Checks all records but for their checksums; returns the shapes of all tensors."""
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self._dtypes}
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        left, names = self._limit, [*self._dtypes]
        for path in self._files:
            with _opened(path) as file:
                records = 0
                for record in _records(file, left):
                    left -= len(record)
                    place = records % len(names)
                    shape = self._tensor(record, place).shape
                    # Most are alike; one object for all of them.
                    shapes[names[place]].append(known.setdefault(shape, shape))
                    records += 1
                if records % len(names):
                    raise ValueError(f"{path.name} ends within an element")
        found = len(shapes[names[0]])
        if found != self._count:
            raise ValueError(f"it holds {found} of {self._count} elements")
        return shapes

    def _read(self) -> Iterator[dict[str, Array]]:
        """Yields all elements, if their checksums are right."""
        iterator = self._tf.compat.v1.io.tf_record_iterator  # others are operations
        names = [*self._dtypes]
        for path in self._files:
            with _opened(path) as file:
                # gzip has a checksum of its own; besides, two readers may not agree on its end.
                gzipped = isinstance(file, gzip.GzipFile)
                records = _records(file, self._limit) if gzipped else iterator(str(path))
                element: dict[str, Array] = {}
                for record in records:
                    name = names[len(element)]
                    element[name] = self._tensor(record, len(element))
                    if len(element) == len(names):
                        yield element
                        element = {}

    def _tensor(self, record: bytes, place: int) -> Array:
        """Returns the tensor of a record, as a view of it."""
        name, dtype = [*self._dtypes.items()][place]
        proto = self._proto.FromString(record)
        shape = tuple(dim.size for dim in proto.tensor_shape.dim)
        if proto.dtype != self._numbers[place] or any(n < 0 for n in shape):
            raise ValueError(f"a tensor of '{printable(name)}' is of another type")
        size = math.prod(shape) * dtype.itemsize
        if size != len(proto.tensor_content) or not plausible(shape):
            raise ValueError(f"a tensor of '{printable(name)}' is of another size")
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)

    def _unreadable(self, reason: str) -> RnnpruneError:
        return RnnpruneError(f"{self._path} cannot be read as saved tf.data: {reason}", _AGAIN)


def _is_target(name: str) -> bool:
    return name == LABELS or name.startswith(TARGET)


def _filler(name: str, tensor: Array) -> int:
    """Returns what a tensor is padded with: classes with a label that counts nowhere."""
    return -1 if _is_target(name) and tensor.dtype.kind == "i" else 0


def _padded(samples: Array, shape: Sequence[int], filler: int) -> Array:
    """Pads each sample on the right of its axes."""
    if samples.shape[1:] == (*shape,):
        return samples
    padded = np.full((len(samples), *shape), filler, samples.dtype)
    padded[tuple(slice(n) for n in samples.shape)] = samples
    return padded


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Opens a file of records, which may be compressed.

    Raises:
        ValueError: If it is neither in gzip nor as it is.
    """
    with path.open("rb") as file:
        start = file.read(12)
    if not start or (len(start) == 12 and _checksum(start[:8]) == start[8:]):
        return path.open("rb")
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    raise ValueError(f"{path.name} is damaged, or compressed otherwise than with GZIP")


def _records(file: IO[bytes] | gzip.GzipFile, limit: int) -> Iterator[bytes]:
    """Yields the records of a TFRecord file; the checksums of their contents are left out.

    Raises:
        ValueError: If the file is damaged, or longer than a limit.
    """
    while start := _exactly(file, 12, True):
        if _checksum(start[:8]) != start[8:]:
            raise ValueError("the length of a record does not have its checksum")
        (length,) = struct.unpack("<Q", start[:8])
        limit -= length
        if limit < 0:
            raise ValueError("it unpacks to an implausible size")
        yield _exactly(file, length)
        _exactly(file, 4)


def _exactly(file: IO[bytes] | gzip.GzipFile, length: int, or_end: bool = False) -> bytes:
    """Reads so many bytes, in parts, so that a wrong length takes no memory."""
    parts: list[bytes] = []
    left = length
    while left and (part := file.read(min(left, _CHUNK_BYTES))):
        parts.append(part)
        left -= len(part)
    if left and not (or_end and not parts):
        raise ValueError("it ends within a record")
    return b"".join(parts)


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(n >> 1) ^ (0x82F63B78 if n & 1 else 0) for n in table]
    return table


_CRC32C = _table()


def _checksum(data: bytes) -> bytes:
    """Returns the masked CRC-32C of a few bytes, as TFRecord files hold it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
