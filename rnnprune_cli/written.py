"""A model that was written into a temporary folder, verified, and not yet handed over."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnprune_cli import measure
from rnnprune_cli.apply import Applied, Inputs
from rnnprune_cli.comparison import (
    Pair,
    fidelity_of,
    measure_both,
    measurement_of,
    quality_of,
    quantized_advice,
    ratios_of,
)
from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.gate_order import ONNX_ORDER
from rnnprune_cli.model import (
    UNCHANGED,
    Claim,
    ExportOptions,
    Layer,
    LayerRow,
    LoadedModel,
    Measurement,
    ModelInfo,
    OtherLayer,
    OutputInfo,
    ParameterCount,
    Plan,
    Quantized,
    RecurrentLayer,
    Report,
    Runner,
    Saved,
)
from rnnprune_cli.options import (
    data_file,
)
from rnnprune_cli.pictures import pictures
from rnnprune_cli.save import provenance
from rnnprune_cli.session import FileFigures, Opened, describe
from rnnprune_cli.timing import interleaved_latency
from rnnprune_cli.verify import require, run_all, verify_same, verify_weights
from rnnprune_cli.weights import distinct_weights

if TYPE_CHECKING:
    from rnnprune_cli.quantize import QuantizedFile


@dataclass(frozen=True, eq=False)
class Written:
    """A pruned model that was written into a temporary folder, and verified."""

    session: Opened
    applied: Applied
    plan: Plan
    output: Path
    folder: Path
    saved: Saved
    nonzero: Mapping[str, tuple[int, ...]]
    claims: tuple[Claim, ...]
    count: ParameterCount
    files: Future[FileFigures]
    reopen: Callable[[], Runner]
    floats: Written | None = None
    """What was quantized, if anything was."""
    quantized: QuantizedFile | None = None

    def report(self, arguments: Mapping[str, Any]) -> Report:
        """Compares it with the original, measures both, and says all there is to say."""
        session, applied, saved = self.session, self.applied, self.saved
        run = Pair(
            dataclasses.replace(session.options, stages=self.plan.stages),  # as they were done
            session.source,
            session.base,
            applied.model,
            saved,
            session.inputs,
            self.nonzero,
            (session.count, self.count),
            self.reopen,
        )
        files_before, files_after = session.files.result(), self.files.result()
        session.progress("comparing the models' outputs")
        quality = quality_of(run)
        session.progress("timing")
        before, now, ratios, warnings = measure_both(run, quality, files_before, files_after)
        quantized = self._quantized(run, now, quality.asked)
        if quantized is not None:
            warnings += tuple(quantized_advice(quantized, now))
        source, base, model = session.source, session.base, applied.model
        return Report(
            arguments=dict(arguments),
            model=ModelInfo(
                str(source.path),
                source.format,
                files_before.sha256,
                source.producer,
                source.opset,
            ),
            output=OutputInfo(str(self.output), saved.format, files_after.sha256),
            plan=self.plan,
            layers=_layer_rows(
                (*base.layers, *_others_before(base, applied.others)),
                (*model.layers, *applied.others),
                saved,
                self.nonzero,
                applied,
            ),
            skipped=model.skipped,
            before=before,
            after=now,
            ratios=ratios,
            fidelity=quality.fidelity,
            verification=self.claims,
            warnings=tuple(
                dict.fromkeys(
                    (
                        *source.warnings,
                        *base.warnings,
                        *session.limits,
                        *applied.warnings,
                        *saved.warnings,
                        *warnings,
                    )
                )
            ),
            environment=measure.environment(session.options.threads),
            lifts=model.lifts,
            units=applied.units,
            states=applied.states,
            repairs=applied.repairs,
            quantized=quantized,
        )

    def _quantized(self, run: Pair, after: Measurement, asked: bool) -> Quantized | None:
        """Tells what quantizing did from what pruning did: measures the float model by itself."""
        made, floats = self.quantized, self.floats
        if made is None or floats is None:
            return None
        self.session.progress("comparing the quantized model with the pruned one")
        own = dataclasses.replace(
            run,
            saved=floats.saved,
            nonzero=floats.nonzero,
            counts=(run.counts[0], floats.count),
            reopen=floats.reopen,
        )
        quality = None if run.data is None else run.inputs.quality(run.data)
        metrics = () if quality is None else quality.of(own.pruned)
        fidelity = fidelity_of(run, own.pruned, run.pruned)
        self.session.progress("timing both")
        latency, _, ratio = interleaved_latency(
            (floats.reopen, self.reopen),
            run.feeds[0] if run.data is None else run.data.feed(0, 1),
            run.options.latency_seconds,
            not run.source.big,
            run.options.seed,
        )
        before = measurement_of(own, floats.files.result(), latency, metrics, asked)
        return Quantized(
            str(run.options.quantize),
            before,
            ratios_of(before, after, ratio),
            fidelity,
            made.operators,
            made.left,
        )

    def move(self) -> None:
        """Moves it to its place."""
        _move(self.saved, self.output, self.folder)


@contextlib.contextmanager
def written(session: Opened, applied: Applied, output: Path, plan: Plan) -> Iterator[Written]:
    """Writes a pruned model into a temporary folder beside its place, and verifies it.

    Args:
        session: The model.
        applied: What the stages made of it.
        output: Where it is to go.
        plan: The stages.

    Raises:
        RnnpruneError: If it is not equivalent to the masked model.
    """
    model, progress, inputs = applied.model, session.progress, session.inputs
    threads, exporter, note = session.options.threads, session.exporter, provenance(plan)
    quantize = session.options.quantize is not None
    changed = model is not session.source
    count = model.count() if changed else session.count  # before runtimes hold copies
    with _folder_beside(output) as folder:
        progress(f"writing {output.name}")
        plain = exporter is not None or quantize or not applied.pruned
        form = ExportOptions("dense") if plain else session.options.export
        name = output.name if exporter is None else f"{output.name}.onnx"
        saved = model.save(applied.pruned, folder, name, form, note)
        reopen: Callable[[], Runner] = functools.partial(model.reopen, saved, threads)
        progress("verifying")
        described = session.pool.submit(describe, saved.files)
        claim, nonzero = verify_weights(model, saved)
        require([claim])
        claims = (
            *session.lifted,
            *inputs.converted(),
            *applied.claims,
            *([claim] if applied.pruned else []),
            *_verify(model, saved, inputs, threads),
        )
        require(claims)
        count = ParameterCount(
            count.parameters,
            count.nonzero
            - sum(stored.weight.nonzero for stored in saved.stored.values())
            + sum(map(sum, nonzero.values())),
        )
        if exporter is not None:
            progress(f"writing {output.name} as TensorFlow")
            exported = exporter.write(model, saved, folder / output.name, note)
            names = [o.name for o in inputs.original.outputs]
            held = exported.verify(reopen(), inputs.feeds, names, inputs.data is None)
            claims = (*claims, *held)
            require(claims)
            saved, count, reopen = exported.saved, exported.count(), exported.open
            described = session.pool.submit(describe, saved.files)
        made = Written(
            session, applied, plan, output, folder, saved, nonzero, claims, count, described, reopen
        )
        if quantize:
            progress(f"quantizing {output.name}")
            made = _quantized_copy(made)
        yield made


def _quantized_copy(floats: Written) -> Written:
    """Writes a quantized copy beside a model that was written and verified; verifies it, too."""
    from rnnprune_cli.onnx_model import OnnxModel
    from rnnprune_cli.quantize import quantize

    session, model = floats.session, floats.applied.model
    assert isinstance(model, OnnxModel)
    options = session.options
    folder = floats.folder / "quantized"
    folder.mkdir()
    note = provenance(floats.plan, options.quantize)
    made = quantize(model, floats.saved, folder, note, session.inputs.feeds, options.threads)
    require(made.claims)
    return dataclasses.replace(
        floats,
        saved=made.saved,
        nonzero={**floats.nonzero, **made.nonzero},
        claims=(*floats.claims, *made.claims),
        count=dataclasses.replace(
            floats.count,
            nonzero=floats.count.nonzero
            - made.float_nonzero
            + sum(sum(counts) for counts in made.nonzero.values()),
        ),
        files=session.pool.submit(describe, made.saved.files),
        reopen=made.reopen,
        floats=floats,
        quantized=made,
    )


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
        data_file(output).unlink(missing_ok=True)  # of the model that --force replaced


def _verify(model: LoadedModel, saved: Saved, inputs: Inputs, threads: int) -> list[Claim]:
    claims = model.verify_untouched(saved)
    names, feeds = [o.name for o in inputs.original.outputs], inputs.feeds
    if model.big and any(claim.claim == UNCHANGED for claim in claims):
        # Held against each other bit by bit; two more copies in memory would prove no more.
        return claims
    if model.format == "onnx" and saved.stored:
        unpruned = {weight.name: weight.read for weight in distinct_weights(model.layers)}
        unpruned |= {name: stored.weight.read for name, stored in saved.stored.items()}
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


def _others_before(base: LoadedModel, others: Sequence[OtherLayer]) -> tuple[OtherLayer, ...]:
    """Returns what Dense layers and embeddings were before units went."""
    from rnnprune_cli.onnx_model import OnnxModel

    if not others or not isinstance(base, OnnxModel):
        return ()
    known = {layer.name: layer for layer in base.others.layers}
    return tuple(known.get(layer.name, layer) for layer in others)


def _layer_rows(
    before: Sequence[Layer],
    after: Sequence[Layer],
    saved: Saved,
    nonzero: Mapping[str, tuple[int, ...]],
    applied: Applied,
) -> tuple[LayerRow, ...]:
    rows = []
    now = {layer.name: layer for layer in after}
    for old in before:
        layer = now.get(old.name)
        weights = () if layer is None else layer.weights
        counts = [nonzero.get(w.name, w.nonzero_by_gate) for w in weights]
        left = sum(map(sum, counts))
        size = sum(w.size for w in weights)
        size_before = sum(w.size for w in old.weights)
        rows.append(
            LayerRow(
                name=old.name,
                op=old.op,
                direction=old.direction,
                hidden_before=old.hidden_size,
                hidden_after=0 if layer is None else layer.hidden_size,
                weights_before=size_before,
                weights_after=size,
                nonzero_after=left,
                sparsity=1 - left / size_before,
                stored=tuple(saved.exports.get(w.name, "dense") for w in weights),
                blocked=applied.blocked.get(old.name),
                gates={
                    letter: 1 - sum(c[k] for c in counts) * old.w.gates / size_before
                    for k, letter in enumerate(
                        ONNX_ORDER[old.op] if isinstance(old, RecurrentLayer) else ""
                    )
                },
            )
        )
    seen = pictures(
        [layer for layer in before if isinstance(layer, RecurrentLayer)],
        [layer for layer in after if isinstance(layer, RecurrentLayer)],
        {**applied.pruned, **saved.stored},
        applied.units,
        {row.name: row.nonzero_after for row in rows},
    )
    return tuple(dataclasses.replace(row, pictures=seen.get(row.name, ())) for row in rows)
