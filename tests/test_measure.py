from __future__ import annotations

import gzip
import hashlib

import numpy as np

from rnnprune_cli import measure


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
