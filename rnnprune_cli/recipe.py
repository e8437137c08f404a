"""Recipes: what ``prune`` is told, as a TOML file; and reports, whose runs can be repeated.

A recipe holds keys for the whole run and a list of stages, which are done in order::

    version = 1
    model = "model.onnx"
    data = "test.npz"

    [[stage]]
    granularity = "unit"
    sparsity = 0.5

    [[stage]]
    sparsity = 0.7
    layers = ["decoder*"]

Keys are called like the options of ``prune``; relative paths start at the recipe's folder. What is
read is data: nothing in a recipe or a report is ever executed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rnnprune_cli import __version__
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.model import Report, Stage, Target
from rnnprune_cli.options import PruneOptions, complete_stage, data_file
from rnnprune_cli.report.read import MAX_REPORT_BYTES, check_version, parsed
from rnnprune_cli.save import check_writable, write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
"""Of the format of recipes."""
MAX_RECIPE_BYTES = 1 << 20
_MAX_SQUARED_DOTS = 4_000_000
KEYS: Mapping[str, str] = {
    "model": "model",
    "output": "output",
    "data": "data",
    "calibration": "calibration",
    "seed": "seed",
    "metric": "metric",
    "time": "latency_seconds",
    "target": "targets",
    "family": "family",
    "trials": "trials",
    "export": "export.export",
    "values": "export.values",
    "quantize": "quantize",
    "finetune": "finetune.epochs",
    "train": "finetune.train",
    "validation": "finetune.validation",
    "distill": "finetune.distill",
    "temperature": "finetune.temperature",
    "lr": "finetune.lr",
    "batch": "finetune.batch",
    "schedule": "finetune.schedule",
    "patience": "finetune.patience",
    "clip": "finetune.clip",
    "bptt": "finetune.bptt",
    "noise": "finetune.noise",
    "balance": "finetune.balance",
    "loss-weight": "finetune.output_weights",
    "freeze": "finetune.freeze",
    "signature": "signature",
    "assume-right-padding": "right_padding",
    "threads": "threads",
    "require": "require",
    "strict": "strict",
}
"""Key for the whole run → field of :class:`PruneOptions`, with a dot a field of that field."""
STAGE_KEYS: Mapping[str, str] = {
    f.name.replace("_", "-"): f.name for f in dataclasses.fields(Stage)
}
"""Key of a stage → field of :class:`Stage`."""
STAGE_DEFAULTS: Mapping[str, Any] = {
    "method": "magnitude",
    "granularity": "weight",
    "scope": None,
    "sparsity": None,
}
"""What a stage says if it does not say so; fields that have a default themselves are not here."""
COMMAND_LINE_ONLY = (
    "force",
    "format",
    "logdir",
    "quiet",
    "report",
    "resume",
    "save-recipe",
    "skip-if-unchanged",
    "strategy",
    "verbose",
)
"""Options of ``prune`` that a recipe has not: they do not change the result."""
FINETUNE = tuple(KEYS)[tuple(KEYS).index("finetune") : tuple(KEYS).index("signature")]
"""Keys that are left out where nothing is fine-tuned."""
SEARCH = ("target", "family", "trials")
"""Keys that say how sparsities are found; what was found is in the stages of a report."""
_DECIDE = ("seed", "threads", "data", "calibration")
"""Fields that the command line may replace, and that change the bytes of the result."""
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path (a string)",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """What a recipe, or the report of an earlier run, says.

    Attributes:
        path: The file.
        fields: Field of :class:`PruneOptions` → value, for the keys that the file has.
        stages: What to do.
        model_sha256: Of the model of the report; None for a recipe.
        output_format: What the report's run wrote.
        output_sha256: Of that.
    """

    path: Path
    fields: Mapping[str, Any]
    stages: tuple[Stage, ...]
    model_sha256: str | None = None
    output_format: str | None = None
    output_sha256: str | None = None

    def options(self, **given: Any) -> PruneOptions:  # noqa: ANN401  fields, each with its type
        """Returns the options of the run.

        Args:
            given: Fields of :class:`PruneOptions`, for those that the file is not to decide.

        Raises:
            UsageError: If there is no model.
        """
        fields = {**self.fields, **{k: v for k, v in given.items() if v is not None}}
        model = fields.pop("model", None)
        if model is None:
            raise UsageError(
                f"{self.path} names no model",
                f'write model = "model.onnx" in it, or: rnnprune run {self.path} MODEL',
            )
        options = PruneOptions(model, None, self.stages)
        for field, value in fields.items():
            options = _replaced(options, field, value)
        return options

    def check_model(self, options: PruneOptions) -> None:
        """Raises RnnpruneError if a report is to be repeated on another model than its own."""
        if self.model_sha256 is None:
            return
        from rnnprune_cli.load import model_files
        from rnnprune_cli.measure import sha256

        if not options.model.exists():
            raise RnnpruneError(
                f"{options.model}, the model of {self.path}, does not exist",
                "relative paths start where the report was made: go there, or give MODEL",
            )
        if sha256(model_files(options.model)) != self.model_sha256:
            raise RnnpruneError(
                f"{options.model} is not the model that {self.path} is about: its sha256 differs",
                f"give the original: rnnprune run {self.path} MODEL; a recipe runs on any model",
            )

    def compared(self, result: Report, options: PruneOptions) -> Report:
        """Returns the report of a run, with a warning if it repeats another, but not its bytes."""
        of_both = result.output.format, result.output.sha256
        output = Path(result.output.path)
        if (
            of_both == (self.output_format, self.output_sha256)
            or result.output.format != self.output_format
            or any(getattr(options, name) != self._said(name) for name in _DECIDE)
            or (result.output.format == "onnx" and data_file(output).exists())  # holds its name
        ):
            return result
        warning = (
            f"the written model is not, byte for byte, that of {self.path}: the data, the version"
            " of rnnprune or of a library, or the processor is another"
        )
        return dataclasses.replace(result, warnings=(*result.warnings, warning))

    def _said(self, name: str) -> Any:  # noqa: ANN401  any field
        known = {field.name: field.default for field in dataclasses.fields(PruneOptions)}
        return self.fields.get(name, known[name])


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe (``.toml``), or the report of a run that is to be repeated (``.json``).

    Raises:
        RnnpruneError: If it cannot be read, or is a report of something else.
        UsageError: If it holds what makes no sense.
    """
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return _recipe(path, parsed(path, "TOML", MAX_RECIPE_BYTES, _toml))
    if suffix == ".json":
        return _report(path, parsed(path, "JSON", MAX_REPORT_BYTES, json.loads))
    raise UsageError(
        f"{path} is neither a recipe (.toml) nor a report (.json)",
        "to compress a model without a recipe: rnnprune prune MODEL",
    )


def check_recipe(path: Path, options: PruneOptions) -> None:
    """Raises UsageError if ``--save-recipe`` cannot write there what is to be done."""
    if path.suffix.lower() != ".toml":
        raise UsageError(f"a recipe cannot be written as '{path}'", "it must end in .toml")
    if options.output is not None and options.output.resolve() == path.resolve():
        raise UsageError(f"{path} is the output and the recipe", "give one of them another path")
    if options.family:
        raise UsageError(
            "a recipe holds what was done to make one model", "leave out --save-recipe, or --family"
        )
    check_writable(path, options.force)
    try:
        recipe_text(options, path.parent).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "a path or pattern that is no Unicode cannot stand in a recipe", "rename the file"
        ) from error


def save_recipe(path: Path, options: PruneOptions, stages: tuple[Stage, ...]) -> None:
    """Writes what was done as a recipe.

    Args:
        path: Where to.
        options: What was asked for.
        stages: What was done: what was searched for is found.
    """
    done = dataclasses.replace(options, stages=stages, targets=())
    write_text(path, recipe_text(done, path.parent))


def recipe_text(options: PruneOptions, folder: Path) -> str:
    """Returns options as a recipe, defaults included: a later version may have others.

    Args:
        options: What to do.
        folder: Where the recipe will lie; paths below it become relative.
    """
    import tomli_w

    stages = [
        {
            key: _plain(value, folder)
            for key, field in STAGE_KEYS.items()
            if (value := getattr(stage, field)) not in (None, {})
        }
        for stage in options.stages
    ]
    if options.targets or options.family:
        stages[-1].pop("sparsity")
    top = {key: _plain(value, folder) for key, value in _top(options).items()}
    document = {"version": VERSION, **top, "stage": stages}
    note = f"# Written by rnnprune {__version__}. To repeat what was done: rnnprune run FILE\n"
    return note + tomli_w.dumps(document)


def arguments_of(options: PruneOptions) -> dict[str, Any]:
    """Returns the arguments of ``prune`` for the whole run, as a report has them."""
    return {_argument(key): value for key, value in _top(options).items()}


def targets_of(
    texts: Sequence[str], family: Sequence[float]
) -> tuple[tuple[Target, ...], str | None]:
    """Returns ``targets`` and ``family_of`` of :class:`PruneOptions` for what ``--target`` says.

    Args:
        texts: ``NAME=LIMIT``, or one ``NAME`` whose limits are those of a family.
        family: What ``--family`` says.

    Raises:
        UsageError: If one is not of that form, or lacks a limit.
    """
    if not texts:
        return (), None
    from rnnprune_cli.search import check_name, parse_target

    bare = [text for text in texts if "=" not in text]
    for name in bare:
        check_name(name)
    if bare and (not family or len(bare) > 1):
        raise UsageError(
            f"target '{bare[-1]}' has no limit", f"give {bare[-1]}=0.5, or limits with --family"
        )
    limits = tuple(parse_target(text) for text in texts if "=" in text)
    return limits, bare[0] if bare else None


def _toml(text: str) -> Any:  # noqa: ANN401  any TOML value
    """Parses TOML, but no keys of thousands of parts, which take tomllib gigabytes."""
    if sum(line.count(".") ** 2 for line in text.split("\n")) > _MAX_SQUARED_DOTS:
        raise RecursionError
    return tomllib.loads(text)


def _recipe(path: Path, document: Mapping[str, Any]) -> Recipe:
    top = dict(document)
    version = _checked(top.pop("version", VERSION), int, f"{path}: version")
    if version != VERSION:
        raise RnnpruneError(
            f"{path} is a recipe of version {version}; this rnnprune reads version {VERSION}",
            "take the rnnprune that it was written for",
        )
    stages = top.pop("stage", [])
    if isinstance(stages, Mapping):
        raise UsageError(
            f"{path}: stage must be a list", "write [[stage]], in double brackets, above each one"
        )
    if not isinstance(stages, list) or not all(isinstance(s, Mapping) for s in stages):
        raise UsageError(f"{path}: stage must be a list of tables", "write [[stage]] above each")
    fields: dict[str, Any] = {}
    texts: tuple[str, ...] = ()
    for key, value in top.items():
        if key not in KEYS:
            known = [*KEYS, "version", "stage"]
            _refuse_key(str(path), key, known, STAGE_KEYS, "say it in a stage, below [[stage]]")
        if key == "target":
            texts = _checked(value, tuple[str, ...], f"{path}: target")
        else:
            fields[KEYS[key]] = _field(KEYS[key], value, f"{path}: {key}", path.parent)
    fields["targets"], fields["family_of"] = _named(
        str(path), lambda: targets_of(texts, fields.get("family", ()))
    )
    searched = bool(texts or fields.get("family"))
    if not stages:
        raise UsageError(
            f"{path} holds no stage", "write [[stage]], and below it what to do: sparsity = 0.5"
        )
    elsewhere = "it is for the whole run: write it above the first [[stage]]"
    done = []
    for number, table in enumerate(stages, start=1):
        where = f"{path}: stage {number}"
        for key in table:
            if key not in STAGE_KEYS:
                _refuse_key(where, key, STAGE_KEYS, KEYS, elsewhere)
        found = searched and number == len(stages)
        if found and "sparsity" in table:
            raise UsageError(
                f"{where}: sparsity is given, and so is what is to be found out",
                "leave out the sparsity of the last stage, or target and family",
            )
        given = {STAGE_KEYS[key]: (key, value) for key, value in table.items()}
        done.append(_stage(where, given | ({"sparsity": ("sparsity", 0.0)} if found else {})))
    return Recipe(path, fields, tuple(done))


def _report(path: Path, document: Any) -> Recipe:  # noqa: ANN401  any JSON value
    check_version(document, str(path))
    if document.get("status") not in ("ok", "unchanged"):
        raise RnnpruneError(
            f"{path} is the report of a run that failed",
            "only what came to its end can be repeated: give another report, or a recipe",
        )
    if "models" in document:
        raise RnnpruneError(
            f"{path} is the report of a family, of several models",
            "run again what its arguments say, or save one of its models' reports",
        )
    plan = document.get("plan")
    if not isinstance(plan, dict) or not plan.get("stages"):
        raise RnnpruneError(
            f"{path} is not about pruning", "give a report of rnnprune prune, or of run"
        )
    stages = _of(path, plan, "stages", list)
    arguments = _of(path, document, "arguments", dict)
    known = {_argument(key): field for key, field in KEYS.items() if key not in SEARCH}
    fields = {
        known[name]: _field(known[name], value, f"{path}: arguments: {name}")
        for name, value in arguments.items()
        if name in known
    }
    fields["seed"] = _field("seed", plan.get("seed"), f"{path}: plan: seed")
    done = []
    for number, table in enumerate(stages, start=1):
        where = f"{path}: stage {number}"
        if not isinstance(table, dict):
            raise UsageError(f"{where} must be an object", "the report was changed by hand")
        for name in table:
            if name not in STAGE_KEYS.values():
                raise UsageError(
                    f"{where}: this rnnprune does not know '{name}'",
                    "take the version of rnnprune that wrote it",
                )
        done.append(_stage(where, {name: (name, value) for name, value in table.items()}))
    model, output = (_of(path, document, name, dict) for name in ("model", "output"))
    return Recipe(
        path,
        fields,
        tuple(done),
        _of(path, model, "sha256", str),
        _of(path, output, "format", str),
        _of(path, output, "sha256", str),
    )


def _of(path: Path, table: Mapping[str, Any], name: str, kind: type) -> Any:  # noqa: ANN401
    """Returns an entry of a report."""
    value = table.get(name)
    if not isinstance(value, kind):
        raise RnnpruneError(
            f"{path} is damaged: '{name}' is missing, or of the wrong type",
            "give the report as --report wrote it",
        )
    return value


def _refuse_key(
    where: str, key: str, known: Iterable[str], others: Iterable[str], elsewhere: str
) -> NoReturn:
    if key in others:
        hint = elsewhere
    elif key in COMMAND_LINE_ONLY:
        hint = f"give it on the command line: --{key}"
    else:
        hint = closest(key, known)
    raise UsageError(f"{where}: there is no key '{key}'", hint)


def _stage(where: str, given: Mapping[str, tuple[str, Any]]) -> Stage:
    """Makes a stage of field → name for the user, and value."""
    kinds = _kinds(Stage)
    fields = {
        field: _checked(value, kinds[field], f"{where}: {name}")
        for field, (name, value) in given.items()
    }
    for layer, share in fields.get("shares", {}).items():
        if not 0 <= share < 1:
            raise UsageError(
                f"{where}: the share of '{layer}' is not between 0 and 1", "it is its sparsity"
            )
    return _named(where, lambda: complete_stage(**{**STAGE_DEFAULTS, **fields}))


def _named(where: str, make: Callable[[], _T]) -> _T:
    """Returns what is made; errors say where, and options have no dashes in a file."""
    try:
        return make()
    except UsageError as error:
        message, hint = (re.sub(r"--(?=[a-z])", "", t) for t in (error.message, error.hint))
        raise UsageError(f"{where}: {message}", hint) from error


def _field(field: str, value: Any, where: str, folder: Path | None = None) -> Any:  # noqa: ANN401
    """Returns the value of a field of the options; paths start at a folder."""
    outer, _, inner = field.partition(".")
    kind = _kinds(PruneOptions)[outer]
    if inner:
        kind = _kinds(kind)[inner]
    checked = _checked(value, kind, where)
    if field == "seed" and checked < 0:
        raise UsageError(f"{where} must not be negative, not {_shown(value)}", "take 0")
    return folder / checked if folder and isinstance(checked, Path) else checked


@functools.cache
def _kinds(of: type) -> dict[str, Any]:
    """Returns field → type of a dataclass."""
    return typing.get_type_hints(of)


def _checked(value: Any, kind: Any, where: str) -> Any:  # noqa: ANN401  any type
    """Returns a value that was read, as a type says.

    Raises:
        UsageError: If it is of another type.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        if value is None and len(kinds) < len(typing.get_args(kind)):
            return None
        (kind,) = kinds
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        if isinstance(value, list):
            return tuple(_checked(v, of, f"{where}: each of its values") for v in value)
        raise UsageError(
            f"{where} must be a list, not {_shown(value)}", 'write it in brackets: ["…", "…"]'
        )
    if typing.get_origin(kind) is Mapping:
        of = typing.get_args(kind)[1]
        if isinstance(value, dict):
            return {key: _checked(v, of, f"{where}: {key}") for key, v in value.items()}
        raise UsageError(
            f"{where} must be a table, not {_shown(value)}", "write it in braces: {NAME = …}"
        )
    expected: Any = {Path: str, float: (int, float)}.get(kind, kind)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        quotes = "in quotes" if expected is str else "without quotes"
        raise UsageError(
            f"{where} must be {_TYPES[kind]}, not {_shown(value)}", f"write it {quotes}"
        )
    if kind is float:
        return _float(value)
    return _path(value, where) if kind is Path else value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return float("inf")


def _path(value: str, where: str) -> Path:
    try:
        usable = bool(os.fsencode(value)) and "\0" not in value
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise UsageError(f"{where} must be a path, not {_shown(value)}", "name a file")
    return Path(value)


def _shown(value: object) -> str:
    """Returns the beginning of a value that was read."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _plain(value: Any, folder: Path) -> Any:  # noqa: ANN401  any TOML value
    """Returns a value as TOML has it."""
    if isinstance(value, Path):
        whole, below = value.absolute(), folder.absolute()
        return str(whole.relative_to(below) if whole.is_relative_to(below) else whole)
    if isinstance(value, Mapping):
        return {key: _plain(inner, folder) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _top(options: PruneOptions) -> dict[str, Any]:
    """Returns key → value of what the options say for the whole run."""
    values = {key: operator.attrgetter(field)(options) for key, field in KEYS.items()}
    texts = [f"{target.name}={target.limit!r}" for target in options.targets]
    values["target"] = [*texts, *([options.family_of] if options.family_of else [])]
    if not options.targets and not options.family:
        for key in SEARCH:
            del values[key]
    if not options.finetune.epochs:
        for key in FINETUNE:
            del values[key]
    return {key: value for key, value in values.items() if value not in (None, (), [])}


def _argument(key: str) -> str:
    """Returns the name of a key among the arguments of ``prune``."""
    return "right_padding" if key == "assume-right-padding" else key.replace("-", "_")


def _replaced(options: PruneOptions, field: str, value: Any) -> PruneOptions:  # noqa: ANN401
    outer, _, inner = field.partition(".")
    if inner:
        value = dataclasses.replace(getattr(options, outer), **{inner: value})
    return dataclasses.replace(options, **{outer: value})
