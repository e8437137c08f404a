"""Several devices, and several processes, give what one gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning import stored
from workers import cases

TESTS = Path(__file__).parent
SAME = {"rtol": 1e-5, "atol": 1e-6}
Found = dict[str, tuple[Path, dict[str, Any]]]


def ports(count: int) -> list[int]:
    """Ports that nobody uses."""
    opened = [socket.create_server(("localhost", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return found


def started(
    command: Sequence[object], count: int, folder: Path
) -> list[subprocess.Popen[str]]:
    """Starts a command on several workers, each in a folder of its own."""
    cluster = {"worker": [f"localhost:{port}" for port in ports(count)]}
    processes = []
    for k in range(count):
        task = {"type": "worker", "index": k}
        config = json.dumps({"cluster": cluster, "task": task})
        own = folder / f"worker{k}"
        own.mkdir(exist_ok=True)
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, "TF_CONFIG": config},
                cwd=own,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What each strategy came to: name of a case → output, and figures."""
    results = {}
    for name, devices, count in (("single", 1, 1), ("mirrored", 2, 1), ("multiworker", 1, 2)):
        folder = tmp_path_factory.mktemp(name)
        processes = started([TESTS / "workers.py", ".", name, devices], count, folder)
        outs = [process.communicate(timeout=300) for process in processes]
        assert [p.returncode for p in processes] == [0] * count, outs[0][1]
        figures, *others = [json.loads(out) for out, _ in outs]
        results[name] = {k: (folder / "worker0" / f"{k}.onnx", v) for k, v in figures.items()}
        for number, other in enumerate(others, 1):
            assert all("the first one writes" in text for text in other.values())
            left = sorted(p.suffix for p in (folder / f"worker{number}").iterdir())
            assert set(left) == {".npz", ".onnx"} and left.count(".onnx") == 1  # the input
    return results


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_the_same_comes_out(found, strategy, name):
    (one, wanted), (two, given) = found["single"][name], found[strategy][name]
    assert given["best"] == wanted["best"]
    assert given["rollbacks"] == wanted["rollbacks"]
    np.testing.assert_allclose(given["losses"], wanted["losses"], rtol=1e-4)
    before, after = stored(one), stored(two)
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert np.array_equal(array == 0, after[key] == 0)
        np.testing.assert_allclose(after[key], array, **SAME)
