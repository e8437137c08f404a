"""What a loop's body does with its recurrent operators: states, sequences, masks."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rnnprune_cli.find import is_recurrent
from rnnprune_cli.layout import ONE, combined, rank
from rnnprune_cli.lift.algebra import Leaf
from rnnprune_cli.lift.context import Context, is_flag
from rnnprune_cli.lift.iteration import STEP, Declined, Interface, Sequence, State


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
    made_by = {id(context.layout.bare(value)): node for node in nodes for value in node.outputs[:2]}
    found = []
    for node in nodes:
        inputs = list(node.inputs) + [None] * (8 - len(node.inputs))
        x, lengths, h, c = inputs[0], inputs[4], inputs[5], inputs[6]
        if x is None or lengths is not None or node.attributes.get_int("layout"):
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
            for s in (choice_of(part.after, loop, context) for part in (state, cell) if part)
        }
        if len(masks) != 1:
            raise Declined("its states are not masked alike")
        bare = context.layout.bare(x)
        source = made_by.get(id(bare)) or sequence_of(bare, loop, context)
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
            choice = choice_of(state.after, loop, context)
            if context.layout.bare(choice.new) is not context.layout.bare(after):
                raise Declined("what it hands on is not the state of the operator in it")
            if choice.mask is not None and (
                choice.old is None or context.layout.bare(choice.old) is not bare
            ):
                raise Declined("a masked step does not keep the state")
            return state
    raise Declined("the state of an operator in it is not handed from step to step")


def choice_of(value: ir.Value, loop: Interface, context: Context) -> Choice:
    """Takes masking apart: Where, or products with a mask and its complement."""
    bare = context.layout.bare(value)
    node = bare.producer()
    if node is not None and node.op_type == "Where" and node.graph is loop.body:
        condition, one, other = node.inputs
        flag = condition is not None and _is_for_rows(condition, context)
        if flag and condition is not None and one is not None and other is not None:
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
        flags = [f for f in leaves if is_flag(f.value)]
        others = [f for f in leaves if not is_flag(f.value)]
        if len(flags) != 1 or len(others) != 1 or not _is_for_rows(flags[0].value, context):
            return Choice(bare)
        mask, positive = _boolean(flags[0].value, context)
        masks[id(mask)] = mask
        chosen[positive] = others[0].value
    if len(masks) != 1 or True not in chosen or len(chosen) != len(terms):
        return Choice(bare)
    kept = chosen.get(False)
    if kept is not None and context.layout.is_zero(kept):
        kept = None
    return Choice(chosen[True], kept, next(iter(masks.values())))


def _is_for_rows(flag: ir.Value, context: Context) -> bool:
    """Tells whether a flag is ``[N, 1]``: one for each row."""
    ndim = rank(flag) or 0
    return ndim > 1 and all(context.layout.is_one(flag, k) for k in range(ndim) if k != ndim - 2)


def _boolean(value: ir.Value, context: Context) -> tuple[ir.Value, bool]:
    """Follows a boolean back through negations and changes of shape."""
    positive = True
    while True:
        value = context.layout.bare(value)
        node = value.producer()
        if node is None or node.op_type not in _SAME_BOOLEAN:
            return value, positive
        source = node.inputs[0]
        if source is None:
            return value, positive
        positive ^= node.op_type == "Not"
        value = source


_SAME_BOOLEAN = frozenset({"Not", "Cast", "Expand", "Tile", "Unsqueeze", "Squeeze"})


def sequence_of(value: ir.Value, loop: Interface, context: Context) -> Sequence:
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
                if at[0] == {STEP: 1}:
                    return Sequence(source, axis, False)
                if loop.steps is not None and at[0] == combined(
                    combined(loop.steps, {ONE: 1}, -1), {STEP: 1}, -1
                ):
                    return Sequence(source, axis, True)
    if node is not None and node.op_type == "SequenceAt" and node.graph is loop.body:
        listed, index = node.inputs
        split = None if listed is None else context.layout.split_of(listed)
        at = None if index is None else context.layout.integers(index, loop.known)
        if split is not None and at == [{STEP: 1}]:
            return Sequence(*split, False)
    raise Declined(f"its operator reads '{value.name}', which is not one step of a sequence")
