"""The command line: parse, call the pipeline, render, return the exit code.

Nothing heavy is imported before a command needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rnnprune_cli import __version__
from rnnprune_cli.errors import ExitCode, HelpedError, RnnpruneError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rnnprune_cli.model import Report
    from rnnprune_cli.options import PruneOptions
    from rnnprune_cli.recipe import Recipe
    from rnnprune_cli.report.files import Result

app = typer.Typer(
    name="rnnprune",
    help="Compress saved recurrent models: ONNX or TensorFlow in, smaller model and report out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Format(str, Enum):
    """What stdout carries."""

    table = "table"
    json = "json"
    markdown = "markdown"


class PlainFormat(str, Enum):
    """What stdout carries of what is no result to hand on."""

    table = "table"
    json = "json"


Model = Annotated[
    Path,
    typer.Argument(
        help="An .onnx file, a SavedModel directory, or a .keras or .h5 file.", readable=False
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="What stdout carries.")]
PlainOutputFormat = Annotated[PlainFormat, typer.Option("--format", help="What stdout carries.")]
Reports = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        help="Also write the report here (.json, .md or .html); repeatable.",
        readable=False,
    ),
]
RightPadding = Annotated[
    bool,
    typer.Option(
        "--assume-right-padding",
        help="Sequences are padded on the right only: lets masked loops become operators.",
    ),
]
Signature = Annotated[
    str | None, typer.Option(help="Signature of a SavedModel, if it has several.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show each step, and a traceback on errors.")
]


Method = Annotated[
    str, typer.Option(help="What makes a weight worth keeping; see 'rnnprune methods'.")
]
Granularity = Annotated[
    str,
    typer.Option(
        help="What is removed together: weight, block:RxC, bank:N, nm:N:M, unit or layer."
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Within what the scores compete: cell, row, layer, global or sensitivity [default:"
        " cell for weights, row for banks, layer for units].",
        show_default=False,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", help="Only layers that match this glob; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="No layers that match this glob; repeatable."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help=".npz of inputs for criteria and repair, without labels [default: --data].",
        show_default=False,
        readable=False,
    ),
]
Compensate = Annotated[
    bool,
    typer.Option(
        "--compensate/--no-compensate",
        help="Repair by least squares what units or weights leave behind; needs data.",
    ),
]
Metric = Annotated[
    list[str],
    typer.Option(
        "--metric",
        help="auto, accuracy, mse, mae, perplexity, bits-per-char, agreement or"
        " relative-error; of one output OUTPUT=METRIC; repeatable.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Threads = Annotated[int, typer.Option(help="Threads to run the models with.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with training that was interrupted.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        help="What must hold, else exit code 1: 'latency<=0.8', 'metric-drop<=0.01'; repeatable.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Figures with noise must hold all over their interval, not only in it."
    ),
]
SkipIfUnchanged = Annotated[
    bool,
    typer.Option(
        "--skip-if-unchanged",
        help="Do nothing if the .json of --report says that the same was done, and it is there.",
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"rnnprune {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def prune(
    model: Model,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "-s",
            help="Share of the weights, units or layers to remove, 0 ≤ s < 1.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Instead of --sparsity: metric-drop=0.01, latency=0.5, bytes=0.3, parameters=0.3"
            " or nonzero=0.3; repeatable, all must hold.",
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="Several models at once: sparsities, or with --target NAME its limits, such as"
            " 0.5,0.7,0.9."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the result goes [default: MODEL with .pruned in its name]: .onnx, a "
            "directory for a SavedModel, or the ending of a Keras file.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    method: Method = "magnitude",
    granularity: Granularity = "weight",
    scope: Scope = None,
    layers: Layers = None,
    exclude: Exclude = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            help="Weights of other layers, too: dense, embedding, or a glob; repeatable.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".npz with an array for each model input, and 'labels' for a metric.",
            readable=False,
        ),
    ] = None,
    calibration: Calibration = None,
    compensate: Compensate = True,
    resize_state: Annotated[
        bool,
        typer.Option(
            "--resize-state", help="Let states that callers hand in and get back become shorter."
        ),
    ] = False,
    allow_inexact: Annotated[
        bool,
        typer.Option(
            "--allow-inexact", help="Remove units that are normalised together, too; not exact."
        ),
    ] = False,
    metric: Metric = ["auto"],  # noqa: B006  typer copies it
    time: Annotated[
        float,
        typer.Option(help="Seconds to time both models; up to four times that if it is noisy."),
    ] = 0.5,
    finetune: Annotated[
        int, typer.Option(help="Train what is left for so many epochs.", metavar="EPOCHS")
    ] = 0,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Data to train on, with labels or without [default: --calibration, else --data].",
            show_default=False,
            readable=False,
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Data that decide which weights are kept [default: a tenth of --train].",
            show_default=False,
            readable=False,
        ),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss that holds outputs against the original's [default: 0.9"
            " with labels, else 1].",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of distillation.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Samples of an update of the weights.")] = 32,
    schedule: Annotated[
        str,
        typer.Option(help="one-shot: all goes before training; polynomial, constant: meanwhile."),
    ] = "one-shot",
    patience: Annotated[
        int, typer.Option(help="Epochs without a better model after which training ends.")
    ] = 10,
    clip: Annotated[float, typer.Option(help="Norm to which gradients are cut.")] = 1.0,
    bptt: Annotated[
        int | None,
        typer.Option(
            help="Steps of a sequence after which gradients stop [default: all of them].",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(help="Noise on real inputs, in standard deviations of each feature."),
    ] = 0.0,
    balance: Annotated[
        bool, typer.Option("--balance", help="Let rare classes count as much as others.")
    ] = False,
    loss_weight: Annotated[
        list[str] | None,
        typer.Option("--loss-weight", help="OUTPUT=WEIGHT of a model with several; repeatable."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            "--freeze", help="Weights, or nodes that read them, not to train; a glob; repeatable."
        ),
    ] = None,
    resume: Resume = False,
    logdir: Annotated[
        Path | None, typer.Option(help="Write TensorBoard logs there.", readable=False)
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="single, mirrored (all devices) or multiworker (all machines of TF_CONFIG)."
        ),
    ] = "single",
    export: Annotated[
        str, typer.Option(help="How weights are stored: auto, dense, sparse, packed or shrunk.")
    ] = "auto",
    values: Annotated[
        str, typer.Option(help="Precision of packed values: float32, float16 or int8.")
    ] = "float32",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8: quantize LSTMs, Dense layers and embeddings after pruning (ONNX output).",
            show_default=False,
        ),
    ] = None,
    right_padding: RightPadding = False,
    signature: Signature = None,
    report: Reports = None,
    trials: Annotated[
        int, typer.Option(help="Models that a search for targets tries, at most.")
    ] = 40,
    save_recipe: Annotated[
        Path | None,
        typer.Option(
            help="Also write what was done as a recipe (.toml) for 'rnnprune run'.", readable=False
        ),
    ] = None,
    require: Require = None,
    strict: Strict = False,
    skip_if_unchanged: SkipIfUnchanged = False,
    output_format: OutputFormat = Format.table,
    seed: Seed = 0,
    threads: Threads = 1,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compress one model and report it before and after.

    Example: rnnprune prune model.onnx --method magnitude --sparsity 0.7

    Example: rnnprune prune model.onnx --granularity unit --sparsity 0.5 --data calibration.npz
    """
    arguments = {k: v for k, v in locals().items() if v is not None}
    arguments["metric"] = ",".join(metric)

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli.model import ExportOptions, FineTune
        from rnnprune_cli.options import PruneOptions, complete_stage
        from rnnprune_cli.recipe import targets_of

        wanted = _numbers("--family", family)
        limits, family_of = targets_of(target or (), wanted)
        if sparsity is not None and (target or wanted):
            raise UsageError(
                "--sparsity is given, and so is what is to be found out",
                "leave out --sparsity, or --target and --family",
            )
        stage = complete_stage(
            method,
            granularity,
            scope,
            0.0 if (target or wanted) and not granularity.startswith("nm:") else sparsity,
            layers=tuple(layers or ()),
            exclude=tuple(exclude or ()),
            include=tuple(include or ()),
            compensate=compensate,
            resize_state=resize_state,
            allow_inexact=allow_inexact,
        )
        options = PruneOptions(
            model=model,
            output=output,
            stages=(stage,),
            seed=seed,
            data=data,
            calibration=calibration,
            metric=",".join(metric),
            latency_seconds=time,
            export=ExportOptions(export, values),
            signature=signature,
            threads=threads,
            force=force,
            reports=tuple(report or ()),
            right_padding=right_padding,
            targets=limits,
            trials=trials,
            family=wanted,
            family_of=family_of,
            finetune=FineTune(
                epochs=finetune,
                train=train,
                validation=validation,
                distill=distill,
                temperature=temperature,
                lr=lr,
                batch=batch,
                schedule=schedule,
                patience=patience,
                clip=clip,
                bptt=bptt,
                noise=noise,
                balance=balance,
                output_weights=tuple(loss_weight or ()),
                freeze=tuple(freeze or ()),
                resume=resume,
                logdir=logdir,
                strategy=strategy,
            ),
            quantize=quantize,
            require=tuple(require or ()),
            strict=strict,
        )
        return _compress(
            options,
            arguments,
            output_format,
            quiet,
            verbose,
            save_recipe=save_recipe,
            skip=skip_if_unchanged,
        )

    _finish(work, arguments, output_format)


@app.command()
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe (.toml), or the report (.json) of a run that is to be repeated.",
            readable=False,
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Argument(help="Another model than the recipe names.", readable=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the result goes.", readable=False),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Other data.", readable=False)] = None,
    calibration: Calibration = None,
    train: Annotated[
        Path | None, typer.Option(help="Other data to train on.", readable=False)
    ] = None,
    resume: Resume = False,
    report: Reports = None,
    require: Require = None,
    strict: Strict = False,
    skip_if_unchanged: SkipIfUnchanged = False,
    output_format: OutputFormat = Format.table,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Another seed of everything random.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Another number of threads to run the models with.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do what a recipe says, stage by stage, or what a report says was done.

    Options given here go before those of the file.

    Example: rnnprune run recipe.toml --report report.json
    """
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli.recipe import arguments_of, read_recipe

        found = read_recipe(recipe)
        options = found.options(
            model=model,
            output=output,
            data=data,
            calibration=calibration,
            seed=seed,
            threads=threads,
            force=force,
            reports=tuple(report or ()),
            require=tuple(require) if require else None,
            strict=strict or None,
            **{"finetune.train": train, "finetune.resume": resume or None},
        )
        arguments.update(arguments_of(options))
        return _compress(
            options,
            arguments,
            output_format,
            quiet,
            verbose,
            recipe=found,
            skip=skip_if_unchanged,
        )

    _finish(work, arguments, output_format)


@app.command()
def lift(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the result goes [default: MODEL with .lifted in its name].",
            show_default=False,
            readable=False,
        ),
    ] = None,
    right_padding: RightPadding = False,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz with real inputs to compare on, too.", readable=False),
    ] = None,
    signature: Signature = None,
    output_format: OutputFormat = Format.table,
    seed: Annotated[int, typer.Option(min=0, help="Seed of made-up inputs.")] = 0,
    threads: Threads = 1,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Only rewrite loops, hand-written cells and unrolled chains to LSTM, GRU and RNN operators.

    Example: rnnprune lift model.onnx -o lifted.onnx
    """
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import pipeline
        from rnnprune_cli.console import progress
        from rnnprune_cli.model import ExportOptions
        from rnnprune_cli.options import PruneOptions
        from rnnprune_cli.report.json import report_document

        options = PruneOptions(
            model=model,
            output=output,
            stages=(),
            seed=seed,
            data=data,
            export=ExportOptions("dense"),
            signature=signature,
            threads=threads,
            force=force,
            right_padding=right_padding,
        )
        with progress(quiet, verbose) as show:
            result = pipeline.prune(options, arguments, show)
        return _shown(result, report_document(result), output_format)

    _finish(work, arguments, output_format)


@app.command()
def inspect(
    model: Model,
    right_padding: RightPadding = False,
    signature: Signature = None,
    output_format: PlainOutputFormat = PlainFormat.table,
    verbose: Verbose = False,
) -> None:
    """Show what is recurrent in a model, what can be pruned, and what blocks the rest."""
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli.report.json import inspect_document
        from rnnprune_cli.session import inspected

        with inspected(model, signature, right_padding) as (found, units, others):
            document = inspect_document(found, units, others, arguments)
            if output_format is PlainFormat.json:
                return document, None
            from rnnprune_cli.report.table import inspect_table

            return document, inspect_table(found, units, others)

    _finish(work, arguments, output_format)


@app.command()
def sensitivity(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(help=".npz with an array for each model input; labels help.", readable=False),
    ],
    sparsities: Annotated[
        str, typer.Option(help="Where to measure, between commas.")
    ] = "0.3,0.5,0.7,0.8,0.9",
    method: Method = "magnitude",
    granularity: Granularity = "weight",
    scope: Scope = None,
    layers: Layers = None,
    exclude: Exclude = None,
    calibration: Calibration = None,
    compensate: Compensate = True,
    gates: Annotated[
        bool, typer.Option("--gates/--no-gates", help="Measure each gate by itself, too.")
    ] = True,
    metric: Metric = ["auto"],  # noqa: B006  typer copies it
    right_padding: RightPadding = False,
    signature: Signature = None,
    report: Reports = None,
    output_format: OutputFormat = Format.table,
    seed: Seed = 0,
    threads: Threads = 1,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a model loses as each layer, and each gate, is pruned by itself.

    Example: rnnprune sensitivity model.onnx --data test.npz --report curves.html
    """
    arguments = {k: v for k, v in locals().items() if v is not None}
    arguments["metric"] = ",".join(metric)

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import pipeline
        from rnnprune_cli.console import progress
        from rnnprune_cli.options import PruneOptions, complete_stage
        from rnnprune_cli.report.files import check_report_paths, write_reports
        from rnnprune_cli.report.json import sensitivity_document

        check_report_paths(report or (), force)
        stage = complete_stage(
            method,
            granularity,
            scope,
            None if granularity.startswith("nm:") else 0.5,
            layers=tuple(layers or ()),
            exclude=tuple(exclude or ()),
            compensate=compensate,
        )
        options = PruneOptions(
            model,
            None,
            (stage,),
            seed=seed,
            data=data,
            calibration=calibration,
            metric=",".join(metric),
            signature=signature,
            threads=threads,
            right_padding=right_padding,
        )
        with progress(quiet, verbose) as show:
            result = pipeline.sensitivity(
                options, _numbers("--sparsities", sparsities), gates, arguments, show
            )
        document = sensitivity_document(result)
        write_reports(report or (), result, document, force)
        return _shown(result, document, output_format)

    _finish(work, arguments, output_format)


@app.command()
def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="ONNX files, SavedModels and Keras files; the first is what the others are held"
            " against. None: the built-in suite.",
            readable=False,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz with an array for each input, and labels.", readable=False),
    ] = None,
    metric: Metric = ["auto"],  # noqa: B006  typer copies it
    batch: Annotated[
        str | None,
        typer.Option(
            help="Samples of a call, such as 1,8 [default: 1, or as made up].", show_default=False
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Steps of each sample, such as 50,200 [default: as in the data].",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[str, typer.Option(help="Threads to run with, such as 1,2.")] = "1",
    precision: Annotated[
        float,
        typer.Option(help="Width of the ratios' 95 % interval that is enough; 0: use all time."),
    ] = 0.02,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--time",
            help="Seconds to measure in each setting, at most [default: 20; 10 in the suite].",
            show_default=False,
        ),
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(help="Time that a step stands for, for the real-time factor."),
    ] = None,
    providers: Annotated[
        list[str] | None,
        typer.Option(
            "--providers", help="Execution provider of onnxruntime; repeatable, the best first."
        ),
    ] = None,
    require: Require = None,
    strict: Strict = False,
    signature: Signature = None,
    report: Reports = None,
    output_format: OutputFormat = Format.table,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure models side by side: size, metric, memory, and latency with its interval.

    Example: rnnprune bench model.onnx model.pruned.onnx --data test.npz --batch 1,8
    """
    arguments = {k: v for k, v in locals().items() if v is not None}
    arguments["metric"] = ",".join(metric)

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import bench as benchmark
        from rnnprune_cli.console import progress
        from rnnprune_cli.report.files import check_report_paths, write_reports
        from rnnprune_cli.report.json import bench_document

        check_report_paths(report or (), force)
        options = benchmark.BenchOptions(
            models=tuple(models or ()),
            data=data,
            metric=",".join(metric),
            batches=_integers("--batch", batch),
            steps=_integers("--steps", steps),
            threads=_integers("--threads", threads),
            precision=precision,
            seconds=(20.0 if models else 10.0) if seconds is None else seconds,
            step_seconds=step_seconds,
            providers=tuple(providers or ()),
            signature=signature,
            seed=seed,
            require=tuple(require or ()),
            strict=strict,
        )
        with progress(quiet, verbose) as show:
            if models:
                result = benchmark.bench(options, arguments, show)
            else:
                from rnnprune_cli.suite import suite

                result = suite(options, arguments, show)
        document = bench_document(result)
        write_reports(report or (), result, document, force)
        return _shown(result, document, output_format)

    _finish(work, arguments, output_format)


@app.command()
def check(
    saved: Annotated[
        Path,
        typer.Argument(
            metavar="REPORT", help="A report (.json) of prune, run or bench.", readable=False
        ),
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(help="A report that it must not be worse than.", readable=False),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            help="What must hold: 'latency<=0.8'; repeatable [default, without a baseline: what its"
            " own run required].",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="What cannot be told, or not be compared, fails.")
    ] = False,
    margin: Annotated[
        float, typer.Option(help="How much slower than the baseline is no regression: a share.")
    ] = 0.03,
    tolerance: Annotated[
        float, typer.Option(help="How much worse any other figure may be: a share, or points.")
    ] = 0.005,
    full: Annotated[
        bool, typer.Option("--full", help="Show all of the report, and not only the checks.")
    ] = False,
    report: Reports = None,
    output_format: OutputFormat = Format.table,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Judge a saved report: exit code 1 if a requirement fails, or it is worse than a baseline.

    Example: rnnprune check report.json --baseline main.json --require 'metric-drop<=0.01'

    Example: rnnprune check report.json --full --report page.html
    """
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli.checks import check_saved
        from rnnprune_cli.report.files import check_report_paths, write_reports
        from rnnprune_cli.report.json import document_of
        from rnnprune_cli.report.read import read_report, with_checks

        check_report_paths(report or (), force)
        for path in report or ():
            if path.resolve() in {file.resolve() for file in (saved, baseline) if file}:
                raise UsageError(
                    f"--report {path} would replace what is judged", "give it another path"
                )
        found = read_report(saved)
        checked = check_saved(
            found,
            None if baseline is None else read_report(baseline),
            tuple(require or ()),
            (str(saved), None if baseline is None else str(baseline)),
            arguments,
            margin,
            tolerance,
            strict,
        )
        result: Result = with_checks(found, checked) if full else checked
        document = {**document_of(result), "passed": checked.passed}
        write_reports(report or (), result, document, force)
        return _shown(result, document, output_format)

    _finish(work, arguments, output_format)


@app.command()
def methods(output_format: PlainOutputFormat = PlainFormat.table) -> None:
    """List every method, granularity, scope and export form, with its paper."""

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import methods as registry
        from rnnprune_cli.options import EXPORTS, GRANULARITIES, scopes_of
        from rnnprune_cli.report.json import methods_document

        known = registry.methods().values()
        examples = {"weight": "weight", "bank:N": "bank:2", "unit": "unit", "layer": "layer"}
        scopes = {name: scopes_of(example) for name, example in examples.items()}
        document = methods_document(known, GRANULARITIES, scopes, EXPORTS)
        if output_format is PlainFormat.json:
            return document, None
        from rnnprune_cli.report.table import methods_table

        return document, methods_table(known, GRANULARITIES, scopes, EXPORTS)

    _finish(work, {}, output_format)


def _integers(option: str, text: str | None) -> tuple[int, ...]:
    """Reads whole numbers between commas.

    Raises:
        UsageError: If they are none.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(","))) if text else ()
    except ValueError as error:
        raise UsageError(
            f"{option} {text} is no list of whole numbers", f"such as {option} 1,8"
        ) from error


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Reads numbers between commas.

    Raises:
        UsageError: If they are none.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(
            f"{option} {text} is no list of numbers", f"such as {option} 0.5,0.7,0.9"
        ) from error


def _compress(
    options: PruneOptions,
    arguments: dict[str, Any],
    output_format: Format,
    quiet: bool,
    verbose: bool,
    recipe: Recipe | None = None,
    save_recipe: Path | None = None,
    skip: bool = False,
) -> tuple[dict[str, Any], RenderableType | None]:
    """Does what ``prune`` or ``run`` is asked to do; returns the report as both formats show it."""
    if skip:
        from rnnprune_cli.unchanged import unchanged

        done = unchanged(options, arguments)
        if done is not None:  # before anything heavy is imported
            return _already_done(options, arguments, done, output_format, quiet, save_recipe)
    from rnnprune_cli import pipeline
    from rnnprune_cli import recipe as recipes
    from rnnprune_cli.console import progress
    from rnnprune_cli.report.files import check_report_paths, write_reports
    from rnnprune_cli.report.json import family_document, report_document

    check_report_paths(options.reports, options.force)
    if save_recipe is not None:
        recipes.check_recipe(save_recipe, options)
    with progress(quiet, verbose) as show:
        if recipe is not None:
            recipe.check_model(options)
        if options.family:
            results = pipeline.prune_family(options, arguments, show)
            family = family_document(results, arguments)
            write_reports(options.reports, results, family, options.force)
            return _shown(results, family, output_format)
        result = pipeline.prune(options, arguments, show)
    if recipe is not None:
        result = recipe.compared(result, options)
    document = report_document(result)
    write_reports(options.reports, result, document, options.force)
    if save_recipe is not None:
        recipes.save_recipe(save_recipe, options, result.plan.stages)
    return _shown(result, document, output_format)


def _already_done(
    options: PruneOptions,
    arguments: dict[str, Any],
    reports: tuple[Report, ...],
    output_format: Format,
    quiet: bool,
    save_recipe: Path | None,
) -> tuple[dict[str, Any], RenderableType | None]:
    """Returns what an earlier run has made as if it was made now; files that lack are written."""
    from rnnprune_cli.report.files import write_reports
    from rnnprune_cli.report.json import family_document, report_document

    if not quiet:
        places = ", ".join(report.output.path for report in reports)
        print(f"rnnprune: unchanged: {places}", file=sys.stderr)
    result: Result = reports if options.family else reports[0]
    if options.family:
        document = family_document(reports, arguments, "unchanged")
    else:
        document = report_document(reports[0], "unchanged")
    lacking = [path for path in options.reports if options.force or not path.exists()]
    write_reports(lacking, result, document, options.force)
    if save_recipe is not None and (options.force or not save_recipe.exists()):
        from rnnprune_cli import recipe as recipes

        recipes.check_recipe(save_recipe, options)
        recipes.save_recipe(save_recipe, options, reports[0].plan.stages)
    return _shown(result, document, output_format)


def _shown(
    result: Result, document: dict[str, Any], output_format: Format
) -> tuple[dict[str, Any], RenderableType | None]:
    """Returns a result as :func:`_finish` prints it: the document, and what else is shown."""
    from rnnprune_cli.report.files import as_table, as_text

    if output_format is Format.json:
        return document, None
    if output_format is Format.markdown:
        return document, as_text(result, document, "markdown")
    return document, as_table(result)


def _finish(
    work: Callable[[], tuple[dict[str, Any], RenderableType | None]],
    arguments: dict[str, Any],
    output_format: Format | PlainFormat,
) -> None:
    """Runs a command's work and prints its result; errors carry the arguments to the end.

    Raises:
        typer.Exit: If the result is not what was required.
    """
    try:
        document, drawing = work()
    except Exception as error:
        error.__dict__["arguments"] = arguments
        raise
    try:
        if output_format.value == "json":
            from rnnprune_cli.report.json import render

            print(render(document))
        elif isinstance(drawing, str):
            print(drawing, end="")
        else:
            from rnnprune_cli.console import show

            show(drawing)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
    if document.get("passed") is False:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _forget_stdout() -> None:
    """Lets nothing more be printed: whoever read stdout has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: runs the command line and maps every ending to an exit code."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no arrows
    try:
        code = app(standalone_mode=False) or 0
        if code == ExitCode.INTERRUPTED:  # what typer makes of KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except BrokenPipeError:
        _forget_stdout()
        sys.exit(int(ExitCode.OK))
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            RnnpruneError("interrupted; no model was written", code=ExitCode.INTERRUPTED),
            arguments={"argv": sys.argv[1:]},
        )
    except HelpedError as error:
        from rnnprune_cli.console import show_error

        show_error(error)
        sys.exit(int(error.code))
    except Exception as error:
        if "--verbose" in sys.argv:
            import traceback

            traceback.print_exception(error)
        _fail(_as_ours(error), getattr(error, "arguments", {"argv": sys.argv[1:]}))


def _as_ours(error: Exception) -> RnnpruneError:
    """Turns any exception into one with a message, a hint and an exit code."""
    if isinstance(error, RnnpruneError):
        return error
    usage = getattr(error, "format_message", None)  # typer's own errors
    if usage is not None:
        return UsageError(usage(), "'rnnprune --help' lists commands and options")
    if isinstance(error, MemoryError):
        return RnnpruneError("out of memory", "close other programs or take a larger machine")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return RnnpruneError(
            f"{place}{error.strerror}", "check its path, its rights, and the space left"
        )
    return RnnpruneError(
        f"defect: {type(error).__name__}: {str(error)[:300]}",
        "run again with --verbose and report what it prints",
        ExitCode.DEFECT,
    )


def _fail(error: RnnpruneError, arguments: dict[str, Any]) -> NoReturn:
    """Says what went wrong, as JSON too where that was asked for, and ends the process."""
    from rnnprune_cli.console import show_error

    show_error(error)
    words = " ".join(sys.argv).replace("=", " ").split()
    if ("--format", "json") in itertools.pairwise(words):
        from rnnprune_cli.report.json import error_document, render

        print(render(error_document(error, arguments)))
    sys.exit(int(error.code))


if __name__ == "__main__":
    main()
