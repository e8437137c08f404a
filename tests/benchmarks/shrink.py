"""What removing hidden units costs and brings, as the Markdown tables of the README.

Usage: python tests/benchmarks/shrink.py [--method obs]

For every sample model: the metric on its test set and the latency (batch 1, one thread, interleaved
with the original), for shares of units removed, with and without the repair, which sees the
calibration set only. Then the latency of one large layer, whose weights are random. Medicine is
converted to ONNX first, which needs the extra ``tensorflow``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rnnprune_cli.model import GATES, Report, Stage
from rnnprune_cli.options import PruneOptions
from rnnprune_cli.pipeline import prune

SAMPLES = Path(__file__).parent.parent.parent / "sample_models"
MODELS = ("language.onnx", "speech.onnx", "timeseries.onnx", "medicine")
SHARES = (0.25, 0.5, 0.75)
HIDDEN, INPUTS, STEPS = 512, 64, 100


def pruned(model: Path, stage: Stage, folder: Path, data: bool) -> Report:
    """Prunes a model and returns the report."""
    test, calibration = (SAMPLES / f"{model.stem}.{part}.npz" for part in ("test", "calibration"))
    options = PruneOptions(
        model=model,
        output=folder / "out.onnx",
        stages=(stage,),
        data=test if data else None,
        calibration=calibration if data else None,
        force=True,
        latency_seconds=2.0,
    )
    return prune(options, {}, lambda step: None)


def large(op: str) -> onnx.ModelProto:
    """Returns one layer of many units and a small head."""
    rng = np.random.default_rng(0)
    rows = GATES[op] * HIDDEN  # type: ignore[index]
    arrays = {
        "W": rng.standard_normal((1, rows, INPUTS)) / np.sqrt(INPUTS),
        "R": rng.standard_normal((1, rows, HIDDEN)) / np.sqrt(HIDDEN),
        "B": 0.1 * rng.standard_normal((1, 2 * rows)),
        "D": rng.standard_normal((HIDDEN, 32)) / np.sqrt(HIDDEN),
    }
    nodes = [
        helper.make_node(op, ["x", "W", "R", "B"], ["y"], name="rnn", hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["y", "axes"], ["steps"]),
        helper.make_node("MatMul", ["steps", "D"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", 1, [STEPS, "batch", INPUTS])],
        [helper.make_tensor_value_info("out", 1, [STEPS, "batch", 32])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
        + [numpy_helper.from_array(np.array([1]), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="obs")
    method = parser.parse_args().method
    shares = " | ".join(f"{share:.0%}" for share in SHARES)
    print(f"| model, metric | | dense | {shares} |")
    print("|---|---|---|" + "---|" * len(SHARES))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in MODELS:
            model = SAMPLES / name
            if model.is_dir():  # compared with its conversion, not with TensorFlow
                stage = Stage("magnitude", "weight", "row", 0.0)
                converted = folder / f"{name}.onnx"
                prune(PruneOptions(model, converted, (stage,)), {}, lambda step: None)
                model = converted
            rows: dict[str, list[str]] = {"cut only": [], "repaired": [], "latency": [], "size": []}
            dense, title = "", ""
            for share in SHARES:
                for label, repair in (("cut only", False), ("repaired", True)):
                    stage = Stage(method, "unit", "layer", share, compensate=repair)
                    report = pruned(model, stage, folder, data=True)
                    before, after = report.before.metric, report.after.metric
                    assert before is not None and after is not None
                    change = (after.value / before.value - 1) * 100
                    rows[label].append(f"{after.value:.3f} ({change:+.1f} %)")
                    dense = f"{before.value:.3f}"
                    arrow = "↑" if before.higher_is_better else "↓"
                    title = f"{model.stem}, {before.name} {arrow}"
                assert report.ratios.latency is not None
                rows["latency"].append(f"{1 / report.ratios.latency.median:.1f} times faster")
                rows["size"].append(f"{report.ratios.bytes:.2f}")
            for label, cells in rows.items():
                first = dense if label in ("cut only", "repaired") else "1"
                print(f"| {title} | {label} | {first} | {' | '.join(cells)} |", flush=True)
        print(f"\n| {HIDDEN} units, {INPUTS} inputs, {STEPS} steps | {shares} |")
        print("|---|" + "---|" * len(SHARES))
        for op in GATES:
            path = folder / f"{op}.onnx"
            onnx.save(large(op), str(path))
            cells = []
            for share in SHARES:
                stage = Stage("magnitude", "unit", "layer", share)
                ratio = pruned(path, stage, folder, data=False).ratios.latency
                assert ratio is not None
                cells.append(f"{1 / ratio.median:.1f}")
            print(f"| {op} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
