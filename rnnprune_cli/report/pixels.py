"""Pictures of weights as small PNG images, a pixel for each cell."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from rnnprune_cli.model import Array, Picture

_WEIGHT, _GONE = (36, 120, 204), (213, 94, 0)
"""Blue and vermilion, which everybody can tell apart, on white and on black."""
_FINEST = 128
"""Rows or columns of a gate's image, at most, in which units that are gone are marked."""


def gate_images(picture: Picture, kept: tuple[int, ...] | None, hidden: int) -> list[str]:
    """Returns an image for each gate, as ``data:`` addresses.

    Args:
        picture: What to show.
        kept: Old numbers of the units that stay, where some went: they are marked one by one.
        hidden: Units before.
    """
    codes = np.array([list(row) for row in picture.cells])
    levels = np.where(codes == "x", "10", codes).astype(np.uint8)
    parts = np.split(levels, max(len(picture.gates), 1))
    if kept is not None:
        gone = _gone(kept, hidden)
        parts = [_marked(part, gone, picture.weight == "R") for part in parts]
    return [_png(part) for part in parts]


def _gone(kept: tuple[int, ...], hidden: int) -> Array:
    """Returns where most units are gone, in as many places as an image has rows."""
    fine = min(hidden, _FINEST)
    stay = np.zeros(hidden)
    stay[list(kept)] = 1
    first = -(-np.arange(fine) * hidden // fine)
    share = np.add.reduceat(stay, first) / np.diff(np.append(first, hidden))
    return np.asarray(share < 0.5)


def _marked(levels: Array, gone: Array, columns_too: bool) -> Array:
    """Returns a finer image in which what went with units is marked."""
    fine = len(gone)
    rows = np.arange(fine) * len(levels) // fine
    across = np.arange(levels.shape[1])
    lost = np.broadcast_to(gone[:, None], (fine, levels.shape[1]))
    if columns_too:
        across = np.arange(fine) * levels.shape[1] // fine
        lost = gone[:, None] | gone[None]
    wide = levels[rows][:, across]
    # A cell that is cut out as a whole shows what little of it stays as its neighbours do.
    return np.where(lost, 10, np.where(wide == 10, 9, wide)).astype(np.uint8)


def _png(levels: Array) -> str:
    """Returns levels 0 to 10 as an image with eleven colours."""
    height, width = levels.shape
    colours = bytes(_WEIGHT) * 10 + bytes(_GONE)
    opacity = bytes(30 + round(225 * (k / 9) ** 1.2) for k in range(10)) + bytes([150])
    rows = np.pad(levels, ((0, 0), (1, 0)))  # each row begins with its filter: none
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", colours),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
