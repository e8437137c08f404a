"""Peak memory and time of pruning an LSTM of about 1 GiB with external data, against ``cp``.

Usage: python tests/benchmarks/large_model.py [--gib 1.0] [--runs 3] [--folder DIR] [-- OPTION …]

The model is made of seeded random numbers in a temporary folder. Each round copies it with ``cp``
and flushes the copy to disk, then prunes it in a process of its own and flushes that; the medians
and their ratio are printed with the process's peak resident memory (which counts mapped files).
Options after ``--`` go to ``rnnprune prune``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

HIDDEN = 4096


def make_model(folder: Path, gib: float) -> int:
    """Writes ``model.onnx`` and ``model.bin``; returns their size in bytes."""
    inputs = int(gib * 2**30 / 16 / HIDDEN) - HIDDEN
    shapes = {
        "W": (1, 4 * HIDDEN, inputs),
        "R": (1, 4 * HIDDEN, HIDDEN),
        "B": (1, 8 * HIDDEN),
    }
    generator = np.random.default_rng(0)
    tensors = []
    with (folder / "model.bin").open("wb") as file:
        for name, shape in shapes.items():
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            size = 4 * int(np.prod(shape))
            place = {"location": "model.bin", "offset": str(file.tell()), "length": str(size)}
            for key, value in place.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
            for _ in range(shape[1] if len(shape) == 3 else 1):
                row = generator.standard_normal(shape[-1], dtype=np.float32)
                (np.float32(0.01) * row).tofile(file)
            tensors.append(tensor)
    node = helper.make_node("LSTM", ["x", "W", "R", "B"], ["y"], name="lstm", hidden_size=HIDDEN)
    graph = helper.make_graph(
        [node],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["steps", 1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["steps", 1, 1, HIDDEN])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    return sum((folder / n).stat().st_size for n in ("model.onnx", "model.bin"))


def seconds(command: list[str], written: list[Path]) -> tuple[float, int]:
    """Runs a command and flushes its files; returns wall-clock seconds and peak memory in bytes."""
    for path in written:
        path.unlink(missing_ok=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(command)} failed")
    for path in written:
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("options", nargs="*", help="options of rnnprune prune, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size = make_model(folder, given.gib)
        copies = [folder / "copy.onnx", folder / "copy.bin"]
        outputs = [folder / "out.onnx", folder / "out.onnx.data"]
        prune = [sys.executable, "-m", "rnnprune_cli.cli", "prune", str(folder / "model.onnx")]
        prune += ["--sparsity", "0.7", "-o", str(outputs[0]), *given.options]
        rows = []
        for _ in range(given.runs + 1):
            copy = sum(
                seconds(["cp", str(folder / f"model.{end}"), str(folder / f"copy.{end}")], [path])[
                    0
                ]
                for end, path in zip(("onnx", "bin"), copies, strict=True)
            )
            rows.append((copy, *seconds(prune, outputs)))
        copy, took, peak = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"model {size / 2**30:.2f} GiB, {given.runs} runs after one warm-up")
    print(f"cp + flush     {copy:7.2f} s")
    print(f"rnnprune prune {took:7.2f} s   {took / copy:5.1f} x cp")
    print(f"peak memory    {peak / 2**30:7.2f} GiB {peak / size:5.2f} x the model")


if __name__ == "__main__":
    main()
