"""Loop and Scan around one-step LSTM, GRU and RNN operators → operators over the whole sequence.

:mod:`.cell` has made operators of hand-written cells before. Here:

1. How often does the body run? It must be as often as its sequences have steps.
2. Which carried value is the state of which operator, and which sequence is its input?
3. Are some steps of padded sequences masked? Then ``sequence_lens`` stands for the mask, which is
   exact only where all padding is on the right; that has to be promised.
4. What else does anyone read from the loop? Only states and what the operators gave at each step.
5. Put operators in the place of the loop. What it computes row by row besides, :mod:`.pointwise`
   has moved out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rnnprune_cli.layout import MAX_INT32, ONE, rank
from rnnprune_cli.lift.body import Choice, Step, choice_of, steps_of
from rnnprune_cli.lift.context import Context, is_read, layer_name
from rnnprune_cli.lift.iteration import Declined, Interface, Sequence, Stack, State
from rnnprune_cli.lift.mask import MASKED, MASKED_HINT, Mask, find_mask
from rnnprune_cli.lift.pointwise import Hoister

MIN_OPSET = 10
"""Slice has no steps before."""


@dataclass(frozen=True, eq=False)
class _Whole:
    """A sequence as an operator reads it: time first, and reversed or not."""

    value: ir.Value
    backwards: bool


def lift_loop(loop: Interface, context: Context, right_padding: bool) -> list[ir.Node]:
    """Replaces a loop by operators over its sequences.

    Args:
        loop: The loop.
        context: The model, which is changed.
        right_padding: Whether the user promises that padding is always on the right.

    Returns:
        The new operators.

    Raises:
        Declined: If that would not be the same; the model is to be thrown away then.
    """
    hoister = Hoister(loop, context)
    hoister.inputs()
    steps = steps_of(loop, context)
    hoister.outputs()
    ordered = _ordered(steps)
    masks = {None if s.mask is None else id(s.mask): s.mask for s in steps}
    if len(masks) != 1:
        raise Declined("its operators are not masked alike")
    wholes = {id(s.node): _whole(s.x, loop, context) for s in steps if isinstance(s.x, Sequence)}
    mask = None
    if (flag := next(iter(masks.values()))) is not None:
        masked = next(s.x for s in steps if isinstance(s.x, Sequence))
        mask = find_mask(flag, masked, loop, context, {w.backwards for w in wholes.values()})
        if not mask.exact and not right_padding:
            raise Declined(MASKED, MASKED_HINT)
    outputs = _Outputs(loop, context, steps, mask)
    outputs.check()
    if context.opset < MIN_OPSET:
        raise Declined(f"opset {context.opset} cannot cut or reverse sequences (needs {MIN_OPSET})")
    lengths = None if mask is None else mask.lengths(loop.node, context)
    made: dict[int, ir.Node] = {}
    batch_like = next((s.x.value, 1 - s.x.axis) for s in steps if isinstance(s.x, Sequence))
    for step in ordered:
        if isinstance(step.x, Sequence):
            whole = wholes[id(step.node)]
            x = _cut(whole, step.x, loop, context)
            batch_like = (step.x.value, 1 - step.x.axis)
            backwards = whole.backwards
        else:
            inner = made[id(step.x)]
            x = context.squeeze(loop.node, inner.outputs[0], [1])
            backwards = inner.attributes.get_string("direction", "forward") == "reverse"
        made[id(step.node)] = _operator(
            step, x, batch_like, backwards, lengths, loop, context, first=not made
        )
    outputs.replace(made, lengths)
    stacked = [stack.out for stack in loop.scans]
    context.clean([*outputs.unread, *stacked, *loop.node.outputs])
    return list(made.values())


def _ordered(steps: list[Step]) -> list[Step]:
    """Operators that read others come after them."""
    done: list[Step] = []
    left = list(steps)
    while left:
        ready = [s for s in left if isinstance(s.x, Sequence) or any(s.x is d.node for d in done)]
        if not ready:
            raise Declined("its operators read each other in a circle")
        done += ready
        left = [s for s in left if s not in ready]
    return done


def _whole(x: Sequence, loop: Interface, context: Context) -> _Whole:
    """Brings a sequence's time axis to the front, and finds out what it is the reversal of.

    Only looks; a Transpose is added when the operator is made.
    """
    axis = x.axis
    if rank(x.value) != 3 or axis not in (0, 1):
        raise Declined(f"'{x.value.name}' is not a sequence of steps [batch, features]")
    whole_length = loop.steps is None or context.layout.dimension(x.value, axis) == loop.steps
    if not whole_length and (set(loop.steps or {}) - {ONE} or x.backwards):
        raise Declined("it may run for another number of steps than its sequence has, or for none")
    value, backwards = x.value, x.backwards
    if whole_length:
        while (source := context.layout.reversed_from(value, axis)) is not None:
            value, backwards = source, not backwards
    return _Whole(value, backwards)


def _cut(whole: _Whole, x: Sequence, loop: Interface, context: Context) -> ir.Value:
    """Returns ``[T, N, I]`` with as many steps as the loop runs."""
    value = whole.value
    if x.axis == 1:
        value = context.one(loop.node, "Transpose", [value], perm=[1, 0, 2])
    size = context.layout.dimension(x.value, x.axis)
    if loop.steps is None or size == loop.steps:
        return value
    return context.slice(loop.node, value, 0, 0, loop.steps.get(ONE, 0))


def _operator(
    step: Step,
    x: ir.Value,
    batch_like: tuple[ir.Value, int],
    backwards: bool,
    lengths: ir.Value | None,
    loop: Interface,
    context: Context,
    first: bool,
) -> ir.Node:
    node, before = step.node, loop.node
    name, own = layer_name(before.name or "", node.op_type), node.name or ""
    if name == layer_name("", node.op_type) or own.startswith(name):
        name = own
    elif name != before.name or not first:  # the loop's own name will be free
        name = context.unique(name)
    inputs: list[ir.Value | None] = [x]
    for role, position in (("W", 1), ("R", 2), ("B", 3)):
        inputs.append(_outer(node, position, role, name, loop, context))
    inputs.append(lengths)
    inputs += [
        None if state is None else _initial(state, x, batch_like, loop, context)
        for state in (step.h, step.c)
    ]
    inputs.append(_outer(node, 7, "P", name, loop, context))
    while inputs[-1] is None:
        inputs.pop()
    attributes = {k: a for k, a in node.attributes.items() if k not in ("direction", "layout")}
    new = context.node(before, node.op_type, inputs, len(node.outputs), name=name)
    for attribute in attributes.values():
        new.attributes.add(attribute)
    if backwards:
        new.attributes.add(ir.AttrString("direction", "reverse"))
    for value, output in zip(new.outputs, ("Y", "Y_h", "Y_c"), strict=False):
        value.name = context.unique(f"{name}/{output}")
    return new


def _outer(
    node: ir.Node, position: int, role: str, name: str, loop: Interface, context: Context
) -> ir.Value | None:
    """Returns a weight as the graph around the loop sees it."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return None
    origin = context.layout.origin(value)
    if origin.is_initializer() and origin.graph is not loop.body:
        return origin
    array = context.layout.constant(value)
    assert array is not None  # steps_of looked
    return context.constant(f"{name}/{role}", array)


def _initial(
    state: State, x: ir.Value, batch_like: tuple[ir.Value, int], loop: Interface, context: Context
) -> ir.Value | None:
    """Returns an initial state as ``[1, N, H]``; None for zeros."""
    value = state.initial
    if context.layout.is_zero(value) and context.layout.dimension(value, -2) in (
        {ONE: 1},
        context.layout.dimension(*batch_like),
    ):
        return None
    rows = context.layout.dimension(value, -2), context.layout.dimension(*batch_like)
    if rank(state.before) == 2:
        value = context.unsqueeze(loop.node, value, [0])
    return value if rows[0] == rows[1] else context.for_every_row(loop.node, value, x)


class _Outputs:
    """What is read from a loop, and what takes its place."""

    def __init__(
        self,
        loop: Interface,
        context: Context,
        steps: list[Step],
        mask: Mask | None,
    ) -> None:
        self._loop = loop
        self._context = context
        self._mask = mask
        self.unread: list[ir.Value] = []
        bare = context.layout.bare
        self._states = {id(s.h): (s, 1) for s in steps}
        self._states |= {id(s.c): (s, 2) for s in steps if s.c is not None}
        self._made_by = {id(bare(v)): s for s in steps for v in s.node.outputs[:2]}
        self._held = {
            id(bare(state.before)): state
            for state in loop.states
            if id(state) not in self._states and self._is_held(state)
        }

    def _is_held(self, state: State) -> bool:
        """Whether a carried value is an operator's last unmasked output."""
        bare = self._context.layout.bare
        choice = choice_of(state.after, self._loop, self._context)
        return (
            choice.mask is not None
            and self._is_mask(choice.mask)
            and id(bare(choice.new)) in self._made_by
            and choice.old is not None
            and bare(choice.old) is bare(state.before)
            and self._context.layout.is_zero(state.initial)
        )

    def _is_mask(self, flag: ir.Value | None) -> bool:
        return flag is (None if self._mask is None else self._mask.flag)

    def _read(self) -> Iterator[tuple[ir.Value, State | Stack]]:
        for state in self._loop.states:
            if state.final is not None and is_read(state.final):
                yield state.final, state
        for stack in self._loop.scans:
            if is_read(stack.out):
                yield stack.out, stack

    def check(self) -> None:
        """Raises Declined if something is read that operators do not give."""
        for out, what in self._read():
            if isinstance(what, State):
                invariant = self._context.layout.origin(what.after) is self._context.layout.origin(
                    what.before
                )
                held = id(self._context.layout.bare(what.before)) in self._held
                if not (id(what) in self._states or held or invariant):
                    raise Declined(f"it also computes '{out.name}' from step to step")
                value = what.after
            else:
                value = what.value
                self._stacked(value, out)
                if what.axis not in (0, 1) or (what.axis and rank(value) != 2):
                    raise Declined(f"it stacks '{out.name}' along its axis {what.axis}")
            ndim = rank(value)
            fits = ndim is not None and all(
                self._context.layout.is_one(value, k) for k in range(ndim - 2)
            )
            needed = not isinstance(what, State) or id(what) in self._states
            if needed and (not fits or ndim == 1):
                raise Declined(f"the shape of '{value.name}' is not known")

    def _stacked(self, value: ir.Value, out: ir.Value) -> tuple[Step, Choice]:
        bare = self._context.layout.bare
        choice = choice_of(value, self._loop, self._context)
        step = self._made_by.get(id(bare(choice.new)))
        # What a masked step gives counts nowhere, but it would be another value.
        masked_alike = self._is_mask(choice.mask)
        kept = choice.old is None or id(bare(choice.old)) in {
            **self._held,
            **{id(bare(s.h.before)): s.h for s, k in self._states.values() if k == 1},
        }
        if step is None or not masked_alike or not kept:
            raise Declined(f"it also computes '{out.name}' at every step")
        return step, choice

    def replace(self, made: Mapping[int, ir.Node], lengths: ir.Value | None) -> None:
        """Points every reader to the new operators."""
        context, before = self._context, self._loop.node
        states = {
            (key, index): self._unless_empty(node, index, lengths)
            for key, node in made.items()
            for index in range(1, len(node.outputs))
        }
        for out, what in list(self._read()):
            if isinstance(what, State):
                if id(what) in self._states:
                    step, index = self._states[id(what)]
                    new = self._final(states[id(step.node), index], what.after)
                elif id(context.layout.bare(what.before)) in self._held:
                    choice = choice_of(what.after, self._loop, context)
                    step = self._made_by[id(context.layout.bare(choice.new))]
                    new = self._final(made[id(step.node)].outputs[1], what.after)
                else:
                    new = what.initial
                context.replace(out, new)
                continue
            value = what.value
            step, choice = self._stacked(value, out)
            node = made[id(step.node)]
            backwards = node.attributes.get_string("direction", "forward") == "reverse"
            zeroed = choice.mask is not None and choice.old is None
            if not zeroed and not what.backwards and not what.axis:
                self._last_steps(out, states[id(step.node), 1], value)
            if not is_read(out):
                continue
            ndim = rank(value)
            stacked = node.outputs[0]
            if choice.mask is not None and choice.old is not None:
                held = id(context.layout.bare(choice.old)) in self._held
                fill: ir.Value | None = node.outputs[1] if held else states[id(step.node), 1]
                if backwards:  # padding comes first
                    fill = None if held or len(node.inputs) < 6 else node.inputs[5]
                stacked = stacked if fill is None else self._filled(stacked, fill)
            if ndim == 2:
                stacked = context.squeeze(before, stacked, [1])
            elif ndim == 4:
                stacked = context.unsqueeze(before, stacked, [1])
            if backwards != what.backwards:
                stacked = context.reverse(before, stacked)
            if what.axis:
                stacked = context.one(before, "Transpose", [stacked], perm=[1, 0, 2])
            context.replace(out, stacked)

    def _unless_empty(self, node: ir.Node, index: int, lengths: ir.Value | None) -> ir.Value:
        """Keeps the initial state where no step counts; onnxruntime's operators give zero there."""
        context, before = self._context, self._loop.node
        position = index + 4
        initial = node.inputs[position] if position < len(node.inputs) else None
        if lengths is None or initial is None:
            return node.outputs[index]
        none = context.constant("lift/none", np.zeros(1, np.int32))
        counts = context.one(before, "Greater", [lengths, none])
        column = context.one(before, "Reshape", [counts, context.ints(before, [1, -1, 1])])
        counts.type = column.type = ir.TensorType(ir.DataType.BOOL)
        return context.one(before, "Where", [column, node.outputs[index], initial])

    def _final(self, state: ir.Value, like: ir.Value) -> ir.Value:
        """Returns a state ``[1, N, H]`` with as many axes as the body's."""
        extra = (rank(like) or 2) - 3
        if extra < 0:
            return self._context.squeeze(self._loop.node, state, [0])
        if extra > 0:
            return self._context.unsqueeze(self._loop.node, state, list(range(extra)))
        return state

    def _filled(self, stacked: ir.Value, state: ir.Value) -> ir.Value:
        """Puts a state where steps are masked, as a loop does."""
        context, before = self._context, self._loop.node
        assert self._mask is not None
        mask, ndim = self._mask.steps(before, context)
        # [T, N, 1] or [T, N] → [T, 1, N, 1]
        mask = context.unsqueeze(before, mask, [1] if ndim == 3 else [1, 3])
        mask.type = ir.TensorType(ir.DataType.BOOL)
        last = context.unsqueeze(before, state, [0])
        return context.one(before, "Where", [mask, stacked, last])

    def _last_steps(self, out: ir.Value, state: ir.Value, value: ir.Value) -> None:
        """Lets those who read only the last step read the final state."""
        context, before = self._context, self._loop.node
        for user, position in tuple(out.uses()):
            if position != 0 or user.graph is not before.graph:
                continue
            taken = user.outputs[0]
            if user.op_type == "Slice":
                bounds = context.layout.slice_bounds(user)
                if bounds is None or set(bounds) != {0}:
                    continue
                start, end, step = bounds[0]
                if (start, step) == (-1, 1) and end >= MAX_INT32:
                    final = self._final(state, value)
                    context.replace(taken, context.unsqueeze(before, final, [0]))
            elif user.op_type == "Gather" and not user.attributes.get_int("axis"):
                index = context.layout.constant(user.inputs[1])
                if index is not None and index.ndim == 0 and index == -1:
                    context.replace(taken, self._final(state, value))
            if not is_read(taken):
                self.unread.append(taken)  # the loop must stay while others are replaced
