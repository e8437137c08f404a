"""Pictures of weights, held against the weights that were written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import initializers, recurrent_model, two_layers, weights

from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.model import GATES, KeptUnits, RecurrentLayer, StoredWeight, Weight
from rnnprune_cli.pictures import COLUMNS, LAYERS, ROWS, pictures


def recurrent(name, op="LSTM", hidden=12, inputs=7, directions=1, seed=0, tensors=None):
    """A layer whose weights are in memory."""
    tensors = tensors or weights(op, hidden, inputs, directions, seed)
    w, r = (
        Weight(
            f"{name}.{key}",
            tensors[key].shape,
            tensors[key].dtype,
            lambda k=key: tensors[k],
            GATES[op],
        )
        for key in ("W", "R")
    )
    direction = "bidirectional" if directions == 2 else "forward"
    return RecurrentLayer(name, op, direction, inputs, hidden, w, r)


def drawn(before, after=None, stored=None, units=(), lost=1):
    """The pictures of one layer."""
    left = {before.name: sum(w.size for w in before.weights) - lost}
    found = pictures([before], [after] if after else [], stored or {}, units, left)
    return found.get(before.name, ())


def level(block: np.ndarray) -> str:
    """What a cell of these weights should be."""
    share = np.count_nonzero(block) / block.size
    return "0" if share == 0 else "9" if share == 1 else str(min(max(round(9 * share), 1), 8))


def edges(size: int, cells: int) -> list[int]:
    """Where cells begin, and the last one ends."""
    return [next(k for k in range(size) if k * cells // size == c) for c in range(cells)] + [size]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("hidden", [12, 70])
def test_cells_are_the_shares_of_what_was_written(prune_model, tmp_path, op, direction, hidden):
    tensors = weights(op, hidden, 60, 2 if direction == "bidirectional" else 1, 0)
    for name in ("W", "R"):
        tensors[name][:, : hidden // 2] *= np.linspace(0, 2, tensors[name].shape[2])
    model = recurrent_model(op, direction, hidden, 60, tensors=tensors)
    report = prune_model(model, 0.6, scope="layer", export="dense")
    written = initializers(tmp_path / "out.onnx")
    found = report.layers[0].pictures
    directions = tensors["W"].shape[0]
    assert [(p.weight, p.direction) for p in found] == [
        (name, k) for name in "WR" for k in range(directions)
    ]
    few = min(ROWS, hidden)
    for picture in found:
        values = written[picture.weight][picture.direction]
        assert picture.gates == ONNX_ORDER[op]
        assert picture.shape == values.shape
        narrow = min(COLUMNS, values.shape[1])
        down, across = edges(hidden, few), edges(values.shape[1], narrow)
        expected = [
            "".join(
                level(gate[down[i] : down[i + 1], across[j] : across[j + 1]]) for j in range(narrow)
            )
            for gate in np.split(values, GATES[op])
            for i in range(few)
        ]
        assert list(picture.cells) == expected
        assert len(set("".join(expected))) > (3 if hidden > COLUMNS else 1)


def test_units_that_were_cut_are_marked_at_their_old_place():
    before = recurrent("a", hidden=6, inputs=3)
    after = recurrent("a", hidden=2, inputs=3, seed=1)
    units = [KeptUnits("a", ((1, 4),))]
    w, r = drawn(before, after, units=units)
    assert w.shape == (24, 3) and r.shape == (24, 6)
    assert list(w.cells) == 4 * ["xxx", "999", "xxx", "xxx", "999", "xxx"]
    row = "x9xx9x"
    assert list(r.cells) == 4 * ["xxxxxx", row, "xxxxxx", "xxxxxx", row, "xxxxxx"]


def test_each_direction_has_its_own_units():
    before = recurrent("a", "GRU", 4, 3, directions=2)
    after = recurrent("a", "GRU", 2, 3, directions=2, seed=1)
    found = drawn(before, after, units=[KeptUnits("a", ((0, 1), (2, 3)))])
    assert [p.cells[:4] for p in found if p.weight == "W"] == [
        ("999", "999", "xxx", "xxx"),
        ("xxx", "xxx", "999", "999"),
    ]
    assert found[3].cells[2:4] == ("xx99", "xx99")


def test_a_cell_with_some_units_left_shows_what_is_left_of_them():
    before = recurrent("a", "RNN", 64, 2)
    tensors = weights("RNN", 32, 2, 1, 1)
    tensors["W"][:, 3] = 0
    after = recurrent("a", "RNN", 32, 2, tensors=tensors)
    kept = tuple(range(0, 64, 2))  # one of two in each cell
    (w, _) = drawn(before, after, units=[KeptUnits("a", (kept,))])
    assert w.cells[:5] == ("99", "99", "99", "00", "99")
    assert len(w.cells) == ROWS


def test_columns_of_w_that_went_with_units_below_are_not_made_up():
    before = recurrent("a", "RNN", 4, 10)
    after = recurrent("a", "RNN", 4, 6, seed=1)
    w, r = drawn(before, after, lost=16)
    assert w.shape == (4, 10)  # as it was
    assert list(w.cells) == 4 * ["999999"]  # what is left of it
    assert list(r.cells) == 4 * ["9999"]


def test_a_layer_that_was_removed_is_gone_as_a_whole():
    found = drawn(recurrent("a", "RNN", 4, 10))
    assert all(set("".join(p.cells)) == {"x"} for p in found)
    assert [p.shape for p in found] == [(4, 10), (4, 4)]


def test_masks_and_refitted_values_count_as_they_will_be_stored():
    before = recurrent("a", "RNN", 4, 4)
    mask = np.ones((1, 4, 4), bool)
    mask[0, 1] = False
    refitted = np.ones((1, 4, 4), np.float32)
    refitted[0, 2] = 0
    stored = {"a.W": StoredWeight(before.w, mask, refitted)}
    w, r = drawn(before, before, stored)
    assert w.cells == ("9999", "0000", "0000", "9999")
    assert set("".join(r.cells)) == {"9"}


def test_layers_that_lost_nothing_have_no_pictures(prune_model):
    report = prune_model(two_layers(), 0.5, exclude=["other"])
    pictured = {row.name: len(row.pictures) for row in report.layers}
    assert pictured == {"rnn": 2, "other": 0}


def test_a_model_of_very_many_layers_has_pictures_of_those_that_lost_most():
    layers = [recurrent(f"l{k}", "RNN", 4, 4) for k in range(LAYERS + 8)]
    left = {layer.name: 32 - (k % 16) for k, layer in enumerate(layers)}
    found = pictures(layers, layers, {}, (), left)
    assert len(found) == LAYERS
    least = min(32 - left[name] for name in found)
    assert all(32 - left[x.name] <= least for x in layers if x.name not in found)


def test_large_layers_have_pictures_of_the_same_size():
    before = recurrent("a", "LSTM", 1024, 1024)
    w, r = drawn(before, before)
    for picture in (w, r):
        assert len(picture.cells) == 4 * ROWS
        assert {len(row) for row in picture.cells} == {COLUMNS}


def test_pictures_are_of_what_units_leave(prune_model, tmp_path):
    """A real run: units that the written file still has, and no others."""
    from test_report import classifier

    report = prune_model(classifier(), 0.5, granularity="unit", scope="layer")
    (row,) = report.layers
    kept = set(report.units[0].kept[0])
    w, r = row.pictures
    rows = [k for k, cells in enumerate(w.cells[:12]) if "x" not in cells]
    assert set(rows) == kept
    assert [k for k, cell in enumerate(r.cells[rows[0]]) if cell != "x"] == sorted(kept)
    written = onnx.load(tmp_path / "out.onnx")
    (node,) = [n for n in written.graph.node if n.op_type == "LSTM"]
    assert {a.name: a.i for a in node.attribute}["hidden_size"] == len(kept) == 6
