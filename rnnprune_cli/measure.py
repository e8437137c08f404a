"""Sizes and CPU latency."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.model import Feed, Latency, Ratio, Runner

WARM_UP_CALLS = 3
SHORTEST_SAMPLE = 1e-3
"""Seconds; calls that are faster are timed several at once."""
MIN_PAIRS = 5
MAX_PAIRS = 200
ROUNDS = 5
RESAMPLES = 500
GZIP_EXACT_BYTES = 16 << 20
GZIP_SAMPLE_BYTES = 2 << 20
_BLOCK = 1 << 18


def interleaved_latency(
    openers: tuple[Callable[[], Runner], Callable[[], Runner]],
    feed: Feed,
    seconds: float,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> tuple[Latency, Latency, Ratio]:
    """Times two models in pairs, in random order within each pair, in one process.

    Pairing cancels what changes the machine's speed for both; opening both anew in every round
    averages over where they happen to lie in memory. The ratio is that of the medians, with a 95 %
    bootstrap interval over rounds and over the pairs in them.

    Args:
        openers: Return the reference, and the model held against it, ready to run.
        feed: Input of one call.
        seconds: About how long to measure; slow models get fewer rounds, and at least
            :data:`MIN_PAIRS` pairs in each.
        rounds: How often both are opened, at most.
        seed: Seed of the order and of the bootstrap.

    Returns:
        Latency before and after, and after divided by before.
    """
    generator = np.random.default_rng(seed)
    samples: list[tuple[list[float], list[float]]] = []
    left = rounds
    while left > 0:
        sides = tuple(opener() for opener in openers)
        feeds = tuple(runner.prepared(feed) for runner in sides)
        calls, slowest = [], 0.0
        for runner, own in zip(sides, feeds, strict=True):
            runner.reset()
            for _ in range(WARM_UP_CALLS):
                single = _seconds(runner, own, 1)
                if single > seconds / WARM_UP_CALLS:
                    break
            calls.append(max(1, round(SHORTEST_SAMPLE / max(single, 1e-7))))
            slowest = max(slowest, single)
        if not samples:
            rounds = left = max(1, min(rounds, int(seconds / max(8 * slowest, 1e-9))))
        pairs: tuple[list[float], list[float]] = ([], [])
        begin = time.perf_counter()
        while len(pairs[0]) < MAX_PAIRS // rounds:
            if len(pairs[0]) >= MIN_PAIRS and time.perf_counter() - begin > seconds / rounds:
                break
            for side in generator.permutation(2):
                sides[side].reset()
                pairs[side].append(
                    1e3 * _seconds(sides[side], feeds[side], calls[side]) / calls[side]
                )
        samples.append(pairs)
        left -= 1
    before, after = (np.concatenate([r[side] for r in samples]) for side in (0, 1))
    low, high = np.percentile(_resampled_ratios(samples, generator), [2.5, 97.5])
    ratio = Ratio(float(np.median(after) / np.median(before)), float(low), float(high))
    return _latency(before), _latency(after), ratio


def _resampled_ratios(
    samples: list[tuple[list[float], list[float]]], generator: np.random.Generator
) -> list[float]:
    """Ratios of medians over rounds drawn with replacement, and pairs drawn in each of them."""
    rounds = [(np.array(before), np.array(after)) for before, after in samples]
    ratios = []
    for _ in range(RESAMPLES):
        before, after = [], []
        for number in generator.integers(0, len(rounds), len(rounds)):
            one, two = rounds[number]
            picks = generator.integers(0, len(one), len(one))
            before.append(one[picks])
            after.append(two[picks])
        ratios.append(float(np.median(np.concatenate(after)) / np.median(np.concatenate(before))))
    return ratios


def _seconds(runner: Runner, feed: Feed, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        runner.run(feed)
    return time.perf_counter() - begin


def _latency(samples: np.ndarray[Any, np.dtype[np.float64]]) -> Latency:
    p5, median, p95 = np.percentile(samples, [5, 50, 95])
    return Latency(float(median), float(p5), float(p95), tuple(round(float(s), 6) for s in samples))


def total_bytes(files: Sequence[Path]) -> int:
    """Returns the size of all files of a model."""
    return sum(f.stat().st_size for f in files)


def gzip_bytes(files: Sequence[Path]) -> tuple[int, bool]:
    """Returns the size of a model's files after gzip (level 6), and whether it is an estimate.

    Above :data:`GZIP_EXACT_BYTES`, evenly spaced blocks are compressed and the result is scaled.
    """
    total = total_bytes(files)
    every = 1 if total <= GZIP_EXACT_BYTES else -(-total // GZIP_SAMPLE_BYTES)
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    packed = seen = 0
    for path in files:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, every * _BLOCK):
                file.seek(start)
                block = file.read(_BLOCK)
                packed += len(compressor.compress(block))
                seen += len(block)
    packed += len(compressor.flush())
    return (round(packed * total / seen) if seen else 0), every > 1


def sha256(files: Sequence[Path]) -> str:
    """Returns the SHA-256 over all files of a model, in the given order.

    A model that is one file has the same digest as the file.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    return digest.hexdigest()


def environment(threads: int) -> dict[str, Any]:
    """Describes the machine and the versions of everything that took part."""
    names = [
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "tensorflow",
        "tf2onnx",
        "keras",
        "tf_keras",
    ]
    versions = {n: getattr(sys.modules[n], "__version__", "?") for n in names if n in sys.modules}
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
