"""Fine-tuning that is killed, or interrupted, goes on to the same bytes as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run
from test_cli import RNNPRUNE
from tuning import inputs, network, tune

from rnnprune_cli.errors import RnnpruneError, UsageError

TRAIN = {"x": inputs(20)}
HELD = {"x": inputs(9, seed=9)}
MODES: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "polynomial": {"schedule": "polynomial"},
    "fading": {"schedule": "polynomial", "granularity": "unit"},
    "states": {},
    "diverging": {"lr": 1.0, "clip": 1e6},
    "patient": {"lr": 10.0, "patience": 1, "epochs": 9, "sparsity": 0.1},
}
AFTER = "comparing the models' outputs"
"""What is said when training is over, and the model is written, but not yet in its place."""
DRIVER = """
import json, os, signal, sys, traceback

sys.path.insert(0, sys.argv[1])
mode, folder, moments, how = json.loads(sys.argv[2])
from pathlib import Path
from test_finetune_resume import settings
from tuning import tune
from rnnprune_cli.tensorflow.runtime import import_tensorflow
from rnnprune_cli.trainer import checkpoint, finetune  # once, for all children

folder = Path(folder)


def work(name, told, resume):
    save, fsync = checkpoint.save, os.fsync
    def saving(*given):
        save(*given)
        told("saved")
    def syncing(*given):
        told("written")
        fsync(*given)
    checkpoint.save, os.fsync = saving, syncing
    model, arrays = settings(mode)
    tune(folder, model, name=name, resume=resume, told=told, **arrays)


def child(name, told=lambda what: None, resume=True):
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work(name, told, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stopped(number, what, how):
    '''Stops a child when it has said something so many times; returns how it ended.'''
    read, write = os.pipe()
    if how == "itself":
        left = [number]
        def told(said):
            left[0] -= said == what
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    else:
        def told(said):
            if said == what:
                os.write(write, b".")
    process = child("killed", told)
    os.close(write)
    while number and os.read(read, 1):
        number -= 1
    if number == 0:
        os.kill(process, signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    os.close(read)
    return ended(process)


assert ended(child("whole", resume=False)) == 0
finetune.CHECKPOINT_SECONDS = -1.0  # a checkpoint after each update
codes = [stopped(number, what, how) for number, what in moments]
left = sorted(p.name for p in folder.iterdir())
codes.append(ended(child("killed")))
print(json.dumps([codes, left]))
"""


def settings(mode: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model, and what :func:`tune` is given besides."""
    states = mode == "states"
    model = network(states=states)
    train, held = dict(TRAIN), dict(HELD)
    if states:
        for arrays in (train, held):
            count = len(arrays["x"])
            arrays["x"] = arrays["x"]
            arrays |= {f"state_{s}": np.zeros((count, 1, 1, 8), np.float32) for s in "hc"}
            arrays["x"] = arrays["x"][:, None]
    same = {"train": train, "validation": held, "epochs": 4, "batch": 4, "lr": 0.01}
    return model, {"compensate": False, **same, **MODES[mode]}


def driven(folder: Path, mode: str, moments: list[tuple[int, str]], how: str) -> tuple[list, list]:
    """Stops a run at some moments of its parts; returns how each ended, and what files were left."""
    arguments = json.dumps([mode, str(folder), moments, how])
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(Path(__file__).parent), arguments],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes, left = json.loads(done.stdout.splitlines()[-1])
    assert codes[-1] == 0, done.stderr[-3000:]
    return codes[:-1], left


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path, mode):
    """Wherever a run is when it is killed: between two checkpoints, or while it writes one."""
    moments = [(2, "saved"), (1, "written"), (7, "written"), (1, AFTER)]
    codes, left = driven(tmp_path, mode, moments, "itself")
    assert codes == [-signal.SIGKILL] * len(moments)
    assert "killed.onnx.training" in left and "killed.onnx" not in left
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not (tmp_path / "killed.onnx.training").exists()
    assert not (tmp_path / "whole.onnx.training").exists()


def test_ten_kills_from_outside_change_no_byte(tmp_path):
    moments = [(1 + k % 3, "saved") for k in range(10)]
    codes, _ = driven(tmp_path, "one-shot", moments, "outside")
    assert set(codes) <= {-signal.SIGKILL, 0} and codes[0] == -signal.SIGKILL
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


@pytest.mark.parametrize("mode", ["one-shot", "fading"])
def test_an_interrupt_keeps_the_best_and_the_state(tmp_path, mode):
    codes, left = driven(tmp_path, mode, [(3, "saved"), (4, "saved")], "interrupt")
    assert codes == [0, 0]
    assert {"killed.onnx", "killed.onnx.training"} <= set(left)
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not (tmp_path / "killed.onnx.training").exists()
