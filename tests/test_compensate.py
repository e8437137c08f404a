"""Repair by least squares: with units that others can stand in for, nothing is lost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Graph, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli import compensate
from rnnprune_cli.compensate import Moments
from rnnprune_cli.data import Dataset
from rnnprune_cli.model import GATES, Stage
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.shrink.task import Shrunk, Task
from rnnprune_cli.shrink.units import remove_units

UNITS = 4
"""Different units of each layer; a layer has twice as many, in pairs."""
FAINT = 0.2
"""What reads the second of a pair is so much smaller, so that magnitude removes it."""
INPUTS = 3
STEPS = 6
TOLERANCE = 1e-5
"""Of the largest output: float32 sums of other order and number."""


# Moments


def random_samples(rng: np.random.Generator, rows: int, count: int, n: int) -> np.ndarray:
    mixed = rng.standard_normal((rows, count, n)) @ rng.standard_normal((rows, n, n))
    return mixed + rng.standard_normal((rows, 1, n))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    keep=st.lists(st.booleans(), min_size=2, max_size=8).filter(lambda k: 0 < sum(k) < len(k)),
)
def test_prediction_is_the_least_squares_solution(seed, keep):
    keep = np.array(keep)
    samples = random_samples(np.random.default_rng(seed), 2, 60, len(keep))
    moments = Moments(2, len(keep))
    moments.add(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensate, "RIDGES", (0.0,))
        found = [moments.predict(row, keep) for row in range(2)]
    for own, (matrix, constant, unexplained) in zip(samples, found, strict=True):
        design = np.column_stack([own[:, keep], np.ones(len(own))])
        wanted, *_ = np.linalg.lstsq(design, own[:, ~keep], rcond=None)
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(matrix, wanted[:-1].T, atol=1e-6 * scale)
        np.testing.assert_allclose(constant, wanted[-1], atol=1e-6 * scale)
        rest = own[:, ~keep] - design @ wanted
        share = rest.var(axis=0).sum() / own[:, ~keep].var(axis=0).sum()
        assert unexplained == pytest.approx(share, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    cuts=st.lists(st.integers(1, 39), min_size=1, max_size=6, unique=True),
)
def test_batches_do_not_matter(seed, cuts):
    samples = random_samples(np.random.default_rng(seed), 2, 40, 5).astype(np.float32)
    keep = np.array([True, False, True, False, True])
    whole, parts = Moments(2, 5), Moments(2, 5)
    whole.add(samples)
    for part in np.split(samples, sorted(cuts), axis=1):
        parts.add(part)
    assert whole.count == parts.count == 40
    # Which samples are held out, to choose the ridge by, depends on the batches; the sums do not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensate, "RIDGES", (1e-4,))
        for row in range(2):
            for one, two in zip(whole.predict(row, keep), parts.predict(row, keep), strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


def test_what_is_left_unexplained_is_measured_on_held_out_samples():
    rng = np.random.default_rng(0)
    moments = Moments(1, 40)
    moments.add(rng.standard_normal((1, 30, 40)))  # nothing to learn, and fewer samples than units
    keep = np.arange(40) < 32
    matrix, _, unexplained = moments.predict(0, keep)
    assert unexplained > 0.9
    assert np.abs(matrix).max() < 0.1


def test_what_never_varies_becomes_a_constant():
    moments = Moments(1, 3)
    samples = np.random.default_rng(0).standard_normal((1, 50, 3))
    samples[..., 2] = 0.75
    moments.add(samples)
    matrix, constant, unexplained = moments.predict(0, np.array([True, True, False]))
    np.testing.assert_allclose(matrix, 0, atol=1e-12)
    np.testing.assert_allclose(constant, 0.75, atol=1e-12)
    assert unexplained == pytest.approx(0, abs=1e-6)


def test_units_that_never_vary_predict_nothing():
    moments = Moments(1, 2)
    samples = np.zeros((1, 50, 2))
    samples[..., 1] = np.random.default_rng(0).standard_normal(50)
    moments.add(samples)
    matrix, constant, unexplained = moments.predict(0, np.array([True, False]))
    np.testing.assert_allclose(matrix, 0, atol=1e-12)
    np.testing.assert_allclose(constant, samples[0, :, 1].mean(), atol=1e-12)
    assert unexplained == pytest.approx(1)


# Models in which every unit has a twin


@dataclass(frozen=True)
class Layer:
    """What a layer of twins is like."""

    op: str = "LSTM"
    direction: str = "forward"
    bias: bool = True
    peepholes: bool = False
    lengths: bool = False
    initial: bool = False
    attributes: dict[str, object] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1


@dataclass(frozen=True)
class Units:
    """Which unit each place holds, and which places hold the second of a pair: [directions, n]."""

    who: np.ndarray
    second: np.ndarray

    def columns(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Weights [..., directions * n] of a reader: faint for the second of each pair."""
        values = rng.standard_normal((*shape, self.who.size)) / np.sqrt(UNITS)
        return (values * np.where(self.second.reshape(-1), FAINT, 1)).astype(np.float32)


def twins(rng: np.random.Generator, directions: int, alike: bool = False) -> Units:
    """Pairs of units in any order; the same order in both directions if these must be alike."""
    orders = [rng.permutation(2 * UNITS) for _ in range(1 if alike else directions)]
    orders *= directions // len(orders)
    return Units(np.stack(orders) % UNITS, np.stack(orders) >= UNITS)


def add_layer(
    g: Graph,
    rng: np.random.Generator,
    x: str,
    layer: Layer,
    units: Units,
    before: Units | None = None,
) -> str:
    """Adds a layer, [time, batch, features] → Y; ``before`` are the units that it reads."""
    d, gates, n = layer.directions, GATES[layer.op], 2 * UNITS

    def rows(values: np.ndarray) -> np.ndarray:
        """[d, groups, units, ...] → [d, groups * n, ...], each place with its unit's values."""
        picked = np.stack([v[:, who] for v, who in zip(values, units.who, strict=True)])
        return picked.reshape(d, -1, *values.shape[3:]).astype(np.float32)

    if before is None:
        w = 0.6 * rng.standard_normal((d, gates, UNITS, INPUTS))
    else:
        w = 0.6 * before.columns(rng, d, gates, UNITS)
    own = [Units(units.who[k : k + 1], units.second[k : k + 1]) for k in range(d)]
    r = 0.8 * np.stack([u.columns(rng, gates, UNITS) for u in own])
    values: list[str | np.ndarray | None] = [x, rows(w), rows(r), None, None, None, None, None]
    if layer.bias:
        values[3] = rows(0.4 * rng.standard_normal((d, 2 * gates, UNITS)))
    if layer.lengths:
        values[4] = "lens"
    if layer.initial:
        sizes = g.op("Shape", x)
        batch = g.op("Gather", sizes, np.array([1], np.int64))
        sizes = g.op("Concat", np.array([d]), batch, np.array([n]), axis=0)
        for k in (5, 6)[: 2 if layer.op == "LSTM" else 1]:
            start = rows(0.5 * rng.standard_normal((d, 1, UNITS)))[:, None]
            values[k] = g.op("Expand", start, sizes)
    if layer.peepholes:
        values[7] = rows(0.5 * rng.standard_normal((d, 3, UNITS)))
    while values[-1] is None:
        values.pop()
    return g.op(
        layer.op,
        *values,
        outs=2,
        hidden_size=n,
        direction=layer.direction,
        **layer.attributes,
    )


def sequence(g: Graph, y: str) -> str:
    """Y → [time, batch, features of both directions]."""
    return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))


def begin(layer: Layer) -> tuple[Graph, str]:
    g = Graph(["batch", "time", INPUTS])
    if layer.lengths:
        g.inputs.append(helper.make_tensor_value_info("lens", TensorProto.INT32, ["batch"]))
    return g, g.op("Transpose", "x", perm=[1, 0, 2])


def samples(seed: int, count: int = 24, lengths: bool = False, steps: int = STEPS) -> dict:
    rng = np.random.default_rng([seed, 7])
    feed = {"x": rng.standard_normal((count, steps, INPUTS)).astype(np.float32)}
    if lengths:
        feed["lens"] = rng.integers(1, steps + 1, count).astype(np.int32)
    return feed


def dataset(feed: dict, lengths: np.ndarray | None = None, **changes: object) -> Dataset:
    count = len(feed["x"])
    data = Dataset(feed, frozenset(feed), frozenset(), False, count, {}, lengths)
    return replace(data, **changes)


def shrink(
    model: onnx.ModelProto,
    folder: Path,
    data: Dataset | None,
    feed: dict | None = None,
    sparsity: float = 0.5,
    **options: object,
) -> Shrunk:
    """Removes units by magnitude; everything that is claimed of it must hold."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = OnnxModel(path)
    stage = replace(Stage("magnitude", "unit", "layer", sparsity), **options)
    names = [layer.name for layer in loaded.layers]
    feeds = [feed if feed is not None else samples(1, 3)]
    task = Task(
        model=loaded,
        stage=stage,
        names=names,
        folder=folder,
        calibration=data,
        feeds=feeds,
        made_up=False,
        seed=0,
        threads=1,
        progress=lambda step: None,
    )
    result = remove_units(task)
    assert all(claim.passed for claim in result.claims), result.claims
    return result


def written(folder: Path) -> Path:
    return folder / "shrunk.onnx"


def distance(model: onnx.ModelProto, folder: Path, feed: dict) -> float:
    """The largest difference of the shrunk model's outputs, relative to the largest output."""
    pairs = zip(run(model, feed), run(written(folder), feed), strict=True)
    found = 0.0
    for one, two in pairs:
        assert one.shape == two.shape and one.dtype == two.dtype
        found = max(found, float(np.abs(one - two).max() / np.abs(one).max()))
    return found


@pytest.fixture
def no_ridge(monkeypatch):
    """What is ridged is not quite lossless."""
    monkeypatch.setattr(compensate, "RIDGES", (1e-12,))


def assert_lossless(
    model: onnx.ModelProto,
    units: list[Units],
    folder: Path,
    lengths: bool = False,
    contrast: bool = True,
) -> Shrunk:
    """Removes the second of each pair: with the repair nothing changes, without it much does."""
    held_out = samples(1, 5, lengths)
    data = dataset(samples(0, lengths=lengths))
    if contrast:
        shrink(model, folder, data, held_out, compensate=False)
        assert distance(model, folder, held_out) > 1e-2
    shrunk = shrink(model, folder, data, held_out)
    kept = [[np.flatnonzero(~row).tolist() for row in own.second] for own in units]
    assert [[list(row) for row in own.kept] for own in shrunk.units] == kept
    assert shrunk.repairs
    assert [r for r in shrunk.repairs if r.problem or not r.samples] == []
    assert all(r.unexplained < 1e-6 for r in shrunk.repairs)
    assert distance(model, folder, held_out) < TOLERANCE
    return shrunk


GRU1 = {"linear_before_reset": 1}
HARD = {"activations": ["HardSigmoid", "Tanh"]}
LAYERS = {
    "lstm": Layer(),
    "lstm reverse": Layer(direction="reverse"),
    "lstm bidirectional": Layer(direction="bidirectional"),
    "lstm no bias": Layer(bias=False, direction="bidirectional"),
    "lstm peepholes": Layer(peepholes=True, direction="bidirectional"),
    "lstm lengths": Layer(lengths=True, direction="bidirectional"),
    "lstm initial states": Layer(initial=True, direction="bidirectional"),
    "lstm coupled gates": Layer(attributes={"input_forget": 1}),
    "gru": Layer("GRU"),
    "gru reverse": Layer("GRU", "reverse"),
    "gru bidirectional": Layer("GRU", "bidirectional"),
    "gru no bias": Layer("GRU", "bidirectional", bias=False),
    "gru lengths": Layer("GRU", "bidirectional", lengths=True),
    "gru initial state": Layer("GRU", "bidirectional", initial=True),
    "gru hard sigmoid": Layer("GRU", attributes=HARD),
    "gru reset after": Layer("GRU", attributes=GRU1),
    "gru reset after reverse": Layer("GRU", "reverse", attributes=GRU1),
    "gru reset after bidirectional": Layer("GRU", "bidirectional", attributes=GRU1),
    "gru reset after no bias": Layer("GRU", "bidirectional", bias=False, attributes=GRU1),
    "gru reset after lengths": Layer("GRU", "bidirectional", lengths=True, attributes=GRU1),
    "rnn": Layer("RNN"),
    "rnn reverse": Layer("RNN", "reverse", bias=False),
    "rnn bidirectional": Layer("RNN", "bidirectional", lengths=True),
    "rnn relu": Layer("RNN", attributes={"activations": ["Relu"]}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_twins_are_removed_without_loss_from_every_operator(no_ridge, tmp_path, name):
    layer = LAYERS[name]
    rng = np.random.default_rng(3)
    units = twins(rng, layer.directions)
    g, x = begin(layer)
    y = sequence(g, add_layer(g, rng, x, layer, units))
    g.output(g.op("Add", g.op("MatMul", y, units.columns(rng, 5).T), np.float32([1, 2, 3, 4, 5])))
    shrunk = assert_lossless(g.model(), [units], tmp_path, layer.lengths)
    assert len(shrunk.repairs) == 2  # R and the MatMul


def test_a_gate_with_another_activation_is_reported(no_ridge, tmp_path):
    layer = Layer("GRU", attributes={"activations": ["Softsign", "Tanh"]})
    rng = np.random.default_rng(3)
    units = twins(rng, 1)
    g, x = begin(layer)
    y = sequence(g, add_layer(g, rng, x, layer, units))
    g.output(g.op("MatMul", y, units.columns(rng, 5).T))
    shrunk = shrink(g.model(), tmp_path, dataset(samples(0)))
    said = {r.reader: r.problem for r in shrunk.repairs}
    assert [bool(p) for p in said.values()] == [True, False]
    assert "its reset gate has another activation" in next(iter(said.values()))


# Readers


@dataclass(frozen=True)
class Head:
    """What a reader can be made of; twins are affine functions of each other in it."""

    g: Graph
    rng: np.random.Generator
    raw: str
    units: Units
    alike: bool = False
    """Whether they are the same functions in both directions."""

    @functools.cached_property
    def y(self) -> str:
        """[time, directions, batch, n]"""
        rows = 1 if self.alike else len(self.units.who)
        scale, shift = self.rng.uniform(0.5, 2, (2, rows, 1, 2 * UNITS))
        scaled = self.g.op("Mul", self.raw, scale.astype(np.float32))
        return self.g.op("Add", scaled, shift.astype(np.float32))

    @property
    def seq(self) -> str:
        """[time, batch, features]"""
        return sequence(self.g, self.y)

    @property
    def batch_first(self) -> str:
        return self.g.op("Transpose", self.seq, perm=[1, 0, 2])

    @property
    def channels(self) -> str:
        """[batch, features, time]"""
        return self.g.op("Transpose", self.seq, perm=[1, 2, 0])

    @property
    def last(self) -> str:
        """[batch, features]"""
        last = self.g.op("Gather", self.seq, np.array(-1), axis=0)
        return self.g.op("Identity", last)

    def w(self, *shape: int) -> np.ndarray:
        return self.units.columns(self.rng, *shape)

    def b(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)


def _conv(kernel: int, bias: bool, pads: int, h: Head) -> str:
    w = np.moveaxis(h.w(4, kernel), 1, 2)
    values = [h.channels, np.ascontiguousarray(w), *([h.b(4)] if bias else [])]
    return h.g.op("Conv", *values, kernel_shape=[kernel], pads=[pads, pads])


def _gemm(c: tuple[int, ...] | None, h: Head, trans: int = 0, **attributes: object) -> str:
    w = h.w(4) if trans else np.ascontiguousarray(h.w(4).T)
    values = [h.last, w, *([] if c is None else [h.b(*c)])]
    return h.g.op("Gemm", *values, transB=trans, **attributes)


def _gemm_swapped(h: Head) -> str:
    turned = h.g.op("Transpose", h.last, perm=[1, 0])
    return h.g.op("Gemm", h.w(4), turned, h.b(4, 1), alpha=0.5, beta=2.0)


def _gemm_swapped_turned(h: Head) -> str:
    return h.g.op("Gemm", np.ascontiguousarray(h.w(4).T), h.last, transA=1, transB=1)


def _gemm_live_c(h: Head) -> str:
    c = h.g.op("MatMul", h.g.op("Gather", "x", np.array(0), axis=1), h.b(INPUTS, 4))
    return h.g.op("Gemm", h.last, np.ascontiguousarray(h.w(4).T), c, beta=0.5)


def _per_direction(h: Head) -> np.ndarray:
    """[directions, n, 4]"""
    d, n = h.units.who.shape
    return np.ascontiguousarray(h.w(4).reshape(4, d, n).transpose(1, 2, 0))


def _einsum(equation: str, weight: Callable[[Head], np.ndarray], h: Head) -> str:
    value = h.y if "d" in equation else h.seq
    return h.g.op("Einsum", value, weight(h), equation=equation)


def _two_users(h: Head) -> str:
    made = h.g.op("MatMul", h.seq, h.w(4).T)
    one = h.g.op("Add", made, h.b(4))
    return h.g.op("Mul", one, h.g.op("Sigmoid", made))


def _also_output(h: Head) -> str:
    made = h.g.op("MatMul", h.seq, h.w(4).T)
    h.g.output(made)
    return h.g.op("Add", made, h.b(4))


def _left(shape: tuple[int, ...] | None, h: Head) -> str:
    turned = h.g.op("Transpose", h.seq, perm=[0, 2, 1])
    made = h.g.op("MatMul", h.w(4), turned)
    return made if shape is None else h.g.op("Add", made, h.b(*shape))


def _elementwise(h: Head) -> str:
    value = h.g.op("Mul", h.g.op("Sigmoid", sequence(h.g, h.raw)), np.float32(3))
    return h.g.op("Add", h.g.op("MatMul", h.g.op("Tanh", value), h.w(4).T), h.b(4))


def _mean(h: Head) -> str:
    mean = h.g.op("ReduceMean", h.batch_first, axes=[1], keepdims=0)
    return h.g.op("Gemm", mean, h.w(4), h.b(4), transB=1)


def _maximum(h: Head) -> str:
    top = h.g.op("ReduceMax", h.batch_first, axes=[1], keepdims=0)
    return h.g.op("MatMul", top, h.w(4).T)


def _sum_of_two(h: Head) -> str:
    one = h.g.op("MatMul", h.seq, h.w(4).T)
    two = h.g.op("Tanh", sequence(h.g, h.raw))
    return h.g.op("Add", one, h.g.op("MatMul", two, h.w(4).T))


def partial(function: Callable[..., str], *values: object, **named: object) -> Callable:
    return lambda h: function(*values, h, **named)


READERS: dict[str, Callable[[Head], str]] = {
    "matmul": lambda h: h.g.op("MatMul", h.seq, h.w(4).T),
    "matmul add": lambda h: h.g.op("Add", h.g.op("MatMul", h.batch_first, h.w(4).T), h.b(4)),
    "matmul add wide": lambda h: h.g.op("Add", h.g.op("MatMul", h.seq, h.w(4).T), h.b(6, 1, 4)),
    "matmul add first": lambda h: h.g.op("Add", h.b(4), h.g.op("MatMul", h.seq, h.w(4).T)),
    "matmul add scalar": lambda h: h.g.op("Add", h.g.op("MatMul", h.seq, h.w(4).T), h.b()),
    "matmul to one": lambda h: h.g.op("MatMul", h.last, h.w(1).T),
    "matmul 2-D": lambda h: h.g.op("MatMul", h.last, h.w(4).T),
    "matmul weight 3-D": lambda h: h.g.op("MatMul", h.seq, h.w(4).T[None]),
    "matmul weight 3-D add": lambda h: h.g.op(
        "Add", h.g.op("MatMul", h.batch_first, h.w(4).T[None]), h.b(1, 1, 4)
    ),
    "matmul vector": lambda h: h.g.op("MatMul", h.seq, h.w()),
    "matmul by direction": lambda h: h.g.op("MatMul", h.y, _per_direction(h)),
    "matmul by direction add": lambda h: h.g.op(
        "Add", h.g.op("MatMul", h.y, _per_direction(h)), h.b(2, 1, 4)
    ),
    "matmul left": partial(_left, None),
    "matmul left add": partial(_left, (4, 1)),
    "matmul left add 3-D": partial(_left, (1, 4, 1)),
    "matmul left vector": lambda h: h.g.op("MatMul", h.w(), h.channels),
    "matmul two users": _two_users,
    "matmul is an output": _also_output,
    "matmul of functions": _elementwise,
    "matmul twice": _sum_of_two,
    "gemm": partial(_gemm, (4,)),
    "gemm no c": partial(_gemm, None),
    "gemm scalar c": partial(_gemm, ()),
    "gemm row c": partial(_gemm, (1, 4)),
    "gemm turned": partial(_gemm, (4,), trans=1),
    "gemm scaled": partial(_gemm, (4,), trans=1, alpha=0.5, beta=2.0),
    "gemm without beta": partial(_gemm, (4,), beta=0.0),
    "gemm scaled no c": partial(_gemm, None, alpha=3.0),
    "gemm live c": _gemm_live_c,
    "gemm left": _gemm_swapped,
    "gemm left turned": _gemm_swapped_turned,
    "conv 1": partial(_conv, 1, True, 0),
    "conv 1 no bias": partial(_conv, 1, False, 0),
    "conv 3": partial(_conv, 3, True, 0),
    "einsum": partial(_einsum, "tnf,fo->tno", lambda h: np.ascontiguousarray(h.w(4).T)),
    "einsum turned": partial(_einsum, "tnf,of->otn", lambda h: h.w(4)),
    "einsum implicit": partial(_einsum, "tnf,fx", lambda h: np.ascontiguousarray(h.w(4).T)),
    "einsum vector": partial(_einsum, "tnf,f->tn", lambda h: h.w()),
    "einsum two": partial(_einsum, "tnf,abf->atnb", lambda h: h.w(2, 3)),
    "einsum by direction": partial(_einsum, "tdnh,dho->tndo", _per_direction),
    "mean": _mean,
    "maximum": _maximum,
}


@pytest.mark.parametrize("name", READERS)
def test_twins_are_removed_without_loss_from_every_reader(no_ridge, tmp_path, name):
    layer = Layer(direction="bidirectional")
    rng = np.random.default_rng(5)
    units = twins(rng, 2)
    g, x = begin(layer)
    y = add_layer(g, rng, x, layer, units)
    g.output(READERS[name](Head(g, rng, y, units)))
    assert_lossless(g.model(), [units], tmp_path, contrast=False)


SHARED = {
    "einsum sums directions": partial(_einsum, "tdnh,dho->tno", _per_direction),
    "einsum one weight": partial(
        _einsum, "tdnh,ho->tno", lambda h: np.ascontiguousarray(_per_direction(h)[0])
    ),
    "matmul one weight": lambda h: h.g.op("MatMul", h.y, _per_direction(h)[0]),
    "matmul of the sum": lambda h: h.g.op(
        "MatMul", h.g.op("ReduceSum", h.y, np.array([1]), keepdims=0), _per_direction(h)[0]
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_twins_are_removed_without_loss_where_directions_share_a_reader(no_ridge, tmp_path, name):
    layer = Layer(direction="bidirectional")
    rng = np.random.default_rng(5)
    units = twins(rng, 2, alike=True)
    g, x = begin(layer)
    y = add_layer(g, rng, x, layer, units)
    g.output(SHARED[name](Head(g, rng, y, units, alike=True)))
    assert_lossless(g.model(), [units], tmp_path)


# Several layers


STACKS = {
    "lstm over bidirectional lstm": (Layer(direction="bidirectional"), Layer()),
    "gru over lstm": (Layer(), Layer("GRU", "bidirectional")),
    "gru no bias over gru": (Layer("GRU"), Layer("GRU", "bidirectional", bias=False)),
    "gru reset after over rnn": (Layer("RNN"), Layer("GRU", attributes=GRU1, bias=False)),
    "rnn over gru over lstm": (Layer(bias=False), Layer("GRU", "reverse"), Layer("RNN")),
    "peepholes and lengths": (
        Layer(peepholes=True, lengths=True),
        Layer(peepholes=True, lengths=True, direction="bidirectional"),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_twins_are_removed_without_loss_from_stacked_layers(no_ridge, tmp_path, name):
    layers = STACKS[name]
    rng = np.random.default_rng(6)
    g, x = begin(layers[0])
    every: list[Units] = []
    for layer in layers:
        units = twins(rng, layer.directions)
        x = sequence(g, add_layer(g, rng, x, layer, units, every[-1] if every else None))
        every.append(units)
    g.output(g.op("MatMul", x, every[-1].columns(rng, 5).T))
    shrunk = assert_lossless(g.model(), every, tmp_path, layers[0].lengths)
    assert len(shrunk.repairs) == 2 * len(layers)  # R of each, the next W, the MatMul


@pytest.mark.parametrize("layer", [Layer(), Layer("GRU", "bidirectional"), Layer("RNN", "reverse")])
def test_twins_are_removed_without_loss_from_layers_tied_by_a_sum(no_ridge, tmp_path, layer):
    rng = np.random.default_rng(6)
    units = twins(rng, layer.directions)
    g, x = begin(layer)
    one = sequence(g, add_layer(g, rng, x, layer, units))
    two = sequence(g, add_layer(g, rng, one, layer, units, units))
    g.output(g.op("MatMul", g.op("Add", one, two), units.columns(rng, 5).T))
    assert_lossless(g.model(), [units, units], tmp_path)


def test_twins_with_the_other_sign_are_removed_without_loss(no_ridge, tmp_path):
    """The opposite: what is removed is a multiple of what stays, but not the same."""
    layer, rng = Layer("RNN", bias=False), np.random.default_rng(6)
    units = twins(rng, 1)
    g, x = begin(layer)
    y = sequence(g, add_layer(g, rng, x, layer, units))
    g.output(g.op("MatMul", y, units.columns(rng, 5).T))
    model = g.model()
    for tensor in model.graph.initializer[:2]:  # W and R: rows of new states
        values = numpy_helper.to_array(tensor).copy()
        values[0, units.second[0]] *= -1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert_lossless(model, [units], tmp_path)


@pytest.mark.parametrize("name", ["lstm", "gru", "gru reset after", "rnn"])
def test_the_ridge_costs_little(tmp_path, name):
    layer, rng = LAYERS[name], np.random.default_rng(3)
    units = twins(rng, 1)
    g, x = begin(layer)
    y = sequence(g, add_layer(g, rng, x, layer, units))
    g.output(g.op("MatMul", y, units.columns(rng, 5).T))
    model, held_out = g.model(), samples(1, 5)
    shrink(model, tmp_path, dataset(samples(0)), compensate=False)
    without = distance(model, tmp_path, held_out)
    shrink(model, tmp_path, dataset(samples(0)))
    assert distance(model, tmp_path, held_out) < without / 50


# What never changes is a constant


def add_still_units(
    g: Graph, rng: np.random.Generator, x: str, layer: Layer, still: np.ndarray
) -> str:
    """A layer some of whose units ([directions, n], bool) stay at what they begin with."""
    d, gates, n = layer.directions, GATES[layer.op], still.shape[1]
    w = 0.6 * rng.standard_normal((d, gates, n, INPUTS))
    r = 0.8 * rng.standard_normal((d, gates, n, n)) / np.sqrt(n)
    r *= np.where(still, FAINT, 1)[:, None, None, :]
    h = 0.5 * rng.standard_normal((d, 1, n)) * still[:, None]
    c = rng.standard_normal((d, 1, n)) * still[:, None]
    # The first input is always 1, so that no bias is needed to fill gates.
    w[np.broadcast_to(still[:, None], w.shape[:3])] = 0
    r[np.broadcast_to(still[:, None], r.shape[:3])] = 0
    if layer.op == "RNN":
        h[still[:, None]] = np.tanh(w[:, :, :, 0][still[:, None]] + 0.7)
        w[:, 0, :, 0] += 0.7 * still
    elif layer.op == "GRU":
        w[:, 0, :, 0] += 40 * still  # ONNX: z r h, and z keeps the old state
    else:
        w[:, 0, :, 0] -= 120 * still  # ONNX: i o f c
        w[:, 2, :, 0] += 40 * still
        h = np.where(still[:, None], 0.5 * np.tanh(c), 0)
    sizes = g.op("Gather", g.op("Shape", x), np.array([1], np.int64))
    sizes = g.op("Concat", np.array([d]), sizes, np.array([n]), axis=0)
    b = None
    if layer.bias:
        b = 0.4 * rng.standard_normal((d, 2 * gates, n)) * ~still[:, None]
    values: list[str | np.ndarray | None] = [
        x,
        w.reshape(d, -1, INPUTS).astype(np.float32),
        r.reshape(d, -1, n).astype(np.float32),
        None if b is None else b.reshape(d, -1).astype(np.float32),
        None,
        g.op("Expand", h.astype(np.float32), sizes),
        *([g.op("Expand", c.astype(np.float32), sizes)] if layer.op == "LSTM" else []),
    ]
    return g.op(
        layer.op, *values, outs=2, hidden_size=n, direction=layer.direction, **layer.attributes
    )


STILL = {
    k: replace(v, peepholes=False, lengths=False, initial=False)
    for k, v in LAYERS.items()
    if "lengths" not in k and "initial" not in k and "coupled" not in k and "relu" not in k
}


@pytest.mark.parametrize("name", [k for k in STILL if "peepholes" not in k and "hard" not in k])
def test_units_that_never_change_go_into_biases_without_loss(no_ridge, tmp_path, name):
    layer, rng = STILL[name], np.random.default_rng(8)
    n = 2 * UNITS
    still = np.stack([rng.permutation(n) < UNITS for _ in range(layer.directions)])
    g, x = begin(layer)
    y = add_still_units(g, rng, x, layer, still)
    units = Units(np.zeros(still.shape, int), still)
    g.output(g.op("MatMul", sequence(g, y), units.columns(rng, 5).T))
    g.output(y)
    model = g.model()
    held_out, data = samples(1, 5), samples(0)
    for feed in (held_out, data):
        feed["x"][..., 0] = 1
    states = run(model, held_out)[1]
    np.testing.assert_allclose(states.std(axis=(0, 2))[still], 0, atol=1e-6)
    assert np.abs(states.mean(axis=(0, 2))[still]).min() > 1e-3
    del model.graph.output[1]
    shrunk = shrink(model, tmp_path, dataset(data), held_out, compensate=False)
    assert [list(k) for k in shrunk.units[0].kept] == [np.flatnonzero(~s).tolist() for s in still]
    assert distance(model, tmp_path, held_out) > 1e-2
    shrink(model, tmp_path, dataset(data), held_out)
    assert distance(model, tmp_path, held_out) < TOLERANCE


def test_padded_edges_of_a_convolution_are_reported(no_ridge, tmp_path):
    layer, rng = Layer(), np.random.default_rng(5)
    units = twins(rng, 1)
    g, x = begin(layer)
    g.output(_conv(3, True, 1, Head(g, rng, add_layer(g, rng, x, layer, units), units)))
    model, held_out = g.model(), samples(1, 5)
    shrunk = shrink(model, tmp_path, dataset(samples(0)), held_out)
    said = [r.problem for r in shrunk.repairs if r.reader.startswith("Conv")]
    assert said[0] or distance(model, tmp_path, held_out) < TOLERANCE


# What the data reach


def branching(rng: np.random.Generator, units: Units, layer: Layer = Layer()) -> onnx.ModelProto:
    """Two branches, taken by the sign of the sum of x, each with a reader of its own."""
    g, x = begin(layer)
    y = sequence(g, add_layer(g, rng, x, layer, units))
    positive = g.op("Greater", g.op("ReduceSum", "x", keepdims=0), np.float32(0))
    branches = []
    for name, sign in (("then", 1), ("else", -1)):
        nodes = [
            helper.make_node("Mul", [y, f"{name}_s"], [f"{name}_m"], name=f"{name}_mul"),
            helper.make_node("Add", [f"{name}_m", f"{name}_t"], [f"{name}_a"], name=f"{name}_add"),
            helper.make_node("MatMul", [f"{name}_a", f"{name}_w"], [f"{name}_y"], name=name),
        ]
        tensors = {
            "s": np.float32(sign),
            "t": rng.standard_normal(2 * UNITS).astype(np.float32),
            "w": np.ascontiguousarray(units.columns(rng, 4).T),
        }
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        own = [numpy_helper.from_array(v, f"{name}_{k}") for k, v in tensors.items()]
        branches.append(helper.make_graph(nodes, name, [], [info], own))
    g.output(g.op("If", positive, then_branch=branches[0], else_branch=branches[1]))
    return g.model()


def test_readers_in_both_branches_of_an_if_are_repaired(no_ridge, tmp_path):
    rng = np.random.default_rng(5)
    units = twins(rng, 1)
    model = branching(rng, units)
    feed = samples(0, 64)
    feed["x"][:32] = np.abs(feed["x"][:32])
    feed["x"][32:] = -np.abs(feed["x"][32:])
    shrunk = shrink(model, tmp_path, dataset(feed, single=True))
    assert {r.reader: r.samples for r in shrunk.repairs} == {
        "LSTM 'n1' R": 64 * (STEPS + 1),
        "MatMul 'then'": 32 * STEPS,
        "MatMul 'else'": 32 * STEPS,
    }
    for sign in (1, -1):
        held_out = samples(1, 5)
        held_out["x"] = sign * np.abs(held_out["x"])
        assert distance(model, tmp_path, held_out) < TOLERANCE


def test_a_branch_that_no_sample_takes_is_not_repaired(no_ridge, tmp_path):
    rng = np.random.default_rng(5)
    units = twins(rng, 1)
    model = branching(rng, units)
    feed = samples(0)
    feed["x"] = np.abs(feed["x"])
    shrunk = shrink(model, tmp_path, dataset(feed))
    said = {r.reader: (r.samples, r.unexplained, r.problem) for r in shrunk.repairs}
    assert said["MatMul 'else'"] == (0, None, "the data never reach it")
    assert said["MatMul 'then'"][2] is None
    held_out = samples(1, 5)
    held_out["x"] = np.abs(held_out["x"])
    assert distance(model, tmp_path, held_out) < TOLERANCE


def test_readers_in_loops_are_not_repaired(tmp_path):
    rng = np.random.default_rng(5)
    units = twins(rng, 1)
    g, x = begin(Layer())
    y = sequence(g, add_layer(g, rng, x, Layer(), units))
    element = helper.make_tensor_value_info("e", TensorProto.FLOAT, ["batch", 2 * UNITS])
    made = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])
    weight = numpy_helper.from_array(np.ascontiguousarray(units.columns(rng, 4).T), "w")
    node = helper.make_node("MatMul", ["e", "w"], ["z"], name="inner")
    body = helper.make_graph([node], "body", [element], [made], [weight])
    g.output(g.op("Scan", y, body=body, num_scan_inputs=1))
    shrunk = shrink(g.model(), tmp_path, dataset(samples(0)))
    said = {r.reader: (r.samples, r.problem) for r in shrunk.repairs}
    assert said["MatMul 'inner'"] == (0, "it is in a loop")
    assert said["LSTM 'n1' R"][1] is None


def test_readers_are_found_in_what_never_leaves_a_layer(tmp_path):
    """A layer whose sequence nothing reads: its R is repaired all the same."""
    rng = np.random.default_rng(5)
    units = twins(rng, 1)
    g, x = begin(Layer())
    add_layer(g, rng, x, Layer(), units)
    g.nodes[-1].output[:] = ["", "h"]
    flat = g.op("Squeeze", "h", np.array([0]))
    g.output(g.op("MatMul", flat, units.columns(rng, 4).T))
    shrunk = shrink(g.model(), tmp_path, dataset(samples(0)))
    assert [(r.problem, r.samples) for r in shrunk.repairs] == [(None, 24 * 7), (None, 24)]


# Padding


def head(g: Graph, rng: np.random.Generator, y: str, units: Units) -> onnx.ModelProto:
    weight, bias = units.columns(rng, 5).T, rng.standard_normal(5).astype(np.float32)
    g.output(g.op("Add", g.op("MatMul", sequence(g, y), weight), bias))
    return g.model()


def padded_model(layer: Layer, fixed: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(9)
    g, x = begin(layer)
    if fixed:
        g.inputs[0] = helper.make_tensor_value_info("x", 1, ["batch", STEPS, INPUTS])
    units = twins(rng, layer.directions)
    return head(g, rng, add_layer(g, rng, x, layer, units), units)


def padded(seed: int, garbage: float) -> tuple[dict, np.ndarray]:
    feed, lengths = samples(4), np.random.default_rng(seed).integers(1, STEPS + 1, 24)
    for sample, length in zip(feed["x"], lengths, strict=True):
        sample[length:] = garbage * np.random.default_rng(seed).standard_normal(
            sample[length:].shape
        )
    return feed, lengths


PADDED = {
    "lstm": (Layer(), False),
    "lstm bidirectional": (Layer(direction="bidirectional"), False),
    "gru": (Layer("GRU", "reverse"), False),
    "lstm of fixed length": (Layer(), True),
    "gru of fixed length": (Layer("GRU"), True),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_is_in_the_padding_changes_nothing(tmp_path, name):
    model = padded_model(*PADDED[name])
    results = []
    for garbage in (0, 1, 1e3):
        feed, lengths = padded(2, garbage)
        shrunk = shrink(model, tmp_path, dataset(feed, lengths), sparsity=0.7)
        results.append((written(tmp_path).read_bytes(), shrunk.repairs))
    assert results[0] == results[1] == results[2]
    steps = int(padded(2, 0)[1].sum())
    assert [r.samples for r in results[0][1]] == [steps + 24, steps]


def test_samples_without_padding_are_the_same_as_padded_ones(tmp_path):
    model = padded_model(Layer(direction="bidirectional"), False)
    feed, lengths = padded(2, 1)
    shrink(model, tmp_path, dataset(feed, lengths), sparsity=0.7)
    padded_weights = written(tmp_path).read_bytes()
    short = {"x": feed["x"][:, : lengths.max()]}
    shrink(model, tmp_path, dataset(short, lengths), sparsity=0.7)
    assert written(tmp_path).read_bytes() == padded_weights


def test_padded_steps_of_a_model_that_is_told_lengths_are_no_samples(tmp_path):
    """sequence_lens cuts the sequences: Y is zero behind them, which no unit ever was."""
    model = padded_model(Layer(lengths=True), False)
    feed = samples(0, lengths=True)
    steps = int(feed["lens"].sum())
    lengths = feed["lens"].astype(np.int64)
    shrunk = shrink(model, tmp_path, dataset(feed, lengths), samples(1, 3, True))
    assert [r.samples for r in shrunk.repairs] == [steps + 24, steps]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_padding_changes_nothing_for_a_model_of_one_sample(tmp_path, direction):
    layer, rng = Layer(direction=direction), np.random.default_rng(9)
    g, x = begin(layer)
    g.inputs[0] = helper.make_tensor_value_info("x", 1, [1, "time", INPUTS])
    units = twins(rng, layer.directions)
    model = head(g, rng, add_layer(g, rng, x, layer, units), units)
    results = []
    for garbage in (0, 1):
        feed, lengths = padded(2, garbage)
        data = dataset(feed, lengths, single=True)
        shrunk = shrink(model, tmp_path, data, samples(1, 1), sparsity=0.7)
        results.append((written(tmp_path).read_bytes(), shrunk.repairs))
    assert results[0] == results[1]


# States


def streaming(layer: Layer, rng: np.random.Generator) -> tuple[onnx.ModelProto, Units]:
    g, x = begin(layer)
    g.inputs[0] = helper.make_tensor_value_info("x", 1, [1, "time", INPUTS])
    units = twins(rng, 1)
    y = add_layer(g, rng, x, layer, units)
    node = g.nodes[-1]
    names = ["h", "c"] if layer.op == "LSTM" else ["h"]
    node.input.extend(["", *(f"{name}_in" for name in names)])
    node.output[1:] = [f"{name}_out" for name in names]
    for name in names:
        for end, infos in (("in", g.inputs), ("out", g.outputs)):
            shape = [1, 1, 2 * UNITS]
            infos.append(helper.make_tensor_value_info(f"{name}_{end}", 1, shape))
    return head(g, rng, y, units), units


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_states_go_from_sample_to_sample(no_ridge, tmp_path, op):
    """The same steps, as one sample and as several, are the same calibration data."""
    model, _ = streaming(Layer(op), np.random.default_rng(9))
    x = samples(0, 1, steps=40)["x"]
    names = ["h_in", "c_in"] if op == "LSTM" else ["h_in"]
    zeros = {name: np.zeros((1, 1, 2 * UNITS), np.float32) for name in names}
    held_out = {**samples(1, 1), **zeros}
    found = []
    for parts in (1, 8):
        feed = {"x": x.reshape(parts, -1, INPUTS), **zeros}
        data = Dataset(feed, frozenset({"x"}), frozenset(), True, parts, {}, None)
        found.append(shrink(model, tmp_path, data, held_out, sparsity=0.7).repairs)
    whole, split = found
    assert [r.samples for r in whole] == [41, 40]
    assert [r.samples for r in split] == [48, 40]  # each sample has a state to begin with
    assert whole[1].unexplained == pytest.approx(split[1].unexplained, rel=1e-4)


def test_states_that_are_given_are_not_replaced(tmp_path):
    model, _ = streaming(Layer("GRU"), np.random.default_rng(9))
    feed = samples(0, 8)
    found = []
    for value in (0.0, 0.5):
        feed["h_in"] = np.full((1, 1, 2 * UNITS), value, np.float32)
        data = Dataset(feed, frozenset({"x"}), frozenset(), True, 8, {}, None)
        held_out = {**samples(1, 1), "h_in": feed["h_in"]}
        shrunk = shrink(model, tmp_path, data, held_out)
        found.append(shrunk.repairs[0].unexplained)
    assert found[0] != found[1]


def test_a_bias_that_is_an_input_stays(no_ridge, tmp_path):
    rng = np.random.default_rng(3)
    units = twins(rng, 1)
    g, x = begin(Layer())
    y = add_layer(g, rng, x, Layer(), units)
    tensor = next(t for t in g.tensors if t.name == g.nodes[-1].input[3])
    g.tensors.remove(tensor)
    bias = numpy_helper.to_array(tensor)
    g.nodes[-1].input[3] = "B"
    g.inputs.append(helper.make_tensor_value_info("B", TensorProto.FLOAT, list(bias.shape)))
    model, held_out = head(g, rng, y, units), {**samples(1, 5), "B": bias}
    data = Dataset({**samples(0), "B": bias}, frozenset({"x"}), frozenset(), False, 24, {}, None)
    shrunk = shrink(model, tmp_path, data, held_out)
    repaired = all(r.problem is None for r in shrunk.repairs)
    assert distance(model, tmp_path, held_out) < (TOLERANCE if repaired else 0.1)


# What cannot be repaired is said


def _live_bias(h: Head) -> str:
    h.g.inputs.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [4]))
    w = np.ascontiguousarray(np.moveaxis(h.w(4, 1), 1, 2))
    return h.g.op("Conv", h.channels, w, "bias", kernel_shape=[1])


def _conv_transpose(h: Head) -> str:
    w = np.ascontiguousarray(np.moveaxis(h.w(4, 3), 2, 0))
    return h.g.op("ConvTranspose", h.channels, w, kernel_shape=[3])


def _over_time(h: Head) -> str:
    return h.g.op("Einsum", h.seq, np.ascontiguousarray(h.w(4).T), equation="tnf,fo->no")


def _attention(h: Head) -> str:
    score = h.g.op("MatMul", h.batch_first, h.channels)
    return h.g.op("MatMul", h.g.op("Softmax", score, axis=-1), h.b(STEPS, 2))


NOT_REPAIRED = {
    "bias that is an input": (_live_bias, "its bias is no constant"),
    "transposed convolution": (_conv_transpose, "differs by place"),
    "sum over time": (_over_time, "it sums over steps"),
    "product of two values": (_attention, "is computed at run"),
}


@pytest.mark.parametrize("name", NOT_REPAIRED)
def test_what_is_not_repaired_is_said_and_the_rest_is(no_ridge, tmp_path, name):
    build, words = NOT_REPAIRED[name]
    rng = np.random.default_rng(5)
    units = twins(rng, 1)
    g, x = begin(Layer())
    y = add_layer(g, rng, x, Layer(), units)
    g.output(build(Head(g, rng, y, units)))
    bias = {"bias": np.float32([5, -5, 3, 7])} if name.startswith("bias") else {}
    data = Dataset({**samples(0), **bias}, frozenset({"x"}), frozenset(), False, 24, {}, None)
    shrunk = shrink(g.model(), tmp_path, data, {**samples(1, 5), **bias})
    first, *rest = shrunk.repairs
    assert (first.reader, first.problem, first.samples) == ("LSTM 'n1' R", None, 24 * 7)
    assert rest and all(words in r.problem and r.samples == 0 for r in rest)
    assert all(r.unexplained is None for r in rest)


def test_readers_of_too_many_units_are_not_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr(compensate, "MAX_FEATURES", 2 * UNITS)
    layer, rng = Layer(direction="bidirectional"), np.random.default_rng(5)
    units = twins(rng, 2)
    g, x = begin(layer)
    model = head(g, rng, add_layer(g, rng, x, layer, units), units)
    shrunk = shrink(model, tmp_path, dataset(samples(0)))
    assert [r.problem for r in shrunk.repairs] == [None, "it reads more than 8 units at once"]
