"""The stages of a plan, applied to a model one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnnprune_cli.data import (
    Dataset,
    has_nan,
    load_dataset,
    made_up_feeds,
    padded_on_the_right,
    split,
    thinned,
)
from rnnprune_cli.errors import RnnpruneError, UsageError, closest
from rnnprune_cli.methods import method as find_method
from rnnprune_cli.metrics import LABEL_FREE, Quality, parse_metrics
from rnnprune_cli.model import (
    BoolArray,
    Claim,
    Feed,
    Gradients,
    KeptUnits,
    Layer,
    LoadedModel,
    OtherLayer,
    RecurrentLayer,
    Repair,
    ResizedState,
    Runner,
    Stage,
    StoredWeight,
)
from rnnprune_cli.options import STRUCTURES, PruneOptions
from rnnprune_cli.verify import CONVERSION_TOLERANCE, require, verify_runs
from rnnprune_cli.weights import PrunedWeights, WeightTask, prune_weights

if TYPE_CHECKING:
    from rnnprune_cli.embeddings import Unused
    from rnnprune_cli.hessians import LayerInputs
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.shrink.task import Shrunk
    from rnnprune_cli.shrink.units import Units

Progress = Callable[[str], None]

VERIFIED_SAMPLES = 4
MAX_CALIBRATION = 512
"""Training samples to calibrate on, where nothing else is given for that."""
VALIDATION_SHARE = 0.1
MAX_VALIDATION = 1000
"""Part of the training samples, and how many at most, that validate."""
_MACS_OF_MADE_UP_FEED = 300_000_000
"""Made-up sequences are shorter for large models, so that one call stays below a second."""


class Inputs:
    """The original, ready to run, and what it is run on; both are made when first asked for."""

    def __init__(self, options: PruneOptions, source: LoadedModel, base: LoadedModel) -> None:
        self.options = options
        self._source = source
        self._base = base
        self._qualities: dict[int, Quality | None] = {}

    @functools.cached_property
    def original(self) -> Runner:
        """The model that the user named."""
        return self._source.open(self.options.threads)

    @functools.cached_property
    def data(self) -> Dataset | None:
        """What ``--data`` holds; if that is trained on, what validates instead."""
        path = self.options.data
        if self.options.finetune.epochs and (path is None or path == self.options.trained_on):
            return self.training[1]
        return self._loaded(path)

    @functools.cached_property
    def calibration(self) -> Dataset | None:
        """What ``--calibration`` holds, or else ``--data``, or some of what is trained on."""
        path = self.options.calibration
        if path is None and self.options.finetune.epochs:
            return thinned(self.training[0], MAX_CALIBRATION)
        return self.data if path is None else self._loaded(path)

    @functools.cached_property
    def training(self) -> tuple[Dataset, Dataset]:
        """What to train on, and what decides which weights are kept.

        Raises:
            UsageError: If there is nothing to train on, or it cannot be split.
        """
        train = self._loaded(self.options.trained_on)
        if train is None:
            raise UsageError("fine-tuning needs data", "give --train, or --data")
        held = self._loaded(self.options.finetune.validation)
        if held is not None:
            return train, held
        return split(train, min(VALIDATION_SHARE, MAX_VALIDATION / train.count))

    def _loaded(self, path: Path | None) -> Dataset | None:
        return None if path is None else load_dataset(path, self.original.inputs)

    @functools.cached_property
    def feeds(self) -> list[Feed]:
        """Some samples of the data, or made-up inputs, to compare models on.

        Raises:
            RnnpruneError: If the original answers the data with NaN.
        """
        data = self.data
        if data is None:
            macs = sum(layer.macs_per_step for layer in self._base.layers)
            longest = max(1, _MACS_OF_MADE_UP_FEED // macs)
            feeds = made_up_feeds(self.original, self.options.seed, longest)
            return [*map(padded_on_the_right, feeds)] if self.options.right_padding else feeds
        bounds = list(data.batches(VERIFIED_SAMPLES))[: VERIFIED_SAMPLES if data.single else 1]
        found: list[Feed] = [data.feed(start, stop) for start, stop in bounds]
        for feed in found:
            self.original.reset()
            if any(has_nan(output) for output in self.original.run(feed)):
                raise RnnpruneError(
                    "the original model answers the data with NaN, so nothing can be compared",
                    "check the data against what the model was trained on",
                )
        return found

    def quality(self, data: Dataset) -> Quality | None:
        """Measures models on a data set; one for each data set.

        Without labels, states that callers hand in and get back are left out: what goes of them is
        a loss to nobody by itself, and their size may change.

        Returns:
            None if there is nothing to measure.
        """
        if id(data) not in self._qualities:
            asked = parse_metrics([self.options.metric])
            numbers = {o.name for o in self.original.outputs if o.dtype.kind in "fiub"}
            states: frozenset[str] = frozenset()
            if not data.targets:
                asked = {output: name for output, name in asked.items() if name in LABEL_FREE}
                states = self.states
            measured = data.targets or asked or numbers - states
            self._qualities[id(data)] = (
                Quality(self.original, data, asked, states) if measured else None
            )
        return self._qualities[id(data)]

    @functools.cached_property
    def states(self) -> frozenset[str]:
        """Outputs that hand back states."""
        from rnnprune_cli.onnx_model import OnnxModel
        from rnnprune_cli.shrink.task import coupled

        if not isinstance(self._base, OnnxModel):
            return frozenset()
        states = coupled(self._base).states
        return frozenset(s.output.name or "" for s in states if s.input is not None)

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


@dataclass(frozen=True, eq=False)
class Applied:
    """What stages made of a model.

    Attributes:
        model: The model without the units and layers that went.
        pruned: Weight name → what becomes of it.
        claims: What was verified on the way.
        blocked: Layer name → why it was not pruned, or not all of it.
        units: The units of each layer that stay.
        states: States that changed their public shape.
        repairs: How well what is gone is made up for.
        warnings: What the user should know.
        others: Dense layers and embeddings that were pruned, too, of ``model``.
    """

    model: LoadedModel
    pruned: Mapping[str, StoredWeight] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    blocked: Mapping[str, str] = field(default_factory=dict)
    units: tuple[KeptUnits, ...] = ()
    states: tuple[ResizedState, ...] = ()
    repairs: tuple[Repair, ...] = ()
    warnings: tuple[str, ...] = ()
    others: tuple[OtherLayer, ...] = ()


class Applier:
    """Applies stages; what is known about a model is kept for the next time.

    Args:
        inputs: What to calibrate and to verify on.
        as_onnx: Makes an ONNX model of one that is none; raises RnnpruneError if it cannot.
        stack: Keeps temporary files.
        progress: Called with a short text at the beginning of each step.

    Attributes:
        keep: Whether what is known about units is kept, too; it takes a model's worth of memory.
    """

    keep = False

    def __init__(
        self,
        inputs: Inputs,
        as_onnx: Callable[[LoadedModel], LoadedModel],
        stack: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        self._inputs = inputs
        self._as_onnx = as_onnx
        self._stack = stack
        self._progress = progress
        self._options = inputs.options
        self._models: list[LoadedModel] = []
        self._units: dict[tuple[int, str], Units] = {}
        self._watched: dict[tuple[int, tuple[str, ...]], Mapping[str, LayerInputs]] = {}
        self._derived: dict[tuple[int, tuple[str, ...]], Mapping[str, Gradients]] = {}
        self._unused: dict[tuple[int, tuple[str, ...]], Unused] = {}

    def again(self) -> Applier:
        """Returns another one, to which nothing is known yet of any model."""
        return Applier(self._inputs, self._as_onnx, self._stack, self._progress)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Lets the files of what is applied inside live no longer than the block."""
        own = self._stack
        with contextlib.ExitStack() as stack:
            self._stack = stack
            try:
                yield
            finally:
                self._stack = own

    def apply(self, model: LoadedModel, stages: Sequence[Stage]) -> Applied:
        """Applies stages in order."""
        done = Applied(model)
        for stage in stages:
            done = self.add(done, stage)
        return done

    def add(
        self, done: Applied, stage: Stage, first: Mapping[str, BoolArray] | None = None
    ) -> Applied:
        """Applies one more stage.

        Args:
            done: The model, as far as it is pruned.
            stage: The stage.
            first: Layer → units ``[directions, hidden]`` that go before all others.
        """
        names = [layer.name for layer in done.model.layers]
        names += [layer.name for layer in included(done.model, stage)]
        for name in stage.shares:
            if name not in names:
                raise UsageError(f"there is no layer '{name}'", closest(name, names))
        if stage.granularity in STRUCTURES:
            return self._cut(done, stage, first or {})
        return self._weights(done, stage)

    def _number(self, model: LoadedModel) -> int:
        """Returns a number by which a model is known from now on."""
        if not any(known is model for known in self._models):
            self._models.append(model)
        return next(k for k, known in enumerate(self._models) if known is model)

    def _cut(self, done: Applied, stage: Stage, first: Mapping[str, BoolArray]) -> Applied:
        """Removes units or layers; the new model lives as long as the stack."""
        from rnnprune_cli.onnx_model import OnnxModel
        from rnnprune_cli.shrink.layers import remove_layers
        from rnnprune_cli.shrink.task import Task
        from rnnprune_cli.shrink.units import look_at_units, remove_units

        model = done.model
        assert isinstance(model, OnnxModel)
        names = [layer.name for layer in chosen_layers(model.layers, stage)]
        task = Task(
            model,
            stage,
            names,
            self._folder(),
            self._inputs.calibration,
            self._inputs.feeds,
            self._inputs.data is None,
            self._options.seed,
            self._options.threads,
            self._progress,
            first,
        )
        if stage.granularity == "layer":
            shrunk = remove_layers(task)
        elif self.keep:
            same = repr(dataclasses.replace(stage, sparsity=0.0, shares={}))
            key = (self._number(model), same)
            if key not in self._units:
                self._units[key] = look_at_units(task)
            shrunk = remove_units(task, self._units[key])
        else:
            shrunk = remove_units(task)
        blocked = {
            layer.name: "not selected" for layer in model.layers if layer.name not in names
        } | dict(shrunk.blocked)
        require(shrunk.claims)
        return dataclasses.replace(
            done,
            model=shrunk.model,
            claims=(*done.claims, *shrunk.claims),
            blocked=blocked,
            units=_composed(done.units, shrunk),
            states=shrunk.states or done.states,
            repairs=(*done.repairs, *shrunk.repairs),
            warnings=(*done.warnings, *shrunk.warnings),
        )

    def _weights(self, done: Applied, stage: Stage) -> Applied:
        """Removes single weights."""
        recurrent = chosen_layers(done.model.layers, stage)
        others = included(done.model, stage)
        if not recurrent and not others:
            raise UsageError("--exclude leaves no layer to prune", "leave out one of its patterns")
        dense = tuple(layer for layer in others if layer.kind == "dense")
        chosen: tuple[Layer, ...] = (*recurrent, *dense)
        method = find_method(stage.method)
        inputs: Mapping[str, LayerInputs] = {}
        gradients: Mapping[str, Gradients] = {}
        warnings = list(done.warnings)
        if method.needs_data and self._inputs.calibration is None:
            raise UsageError(
                f"method '{method.name}' scores what data make of a model",
                "give --data, or --calibration",
            )
        if method.needs_gradients and dense:
            raise UsageError(
                f"method '{method.name}' scores recurrent layers only, not '{dense[0].name}'",
                "take --method obs or activation with --include, or a stage for each",
            )
        if self._inputs.calibration is not None and (stage.compensate or method.needs_data):
            try:
                inputs = self._layer_inputs(done.model, chosen)
                if method.needs_gradients:
                    gradients = self._gradients(done.model, recurrent)
            except RnnpruneError as error:
                if method.needs_data:
                    raise
                warnings.append(f"nothing was refitted: {error.message}")
        task = WeightTask(
            (*done.model.layers, *dense, *_sharing(done.model, dense)),
            chosen,
            stage,
            self._options.seed,
            self._progress,
            done.pruned,
            inputs,
            gradients,
        )
        result = prune_weights(task) if chosen else PrunedWeights({}, {})
        done = dataclasses.replace(
            done,
            pruned={**done.pruned, **result.pruned},
            blocked={**result.blocked, **done.blocked},
            repairs=(*done.repairs, *result.repairs),
            warnings=tuple(warnings),
            others=tuple(dict.fromkeys((*done.others, *others))),
        )
        embeddings = [layer for layer in others if layer.kind == "embedding"]
        return self._without_unused(done, embeddings) if embeddings else done

    def _without_unused(self, done: Applied, layers: Sequence[OtherLayer]) -> Applied:
        """Removes entries of embeddings that the data never use."""
        from rnnprune_cli.embeddings import remove_unused
        from rnnprune_cli.onnx_model import OnnxModel

        model, data = done.model, self._inputs.calibration
        assert isinstance(model, OnnxModel)  # others have no such layers
        if data is None:
            raise UsageError(
                f"which entries of '{layers[0].name}' are used is seen on data",
                "give --data or --calibration, or leave embeddings out of --include",
            )
        key = (self._number(model), tuple(layer.name for layer in layers))
        if key not in self._unused:
            self._unused[key] = remove_unused(
                model, layers, data, self._folder(), self._options.threads, self._progress
            )
        found = self._unused[key]
        require(found.claims)
        return dataclasses.replace(
            done,
            pruned={**done.pruned, **found.pruned},
            blocked={**done.blocked, **found.blocked},
            claims=(*done.claims, *found.claims),
            warnings=tuple(dict.fromkeys((*done.warnings, *found.warnings))),
        )

    def _layer_inputs(
        self, model: LoadedModel, layers: Sequence[Layer]
    ) -> Mapping[str, LayerInputs]:
        """Returns what layers read on the calibration data, by their names."""
        from rnnprune_cli.hessians import layer_inputs

        key = (self._number(model), tuple(layer.name for layer in layers))
        if key not in self._watched:
            assert self._inputs.calibration is not None
            onnx, places = self._in_onnx(model, layers)
            own = list(dict.fromkeys(layer for layer, _ in places.values()))
            found = layer_inputs(
                onnx,
                own,
                self._inputs.calibration,
                self._folder(),
                self._options.threads,
                self._progress,
            )
            self._watched[key] = {
                name: found[layer.name]
                if direction is None
                else found[layer.name].of_direction(direction)
                for name, (layer, direction) in places.items()
            }
        return self._watched[key]

    def _gradients(
        self, model: LoadedModel, layers: Sequence[RecurrentLayer]
    ) -> Mapping[str, Gradients]:
        """Returns the gradients of a loss on the calibration data, by the weights' names."""
        from rnnprune_cli.hessians import handed_states
        from rnnprune_cli.trainer.gradient import saliencies

        key = (self._number(model), tuple(layer.name for layer in layers))
        if key not in self._derived:
            assert self._inputs.calibration is not None
            onnx, places = self._in_onnx(model, layers)
            own = list(dict.fromkeys(layer.name for layer, _ in places.values()))
            found = saliencies(
                onnx,
                self._inputs.calibration,
                own,
                handed_states(onnx, self._inputs.calibration),
                seed=self._options.seed,
                threads=self._options.threads,
                progress=self._progress,
            )
            derived = {}
            for layer in layers:
                there, direction = places[layer.name]
                for weight, other in zip(layer.weights, there.weights, strict=True):
                    both = found[other.name]
                    if direction is not None:
                        part = slice(direction, direction + 1)
                        both = Gradients(both.mean[part], both.square[part])
                    derived[weight.name] = both
            self._derived[key] = derived
        return self._derived[key]

    def _in_onnx(
        self, model: LoadedModel, layers: Sequence[Layer]
    ) -> tuple[OnnxModel, dict[str, tuple[Layer, int | None]]]:
        """Finds layers in the model as ONNX, by the values of their weights.

        Returns:
            The ONNX model, and name → layer of it, and which of its directions (None: all).

        Raises:
            RnnpruneError: If the model does not convert, or a layer is not found in it.
        """
        from rnnprune_cli.onnx_model import OnnxModel

        if isinstance(model, OnnxModel):
            return model, {layer.name: (layer, None) for layer in layers}
        try:
            onnx = self._as_onnx(model)
        except RnnpruneError as error:
            raise RnnpruneError(
                f"the model is watched on data as ONNX: {error.message}",
                "--method magnitude --no-compensate prunes it in place, without data",
                error.code,
            ) from error
        assert isinstance(onnx, OnnxModel)
        places = {
            _digest(layer, d): (layer, d) for layer in onnx.layers for d in range(layer.w.shape[0])
        }
        found: dict[str, tuple[Layer, int | None]] = {}
        for layer in layers:
            place = places.get(_digest(layer, 0))
            if place is None:
                raise RnnpruneError(
                    f"layer '{layer.name}' is not found in the model as ONNX, where it would be"
                    " watched on data",
                    "convert it with -o NAME.onnx, or take --method magnitude --no-compensate",
                )
            found[layer.name] = place
        return onnx, found

    def _folder(self) -> Path:
        """Returns a new folder that lives as long as the stack."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rnnprune-")))


def _digest(layer: Layer, direction: int) -> bytes:
    """Identifies one direction of a layer by its weights."""
    digest = hashlib.sha256()
    for weight in layer.weights:
        digest.update(np.ascontiguousarray(weight.read()[direction], np.float32).tobytes())
    return digest.digest()


def _composed(before: Sequence[KeptUnits], shrunk: Shrunk) -> tuple[KeptUnits, ...]:
    """Returns which of the original units stay, if some had gone already."""
    earlier = {layer.layer: layer.kept for layer in before}
    return tuple(
        KeptUnits(
            layer.layer,
            tuple(
                tuple(old[k] for k in row)
                for old, row in zip(earlier[layer.layer], layer.kept, strict=True)
            ),
        )
        if layer.layer in earlier
        else layer
        for layer in shrunk.units
    )


def chosen_layers(layers: Sequence[RecurrentLayer], stage: Stage) -> tuple[RecurrentLayer, ...]:
    """Returns the recurrent layers that ``--layers`` and ``--exclude`` select.

    With ``--include``, ``--exclude`` may name other layers, or leave only these.

    Raises:
        UsageError: If a pattern matches no layer, or none is left.
    """
    names = [layer.name for layer in layers]
    for pattern in (*stage.layers, *(() if stage.include else stage.exclude)):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no layer matches '{pattern}'", closest(pattern, names))
    chosen = tuple(
        layer
        for layer in layers
        if (not stage.layers or any(fnmatchcase(layer.name, p) for p in stage.layers))
        and not any(fnmatchcase(layer.name, p) for p in stage.exclude)
    )
    if not chosen and not stage.include:
        raise UsageError("--exclude leaves no layer to prune", f"layers: {', '.join(names)}")
    return chosen


def _sharing(model: LoadedModel, chosen: Sequence[OtherLayer]) -> tuple[OtherLayer, ...]:
    """Returns further layers that read the same weights."""
    from rnnprune_cli.onnx_model import OnnxModel

    if not chosen or not isinstance(model, OnnxModel):
        return ()
    weights = {layer.w for layer in chosen}
    return tuple(o for o in model.others.layers if o.w in weights and o not in chosen)


def included(model: LoadedModel, stage: Stage) -> tuple[OtherLayer, ...]:
    """Returns the Dense layers and embeddings that ``--include`` and ``--exclude`` select.

    Raises:
        UsageError: If a pattern matches nothing that can be pruned.
    """
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.others import included_layers

    if not stage.include:
        return ()
    if not isinstance(model, OnnxModel):
        raise UsageError(
            "--include is for ONNX models", "convert the model: give an output with -o NAME.onnx"
        )
    return included_layers(model.others, stage, [layer.name for layer in model.layers])
