"""How much memory a model needs, measured in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnnprune_cli.model import Feed, LoadedModel

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TIMEOUT = 600
_TOGETHER = 2


@dataclass(frozen=True, eq=False)
class Call:
    """A model, and how to call it.

    Attributes:
        model: The model.
        feed: Input of a call.
        threads: To run it with.
        providers: Of onnxruntime.
        signature: Of a SavedModel that has several.
    """

    model: LoadedModel
    feed: Feed
    threads: int
    providers: Sequence[str]
    signature: str | None


def peaks(calls: Sequence[Call]) -> list[int | str]:
    """Opens each model in a new process and runs it once; two at a time.

    Returns:
        For each, bytes that the process needed at most, beyond those that it had before it opened
        the model; or why they are not known.
    """
    found: list[int | str] = []
    with tempfile.TemporaryDirectory(prefix="rnnprune-") as folder, contextlib.ExitStack() as all_:
        running: deque[subprocess.Popen[str]] = deque()
        for number, call in enumerate(calls):
            if len(running) == _TOGETHER:
                found.append(_said(running.popleft()))
            process = all_.enter_context(_started(call, Path(folder) / f"{number}.npz"))
            all_.callback(process.kill)  # if this process is interrupted
            running.append(process)
        found += [_said(process) for process in running]
    return found


def _started(call: Call, feed_file: Path) -> subprocess.Popen[str]:
    np.savez(feed_file, *call.feed.values())
    kind, path, names = call.model.format, str(call.model.path), [*call.feed]
    given = [kind, path, str(feed_file), names, call.threads, [*call.providers], call.signature]
    command = [sys.executable, "-m", "rnnprune_cli.memory", json.dumps(given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _said(process: subprocess.Popen[str]) -> int | str:
    """Waits for a process, and returns what it has found, or the end of what it complained of."""
    try:
        output, errors = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"it took longer than {_TIMEOUT} s"
    if process.returncode == 0 and (words := output.split()):
        return int(words[-1])
    lines = errors.strip().splitlines()
    return lines[-1][:200] if lines else f"the process ended with {process.returncode}"


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
    import resource  # which Windows has not

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
