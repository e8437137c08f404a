"""Do the ratios of ``bench`` agree with a timing loop that shares nothing with it?

    python tests/benchmarks/agreement.py a.onnx b.onnx --data test.npz

The loop knows onnxruntime and a clock: some seconds of one model, then of the other, several times,
each in one session; its ratio is that of the medians of all calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

TURNS, SECONDS = 6, 1.0


def calls(
    session: ort.InferenceSession, feed: dict[str, np.ndarray], seconds: float
) -> list[float]:
    """Times single calls for some seconds."""
    session.run(None, feed)
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        session.run(None, feed)
        taken.append(time.perf_counter() - begin)
    return taken


def loop(paths: list[Path], data: Path) -> float:
    """Returns how long the second model takes, divided by the first."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [ort.InferenceSession(str(p), options, ["CPUExecutionProvider"]) for p in paths]
    with np.load(data) as arrays:
        names = [i.name for i in sessions[0].get_inputs()]
        feed = {name: arrays[name if name in arrays else "x"][:1] for name in names}
    taken: list[list[float]] = [[] for _ in paths]
    for _ in range(TURNS):
        for session, own in zip(sessions, taken, strict=True):
            own += calls(session, feed, SECONDS)
    return float(np.median(taken[1]) / np.median(taken[0]))


def main() -> None:
    """Prints both ratios and how far they are apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    command = [sys.executable, "-m", "rnnprune_cli.cli", "bench", *map(str, options.models)]
    command += ["--data", str(options.data), "--format", "json"]
    for _ in range(options.times):
        plain = loop(options.models, options.data)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        held = json.loads(done.stdout)["ratios"][0]["latency"]
        print(
            f"loop {plain:.4f}, bench {held['median']:.4f} [{held['low']:.4f}, {held['high']:.4f}]:"
            f" {100 * (held['median'] / plain - 1):+.2f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
