"""Removes units from any number of random graphs, and counts what went wrong and what blocks.

python tests/benchmarks/units.py [FIRST] [LAST]
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutate import session
from random_graphs import random_graph
from units_check import distance, remove

TOLERANCE = 1e-5


def main(first: int, last: int) -> None:
    seen, untouched, reasons = Counter[str](), Counter[str](), Counter[str]()
    failed = 0
    for seed in range(first, last):
        graph = random_graph(seed)
        seen.update(graph.patterns)
        blocking = any(name.startswith("block:") for name in graph.patterns)
        try:
            found = remove(
                graph.model, (0.25, 0.5, 0.75)[seed % 3], seed, ("layer", "global")[seed % 2]
            )
            if not blocking:
                reasons.update(
                    why.split("'")[0] + why.split("'")[-1] for why in found.blocked.values()
                )
            if found.shrunk is None or found.masked is None:
                untouched.update(graph.patterns)
                continue
            onnx.checker.check_model(found.shrunk, full_check=True)
            models = [graph.masked(found.kept), found.masked, found.shrunk]
            for feed in graph.feeds:
                oracle, masked, shrunk = (session(model).run(None, feed) for model in models)
                worst = max(distance(oracle, masked), distance(oracle, shrunk))
                if worst > TOLERANCE:
                    raise AssertionError(f"differs by {worst:.1e}")
        except Exception as error:  # whatever goes wrong is counted
            failed += 1
            print(seed, graph.patterns, type(error).__name__, str(error)[:300], sep="\n  ")
    print(f"{last - first} graphs, {failed} failed")
    for name, count in sorted(seen.items()):
        print(f"{name:28}{count:7}{untouched[name]:7} untouched")
    for reason, count in reasons.most_common():
        print(f"{count:7}  {reason}")


if __name__ == "__main__":
    given = [int(a) for a in sys.argv[1:]]
    main(given[0] if given else 0, given[1] if len(given) > 1 else 2000)
