"""The metric of every sample model by scope and sparsity, as the Markdown table of the README.

Usage: python tests/benchmarks/scopes.py
"""

from __future__ import annotations

from pathlib import Path

from rnnprune_cli.data import Dataset, load_dataset
from rnnprune_cli.load import load
from rnnprune_cli.metrics import BATCH, Evaluation
from rnnprune_cli.model import MetricValue, Runner, Stage, StoredWeight
from rnnprune_cli.pipeline import make_masks
from rnnprune_cli.select import SCOPES

SAMPLES = Path(__file__).parent.parent.parent / "sample_models"
MODELS = ("language.onnx", "speech.onnx", "timeseries.onnx", "medicine")
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def measure(runner: Runner, data: Dataset) -> MetricValue:
    """Returns the metric that ``prune`` reports."""
    evaluation = Evaluation(data, runner.outputs, "auto")
    for start, stop in data.batches(BATCH):
        evaluation.add(runner.run(data.feed(start, stop)), start, stop)
    return evaluation.value()


def main() -> None:
    """Prints the table."""
    print("| model, metric | scope | dense |", " | ".join(map(str, SPARSITIES)), "|")
    print("|---|---|---|" + "---|" * len(SPARSITIES))
    for name in MODELS:
        model = load(SAMPLES / name)
        original = model.open()
        data = load_dataset(SAMPLES / f"{Path(name).stem}.test.npz", original.inputs)
        dense = measure(original, data)
        arrow = "↑" if dense.higher_is_better else "↓"
        weights = {w.name: w for layer in model.layers for w in layer.weights}
        for method, scope in [*(("magnitude", s) for s in SCOPES), ("random", "row")]:
            figures = []
            for sparsity in SPARSITIES:
                stage = Stage(method, "weight", scope, sparsity)
                masks, _ = make_masks(model.layers, stage, 0, lambda step: None)
                stored = {n: StoredWeight(weights[n], mask) for n, mask in masks.items()}
                figures.append(measure(model.open_masked(stored), data).value)
            label = f"`{scope}`" if method == "magnitude" else "random"
            cells = " | ".join(f"{f:.3f}" for f in figures)
            title = f"{Path(name).stem}, {dense.name} {arrow}"
            print(f"| {title} | {label} | {dense.value:.3f} | {cells} |")


if __name__ == "__main__":
    main()
