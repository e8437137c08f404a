"""Lifting a model file: rewrite, hold it against the original, keep what is the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnx.inliner import inline_local_functions

from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.lift import Attempt, attempt
from rnnprune_cli.model import Claim, Feed, Runner, Skipped
from rnnprune_cli.onnx_file import read_proto
from rnnprune_cli.onnx_model import OnnxModel
from rnnprune_cli.verify import run_all, verify_same

CLAIM = "the operators that loops and cells became compute what the original computes"
_DIFFERS = Skipped(
    "", "an operator in its place gives other outputs", "please report it with the model"
)


def lift(
    model: OnnxModel,
    folder: Path,
    feeds: Callable[[Runner], Sequence[Feed]],
    right_padding: bool = False,
    threads: int = 1,
    inside_loops: bool = True,
) -> tuple[OnnxModel, Claim | None]:
    """Rewrites a model's loops, hand-written cells and unrolled chains.

    1. Rewrite all that match; each cell was checked alone by then.
    2. Run the original and the result. If they differ, find out which rewrite is to blame by
       making each alone, and leave those out.

    Args:
        model: The model.
        folder: Existing folder for the new file; it must live as long as the result.
        feeds: Gives inputs to compare on.
        right_padding: Whether the user promises that padding is always on the right.
        threads: Threads to run with.
        inside_loops: See :func:`rnnprune_cli.lift.attempt`.

    Returns:
        The new model and the claim that it is the same, or the given model and None. Either says
        in ``skipped`` and ``warnings`` what was left and why.
    """
    proto = read_proto(model.files[0])
    if proto.functions:
        proto = inline_local_functions(proto)
    size = sum(file.stat().st_size for file in model.files)

    def rewritten(without: frozenset[str] = frozenset()) -> Attempt:
        return attempt(proto, model.files[0], size, right_padding, without, inside_loops)

    try:
        made = rewritten()
    except RnnpruneError:
        raise
    except Exception as error:  # a defect must not keep anyone from pruning
        model.explain([Skipped(str(model.path), f"defect: {error!r}", "please report it")])
        return model, None
    if not made.lifts:
        model.explain(made.declined)
        return model, None
    try:
        original = model.open(threads)
        samples = feeds(original)
        names = [o.name for o in original.outputs]
        expected = run_all(original, samples, names)
    except RnnpruneError as error:
        model.explain(
            [
                Skipped(lift.source, f"not lifted: {error.message}", error.hint or "")
                for lift in made.lifts
            ]
        )
        return model, None

    def compared(attempted: Attempt) -> tuple[OnnxModel, Claim] | None:
        path = _write(attempted.proto, model, folder)
        try:
            lifted = OnnxModel(path, model.path, attempted.lifts)
            outputs = run_all(lifted.open(threads), samples, names)
        except RnnpruneError:
            return None
        claim = verify_same(CLAIM, expected, outputs)
        return (lifted, claim) if claim.passed else None

    declined = list(made.declined)
    found = compared(made)
    if found is None:
        sources = list(dict.fromkeys(lift.source for lift in made.lifts))
        blamed = frozenset(
            source
            for source in sources
            if (alone := rewritten(frozenset(sources) - {source})).lifts and compared(alone) is None
        )
        declined += [Skipped(source, _DIFFERS.reason, _DIFFERS.hint) for source in sorted(blamed)]
        made = rewritten(blamed)
        found = compared(made) if blamed and made.lifts else None
    if found is None:
        model.explain(declined)
        return model, None
    lifted, claim = found
    lifted.explain(declined)
    return lifted, claim


def _write(proto: onnx.ModelProto, model: OnnxModel, folder: Path) -> Path:
    """Writes a model beside the data files of the original."""
    path = folder / "lifted.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    for file in model.files[1:]:
        target = folder / file.relative_to(model.files[0].parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                os.link(file, target)
            except OSError:  # another file system
                shutil.copyfile(file, target)
    return path
