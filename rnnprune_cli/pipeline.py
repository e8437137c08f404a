"""What ``prune`` does, from the file to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnnprune_cli import __version__, measure
from rnnprune_cli.data import (
    Dataset,
    has_nan,
    load_dataset,
    made_up_feeds,
    padded_on_the_right,
    varied_feeds,
)
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.load import TENSORFLOW_SUFFIXES, load
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.metrics import BATCH, Comparison, Evaluation, check_metric
from rnnprune_cli.model import (
    UNCHANGED,
    BoolArray,
    Claim,
    ExportOptions,
    Feed,
    LayerRow,
    LoadedModel,
    Masks,
    Measurement,
    MetricValue,
    ModelInfo,
    OutputFidelity,
    OutputInfo,
    ParameterCount,
    Plan,
    Ratios,
    RecurrentLayer,
    RemovableUnits,
    Report,
    Runner,
    Saved,
    Stage,
    Weight,
)
from rnnprune_cli.select import SCOPES, UNIT_SCOPES, families, select
from rnnprune_cli.verify import (
    CONVERSION_TOLERANCE,
    require,
    run_all,
    verify_runs,
    verify_same,
    verify_weights,
)

if TYPE_CHECKING:
    from rnnprune_cli.shrink.task import Shrunk

Progress = Callable[[str], None]

EXPORTS = {
    "auto": "for each weight, the smallest form that is exact",
    "dense": "zeros stay where the weights were",
    "sparse": "ONNX sparse tensors (values and positions), where that is smaller",
    "packed": "nonzero values and a bitmap or gaps, unpacked by standard operators at load",
    "shrunk": "smaller weights, without removed units or layers (--granularity unit, layer)",
}
"""Name → summary of every export form."""
VALUES = ("float32", "float16", "int8")
GRANULARITIES = {
    "weight": "single weights of W and R",
    "unit": "hidden units, with all that goes with them: the model becomes smaller and faster",
    "layer": "whole layers: a linear map fitted to data, or their input, stands for them",
}
"""Name → what is removed together."""
DEFAULT_SCOPES = {"weight": "row", "unit": "layer", "layer": "global"}
SCOPES_OF = {
    "weight": SCOPES,
    "unit": UNIT_SCOPES,
    "layer": {"global": "all selected layers; one always stays"},
}
STRUCTURES = ("unit", "layer")
"""Granularities that are cut out of the model instead of becoming zeros."""
MAX_THREADS = 256

_VERIFIED_SAMPLES = 4


@dataclass(frozen=True)
class PruneOptions:
    """Everything that ``prune`` can be told; see the command's help. No stage: only lift."""

    model: Path
    output: Path | None
    stage: Stage | None
    seed: int = 0
    data: Path | None = None
    calibration: Path | None = None
    metric: str = "auto"
    export: ExportOptions = dataclasses.field(default_factory=ExportOptions)
    signature: str | None = None
    threads: int = 1
    force: bool = False
    reports: tuple[Path, ...] = ()
    right_padding: bool = False
    latency_seconds: float = 0.5


@contextlib.contextmanager
def inspected(
    path: Path, signature: str | None, right_padding: bool
) -> Iterator[tuple[LoadedModel, tuple[RemovableUnits, ...]]]:
    """Loads a model for a look, lifted as ``prune`` would lift it; ONNX models with their units.

    Raises:
        RnnpruneError: If it cannot be read, or nothing in it is recurrent.
    """
    with contextlib.ExitStack() as stack:
        source = load(path, signature)
        stage = Stage("magnitude", "weight", "row", 0.0)
        options = PruneOptions(path, None, stage, right_padding=right_padding)
        model, _ = lift_model(source, options, stack)
        if not model.layers and not model.skipped:
            require_layers(model)
        yield model, _removable_units(model)


def _removable_units(model: LoadedModel) -> tuple[RemovableUnits, ...]:
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.shrink.units import removable_units

    return removable_units(model) if isinstance(model, OnnxModel) and model.layers else ()


def prune(options: PruneOptions, arguments: Mapping[str, Any], progress: Progress) -> Report:
    """Prunes one model.

    1. Check the options, then load the model; lift loops and cells to operators.
    2. Load or make up data.
    3. Score and select; units are cut, and held against the masked model, at once.
    4. Write into a temporary folder beside the output.
    5. Verify what was written there against the masked model.
    6. Measure it against the original.
    7. Move it to its place.

    Args:
        options: What to do.
        arguments: The options as the user gave them, for the report.
        progress: Called with a short text at the beginning of each step.

    Raises:
        RnnpruneError: If anything prevents a verified result; nothing is written then.
    """
    _check_options(options)
    stage = options.stage
    output, output_format = output_path(
        options.model, options.output, "pruned" if stage else "lifted"
    )
    if stage is None and output_format != "onnx":
        raise UsageError(
            "only ONNX models hold recurrent operators", "give an output with -o X.onnx"
        )
    if stage is not None and stage.granularity in STRUCTURES and output_format != "onnx":
        raise UsageError(
            f"a {stage.granularity} can only be removed from ONNX models",
            f"give an output with -o {options.model.resolve().name}.onnx: the model is converted",
        )
    _check_output(options, output, output_format)
    progress(f"reading {options.model}")
    source = load(options.model, options.signature, options.threads)
    _protect(source, output)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        described = pool.submit(_describe, source.files)
        base, limits = source, tuple[str, ...]()
        if output_format == "onnx" and source.format != "onnx":
            progress("converting to ONNX")
            base = _converted(source, stack)
        elif source.format != "onnx":
            progress("trying whether it converts to ONNX")
            limits = _not_convertible(source)
        progress("looking for loops and cells to lift")
        base, lifted = lift_model(base, options, stack)
        if stage is None:
            _require_lifts(base)
        require_layers(base)
        count = source.count() if source.format == base.format else base.count()
        plan = Plan((stage,) if stage else (), options.seed)
        inputs = _Inputs(options, source, base)
        model, masks, blocked = base, dict[str, BoolArray](), dict[str, str]()
        shrunk: Shrunk | None = None
        if stage is not None and stage.granularity in STRUCTURES:
            shrunk = _without_structures(base, stage, inputs, stack, progress)
            model, blocked = shrunk.model, dict(shrunk.blocked)
        elif stage is not None:
            masks, blocked = make_masks(model.layers, stage, options.seed, progress)
        after = model.count() if shrunk or model.lifts else count  # before runtimes hold copies
        folder = stack.enter_context(_folder_beside(output))
        progress(f"writing {output.name}")
        form = ExportOptions("dense") if shrunk else options.export
        saved = model.save(masks, folder, output.name, form, _note(plan))
        progress("verifying")
        described_after = pool.submit(_describe, saved.files)
        claim, nonzero = verify_weights(model, saved)
        require([claim])
        claims = [
            *lifted,
            *inputs.converted(),
            *(shrunk.claims if shrunk else ()),
            *([claim] if masks else []),
            *_verify(model, saved, inputs, options.threads),
        ]
        require(claims)
        run = _Run(options, source, base, model, saved, inputs, nonzero, (count, after))
        files_before, files_after = described.result(), described_after.result()
        progress("comparing the models' outputs")
        quality = _quality(run)
        progress("timing")
        before, now, ratios, warnings = _measured(run, quality, files_before, files_after)
        report = Report(
            arguments=dict(arguments),
            model=ModelInfo(
                str(source.path),
                source.format,
                files_before.sha256,
                source.producer,
                source.opset,
            ),
            output=OutputInfo(str(output), saved.format, files_after.sha256),
            plan=plan,
            layers=_layer_rows(base.layers, model.layers, saved, nonzero, blocked),
            skipped=model.skipped,
            before=before,
            after=now,
            ratios=ratios,
            fidelity=quality.fidelity,
            verification=tuple(claims),
            warnings=tuple(
                dict.fromkeys(
                    (
                        *source.warnings,
                        *base.warnings,
                        *limits,
                        *(shrunk.warnings if shrunk else ()),
                        *saved.warnings,
                        *warnings,
                    )
                )
            ),
            environment=measure.environment(options.threads),
            lifts=model.lifts,
            units=shrunk.units if shrunk else (),
            states=shrunk.states if shrunk else (),
            repairs=shrunk.repairs if shrunk else (),
        )
        _move(saved, output, folder)
    return report


class _Inputs:
    """The original, ready to run, and what it is run on; both are made when first asked for."""

    def __init__(self, options: PruneOptions, source: LoadedModel, base: LoadedModel) -> None:
        self.options = options
        self._source = source
        self._base = base

    @functools.cached_property
    def original(self) -> Runner:
        """The model that the user named."""
        return self._source.open(self.options.threads)

    @functools.cached_property
    def data(self) -> Dataset | None:
        """What ``--data`` holds."""
        path = self.options.data
        return None if path is None else load_dataset(path, self.original.inputs)

    @functools.cached_property
    def calibration(self) -> Dataset | None:
        """What ``--calibration`` holds, or else ``--data``."""
        path = self.options.calibration
        return self.data if path is None else load_dataset(path, self.original.inputs)

    @functools.cached_property
    def feeds(self) -> list[Feed]:
        """Some samples of the data, or made-up inputs, to compare models on."""
        feeds = _feeds(self.original, self._base.layers, self.data, self.options.seed)
        if self.data is None and self.options.right_padding:
            return [*map(padded_on_the_right, feeds)]
        return feeds

    def converted(self) -> list[Claim]:
        """Holds a converted model against the original."""
        if self._base.format == self._source.format:
            return []
        return [
            verify_runs(
                "the converted ONNX model computes what the original computes",
                self.original,
                self._base.open(self.options.threads),
                self.feeds,
                [o.name for o in self.original.outputs],
                self.data is None,
                CONVERSION_TOLERANCE,
            )
        ]


def _without_structures(
    model: LoadedModel,
    stage: Stage,
    inputs: _Inputs,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> Shrunk:
    """Removes units or layers; the new model lives as long as the stack."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.shrink.layers import remove_layers
    from rnnprune_cli.shrink.task import Task
    from rnnprune_cli.shrink.units import remove_units

    assert isinstance(model, OnnxModel)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    names = [layer.name for layer in chosen_layers(model.layers, stage)]
    task = Task(
        model,
        stage,
        names,
        folder,
        inputs.calibration,
        inputs.feeds,
        inputs.data is None,
        inputs.options.seed,
        inputs.options.threads,
        progress,
    )
    shrunk = remove_units(task) if stage.granularity == "unit" else remove_layers(task)
    blocked = {
        layer.name: "not selected" for layer in model.layers if layer.name not in names
    } | dict(shrunk.blocked)
    require(shrunk.claims)
    return dataclasses.replace(shrunk, blocked=blocked)


# Options and paths


def _check_options(options: PruneOptions) -> None:
    check_metric(options.metric)
    if options.stage is not None:
        _check_stage(options.stage)
    if options.export.export not in EXPORTS:
        raise UsageError(
            f"there is no export form '{options.export.export}'",
            closest(options.export.export, EXPORTS),
        )
    units = options.stage is not None and options.stage.granularity in STRUCTURES
    if units and options.export.export not in ("auto", "shrunk"):
        raise UsageError(
            f"--export {options.export.export} is for single weights",
            "units and layers are cut out: leave it out, or --export shrunk",
        )
    if options.export.export == "shrunk" and not units:
        raise UsageError(
            "--export shrunk is for units and layers", "use it with --granularity unit or layer"
        )
    if options.export.values not in VALUES:
        raise UsageError(
            f"values cannot be stored as '{options.export.values}'",
            closest(options.export.values, VALUES),
        )
    if options.export.values != "float32" and (
        units or options.export.export not in ("auto", "packed")
    ):
        raise UsageError(
            f"--values {options.export.values} is for packed weights",
            "use it with --export packed or --export auto",
        )
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(
            f"--threads {options.threads} is not between 1 and {MAX_THREADS}",
            "more threads than cores do not make a model faster",
        )


def _check_stage(stage: Stage) -> None:
    found = find_method(stage.method)
    if stage.granularity not in GRANULARITIES:
        raise UsageError(
            f"there is no granularity '{stage.granularity}'",
            closest(stage.granularity, GRANULARITIES),
        )
    if stage.granularity not in found.granularities:
        raise UsageError(
            f"method '{stage.method}' cannot score granularity '{stage.granularity}'",
            f"it scores: {', '.join(found.granularities)}",
        )
    scopes = SCOPES_OF[stage.granularity]
    if stage.scope not in scopes:
        every = {scope for known in SCOPES_OF.values() for scope in known}
        if stage.scope in every:
            raise UsageError(
                f"scope '{stage.scope}' is not for granularity '{stage.granularity}'",
                f"it has: {', '.join(scopes)}",
            )
        raise UsageError(f"there is no scope '{stage.scope}'", closest(stage.scope, scopes))
    if not 0 <= stage.sparsity < 1:
        raise UsageError(
            f"sparsity {stage.sparsity:g} is not between 0 and 1",
            "it is the share of weights, or units, to remove, such as 0.7",
        )
    if stage.granularity != "unit" and (stage.resize_state or stage.allow_inexact):
        option = "--resize-state" if stage.resize_state else "--allow-inexact"
        raise UsageError(f"{option} is for units", "use it with --granularity unit")


def output_path(model: Path, output: Path | None, what: str = "pruned") -> tuple[Path, str]:
    """Returns where the result goes and its format, from the two paths alone.

    Args:
        model: The model.
        output: What the user gave.
        what: Part of the name if nothing was given.

    Raises:
        UsageError: If the format cannot be written from this kind of model.
    """
    from_tensorflow = model.is_dir() or model.suffix.lower() in TENSORFLOW_SUFFIXES
    own = "savedmodel" if model.is_dir() else "keras" if from_tensorflow else "onnx"
    if output is None:
        if model.is_dir():
            named = model.resolve() if model.name in ("", "..") else model
            return named.with_name(f"{named.name}.{what}"), own
        suffix = model.suffix if from_tensorflow else ".onnx"
        return model.with_name(f"{model.stem}.{what}{suffix}"), own
    suffix = output.suffix.lower()
    if suffix == ".onnx":
        return output, "onnx"
    if own == "onnx":
        raise UsageError(
            f"an ONNX model cannot be written as '{output}'", "the output must end in .onnx"
        )
    if own == "keras" and suffix != model.suffix.lower():
        raise UsageError(
            f"a {model.suffix} model cannot be written as '{output}'",
            f"the output must end in {model.suffix} or .onnx",
        )
    if own == "savedmodel" and suffix in TENSORFLOW_SUFFIXES:
        raise UsageError(
            f"a SavedModel cannot be written as '{output}'",
            "the output must be a directory, or end in .onnx",
        )
    return output, own


def _check_output(options: PruneOptions, output: Path, output_format: str) -> None:
    if output.resolve() == options.model.resolve():
        raise UsageError(
            f"the output {output} is the input", "give another path with -o; the input is kept"
        )
    if options.model.is_dir() and output.resolve().is_relative_to(options.model.resolve()):
        raise UsageError(
            f"the output {output} lies inside the input", "give a path outside it with -o"
        )
    if not output.parent.is_dir():
        raise UsageError(
            f"the folder of {output} does not exist", f"make it first: mkdir -p {output.parent}"
        )
    for path in (output, _data_file(output)) if output_format == "onnx" else (output,):
        if path.exists() and not options.force:
            raise UsageError(f"{path} exists already", "overwrite it with --force, or give -o")
        if any(report.resolve() == path.resolve() for report in options.reports):
            raise UsageError(f"{path} is the output and a report", "give one of them another path")
    if output.exists() and (output.is_dir() != (output_format == "savedmodel")):
        raise UsageError(
            f"{output} is " + ("a directory" if output.is_dir() else "no directory"),
            "it is not replaced by the other kind; give another path with -o",
        )
    if output.exists() and not output.is_dir() and not output.is_file():
        raise UsageError(f"{output} is no regular file", "give another path with -o")
    if output.is_dir() and any(output.iterdir()) and not (output / "saved_model.pb").is_file():
        raise UsageError(
            f"{output} is a directory that holds no SavedModel",
            "it is not overwritten, not even with --force; give another path with -o",
        )


def _protect(source: LoadedModel, output: Path) -> None:
    """Raises UsageError if writing the output would destroy a file of the input."""
    for file in source.files:
        for path in (output, _data_file(output)):
            if path.exists() and path.samefile(file):
                raise UsageError(
                    f"writing {output} would replace {path}, which belongs to the input",
                    "give another path with -o",
                )


def _data_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.data")


@contextlib.contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A temporary folder on the output's file system, so that results can be renamed."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".rnnprune-", dir=output.parent)
    except OSError as error:
        raise UsageError(
            f"cannot write in {output.parent}: {error.strerror}", "give another path with -o"
        ) from error
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RnnpruneError(
                    f"no space left in {output.parent}", "free some, or give another path with -o"
                ) from error
            raise


def _move(saved: Saved, output: Path, folder: Path) -> None:
    """Moves what was written to its place, the model file last."""
    if saved.path.is_dir():
        older = folder / "replaced"
        if output.is_dir():
            output.rename(older)
        try:
            saved.path.rename(output)
        except BaseException:
            if older.exists():
                older.rename(output)
            raise
        return
    replaced = output.exists()
    if len(saved.files) > 1:
        output.unlink(missing_ok=True)  # an older model must never meet the new one's data
    for file in reversed(saved.files):
        file.replace(output.with_name(file.name))
    if replaced and saved.format == "onnx" and len(saved.files) == 1:
        _data_file(output).unlink(missing_ok=True)  # of the model that --force replaced


def _note(plan: Plan) -> str:
    return json.dumps({"version": __version__, "plan": dataclasses.asdict(plan)}, sort_keys=True)


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
        bounds = list(data.batches(_VERIFIED_SAMPLES))
        bounds = bounds[: _VERIFIED_SAMPLES if data.single else 1]
        return [data.feed(start, stop) for start, stop in bounds]

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))
    return lift(
        model,
        folder,
        made_up,
        given,
        options.right_padding,
        options.threads,
        inside_loops=options.stage is not None,
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


# Selecting


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


def chosen_layers(layers: Sequence[RecurrentLayer], stage: Stage) -> tuple[RecurrentLayer, ...]:
    """Returns the layers that ``--layers`` and ``--exclude`` select.

    Raises:
        UsageError: If a pattern matches no layer, or none is left.
    """
    names = [layer.name for layer in layers]
    for pattern in (*stage.layers, *stage.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no layer matches '{pattern}'", closest(pattern, names))
    chosen = tuple(
        layer
        for layer in layers
        if (not stage.layers or any(fnmatchcase(layer.name, p) for p in stage.layers))
        and not any(fnmatchcase(layer.name, p) for p in stage.exclude)
    )
    if not chosen:
        raise UsageError("--exclude leaves no layer to prune", f"layers: {', '.join(names)}")
    return chosen


def make_masks(
    layers: Sequence[RecurrentLayer], stage: Stage, seed: int, progress: Progress
) -> tuple[dict[str, BoolArray], dict[str, str]]:
    """Scores and selects.

    A weight that a layer outside the selection also uses is left alone.

    Args:
        layers: All prunable layers of the model.
        stage: What to do.
        seed: Seed of random scores; each weight has a stream of its own.
        progress: Called with what is being scored.

    Returns:
        Weight name → mask, and layer name → why it was not pruned.

    Raises:
        RnnpruneError: If no weight would be removed although some were to be.
    """
    chosen = set(chosen_layers(layers, stage))
    blocked = {layer.name: "not selected" for layer in layers if layer not in chosen}
    protected: dict[str, str] = {}
    for layer in layers:
        if layer not in chosen:
            protected.update({w.name: layer.name for w in layer.weights})
    weights: dict[str, int] = {}
    for number, weight in enumerate(_weights(layers)):
        users = [layer for layer in chosen if weight in layer.weights]
        if users and weight.name not in protected:
            weights[weight.name] = number
        for layer in users:
            if weight.name in protected:
                blocked[layer.name] = (
                    f"shares weights with '{protected[weight.name]}', not selected"
                )
    score = find_method(stage.method).weight
    assert score is not None  # the options were checked
    masks: dict[str, BoolArray] = {}
    every = [tuple(w for w in f if w.name in weights) for f in families(layers)]
    if stage.scope == "global":
        every = [tuple(w for family in every for w in family)]
    for family in filter(None, every):
        progress(f"scoring {', '.join(w.name for w in family[:2])}")
        scores = {w.name: score(w, np.random.default_rng([seed, weights[w.name]])) for w in family}
        masks.update(select(scores, family, stage.scope, stage.sparsity))
    if stage.sparsity > 0 and not any(_removes(w, masks) for w in _weights(layers)):
        kept = sum(w.nonzero for w in _weights(layers))
        share = 1 - kept / sum(w.size for w in _weights(layers))
        raise RnnpruneError(
            f"sparsity {stage.sparsity:g} removes not a single weight: {share:.2f} of them are zero"
            " already, or the layers are too small, or share their weights with others",
            "ask for a higher --sparsity, or select other --layers",
        )
    return masks, blocked


def _removes(weight: Weight, masks: Masks) -> bool:
    """Tells whether a mask removes anything that is not zero yet; looks no further than needed."""
    mask = masks.get(weight.name)
    if mask is None:
        return False
    values = weight.read()
    return any(
        bool(np.any(values[:, start : start + 64][~mask[:, start : start + 64]]))
        for start in range(0, weight.shape[1], 64)
    )


def _layer_rows(
    before: Sequence[RecurrentLayer],
    after: Sequence[RecurrentLayer],
    saved: Saved,
    nonzero: Mapping[str, int],
    blocked: Mapping[str, str],
) -> tuple[LayerRow, ...]:
    rows = []
    now = {layer.name: layer for layer in after}
    for old in before:
        layer = now.get(old.name)
        weights = () if layer is None else layer.weights
        left = sum(nonzero.get(w.name, w.nonzero) for w in weights)
        size = sum(w.size for w in weights)
        rows.append(
            LayerRow(
                name=old.name,
                op=old.op,
                direction=old.direction,
                hidden_before=old.hidden_size,
                hidden_after=0 if layer is None else layer.hidden_size,
                weights_before=old.macs_per_step,
                weights_after=size,
                nonzero_after=left,
                sparsity=1 - left / old.macs_per_step,
                stored=tuple(saved.exports.get(w.name, "dense") for w in weights),
                blocked=blocked.get(old.name),
            )
        )
    return tuple(rows)


def _weights(layers: Sequence[RecurrentLayer]) -> tuple[Weight, ...]:
    """The distinct weights of layers, in order."""
    return tuple(dict.fromkeys(w for layer in layers for w in layer.weights))


# Verifying and measuring


_MACS_OF_MADE_UP_FEED = 300_000_000
"""Made-up sequences are shorter for large models, so that one call stays below a second."""


def _feeds(
    original: Runner, layers: Sequence[RecurrentLayer], data: Dataset | None, seed: int
) -> list[Feed]:
    if data is None:
        macs = sum(layer.macs_per_step for layer in layers)
        return made_up_feeds(original, seed, max(1, _MACS_OF_MADE_UP_FEED // macs))
    bounds = list(data.batches(_VERIFIED_SAMPLES))[: _VERIFIED_SAMPLES if data.single else 1]
    feeds: list[Feed] = [data.feed(start, stop) for start, stop in bounds]
    for feed in feeds:
        original.reset()
        if any(has_nan(output) for output in original.run(feed)):
            raise RnnpruneError(
                "the original model answers the data with NaN, so nothing can be compared",
                "check the data against what the model was trained on",
            )
    return feeds


def _verify(model: LoadedModel, saved: Saved, inputs: _Inputs, threads: int) -> list[Claim]:
    claims = model.verify_untouched(saved)
    names, feeds = [o.name for o in inputs.original.outputs], inputs.feeds
    if model.big and any(claim.claim == UNCHANGED for claim in claims):
        # Held against each other bit by bit; two more copies in memory would prove no more.
        return claims
    if model.format == "onnx" and saved.stored:
        unpruned = {weight.name: weight.read for weight in _weights(model.layers)}
        claims.append(
            verify_same(
                "with nothing removed, the weights that were found give the original's outputs",
                run_all(model.open(threads), feeds, names),
                run_all(model.open_masked(unpruned, threads), feeds, names),
            )
        )
    if saved.stored:
        reference, claim = model.open_masked(saved.stored, threads), "the masked model computes"
    else:
        reference, claim = model.open(threads), "was verified"
    claims.append(
        verify_same(
            f"the written model computes what {claim}",
            run_all(reference, feeds, names),
            run_all(model.reopen(saved, threads), feeds, names),
        )
    )
    return claims


@dataclass(frozen=True, eq=False)
class _Run:
    """What a run holds when everything is written and verified."""

    options: PruneOptions
    source: LoadedModel
    base: LoadedModel
    """The model that was pruned: the source, converted and lifted."""
    model: LoadedModel
    """The same without removed units."""
    saved: Saved
    inputs: _Inputs
    nonzero: Mapping[str, int]
    counts: tuple[ParameterCount, ParameterCount]
    """Of the original, and of the model whose weights are pruned."""

    @property
    def original(self) -> Runner:
        """The model that the user named."""
        return self.inputs.original

    @property
    def data(self) -> Dataset | None:
        """The user's data."""
        return self.inputs.data

    @property
    def feeds(self) -> Sequence[Feed]:
        """What to compare on where there are no data."""
        return self.inputs.feeds

    @functools.cached_property
    def pruned(self) -> Runner:
        """The written model."""
        return self.model.reopen(self.saved, self.options.threads)


@dataclass(frozen=True)
class _Quality:
    """What both models make of the data: the metric of each, and how far they are apart."""

    before: MetricValue | None
    after: MetricValue | None
    fidelity: tuple[OutputFidelity, ...]


def _quality(run: _Run) -> _Quality:
    outputs = run.original.outputs
    names = [o.name for o in outputs]
    comparison = Comparison(outputs)
    if run.data is None:
        both = (run_all(r, run.feeds, names) for r in (run.original, run.pruned))
        for one, two in zip(*both, strict=True):
            comparison.add(one, two)
        return _Quality(None, None, comparison.rows())
    metrics = [
        Evaluation(run.data, outputs, run.options.metric)
        for _ in ("before", "after")
        if run.data.targets
    ]
    for start, stop in run.data.batches(BATCH):
        feed = run.data.feed(start, stop)
        results = [run_all(r, [feed], names)[0] for r in (run.original, run.pruned)]
        comparison.add(results[0], results[1], run.data.valid(start, stop))
        for metric, result in zip(metrics, results, strict=False):
            metric.add(result, start, stop)
    if not metrics:
        return _Quality(None, None, comparison.rows())
    before, after = metrics
    return _Quality(before.value(), after.value(before.probabilities), comparison.rows())


@dataclass(frozen=True)
class _Files:
    """Identity and size of a model's files."""

    sha256: str
    bytes: int
    gzip_bytes: int
    gzip_estimated: bool


def _describe(files: Sequence[Path]) -> _Files:
    return _Files(measure.sha256(files), measure.total_bytes(files), *measure.gzip_bytes(files))


def _measured(
    run: _Run, quality: _Quality, files_before: _Files, files_after: _Files
) -> tuple[Measurement, Measurement, Ratios, tuple[str, ...]]:
    """Measures the original and the written model, side by side."""
    options, data = run.options, run.data
    feed = run.feeds[0] if data is None else data.feed(0, 1)
    openers: tuple[Callable[[], Runner], Callable[[], Runner]]
    openers, rounds = (lambda: run.original, lambda: run.pruned), 1
    if run.source.format == "onnx" and not run.source.big:  # others take seconds to open
        rounds = measure.ROUNDS
        openers = (
            lambda: run.source.open(options.threads),
            lambda: run.model.reopen(run.saved, options.threads),
        )
    latency_before, latency_after, ratio = measure.interleaved_latency(
        openers, feed, options.latency_seconds, rounds, options.seed
    )
    weights, left = _weights(run.base.layers), _weights(run.model.layers)
    nonzero_left = sum(w.nonzero for w in left)
    nonzero_after = sum(run.nonzero.get(w.name, w.nonzero) for w in left)
    before = Measurement(
        parameters=run.counts[0].parameters,
        nonzero=run.counts[0].nonzero,
        recurrent_parameters=sum(w.size for w in weights),
        recurrent_nonzero=sum(w.nonzero for w in weights),
        bytes=files_before.bytes,
        gzip_bytes=files_before.gzip_bytes,
        macs_per_step=sum(layer.macs_per_step for layer in run.base.layers),
        latency_ms=latency_before,
        metric=quality.before,
    )
    after = Measurement(
        parameters=run.counts[1].parameters,
        nonzero=run.counts[1].nonzero - nonzero_left + nonzero_after,
        recurrent_parameters=sum(w.size for w in left),
        recurrent_nonzero=nonzero_after,
        bytes=files_after.bytes,
        gzip_bytes=files_after.gzip_bytes,
        macs_per_step=sum(layer.macs_per_step for layer in run.model.layers),
        latency_ms=latency_after,
        metric=quality.after,
    )
    ratios = Ratios(
        parameters=after.parameters / max(before.parameters, 1),
        nonzero=after.nonzero / max(before.nonzero, 1),
        bytes=after.bytes / before.bytes,
        gzip_bytes=after.gzip_bytes / before.gzip_bytes,
        latency=ratio,
    )
    estimated = files_before.gzip_estimated or files_after.gzip_estimated
    return before, after, ratios, tuple(_advice(run, estimated))


def _advice(run: _Run, gzip_estimated: bool) -> Iterator[str]:
    stage = run.options.stage
    if stage is not None and stage.sparsity == 0:
        what = f"{stage.granularity}s"
        yield f"sparsity 0 removes nothing; give --sparsity 0.5 to remove half of the {what}"
    if run.data is None and stage is None:
        yield "inputs were made up: give --data to compare on real ones"
    elif run.data is None:
        yield "inputs were made up: give --data for outputs and a metric that mean something"
    elif stage is not None and not run.data.targets:
        yield "the data has no labels, so no metric was measured: add an array 'labels'"
    if stage is not None and stage.sparsity > 0 and run.options.export.export == "dense":
        yield "zeros are stored like any weight: --export packed makes the file smaller"
    if stage is not None and stage.granularity in STRUCTURES and run.data is not None:
        learns = stage.compensate or find_method(stage.method).needs_data
        if stage.sparsity > 0 and learns and run.inputs.calibration is run.data:
            yield (
                "outputs and metric are measured on the data that the choice or the repair was"
                " worked out on, which flatters them: give other data with --calibration"
            )
    if run.source.format != run.base.format:
        yield (
            "latency before is TensorFlow's, after onnxruntime's: to see what pruning alone brings,"
            " convert first (--sparsity 0 -o model.onnx)"
        )
    weights = stage is not None and stage.granularity == "weight"
    if weights and run.source.format == run.model.format:
        yield (
            "runtimes multiply zeros too: removing single weights does not change latency,"
            " --granularity unit does"
        )
    if gzip_estimated:
        yield "the gzipped sizes are estimated from a sample of the files"
