"""Reads ``.npz`` files that nobody vouches for; large members that are stored stay on disk.

A member is mapped, rather than read, if it is not compressed (``numpy.savez``) and large. What its
headers claim is held against the file before anything is allocated by it, and its checksum is
worked out, as reading it would. Pickled objects are refused.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError, printable
from rnnprune_cli.model import Array
from rnnprune_cli.spool import plausible

MAX_DATA_BYTES = 8 << 30
"""Members of more bytes than this, unpacked, are not read: a small zip can claim any size."""
MAPPED_BYTES = 16 << 20
"""Smaller members are always read: then nothing depends on the file any more."""
_HEADER_BYTES = 1 << 16
"""Where the data of a member must have begun; NumPy refuses headers of more than 10,000 bytes."""
_CHUNK_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_SUFFIX = ".npy"


@dataclass(frozen=True)
class _Member:
    """One array of an archive: its entry, what its header says, and where its data begin in it."""

    info: zipfile.ZipInfo
    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    begin: int


def read_npz(path: Path) -> dict[str, Array]:
    """Returns the arrays of an ``.npz`` file, in its order.

    Args:
        path: The file. It must not change as long as its arrays are used.

    Returns:
        Name → array of any type but objects; mapped ones are a read-only ``numpy.memmap``, which
        may be unaligned.

    Raises:
        RnnpruneError: If the file cannot be read, is damaged, holds anything but plain arrays, or
            would unpack to an implausible size.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            mapped = [i for i in infos if _can_be_mapped(i) and i.file_size >= MAPPED_BYTES]
            _check_sizes(path, infos, mapped)
            members = [_member(path, archive, info) for info in infos]
            if len({member.name for member in members}) < len(members):
                raise ValueError("it holds two arrays of one name")
            places = _places(file, mapped)
            arrays: dict[str, Array] = {}
            for member in members:
                place = places.get(id(member.info))
                if place is None or member.dtype.itemsize * math.prod(member.shape) == 0:
                    with archive.open(member.info) as packed:
                        arrays[member.name] = np.lib.format.read_array(packed, allow_pickle=False)
                else:
                    arrays[member.name] = _mapped(file, member, place)
            return arrays
    except FileNotFoundError as error:
        raise RnnpruneError(f"{path} does not exist", "check the path given with --data") from error
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        EOFError,
        KeyError,
        MemoryError,
        OverflowError,
        RuntimeError,  # encrypted; of its subclasses, NotImplementedError: a kind of compression
        struct.error,
        zlib.error,
    ) as error:
        reason = str(error) or type(error).__name__
        raise RnnpruneError(
            f"{path} cannot be read: {reason}", "save plain arrays with numpy.savez_compressed"
        ) from error


def _can_be_mapped(info: zipfile.ZipInfo) -> bool:
    """Tells whether a member lies in the file as it is; zipfile opens none that is encrypted."""
    return info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size


def _check_sizes(
    path: Path, infos: Sequence[zipfile.ZipInfo], mapped: Sequence[zipfile.ZipInfo]
) -> None:
    """Refuses archives whose members that are read claim too much."""
    kept = {id(info) for info in mapped}
    claimed = sum(info.file_size for info in infos if id(info) not in kept)
    stored = path.stat().st_size
    if claimed > 1000 * stored + (64 << 20):
        raise RnnpruneError(
            f"{path} unpacks to {claimed / 2**30:.1f} GiB from {stored / 2**20:.1f} MiB",
            "that is no plausible data set; split it if it is one",
        )
    if claimed > MAX_DATA_BYTES:
        raise RnnpruneError(
            f"{path} unpacks to {claimed / 2**30:.1f} GiB, which must fit in memory",
            "save it with numpy.savez, uncompressed: large arrays are then not read as a whole",
        )


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Reads the header of a member and holds it against the member's size."""
    name, shown = info.filename, printable(info.filename)
    if not name.endswith(_SUFFIX):
        raise ValueError(f"'{shown}' in it is no array")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"'{shown}' is compressed in a way that NumPy does not use")
    with archive.open(info) as packed:
        head = io.BytesIO(packed.read(_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(head)
    except Exception as error:  # what a damaged header leads to is documented nowhere
        raise ValueError(f"the header of '{shown}' is damaged") from error
    if dtype.hasobject:
        raise RnnpruneError(
            f"{path} cannot be read: it holds pickled objects",
            "save plain arrays with numpy.savez_compressed",
        )
    if dtype.names is not None or dtype.subdtype is not None or any(n < 0 for n in shape):
        raise ValueError(f"'{shown}' is no plain array")
    if not plausible((dtype.itemsize, *shape)):
        raise ValueError(f"'{shown}' is empty and claims the shape {list(shape)}")
    size, held = dtype.itemsize * math.prod(shape), info.file_size - head.tell()
    if size != held:
        raise ValueError(
            f"'{shown}' claims the shape {list(shape)} of {dtype}, {size} bytes, but holds {held}"
        )
    return _Member(info, name.removesuffix(_SUFFIX), shape, fortran, dtype, head.tell())


def _places(file: IO[bytes], infos: Sequence[zipfile.ZipInfo]) -> dict[int, int]:
    """Returns where the contents of stored members lie, by ``id`` of member.

    They must lie within the file, apart from one another.
    """
    end = file.seek(0, io.SEEK_END)
    places: dict[int, int] = {}
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = info.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or info.header_offset < last:
            raise ValueError(f"'{printable(info.filename)}' overlaps another array")
        last = begin + info.file_size
        if last > end:
            raise ValueError(f"'{printable(info.filename)}' reaches beyond the end of the file")
        places[id(info)] = begin
    return places


def _mapped(file: IO[bytes], member: _Member, place: int) -> Array:
    """Maps an array, after working out its checksum."""
    file.seek(place)
    checksum, left = 0, member.info.file_size
    while left and (part := file.read(min(left, _CHUNK_BYTES))):
        checksum, left = zlib.crc32(part, checksum), left - len(part)
    if left or checksum != member.info.CRC:
        raise ValueError(f"'{printable(member.name)}' does not have its checksum")
    order: Any = "F" if member.fortran else "C"
    begin = place + member.begin
    return np.memmap(file, member.dtype, "r", offset=begin, shape=member.shape, order=order)
