"""Do the intervals of ``bench`` keep their word on a noisy machine, and the alarms of ``check``?

    python tests/benchmarks/noise.py sample_models/language.onnx --runs 100

runs ``rnnprune bench x.onnx x.onnx`` many times while another process keeps one core busy, and
counts

- how often the 95 % interval holds 1.0, and by how much the ratio is off,
- how often ``check --baseline`` raises an alarm between two runs (there is nothing to find),
- how often it finds a slowdown: the same run with the second model's samples made slower.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

COMMAND = [sys.executable, "-m", "rnnprune_cli.cli"]


def busy() -> None:
    """Keeps a core busy."""
    while True:
        pass


def slower(report: dict[str, Any], factor: float) -> dict[str, Any]:
    """Returns a report whose second model took that much longer in every sample."""
    changed = copy.deepcopy(report)
    name = changed["models"][1]["name"]
    places = [changed["models"][1], *(t for t in changed["timings"] if t["model"] == name)]
    for place in places:
        own = place["latency_ms"]
        own["samples"] = [factor * sample for sample in own["samples"]]
        for figure in ("median", "p5", "p95", "p99"):
            own[figure] *= factor
    for ratio in changed["ratios"]:
        ratio["latency"] = {k: factor * v for k, v in ratio["latency"].items()}
    return changed


def alarm(new: dict[str, Any], old: dict[str, Any], folder: Path) -> bool:
    """Tells whether ``check`` finds a regression."""
    for name, report in (("new", new), ("old", old)):
        (folder / f"{name}.json").write_text(json.dumps(report))
    files = [str(folder / "new.json"), "--baseline", str(folder / "old.json")]
    done = subprocess.run([*COMMAND, "check", *files], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return done.returncode == 1


def main() -> None:
    """Runs the experiment and prints what was counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--slowdown", type=float, default=1.1)
    parser.add_argument("--idle", action="store_true", help="Load no core.")
    parser.add_argument("--save", type=Path, help="Keep the reports there.")
    options = parser.parse_args()
    load = multiprocessing.Process(target=busy, daemon=True)
    if not options.idle:
        load.start()
    reports, held, seconds = [], 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = options.save or Path(name)
        folder.mkdir(exist_ok=True)
        for number in range(options.runs):
            path, begin = folder / f"{number}.json", time.perf_counter()
            if not path.exists():
                model, seed = str(options.model), str(number)
                files = ["bench", model, model, "--seed", seed, "--report", str(path)]
                subprocess.run([*COMMAND, *files], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
            reports.append(json.loads(path.read_text()))
            ratio = reports[-1]["ratios"][0]["latency"]
            held += ratio["low"] <= 1 <= ratio["high"]
            print(
                f"{number}: {ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"
                f" in {seconds[-1]:.1f} s",
                flush=True,
            )
        pairs = [*zip(reports[1:], reports, strict=False), (reports[0], reports[-1])]
        false = sum(alarm(new, old, folder) for new, old in pairs)
        found = sum(alarm(slower(new, options.slowdown), old, folder) for new, old in pairs)
    off = [abs(report["ratios"][0]["latency"]["median"] - 1) for report in reports]
    print(
        f"of {options.runs} runs ({np.median(seconds):.1f} s each), {held} intervals hold 1.0;"
        f" ratios are off by {100 * np.median(off):.2f} % (median), {100 * max(off):.2f} % (most)"
    )
    print(
        f"of {len(pairs)} comparisons with a baseline, {false} raise a false alarm; of as many"
        f" {100 * (options.slowdown - 1):.0f} % slowdowns {found} are found"
    )


if __name__ == "__main__":
    main()
