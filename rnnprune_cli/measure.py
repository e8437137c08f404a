"""Sizes and digests of files, and what machine this is; see timing.py for latency."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GZIP_EXACT_BYTES = 16 << 20
GZIP_SAMPLE_BYTES = 2 << 20
_BLOCK = 1 << 18


def total_bytes(files: Sequence[Path]) -> int:
    """Returns the size of all files of a model."""
    return sum(f.stat().st_size for f in files)


def gzip_bytes(files: Sequence[Path]) -> tuple[int, bool]:
    """Returns the size of a model's files after gzip (level 6), and whether it is an estimate.

    Above :data:`GZIP_EXACT_BYTES`, evenly spaced blocks are compressed and the result is scaled.
    """
    total = total_bytes(files)
    every = 1 if total <= GZIP_EXACT_BYTES else -(-total // GZIP_SAMPLE_BYTES)
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    packed = seen = 0
    for path in files:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, every * _BLOCK):
                file.seek(start)
                block = file.read(_BLOCK)
                packed += len(compressor.compress(block))
                seen += len(block)
    packed += len(compressor.flush())
    return (round(packed * total / seen) if seen else 0), every > 1


def sha256(files: Sequence[Path]) -> str:
    """Returns the SHA-256 over all files of a model, in the given order.

    A model that is one file has the same digest as the file.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    return digest.hexdigest()


def environment(threads: int) -> dict[str, Any]:
    """Describes the machine and the versions of everything that took part."""
    names = [
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "tensorflow",
        "tf2onnx",
        "keras",
        "tf_keras",
    ]
    versions = {n: getattr(sys.modules[n], "__version__", "?") for n in names if n in sys.modules}
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
