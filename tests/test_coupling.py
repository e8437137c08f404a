"""Graphs that lost hidden units equal the masked ones, or say why no unit can go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from conftest import GRAPHS, weights
from mutate import random_feed, session
from onnx import helper, numpy_helper
from random_graphs import random_graph
from units_check import Array, Removal, distance, remove, runnable

from rnnprune_cli.lift import attempt
from rnnprune_cli.onnx_file import read_proto

TOLERANCE = 1e-5
CHUNKS, CHUNK = 12, 25
"""Random graphs here; tests/benchmarks/units.py runs any number of them."""

Arrays = Mapping[str, Any]


def run(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    return list(session(proto).run(None, dict(feed)))


# Random graphs, with a reference that does not come from the analysis


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_graph_without_units_equals_its_independent_reference(chunk: int) -> None:
    blocked = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        graph = random_graph(seed)
        scope = ("layer", "global")[seed % 2]
        found = remove(graph.model, (0.25, 0.5, 0.75)[seed % 3], seed, scope)
        if found.shrunk is None or found.masked is None:
            assert found.blocked
            if not any(name.startswith("block:") for name in graph.patterns):
                blocked.append(seed)
            continue
        onnx.checker.check_model(found.shrunk, full_check=True)
        oracle = graph.masked(found.kept)
        for feed in graph.feeds:
            expected = run(oracle, feed)
            assert distance(expected, run(found.masked, feed)) <= TOLERANCE, seed
            assert distance(expected, run(found.shrunk, feed)) <= TOLERANCE, seed
    assert len(blocked) <= 1, blocked  # such as two units of which each half has one


@pytest.mark.parametrize("seed", range(60))
def test_random_graph_with_smaller_states_equals_the_masked_one(seed: int) -> None:
    graph = random_graph(seed)
    if not graph.states:
        return
    assert_exact(remove(graph.model, 0.5, seed, resize_state=True), graph.feeds)


@pytest.mark.parametrize("seed", range(120))
def test_random_graph_that_normalises_over_units_equals_the_masked_one(seed: int) -> None:
    graph = random_graph(seed)
    if any(p.startswith("block:") for p in graph.patterns):
        assert_exact(remove(graph.model, 0.5, seed, allow_inexact=True), graph.feeds)


def assert_exact(found: Removal, feeds: Any) -> None:
    """Asserts that the smaller model equals the masked one, if any unit went."""
    if found.shrunk is None or found.masked is None:
        assert found.blocked
        return
    onnx.checker.check_model(found.shrunk, full_check=True)
    onnx.checker.check_model(found.masked, full_check=True)
    for feed in feeds:
        given = found.fed(feed)
        assert distance(run(found.masked, given), run(found.shrunk, given)) <= TOLERANCE


# Graphs of other exporters


def lifted(name: str) -> onnx.ModelProto:
    path = GRAPHS / f"{name}.onnx"
    proto = read_proto(path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    return attempt(proto, path, path.stat().st_size).proto


def with_heads(proto: onnx.ModelProto, units: int = 3) -> onnx.ModelProto:
    """Puts a MatMul behind outputs of known width, so that callers see no unit."""
    rng = np.random.default_rng(0)
    for value in list(proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        dtype = value.type.tensor_type.elem_type
        wide = dims and dims[-1].dim_value > 1 and value.name not in ("h_out", "c_out")
        if dtype != onnx.TensorProto.FLOAT or not wide:
            continue
        head = rng.standard_normal((dims[-1].dim_value, units)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(head, f"{value.name}/head"))
        result = f"{value.name}/result"
        proto.graph.node.append(
            helper.make_node("MatMul", [value.name, f"{value.name}/head"], [result])
        )
        proto.graph.output.remove(value)
        proto.graph.output.append(helper.make_tensor_value_info(result, dtype, None))
    proto.ir_version = max(proto.ir_version, 4)
    return proto


def feed_of(name: str) -> dict[str, Array]:
    data = np.load(GRAPHS / f"{name}.npz")
    return {k.removeprefix("input:"): data[k] for k in data.files if k.startswith("input:")}


EXPORTED = sorted(
    [n for n, e in json.loads((GRAPHS / "index.json").read_text()).items() if not e["external"]]
    + [f"edges/{n}" for n in json.loads((GRAPHS / "edges" / "index.json").read_text())]
    + [f"cells/{n}" for n in json.loads((GRAPHS / "cells" / "index.json").read_text())][::4]
    + [f"keras_loops/{n}" for n in json.loads((GRAPHS / "keras_loops/index.json").read_text())][::8]
)


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graph_without_units_equals_the_masked_one(name: str) -> None:
    proto = with_heads(lifted(name))
    found = remove(proto, 0.5, 0)
    if found.shrunk is None or found.masked is None:
        assert found.blocked or not found.kept
        return
    masked, shrunk = runnable(found.masked), runnable(found.shrunk)
    feed = feed_of(name)
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    worst = distance(masked.run(None, feed), shrunk.run(None, feed))
    assert worst <= (5e-3 if half else TOLERANCE)
    other = random_feed(proto, feed, np.random.default_rng(0), {7: 4, 3: 2})
    try:
        expected = masked.run(None, other)
    except Exception:  # it insists on the sizes it was exported with
        return
    assert distance(expected, shrunk.run(None, other)) <= (5e-3 if half else TOLERANCE)


# One idiom each

T, N, INPUTS, H = 4, 2, 3, 6
SIZES = f"float[{T},{N},{INPUTS}] x"


def graph_of(
    body: str,
    arrays: Arrays,
    opset: int = 17,
    op: str = "GRU",
    directions: int = 1,
    hidden: int = H,
    inputs: str = "float[T,N,3] x",
) -> onnx.ModelProto:
    """A layer from x to y [T, N, H] (or Y [T, D, N, H]) and h [D, N, H], then what a text says."""
    direction = "bidirectional" if directions == 2 else "forward"
    squeeze = "y = Squeeze(Y, one)" if opset >= 13 else "y = Squeeze<axes=[1]>(Y)"
    text = f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({inputs}) => (float out) {{
            Y, h = {op}<hidden_size={hidden}, direction="{direction}">(x, W, R, B)
            {squeeze if directions == 1 else ""}
            {body}
        }}"""
    proto = onnx.parser.parse_model(text)
    stored = {**weights(op, hidden, INPUTS, directions, 0), **arrays}
    if directions == 1 and opset >= 13:
        stored["one"] = np.array([1])
    for name, array in stored.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto).graph.output[0]
    unknown = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["a", "b", "c"])
    known = inferred.type.tensor_type.HasField("shape")
    proto.graph.output[0].CopyFrom(inferred if known else unknown)
    onnx.checker.check_model(proto)
    return proto


def numbers(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


X = numbers(T, N, INPUTS, seed=9)
W = numbers(H, 2)

EXACT: dict[str, onnx.ModelProto] = {
    "squeeze without axes": graph_of("s = Squeeze(Y)\n out = MatMul(s, w)", {"w": W}, inputs=SIZES),
    "squeeze without axes before opset 13": graph_of(
        "s = Squeeze(Y)\n out = MatMul(s, w)", {"w": W}, opset=11, inputs=SIZES
    ),
    "reshape to sizes of the caller": graph_of(
        "s = Reshape(y, sizes)\n s2 = Relu(s)\n out = MatMul(s2, w)",
        {"w": W},
        inputs=f"{SIZES}, int64[3] sizes",
    ),
    "tensordot": graph_of(
        """s = Shape(y)
        free = Gather(s, first)
        inner = Gather(s, last)
        rows = ReduceProd<keepdims=1>(free)
        columns = ReduceProd<keepdims=1>(inner)
        flat = Concat<axis=0>(rows, columns)
        z = Reshape(y, flat)
        out = MatMul(z, w)""",
        {"w": W, "first": ints(0, 1), "last": ints(2)},
    ),
    "sizes from a later axis on": graph_of(
        """total = ReduceSum<keepdims=0>(y, last)
        n = Shape<start=-1>(y)
        rest = Shape<start=3>(y)
        m = Cast<to=1>(n)
        mean = Div(total, m)
        none = Cast<to=1>(rest)
        flat = Reshape(mean, minus)
        out = Concat<axis=0>(flat, none)""",
        {"last": ints(-1), "minus": ints(-1)},
    ),
    "stacked states": graph_of(
        """h2, g2 = GRU<hidden_size=6>(x, W2, R2)
        both = Concat<axis=0>(g2, h)
        first = Gather<axis=0>(both, minus)
        out = MatMul(first, w)""",
        {
            "w": W,
            "minus": np.array(-1),
            "W2": numbers(1, 3 * H, INPUTS, seed=4),
            "R2": numbers(1, 3 * H, H, seed=5),
        },
    ),
    "slices forwards and backwards, beyond the ends": graph_of(
        """a = Slice(y, s0, e0, axes)
        b = Slice(y, s1, e1, axes, steps)
        c = Slice(y, s2, e2, axes, steps)
        both = Concat<axis=2>(a, b, c)
        out = MatMul(both, w)""",
        {
            "w": numbers(3 + 6 + 4, 2),
            "axes": ints(-1),
            "steps": ints(-1),
            "s0": ints(-100),
            "e0": ints(3),
            "s1": ints(100),
            "e1": ints(-100),
            "s2": ints(-2),
            "e2": ints(0),
        },
    ),
    "negative indices, one twice": graph_of(
        "z = Gather<axis=-1>(y, k)\n out = MatMul(z, w)",
        {"w": numbers(5, 2), "k": ints(-1, 0, 2, -1, 3)},
    ),
    "uneven parts": graph_of(
        "a, b = Split<axis=2>(y, parts)\n u = MatMul(a, v)\n t = MatMul(b, w)\n out = Sub(u, t)",
        {"v": numbers(2, 2), "w": numbers(4, 2), "parts": ints(2, 4)},
    ),
    "uneven parts by their number": graph_of(
        """a, b = Split<axis=2, num_outputs=2>(y)
        u = MatMul(a, v)
        t = MatMul(b, w)
        out = Sub(u, t)""",
        {"v": numbers(4, 2), "w": numbers(3, 2)},
        opset=18,
        hidden=7,
    ),
    "one constant for units and for what is none": graph_of(
        """a = Add(y, c)
        u = MatMul(a, w)
        z = MatMul(x, v)
        b = Add(z, c)
        out = Concat<axis=-1>(u, b)""",
        {"c": numbers(H), "w": W, "v": numbers(INPUTS, H)},
    ),
    "gemm with transposed operands and one row added": graph_of(
        """last = Gather<axis=0>(h, zero)
        turned = Transpose(last)
        p = Gemm<transA=1, transB=1, alpha=0.5, beta=2.0>(turned, w, c)
        q = Gemm<transB=1>(w, last, d)
        r = Gemm(last, v, e)
        qt = Transpose(q)
        rr = MatMul(r, u)
        out = Concat<axis=-1>(p, qt, rr)""",
        {
            "zero": np.array(0),
            "w": numbers(2, H),
            "c": numbers(1),
            "d": numbers(2, 1),
            "e": numbers(1, 4),
            "v": numbers(H, 4),
            "u": numbers(4, 2),
        },
    ),
    "vectors as operands": graph_of(
        "a = MatMul(y, w)\n row = Gather<axis=0>(h, z)\n v = Gather<axis=0>(row, z)\n"
        " b = MatMul(v, m)\n q = ReduceSum(b)\n out = Mul(a, q)",
        {"w": numbers(H), "z": np.array(0), "m": numbers(H, 3)},
    ),
    "units choose between units": graph_of(
        "c = Greater(y, t)\n n = Neg(y)\n z = Where(c, y, n)\n s = PRelu(z, p)\n k = Max(s, lim)\n"
        " out = MatMul(k, w)",
        {"t": numbers(H, seed=3) * 0, "p": numbers(H), "lim": numbers(1, 1, H), "w": W},
    ),
    "attention scores by a sum over units": graph_of(
        "e = Mul(y, v)\n s = ReduceSum<keepdims=1>(e, last)\n a = Softmax<axis=0>(s)\n"
        " z = Mul(a, y)\n out = MatMul(z, w)",
        {"v": numbers(H), "last": ints(2), "w": W},
    ),
    "every other unit, of which one has to stay": graph_of(
        "z = Gather<axis=2>(y, k)\n out = MatMul(z, w)", {"k": ints(1, 3), "w": numbers(2, 2)}
    ),
    "expanded to more axes": graph_of(
        """s = Shape(y)
        target = Concat<axis=0>(five, s)
        z = Expand(y, target)
        out = MatMul(z, w)""",
        {"five": ints(5), "w": W},
    ),
    "a loop that may not run": graph_of(
        """out0 = Loop (trips, yes, y) <body = b (int64 i, bool c, float[T,N,6] v)
            => (bool d, float[T,N,6] u) {
            d = Identity(c)
            u = Mul(v, scale)
        }>
        out = MatMul(out0, w)""",
        {"w": W, "yes": np.array(True), "scale": numbers(H)},
        inputs="float[T,N,3] x, int64 trips",
    ),
    "a scan that goes backwards and stacks behind": graph_of(
        """z = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_input_directions=[1],
            scan_output_axes=[-1], body = b (float[T,6] v) => (float[T,6] u) {
            u = Mul(v, scale)
        }>(y)
        t = Transpose<perm=[0,2,1]>(z)
        out = MatMul(t, w)""",
        {"w": W, "scale": numbers(H)},
        inputs=SIZES,
    ),
    "batch multiplied with weights of each direction": graph_of(
        "t = Transpose<perm=[1,0,2,3]>(Y)\n s = Reshape(t, k)\n out = MatMul(s, w)",
        {"k": ints(2, -1, H), "w": numbers(2, H, 3)},
        directions=2,
    ),
    "directions behind the units they are joined with": graph_of(
        "t = Transpose<perm=[0,2,3,1]>(Y)\n s = Reshape(t, k)\n out = MatMul(s, w)",
        {"k": ints(0, 0, -1), "w": numbers(2 * H, 3)},
        directions=2,
    ),
    "one weight for all directions, of broadcast size": graph_of(
        "out = MatMul(Y, w)", {"w": numbers(1, H, 3)}, directions=2
    ),
    "one constant for two operands with units": graph_of(
        'out = Einsum<equation="tnh,tnh,ho->tno">(y, y, w)', {"w": W}
    ),
    "one constant for two operands with units that stay": graph_of(
        'z = Einsum<equation="tnh,tnh,h->tnh">(y, y, v)\n out = MatMul(z, w)',
        {"v": numbers(H), "w": W},
    ),
    "a branch that is always taken, with the other's names": graph_of(
        """z = If (yes) <then_branch = a () => (float[T,N,6] p) <float[1] k = {0.5}> {
            p = Mul(y, k)
        }, else_branch = b () => (float[T,N,6] q) <float[1] k = {2.0}> { q = Mul(y, k) }>
        out = MatMul(z, w)""",
        {"w": W, "yes": np.array(True)},
    ),
    "dropout at rest": graph_of("z, m = Dropout(y)\n out = MatMul(z, w)", {"w": W}),
    "clipped from below by each unit's own number": graph_of(
        "z = Max(y, low)\n out = MatMul(z, w)", {"low": numbers(N, H), "w": W}, inputs=SIZES
    ),
    "rows side by side, as in a pyramid of layers": graph_of(
        "t = Transpose<perm=[1, 0, 2]>(y)\n p = Reshape(t, k)\n out = MatMul(p, w)",
        {"k": ints(N, -1, 2 * H), "w": numbers(2 * H, 2)},
    ),
    "rows of several samples side by side": graph_of(
        "p = Reshape(y, k)\n out = MatMul(p, w)",
        {"k": ints(-1, 2 * H), "w": numbers(2 * H, 2)},
    ),
    "units in rows of three": graph_of(
        "p = Reshape(y, k)\n z = Relu(p)\n out = MatMul(z, w)",
        {"k": ints(-1, 3), "w": numbers(3, 2)},
    ),
    "steps and samples as one axis and back": graph_of(
        """s = Shape(y)
        t = Gather<axis=0>(s, zero)
        n = Gather<axis=0>(s, first)
        tn = Mul(t, n)
        flat = Concat<axis=0>(tn, minus)
        f = Reshape(y, flat)
        b = BatchNormalization(f, scale, bias, mean, var)
        full = Concat<axis=0>(t, n, minus)
        z = Reshape(b, full)
        out = MatMul(z, w)""",
        {
            **{"zero": ints(0), "first": ints(1), "minus": ints(-1), "w": W},
            **{"scale": numbers(H), "bias": numbers(H, seed=2), "mean": numbers(H, seed=3)},
            "var": numbers(H, seed=4) ** 2 + 1,
        },
    ),
    "a step for each sample, its index expanded as torch does": graph_of(
        """ones = ConstantOfShape<value = int64[1] {1}>(three)
        unchanged = Neg(ones)
        same = Equal(sizes, unchanged)
        target = Where(same, ones, sizes)
        full = Expand(index, target)
        z = GatherElements<axis=0>(y, full)
        out = MatMul(z, w)""",
        {
            **{"three": ints(3), "sizes": ints(-1, N, H), "w": W},
            "index": ints(3, 1).reshape(1, N, 1),
        },
    ),
    "a grouped product beside the units": graph_of(
        """g = Einsum<equation="tni,igh->tngh">(x, m)
        f = Reshape(g, k)
        s = Add(y, f)
        out = MatMul(s, w)""",
        {"m": numbers(INPUTS, 2, H // 2), "k": ints(0, 0, -1), "w": W},
    ),
}

FEEDS: dict[str, dict[str, Array]] = {
    "reshape to sizes of the caller": {"sizes": ints(T, N, H)},
    "a loop that may not run": {"trips": np.array(0)},
}


@pytest.mark.parametrize("share", [0.34, 0.5, 0.84])
@pytest.mark.parametrize("name", EXACT)
def test_shrunk_graph_equals_masked_graph(name: str, share: float) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(EXACT[name])
    if name.startswith("reshape to sizes"):  # what is declared tells the number of axes
        info = helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, [T, N, H])
        proto.graph.value_info.append(info)
    found = remove(proto, share, 1)
    assert found.shrunk is not None, found.blocked
    feed = {"x": X, **FEEDS.get(name, {})}
    assert_exact(found, [feed])
    if "trips" in feed:
        assert_exact(found, [{**feed, "trips": np.array(3)}])
    assert any(len(row) < H for rows in found.kept.values() for row in rows)
    assert found.masked is not None
    changed = distance(run(proto, feed), run(found.masked, feed))
    assert changed > TOLERANCE  # the units mattered


NORM = {"scale": numbers(H), "bias": numbers(H)}

BLOCKED: dict[str, tuple[onnx.ModelProto, str]] = {
    "an operator without a rule": (
        graph_of("z, k = TopK(y, n)\n out = ReduceSum(z)", {"n": ints(2)}),
        "TopK 'z': what it does to units is not known",
    ),
    "a mean over units": (
        graph_of("out = ReduceMean<axes=[2]>(y)", {}),
        "ReduceMean 'out': it takes the mean over the units",
    ),
    "layer normalisation": (
        graph_of("z = LayerNormalization(y, scale, bias)\n out = MatMul(z, w)", {**NORM, "w": W}),
        "LayerNormalization 'z': it normalises over the units",
    ),
    "softmax over all axes behind, before opset 13": (
        graph_of("z = Softmax(y)\n out = MatMul(z, w)", {"w": W}, opset=11),
        "Softmax 'z': it normalises over the units",
    ),
    "a norm over the last axis, its default, before opset 13": (
        graph_of("z = LpNormalization(y)\n out = MatMul(z, w)", {"w": W}, opset=11),
        "LpNormalization 'z': it normalises over the units",
    ),
    "a sum over no axes, which is all": (
        graph_of("z = ReduceSum(y, none)\n out = Relu(z)", {"none": np.zeros(0, np.int64)}),
        "ReduceSum 'z': its axes are not known",
    ),
    "statistics of a batch": (
        graph_of(
            """t = Transpose<perm=[1,2,0]>(y)
            z, m, v = BatchNormalization<training_mode=1>(t, scale, bias, mean, var)
            s = Transpose<perm=[0,2,1]>(z)
            out = MatMul(s, w)""",
            {**NORM, "mean": numbers(H), "var": np.ones(H, np.float32), "w": W},
        ),
        "BatchNormalization 'z': it is in training mode",
    ),
    "indices that count through channels": (
        graph_of(
            "t = Transpose<perm=[1,2,0]>(y)\n z, k = MaxPool<kernel_shape=[2]>(t)\n"
            " f = Cast<to=1>(k)\n s = Transpose<perm=[0,2,1]>(f)\n out = MatMul(s, w)",
            {"w": W},
        ),
        "MaxPool 'z': its indices count through all channels",
    ),
    "padding of axes that the caller chooses": (
        graph_of(
            "z = Pad(y, p, c, k)\n out = MatMul(z, w)",
            {"p": ints(1, 0, 0, 1, 0, 0), "c": np.float32(0), "w": W},
            opset=18,
            inputs="float[T,N,3] x, int64[3] k",
        ),
        "Pad 'z': what it adds is not known",
    ),
    "a loop that repeats units": (
        graph_of(
            """v9 = Loop (n, yes, y) <body = b (int64 i, bool c, float[T,N,k] v)
                => (bool d, float[T,N,k2] u) {
                d = Identity(c)
                u = Concat<axis=2>(v, v)
            }>
            out = ReduceSum(v9)""",
            {"n": np.array(1), "yes": np.array(True)},
        ),
        "units meet here in different numbers",
    ),
    "one unit alone": (
        graph_of("z = Gather<axis=2>(y, k)\n out = Relu(z)", {"k": np.array(2)}),
        "Gather 'z': it picks one unit",
    ),
    "units at places that depend on the input": (
        graph_of(
            "z = Gather<axis=2>(y, k)\n out = MatMul(z, w)",
            {"w": W},
            inputs="float[T,N,3] x, int64[6] k",
        ),
        "Gather 'z': it picks units by indices that are not known",
    ),
    "units that are handed out": (
        graph_of("out = Identity(y)", {}),
        "they are the model's output 'out'",
    ),
    "inputs of the model that would go with units": (
        graph_of(
            """j = Concat<axis=2>(y, x, x)
            a, b = Split<axis=2>(j, parts)
            s = Add(a, b)
            u = MatMul(s, w)
            t = MatMul(j, v)
            out = Concat<axis=-1>(u, t)""",
            {"parts": ints(6, 6), "w": W, "v": numbers(12, 2)},
        ),
        "Concat 'j': parts of 'x' would go with them",
    ),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked_units_name_the_node_and_the_reason(name: str) -> None:
    proto, reason = BLOCKED[name]
    found = remove(proto, 0.5, 0)
    assert found.shrunk is None
    (said,) = found.blocked.values()
    assert reason in said


def test_what_a_runtime_fused_is_to_be_given_as_it_was() -> None:
    proto = graph_of("z = Relu(y)\n out = MatMul(z, w)", {"w": W})
    node = next(n for n in proto.graph.node if n.op_type == "Relu")
    node.op_type, node.domain = "FusedThing", "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (said,) = remove(proto, 0.5, 0).blocked.values()
    assert said.endswith("is not known; take the file from before onnxruntime optimised it")


def test_a_layer_that_is_held_back_by_another_names_it() -> None:
    proto = graph_of(
        """h2, g2 = GRU<hidden_size=6>(x, W2, R2)
        both = Concat<axis=0>(g2, h)
        upper, lower = Split<axis=0>(both)
        t = MatMul(upper, w)
        a = Softmax<axis=-1>(y)
        u = MatMul(a, w)
        p = ReduceSum(t)
        q = ReduceSum(lower)
        r = Mul(p, q)
        out = Mul(u, r)""",
        {"w": W, "W2": numbers(1, 3 * H, INPUTS), "R2": numbers(1, 3 * H, H)},
    )
    found = remove(proto, 0.5, 0)
    assert found.shrunk is None
    assert found.blocked["GRU_0"].startswith("Softmax 'a': it normalises")
    assert found.blocked["GRU_1"].startswith("as many must go as of 'GRU_0', which is held: Soft")


INEXACT = {
    "LayerNormalization": ("z = LayerNormalization(y, scale, bias)", 17),
    "LayerNormalization over two axes": ("z = LayerNormalization<axis=1>(y, scale, bias)", 17),
    "Softmax": ("z = Softmax<axis=-1>(y)", 17),
    "Softmax over all axes behind": ("z = Softmax<axis=1>(y)", 11),
    "LogSoftmax": ("z = LogSoftmax<axis=-1>(y)", 13),
    "LpNormalization": ("z = LpNormalization<p=2>(y)", 13),
    "ReduceMean": ("m = ReduceMean<axes=[2]>(y)\n z = Sub(y, m)", 17),
    "ReduceMean of several axes": ("m = ReduceMean<axes=[0, 2]>(y)\n z = Sub(y, m)", 13),
    "ReduceMean of axes as input": ("m = ReduceMean(y, last)\n z = Mul(y, m)", 18),
    "ReduceMax": ("m = ReduceMax<axes=[-1]>(y)\n z = Sub(y, m)", 13),
    "ReduceMin": ("m = ReduceMin<axes=[-1]>(y)\n z = Sub(y, m)", 13),
    "ReduceSumSquare": ("m = ReduceSumSquare<axes=[-1]>(y)\n z = Mul(y, m)", 13),
    "ReduceL1": ("m = ReduceL1<axes=[-1]>(y)\n z = Div(y, m)", 13),
    "ReduceL2": ("m = ReduceL2<axes=[-1]>(y)\n z = Div(y, m)", 13),
    "GlobalAveragePool": ("m = GlobalAveragePool(y)\n z = Sub(y, m)", 17),
    "GlobalMaxPool": ("m = GlobalMaxPool(y)\n z = Sub(y, m)", 17),
    "in a branch": (
        """z = If (yes) <then_branch = a () => (float[T,N,6] p) {
            p = LayerNormalization(y, scale, bias)
        }, else_branch = b () => (float[T,N,6] q) { q = Neg(y) }>""",
        17,
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_normalisation_over_units_leaves_out_removed_ones(name: str) -> None:
    text, opset = INEXACT[name]
    two = "two axes" in name
    arrays = {"scale": numbers(H), "bias": numbers(H), "w": W, "last": ints(2)}
    if two:
        arrays |= {"scale": numbers(N, H), "bias": numbers(N, H)}
    sizes = SIZES if two else "float[T,N,3] x"
    yes = ", bool yes" if "branch" in name else ""
    proto = graph_of(f"{text}\n out = MatMul(z, w)", arrays, opset=opset, inputs=sizes + yes)
    assert remove(proto, 0.5, 0).shrunk is None
    found = remove(proto, 0.5, 0, allow_inexact=True)
    assert found.shrunk is not None
    assert found.inexact == 1
    chosen = [{"yes": np.array(k)} for k in (True, False)] if yes else [{}]
    assert_exact(found, [{"x": X, **choice} for choice in chosen])


# States


def streaming(body: str, arrays: Arrays, result: str, state: str = "h0") -> onnx.ModelProto:
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[T,N,3] x, float[1,N,6] {state}) => ({result}) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, array in {**weights("GRU", H, INPUTS, 1, 0), **arrays}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto)
    return proto


STREAM = {"x": X, "h0": numbers(1, N, H, seed=5)}


@pytest.mark.parametrize("resize", [False, True])
def test_state_that_comes_back_is_filled_up_or_smaller(resize: bool) -> None:
    proto = streaming(
        """Y, h1 = GRU<hidden_size=6>(x, W, R, B, , h0)
        used = Relu(h1)
        out = MatMul(used, w)""",
        {"w": W},
        "float[1,N,2] out, float[1,N,6] h1",
    )
    found = remove(proto, 0.5, 0, resize_state=resize)
    assert found.shrunk is not None
    assert_exact(found, [STREAM])
    _, state = run(found.shrunk, found.fed(STREAM))
    kept = found.kept["GRU_0"][0]
    if resize:
        assert state.shape == (1, N, len(kept))
        assert [i.name for i in found.shrunk.graph.input] == ["x", "h0"]
    else:
        assert state.shape == (1, N, H)
        gone = [k for k in range(H) if k not in kept]
        assert (state[..., gone] == 0).all()
        assert (state[..., kept] != 0).any()


def test_all_steps_are_no_state_that_comes_back() -> None:
    proto = streaming(
        "Y, h = GRU<hidden_size=6>(x, W, R, B, , h0)\n s = Squeeze(Y, one)",
        {"one": ints(1)},
        "float[T,N,6] s",
    )
    for resize in (False, True):
        found = remove(proto, 0.5, 0, resize_state=resize)
        assert found.shrunk is None
        assert "they are the model's output 's'; return what is made" in found.blocked["GRU_0"]


def test_data_that_a_first_state_is_computed_from_is_no_state() -> None:
    proto = streaming(
        "a = MatMul(z, m)\n Y, h1 = GRU<hidden_size=6>(x, W, R, B, , a)",
        {"m": numbers(H, H)},
        "float[1,N,6] h1",
        "z",
    )
    found = remove(proto, 0.5, 0, resize_state=True)
    assert found.shrunk is not None
    assert not found.states
    feed = {"x": X, "z": STREAM["h0"]}
    assert_exact(found, [feed])
    assert run(found.shrunk, feed)[0].shape == (1, N, 3)


def test_units_go_from_branches_that_have_none() -> None:
    proto = graph_of(
        """z = If (yes) <then_branch = a () => (float[T,N,6] p) { p = Relu(y) },
        else_branch = b () => (float[T,N,6] q) { q = MatMul(x, m) }>
        out = MatMul(z, w)""",
        {"m": numbers(INPUTS, H), "w": W},
        inputs="float[T,N,3] x, bool yes",
    )
    found = remove(proto, 0.5, 0)
    assert found.shrunk is not None
    assert_exact(found, [{"x": X, "yes": np.array(yes)} for yes in (True, False)])


def test_units_of_layers_with_one_weight_go_together() -> None:
    proto = graph_of(
        """n = Neg(x)
        Y2, h2 = GRU<hidden_size=6>(n, W, R, B)
        t = MatMul(y, w)
        last = MatMul(h2, w)
        out = Add(t, last)""",
        {"w": W},
    )
    found = remove(proto, 0.5, 0)
    assert found.kept["GRU_0"] == found.kept["GRU_1"]
    assert_exact(found, [{"x": X}])
