from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from unittest import mock

import numpy as np
import pytest
from conftest import SAMPLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rnnprune_cli import npz, spool
from rnnprune_cli.data import load_dataset, made_up_feeds, split, thinned
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Runner, TensorSpec
from rnnprune_cli.npz import read_npz

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = TensorSpec("x", F32, ("batch", "time", 3))


class Accepting(Runner):
    """A stand-in for a model that only accepts certain shapes; not a runtime."""

    def __init__(self, inputs, accepts=lambda feed: True):
        self.inputs, self.outputs, self.accepts = tuple(inputs), (), accepts

    def run(self, feed):
        if not self.accepts(feed):
            raise RnnpruneError("no")
        return [np.zeros(1)]


def test_samples_lie_on_the_first_axis(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((5, 4, 3), np.float32),
        labels=np.arange(5),
        lengths=np.full(5, 4),
    )
    data = load_dataset(tmp_path / "d.npz", [X])
    assert data.count == 5
    assert data.feed(1, 3)["x"].shape == (2, 4, 3)
    assert list(data.batches(2)) == [(0, 2), (2, 4), (4, 5)]


def test_x_stands_for_a_single_input(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4, 3), np.float32))
    spec = TensorSpec("features", F32, (None, None, 3))
    assert load_dataset(tmp_path / "d.npz", [spec]).feed(0, 1)["features"].shape == (1, 4, 3)


def test_whole_feeds_can_be_stacked(tmp_path):
    state = TensorSpec("state", F32, (2, "batch", 8))
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((6, 1, 4, 3), np.float32),
        state=np.zeros((6, 2, 1, 8), np.float32),
    )
    data = load_dataset(tmp_path / "d.npz", [X, state])
    assert data.count == 6
    assert data.feed(2, 3)["state"].shape == (2, 1, 8)
    assert len(list(data.batches(64))) == 6


def test_a_state_without_sample_axis_is_given_with_every_sample(tmp_path):
    state = TensorSpec("state", F32, (2, "batch", 8))
    rate = TensorSpec("rate", I64, ())
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((6, 4, 3), np.float32),
        state=np.zeros((2, 1, 8), np.float32),
        rate=np.array(16000),
    )
    data = load_dataset(tmp_path / "d.npz", [X, state, rate])
    feed = data.feed(2, 3)
    assert (feed["x"].shape, feed["state"].shape, feed["rate"].shape) == ((1, 4, 3), (2, 1, 8), ())
    assert len(list(data.batches(64))) == 6


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": np.zeros((2, 4, 3), np.float32)}, "no array for input 'x'"),
        ({"x": np.zeros((2, 4), np.float32)}, "has shape"),
        ({"x": np.zeros((2, 4, 3), np.complex64)}, "complex64"),
        ({"x": np.zeros((2, 4, 3), np.float32), "labels": np.zeros(3)}, "2 samples"),
        ({"x": np.zeros((2, 4, 3), np.float32), "extra": np.zeros(3)}, "no input of the model"),
        ({"x": np.array([{"code": 1}], dtype=object)}, "pickled"),
    ],
    ids=["name", "rank", "type", "labels", "extra", "pickle"],
)
def test_data_that_do_not_fit_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(RnnpruneError, match=words):
        load_dataset(tmp_path / "d.npz", [X])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"text"])
def test_damaged_archives_are_refused(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(RnnpruneError, match="cannot be read"):
        load_dataset(tmp_path / "d.npz", [X])


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 28, 4, 3)}
    )
    with (
        zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(200):
            member.write(bytes(1 << 20))
    with pytest.raises(RnnpruneError):
        load_dataset(tmp_path / "d.npz", [X])


def test_other_formats_and_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="npz"):
        load_dataset(tmp_path / "d.pkl", [X])
    with pytest.raises(RnnpruneError, match="does not exist"):
        load_dataset(tmp_path / "d.npz", [X])


def test_made_up_inputs_respect_types_ranges_and_symbols():
    runner = Accepting(
        [
            X,
            TensorSpec("tokens", I64, ("batch", "time"), minimum=0, maximum=6),
            TensorSpec("lengths", I64, ("batch",), is_length=True),
            TensorSpec("state", F32, (2, "batch", 8)),
            TensorSpec("flag", np.dtype(bool), ("batch",)),
        ]
    )
    (feed,) = made_up_feeds(runner, 0)
    assert feed["x"].shape == (1, 100, 3) and feed["x"].dtype == np.float32
    assert feed["tokens"].shape == (1, 100) and feed["tokens"].min() >= 0
    assert feed["tokens"].max() == 6
    assert feed["lengths"].tolist() == [100]
    assert feed["state"].shape == (2, 1, 8)
    assert feed["flag"].dtype == bool


def test_made_up_inputs_are_seeded():
    one, two, other = (made_up_feeds(Accepting([X]), seed)[0]["x"] for seed in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_every_mode_that_the_graph_asks_for_is_tried():
    rate = TensorSpec("rate", I64, (), choices=(16000,))
    feeds = made_up_feeds(Accepting([X, rate]), 0)
    assert [int(f["rate"]) for f in feeds] == [16000, 16001]


def test_sizes_are_searched_until_one_is_accepted():
    runner = Accepting([X], lambda feed: feed["x"].shape[1] == 576)
    assert made_up_feeds(runner, 0)[0]["x"].shape == (1, 576, 3)


def test_a_model_that_accepts_nothing_asks_for_data():
    with pytest.raises(RnnpruneError) as caught:
        made_up_feeds(Accepting([X], lambda feed: False), 0)
    assert "--data" in caught.value.hint


def test_a_model_for_single_samples_gets_one_at_a_time(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 4, 3), np.float32))
    data = load_dataset(tmp_path / "d.npz", [TensorSpec("x", F32, (1, "time", 3))])
    assert [stop - start for start, stop in data.batches(64)] == [1] * 6


def test_a_model_with_steps_first_takes_whole_feeds(tmp_path):
    spec = TensorSpec("x", F32, ("seq_len", "batch", 3))
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 7, 1, 3), np.float32))
    assert load_dataset(tmp_path / "d.npz", [spec]).feed(2, 3)["x"].shape == (7, 1, 3)
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 7, 3), np.float32))
    assert load_dataset(tmp_path / "d.npz", [spec]).feed(0, 1)["x"].shape == (5, 7, 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.full((2, 4, 3), np.nan, np.float32)}, "NaN"),
        ({"x": np.full((2, 4, 3), 1e300)}, "infinite"),
        ({"x": np.zeros((0, 4, 3), np.float32)}, "no samples"),
        ({"x": np.zeros((2, 4, 3), np.float32), "lengths": np.ones((2, 2), int)}, "lengths"),
        ({"x": np.zeros((2, 4, 3), np.float32), "labels": np.ones(2, complex)}, "complex"),
        (
            {"x": np.zeros((2, 4, 3), np.float32), "labels": np.ones(2), "target:y": np.ones(3)},
            "'y' has shape",
        ),
    ],
    ids=["nan", "overflow", "empty", "lengths", "complex", "second target"],
)
def test_data_that_prove_nothing_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(RnnpruneError, match=words):
        load_dataset(tmp_path / "d.npz", [X])


def test_each_output_may_have_its_target(tmp_path):
    targets = {"target:a": np.ones((2, 4)), "target:b:c": np.zeros(2), "labels": np.ones(2, int)}
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4, 3), np.float32), **targets)
    data = load_dataset(tmp_path / "d.npz", [X])
    assert {name: a.shape for name, a in data.targets.items()} == {
        "a": (2, 4),
        "b:c": (2,),
        "": (2,),
    }


def test_integers_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([[300, -1]]))
    with pytest.raises(RnnpruneError, match="cannot hold"):
        load_dataset(tmp_path / "d.npz", [TensorSpec("x", np.dtype(np.uint8), ("batch", "n"))])


def test_a_state_given_once_is_that_of_every_sample(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((12, 7, 3), np.float32), h=np.zeros((1, 1, 4), np.float32))
    specs = [
        TensorSpec("x", np.dtype(np.float32), (1, "time", 3)),
        TensorSpec("h", np.dtype(np.float32), (1, 1, 4)),
    ]
    data = load_dataset(path, specs)
    assert data.count == 12 and data.single
    assert {name: a.shape for name, a in data.feed(3, 4).items()} == {
        "x": (1, 7, 3),
        "h": (1, 1, 4),
    }


def test_lengths_that_the_model_is_told_count_as_lengths(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((3, 7, 2), np.float32), lens=np.array([7, 2, 4], np.int32))
    specs = [
        TensorSpec("x", np.dtype(np.float32), ("batch", "time", 2)),
        TensorSpec("lens", np.dtype(np.int32), ("batch",), is_length=True),
    ]
    data = load_dataset(path, specs)
    assert data.lengths is not None and data.lengths.tolist() == [7, 2, 4]
    assert data.take(np.array([1]), 2)["x"].shape == (1, 2, 2)


def test_padding_is_told_from_the_sequences_not_from_states(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(
        path,
        state=np.zeros((3, 8), np.float32),
        x=np.ones((3, 7, 2), np.float32),
        lengths=np.array([5, 2, 4]),
    )
    specs = [
        TensorSpec("state", np.dtype(np.float32), ("batch", 8)),
        TensorSpec("x", np.dtype(np.float32), ("batch", "time", 2)),
    ]
    valid = load_dataset(path, specs).valid(1, 3)
    assert valid is not None and valid.sum(axis=1).tolist() == [2, 4] and valid.shape == (2, 7)


def test_padding_is_told_in_feeds_that_hold_the_steps_first(tmp_path):
    path = tmp_path / "data.npz"
    lengths = np.array([5, 2, 4])
    spec = TensorSpec("x", np.dtype(np.float32), ("seq", "batch", 2))
    np.savez(path, x=np.ones((3, 7, 1, 2), np.float32), lengths=lengths)
    valid = load_dataset(path, [spec]).valid(1, 2)
    assert valid is not None and valid.tolist() == [[True] * 2 + [False] * 5]
    np.savez(path, x=np.ones((3, 7, 4, 2), np.float32), lengths=lengths)  # of which of the four?
    assert load_dataset(path, [spec]).valid(1, 2) is None


@pytest.fixture
def tiny_limits(monkeypatch):
    """Everything is large."""
    monkeypatch.setattr(npz, "MAPPED_BYTES", 0)
    monkeypatch.setattr(spool, "MAX_IN_MEMORY", 0)
    monkeypatch.setattr(spool, "CHUNK_BYTES", 64)


PLAIN = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64))
)


@st.composite
def archives(draw):
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    arrays = draw(
        st.dictionaries(
            st.text("abcxyz:ä", min_size=1, max_size=9), hnp.arrays(PLAIN, shapes), max_size=4
        )
    )
    return {k: np.asfortranarray(a) if draw(st.booleans()) else a for k, a in arrays.items()}


@settings(deadline=None)
@given(arrays=archives(), compressed=st.booleans())
def test_mapped_arrays_are_those_that_numpy_reads(tmp_path_factory, arrays, compressed):
    path = tmp_path_factory.mktemp("npz") / "d.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    with mock.patch.object(npz, "MAPPED_BYTES", 0):
        found = read_npz(path)
    with np.load(path) as known:
        assert [*found] == known.files
        for name, array in found.items():
            assert array.dtype == known[name].dtype and array.shape == known[name].shape
            np.testing.assert_array_equal(array, known[name])
            assert isinstance(array, np.memmap) == (not compressed and array.size > 0)


SMALL = {"x": np.arange(24, dtype=np.float32).reshape(2, 4, 3), "labels": np.array([3, 1])}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_archives_are_refused_or_harmless(tmp_path_factory, data):
    whole = io.BytesIO()
    (np.savez_compressed if data.draw(st.booleans()) else np.savez)(whole, **SMALL)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("npz") / "d.npz"
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    with mock.patch.object(npz, "MAPPED_BYTES", data.draw(st.sampled_from([0, 1 << 20]))):
        try:
            found = load_dataset(path, [X])
        except RnnpruneError:
            return
    # What is not the contents has no checksum: dates, versions, and the names, if both agree.
    np.testing.assert_array_equal(found.inputs["x"], SMALL["x"])


def npy(claims, content=b"", version=(1, 0)):
    """A member with any header."""
    text = repr(claims).encode() if isinstance(claims, dict) else claims
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + content


def claiming(shape, descr="<f4", **more):
    return {"descr": descr, "fortran_order": False, "shape": shape, **more}


@pytest.mark.parametrize("mapped_from", [0, 1 << 30], ids=["mapped", "read"])
@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy(claiming((1 << 40,)), bytes(64)), "claims the shape"),
        (npy(claiming((1 << 62, 1 << 62)), bytes(64)), "claims the shape"),
        (npy(claiming((4,)), bytes(64)), "claims the shape"),
        (npy(claiming((-1, -16)), bytes(64)), "plain array"),
        (npy(claiming((1 << 40, 0))), "claims the shape"),
        (npy(claiming((1 << 40,), "<U0")), "claims the shape"),
        (npy(claiming((1 << 40,), "|V0")), "claims the shape"),
        (npy(claiming((8,), "|O"), bytes(64)), "pickled"),
        (npy(claiming((1,), [("a", "<f4"), ("b", "|O")]), bytes(12)), "pickled"),
        (npy(claiming((1,), [("a", "<f4")]), bytes(4)), "plain array"),
        (npy(claiming((1,), ("<f4", (4,))), bytes(16)), "plain array"),
        (npy(claiming((4,), "no type"), bytes(16)), "header"),
        (npy(claiming((4,), more=1), bytes(16)), "header"),
        (npy(claiming("4"), bytes(16)), "header"),
        (npy(b"(" * 5000, bytes(16)), "header"),
        (npy(b"{'descr': [", bytes(16)), "header"),
        (npy(b" " * 20_000, bytes(16)), "header"),
        (npy(claiming((4,)), bytes(16), (9, 0)), "header"),
        (npy(b"", b"", (2, 0))[:8] + struct.pack("<I", 0xFFFFFFFF) + bytes(99), "header"),
        (b"", "header"),
        (b"just text", "header"),
    ],
)
def test_headers_are_not_believed(tmp_path, monkeypatch, member, words, mapped_from):
    monkeypatch.setattr(npz, "MAPPED_BYTES", mapped_from)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", member)
    tracemalloc.start()
    try:
        with pytest.raises(RnnpruneError, match=words):
            load_dataset(tmp_path / "d.npz", [X])
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def stored(**arrays):
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    return bytearray(whole.getvalue())


ENTRY, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def at(content, signature, offset, form, value, which=0):
    """Overwrites a field of the entry of a member."""
    place = -1
    for _ in range(which + 1):
        place = content.index(signature, place + 1)
    struct.pack_into(form, content, place + offset, value)
    return content


BOTH = {"x": SMALL["x"], "labels": np.arange(2)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (at(stored(**BOTH), ENTRY, 8, "<H", 1), "ncrypted"),
        (at(at(stored(**BOTH), ENTRY, 10, "<H", 12), LOCAL, 8, "<H", 12), "way that NumPy"),
        (at(at(stored(**BOTH), ENTRY, 10, "<H", 99), LOCAL, 8, "<H", 99), "way that NumPy"),
        (at(stored(**BOTH), ENTRY, 42, "<I", 0, 1), "cannot be read"),  # two entries, one place
        (at(stored(**BOTH), ENTRY, 42, "<I", 1 << 30), "cannot be read"),
        (at(stored(**BOTH), ENTRY, 16, "<I", 12345), "CRC"),
        (at(stored(**BOTH), LOCAL, 28, "<H", 0xFFFF), "cannot be read"),
        (
            at(at(stored(**BOTH), ENTRY, 20, "<I", 1 << 20, 1), ENTRY, 24, "<I", 1 << 20, 1),
            "cannot",
        ),
        (stored(**BOTH)[:-40], "cannot be read"),
        (stored(**BOTH)[50:], "cannot be read"),
    ],
)
def test_archives_damaged_by_hand_are_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(npz, "MAPPED_BYTES", 0)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(RnnpruneError, match=words):
        load_dataset(tmp_path / "d.npz", [X])


def test_places_beyond_the_file_are_not_mapped(tmp_path):
    # zipfile may notice some of these itself, depending on its version.
    content = stored(**BOTH)
    file = io.BytesIO(content)
    first, second = zipfile.ZipFile(file).infolist()
    second.file_size = 1 << 40
    with pytest.raises(ValueError, match="beyond the end"):
        npz._places(file, [first, second])
    first.file_size = second.header_offset
    with pytest.raises(ValueError, match="overlaps"):
        npz._places(file, [second, first])
    second.header_offset += 1
    with pytest.raises(ValueError, match="overlaps"):
        npz._places(file, [second])


def test_names_that_occur_twice_and_other_files_are_refused(tmp_path):
    member = npy(claiming((2, 4, 3)), bytes(96))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive, pytest.warns(UserWarning):
        for _ in range(2):
            archive.writestr("x.npy", member)
    with pytest.raises(RnnpruneError, match="two arrays"):
        load_dataset(tmp_path / "d.npz", [X])
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", member)
        archive.writestr("x", member)
    with pytest.raises(RnnpruneError, match="'x' in it is no array"):
        load_dataset(tmp_path / "d.npz", [X])


def test_a_flipped_bit_in_a_mapped_array_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAPPED_BYTES", 0)
    content = stored(x=np.zeros((5000, 4, 3), np.float32))
    content[200_000] ^= 1
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(RnnpruneError, match="checksum"):
        load_dataset(tmp_path / "d.npz", [X])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_memory_does_not_grow_with_a_mapped_array(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(npz, "MAPPED_BYTES", 1 << 20)
    monkeypatch.setattr(spool, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(spool, "MAX_IN_MEMORY", 1 << 20)
    labels = np.arange(4000) // 1000
    x = np.arange(4000 * 100 * 3).reshape(4000, 100, 3).astype(dtype)  # 4.8 MB or more
    np.savez(tmp_path / "d.npz", x=x, labels=labels)
    tracemalloc.start()
    try:
        data = load_dataset(tmp_path / "d.npz", [X])
        parts = [*split(data, 0.1), thinned(data, 500)]
        for part in parts:
            assert not part.blank
            for bounds in part.batches(64):
                assert part.feed(*bounds)["x"].flags.aligned
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20
    assert isinstance(data.inputs["x"], np.memmap)
    np.testing.assert_array_equal(data.inputs["x"], x.astype(np.float32))
    held = np.arange(4000) % 400 >= 360  # the last tenth of each of ten parts
    np.testing.assert_array_equal(parts[0].inputs["x"], x[~held].astype(np.float32))
    np.testing.assert_array_equal(parts[1].targets[""], labels[held])
    np.testing.assert_array_equal(parts[2].feed(1, 3)["x"], x[8:24:8].astype(np.float32))


def test_feeds_of_mapped_arrays_are_plain_arrays(tmp_path, tiny_limits):
    rng = np.random.default_rng(0)
    for name in ("x", "xy", "xyz", "xyza"):  # of which most put the data at an odd place
        arrays = {name: np.asfortranarray(rng.normal(size=(5, 4, 3)).astype(np.float32))}
        arrays["h"] = np.ones((2, 1, 8), np.float32)
        np.savez(tmp_path / "d.npz", **arrays, lengths=np.array([4, 2, 4, 3, 1]))
        specs = [TensorSpec(name, F32, ("batch", "time", 3)), TensorSpec("h", F32, (2, "batch", 8))]
        data = load_dataset(tmp_path / "d.npz", specs)
        for feed in (data.feed(1, 2), data.take(np.array([1]), 2)):
            assert all(type(a) is np.ndarray for a in feed.values())
            assert all(a.flags.c_contiguous and a.flags.aligned for a in feed.values())
            assert feed["h"].shape == (2, 1, 8)
        np.testing.assert_array_equal(data.feed(1, 2)[name], arrays[name][1:2])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.full((2, 4, 3), 1e300)}, "infinite"),
        ({"x": np.where(np.arange(24) == 23, np.nan, 0).astype("f").reshape(2, 4, 3)}, "NaN"),
    ],
)
def test_what_is_mapped_is_checked_to_its_end(tmp_path, tiny_limits, arrays, words):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(RnnpruneError, match=words):
        load_dataset(tmp_path / "d.npz", [X])


def test_arrays_of_other_machines_get_the_byte_order_of_this_one(tmp_path):
    np.savez(tmp_path / "d.npz", x=SMALL["x"].astype(">f4"), labels=SMALL["labels"].astype(">i8"))
    data = load_dataset(tmp_path / "d.npz", [X])
    for array, known in ((data.inputs["x"], SMALL["x"]), (data.targets[""], SMALL["labels"])):
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, known)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("step", [1, 2])
def test_what_is_worked_on_at_once_is_small(monkeypatch, order, step):
    monkeypatch.setattr(spool, "CHUNK_BYTES", 64)
    array = np.asarray(np.arange(400).reshape(50, 8), order=order)[::step]
    parts = [*spool.chunks(array)]
    assert max(part.nbytes for part in parts) == 64 and all(part.ndim == 1 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == sorted(array.ravel().tolist())


def test_integers_are_checked_in_every_chunk(tmp_path, tiny_limits):
    x = np.zeros((50, 4), np.int64)
    spec = TensorSpec("x", np.dtype(np.int8), ("batch", "n"))
    np.savez(tmp_path / "d.npz", x=x)
    assert load_dataset(tmp_path / "d.npz", [spec]).inputs["x"].dtype == np.int8
    x[49, 3] = 128
    np.savez(tmp_path / "e.npz", x=x)
    with pytest.raises(RnnpruneError, match="cannot hold"):
        load_dataset(tmp_path / "e.npz", [spec])


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, tiny_limits, monkeypatch):
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 4, 3)))
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda folder: mock.Mock(free=10))
    with pytest.raises(RnnpruneError, match="GiB are free") as caught:
        load_dataset(tmp_path / "d.npz", [X])
    assert "TMPDIR" in caught.value.hint


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("indices", [[], [3], [1, 2, 3], [0, 3, 6], [5, 1, 1], [9, 8, 7], [0, 9]])
def test_a_subset_holds_the_samples_that_were_asked_for(tmp_path, request, mapped, indices):
    if mapped:
        request.getfixturevalue("tiny_limits")
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(10, 4, 3)).astype(np.float32),
        "h": np.ones((2, 1, 8), np.float32),
        "labels": rng.integers(0, 3, 10),
        "target:y": rng.normal(size=(10, 4)),
        "lengths": rng.integers(1, 5, 10),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    specs = [X, TensorSpec("h", F32, (2, "batch", 8))]
    data, chosen = load_dataset(tmp_path / "d.npz", specs), np.array(indices, np.int64)
    part = data.subset(chosen)
    assert part.count == len(indices) and part.padded_steps == data.padded_steps
    np.testing.assert_array_equal(part.inputs["x"], arrays["x"][chosen])
    np.testing.assert_array_equal(part.inputs["h"], arrays["h"])
    np.testing.assert_array_equal(part.targets[""], arrays["labels"][chosen])
    np.testing.assert_array_equal(part.targets["y"], arrays["target:y"][chosen])
    np.testing.assert_array_equal(part.lengths, arrays["lengths"][chosen])
    if len(indices) > 1 and len({*np.diff(indices)}) == 1 and indices[1] > indices[0]:
        assert np.shares_memory(part.inputs["x"], data.inputs["x"])


def test_a_subset_pads_as_the_whole_does(tmp_path):
    state = TensorSpec("state", F32, ("batch", 5))
    arrays = {"x": np.ones((3, 7, 2), np.float32), "state": np.ones((3, 5), np.float32)}
    np.savez(tmp_path / "d.npz", **arrays, lengths=np.array([5, 2, 7]))
    data = load_dataset(tmp_path / "d.npz", [TensorSpec("x", F32, ("batch", "time", 2)), state])
    assert data.subset(np.array([0, 1])).padded_steps == 7  # not 5, as long as the state is wide


def dataset(tmp_path, count, **arrays):
    np.savez(tmp_path / "d.npz", x=np.arange(count * 12.0).reshape(count, 4, 3), **arrays)
    return load_dataset(tmp_path / "d.npz", [X])


def places(data):
    """Which of the samples of :func:`dataset` there are."""
    return (data.inputs["x"][:, 0, 0] / 12).astype(int).tolist()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(2, 40),
    share=st.floats(0.01, 0.99),
    classes=st.sampled_from([None, 1, 2, 5]),
    order=st.booleans(),
)
def test_a_split_puts_every_sample_on_one_side(tmp_path, count, share, classes, order):
    labels = {} if classes is None else {"labels": np.arange(count) * classes // count}
    if labels and not order:
        labels["labels"] = np.arange(count) % classes
    train, validation = split(dataset(tmp_path, count, **labels), share)
    assert sorted(places(train) + places(validation)) == [*range(count)]
    assert places(train) == sorted(places(train)) and train.count and validation.count
    assert places(validation) == sorted(places(validation))


@pytest.mark.parametrize(
    ("labels", "held"),
    [
        (None, [9, 19, 29, 39]),
        (np.arange(40) // 10 % 2, [9, 19, 29, 39]),
        (np.arange(40) % 2, [36, 37, 38, 39]),  # by class: those at the ends are of one
        (np.arange(40) // 20, [9, 19, 29, 39]),
        (np.arange(40) // 35, [9, 19, 29, 39]),
        (np.arange(40) // 39, [9, 19, 29, 39]),  # a class as rare as this may be missing
        (np.arange(40)[:, None] // 20 * np.ones(4, int), [9, 19, 29, 39]),  # by step
    ],
)
def test_the_last_samples_of_parts_validate_unless_a_class_would_be_missing(tmp_path, labels, held):
    data = dataset(tmp_path, 40, **({} if labels is None else {"labels": labels}))
    train, validation = split(data, 0.1)
    assert places(validation) == held
    assert not {*held} & {*places(train)}


def test_samples_that_follow_one_another_stay_together(tmp_path):
    state = TensorSpec("h", F32, (1, 1, 8))
    np.savez(
        tmp_path / "d.npz",
        x=np.ones((40, 1, 4, 3), np.float32),
        h=np.zeros((40, 1, 1, 8), np.float32),
        labels=np.arange(40) // 20,
    )
    data = load_dataset(tmp_path / "d.npz", [X, state])
    assert data.blank == {"h"}
    assert split(data, 0.1)[1].targets[""].tolist() == [1] * 4
    assert thinned(data, 25).targets[""].tolist() == [0] * 20 + [1] * 5


def test_what_cannot_be_split_asks_for_validation_data(tmp_path):
    one = dataset(tmp_path, 1)
    np.savez(tmp_path / "f.npz", x=np.ones((5, 4, 3), np.float32))
    feed = load_dataset(tmp_path / "f.npz", [TensorSpec("x", F32, ("steps", "batch", 3))])
    for data in (one, feed):
        with pytest.raises(UsageError) as caught:
            split(data, 0.1)
        assert "--validation" in caught.value.hint
    for share in (0, 1, float("nan")):
        with pytest.raises(UsageError, match="share"):
            split(dataset(tmp_path, 4), share)


@given(count=st.integers(1, 50), most=st.integers(1, 60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_thinned_data_are_spread_evenly(tmp_path, count, most):
    data = dataset(tmp_path, count)
    kept = places(thinned(data, most))
    assert len(kept) == min(count, most) and kept[0] == 0
    apart = np.diff([*kept, count])
    assert apart.min() >= count // min(count, most) and apart.max() <= -(-count // min(count, most))
    assert (thinned(data, most) is data) == (count <= most)


def test_mapped_data_give_the_figures_of_data_that_were_read(tmp_path, prune_model, tiny_limits):
    with np.load(SAMPLES / "speech.test.npz") as whole:
        arrays = {k: a[:80] if a.ndim else a for k, a in whole.items()}
    np.savez_compressed(tmp_path / "read.npz", **arrays)
    np.savez(tmp_path / "mapped.npz", **arrays)
    reports = [
        prune_model(
            SAMPLES / "speech.onnx",
            output=tmp_path / f"{name}.onnx",
            data=tmp_path / f"{name}.npz",
            method="obs",
            scope="cell",
        )
        for name in ("read", "mapped")
    ]
    assert reports[0].after.metrics == reports[1].after.metrics
    assert (tmp_path / "read.onnx").read_bytes() == (tmp_path / "mapped.onnx").read_bytes()
