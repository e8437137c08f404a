"""How much memory a model needs, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rnnprune_cli.model import Feed, LoadedModel

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TIMEOUT = 600


def peak_bytes(
    model: LoadedModel, feed: Feed, threads: int, providers: Sequence[str], signature: str | None
) -> int | str:
    """Opens a model in a new process and runs it once.

    Args:
        model: The model.
        feed: Input of a call.
        threads: To run it with.
        providers: Of onnxruntime.
        signature: Of a SavedModel.

    Returns:
        Bytes that the process needed at most, beyond those that it had before it opened the model;
        or why they are not known.
    """
    with tempfile.TemporaryDirectory(prefix="rnnprune-") as folder:
        feed_file = Path(folder) / "feed.npz"
        np.savez(feed_file, *feed.values())
        kind, path = model.format, str(model.path)
        given = json.dumps([kind, path, str(feed_file), [*feed], threads, [*providers], signature])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "rnnprune_cli.memory", given],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=True,
            )
            return int(done.stdout.split()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return said[-1][:200] if said else type(error).__name__


def _main() -> None:
    kind, path, feed_file, names, threads, providers, signature = json.loads(sys.argv[1])
    with np.load(feed_file, allow_pickle=False) as arrays:
        feed = dict(zip(names, arrays.values(), strict=True))
    if kind == "onnx":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        before = _forgotten()
        session = ort.InferenceSession(path, options, providers=providers)
        session.run(None, feed)
    else:
        from rnnprune_cli.tensorflow.runtime import Program, TensorFlowRunner, set_threads
        from rnnprune_cli.tensorflow_model import load

        set_threads(threads)
        before = _forgotten()
        if kind == "savedmodel":
            program = Program.load(Path(path), signature, Path(path))
            TensorFlowRunner(program, frozenset(), {}).run(feed)
        else:
            load(Path(path), signature, threads).open(threads).run(feed)
    print(_peak() - before)


def _forgotten() -> int:
    """Makes the kernel forget the peak so far, where it can; returns what is in use now."""
    if not _FORGET.exists():
        return _peak()
    _FORGET.write_text("5")  # proc(5): resets the peak resident set size
    return _field("VmRSS")


def _peak() -> int:
    if _STATUS.exists():
        return _field("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(name: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} has no {name}")


if __name__ == "__main__":
    _main()
