"""What ``prune`` can be told, and whether it makes sense; where the result goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnprune_cli.checks import check_measurable
from rnnprune_cli.cluster import worker
from rnnprune_cli.errors import UsageError, closest
from rnnprune_cli.load import TENSORFLOW_SUFFIXES
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.metrics import check_metric
from rnnprune_cli.model import ExportOptions, FineTune, LoadedModel, Stage, Target
from rnnprune_cli.select import GRANULARITIES as WEIGHT_GRANULARITIES
from rnnprune_cli.select import SCOPES, UNIT_SCOPES, parse_pattern

EXPORTS = {
    "auto": "for each weight, the smallest form that is exact",
    "dense": "zeros stay where the weights were",
    "sparse": "ONNX sparse tensors (values and positions), where that is smaller",
    "packed": "nonzero values and a bitmap or gaps, unpacked by standard operators at load",
    "shrunk": "smaller weights, without removed units or layers (--granularity unit, layer)",
}
"""Name → summary of every export form."""
VALUES = ("float32", "float16", "int8")
QUANTIZE = ("int8",)
GRANULARITIES = {
    **WEIGHT_GRANULARITIES,
    "unit": "hidden units, with all that goes with them: the model becomes smaller and faster",
    "layer": "whole layers: a linear map fitted to data, or their input, stands for them",
}
"""Name → what is removed together."""
STRUCTURES = ("unit", "layer")
"""Granularities that are cut out of the model instead of becoming zeros."""
SENSITIVITY = "sensitivity"
_SENSITIVITY = "as the default, but each layer loses what it can bear, as measured on data"
SCHEDULES = {
    "one-shot": "all that goes is gone before training begins",
    "polynomial": "weights go while training, fast at first; units fade away, then are cut",
    "constant": "weights go at once after a tenth of the training",
}
"""When what goes is removed, if the model is fine-tuned."""
STRATEGIES = ("single", "mirrored", "multiworker")
MAX_THREADS = 256
MAX_SECONDS = 3600
MAX_TRIALS = 40


@dataclass(frozen=True)
class PruneOptions:
    """Everything that ``prune`` can be told; see the command's help. No stages: only lift.

    With ``family``, several models are made: its values are sparsities of the last stage, or limits
    of the target ``family_of``.
    """

    model: Path
    output: Path | None
    stages: tuple[Stage, ...]
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
    targets: tuple[Target, ...] = ()
    trials: int = MAX_TRIALS
    family: tuple[float, ...] = ()
    family_of: str | None = None
    finetune: FineTune = dataclasses.field(default_factory=FineTune)
    quantize: str | None = None
    require: tuple[str, ...] = ()
    strict: bool = False

    @property
    def trained_on(self) -> Path | None:
        """What fine-tuning learns from."""
        return self.finetune.train or self.calibration or self.data

    @property
    def cuts(self) -> bool:
        """Tells whether units or layers are to be removed."""
        return any(stage.granularity in STRUCTURES for stage in self.stages)

    @property
    def rebuilds(self) -> bool:
        """Tells whether the model cannot be changed where it is: all works on its ONNX form."""
        return self.cuts or self.finetune.epochs > 0

    @property
    def masks(self) -> bool:
        """Tells whether single weights are to be removed."""
        return any(stage.granularity not in STRUCTURES for stage in self.stages)


def scopes_of(granularity: str) -> Mapping[str, str]:
    """Returns name → summary of the scopes of a granularity, the default first.

    Raises:
        UsageError: If there is no such granularity.
    """
    if granularity == "unit":
        return {**UNIT_SCOPES, SENSITIVITY: _SENSITIVITY}
    if granularity == "layer":
        return {"global": "all selected layers; one always stays"}
    pattern = parse_pattern(granularity)
    return pattern.scopes if pattern.kept else {**pattern.scopes, SENSITIVITY: _SENSITIVITY}


def complete_stage(
    method: str,
    granularity: str,
    scope: str | None,
    sparsity: float | None,
    **more: Any,  # noqa: ANN401  the other fields, each with its type
) -> Stage:
    """Returns a checked stage, with the default scope, and the sparsity of n:m.

    Args:
        method: Name of a criterion.
        granularity: What is removed together.
        scope: None for the default.
        sparsity: None if the granularity says it.
        more: Further fields of :class:`Stage`.

    Raises:
        UsageError: If it makes no sense.
    """
    known = scopes_of(granularity)
    only = None if granularity in STRUCTURES else parse_pattern(granularity).sparsity
    if sparsity is None and only is None:
        raise UsageError(
            "no sparsity is given", "give --sparsity 0.5 to remove half, or --target bytes=0.3"
        )
    if sparsity is not None and only is not None and abs(sparsity - only) > 1e-9:
        raise UsageError(
            f"granularity '{granularity}' removes {only:g}, not {sparsity:g}",
            "leave --sparsity out",
        )
    share = only if sparsity is None else sparsity
    assert share is not None
    best = find_method(method).scope
    default = best if best is not None and best in known else next(iter(known))
    stage = Stage(method, granularity, scope or default, share, **more)
    _check_stage(stage)
    return stage


def check_options(options: PruneOptions) -> None:
    """Raises UsageError if the options contradict each other."""
    check_metric(options.metric)
    learns = options.finetune.epochs > 0  # whose validation data can be measured on
    check_measurable(options.require, options.metric, options.data is not None or learns, None)
    for stage in options.stages:
        _check_stage(stage)
    kinds = [stage.granularity in STRUCTURES for stage in options.stages]
    if kinds != sorted(kinds, reverse=True):
        raise UsageError(
            "units or layers are to be removed after weights",
            "put that stage first: what is cut needs no zeros",
        )
    if any(stage.resize_state for stage in options.stages[:-1] if stage.granularity == "unit") and (
        sum(kinds) > 1
    ):
        raise UsageError(
            "--resize-state is for the only stage that removes units",
            "remove them in one stage, or leave the states as they are",
        )
    if options.export.export not in EXPORTS:
        raise UsageError(
            f"there is no export form '{options.export.export}'",
            closest(options.export.export, EXPORTS),
        )
    only_cut = options.cuts and not options.masks
    if only_cut and options.export.export not in ("auto", "shrunk"):
        raise UsageError(
            f"--export {options.export.export} is for single weights",
            "units and layers are cut out: leave it out, or --export shrunk",
        )
    if options.export.export == "shrunk" and not only_cut:
        raise UsageError(
            "--export shrunk is for units and layers", "use it with --granularity unit or layer"
        )
    if options.export.values not in VALUES:
        raise UsageError(
            f"values cannot be stored as '{options.export.values}'",
            closest(options.export.values, VALUES),
        )
    if options.export.values != "float32" and (
        only_cut or options.export.export not in ("auto", "packed")
    ):
        raise UsageError(
            f"--values {options.export.values} is for packed weights",
            "use it with --export packed or --export auto",
        )
    _check_quantize(options)
    last = options.stages[-1] if options.stages else None
    if last is not None and (options.targets or options.family):
        what = "--target" if options.targets else "--family"
        if last.granularity == "layer":
            raise UsageError(f"{what} is for weights and units", "give --sparsity for layers")
        if last.granularity not in STRUCTURES and parse_pattern(last.granularity).sparsity:
            raise UsageError(
                f"{what} has nothing to choose: '{last.granularity}' has one sparsity",
                "take --granularity bank:N or weight",
            )
    if options.trials < 2:
        raise UsageError(f"--trials {options.trials} is less than 2", "a search has to compare")
    if not 0 <= options.latency_seconds <= MAX_SECONDS:
        raise UsageError(
            f"--time {options.latency_seconds:g} is not between 0 and {MAX_SECONDS}",
            "it is the seconds for which both models are timed, such as 5",
        )
    _check_finetune(options)
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(
            f"--threads {options.threads} is not between 1 and {MAX_THREADS}",
            "more threads than cores do not make a model faster",
        )


def _check_quantize(options: PruneOptions) -> None:
    if options.quantize is None:
        return
    if options.quantize not in QUANTIZE:
        raise UsageError(
            f"weights cannot be quantized to '{options.quantize}'",
            closest(options.quantize, QUANTIZE),
        )
    if options.export.export in ("sparse", "packed"):
        raise UsageError(
            f"--export {options.export.export} is for float weights",
            "leave it out: quantized weights are stored dense, a byte each",
        )
    if options.export.values != "float32":
        raise UsageError(
            f"--values {options.export.values} is for packed weights, --quantize for whole"
            " operators",
            "leave out one of them",
        )
    for target in (*(t.name for t in options.targets), options.family_of):
        if target in ("bytes", "latency"):
            raise UsageError(
                f"target '{target}' is searched for before the model is quantized",
                "give --sparsity, or another target: metric-drop, parameters or nonzero",
            )


def _check_finetune(options: PruneOptions) -> None:
    own = options.finetune
    if own.epochs < 0:
        raise UsageError(f"--finetune {own.epochs} is no number of epochs", "such as 5")
    if own.epochs == 0:
        changed = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != f.default]
        if changed:
            option = OPTION_OF.get(changed[0], changed[0].replace("_", "-"))
            raise UsageError(f"--{option} is for fine-tuning", "use it with --finetune EPOCHS")
        return
    if not options.stages:
        raise UsageError("there is nothing to fine-tune", "give --sparsity")
    if options.trained_on is None:
        raise UsageError("fine-tuning needs data", "give --train TRAIN.npz, or --data")
    if own.schedule not in SCHEDULES:
        raise UsageError(f"there is no schedule '{own.schedule}'", closest(own.schedule, SCHEDULES))
    if own.schedule == "constant" and options.stages[-1].granularity in STRUCTURES:
        raise UsageError(
            "--schedule constant is for single weights", "take one-shot, or polynomial"
        )
    last = options.stages[-1].granularity
    if own.schedule == "polynomial" and last not in STRUCTURES and parse_pattern(last).sparsity:
        raise UsageError(
            f"--schedule polynomial has no steps to take: '{last}' has one sparsity",
            "take --schedule constant",
        )
    if own.strategy not in STRATEGIES:
        raise UsageError(
            f"there is no strategy '{own.strategy}'", closest(own.strategy, STRATEGIES)
        )
    if own.strategy == "multiworker":
        worker()
    if own.distill is not None and not 0 <= own.distill <= 1:
        raise UsageError(
            f"--distill {own.distill:g} is not between 0 and 1",
            "it is the share of the loss that holds outputs against the original's",
        )
    limits = {
        "--temperature": (own.temperature, 1e-3, 1e3),
        "--lr": (own.lr, 1e-12, 1e3),
        "--batch": (own.batch, 1, 1 << 20),
        "--patience": (own.patience, 1, 1 << 20),
        "--clip": (own.clip, 1e-9, 1e9),
        "--noise": (own.noise, 0, 1e3),
        "--bptt": (1 if own.bptt is None else own.bptt, 1, 1 << 30),
    }
    for option, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise UsageError(
                f"{option} {value:g} is not between {least:g} and {most:g}", "leave it out"
            )


OPTION_OF = {"epochs": "finetune", "output_weights": "loss-weight"}
"""Field of :class:`FineTune` → option, where it is called otherwise."""


def _check_stage(stage: Stage) -> None:
    found = find_method(stage.method)
    scopes = scopes_of(stage.granularity)
    scored = stage.granularity if stage.granularity in STRUCTURES else "weight"
    if scored not in found.scores:
        raise UsageError(
            f"method '{stage.method}' cannot score granularity '{stage.granularity}'",
            f"it scores: {', '.join(found.scores)}",
        )
    if stage.scope not in scopes:
        if stage.scope in {**SCOPES, **UNIT_SCOPES, SENSITIVITY: ""}:
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
    if stage.include and stage.granularity in STRUCTURES:
        raise UsageError(
            "--include is for single weights", "use it with --granularity weight, block, bank or nm"
        )
    if stage.granularity != "unit" and (stage.resize_state or stage.allow_inexact):
        option = "--resize-state" if stage.resize_state else "--allow-inexact"
        raise UsageError(f"{option} is for units", "use it with --granularity unit")


def output_path(
    model: Path, output: Path | None, what: str = "pruned", rebuilds: bool = False
) -> tuple[Path, str]:
    """Returns where the result goes and its format, from the two paths alone.

    Args:
        model: The model.
        output: What the user gave.
        what: Part of the name if nothing was given.
        rebuilds: See :attr:`PruneOptions.rebuilds`.

    Raises:
        UsageError: If the format cannot be written from this kind of model.
    """
    from_tensorflow = model.is_dir() or model.suffix.lower() in TENSORFLOW_SUFFIXES
    own = "savedmodel" if model.is_dir() else "keras" if from_tensorflow else "onnx"
    if own == "keras" and rebuilds and (output is None or output.suffix.lower() != ".onnx"):
        if output is not None and _is_directory(output):
            return output, "savedmodel"
        raise UsageError(
            "a model that loses units or layers, or is fine-tuned, is not written as a"
            f" {model.suffix} file",
            "give a directory for a SavedModel, -o NAME, or -o NAME.onnx",
        )
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
        if _is_directory(output):
            return output, "savedmodel"
        raise UsageError(
            f"an ONNX model cannot be written as '{output}'",
            "the output must end in .onnx; a directory for a SavedModel has no ending",
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


def _is_directory(output: Path) -> bool:
    """Tells whether a path is to be a directory; what follows its last dot may be a number."""
    suffix = output.suffix.lower()
    return output.is_dir() or not (suffix in TENSORFLOW_SUFFIXES or suffix[1:].isalpha())


def check_output(options: PruneOptions, output: Path, output_format: str) -> None:
    """Raises UsageError if the result must not be written where it is to go."""
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
    for path in (output, data_file(output)) if output_format == "onnx" else (output,):
        if path.exists() and not (options.force or options.finetune.resume):
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


def protect(source: LoadedModel, output: Path) -> None:
    """Raises UsageError if writing the output would destroy a file of the input."""
    for file in source.files:
        for path in (output, data_file(output)):
            if path.exists() and path.samefile(file):
                raise UsageError(
                    f"writing {output} would replace {path}, which belongs to the input",
                    "give another path with -o",
                )


def member_path(output: Path, value: float) -> Path:
    """Returns where a member of a family goes: its value is in its name."""
    return output.with_name(f"{output.stem}-{value:g}{output.suffix}")


def data_file(output: Path) -> Path:
    """Returns where the external data of an ONNX model go."""
    return output.with_name(f"{output.name}.data")
