"""A model that was read, converted and lifted, and what is known about it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rnnprune_cli import measure
from rnnprune_cli.apply import VERIFIED_SAMPLES, Applier, Inputs, Progress
from rnnprune_cli.data import load_dataset, padded_on_the_right, varied_feeds
from rnnprune_cli.errors import RnnpruneError
from rnnprune_cli.finetune import set_up
from rnnprune_cli.load import load
from rnnprune_cli.model import (
    Claim,
    Feed,
    LoadedModel,
    OtherLayer,
    ParameterCount,
    RemovableUnits,
    Runner,
    Stage,
)
from rnnprune_cli.options import (
    PruneOptions,
)

if TYPE_CHECKING:
    from rnnprune_cli.trainer.export import Exporter


LOOK = Stage("magnitude", "weight", "row", 0.0)
"""A stage that does nothing, for a look at a model as ``prune`` sees it."""


@contextlib.contextmanager
def inspected(
    path: Path, signature: str | None, right_padding: bool
) -> Iterator[tuple[LoadedModel, tuple[RemovableUnits, ...], tuple[OtherLayer, ...]]]:
    """Loads a model for a look, lifted as ``prune`` would lift it.

    ONNX models come with their units, and the other layers that ``--include`` can name.

    Raises:
        RnnpruneError: If it cannot be read, or nothing in it is recurrent.
    """
    with contextlib.ExitStack() as stack:
        source = load(path, signature)
        options = PruneOptions(path, None, (LOOK,), right_padding=right_padding)
        model, _ = lift_model(source, options, stack)
        if not model.layers and not model.skipped:
            require_layers(model)
        from rnnprune_cli.onnx_model import OnnxModel
        from rnnprune_cli.shrink.units import removable_units

        if isinstance(model, OnnxModel):
            yield model, removable_units(model) if model.layers else (), model.others.layers
        else:
            yield model, (), ()


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that was read, converted and lifted, and what is known about it.

    Attributes:
        options: The user's.
        source: What the user named.
        base: What is pruned: the source, converted and lifted.
        lifted: What was verified about lifting.
        limits: What the user should know about the source.
        count: The parameters of the source.
        files: Identity of the source's files.
        inputs: What to calibrate, to verify and to measure on.
        applier: Applies stages.
        pool: For work beside the main thread.
        progress: Called with a short text at the beginning of each step.
        exporter: Makes a SavedModel of what was written as ONNX, if that is asked for.
    """

    options: PruneOptions
    source: LoadedModel
    base: LoadedModel
    lifted: tuple[Claim, ...]
    limits: tuple[str, ...]
    count: ParameterCount
    files: Future[FileFigures]
    inputs: Inputs
    applier: Applier
    pool: ThreadPoolExecutor
    progress: Progress
    exporter: Exporter | None = None


@contextlib.contextmanager
def opened(options: PruneOptions, output_format: str, progress: Progress) -> Iterator[Opened]:
    """Loads a model; converts it, if it is to become ONNX; lifts loops and cells to operators.

    Args:
        options: The user's, checked.
        output_format: Of what is to be written.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If it cannot be read, or nothing in it can be pruned.
    """
    if options.finetune.strategy == "multiworker":  # before anything else in TensorFlow
        set_up(options, progress)
    progress(f"reading {options.model}")
    source = load(options.model, options.signature, options.threads)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        described = pool.submit(describe, source.files)
        base, limits = source, tuple[str, ...]()
        if source.format != "onnx" and (output_format == "onnx" or options.rebuilds):
            progress("converting to ONNX")
            base = _converted(source, stack)
        elif source.format != "onnx":
            progress("trying whether it converts to ONNX")
            limits = _not_convertible(source)
        progress("looking for loops and cells to lift")
        base, lifted = lift_model(base, options, stack)
        if not options.stages:
            _require_lifts(base)
        require_layers(base)
        if options.quantize is not None:
            _require_quantizable(base)
        exporter = None
        if output_format == "savedmodel" and base.format == "onnx":
            from rnnprune_cli.trainer.export import Exporter

            progress("trying whether it can be written as TensorFlow")
            exporter = Exporter(source, base, options.threads)
            limits += exporter.warnings
        converts = base.format != source.format and exporter is None
        count = base.count() if converts else source.count()
        inputs = Inputs(options, source, base)

        def as_onnx(model: LoadedModel) -> LoadedModel:
            return lift_model(_converted(model, stack), options, stack)[0]

        yield Opened(
            options,
            source,
            base,
            tuple(lifted),
            limits,
            count,
            described,
            inputs,
            Applier(inputs, as_onnx, stack, progress),
            pool,
            progress,
            exporter,
        )


def _converted(source: LoadedModel, stack: contextlib.ExitStack) -> LoadedModel:
    """Converts a TensorFlow model to an ONNX file that lives as long as the stack."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.tensorflow_model import TensorFlowModel, to_onnx

    assert isinstance(source, TensorFlowModel)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    path = folder / "model.onnx"
    path.write_bytes(to_onnx(source).SerializeToString(deterministic=True))
    return OnnxModel(path, shown_path=source.path)


def lift_model(
    model: LoadedModel, options: PruneOptions, stack: contextlib.ExitStack
) -> tuple[LoadedModel, list[Claim]]:
    """Lifts an ONNX model to a file that lives as long as the stack.

    Args:
        model: The model; others than ONNX are returned as they are.
        options: The user's; it is compared on their data, besides made-up inputs.
        stack: Keeps the file.

    Returns:
        The model to work on, and the claims that it is the same if it is another.
    """
    from rnnprune_cli.lift.apply import lift
    from rnnprune_cli.onnx_model import OnnxModel

    if not isinstance(model, OnnxModel):
        return model, []

    def made_up(runner: Runner) -> list[Feed]:
        feeds = varied_feeds(runner, options.seed)
        return [*map(padded_on_the_right, feeds)] if options.right_padding else feeds

    def given(runner: Runner) -> list[Feed]:
        if options.data is None:
            return []
        data = load_dataset(options.data, runner.inputs)
        bounds = list(data.batches(VERIFIED_SAMPLES))
        bounds = bounds[: VERIFIED_SAMPLES if data.single else 1]
        return [data.feed(start, stop) for start, stop in bounds]

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    return lift(
        model,
        folder,
        made_up,
        given,
        options.right_padding,
        options.threads,
        inside_loops=bool(options.stages),
    )


def _not_convertible(source: LoadedModel) -> tuple[str, ...]:
    """Says what is not possible for a TensorFlow model that cannot become ONNX, and why."""
    from rnnprune_cli.tensorflow_model import TensorFlowModel, to_onnx

    assert isinstance(source, TensorFlowModel)
    try:
        to_onnx(source)
    except RnnpruneError as error:
        return (f"only weights can be pruned, in place: {error.message}",)
    return ()


def _require_lifts(model: LoadedModel) -> None:
    """Raises RnnpruneError if there was nothing to lift, with the first reason."""
    if model.lifts:
        return
    reasons = [f"'{item.name}': {item.reason}" for item in model.skipped]
    hints = [item.hint for item in model.skipped if item.hint]
    reasons += [w for w in model.warnings if "is not lifted" in w]
    if not reasons:
        raise RnnpruneError(
            f"nothing in {model.path} has to be lifted: no loop, cell or unrolled chain is written"
            " out in it",
            "'rnnprune inspect' shows its recurrent operators",
        )
    raise RnnpruneError(
        f"nothing in {model.path} can be lifted: {reasons[0]}", next(iter(hints), "")
    )


def _require_quantizable(model: LoadedModel) -> None:
    """Raises RnnpruneError if nothing in a model can be quantized: better now than after all."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.quantize import require_quantizable

    assert isinstance(model, OnnxModel)
    require_quantizable(model)


def require_layers(model: LoadedModel) -> None:
    """Raises RnnpruneError if nothing in a model can be pruned, with the first reason."""
    if model.layers:
        return
    if model.skipped:
        first = model.skipped[0]
        more = f" ({len(model.skipped) - 1} more like it)" if len(model.skipped) > 1 else ""
        raise RnnpruneError(
            f"nothing in {model.path} can be pruned: '{first.name}': {first.reason}{more}",
            first.hint,
        )
    raise RnnpruneError(
        f"{model.path} has no recurrent layer: no LSTM, GRU or RNN was found",
        "rnnprune prunes recurrent layers only, and what can be lifted to one",
    )


@dataclass(frozen=True)
class FileFigures:
    """Identity and size of a model's files."""

    sha256: str
    bytes: int
    gzip_bytes: int
    gzip_estimated: bool


def describe(files: Sequence[Path]) -> FileFigures:
    """Reads all files of a model once."""
    return FileFigures(
        measure.sha256(files), measure.total_bytes(files), *measure.gzip_bytes(files)
    )
