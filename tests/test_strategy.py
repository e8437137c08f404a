"""Several devices, and several processes, give what one gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning import inputs, network, stored, tune
from workers import cases

from rnnprune_cli import cluster
from rnnprune_cli.cluster import Worker, worker
from rnnprune_cli.errors import RnnpruneError, UsageError

TESTS = Path(__file__).parent
STRATEGIES = {"single": (1, 1), "mirrored": (2, 1), "multiworker": (1, 2)}
"""Name → devices of a process, and processes."""
CHAOTIC = ("diverging",)
"""Cases in which a difference of one bit becomes one of everything."""
Found = dict[str, tuple[Path, dict[str, Any]]]


def ports(count: int) -> list[int]:
    """Ports that nobody uses."""
    opened = [socket.create_server(("localhost", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return found


def started(command: Sequence[object], count: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Starts a command on several workers, each in a folder of its own."""
    addresses = [f"localhost:{port}" for port in ports(count)]
    processes = []
    for k in range(count):
        task = {"type": "worker", "index": k}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
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
    folders = {name: tmp_path_factory.mktemp(name) for name in STRATEGIES}
    running = {
        name: started([TESTS / "workers.py", ".", name, devices], count, folders[name])
        for name, (devices, count) in STRATEGIES.items()
    }
    results = {}
    for name, processes in running.items():
        outs = [process.communicate(timeout=600) for process in processes]
        assert not any(p.returncode for p in processes), outs
        figures, *others = [json.loads(out) for out, _ in outs]
        own = folders[name]
        results[name] = {k: (own / "worker0" / f"{k}.onnx", v) for k, v in figures.items()}
        for number, other in enumerate(others, 1):
            assert all("the first one writes" in text for text in other.values())
            left = {p.name for p in (own / f"worker{number}").iterdir() if p.suffix != ".npz"}
            assert left == {"model.onnx"}  # the input
    return results


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_the_same_comes_out(found, strategy, name):
    (one, wanted), (two, given) = found["single"][name], found[strategy][name]
    assert given["best"] == wanted["best"]
    assert given["rollbacks"] == wanted["rollbacks"]
    if name in CHAOTIC:
        assert given["rollbacks"] > 0
        return
    np.testing.assert_allclose(given["losses"], wanted["losses"], rtol=1e-4)
    before, after = stored(one), stored(two)
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert np.array_equal(array == 0, after[key] == 0)
        np.testing.assert_allclose(after[key], array, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_after_a_worker_was_killed(tmp_path):
    (tmp_path / "model.onnx").write_bytes(network().SerializeToString())
    np.savez(tmp_path / "x.npz", x=inputs())
    out = tmp_path / "out.onnx"
    state = tmp_path / "out.onnx.training" / "weights.npz"
    command = ["-m", "rnnprune_cli.cli", "prune", tmp_path / "model.onnx", "-o", out]
    command += ["-s", "0.5", "--no-compensate", "--train", tmp_path / "x.npz", "--format", "json"]
    command += ["--finetune", "500", "--patience", "1000", "--strategy", "multiworker"]

    chief, helper = started(command, 2, tmp_path)
    _wait(state, 0)
    helper.kill()
    _, told = chief.communicate(timeout=120)
    helper.communicate()
    assert chief.returncode == 3 and not out.exists()
    assert "another worker does not answer" in told and "--resume" in told

    before = state.stat().st_mtime_ns
    chief, helper = started([*command, "--resume"], 2, tmp_path)
    _wait(state, before)
    helper.send_signal(signal.SIGINT)  # ends all of them
    document, _ = chief.communicate(timeout=120)
    nothing, told = helper.communicate(timeout=120)
    assert (chief.returncode, helper.returncode) == (0, 0)
    assert nothing == "" and "the first one writes the model" in told
    log = json.loads(document)["finetune"]
    assert log["stopped"].startswith("interrupted") and log["steps"] > 4 and out.exists()


def _wait(state: Path, before: int) -> None:
    """Waits for a checkpoint that is newer."""
    end = time.monotonic() + 120
    while not state.exists() or state.stat().st_mtime_ns <= before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_states_that_are_handed_on_cannot_be_shared_out(tmp_path):
    model = network(states=True, last=True)
    zero = np.zeros((9, 1, 1, 8), np.float32)
    given = {value.name: zero for value in model.graph.input} | {"x": inputs(9)[:, None]}
    with pytest.raises(UsageError, match="only one device can do"):
        tune(tmp_path, model, given, strategy="mirrored", epochs=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "needs the environment variable TF_CONFIG"),
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"task": {"type": "worker", "index": 0}}', "cannot be read"),
        ('{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', "no 'ps'"),
        ('{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}', "cannot be"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "not in"),
    ],
)
def test_what_tf_config_must_say(tmp_path, monkeypatch, config, message):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UsageError, match=message) as error:
        tune(tmp_path, network(), {"x": inputs()}, strategy="multiworker", epochs=1)
    assert "TF_CONFIG=" in error.value.hint


def test_the_chief_is_the_first_one(monkeypatch):
    workers = {"worker": ["a:1", "b:2"], "chief": ["c:3"]}
    config = {"cluster": workers, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert worker() == Worker(("c:3", "a:1", "b:2"), 1)


def test_workers_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(cluster, "WAIT", 0.2)
    one, two = ports(2)
    own = Worker((f"localhost:{one}", f"localhost:{two}"), 0)
    with pytest.raises(RnnpruneError, match=f"worker 1 at localhost:{two} does not answer"):
        own.meet(lambda step: None)
    with socket.create_server(("", one)), pytest.raises(UsageError, match=f"port {one}, which"):
        own.meet(lambda step: None)
