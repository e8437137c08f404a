"""Files that are damaged, hostile or merely unusual."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import GRAPHS, initializers, recurrent_model, run
from onnx import TensorProto, helper, numpy_helper

from rnnprune_cli.errors import ExitCode, RnnpruneError, UsageError


def broken(change) -> onnx.ModelProto:
    model = recurrent_model()
    change(model)
    return model


def tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def wrong_w(model):
    tensor(model, "W").CopyFrom(numpy_helper.from_array(np.zeros((1, 40, 7), np.float32), "W"))


def wrong_rank(model):
    tensor(model, "W").CopyFrom(numpy_helper.from_array(np.zeros((48, 7), np.float32), "W"))


def wrong_hidden_size(model):
    for attr in model.graph.node[0].attribute:
        if attr.name == "hidden_size":
            attr.i = 13


def nan_weights(model):
    values = numpy_helper.to_array(tensor(model, "R")).copy()
    values[0, 3, 4] = np.nan
    tensor(model, "R").CopyFrom(numpy_helper.from_array(values, "R"))


def cycle(model):
    first = helper.make_node("Add", ["x", "later"], ["early"])
    second = helper.make_node("Identity", ["early"], ["later"])
    model.graph.node.insert(0, second)
    model.graph.node.insert(0, first)
    model.graph.node[2].input[0] = "early"


def missing_weight(model):
    model.graph.node[0].input[1] = ""


def short_tensor(model):
    tensor(model, "W").raw_data = b"1234"


def huge_tensor(model):
    tensor(model, "W").dims[0] = 1 << 40


def recursive_function(model):
    node = helper.make_node("f", ["a"], ["b"], domain="local")
    function = helper.make_function(
        "local", "f", ["a"], ["b"], [node], [helper.make_opsetid("local", 1)]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("f", ["y"], ["z"], domain="local"))


def external(location: str):
    def change(model):
        target = tensor(model, "W")
        target.ClearField("raw_data")
        target.data_location = TensorProto.EXTERNAL
        entry = target.external_data.add()
        entry.key, entry.value = "location", location

    return change


CASES = {
    "W of the wrong shape": (broken(wrong_w), "must begin with"),
    "W of the wrong rank": (broken(wrong_rank), "shape"),
    "hidden_size contradicting R": (broken(wrong_hidden_size), "hidden_size=13"),
    "NaN weights": (broken(nan_weights), "NaN"),
    "cyclic graph": (broken(cycle), "cycle"),
    "no weight": (broken(missing_weight), "no weight W"),
    "too short a tensor": (broken(short_tensor), "needs"),
    "absurdly large tensor": (broken(huge_tensor), "needs"),
    "recursive function": (broken(recursive_function), "calls itself"),
    "external data above the folder": (broken(external("../secret.bin")), "outside"),
    "external data by absolute path": (broken(external("/etc/passwd")), "outside"),
    "external data that is missing": (broken(external("nothing.bin")), "missing"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_broken_model_is_refused_and_nothing_is_written(prune_model, tmp_path, name):
    model, words = CASES[name]
    (tmp_path.parent / "secret.bin").write_bytes(b"\0" * 10_000)
    with pytest.raises(RnnpruneError) as caught:
        prune_model(model)
    assert caught.value.code == ExitCode.UNSUPPORTED
    assert words in caught.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == model.SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text file\n" * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
        recurrent_model().SerializeToString()[:-500],
        recurrent_model().SerializeToString()[:100],
        b"\x00" * 1000,
    ],
    ids=["empty", "text", "png", "truncated", "cut early", "zeros"],
)
def test_what_is_no_model_is_refused(prune_model, tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(RnnpruneError) as caught:
        prune_model(path)
    assert caught.value.code == ExitCode.UNSUPPORTED
    assert "\n" not in caught.value.message
    assert path.read_bytes() == content


def test_a_link_out_of_the_folder_is_refused(prune_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 10_000)
    (folder / "data.bin").symlink_to(tmp_path / "secret.bin")
    path = folder / "model.onnx"
    path.write_bytes(broken(external("data.bin")).SerializeToString())
    with pytest.raises(RnnpruneError, match="outside"):
        prune_model(path)


@pytest.mark.parametrize("export", ["dense", "packed"])
def test_external_data_stays_external(prune_model, tmp_path, export):
    model = recurrent_model(hidden=40, inputs=24)
    path = tmp_path / "model.onnx"
    onnx.save(
        model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    before = (tmp_path / "weights.bin").read_bytes()
    report = prune_model(path, 0.7, export=export)
    assert (tmp_path / "out.onnx.data").exists()
    assert (tmp_path / "weights.bin").read_bytes() == before
    feed = {"x": np.ones((3, 1, 24), np.float32)}
    inline = tmp_path / "inline.onnx"
    prune_model(recurrent_model(hidden=40, inputs=24), 0.7, output=inline, force=True)
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", feed)[0], run(inline, feed)[0])
    files = sum((tmp_path / n).stat().st_size for n in ("out.onnx", "out.onnx.data"))
    assert report.after.bytes == files


def sparse_model(positions: np.ndarray, dims: list[int]) -> onnx.ModelProto:
    model = recurrent_model()
    model.graph.initializer.remove(tensor(model, "W"))
    values = numpy_helper.from_array(np.ones(len(positions), np.float32), "W")
    indices = numpy_helper.from_array(positions.astype(np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))
    return model


def test_sparse_initializers_are_read(prune_model, tmp_path):
    positions = np.arange(0, 48 * 7, 3)
    report = prune_model(sparse_model(positions, [1, 48, 7]), 0.9, export="dense")
    assert np.count_nonzero(initializers(tmp_path / "out.onnx")["W"]) <= len(positions)
    assert report.before.recurrent_nonzero == len(positions) + 48 * 12


@pytest.mark.parametrize(
    ("positions", "dims"),
    [
        (np.array([0, 1 << 30]), [1, 48, 7]),
        (np.array([-1]), [1, 48, 7]),
        (np.array([0]), [1 << 20, 1 << 20, 7]),
    ],
    ids=["position outside", "negative position", "absurd size"],
)
def test_impossible_sparse_tensors_are_refused(prune_model, positions, dims):
    with pytest.raises(RnnpruneError):
        prune_model(sparse_model(positions, dims))


def test_constant_expressions_cannot_exhaust_memory(prune_model):
    model = recurrent_model()
    model.graph.initializer.remove(tensor(model, "W"))
    shape = numpy_helper.from_array(np.array([1, 1 << 30, 1 << 10]), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["W"]))
    with pytest.raises(RnnpruneError, match="GiB"):
        prune_model(model)


def test_several_sparse_tensors_are_limited_together(prune_model):
    model = sparse_model(np.arange(3), [1, 48, 7])
    for number in range(4):
        values = numpy_helper.from_array(np.ones(1, np.float32), f"large{number}")
        indices = numpy_helper.from_array(np.zeros(1, np.int64))
        dims = [1 << 14, 1 << 13]
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))
    with pytest.raises(RnnpruneError, match="when made dense"):
        prune_model(model)


def test_a_product_that_explodes_is_not_computed(prune_model):
    model = recurrent_model()
    model.graph.initializer.remove(tensor(model, "W"))
    shapes = {"a": (1 << 14, 1), "b": (1 << 14, 1, 1 << 4)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node.insert(0, helper.make_node("MatMul", ["a", "b"], ["W"]))
    with pytest.raises(RnnpruneError, match="GiB"):
        prune_model(model)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Identity", [], ["W"]),
        helper.make_node("Shape", [], ["W"]),
        helper.make_node("Constant", [], ["W"]),
        helper.make_node("NonZero", [""], ["W"]),
        helper.make_node("MatMul", ["scalar", "scalar"], ["W"]),
    ],
    ids=lambda node: node.op_type,
)
def test_malformed_weight_expressions_are_refused(prune_model, node):
    model = recurrent_model()
    model.graph.initializer.remove(tensor(model, "W"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "scalar"))
    model.graph.node.insert(0, node)
    with pytest.raises(RnnpruneError) as caught:
        prune_model(model)
    assert caught.value.code == ExitCode.UNSUPPORTED


def test_typed_data_that_are_too_short_are_refused(prune_model):
    model = recurrent_model()
    target = tensor(model, "B")
    target.ClearField("raw_data")
    target.float_data.extend([1.0, 2.0])
    with pytest.raises(RnnpruneError, match="holds 2 elements"):
        prune_model(model)


def test_the_data_of_the_input_are_never_overwritten(prune_model, tmp_path):
    model = recurrent_model(hidden=40, inputs=24)
    path = tmp_path / "a.onnx"
    onnx.save(
        model, str(path), save_as_external_data=True, location="b.onnx.data", size_threshold=0
    )
    before = (tmp_path / "b.onnx.data").read_bytes()
    with pytest.raises(UsageError, match="belongs to the input"):
        prune_model(path, 0.7, output=tmp_path / "b.onnx", force=True)
    assert (tmp_path / "b.onnx.data").read_bytes() == before


def test_a_stranger_beside_the_output_is_not_removed(prune_model, tmp_path):
    stranger = tmp_path / "out.onnx.data"
    stranger.write_text("mine")
    prune_model(recurrent_model(), 0.5, force=True)
    assert stranger.read_text() == "mine"


def test_small_external_weights_are_stored_in_an_allowed_form(prune_model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(
        recurrent_model(hidden=8),
        str(path),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    report = prune_model(path, 0.9)
    assert set(report.layers[0].stored) <= {"dense", "packed"}


@pytest.mark.parametrize("options", [{"values": "int8"}, {"export": "packed"}])
def test_a_weight_that_callers_may_override_stays_dense(prune_model, options):
    model = recurrent_model(hidden=40, inputs=24)
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [1, 160, 24]))
    report = prune_model(model, 0.7, **options)
    assert report.layers[0].stored[0] == "dense"
    assert any("override" in warning for warning in report.warnings)


def test_weights_in_functions_are_not_stored_sparse(prune_model, tmp_path):
    # onnxruntime reads freed memory when it inlines a function with a sparse constant.
    model = GRAPHS / "hand_function_constants.onnx"
    report = prune_model(model, 0.95, export="sparse", output=tmp_path / "out.onnx")
    assert set(report.layers[0].stored) == {"dense"}
    assert any("may crash on sparse constants in model functions" in w for w in report.warnings)


def test_sparse_constants_in_functions_are_refused(prune_model, tmp_path):
    model = onnx.load(GRAPHS / "hand_function_constants.onnx")
    node = next(n for f in model.functions for n in f.node if n.op_type == "Constant")
    array = numpy_helper.to_array(node.attribute[0].t).ravel()
    indices = numpy_helper.from_array(np.arange(array.size))
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(array), indices, [array.size])
    node.attribute[0].CopyFrom(helper.make_attribute("sparse_value", sparse))
    with pytest.raises(RnnpruneError, match="holds a sparse constant") as refusal:
        prune_model(model)
    assert "inline_local_functions" in refusal.value.hint
