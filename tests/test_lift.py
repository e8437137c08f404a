"""Loops, cells and chains of exporters become operators that compute the same. See tests/graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import GRAPHS
from mutate import Feed, conditioned, honest, mutate, outputs, random_feed, session

from rnnprune_cli.lift import Attempt, attempt
from rnnprune_cli.onnx_file import graphs, read_proto

KERAS: dict[str, Any] = json.loads((GRAPHS / "keras_loops" / "index.json").read_text())
CELLS: dict[str, Any] = json.loads((GRAPHS / "cells" / "index.json").read_text())
OTHERS: dict[str, Any] = json.loads((GRAPHS / "index.json").read_text())

LIBRARIES = ("keras2", "keras3")
KINDS = ("lstm", "gru_after", "gru_before", "rnn")
VARIANTS = ("default", "hard_sigmoid", "relu")
LENGTHS = ("static", "dynamic")
BRANCHES = ("uni_last", "uni_seq", "bi_last", "bi_seq")
TABLE = {"_".join(parts) for parts in product(LIBRARIES, KINDS, VARIANTS, LENGTHS)}
MASKED = sorted(name for name in KERAS if "_masked_" in name)
EXTRAS = sorted(KERAS.keys() - TABLE - set(MASKED))
LOOPS_LEFT = {
    # No operator has their cell.
    **dict.fromkeys(("keras2_norm_cell", "keras3_norm_cell"), 1),
    # One has the activation ``swish``, which no operator has.
    **dict.fromkeys(("keras2_activations_rnn", "keras3_activations_rnn"), 1),
}

NO_OPERATOR = {
    name
    for name in CELLS
    if name.endswith(("_double", "_half", "_norm"))
    or name.removeprefix("step_")
    in ("dense", "highway", "lstm_projection", "gru_wrong_mix", "lstm_tanh_forget")
    or name == "step_lstm_weights_fed"
}
"""Cells that are no operator's."""
MAY_BE = {"step_gru_one_gate", "step_lstm_wrong_state", "step_lstm_gate_output"}
"""Cells that are an operator's after all: two gates are one, c is h, or a gate is read as well."""
STAYS = {
    "loop_gru_trip_input",  # for how many steps it runs is not known: maybe for none
    "loop_gru_lengths_outside",  # nothing says that its mask is of right padding
}
"""Loops that operators could stand for, if more were known."""
TWICE = ("bidirectional", "_if_", "stacked", "two_layers", "two_ways")
"""Cells with two layers, directions or branches."""

ATOL = 1e-5
T, N = 7, 3
"""Steps and rows in the stored feeds."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A graph before and after, with a feed and what its exporter's framework gave for it."""

    before: onnx.ModelProto
    attempt: Attempt
    feed: Feed
    expected: Feed

    @property
    def ops(self) -> Counter[str]:
        """Counts the recurrent operators and loops that are there after."""
        nodes = (n for graph in graphs(self.attempt.proto) for n in graph.node)
        return Counter(n.op_type for n in nodes if n.op_type in (*RECURRENT, *LOOPS))

    @property
    def operators(self) -> int:
        return sum(self.ops[op] for op in RECURRENT)

    @property
    def loops(self) -> int:
        return sum(self.ops[op] for op in LOOPS)


RECURRENT = ("LSTM", "GRU", "RNN")
LOOPS = ("Loop", "Scan")


@cache
def tried(name: str, right_padding: bool = False) -> Tried:
    path = GRAPHS / f"{name}.onnx"
    proto = read_proto(path)
    data = np.load(path.with_suffix(".npz"))
    feed, expected = (
        {k.removeprefix(start): data[k] for k in data.files if k.startswith(start)}
        for start in ("input:", "output:")
    )
    made = attempt(proto, path, path.stat().st_size, right_padding)
    return Tried(proto, made, feed, expected)


@cache
def opened(name: str, right_padding: bool = False) -> ort.InferenceSession:
    made = tried(name, right_padding)
    onnx.checker.check_model(made.attempt.proto, full_check=True)
    return session(made.attempt.proto)


@cache
def results(name: str, right_padding: bool = False) -> Feed:
    return outputs(opened(name, right_padding), tried(name, right_padding).feed)


@cache
def results_of_other_sizes(name: str, steps: int, rows: int) -> tuple[Feed, Feed]:
    """Outputs before and after for random inputs."""
    made = tried(name)
    rng = np.random.default_rng(0)
    feed = random_feed(made.before, made.feed, rng, {T: steps, N: rows})
    return outputs(session(made.before), feed), outputs(opened(name), feed)


def assert_near(found: Feed, expected: Mapping[str, np.ndarray], atol: float = ATOL) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        if value.dtype.kind == "f" and value.size:
            worst = float(np.abs(found[name] - value).max())
            assert worst <= atol * max(1.0, float(np.abs(value).max())), name
        else:
            assert (found[name] == value).all(), name


# The table of Keras layers


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_keras_layer_becomes_operators_that_give_what_keras_gives(
    library: str, kind: str, variant: str, length: str, branch: str
) -> None:
    name = f"keras_loops/{library}_{kind}_{variant}_{length}"
    made = tried(name)
    assert not made.loops
    assert set(made.ops) == {"RNN" if kind == "rnn" else kind[:4].strip("_").upper()}
    assert_near({branch: results(name)[branch]}, {branch: made.expected[branch]})
    if length == "dynamic":
        before, after = results_of_other_sizes(name, 3, 2)
        assert_near({branch: after[branch]}, {branch: before[branch]})


@pytest.mark.parametrize("name", MASKED)
def test_masked_layer_stays_a_loop_without_a_promise(name: str) -> None:
    made = tried(f"keras_loops/{name}")
    assert made.loops == len(KERAS[name]["loops"])
    assert len(made.attempt.declined) == made.loops
    hinted = ["--assume-right-padding" in skipped.hint for skipped in made.attempt.declined]
    # What the size of a second layer's input is, nothing tells while the first one is a loop.
    assert all(hinted[:1] if "words" in name else hinted)
    assert_near(results(f"keras_loops/{name}"), made.expected)


@pytest.mark.parametrize("name", MASKED)
def test_masked_layer_becomes_an_operator_if_padding_is_promised_on_the_right(name: str) -> None:
    made = tried(f"keras_loops/{name}", True)
    assert not made.loops
    assert made.operators <= len(KERAS[name]["loops"])
    assert not made.attempt.declined
    assert_near(results(f"keras_loops/{name}", True), made.expected)


@pytest.mark.parametrize("name", MASKED)
def test_masked_layer_may_have_empty_and_full_sequences(name: str) -> None:
    made = tried(f"keras_loops/{name}", True)
    feed = random_feed(made.before, made.feed, np.random.default_rng(1), {T: 5, N: 4})
    for value in feed.values():
        for row, length in enumerate((0, 5, 1, 3)):
            value[row, length:] = 0
    assert_near(
        outputs(opened(f"keras_loops/{name}", True), feed), outputs(session(made.before), feed)
    )


@pytest.mark.parametrize("name", EXTRAS)
def test_other_keras_model_gives_what_keras_gives(name: str) -> None:
    made = tried(f"keras_loops/{name}")
    assert made.loops == LOOPS_LEFT.get(name, 0), made.attempt.declined
    assert_near(results(f"keras_loops/{name}"), made.expected)


# Cells written out


@pytest.mark.parametrize("name", sorted(CELLS))
def test_cell_gives_what_it_gave(name: str) -> None:
    made = tried(f"cells/{name}")
    atol = max(CELLS[name]["atol"], ATOL)
    assert_near(results(f"cells/{name}"), made.expected, atol)
    before, after = results_of_other_sizes(f"cells/{name}", T, 2 * N)
    assert_near(after, before, atol)


@pytest.mark.parametrize("name", sorted(CELLS))
def test_cell_becomes_as_many_operators_as_it_has_layers(name: str) -> None:
    made = tried(f"cells/{name}")
    idiom, unrolled = CELLS[name]["idiom"], name.startswith("unrolled_")
    if name in NO_OPERATOR:
        assert idiom.startswith("DECLINED")
        assert not made.operators
        assert not made.attempt.lifts
    elif idiom.startswith("DECLINED"):
        assert name in MAY_BE or made.loops == len(CELLS[name]["loops"])
    elif idiom.startswith("CELL ONLY") or name in STAYS:
        assert made.loops == len(CELLS[name]["loops"])
        assert made.operators >= (2 if unrolled else 1)
    else:
        assert not made.loops, made.attempt.declined
        assert 1 <= made.operators <= (2 if any(part in name for part in TWICE) else 1)


def test_lengths_of_zero_keep_initial_states_where_padding_is_promised_on_the_right() -> None:
    for name in ("loop_gru_mask", "loop_lstm_mask"):
        made = tried(f"cells/{name}", True)
        feed = dict(made.feed)
        steps = np.arange(T)[:, None] < np.array([T, 4, 0])
        feed["mask"] = steps.reshape(feed["mask"].shape)
        after = outputs(opened(f"cells/{name}", True), feed)
        assert_near(after, outputs(session(made.before), feed))


# Graphs that are there for something else


@pytest.mark.parametrize("name", sorted(n for n in OTHERS if OTHERS[n]["onnxruntime"]))
def test_other_exporters_graph_gives_what_it_gave(name: str) -> None:
    made = tried(name)
    found = outputs(session(made.attempt.proto, GRAPHS), made.feed)
    for key, expected in made.expected.items():
        np.testing.assert_allclose(
            found[key], expected, rtol=1e-5, atol=max(OTHERS[name]["atol"], ATOL), err_msg=key
        )


# Changed graphs

BASES = (
    "cells/loop_gru0_joint",
    "cells/loop_gru_gemm",
    "cells/loop_gru_reverse_flipped",
    "cells/loop_gru_while",
    "cells/loop_lstm_hoisted",
    "cells/loop_lstm_on_count",
    "cells/loop_lstm_reverse",
    "cells/loop_lstm_two_ways",
    "cells/loop_rnn_relu",
    "cells/scan_gru0_joint",
    "cells/scan_gru_reverse",
    "cells/scan_gru_reverse_input",
    "cells/scan_lstm_gates",
    "cells/scan_lstm_reverse_output",
    "cells/step_gru0_gemm",
    "cells/step_gru0_slice",
    "cells/step_gru_flipped_lerp",
    "cells/step_gru_lerp",
    "cells/step_lstm_hard_clip_six",
    "cells/step_lstm_merged_gemm",
    "cells/step_lstm_peepholes",
    "cells/unrolled_gru0_hoisted",
    "cells/unrolled_gru_zeros",
    "cells/unrolled_lstm_simplified",
    "cells/unrolled_rnn_zeros",
    "keras2_gru_reset_before",
    "keras2_simple_rnn",
    "keras3_gru",
    "keras3_hard_sigmoid_lstm",
    "keras_loops/keras3_cell_stack",
    "keras_loops/keras3_conv",
    "keras_loops/keras3_embedded",
    "keras_loops/keras3_merge_none",
    "keras_loops/keras3_return_state_gru",
)
MUTANTS = 60
GROUPS = 10


@dataclass
class Seen:
    """What became of mutants."""

    lifted: int = 0
    declined: int = 0
    wrong: list[str] = field(default_factory=list)


def check_mutant(seed: int, seen: Seen) -> None:
    """Changes a graph, and counts it if it still runs."""
    rng = np.random.default_rng(seed)
    name = BASES[seed % len(BASES)]
    made = tried(name)
    path = GRAPHS / f"{name}.onnx"
    mutant, what = mutate(made.before, rng)
    runs = []
    try:
        onnx.checker.check_model(mutant)
        before = session(mutant)
        for sizes, scale in (({}, 1.0), ({T: 4, N: 2}, 1.0), ({T: 9, N: 5}, 3.0)):
            feed = random_feed(mutant, made.feed, rng, sizes, scale)
            runs.append((feed, outputs(before, feed)))
    except Exception:  # onnx and onnxruntime raise unrelated types
        return
    if not all(honest(mutant, expected) for _, expected in runs):
        return
    said = f"seed {seed}, {name}, {what}"
    found = attempt(mutant, path, path.stat().st_size)
    if not found.lifts:
        seen.declined += 1
        return
    seen.lifted += 1
    after = session(found.proto)
    for feed, expected in runs:
        given = outputs(after, feed)
        try:
            assert_near(given, expected)
        except AssertionError as error:
            moved = conditioned(before, feed, expected)
            if any(
                given[k].shape != v.shape or not np.abs(given[k] - v).max() <= moved[k]
                for k, v in expected.items()
                if v.dtype.kind == "f"
            ):
                seen.wrong.append(f"{said}: {error}")
                return


@pytest.mark.parametrize("group", range(GROUPS))
def test_changed_graph_is_lifted_to_the_same_or_left_as_it_is(group: int) -> None:
    seen = Seen()
    for seed in range(1000 * group, 1000 * (group + 1)):
        check_mutant(seed, seen)
        if seen.lifted + seen.declined == MUTANTS:
            break
    assert not seen.wrong, "\n".join(seen.wrong)
    assert seen.lifted
    assert seen.declined


def test_a_cell_without_a_batch_axis_becomes_an_operator() -> None:
    rng = np.random.default_rng(0)
    text = """
        <ir_version: 9, opset_import: ["": 18]>
        cell (float[5] x, float[6] h, float[6] c) => (float[6] hn, float[6] cn) {
            a = MatMul(x, W)
            b = MatMul(h, R)
            t = Add(a, b)
            i, f, g, o = Split <axis = 0, num_outputs = 4> (t)
            i1 = Sigmoid(i)
            f1 = Sigmoid(f)
            g1 = Tanh(g)
            o1 = Sigmoid(o)
            kept = Mul(f1, c)
            new = Mul(i1, g1)
            cn = Add(kept, new)
            out = Tanh(cn)
            hn = Mul(o1, out)
        }
    """
    model = onnx.parser.parse_model(text)
    for name, rows in (("W", 5), ("R", 6)):
        array = rng.standard_normal((rows, 24)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = attempt(model, GRAPHS / "none.onnx", 0)
    assert [node.op_type for node in made.proto.graph.node if node.op_type == "LSTM"] == ["LSTM"]
    feed = {n: rng.standard_normal(k).astype(np.float32) for n, k in (("x", 5), ("h", 6), ("c", 6))}
    before, after = (outputs(session(proto), feed) for proto in (model, made.proto))
    assert_near(after, before)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_a_reversal_of_time_makes_an_operator_run_backwards(axis: int) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        layer (float[T, N, 5] x, float[N, 6] h) => (float[T, N, 6] y) {
            turned = Slice(x, last, first, axis, back)
            shape = Shape(turned)
            steps = Gather <axis = 0> (shape, zero)
            final, y = Loop (steps, true, h) <body = body
                (int64 i, bool go, float[N, 6] before)
                    => (bool on, float[N, 6] after, float[N, 6] s) {
                on = Identity(go)
                step = Gather <axis = 0> (turned, i)
                a = MatMul(step, W)
                b = MatMul(before, R)
                sum = Add(a, b)
                after = Tanh(sum)
                s = Identity(after)
            }>
        }
    """)
    rng = np.random.default_rng(0)
    constants = {
        "last": np.array([-1]),
        "first": np.array([-(2**63)]),
        "axis": np.array([axis]),
        "back": np.array([-1]),
        "zero": np.array(0),
        "true": np.array(True),
        "W": rng.standard_normal((5, 6)).astype(np.float32),
        "R": rng.standard_normal((6, 6)).astype(np.float32),
    }
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in constants.items()
    )
    made = attempt(model, GRAPHS / "none.onnx", 0)
    (node,) = (n for n in made.proto.graph.node if n.op_type == "RNN")
    directions = [a.s for a in node.attribute if a.name == "direction"]
    assert directions == ([b"reverse"] if axis == 0 else [])
    feed = {
        "x": rng.standard_normal((7, 3, 5)).astype(np.float32),
        "h": rng.standard_normal((3, 6)).astype(np.float32),
    }
    before, after = (outputs(session(proto), feed) for proto in (model, made.proto))
    assert_near(after, before)
