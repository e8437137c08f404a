"""Graphs on which rewriting once went wrong, and what becomes of a file. See tests/graphs/edges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, recurrent_model
from mutate import Array, Feed, outputs, random_feed, session

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.lift import Attempt, attempt
from rnnprune_cli.lift.apply import lift
from rnnprune_cli.model import Claim, Runner
from rnnprune_cli.onnx_file import graphs, read_proto
from rnnprune_cli.onnx_model import OnnxModel

EDGES = GRAPHS / "edges"
INDEX: dict[str, Any] = json.loads((EDGES / "index.json").read_text())
CASES = [
    pytest.param(name, promise, id=f"{name}{'-promised' * promise}")
    for name, entry in sorted(INDEX.items())
    for promise in ((False, True) if entry["idiom"].startswith("PROMISE") else (False,))
]
T, N = 7, 3
"""Steps and rows in the stored feeds."""
RECURRENT = ("LSTM", "GRU", "RNN")
LOOPS = ("Loop", "Scan")

each_case = pytest.mark.parametrize(("name", "promise"), CASES)


def stored(name: str, kind: str) -> Feed:
    data = np.load(EDGES / f"{name}.npz")
    return {k.removeprefix(f"{kind}:"): data[k] for k in data.files if k.startswith(f"{kind}:")}


def original(name: str) -> onnx.ModelProto:
    return read_proto(EDGES / f"{name}.onnx")


def attempted(name: str, promise: bool, **options: Any) -> Attempt:
    path = EDGES / f"{name}.onnx"
    return attempt(original(name), path, path.stat().st_size, promise, **options)


@cache
def tried(name: str, promise: bool) -> Attempt:
    return attempted(name, promise)


def count(proto: onnx.ModelProto, kinds: Sequence[str]) -> int:
    found = Counter(n.op_type for graph in graphs(proto) for n in graph.node)
    return sum(found[kind] for kind in kinds)


def refusal(proto: onnx.ModelProto, full: bool) -> str:
    """What onnx's checker has against a model."""
    try:
        onnx.checker.check_model(proto, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""


def assert_near(found: Feed, expected: Feed) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        if value.size:
            worst = float(np.abs(found[name] - value).max())
            assert worst <= 1e-5 * max(1.0, float(np.abs(value).max())), name


def padded_on_the_right(mask: Array, rng: np.random.Generator) -> Array:
    """A mask of the same shape for sequences of any length, the longest and none among them."""
    lengths = rng.integers(0, len(mask) + 1, mask.shape[1:])
    lengths.flat[0] = len(mask)
    lengths.flat[-1] = 0 if lengths.size > 1 else lengths.flat[-1]
    return np.arange(len(mask)).reshape(-1, *(1 for _ in lengths.shape)) < lengths


@each_case
def test_edge_gives_what_it_gave(name: str, promise: bool) -> None:
    assert_near(
        outputs(session(tried(name, promise).proto), stored(name, "input")), stored(name, "output")
    )


@each_case
@pytest.mark.parametrize(("steps", "rows"), [(T, N), (4, 2), (1, 5), (9, 1)])
def test_edge_gives_the_same_for_other_sizes(
    name: str, promise: bool, steps: int, rows: int
) -> None:
    before = original(name)
    old, new = session(before), session(tried(name, promise).proto)
    rng = np.random.default_rng(0)
    for _ in range(4):
        feed = random_feed(before, stored(name, "input"), rng, {T: steps, N: rows})
        if promise:
            masks = {k: padded_on_the_right(v, rng) for k, v in feed.items() if v.dtype == bool}
            feed |= masks
        assert_near(outputs(new, feed), outputs(old, feed))


@each_case
def test_edge_is_valid_and_its_outputs_are_declared_as_they_were(name: str, promise: bool) -> None:
    before, after = original(name), tried(name, promise).proto
    assert not refusal(after, full=not refusal(before, full=True))
    assert list(after.graph.output) == list(before.graph.output)
    stored_names = {tensor.name for tensor in after.graph.initializer}
    assert [i for i in after.graph.input if i.name not in stored_names] == [
        i for i in before.graph.input if i.name in stored(name, "input")
    ]


@each_case
def test_edge_is_lifted_as_far_as_it_can_be(name: str, promise: bool) -> None:
    found = tried(name, promise)
    wanted = INDEX[name]["idiom"].removeprefix("PROMISE, ").partition(":")[0]
    loops = len(INDEX[name]["loops"])
    if wanted == "LIFTED" and (promise or not INDEX[name]["idiom"].startswith("PROMISE")):
        assert found.lifts
        assert not found.declined
        assert not count(found.proto, LOOPS)
        assert count(found.proto, RECURRENT) <= max(1, loops)
    elif wanted == "KEPT":
        assert not found.lifts
        assert found.proto.SerializeToString() == original(name).SerializeToString()
    else:
        assert [each.pattern for each in found.lifts] == ["cell"] * loops
        assert count(found.proto, LOOPS) == loops
        assert len(found.declined) == loops
        assert not attempted(name, promise, inside_loops=False).lifts


# Files


def lifted(
    path: Path, feed: Feed, folder: Path, promise: bool = False
) -> tuple[OnnxModel, list[Claim]]:
    """Lifts a file, and compares it on one feed."""

    def fed(runner: Runner) -> list[Feed]:
        assert {spec.name for spec in runner.inputs} == feed.keys()
        return [feed]

    folder.mkdir()
    return lift(OnnxModel(path), folder, fed, lambda _: [], promise)


def result(model: OnnxModel, feed: Feed) -> Feed:
    runner = model.open(1)
    return {o.name: a for o, a in zip(runner.outputs, runner.run(feed), strict=True)}


def test_file_with_external_data_is_lifted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = source / "model.onnx"
    onnx.save_model(
        original("post_dense"),
        path,
        save_as_external_data=True,
        location="model.bin",
        size_threshold=64,
    )
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    assert set(before) == {"model.onnx", "model.bin"}
    feed = stored("post_dense", "input")
    model, claims = lifted(path, feed, tmp_path / "lifted")
    assert [each.pattern for each in model.lifts] == ["cell", "loop"]
    assert claims
    assert all(claim.passed for claim in claims)
    assert not model.warnings
    assert_near(result(model, feed), stored("post_dense", "output"))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    assert (source / "model.bin").stat().st_nlink == 1


@pytest.mark.parametrize("bad", ["mask", "other_mask"])
def test_loop_that_would_give_something_else_is_left_and_the_other_is_lifted(
    tmp_path: Path, bad: str
) -> None:
    path = EDGES / "two_masks.onnx"
    feed = stored("two_masks", "input")
    feed[bad] = feed[bad][::-1]
    bodies = {n.name: str(n.attribute) for n in original("two_masks").graph.node}
    masks = {
        loop: "other_mask" if "other_mask" in bodies[loop] else "mask"
        for loop in bodies
        if "mask" in bodies[loop]
    }
    (left,) = (loop for loop, mask in masks.items() if mask == bad)
    model, claims = lifted(path, feed, tmp_path / "lifted", promise=True)
    assert {each.source for each in model.lifts if each.pattern == "loop"} == masks.keys() - {left}
    assert all(claim.passed for claim in claims)
    said = [*model.warnings, *(f"'{s.name}': {s.reason}" for s in model.skipped)]
    blamed = [text for text in said if "gives other outputs" in text]
    assert len(blamed) == 1
    assert f"'{left}'" in blamed[0]
    assert_near(result(model, feed), outputs(session(original("two_masks")), feed))


def test_model_is_left_as_it_is_where_nothing_compares_equal(tmp_path: Path) -> None:
    path = EDGES / "two_masks.onnx"
    feed = stored("two_masks", "input")
    feed |= {name: mask[::-1] for name, mask in feed.items() if mask.dtype == bool}
    model, claims = lifted(path, feed, tmp_path / "lifted", promise=True)
    said = [*model.warnings, *(s.reason for s in model.skipped)]
    assert any("gives other outputs" in text for text in said)
    assert all(claim.passed for claim in claims)
    assert_near(result(model, feed), outputs(session(original("two_masks")), feed))


def test_model_without_anything_to_lift_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(recurrent_model().SerializeToString())
    feed = {"x": np.zeros((2, 1, 7), np.float32)}
    model, claims = lifted(path, feed, tmp_path / "lifted")
    assert model.path == path
    assert not model.lifts
    assert not claims


def test_a_model_that_accepts_real_inputs_only_is_compared_on_those(tmp_path: Path) -> None:
    def refused(runner: Runner) -> list[Feed]:
        raise RnnpruneError("no made-up input is accepted")

    with np.load(GRAPHS / "keras3_gru.npz") as data:
        feed = {"x": data["input:x"]}
    model = OnnxModel(GRAPHS / "keras3_gru.onnx")
    lifted, claims = lift(model, tmp_path, refused, lambda runner: [feed])
    assert [item.pattern for item in lifted.lifts] == ["cell", "loop"]
    assert [claim.passed for claim in claims] == [True]
    kept, none = lift(model, tmp_path, refused, lambda runner: [])
    assert (kept, none) == (model, [])
    assert any("no made-up input" in item.reason for item in model.skipped)
