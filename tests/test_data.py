from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from rnnprune_cli.data import load_dataset, made_up_feeds
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import Runner, TensorSpec

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
