"""The mask of a loop over padded sequences → ``sequence_lens`` of an operator.

``sequence_lens`` stands for a mask only where all padding is on the right. Where the mask is made
of lengths, that is so; elsewhere the user has to promise it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.layout import ONE, is_float, rank
from rnnprune_cli.lift.body import sequence_of
from rnnprune_cli.lift.context import Context
from rnnprune_cli.lift.iteration import STEP, Declined, Interface, Sequence

MASKED = (
    "steps of padded sequences are masked, which an operator does only where all padding is on the"
    " right"
)
MASKED_HINT = "if it always is, say so with --assume-right-padding"
_MIN_OPSET_LENGTHS = 12
"""Min and Max of integers."""


@dataclass(frozen=True, eq=False)
class Mask(ABC):
    """Which steps count.

    Attributes:
        flag: The boolean of one step in the loop's body, True where it counts.
        exact: Whether all padding is known to be on the right.
    """

    flag: ir.Value
    exact: bool

    @abstractmethod
    def lengths(self, before: ir.Node, context: Context) -> ir.Value:
        """Adds the number of steps that count in each sequence, ``[N]`` int32."""

    @abstractmethod
    def steps(self, before: ir.Node, context: Context) -> tuple[ir.Value, int]:
        """Adds the mask of all steps, ``[T, N]`` or ``[T, N, 1]``, and tells its rank."""


@dataclass(frozen=True, eq=False)
class _Given(Mask):
    """A sequence of booleans, or of numbers that are zero where a step does not count."""

    value: ir.Value

    def lengths(self, before: ir.Node, context: Context) -> ir.Value:
        """Counts the steps; see :meth:`Mask.lengths`."""
        mask, _ = self.steps(before, context)
        counted = context.one(before, "Cast", [mask], to=ir.DataType.INT32.value)
        if context.opset >= 13:
            inputs = [counted, context.ints(before, [0])]
            total = context.one(before, "ReduceSum", inputs, keepdims=0)
        else:
            total = context.one(before, "ReduceSum", [counted], axes=[0], keepdims=0)
        lengths = context.one(before, "Reshape", [total, context.ints(before, [-1])])
        for value in (counted, total, lengths):
            value.type = ir.TensorType(ir.DataType.INT32)
        return lengths

    def steps(self, before: ir.Node, context: Context) -> tuple[ir.Value, int]:
        """Returns the sequence as booleans; see :meth:`Mask.steps`."""
        mask = self.value
        if mask.dtype != ir.DataType.BOOL:
            mask = context.one(before, "Cast", [mask], to=ir.DataType.BOOL.value)
            mask.type = ir.TensorType(ir.DataType.BOOL)
        return mask, rank(self.value) or 0


@dataclass(frozen=True, eq=False)
class _Counted(Mask):
    """Lengths ``[N]`` or ``[N, 1]`` of any numeric type, that the number of the step is held to.

    Attributes:
        value: The lengths.
        x: A sequence with as many steps as the loop runs, if ``most`` is None.
        most: The number of steps.
    """

    value: ir.Value
    x: Sequence
    most: int | None

    def _whole(
        self, before: ir.Node, context: Context, shape: list[int], dtype: ir.DataType
    ) -> ir.Value:
        """The lengths as integers: 2.5 lets the steps 0, 1 and 2 count."""
        value = context.one(before, "Reshape", [self.value, context.ints(before, shape)])
        value.type = self.value.type
        if is_float(self.value):
            value = context.one(before, "Ceil", [value])
            value.type = self.value.type
        whole = context.one(before, "Cast", [value], to=dtype.value)
        whole.type = ir.TensorType(dtype)
        return whole

    def _size(self, before: ir.Node, context: Context) -> ir.Value:
        """The number of steps, ``[1]``."""
        if self.most is not None:
            return context.ints(before, [self.most])
        shape = context.one(before, "Shape", [self.x.value])
        size = context.slice(before, shape, 0, self.x.axis, self.x.axis + 1)
        shape.type = size.type = ir.TensorType(ir.DataType.INT64)
        return size

    def lengths(self, before: ir.Node, context: Context) -> ir.Value:
        """Limits the lengths to what there is; see :meth:`Mask.lengths`."""
        whole = self._whole(before, context, [-1], ir.DataType.INT32)
        size = self._size(before, context)
        most = context.one(before, "Cast", [size], to=ir.DataType.INT32.value)
        least = context.constant("lift/none", np.zeros(1, np.int32))
        limited = context.one(before, "Min", [whole, most])
        lengths = context.one(before, "Max", [limited, least])
        for value in (most, limited, lengths):
            value.type = ir.TensorType(ir.DataType.INT32)
        return lengths

    def steps(self, before: ir.Node, context: Context) -> tuple[ir.Value, int]:
        """Compares every step's number with the lengths; see :meth:`Mask.steps`."""
        size = context.squeeze(before, self._size(before, context), [0])
        first, one = (context.constant(f"lift/{k}", np.array(k, np.int64)) for k in (0, 1))
        numbers = context.one(before, "Range", [first, size, one])
        for value in (size, numbers):
            value.type = ir.TensorType(ir.DataType.INT64)
        column = context.unsqueeze(before, numbers, [1])
        row = self._whole(before, context, [1, -1], ir.DataType.INT64)
        column.type = numbers.type
        steps = context.one(before, "Less", [column, row])
        steps.type = ir.TensorType(ir.DataType.BOOL)
        return steps, 2


def find_mask(
    flag: ir.Value, x: Sequence, loop: Interface, context: Context, flips: Set[bool]
) -> Mask:
    """Finds the mask of all steps.

    Args:
        flag: The boolean of one step.
        x: A sequence that is masked.
        loop: The loop.
        context: The model.
        flips: Whether the loop's sequences are read backwards.

    Raises:
        Declined: If it is not one step of a mask, or not reversed as the sequences are.
    """
    if len(flips) > 1:
        raise Declined("it reads masked sequences in both directions")
    (backwards,) = flips
    batch = context.layout.dimension(x.value, 1 - x.axis)
    lengths = _lengths(flag, loop, context)
    if lengths is not None:
        if backwards:
            raise Declined("it counts the steps of a reversed sequence")
        if context.opset < _MIN_OPSET_LENGTHS:
            raise Declined(f"opset {context.opset} cannot limit lengths (needs 12)")
        if (rank(lengths) or 0) < 1 or context.layout.dimension(lengths, 0) != batch:
            raise Declined("its lengths may not be one for each sequence")
        fixed = loop.steps is not None and set(loop.steps) == {ONE}
        most = loop.steps[ONE] if fixed and loop.steps is not None else None
        return _Counted(flag, True, lengths, x, most)
    try:
        steps = sequence_of(flag, loop, context)
    except Declined:
        raise Declined("it masks steps by something that is not one step of a mask") from None
    if steps.axis != 0 or rank(steps.value) not in (2, 3):
        raise Declined("its mask is not time-major")
    if loop.steps is not None and context.layout.dimension(steps.value, 0) != loop.steps:
        raise Declined("its mask may have another length than it has steps")
    if context.layout.dimension(steps.value, 1) != batch:
        raise Declined("its mask may not have a row for each sequence")
    value, flipped = steps.value, steps.backwards
    while (source := context.layout.reversed_from(value, 0)) is not None:
        value, flipped = source, not flipped
    if flipped != backwards:
        raise Declined("its mask and its sequence run in different directions")
    return _Given(flag, False, value)


def _lengths(flag: ir.Value, loop: Interface, context: Context) -> ir.Value | None:
    """Returns the lengths that the number of the step is compared with."""
    node = flag.producer()
    if node is None or node.op_type not in ("Less", "Greater") or node.graph is not loop.body:
        return None
    step, lengths = node.inputs if node.op_type == "Less" else node.inputs[::-1]
    if step is None or lengths is None or context.layout.integers(step, loop.known) != [{STEP: 1}]:
        return None
    lengths = context.layout.bare(lengths)
    while (made := lengths.producer()) is not None and made.graph is loop.body:
        if made.op_type not in ("Unsqueeze", "Cast", "Reshape") or made.inputs[0] is None:
            return None
        if made.op_type == "Cast" and is_float(made.inputs[0]) and not is_float(lengths):
            return None
        lengths = context.layout.bare(made.inputs[0])
    return None if lengths.graph is loop.body else lengths
