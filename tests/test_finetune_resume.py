"""Fine-tuning that is killed, or interrupted, goes on to the same bytes as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
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
    "states": {"noise": 0.1},
    "diverging": {"lr": 1.0, "clip": 1e6},
    "patient": {"lr": 0.03, "epochs": 3, "patience": 1},
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
    """Stops a run at some moments; returns how each part ended, and what files were left."""
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
    moments = [(2, "saved"), (7, "written"), (1, AFTER)]
    moments = {"patient": moments[2:], "diverging": moments[1:2]}.get(mode, moments)
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


class EnoughError(Exception):
    """Ends a run like a crash."""


def crashed(folder: Path, epoch: int = 2, **more: Any) -> Path:
    """Lets a run end in the middle; returns its checkpoint."""

    def told(step: str) -> None:
        if step.startswith(f"epoch {epoch}: measuring"):
            raise EnoughError

    with pytest.raises(EnoughError):
        tune(folder, network(), TRAIN, validation=HELD, epochs=3, batch=8, told=told, **more)
    return folder / "out.onnx.training" / "weights.npz"


def test_a_state_is_not_ignored_by_accident(tmp_path):
    checkpoint = crashed(tmp_path)
    before = checkpoint.read_bytes()
    same = {"validation": HELD, "epochs": 3, "batch": 8}
    with pytest.raises(UsageError, match="holds a run that was interrupted") as caught:
        tune(tmp_path, network(), TRAIN, **same)
    assert "--resume" in caught.value.hint and "--force" in caught.value.hint
    assert checkpoint.read_bytes() == before
    tune(tmp_path, network(), TRAIN, force=True, **same)
    assert not checkpoint.parent.exists()


OTHERS = {
    "rate": {"lr": 0.002},
    "seed": {"seed": 1},
    "sparsity": {"sparsity": 0.6},
    "schedule": {"schedule": "constant"},
    "data": {"train": {"x": inputs(20, seed=77)}},
    "labels": {
        "train": TRAIN | {"labels": np.zeros((20, 6), int)},
        "validation": HELD | {"labels": np.zeros((9, 6), int)},
    },
    "validation": {"validation": {"x": inputs(9, seed=78)}},
    "frozen": {"freeze": ("rnn",)},
    "model": {"model": network(seed=3)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_run_is_refused(tmp_path, name):
    checkpoint = crashed(tmp_path)
    given: dict[str, Any] = {
        "model": network(), "train": TRAIN, "validation": HELD, "epochs": 3, "batch": 8
    }  # fmt: skip
    with pytest.raises(RnnpruneError, match="other options, another model or other data") as caught:
        tune(tmp_path, **{**given, **OTHERS[name]}, resume=True)
    assert str(checkpoint) in caught.value.message
    assert "--resume" in caught.value.hint and "--force" in caught.value.hint
    assert checkpoint.exists() and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("how", ["short", "empty", "text", "one byte", "no arrays"])
def test_a_damaged_state_is_refused(tmp_path, how):
    checkpoint = crashed(tmp_path)
    whole = checkpoint.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "short": whole[:middle],
        "empty": b"",
        "text": b"no archive",
        "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    if how == "no arrays":
        with zipfile.ZipFile(checkpoint) as archive:
            text = archive.read("json")
        with zipfile.ZipFile(checkpoint, "w") as archive:
            archive.writestr("json", text)
    else:
        checkpoint.write_bytes(damaged[how])
    with pytest.raises(RnnpruneError, match="cannot be read") as caught:
        tune(
            tmp_path, network(), TRAIN, validation=HELD, epochs=3, batch=8, resume=True
        )  # fmt: skip
    assert "--force" in caught.value.hint
    assert not (tmp_path / "out.onnx").exists()


def test_what_does_not_matter_may_change_when_a_run_goes_on(tmp_path):
    report = tune(tmp_path, network(), TRAIN, name="whole", validation=HELD, epochs=3, batch=8)
    crashed(tmp_path)
    again = tune(
        tmp_path, network(), TRAIN, validation=HELD, epochs=3, batch=8, resume=True,
        logdir=tmp_path / "logs",
    )  # fmt: skip
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert any((tmp_path / "logs").iterdir())  # what is in there: see test_finetune
    for one, two in zip(report.finetune.epochs, again.finetune.epochs, strict=True):
        assert (one.loss, one.validation_loss, one.drop) == (
            two.loss,
            two.validation_loss,
            two.drop,
        )


def test_nothing_to_resume_is_a_new_run(tmp_path):
    same = {"validation": HELD, "epochs": 2, "batch": 8}
    tune(tmp_path, network(), TRAIN, name="whole", **same)
    tune(tmp_path, network(), TRAIN, resume=True, **same)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_control_c_writes_the_best_so_far_and_exits_with_zero(tmp_path):
    model, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model.write_bytes(network().SerializeToString())
    for name, arrays in (("train", TRAIN), ("held", HELD)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    command = [
        *RNNPRUNE, "prune", model, "-s", "0.5", "--finetune", "100000", "--patience", "100000",
        "--train", tmp_path / "train.npz", "--validation", tmp_path / "held.npz", "-o", out,
        "--verbose", "--format", "json",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "epoch 3" in line:
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    document = json.loads(output)
    log = document["finetune"]
    assert log["stopped"].startswith("interrupted in epoch ")
    assert any("go on with --resume" in warning for warning in document["warnings"])
    assert 2 <= len(log["epochs"]) < 100000 and log["best"] <= len(log["epochs"])
    assert run(out, HELD) and (tmp_path / "out.onnx.training" / "weights.npz").exists()
