"""Lifting a model file: rewrite, hold it against the original, keep what is the same."""

from __future__ import annotations

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
from rnnprune_cli.verify import verify_runs

CLAIM = "the operators that loops and cells became compute what the original computes"
_HINT = "please report it with the model"

Feeds = Callable[[Runner], Sequence[Feed]]


def lift(
    model: OnnxModel,
    folder: Path,
    made_up: Feeds,
    given: Feeds,
    right_padding: bool = False,
    threads: int = 1,
    inside_loops: bool = True,
) -> tuple[OnnxModel, list[Claim]]:
    """Rewrites a model's loops, hand-written cells and unrolled chains.

    1. Rewrite all that match; each cell was checked alone by then.
    2. Run the original and the result. While they differ, leave out one rewrite more, the last
       first; then try whether it was the only one to blame.

    Args:
        model: The model.
        folder: Existing folder for the new file; it must live as long as the result.
        made_up: Makes inputs to compare on.
        given: Returns real inputs to compare on, if there are any.
        right_padding: Whether the user promises that padding is always on the right.
        threads: Threads to run with.
        inside_loops: See :func:`rnnprune_cli.lift.attempt`.

    Returns:
        The new model and the claims that it is the same, or the given model and none. Either says
        in ``skipped`` and ``warnings`` what was left and why.
    """
    proto = read_proto(model.files[0])
    if proto.functions:
        proto = inline_local_functions(proto)
    size = sum(file.stat().st_size for file in model.files)

    def rewritten(without: frozenset[str] = frozenset()) -> Attempt:
        return attempt(proto, model.files[0], size, right_padding, without, inside_loops)

    try:
        first = rewritten()
    except RnnpruneError:
        raise
    except Exception as error:  # a defect must not keep anyone from pruning
        model.explain([Skipped(str(model.path), f"defect: {error!r}", _HINT)])
        return model, []
    if not first.lifts:
        model.explain(first.declined)
        return model, []
    sources = list(dict.fromkeys(lift.source for lift in first.lifts))
    try:
        comparison = _Comparison(model, folder, made_up, given, threads)
    except RnnpruneError as error:
        model.explain([Skipped(s, f"not lifted: {error.message}", error.hint) for s in sources])
        return model, []
    found = comparison.of(first)
    blamed: dict[str, str] = {}
    made = first
    while isinstance(found, str) and len(blamed) < len(sources):
        blamed[sources[-1 - len(blamed)]] = found
        made = rewritten(frozenset(blamed))
        found = comparison.of(made)
    if len(blamed) > 1:
        last = list(blamed)[-1]
        alone = rewritten(frozenset({last}))
        if not isinstance(better := comparison.of(alone), str):
            made, found, blamed = alone, better, {last: blamed[last]}
    declined = [*made.declined, *(Skipped(s, why, _HINT) for s, why in blamed.items())]
    if isinstance(found, str) or not made.lifts:
        model.explain(declined)
        return model, []
    lifted, claims = found
    lifted.explain(declined)
    return lifted, claims


class _Comparison:
    """Runs the original once, and every rewritten model against it."""

    def __init__(
        self, model: OnnxModel, folder: Path, made_up: Feeds, given: Feeds, threads: int
    ) -> None:
        self._model = model
        self._folder = folder
        self._threads = threads
        self._attempts = 0
        self._original = model.open(threads)
        self._names = [o.name for o in self._original.outputs]
        real, guessed = given(self._original), list[Feed]()
        try:
            guessed.extend(made_up(self._original))
        except RnnpruneError:
            if not real:
                raise  # a model that accepts only real inputs is compared on those
        self._feeds = [(CLAIM, guessed, True), (f"{CLAIM}, on the data", real, False)]

    def of(self, made: Attempt) -> tuple[OnnxModel, list[Claim]] | str:
        """Returns the model that a rewrite makes and the claims for it, or what is wrong."""
        try:
            lifted = OnnxModel(self._written(made.proto), self._model.path, made.lifts)
            runner = lifted.open(self._threads)
            claims = [
                verify_runs(claim, self._original, runner, feeds, self._names, guess)
                for claim, feeds, guess in self._feeds
                if feeds
            ]
        except RnnpruneError as error:
            return f"with an operator in its place: {error.message}"
        worst = max(claim.max_abs for claim in claims)
        if not all(claim.passed for claim in claims):
            return f"an operator in its place gives other outputs (difference {worst:.3g})"
        return lifted, claims

    def _written(self, proto: onnx.ModelProto) -> Path:
        """Writes a model, with copies of its data files beside it."""
        self._attempts += 1  # a model that was returned is never overwritten
        path = self._folder / f"lifted{self._attempts}.onnx"
        path.write_bytes(proto.SerializeToString(deterministic=True))
        for file in self._model.files[1:]:
            target = self._folder / file.relative_to(self._model.files[0].parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(file, target)
        return path
