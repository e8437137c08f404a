"""Check every graph of this folder and write the table of `README.md`.

Each model must pass the check of onnx and, where onnxruntime has the operators, give the stored
outputs for the stored feed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import common
import numpy as np
import onnx
import onnxruntime

README = common.HERE / "README.md"
MARK = "<!-- table written by check.py -->"
MAX_BYTES = 35_000
MAX_TOTAL = 2_000_000


def load_arrays(name: str, kind: str) -> dict[str, np.ndarray]:
    """Load the stored feed (`input`) or outputs (`output`) of a graph."""
    with np.load(common.HERE / f"{name}.npz", allow_pickle=False) as data:
        return {key.split(":", 1)[1]: data[key] for key in data if key.startswith(f"{kind}:")}


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference, infinite where shapes or types differ."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if left.size == 0:
        return 0.0
    return float(np.max(np.abs(left.astype(np.float64) - right.astype(np.float64))))


def problems(name: str, entry: dict[str, Any]) -> list[str]:
    """Say what is wrong with a graph."""
    path = common.HERE / f"{name}.onnx"
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size} bytes")
    try:
        onnx.checker.check_model(path, full_check=entry["full_check"])
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found.append(f"checker: {error}")
    expected = load_arrays(name, "output")
    for key, array in expected.items():
        if not np.isfinite(array).all() or (array.size > 1 and np.ptp(array) < 1e-3):
            found.append(f"degenerate output {key}")
    model = onnx.load(path, load_external_data=False)
    if [o.name for o in model.graph.output] != list(expected):
        found.append("stored outputs are not those of the graph")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        actual = session.run(None, load_arrays(name, "input"))
    except Exception as error:
        return [*found, f"onnxruntime: {error}"] if entry["onnxruntime"] else found
    if not entry["onnxruntime"]:
        found.append("onnxruntime runs it although the index says no")
    for (key, array), got in zip(expected.items(), actual, strict=True):
        if (gap := difference(array, np.asarray(got))) > entry["atol"]:
            found.append(f"{key} differs by {gap:.2g}")
    return found


def origin_text(entry: dict[str, Any]) -> str:
    """How the weights of a recurrent node arrive, in words."""
    w, r = entry["W"], entry["R"]
    return str(w) if w == r else f"W {w}; R {r}"


def structure(entry: dict[str, Any]) -> str:
    """The recurrent nodes and loops of a graph, in words."""
    nodes = Counter(
        f"{node['op']} {node['direction']} in {node['where']}: {origin_text(node)}"
        for node in entry["recurrent"]
    )
    nodes.update(Counter(entry["loops"]))
    return "; ".join(f"{count}x {text}" for text, count in nodes.items()) or "no recurrent node"


def table(index: dict[str, dict[str, Any]]) -> str:
    """The table of graphs, one section for each exporter."""
    lines: list[str] = []
    for exporter in dict.fromkeys(entry["exporter"] for entry in index.values()):
        chosen = {name: e for name, e in index.items() if e["exporter"] == exporter}
        script = next(iter(chosen.values()))["script"]
        lines += ["", f"## {exporter} (`{script}`)", ""]
        lines += ["| graph | opset | idiom | recurrent nodes and where W and R come from |"]
        lines += ["|---|---|---|---|"]
        for name, entry in chosen.items():
            idiom = entry["idiom"] + ("" if entry["onnxruntime"] else " *Not in onnxruntime.*")
            opset = entry["opset"].get("ai.onnx", "")
            lines.append(f"| `{name}` | {opset} | {idiom} | {structure(entry)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check everything; the exit status is the number of graphs with a problem."""
    index = common.read_index()
    bad = 0
    for name, entry in index.items():
        for problem in problems(name, entry):
            bad += 1
            print(f"{name}: {problem}")
    files = {p.stem for p in common.HERE.glob("*.onnx")}
    if files != set(index):
        bad += 1
        print("files and index differ:", sorted(files ^ set(index)))
    total = sum(p.stat().st_size for p in common.HERE.iterdir() if p.is_file())
    if total > MAX_TOTAL:
        bad += 1
    print(f"{len(index)} graphs, {total} bytes, {bad} problems")
    head = README.read_text().split(MARK)[0]
    README.write_text(f"{head}{MARK}\n{table(index)}")
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
