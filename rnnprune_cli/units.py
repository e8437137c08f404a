"""Which hidden units go: scores, scope and sparsity → a choice.

Units that are coupled go together, and what differs in nothing but its place, such as the two
directions of a layer, loses equally many.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnprune_cli.coupling import Coupling, UnitLayer
from rnnprune_cli.coupling.classes import IntArray
from rnnprune_cli.model import Array, BoolArray

Blocked = Mapping[str, str]
"""Layer name → why none, or not all, of its units may go."""

_LEVELS = 256
"""Numbers of units that ``global`` tries for each layer, at most."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which units go.

    Attributes:
        removed: bool, one for each label of the coupling: True where its class goes.
        blocked: Layer name → why none, or not all, of its units may go.
    """

    removed: BoolArray
    blocked: Blocked


@dataclass(frozen=True, eq=False)
class _Group:
    """Layers whose units must be chosen together.

    Attributes:
        rows: Classes at the places of each unit axis that must keep one at least.
        shared: For each row, whether it loses a share of its places at most.
        equal: Numbers of rows that must lose equally many.
        classes: What may go, lowest score first.
        units: How many units each of them has.
        scores: Of each of them, ≥ 0.
        total: All scores of the group, of what may not go too.
    """

    rows: list[IntArray]
    shared: list[bool]
    equal: list[list[int]]
    classes: IntArray
    units: IntArray
    scores: Array
    total: float

    @property
    def longest(self) -> int:
        """The most places that a row that loses a share has."""
        own = zip(self.rows, self.shared, strict=True)
        return max(len(row) for row, shared in own if shared)

    def remove(self, share: float) -> tuple[set[int], float, int]:
        """Returns the classes that go if rows lose a share, their scores, and their units.

        From the lowest score on, a class goes if all its rows can lose more. If rows that must
        lose equally many do not, all of them lose as many as the one that lost least.
        """
        left: list[int] = []
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, (own, shared) in enumerate(zip(self.rows, self.shared, strict=True)):
            present, counts = np.unique(own, return_counts=True)
            # Rows that repeat the same units, such as those of all gates, round as these do.
            times = int(counts[0]) if (counts == counts[0]).all() else 1
            most = len(own) // times
            left.append(times * min(round(most * share) if shared else most, most - 1))
            for each, count in zip(present.tolist(), counts.tolist(), strict=True):
                places[each].append((number, count))
        while True:
            budget, gone, cost, units = list(left), set[int](), 0.0, 0
            for group, score, count in zip(
                self.classes.tolist(), self.scores.tolist(), self.units.tolist(), strict=True
            ):
                if all(budget[row] >= times for row, times in places[group]):
                    for row, times in places[group]:
                        budget[row] -= times
                    gone.add(group)
                    cost += score
                    units += count
            lost = [allowed - rest for allowed, rest in zip(left, budget, strict=True)]
            uneven = [rows for rows in self.equal if len({lost[row] for row in rows}) > 1]
            if not uneven:
                return gone, cost, units
            for rows in uneven:
                least = min(lost[row] for row in rows)
                for row in rows:
                    left[row] = min(left[row], least)


def choose(
    coupling: Coupling,
    scores: Array,
    names: Iterable[str],
    sparsity: float,
    scope: str,
    shares: Mapping[str, float] | None = None,
) -> Chosen:
    """Chooses the units that go.

    Args:
        coupling: What goes together.
        scores: float, one for each label, ≥ 0; the same for all of a class.
        names: The layers that may lose units.
        sparsity: Share of their units to remove, 0 ≤ s < 1.
        scope: A key of :data:`rnnprune_cli.select.UNIT_SCOPES`.
        shares: Layer name → sparsity, where it is another; of layers that go together the least.

    Returns:
        The choice; every layer keeps at least one unit in each direction.
    """
    root = coupling.classes.of(np.arange(len(coupling.classes)))
    allowed, blocked = _allowed(coupling, root, set(names))
    groups = _groups(coupling, root, allowed, scores)
    own = {layer.name: (shares or {}).get(layer.name, sparsity) for layer in coupling.layers}
    gone: set[int] = set()
    if scope == "global":
        # Units that are blocked do not make the others go in their place.
        units = sum(int(group.units.sum()) for group in groups)
        for group, share in zip(groups, _global_shares(groups, sparsity * units), strict=True):
            gone |= group.remove(share)[0]
    else:
        for group in groups:
            members = np.concatenate(group.rows)
            gone |= group.remove(
                min(
                    (
                        own[layer.name]
                        for layer in coupling.layers
                        if np.isin(root[layer.labels], members).any()
                    ),
                    default=sparsity,
                )
            )[0]
    removed = np.isin(root, np.fromiter(gone, np.int64, len(gone)))
    held = dict(blocked)
    for layer in coupling.layers:
        wanted = layer.name in set(names) and round(own[layer.name] * layer.labels.shape[1]) > 0
        if wanted and scope == "layer" and not removed[layer.labels].any():
            blocked.setdefault(layer.name, _held_back(coupling, root, layer, groups, held))
    return Chosen(removed, blocked)


def _held_back(
    coupling: Coupling, root: IntArray, layer: UnitLayer, groups: Sequence[_Group], known: Blocked
) -> str:
    """Says what keeps units that are not blocked themselves."""
    for group in groups:
        classes = np.concatenate(group.rows)
        if not np.isin(root[layer.labels], classes).any():
            continue
        for other in coupling.layers:
            if other.name in known and np.isin(root[other.labels], classes).any():
                return f"as many must go as of '{other.name}', which is held: {known[other.name]}"
    return "its units must go with others of which not as many can"


def _allowed(
    coupling: Coupling, root: IntArray, names: set[str]
) -> tuple[BoolArray, dict[str, str]]:
    """Returns which classes may go, and why units of a layer may not."""
    has_units = np.zeros(len(root), np.bool_)
    may = np.ones(len(root), np.bool_)
    why: dict[int, str] = {}
    for block in coupling.blocks:
        for each in np.unique(root[block.labels]):
            may[each] = False
            why.setdefault(
                int(each), f"{block.reason}; {block.hint}" if block.hint else block.reason
            )
    for layer in coupling.layers:
        own = np.unique(root[layer.labels])
        has_units[own] = True
        if layer.name not in names:
            may[own] = False
            for each in own:
                why.setdefault(int(each), f"coupled with '{layer.name}', which is not selected")
    blocked: dict[str, str] = {}
    for layer in coupling.layers:
        held = [int(each) for each in np.unique(root[layer.labels]) if not may[each]]
        if layer.name in names and held:
            count = int(np.isin(root[layer.labels], held).sum())
            part = "" if count == layer.labels.size else f"{count} of {layer.labels.size} units: "
            blocked[layer.name] = part + why[held[0]]
    return has_units & may, blocked


def _groups(coupling: Coupling, root: IntArray, allowed: BoolArray, scores: Array) -> list[_Group]:
    rows = [row for layer in coupling.layers for row in root[layer.labels]]
    equal: list[list[int]] = []
    start = 0
    for layer in coupling.layers:
        equal.append(list(range(start, start + len(layer.labels))))
        start += len(layer.labels)
    units = len(rows)
    known = {row.tobytes(): number for number, row in enumerate(rows)}
    by_class = {each: set(row.tolist()) for row in rows for each in row.tolist()}
    for labels in coupling.every():
        array = root[np.moveaxis(labels.array, labels.axis, -1)]
        several = np.unique(array.reshape(-1, array.shape[-1]), axis=0)
        numbers = []
        for row in several:
            if len(several) == 1 and not _may_empty(row, by_class):
                continue
            numbers.append(known.setdefault(row.tobytes(), len(rows)))
            if numbers[-1] == len(rows):
                rows.append(row)
        if len(several) > 1:
            equal.append(numbers)
    shared = set(range(units)) | {number for numbers in equal for number in numbers}
    # Rows with a class in common, or that must lose equally many, are one group.
    leader = list(range(len(rows)))

    def find(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    first: dict[int, int] = {}
    for number, row in enumerate(rows):
        for each in row.tolist():
            leader[find(number)] = find(first.setdefault(each, number))
    for numbers in equal:
        for number in numbers:
            leader[find(number)] = find(numbers[0])
    size = np.zeros(len(root), np.int64)
    for layer in coupling.layers:
        np.add.at(size, root[layer.labels], 1)
    energy = np.zeros(len(root))
    energy[root] = scores  # one for all labels of a class
    groups = []
    for each in dict.fromkeys(find(number) for number in range(len(rows))):
        members = [number for number in range(len(rows)) if find(number) == each]
        classes = np.unique(np.concatenate([rows[number] for number in members]))
        free = classes[allowed[classes]]
        free = free[np.argsort(energy[free], kind="stable")]
        place = {number: k for k, number in enumerate(members)}
        groups.append(
            _Group(
                [rows[number] for number in members],
                [number in shared for number in members],
                [[place[n] for n in numbers] for numbers in equal if find(numbers[0]) == each],
                free,
                size[free],
                energy[free],
                float(energy[classes].sum()),
            )
        )
    return groups


def _may_empty(row: IntArray, by_class: Mapping[int, set[int]]) -> bool:
    """Tells whether a row has units, but not all of any direction of a layer, which keeps one."""
    present = set(row.tolist())
    units = [by_class[each] for each in present if each in by_class]
    return bool(units) and not any(own <= present for own in units)


def _global_shares(groups: Sequence[_Group], wanted: float) -> list[float]:
    """Returns the share that each group loses so that so many units go at the least cost.

    The cost of a unit is its share of the scores of its group: what a layer hands on is worth the
    same whatever its scale, as the next layer's weights were trained on that scale.
    """
    shares = [0.0] * len(groups)
    queue: list[tuple[float, int, int, float]] = []
    counts = [0] * len(groups)
    costs = [0.0] * len(groups)

    def push(number: int, level: int) -> None:
        group = groups[number]
        levels = min(group.longest, _LEVELS)
        if level >= levels:
            return
        _, cost, count = group.remove(level / levels)
        if count <= counts[number]:
            push(number, level + 1)
            return
        more = (cost - costs[number]) / max(group.total, 1e-30) / (count - counts[number])
        heapq.heappush(queue, (more, number, level, cost))

    for number in range(len(groups)):
        push(number, 1)
    removed = 0
    while queue and removed < wanted:
        _, number, level, cost = heapq.heappop(queue)
        group = groups[number]
        levels = min(group.longest, _LEVELS)
        _, _, count = group.remove(level / levels)
        removed += count - counts[number]
        counts[number], costs[number], shares[number] = count, cost, level / levels
        push(number, level + 1)
    return shares
