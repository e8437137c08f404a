"""Packed weights: nonzero values and their positions, unpacked by standard operators.

A pruned weight is stored as its nonzero values and, whichever is smaller, a *bitmap* (one bit an
element) or *gaps* (one byte a value: its distance from the one before). A few standard operators
rebuild the dense weight; onnxruntime evaluates them once, when it loads the model, so inference is
as fast as with the dense weight and bit for bit the same. (NonZero would be shorter, but
onnxruntime does not fold it.)

    bitmap → BitShift, Mod (byte → 8 bits) → CumSum → times bit → Gather(0 and values) → Reshape
    gaps → CumSum → ScatterElements(values into ConstantOfShape(0)) → Reshape
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Array
from rnnprune_cli.rewrite.build import Builder

MIN_OPSET = 7
"""First operator set whose LSTM, GRU and RNN onnxruntime runs."""
MIN_OPSET_CONSTANT = 9
"""Before, Constant held floating-point numbers only."""
MIN_OPSET_CUMSUM = 11
"""CumSum, ScatterElements and BitShift came with operator set 11; before, there are no gaps."""
BLOCK = 256
"""Bits per block of the running count before CumSum; the counts of blocks are stored."""
GRAPH_OVERHEAD = 900
"""Bytes that the unpacking nodes of one weight add to a file, rounded up."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in packed form.

    Attributes:
        shape: Shape of the dense weight.
        dtype: Type of the dense weight.
        positions: uint8; a bitmap (little bit order) or the gaps.
        is_bitmap: Which of the two.
        values: The nonzero values (and zeros, where a gap needs more than a byte).
        scale: ``[directions, rows, 1]`` factors of int8 values; None for other types.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    positions: Array
    is_bitmap: bool
    values: Array
    scale: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return self.positions.nbytes + self.values.nbytes + scale


def rounded(weight: Array, values: str) -> tuple[Array, Array | None]:
    """Rounds a weight to the precision in which its values are stored.

    Args:
        weight: ``[…, rows, columns]``.
        values: ``float32`` (unchanged), ``float16`` or ``int8``.

    Returns:
        The stored values in the weight's shape, and the factor of each row for int8.

    Raises:
        UsageError: If a value is too large for float16.
    """
    if values == "float16" and weight.dtype.itemsize > 2:
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
        if not np.isfinite(half).all():
            raise UsageError(
                "a weight is too large for float16", "use --values float32 or --values int8"
            )
        return half, None
    if values == "int8":
        # A scale that underflows in the weight's own type would blow the values up.
        least = np.finfo(weight.dtype).tiny
        scale = np.abs(weight).max(axis=-1, keepdims=True).astype(np.float64) / 127
        scale = np.maximum(scale, least).astype(weight.dtype)
        return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale
    return weight, None


def dense(stored: Array, scale: Array | None, dtype: np.dtype[Any]) -> Array:
    """Returns the dense weight that stored values stand for; the inverse of :func:`rounded`."""
    weight: Array = stored.astype(dtype, copy=False)
    return weight if scale is None else weight * scale


def rounding(values: str) -> Callable[[Array], Array]:
    """Returns the function that rounds a weight as packing it with these values does."""

    def apply(weight: Array) -> Array:
        return dense(*rounded(weight, values), weight.dtype)

    return apply


def smallest(size: int, nonzero: int, itemsize: int, opset: int) -> tuple[str, int]:
    """Returns the smaller packed form of a weight and its bytes, before packing it."""
    bitmap = -(-size // 8) + nonzero * itemsize
    gaps = nonzero * (1 + itemsize)
    if opset >= MIN_OPSET_CUMSUM and gaps < bitmap:
        return "gaps", gaps + GRAPH_OVERHEAD
    return "bitmap", bitmap + GRAPH_OVERHEAD


def pack(weight: Array, values: str, opset: int) -> Packed:
    """Packs a masked weight.

    Args:
        weight: ``[directions, rows, columns]``; zeros are what was pruned.
        values: ``float32`` (unchanged), ``float16`` or ``int8``.
        opset: Version of the model's default operator set, at least :data:`MIN_OPSET`.
    """
    stored, scale = rounded(weight, values)
    flat = stored.reshape(-1)
    # By bit pattern: a kept -0.0 stays -0.0.
    kept = flat.view(f"u{flat.itemsize}") != 0
    form, _ = smallest(flat.size, int(np.count_nonzero(kept)), flat.itemsize, opset)
    bitmap = Packed(
        weight.shape, weight.dtype, np.packbits(kept, bitorder="little"), True, flat[kept], scale
    )
    if form == "bitmap":
        return bitmap
    gaps = _as_gaps(bitmap, np.flatnonzero(kept))
    return gaps if gaps.nbytes < bitmap.nbytes else bitmap


def _as_gaps(bitmap: Packed, positions: Array) -> Packed:
    distances = np.diff(positions, prepend=0)
    fillers = np.maximum(distances - 1, 0) // 255  # zeros written 255 apart on the way
    ends = np.cumsum(fillers + 1) - 1
    gaps = np.full(int((fillers + 1).sum()), 255, np.uint8)
    gaps[ends] = distances - 255 * fillers
    values = np.zeros(gaps.size, bitmap.values.dtype)
    values[ends] = bitmap.values
    return Packed(bitmap.shape, bitmap.dtype, gaps, False, values, bitmap.scale)


def emit(packed: Packed, build: Builder, name: str) -> ir.Value:
    """Writes the unpacking operators into a graph.

    Returns:
        The value that holds the dense weight, named ``name``.
    """
    size = int(np.prod(packed.shape))
    if size >= 1 << 31:
        raise RnnpruneError(f"weight '{name}' has too many elements to be packed")
    flat = (
        _from_bitmap(packed, build, name) if packed.is_bitmap else _from_gaps(packed, build, name)
    )
    shape = build.constant(f"{name}/shape", np.array(packed.shape, np.int64))
    target = ir.DataType.from_numpy(packed.dtype).value
    if packed.values.dtype == packed.dtype:
        return build.node("Reshape", [flat, shape], output=name)
    if packed.scale is None:
        shaped = build.node("Reshape", [flat, shape])
        return build.node("Cast", [shaped], output=name, to=target)
    # In half precision, onnxruntime would multiply in single precision and not always round then.
    half = packed.dtype == np.float16
    own = np.dtype(np.float32) if half else packed.dtype
    wide = _cast(build, build.node("Reshape", [flat, shape]), own.type)
    scale = build.constant(f"{name}/scale", packed.scale.astype(own))
    if half:
        return build.node("Cast", [build.node("Mul", [wide, scale])], output=name, to=target)
    return build.node("Mul", [wide, scale], output=name)


def _from_bitmap(packed: Packed, build: Builder, name: str) -> ir.Value:
    size = int(np.prod(packed.shape))
    step = 8 if build.opset >= MIN_OPSET_CUMSUM else BLOCK
    padded = -(-size // step) * step
    bitmap = np.zeros(padded // 8, np.uint8)
    bitmap[: packed.positions.size] = packed.positions
    whole = build.shared("rp/all", np.array([-1], np.int64))
    if build.opset >= MIN_OPSET_CUMSUM:
        # Bit k of a byte is (byte >> k) mod 2.
        column = build.constant(f"{name}/bitmap", bitmap[:, None])
        shifts = build.shared("rp/8", np.arange(8, dtype=np.uint8))
        two = build.shared("rp/2", np.array(2, np.uint8))
        shifted = build.node("BitShift", [column, shifts], direction="RIGHT")
        bits = build.node("Mod", [shifted, two])
    else:
        table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        index = _cast(build, build.constant(f"{name}/bitmap", bitmap), np.int32)
        bits = build.node("Gather", [build.shared("rp/bits", table), index], axis=0)
    ones = _cast(build, build.node("Reshape", [bits, whole]), np.int32)
    if build.opset >= MIN_OPSET_CUMSUM:
        axis = build.shared("rp/0", np.array(0, np.int64))
        count = build.node("CumSum", [ones, axis])
    else:
        count = _running_count(ones, bitmap, build, name, whole)
    # Entry 0 is for what was pruned, entry k for the k-th value that was kept.
    values = np.concatenate([np.zeros(1, packed.values.dtype), packed.values])
    entry = build.node("Mul", [count, ones])
    flat = build.node("Gather", [build.constant(f"{name}/values", values), entry], axis=0)
    if padded == size:
        return flat
    if build.opset < 10:
        return build.node("Slice", [flat], axes=[0], starts=[0], ends=[size])
    bounds = [build.constant(f"{name}/{k}", np.array([k], np.int64)) for k in (0, size)]
    return build.node("Slice", [flat, *bounds])


def _running_count(
    ones: ir.Value, bitmap: Array, build: Builder, name: str, whole: ir.Value
) -> ir.Value:
    """CumSum for operator sets without it: a triangular product in blocks, plus block counts."""
    in_block = np.unpackbits(bitmap).reshape(-1, BLOCK).sum(axis=1, dtype=np.int32)
    before = (np.cumsum(in_block, dtype=np.int32) - in_block)[:, None]
    number = np.arange(BLOCK, dtype=np.float32)
    rows = build.shared("rp/rows", number[:, None])
    columns = build.shared("rp/columns", number[None] + np.float32(0.5))
    upper = _cast(build, build.node("Less", [rows, columns]), np.float32)
    shape = build.shared("rp/blocks", np.array([-1, BLOCK], np.int64))
    blocks = _cast(build, build.node("Reshape", [ones, shape]), np.float32)
    count = _cast(build, build.node("MatMul", [blocks, upper]), np.int32)
    total = build.node("Add", [count, build.constant(f"{name}/before", before)])
    return build.node("Reshape", [total, whole])


def _from_gaps(packed: Packed, build: Builder, name: str) -> ir.Value:
    gaps = _cast(build, build.constant(f"{name}/gaps", packed.positions), np.int32)
    axis = build.shared("rp/0", np.array(0, np.int64))
    positions = build.node("CumSum", [gaps, axis])
    size = build.constant(f"{name}/size", np.array([np.prod(packed.shape)], np.int64))
    zeros = build.node("ConstantOfShape", [size], value=ir.tensor(np.zeros(1, packed.values.dtype)))
    values = build.constant(f"{name}/values", packed.values)
    return build.node("ScatterElements", [zeros, positions, values], axis=0)


def _cast(build: Builder, value: ir.Value, dtype: type) -> ir.Value:
    return build.node("Cast", [value], to=ir.DataType.from_numpy(np.dtype(dtype)).value)
