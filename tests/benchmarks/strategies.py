"""The metric of sample models by criterion, scope, granularity and sparsity: the README's tables.

Usage: python tests/benchmarks/strategies.py [language speech timeseries medicine]

Without training. Criteria and refit see the calibration set, the metric is of the test set.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from rnnprune_cli.apply import Applied
from rnnprune_cli.methods import methods
from rnnprune_cli.metrics import Quality
from rnnprune_cli.model import Stage
from rnnprune_cli.options import PruneOptions, complete_stage
from rnnprune_cli.select import SCOPES
from rnnprune_cli.sensitivity import runner_of
from rnnprune_cli.session import opened

SAMPLES = Path(__file__).parent.parent.parent / "sample_models"
FILES = {"language": "language.onnx", "speech": "speech.onnx", "timeseries": "timeseries.onnx"}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
GRANULARITIES = ("block:8x1", "block:16x1", "bank:32", "nm:2:4")


def strategies() -> Iterator[tuple[str, str, str, tuple[bool, ...]]]:
    """Yields (method, granularity, scope, whether what stays is refitted: each of these)."""
    known = [name for name, method in methods().items() if method.weight is not None]
    for name, scope in itertools.product(known, SCOPES):
        if name != "random":
            yield name, "weight", scope, (False, True)
        elif scope == "cell":
            yield name, "weight", scope, (False,)
    for granularity, name in itertools.product(GRANULARITIES, ("magnitude", "obs")):
        scope = "cell" if granularity.startswith("block") else "row"
        yield name, granularity, scope, (True,)


def measure(name: str) -> None:
    """Prints the rows of one model."""
    model = SAMPLES / FILES.get(name, name)
    data, calibration = (SAMPLES / f"{name}.{part}.npz" for part in ("test", "calibration"))
    options = PruneOptions(
        model, None, (Stage("magnitude", "weight", "row", 0.0),), 0, data, calibration
    )
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(opened(options, "onnx", lambda step: None))
        assert session.inputs.data is not None
        quality = Quality(session.inputs.original, session.inputs.data, "auto")
        (dense,) = quality.dense
        arrow = "↑" if dense.higher_is_better else "↓"
        print(f"| {name}, {dense.name} {arrow} (dense {dense.value:.3f}) | scope |", end=" ")
        print(" | ".join(map(str, SPARSITIES)), "|")
        print("|---|---|" + "---|" * len(SPARSITIES))
        for method, granularity, scope, both in strategies():
            cells = []
            for sparsity in SPARSITIES:
                fixed = granularity.startswith("nm")
                if fixed and sparsity != 0.5:
                    cells.append("")
                    continue
                figures = []
                for refitted in both:
                    asked = None if fixed else sparsity
                    stage = complete_stage(method, granularity, scope, asked, compensate=refitted)
                    applied = session.applier.add(Applied(session.base), stage)
                    (value,) = quality.of(runner_of(applied, 1))
                    figures.append(f"{value.value:.3f}")
                cells.append(" / ".join(figures))
            what = f"`{method}`" + (f" `{granularity}`" if granularity != "weight" else "")
            what += " refitted" if both == (True,) else ""
            print(f"| {what} | `{scope}` | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the tables."""
    for name in sys.argv[1:] or [*FILES, "medicine"]:
        measure(name)


if __name__ == "__main__":
    main()
