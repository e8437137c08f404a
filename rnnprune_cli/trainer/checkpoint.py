"""What a training run needs to go on, in one file: whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.model import Array, Epoch, MetricValue
from rnnprune_cli.trainer.loop import Progress

_TEXT = "json"
_NEEDED = ("weights", "best", "anchor", "optimizer", "run")


def save(
    path: Path,
    identity: str,
    progress: Progress,
    groups: Mapping[str, Mapping[str, Array]],
) -> None:
    """Writes a checkpoint in place of an earlier one.

    Args:
        path: The file.
        identity: Of the run; see :func:`load`.
        progress: Where it is.
        groups: Name → (name → array).
    """
    text = json.dumps({"identity": identity, "progress": dataclasses.asdict(progress)})
    arrays: dict[str, Any] = {
        f"{group}/{name}": array for group, own in groups.items() for name, array in own.items()
    }
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(_TEXT, text)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(path: Path, identity: str) -> tuple[Progress, dict[str, dict[str, Array]]]:
    """Reads a checkpoint.

    Args:
        path: The file.
        identity: Of the run that goes on: what it was told, and what it works on.

    Raises:
        RnnpruneError: If it cannot be read, or is of another run.
    """
    groups: dict[str, dict[str, Array]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            document = json.loads(archive.read(_TEXT))
            if document["identity"] != identity:
                raise RnnpruneError(
                    f"{path} is of a run with other options, another model or other data",
                    "give the same ones as then, or leave out --resume and start again with"
                    " --force",
                )
            for name in archive.namelist():
                if name != _TEXT:
                    group, _, own = name.removesuffix(".npy").partition("/")
                    with archive.open(name) as member:
                        array = np.lib.format.read_array(member, allow_pickle=False)
                    groups.setdefault(group, {})[own] = array
        for name in _NEEDED:
            groups[name]
        return _progress(document["progress"]), groups
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise RnnpruneError(
            f"{path} cannot be read: {error}", "leave out --resume and start again with --force"
        ) from error


def _progress(document: dict[str, Any]) -> Progress:
    epochs = [
        Epoch(**{**epoch, "metrics": tuple(MetricValue(**m) for m in epoch["metrics"])})
        for epoch in document.pop("epochs")
    ]
    one, two = document.pop("score")
    return Progress(**document, score=(one, two), epochs=epochs)
