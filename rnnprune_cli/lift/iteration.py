"""Loop and Scan seen alike: what they hand on, what they stack, and how often they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from rnnprune_cli.layout import MAX_INT32, ONE, Linear, combined
from rnnprune_cli.lift.context import Context

STEP = "iteration"
"""The symbol for the number of the iteration, from 0."""


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
    """

    node: ir.Node
    body: ir.Graph
    states: list[State]
    scans: list[Stack]
    scanned: dict[int, Sequence] = field(default_factory=dict)
    known: dict[int, Linear] = field(default_factory=dict)
    steps: Linear | None = None


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
    known: dict[int, Linear] = {id(body.inputs[0]): {STEP: 1}}
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
                    for k, v in ((STEP, after[0].get(ONE, 0)), (ONE, start[0].get(ONE, 0)))
                    if v
                }
    for state in list(states):
        if (lists := _appended(state, context)) is not None:
            states.remove(state)
            scans += lists
    found = Interface(node, body, states, scans, known=known)
    return replace(found, steps=_steps(found, context))


def _appended(state: State, context: Context) -> list[Stack] | None:
    """What a body appends to a list that is stacked after the loop, as scripts of torch do."""
    node = context.layout.origin(state.after).producer()
    start = context.layout.origin(state.initial).producer()
    if node is None or node.op_type != "SequenceInsert" or len(node.inputs) != 2:
        return None
    before, value = node.inputs
    begun_empty = start is not None and start.op_type == "SequenceEmpty"
    if value is None or before is not state.before or not begun_empty or state.final is None:
        return None
    stacks = []
    for user in state.final.consumers():
        axis = user.attributes.get_int("axis", 0) or 0
        stacked = user.attributes.get_int("new_axis", 0) == 1
        if user.op_type != "ConcatFromSequence" or not stacked or axis not in (0, 1):
            return None
        stacks.append(Stack(value, user.outputs[0], axis=axis))
    return None if state.final.is_graph_output() else stacks


def _steps(loop: Interface, context: Context) -> Linear:
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
        if rest.get(STEP) != -1:
            raise unknown
        limits.append(combined({k: v for k, v in rest.items() if k != STEP}, {ONE: 1}))
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
    if set(steps) <= {ONE} and steps.get(ONE, 0) < 1:
        raise Declined("it runs for no step at all")
    return steps


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
        one, other = (None if v is None else context.layout.integers(v, known) for v in node.inputs)
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
        return list(node.attributes.get_ints(name, ()) or [0] * count)

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
