from __future__ import annotations

import gzip
import io
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnprune_cli import spool
from rnnprune_cli.data import load_dataset
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import TensorSpec
from rnnprune_cli.tensorflow import saved_data
from rnnprune_cli.tensorflow.runtime import import_tensorflow

tf = import_tensorflow()

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = TensorSpec("x", F32, ("batch", "time", 3))
STATE = TensorSpec("h", F32, (2, "batch", 8))
RNG = np.random.default_rng(0)
ARRAYS = {"x": RNG.normal(size=(7, 4, 3)).astype(np.float32), "labels": np.arange(7)}


def whole(arrays=ARRAYS):
    return tf.data.Dataset.from_tensor_slices(arrays)


def ragged(*parts, signature=None):
    """A set whose elements are given one by one, with steps of any number."""
    signature = signature or tf.nest.map_structure(
        lambda a: tf.TensorSpec([None] * a.ndim, a.dtype), parts[0]
    )
    return tf.data.Dataset.from_generator(lambda: iter(parts), output_signature=signature)


def saved(tmp_path, data, name="d", **options) -> Path:
    data.save(str(tmp_path / name), **options)
    return tmp_path / name


@pytest.mark.parametrize("compression", [None, "GZIP", "NONE"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_samples_and_batches_become_the_arrays_they_were(tmp_path, compression, batch):
    elements = whole().batch(batch) if batch else whole()
    data = load_dataset(saved(tmp_path, elements, compression=compression), [X])
    assert data.count == 7 and data.lengths is None and not data.stacked
    np.testing.assert_array_equal(data.inputs["x"], ARRAYS["x"])
    np.testing.assert_array_equal(data.targets[""], ARRAYS["labels"])
    assert data.targets[""].dtype == np.int64


@pytest.mark.parametrize(
    ("elements", "targets"),
    [
        (ARRAYS["x"], {}),
        ((ARRAYS["x"],), {}),
        ((ARRAYS["x"], ARRAYS["labels"]), {""}),
        (({"x": ARRAYS["x"]}, ARRAYS["labels"]), {""}),
        (({"features": ARRAYS["x"]}, ARRAYS["labels"]), {""}),
        ((ARRAYS["x"], {"a": ARRAYS["labels"], "b": ARRAYS["x"]}), {"a", "b"}),
        ({"features": ARRAYS["x"], "target:a": ARRAYS["labels"]}, {"a"}),
    ],
)
def test_elements_may_be_dictionaries_or_tuples(tmp_path, elements, targets):
    spec = TensorSpec("features", F32, (None, None, 3))
    data = load_dataset(saved(tmp_path, whole(elements)), [spec])
    np.testing.assert_array_equal(data.inputs["features"], ARRAYS["x"])
    assert {*data.targets} == {*targets}
    for name in {"", "a"} & {*data.targets}:
        np.testing.assert_array_equal(data.targets[name], ARRAYS["labels"])


def test_samples_of_any_length_are_padded_on_the_right(tmp_path):
    parts = [
        {
            "x": RNG.normal(size=(n, 3)).astype(np.float32),
            "labels": np.arange(n),
            "sum": np.array(n),
        }
        for n in (2, 5, 3)
    ]
    specs = [X, TensorSpec("sum", I64, ("batch",))]
    for elements in (ragged(*parts), ragged(*parts).batch(1)):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        data = load_dataset(saved(tmp_path, elements), specs)
        assert data.lengths is not None and data.lengths.tolist() == [2, 5, 3]
        assert data.inputs["x"].shape == (3, 5, 3) and data.padded_steps == 5
        for k, part in enumerate(parts):
            n = len(part["labels"])
            np.testing.assert_array_equal(data.inputs["x"][k, :n], part["x"])
            assert not data.inputs["x"][k, n:].any()
            np.testing.assert_array_equal(data.targets[""][k, :n], part["labels"])
            assert (data.targets[""][k, n:] == -1).all()  # which counts nowhere


def test_lengths_that_are_given_are_kept(tmp_path):
    elements = whole({**ARRAYS, "lengths": np.array([1, 2, 3, 4, 1, 2, 3])})
    data = load_dataset(saved(tmp_path, elements.batch(3)), [X])
    assert data.lengths is not None and data.lengths.tolist() == [1, 2, 3, 4, 1, 2, 3]
    parts = [
        {"x": np.ones((2, 5, 3), np.float32), "lengths": np.array([5, 1])},
        {"x": np.ones((1, 2, 3), np.float32), "lengths": np.array([2])},
    ]
    data = load_dataset(saved(tmp_path, ragged(*parts), "padded"), [X])
    assert data.lengths is not None and data.lengths.tolist() == [5, 1, 2]
    assert data.inputs["x"].shape == (3, 5, 3) and not data.inputs["x"][2, 2:].any()


def test_whole_feeds_are_one_sample_each(tmp_path):
    steps_first = TensorSpec("x", F32, ("seq_len", "batch", 3))
    elements = whole({"x": ARRAYS["x"][:, :, None]})
    assert load_dataset(saved(tmp_path, elements), [steps_first]).feed(2, 3)["x"].shape == (4, 1, 3)
    batches = load_dataset(saved(tmp_path, elements.batch(3), "b"), [steps_first])
    np.testing.assert_array_equal(batches.inputs["x"], ARRAYS["x"][:, :, None])
    states = whole({"x": ARRAYS["x"], "h": np.zeros((7, 2, 1, 8), np.float32)})
    data = load_dataset(saved(tmp_path, states, "s"), [X, STATE])
    assert {n: a.shape for n, a in data.feed(0, 1).items()} == {"x": (1, 4, 3), "h": (2, 1, 8)}


def test_shards_are_read_in_order(tmp_path):
    elements = whole().map(lambda e: {"x": e["x"], "labels": e["labels"]})
    path = saved(tmp_path, elements, shard_func=lambda e: e["labels"] % 3)
    data = load_dataset(path, [X])
    assert data.targets[""].tolist() == [0, 3, 6, 1, 4, 2, 5]
    np.testing.assert_array_equal(data.inputs["x"], ARRAYS["x"][data.targets[""]])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint16", "bool"])
def test_types_come_through(tmp_path, dtype):
    values = RNG.integers(0, 2, (5, 4)).astype(dtype)
    data = load_dataset(
        saved(tmp_path, whole({"x": values})), [TensorSpec("x", np.dtype(dtype), (None, 4))]
    )
    np.testing.assert_array_equal(data.inputs["x"], values)


Y = TensorSpec("y", F32, ("batch", "time"))
STEPS = [
    {"x": np.ones((n, 3), np.float32), "y": np.ones(m, np.float32)} for n, m in ((2, 3), (4, 1))
]
ODD = {"x": np.ones((2, 5), np.float32), "y": np.ones(3, np.float32)}
TARGETS = [{"x": np.ones((4, 3), np.float32), "target:y": s["y"]} for s in STEPS]
PADDED = [{"x": np.ones((2, n, 3), np.float32)} for n in (3, 4)]
UNEQUAL = {"x": np.ones((2, 4, 3), np.float32), "labels": np.ones(3)}
RANKS = ragged(ARRAYS["x"][0], ARRAYS["x"], signature=tf.TensorSpec(None, F32))
TRIPLE = (ARRAYS["x"], ARRAYS["labels"], ARRAYS["labels"])
TWICE = ({"target:a": ARRAYS["x"]}, {"a": ARRAYS["x"]})
SPARSE = tf.sparse.from_dense(np.eye(3, dtype=np.float32))


@pytest.mark.parametrize(
    ("elements", "specs", "words"),
    [
        (ragged(*STEPS), [X, Y], "other lengths"),
        (ragged(STEPS[0], ODD), [X, Y], "more than their steps"),
        (ragged(*TARGETS), [X], "those of no input"),
        (ragged(*PADDED), [X], "padded to different"),
        (ragged(UNEQUAL), [X], "numbers of samples"),
        (RANKS, [X], "numbers of axes"),
        (whole().take(0), [X], "no samples"),
        (whole({"x": np.array(["a", "b"])}), [X], "type string"),
        (whole({"x": tf.cast(ARRAYS["x"], tf.bfloat16)}), [X], "type bfloat16"),
        (whole({"x": {"y": ARRAYS["x"]}}), [X], "something else than dense"),
        (whole(TRIPLE), [X], "a tuple of 3"),
        (whole(TWICE), [X], "two of a name"),
        (whole({"x": tf.ragged.constant([[1.0], [2.0, 3.0]])}), [X], "RaggedTensorSpec"),
        (whole({"x": SPARSE}), [X], "SparseTensorSpec"),
        (whole({"y": ARRAYS["x"]}), [X], "no array for input 'x'"),
        (whole({**ARRAYS, "more": ARRAYS["labels"]}), [X], "no input of the model"),
        (whole({"x": np.full((2, 4, 3), np.nan, np.float32)}), [X], "NaN"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused(tmp_path, elements, specs, words):
    with pytest.raises(RnnpruneError, match=words) as caught:
        load_dataset(saved(tmp_path, elements), specs)
    assert caught.value.hint


def test_elements_that_may_be_samples_or_batches_are_refused(tmp_path):
    elements = whole(
        {"x": np.ones((5, 2, 4, 3), np.float32), "h": np.ones((5, 2, 2, 8), np.float32)}
    )
    with pytest.raises(RnnpruneError, match="cannot be told") as caught:
        load_dataset(saved(tmp_path, elements), [X, STATE])
    assert "unbatch" in caught.value.hint


def test_folders_that_are_no_data_sets_are_refused(tmp_path):
    with pytest.raises(RnnpruneError, match="dataset_spec"):
        load_dataset(tmp_path, [X])
    with pytest.raises(RnnpruneError, match="does not exist"):
        load_dataset(tmp_path / "none", [X])


def test_without_tensorflow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = saved(tmp_path, whole())

    def missing():
        raise RnnpruneError("not there", "pip install it")

    monkeypatch.setattr(saved_data, "import_tensorflow", missing)
    with pytest.raises(RnnpruneError, match="needs the tensorflow package") as caught:
        load_dataset(path, [X])
    assert caught.value.hint == "pip install it"


def test_reading_starts_no_threads_of_tensorflow(tmp_path):
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from rnnprune_cli.data import load_dataset; from rnnprune_cli.model import TensorSpec\n"
        "spec = TensorSpec('x', np.dtype('f4'), (None, None, 3))\n"
        "assert load_dataset(Path(sys.argv[1]), [spec]).count == 7\n"
        "from rnnprune_cli.tensorflow.runtime import set_threads\n"
        "assert set_threads(2) is None\n"
    )
    path = saved(tmp_path, whole())
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def records(path) -> Path:
    (found,) = path.glob("*/*/*.snapshot")
    return found


def record(content: bytes, length: int | None = None) -> bytes:
    """A record with the right checksum of its length, and a wrong one of its contents."""
    start = struct.pack("<Q", len(content) if length is None else length)
    return start + saved_data._checksum(start) + content + bytes(4)


def tensor(shape=(4, 3), content=bytes(48), dtype=1) -> bytes:
    from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2

    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=n) for n in shape]
    shape = tensor_shape_pb2.TensorShapeProto(dim=dims)
    return tensor_pb2.TensorProto(
        dtype=dtype, tensor_shape=shape, tensor_content=content
    ).SerializeToString()


def one(tmp_path) -> Path:
    return saved(tmp_path, whole({"x": ARRAYS["x"][:1]}))


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (record(b"", 1 << 62), "implausible"),
        (record(b"", 1 << 20), "ends within a record"),
        (record(tensor())[:-1], "ends within a record"),
        (record(tensor())[:11], ""),
        (record(tensor()) * 2, "2 of 1 elements"),
        (b"", "0 of 1 elements"),
        (record(tensor(content=bytes(44))), "another size"),
        (record(tensor((1 << 40, 3))), "another size"),
        (record(tensor((1 << 40, 0), b"")), "another size"),
        (record(tensor((1 << 62, 1 << 62, 0), b"")), "another size"),
        (record(tensor((-4, -3))), "another type"),
        (record(tensor(dtype=3)), "another type"),
        (record(b"no tensor"), ""),
        (record(tensor()) + bytes(12), ""),
    ],
)
def test_records_are_not_believed(tmp_path, content, words, zipped):
    path = one(tmp_path)
    records(path).write_bytes(gzip.compress(content) if zipped else content)
    tracemalloc.start()
    try:
        with pytest.raises(RnnpruneError, match="cannot be read as saved.*" + words):
            load_dataset(path, [X])
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_checksums_of_contents_are_worked_out(tmp_path):
    path = one(tmp_path)
    content = bytearray(records(path).read_bytes())
    content[content.index(ARRAYS["x"][0].tobytes()) + 3] ^= 1
    records(path).write_bytes(content)
    with pytest.raises(RnnpruneError, match="cannot be read as saved"):
        load_dataset(path, [X])


def test_a_file_that_ends_within_an_element_is_refused(tmp_path):
    path = saved(tmp_path, whole())
    content = records(path).read_bytes()
    last = ARRAYS["x"][-1].tobytes()
    (start,) = struct.unpack("<Q", content[:8])  # the label comes first
    records(path).write_bytes(content[: -len(record(tensor(content=last)))])
    assert len(content) % 7 == 0 and start < 48
    with pytest.raises(RnnpruneError, match="ends within an element"):
        load_dataset(path, [X])


def test_what_unpacks_to_an_implausible_size_is_refused(tmp_path, monkeypatch):
    path = one(tmp_path)
    whole_of_it = io.BytesIO()
    with gzip.open(whole_of_it, "wb", compresslevel=9) as file:
        for _ in range(200):
            file.write(record(tensor((1 << 18,), bytes(1 << 20))))
    records(path).write_bytes(whole_of_it.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(RnnpruneError):
            load_dataset(path, [X])
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_one_long_sample_does_not_fill_the_disk(tmp_path):
    parts = [np.ones((1 if n else 1 << 20, 3), np.float32) for n in range(20_000)]
    with pytest.raises(RnnpruneError, match="padded to its longest sample"):
        load_dataset(saved(tmp_path, ragged(*parts)), [X])


def test_interrupted_and_foreign_sets_are_refused(tmp_path):
    from tensorflow.core.protobuf import snapshot_pb2

    path = one(tmp_path)
    file = path / "snapshot.metadata"
    metadata = snapshot_pb2.SnapshotMetadataRecord.FromString(file.read_bytes())
    run = metadata.run_id
    for change, words in (
        ({"finalized": False}, "to its end"),
        ({"version": 3}, "another kind"),
        ({"run_id": "../" + path.name + "/" + run}, "another kind"),
        ({"run_id": ""}, "another kind"),
        ({"num_elements": 2}, "1 of 2"),
        ({"dtype": [1, 1]}, "cannot be read"),
        ({"dtype": [999]}, "cannot be read"),
    ):
        changed = snapshot_pb2.SnapshotMetadataRecord()
        changed.CopyFrom(metadata)
        for key, value in change.items():
            if key == "dtype":
                changed.dtype[:] = value
            else:
                setattr(changed, key, value)
        file.write_bytes(changed.SerializeToString())
        with pytest.raises(RnnpruneError, match=words):
            load_dataset(path, [X])
    file.write_bytes(bytes(2 << 20))
    with pytest.raises(RnnpruneError, match="too large"):
        load_dataset(path, [X])
    file.unlink()
    with pytest.raises(RnnpruneError, match="cannot be read"):
        load_dataset(path, [X])


@pytest.fixture(scope="module", params=[None, "GZIP"])
def intact(tmp_path_factory, request):
    path = saved(tmp_path_factory.mktemp("saved"), whole(), compression=request.param)
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_folders_are_refused_or_harmless(tmp_path_factory, intact, data):
    path = tmp_path_factory.mktemp("damaged")
    struck = data.draw(st.sampled_from(sorted(intact)))
    for name, content in intact.items():
        changed = bytearray(content)
        if name == struck:
            for _ in range(data.draw(st.integers(1, 3))):
                changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(
                    st.integers(0, 255)
                )
            if data.draw(st.booleans()):
                del changed[data.draw(st.integers(0, len(content))) :]
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(changed)
    try:
        found = load_dataset(path, [X])
    except RnnpruneError as error:
        assert error.hint
        return
    np.testing.assert_array_equal(found.inputs["x"], ARRAYS["x"])


@pytest.mark.parametrize("compression", [None, "GZIP"])
def test_memory_does_not_grow_with_a_saved_set(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(spool, "MAX_IN_MEMORY", 1 << 20)
    monkeypatch.setattr(spool, "CHUNK_BYTES", 1 << 18)
    x = RNG.normal(size=(2000, 300, 3)).astype(np.float32)  # 7.2 MB
    path = saved(tmp_path, whole({"x": x}).batch(64), compression=compression)
    before = {*Path(spool.tempfile.gettempdir()).iterdir()}
    tracemalloc.start()
    try:
        data = load_dataset(path, [X])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert isinstance(data.inputs["x"], np.memmap)
    np.testing.assert_array_equal(data.inputs["x"], x)
    left = {*Path(spool.tempfile.gettempdir()).iterdir()} - before
    assert not [file for file in left if file.is_file() and file.stat().st_size > 1 << 20]


def test_saved_data_give_the_figures_of_an_npz(tmp_path, prune_model):
    with np.load(SAMPLES / "speech.test.npz") as known:
        each = {name: array[:80] for name, array in known.items()}
    np.savez_compressed(tmp_path / "d.npz", **each)
    saved(tmp_path, whole(each).batch(16), compression="GZIP")
    reports = [
        prune_model(
            SAMPLES / "speech.onnx",
            output=tmp_path / f"{k}.onnx",
            data=data,
            calibration=data,
            method="obs",
            scope="cell",
        )
        for k, data in enumerate((tmp_path / "d.npz", tmp_path / "d"))
    ]
    assert reports[0].before.metrics == reports[1].before.metrics
    assert reports[0].after.metrics == reports[1].after.metrics
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
