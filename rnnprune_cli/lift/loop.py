"""Loop and Scan around one-step LSTM, GRU and RNN operators → operators over the whole sequence.

:mod:`.cell` has made operators of hand-written cells before. Here:

1. How often does the body run? It must be as often as its sequences have steps.
2. Which carried value is the state of which operator, and which sequence is its input?
3. Are some steps of padded sequences masked? Then ``sequence_lens`` stands for the mask, which is
   exact only where all padding is on the right; that has to be promised.
4. What else does anyone read from the loop? Only states and what the operators gave at each step.
5. Put operators in the place of the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from rnnprune_cli.find import is_recurrent
from rnnprune_cli.lift.algebra import Leaf
from rnnprune_cli.lift.context import Context, layer_name, static
from rnnprune_cli.lift.layout import MAX_INT32, ONE, Linear, combined, rank

_STEP = "iteration"
MASKED = (
    "steps of padded sequences are masked, which an operator does only where all padding is on the"
    " right"
)
MASKED_HINT = "if it always is, say so with --assume-right-padding"


class Declined(Exception):  # noqa: N818  an answer, not an error
    """Why a loop or chain cannot become one operator.

    Args:
        reason: What is in the way.
        hint: What would help.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, eq=False)
class Sequence:
    """Where a body takes one step of a sequence from.

    Attributes:
        value: ``[T, N, …]`` or, with ``axis`` 1, ``[N, T, …]``.
        axis: The time axis.
        backwards: The last step is taken first.
    """

    value: ir.Value
    axis: int
    backwards: bool


@dataclass(frozen=True, eq=False)
class State:
    """A value that a body hands on."""

    initial: ir.Value
    before: ir.Value
    after: ir.Value
    final: ir.Value | None


@dataclass(frozen=True, eq=False)
class Stack:
    """A value of every step, stacked.

    Attributes:
        value: What the body gives at one step.
        out: All of them, along ``axis``.
        backwards: The first step is stacked last.
        axis: The time axis.
    """

    value: ir.Value
    out: ir.Value
    backwards: bool = False
    axis: int = 0


@dataclass(frozen=True, eq=False)
class Interface:
    """A Loop or Scan, seen alike.

    Attributes:
        node: The node.
        body: Its body.
        states: What is handed from step to step.
        scans: What is stacked step by step.
        scanned: id of a body input → its sequence (Scan).
        known: id of an integer in the body → what it is, in terms of the iteration's number.
        steps: How often the body runs; None for as often as the scanned inputs have steps.
        steps_value: A scalar that holds the same, where there is one.
    """

    node: ir.Node
    body: ir.Graph
    states: list[State]
    scans: list[Stack]
    scanned: dict[int, Sequence] = field(default_factory=dict)
    known: dict[int, Linear] = field(default_factory=dict)
    steps: Linear | None = None
    steps_value: ir.Value | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What a value is at a step that is not masked, and at one that is.

    Attributes:
        new: The value where the step counts.
        old: The value where it is masked; None for zeros, or where nothing is masked.
        mask: True where the step counts (a boolean of one step); None where all do.
    """

    new: ir.Value
    old: ir.Value | None = None
    mask: ir.Value | None = None


def interface(node: ir.Node, context: Context) -> Interface:
    """Reads a Loop or Scan.

    Raises:
        Declined: If the number of its iterations is not known beforehand.
    """
    return _loop(node, context) if node.op_type == "Loop" else _scan(node)


def _loop(node: ir.Node, context: Context) -> Interface:
    body = node.attributes["body"].as_graph()
    carried = len(node.inputs) - 2
    initial = list(node.inputs[2:])
    if any(v is None for v in initial) or len(body.inputs) != carried + 2:
        raise Declined("its inputs are incomplete")
    states = [
        State(i, before, after, final)
        for i, before, after, final in zip(
            initial, body.inputs[2:], body.outputs[1:], node.outputs, strict=False
        )
        if i is not None
    ]
    scans = [
        Stack(value, out)
        for value, out in zip(body.outputs[1 + carried :], node.outputs[carried:], strict=True)
    ]
    known: dict[int, Linear] = {id(body.inputs[0]): {_STEP: 1}}
    for state in states:
        start = context.layout.integers(state.initial)
        if state.before.dtype is None or state.before.dtype.is_floating_point() or not start:
            continue
        if len(start) == 1 and set(start[0]) <= {ONE}:
            probe: dict[int, Linear] = {id(state.before): {"before": 1}}
            after = context.layout.integers(state.after, probe)
            if after and set(after[0]) <= {"before", ONE} and after[0].get("before") == 1:
                known[id(state.before)] = {
                    k: v
                    for k, v in ((_STEP, after[0].get(ONE, 0)), (ONE, start[0].get(ONE, 0)))
                    if v
                }
    found = Interface(node, body, states, scans, known=known)
    steps, value = _steps(found, context)
    return Interface(node, body, states, scans, {}, known, steps, value)


def _steps(loop: Interface, context: Context) -> tuple[Linear, ir.Value | None]:
    """How often a Loop runs: the smallest of its trip count and what its condition allows."""
    unknown = Declined("the number of its iterations depends on what it computes")
    limits: list[Linear] = []
    trips = loop.node.inputs[0]
    if trips is not None:
        count = context.layout.integers(trips)
        if count is None or len(count) != 1:
            raise unknown
        if count[0].get(ONE, 0) < MAX_INT32:
            limits.append(count[0])
    goes_on = _positive(loop.body.outputs[0], context, loop.known)
    if goes_on is None:
        raise unknown
    for rest in goes_on:
        # After step i it goes on if S - k - i > 0: it runs S - k + 1 times.
        if rest.get(_STEP) != -1:
            raise unknown
        limits.append(combined({k: v for k, v in rest.items() if k != _STEP}, {ONE: 1}))
    if not limits:
        raise unknown
    steps = limits[0]
    for other in limits[1:]:
        difference = combined(other, steps, -1)
        if not set(difference) <= {ONE}:
            raise Declined("its trip count and its condition allow different numbers of steps")
        if difference.get(ONE, 0) < 0:
            steps = other
    if loop.node.inputs[1] is not None:
        starts = _positive(loop.node.inputs[1], context, {})
        if starts is None or any(
            not set(gap := combined(rest, steps, -1)) <= {ONE} or gap.get(ONE, 0) < 0
            for rest in starts
        ):
            raise unknown
    holds = trips is not None and context.layout.integers(trips) == [steps]
    return steps, trips if holds else None


def _positive(
    value: ir.Value, context: Context, known: Mapping[int, Linear]
) -> list[Linear] | None:
    """Returns integers that are all positive exactly where a condition holds."""
    value = context.layout.origin(value)
    array = context.layout.constant(value)
    if array is not None:
        return [] if array.all() else None
    node = value.producer()
    if node is None:
        graph = value.graph
        owner = None if graph is None else context.walker.owner(graph)
        # A body may hand its own condition on: what it was at the start.
        if owner is not None and graph is not None and value is graph.inputs[1]:
            first = owner.inputs[1]
            return [] if first is None else _positive(first, context, {})
        return None
    if node.op_type == "And":
        parts = [_positive(v, context, known) for v in node.inputs if v is not None]
        return None if None in parts else [p for part in parts for p in part or []]
    if node.op_type == "Cast" and node.inputs[0] is not None:
        return _positive(node.inputs[0], context, known)
    if node.op_type in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual"):
        one, other = (
            None if v is None else context.layout.integers(v, known) for v in node.inputs
        )
        if one is None or other is None or len(one) != 1 or len(other) != 1:
            return None
        low, high = (one[0], other[0]) if node.op_type.startswith("Less") else (other[0], one[0])
        gap = combined(high, low, -1)
        return [combined(gap, {ONE: 1}) if node.op_type.endswith("OrEqual") else gap]
    return None


def _scan(node: ir.Node) -> Interface:
    body = node.attributes["body"].as_graph()
    scanned = node.attributes.get_int("num_scan_inputs", 0) or 0
    carried = len(node.inputs) - scanned
    if any(v is None for v in node.inputs) or len(body.inputs) != len(node.inputs):
        raise Declined("its inputs are incomplete")
    inputs = [v for v in node.inputs if v is not None]
    outputs = len(body.outputs) - carried

    def listed(name: str, count: int) -> list[int]:
        return list(node.attributes.get_ints(name, None) or [0] * count)

    axes, directions = listed("scan_input_axes", scanned), listed("scan_input_directions", scanned)
    return Interface(
        node,
        body,
        [
            State(i, before, after, final)
            for i, before, after, final in zip(
                inputs[:carried], body.inputs, body.outputs, node.outputs, strict=False
            )
        ],
        [
            Stack(value, out, bool(d), axis)
            for value, out, d, axis in zip(
                body.outputs[carried:],
                node.outputs[carried:],
                listed("scan_output_directions", outputs),
                listed("scan_output_axes", outputs),
                strict=True,
            )
        ],
        {
            id(before): Sequence(value, axis, bool(d))
            for before, value, axis, d in zip(
                body.inputs[carried:], inputs[carried:], axes, directions, strict=True
            )
        },
    )


# Reading the body


@dataclass(frozen=True, eq=False)
class Step:
    """A one-step operator in the body and what it is connected to.

    Attributes:
        node: The operator.
        h: Its hidden state.
        c: LSTM: its cell state.
        x: Its sequence, or the operator in the body whose output it reads.
        mask: Boolean of one step, or None.
    """

    node: ir.Node
    h: State
    c: State | None
    x: Sequence | ir.Node
    mask: ir.Value | None


def steps_of(loop: Interface, context: Context) -> list[Step]:
    """Connects the operators of a body.

    Raises:
        Declined: If one of them does more than a sequence operator can.
    """
    nodes = [node for node in loop.body if is_recurrent(node)]
    if not nodes:
        raise Declined("")
    made_by = {
        id(context.layout.bare(value)): node for node in nodes for value in node.outputs[:2]
    }
    found = []
    for node in nodes:
        inputs = list(node.inputs) + [None] * (8 - len(node.inputs))
        x, lengths, h, c = inputs[0], inputs[4], inputs[5], inputs[6]
        if x is None or lengths is not None or node.attributes.get_int("layout", 0):
            raise Declined("an operator in it has sequence lengths or another layout")
        if node.attributes.get_string("direction", "forward") == "bidirectional":
            raise Declined("an operator in it is bidirectional")
        if rank(x) != 3 or not context.layout.is_one(x, 0):
            raise Declined("an operator in it runs over more than one step")
        for role, value in zip("WRBP", (*inputs[1:4], inputs[7]), strict=True):
            if value is not None and context.layout.constant(value) is None:
                raise Declined(f"weight {role} of its operator is computed at run time")
        state = _state_of(loop, context, h, node.outputs[1] if len(node.outputs) > 1 else None)
        cell = None
        if node.op_type == "LSTM":
            cell = _state_of(loop, context, c, node.outputs[2] if len(node.outputs) > 2 else None)
        masks = {
            None if s.mask is None else id(s.mask): s.mask
            for s in (_choice(part.after, loop, context) for part in (state, cell) if part)
        }
        if len(masks) != 1:
            raise Declined("its states are not masked alike")
        bare = context.layout.bare(x)
        source: Sequence | ir.Node
        if id(bare) in made_by:
            source = made_by[id(bare)]
        else:
            source = _sequence(bare, loop, context)
        found.append(Step(node, state, cell, source, next(iter(masks.values()))))
    if len({id(step.h.before) for step in found}) != len(found):
        raise Declined("two operators in it share a state")
    return found


def _state_of(
    loop: Interface, context: Context, value: ir.Value | None, after: ir.Value | None
) -> State:
    if value is None or after is None:
        raise Declined("an operator in it starts from zero at every step")
    bare = context.layout.bare(value)
    for state in loop.states:
        if context.layout.bare(state.before) is bare:
            choice = _choice(state.after, loop, context)
            if context.layout.bare(choice.new) is not context.layout.bare(after):
                raise Declined("what it hands on is not the state of the operator in it")
            if choice.mask is not None and (
                choice.old is None or context.layout.bare(choice.old) is not bare
            ):
                raise Declined("a masked step does not keep the state")
            return state
    raise Declined("the state of an operator in it is not handed from step to step")


def _choice(value: ir.Value, loop: Interface, context: Context) -> Choice:
    """Takes masking apart: Where, or products with a mask and its complement."""
    bare = context.layout.bare(value)
    node = bare.producer()
    if node is not None and node.op_type == "Where" and node.graph is loop.body:
        condition, one, other = node.inputs
        if condition is not None and one is not None and other is not None:
            mask, positive = _boolean(condition, context)
            new, old = (one, other) if positive else (other, one)
            return Choice(new, None if context.layout.is_zero(old) else old, mask)
    if node is None or node.op_type not in ("Add", "Mul"):
        return Choice(bare)
    expression = context.algebra.of(bare)
    terms = [] if expression is None else list(expression.terms.values())
    chosen: dict[bool, ir.Value] = {}
    masks: dict[int, ir.Value] = {}
    for term in terms:
        if len(term.factors) != 2 or not term.is_one():
            return Choice(bare)
        leaves = [f for f in term.factors if isinstance(f, Leaf)]
        flags = [f for f in leaves if _cast_from(f.value) is not None]
        others = [f for f in leaves if _cast_from(f.value) is None]
        if len(flags) != 1 or len(others) != 1:
            return Choice(bare)
        source = _cast_from(flags[0].value)
        assert source is not None
        mask, positive = _boolean(source, context)
        masks[id(mask)] = mask
        chosen[positive] = others[0].value
    if len(masks) != 1 or True not in chosen or len(chosen) != len(terms):
        return Choice(bare)
    old = chosen.get(False)
    if old is not None and context.layout.is_zero(old):
        old = None
    return Choice(chosen[True], old, next(iter(masks.values())))


def _cast_from(value: ir.Value) -> ir.Value | None:
    """Returns the boolean that a number was made of."""
    node = value.producer()
    if node is None or node.op_type != "Cast" or node.inputs[0] is None:
        return None
    return node.inputs[0] if node.inputs[0].dtype == ir.DataType.BOOL else None


def _boolean(value: ir.Value, context: Context) -> tuple[ir.Value, bool]:
    """Follows a boolean back through negations and changes of shape."""
    positive = True
    while True:
        value = context.layout.bare(value)
        node = value.producer()
        if node is None or node.op_type not in ("Not", "Expand", "Tile", "Unsqueeze", "Squeeze"):
            return value, positive
        source = node.inputs[0]
        if source is None:
            return value, positive
        positive ^= node.op_type == "Not"
        value = source


def _sequence(value: ir.Value, loop: Interface, context: Context) -> Sequence:
    """Finds the sequence that one step's value is taken from."""
    if id(value) in loop.scanned:
        return loop.scanned[id(value)]
    node = value.producer()
    if node is not None and node.op_type == "Gather" and node.graph is loop.body:
        source, index = node.inputs
        if source is not None and index is not None:
            source = context.layout.origin(source)
            at = context.layout.integers(index, loop.known)
            axis = node.attributes.get_int("axis", 0) or 0
            if source.graph is not loop.body and at is not None and len(at) == 1:
                if at[0] == {_STEP: 1}:
                    return Sequence(source, axis, False)
                if loop.steps is not None and at[0] == combined(
                    combined(loop.steps, {ONE: 1}, -1), {_STEP: 1}, -1
                ):
                    return Sequence(source, axis, True)
    raise Declined(f"its operator reads '{value.name}', which is not one step of a sequence")


# Replacing


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
        Declined: If that would not be the same; nothing is changed then.
    """
    steps = steps_of(loop, context)
    ordered = _ordered(steps)
    masks = {None if s.mask is None else id(s.mask): s.mask for s in steps}
    if len(masks) != 1:
        raise Declined("its operators are not masked alike")
    mask = next(iter(masks.values()))
    wholes = {id(s.node): _whole(s.x, loop, context) for s in steps if isinstance(s.x, Sequence)}
    flips = {whole.backwards for whole in wholes.values()}
    if mask is not None and len(flips) > 1:
        raise Declined("it reads masked sequences in both directions")
    mask_sequence = None
    if mask is not None:
        mask_sequence = _whole_mask(mask, loop, context, next(iter(flips)))
        if not right_padding:
            raise Declined(MASKED, MASKED_HINT)
    outputs = _Outputs(loop, context, steps, mask, mask_sequence)
    outputs.check()
    if context.opset < 10:
        raise Declined(f"opset {context.opset} cannot cut or reverse sequences (needs 10)")
    lengths = None
    if mask_sequence is not None:
        counted = context.one(
            loop.node, "Cast", [mask_sequence.value], to=ir.DataType.INT32.value
        )
        axes = context.ints(loop.node, [0])
        total = (
            context.one(loop.node, "ReduceSum", [counted, axes], keepdims=0)
            if context.opset >= 13
            else context.one(loop.node, "ReduceSum", [counted], axes=[0], keepdims=0)
        )
        lengths = context.one(loop.node, "Reshape", [total, context.ints(loop.node, [-1])])
        for value in (counted, total, lengths):
            value.type = ir.TensorType(ir.DataType.INT32)
    made: dict[int, ir.Node] = {}
    for step in ordered:
        if isinstance(step.x, Sequence):
            whole = wholes[id(step.node)]
            x = _cut(whole, step.x, loop, context)
            backwards = whole.backwards
        else:
            inner = made[id(step.x)]
            x = context.squeeze(loop.node, inner.outputs[0], [1])
            backwards = inner.attributes.get_string("direction", "forward") == "reverse"
        made[id(step.node)] = _operator(step, x, backwards, lengths, loop, context)
    outputs.replace(made)
    context.clean([v for v in loop.node.outputs])
    return list(made.values())


def _ordered(steps: list[Step]) -> list[Step]:
    """Operators that read others come after them."""
    done: list[Step] = []
    left = list(steps)
    while left:
        ready = [
            s
            for s in left
            if isinstance(s.x, Sequence) or any(s.x is d.node for d in done)
        ]
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
    size = context.layout.dimension(x.value, axis)
    whole_length = loop.steps is None or size == loop.steps
    if not whole_length and (x.backwards or loop.steps_value is None) and not (
        loop.steps is not None and set(loop.steps) <= {ONE} and not x.backwards
    ):
        raise Declined("it may run for fewer steps than its sequence has")
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
    if set(loop.steps) <= {ONE}:
        return context.slice(loop.node, value, 0, 0, loop.steps.get(ONE, 0))
    assert loop.steps_value is not None
    end = context.one(loop.node, "Reshape", [loop.steps_value, context.ints(loop.node, [-1])])
    end.type = loop.steps_value.type
    if end.type != ir.TensorType(ir.DataType.INT64):
        end = context.one(loop.node, "Cast", [end], to=ir.DataType.INT64.value)
        end.type = ir.TensorType(ir.DataType.INT64)
    return context.one(loop.node, "Slice", [value, context.ints(loop.node, [0]), end, context.ints(loop.node, [0])])


def _whole_mask(mask: ir.Value, loop: Interface, context: Context, backwards: bool) -> _Whole:
    """Finds the mask of all steps; it must be reversed where the sequence is."""
    try:
        steps = _sequence(mask, loop, context)
    except Declined:
        raise Declined("it masks steps by something that is not one step of a mask") from None
    if steps.axis != 0 or rank(steps.value) not in (2, 3):
        raise Declined("its mask is not time-major")
    if context.layout.dimension(steps.value, 0) != loop.steps and loop.steps is not None:
        raise Declined("its mask may have another length than it has steps")
    value, flipped = steps.value, steps.backwards
    while (source := context.layout.reversed_from(value, 0)) is not None:
        value, flipped = source, not flipped
    if flipped != backwards:
        raise Declined("its mask and its sequence run in different directions")
    return _Whole(value, flipped)


def _operator(
    step: Step,
    x: ir.Value,
    backwards: bool,
    lengths: ir.Value | None,
    loop: Interface,
    context: Context,
) -> ir.Node:
    node, before = step.node, loop.node
    name = context.unique(layer_name(before.name or node.name or "", node.op_type))
    inputs: list[ir.Value | None] = [x]
    for role, position in (("W", 1), ("R", 2), ("B", 3)):
        inputs.append(_outer(node, position, role, name, loop, context))
    inputs.append(lengths)
    for state in (step.h, step.c):
        inputs.append(None if state is None else _initial(state, x, loop, context))
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


def _initial(state: State, x: ir.Value, loop: Interface, context: Context) -> ir.Value | None:
    """Returns an initial state as ``[1, N, H]``; None for zeros."""
    value = state.initial
    if context.layout.is_zero(value):
        return None
    batch = static(value, -2)
    if rank(value) == 2:
        value = context.unsqueeze(loop.node, value, [0])
    if batch == 1 and static(x, 1) != 1:
        # One state for the whole batch.
        shape = context.one(loop.node, "Shape", [x])
        shape.type = ir.TensorType(ir.DataType.INT64)
        rows = context.slice(loop.node, shape, 0, 1, 2)
        one = context.ints(loop.node, [1])
        target = context.one(loop.node, "Concat", [one, rows, one], axis=0)
        rows.type = target.type = shape.type
        value = context.one(loop.node, "Expand", [value, target])
    return value


class _Outputs:
    """What is read from a loop, and what takes its place."""

    def __init__(
        self,
        loop: Interface,
        context: Context,
        steps: list[Step],
        mask: ir.Value | None,
        mask_sequence: _Whole | None,
    ) -> None:
        self._loop = loop
        self._context = context
        self._mask = mask
        self._mask_sequence = mask_sequence
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
        choice = _choice(state.after, self._loop, self._context)
        return (
            choice.mask is not None
            and choice.mask is self._mask
            and id(bare(choice.new)) in self._made_by
            and choice.old is not None
            and bare(choice.old) is bare(state.before)
            and self._context.layout.is_zero(state.initial)
        )

    def _read(self) -> Iterator[tuple[ir.Value, State | Stack]]:
        for state in self._loop.states:
            if state.final is not None and _is_read(state.final):
                yield state.final, state
        for stack in self._loop.scans:
            if _is_read(stack.out):
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
            if ndim is None or ndim < 2 or not all(
                self._context.layout.is_one(value, k) for k in range(ndim - 2)
            ):
                if not isinstance(what, State) or id(what) in self._states:
                    raise Declined(f"the shape of '{value.name}' is not known")

    def _stacked(self, value: ir.Value, out: ir.Value) -> tuple[Step, Choice]:
        bare = self._context.layout.bare
        choice = _choice(value, self._loop, self._context)
        step = self._made_by.get(id(bare(choice.new)))
        masked_alike = choice.mask is self._mask or (
            # What a masked step gives counts nowhere, but it would be another value.
            choice.mask is None and self._mask is None
        )
        kept = choice.old is None or id(bare(choice.old)) in {
            **self._held,
            **{id(bare(s.h.before)): s.h for s, k in self._states.values() if k == 1},
        }
        if step is None or not masked_alike or not kept:
            raise Declined(f"it also computes '{out.name}' at every step")
        return step, choice

    def replace(self, made: Mapping[int, ir.Node]) -> None:
        """Points every reader to the new operators."""
        context, before = self._context, self._loop.node
        for out, what in list(self._read()):
            if isinstance(what, State):
                if id(what) in self._states:
                    step, index = self._states[id(what)]
                    new = self._final(made[id(step.node)].outputs[index], what.after)
                elif id(context.layout.bare(what.before)) in self._held:
                    choice = _choice(what.after, self._loop, context)
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
                self._last_steps(out, node, value)
            if not _is_read(out):
                continue
            ndim = rank(value)
            stacked = node.outputs[0]
            if choice.mask is not None and not zeroed and not backwards:
                stacked = self._filled(stacked, node)
            if ndim == 2:
                stacked = context.squeeze(before, stacked, [1])
            elif ndim == 4:
                stacked = context.unsqueeze(before, stacked, [1])
            if backwards != what.backwards:
                stacked = context.reverse(before, stacked)
            if what.axis:
                stacked = context.one(before, "Transpose", [stacked], perm=[1, 0, 2])
            context.replace(out, stacked)

    def _final(self, state: ir.Value, like: ir.Value) -> ir.Value:
        """Returns a state ``[1, N, H]`` with as many axes as the body's."""
        extra = (rank(like) or 2) - 3
        if extra < 0:
            return self._context.squeeze(self._loop.node, state, [0])
        if extra > 0:
            return self._context.unsqueeze(self._loop.node, state, list(range(extra)))
        return state

    def _filled(self, stacked: ir.Value, node: ir.Node) -> ir.Value:
        """Repeats the last state where steps are masked, as a loop does."""
        context, before = self._context, self._loop.node
        assert self._mask_sequence is not None
        mask = self._mask_sequence.value
        missing = 4 - (rank(mask) or 3)  # [T, N, 1] or [T, N] → [T, 1, N, 1]
        mask = context.unsqueeze(before, mask, [1] if missing == 1 else [1, 3])
        mask.type = ir.TensorType(ir.DataType.BOOL)
        last = context.unsqueeze(before, node.outputs[1], [0])
        return context.one(before, "Where", [mask, stacked, last])

    def _last_steps(self, out: ir.Value, node: ir.Node, value: ir.Value) -> None:
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
                    final = self._final(node.outputs[1], value)
                    context.replace(taken, context.unsqueeze(before, final, [0]))
            elif user.op_type == "Gather" and not user.attributes.get_int("axis", 0):
                index = context.layout.constant(user.inputs[1])
                if index is not None and index.ndim == 0 and index == -1:
                    context.replace(taken, self._final(node.outputs[1], value))
            if not _is_read(taken):
                context.clean([taken])


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()

