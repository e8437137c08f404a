from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest

from rnnprune_cli import measure
from rnnprune_cli.model import Runner


class Counting(Runner):
    inputs = outputs = ()

    def __init__(self):
        self.calls = 0

    def run(self, feed):
        self.calls += 1
        return []


def test_both_models_are_timed_equally_often():
    before, after = Counting(), Counting()
    openers = (lambda: before, lambda: after)
    one, two, ratio = measure.interleaved_latency(openers, {}, seconds=0.0)
    assert len(one.samples) == len(two.samples) >= measure.MIN_PAIRS
    assert one.p5 <= one.median <= one.p95
    assert ratio.low <= ratio.median <= ratio.high


class Clocked(Runner):
    """Advances a made-up clock by a fixed time in every call."""

    inputs = outputs = ()

    def __init__(self, clock, cost):
        self.clock, self.cost = clock, cost

    def run(self, feed):
        self.clock[0] += self.cost
        return []


def test_ratio_is_after_divided_by_before(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    openers = (lambda: Clocked(clock, 0.002), lambda: Clocked(clock, 0.006))
    before, after, ratio = measure.interleaved_latency(openers, {}, seconds=1.0)
    assert before.median == pytest.approx(2.0)
    assert after.median == pytest.approx(6.0)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((3, 3, 3))


def test_models_are_opened_anew_in_every_round(monkeypatch):
    clock, opened = [0.0], [0, 0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def opener(side, cost):
        opened[side] += 1
        return Clocked(clock, cost)

    measure.interleaved_latency((lambda: opener(0, 1e-3), lambda: opener(1, 1e-3)), {}, seconds=1.0)
    assert opened == [measure.ROUNDS] * 2
    opened[:] = [0, 0]
    measure.interleaved_latency((lambda: opener(0, 1.0), lambda: opener(1, 1.0)), {}, seconds=1.0)
    assert opened == [1, 1]


def test_gzip_is_what_gzip_gives(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(np.random.default_rng(0).integers(0, 20, 3_000_000).astype(np.uint8).tobytes())
    size, estimated = measure.gzip_bytes([path])
    assert not estimated
    assert abs(size - len(gzip.compress(path.read_bytes(), 6))) < 100


def test_gzip_of_large_files_is_an_estimate(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(np.random.default_rng(0).integers(0, 20, 9_000_000).astype(np.uint8).tobytes())
    monkeypatch.setattr(measure, "GZIP_EXACT_BYTES", 4 << 20)
    size, estimated = measure.gzip_bytes([path])
    assert estimated
    assert abs(size / len(gzip.compress(path.read_bytes(), 6)) - 1) < 0.02


def test_digest_of_one_file_is_that_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    (tmp_path / "b").write_bytes(b"d")
    assert measure.sha256([tmp_path / "a"]) == hashlib.sha256(b"abc" * 1000).hexdigest()
    both = measure.sha256([tmp_path / "a", tmp_path / "b"])
    assert both == hashlib.sha256(b"abc" * 1000 + b"d").hexdigest()


def test_environment_names_what_took_part():
    environment = measure.environment(3)
    assert environment["threads"] == 3
    assert {"numpy", "onnxruntime"} <= environment["versions"].keys()


def test_a_feed_is_prepared_before_the_clock_runs():
    class Cutting(Runner):
        inputs = outputs = ()

        def __init__(self) -> None:
            self.seen: set[int] = set()

        def prepared(self, feed):
            return {"x": feed["x"][:2]}

        def run(self, feed):
            self.seen.add(len(feed["x"]))
            return []

    sides = Cutting(), Cutting()
    feed = {"x": np.zeros(5)}
    measure.interleaved_latency((lambda: sides[0], lambda: sides[1]), feed, 0.0, 1)
    assert sides[0].seen == sides[1].seen == {2}
