"""Writing small files so that they are whole or not there, and what models say of themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from rnnprune_cli import __version__
from rnnprune_cli.errors import UsageError
from rnnprune_cli.model import Plan

_PLACES = ("train", "validation", "resume", "logdir", "strategy")


def check_writable(path: Path, force: bool) -> None:
    """Raises UsageError if a file must not or cannot be written."""
    if not path.parent.is_dir():
        raise UsageError(
            f"the folder of {path} does not exist", f"make it first: mkdir -p {path.parent}"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a directory", "give the path of a file")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists already", "overwrite it with --force, or give another path"
        )
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write in {path.parent}", "give another path")


def write_text(path: Path, text: str) -> None:
    """Writes a text file through a temporary one beside it."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".rnnprune-", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            Path(file.name).chmod(0o666 & ~_umask())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def provenance(plan: Plan, quantize: str | None = None) -> str:
    """Returns what a written model says of where it comes from.

    Args:
        plan: How it was pruned.
        quantize: What it was quantized to.
    """
    fields = dataclasses.asdict(plan)
    if plan.finetune is None:
        del fields["finetune"]
    else:  # where things lie is nobody's business
        own = fields["finetune"]
        fields["finetune"] = {k: v for k, v in own.items() if k not in _PLACES}
    note = {"version": __version__, "plan": fields}
    if quantize is not None:
        note["quantize"] = quantize
    return json.dumps(note, sort_keys=True)
