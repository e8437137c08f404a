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
from rnnprune_cli.errors import ExitCode, RnnpruneError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

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


Model = Annotated[
    Path,
    typer.Argument(
        help="An .onnx file, a SavedModel directory, or a .keras or .h5 file.", readable=False
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="What stdout carries.")]
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the result goes [default: MODEL with .pruned in its name]; .onnx from a "
            "SavedModel converts it.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="What makes a weight worth keeping; see 'rnnprune methods'.")
    ] = "magnitude",
    granularity: Annotated[
        str,
        typer.Option(
            help="What is removed together: weight, block:RxC, bank:N, nm:N:M, unit or layer."
        ),
    ] = "weight",
    scope: Annotated[
        str | None,
        typer.Option(
            help="Within what the scores compete: cell, row, layer or global [default: cell for"
            " weights, row for banks, layer for units].",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="Only layers that match this glob; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="No layers that match this glob; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".npz with an array for each model input, and 'labels' for a metric.",
            readable=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help=".npz of inputs for criteria and repair, without labels [default: --data].",
            show_default=False,
            readable=False,
        ),
    ] = None,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate/--no-compensate",
            help="Repair by least squares what units or weights leave behind; needs data.",
        ),
    ] = True,
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
    metric: Annotated[
        str, typer.Option(help="auto, accuracy, mse, mae, perplexity or bits-per-char.")
    ] = "auto",
    export: Annotated[
        str, typer.Option(help="How weights are stored: auto, dense, sparse, packed or shrunk.")
    ] = "auto",
    values: Annotated[
        str, typer.Option(help="Precision of packed values: float32, float16 or int8.")
    ] = "float32",
    right_padding: RightPadding = False,
    signature: Signature = None,
    report: Annotated[
        list[Path] | None,
        typer.Option("--report", help="Also write the report here (.json).", readable=False),
    ] = None,
    output_format: OutputFormat = Format.table,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads to run the models with.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compress one model and report it before and after.

    Example: rnnprune prune model.onnx --method magnitude --sparsity 0.7

    Example: rnnprune prune model.onnx --granularity unit --sparsity 0.5 --data calibration.npz
    """
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import pipeline
        from rnnprune_cli.console import progress
        from rnnprune_cli.model import ExportOptions
        from rnnprune_cli.options import PruneOptions, complete_stage
        from rnnprune_cli.report.json import render, report_document
        from rnnprune_cli.save import check_writable, write_text

        for path in report or []:
            if path.suffix != ".json":
                raise UsageError(f"a report cannot be written as '{path}'", "it must end in .json")
            check_writable(path, force)
        stage = complete_stage(
            method,
            granularity,
            scope,
            sparsity,
            layers=tuple(layers or ()),
            exclude=tuple(exclude or ()),
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
            metric=metric,
            export=ExportOptions(export, values),
            signature=signature,
            threads=threads,
            force=force,
            reports=tuple(report or ()),
            right_padding=right_padding,
        )
        with progress(quiet, verbose) as show:
            result = pipeline.prune(options, arguments, show)
        document = report_document(result)
        for path in report or []:
            write_text(path, render(document) + "\n")
        if output_format is Format.json:
            return document, None
        from rnnprune_cli.report.table import report_table

        return document, report_table(result)

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
    threads: Annotated[int, typer.Option(help="Threads to run the models with.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
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
        document = report_document(result)
        if output_format is Format.json:
            return document, None
        from rnnprune_cli.report.table import report_table

        return document, report_table(result)

    _finish(work, arguments, output_format)


@app.command()
def inspect(
    model: Model,
    right_padding: RightPadding = False,
    signature: Signature = None,
    output_format: OutputFormat = Format.table,
    verbose: Verbose = False,
) -> None:
    """Show what is recurrent in a model, what can be pruned, and what blocks the rest."""
    arguments = {k: v for k, v in locals().items() if v is not None}

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli.pipeline import inspected
        from rnnprune_cli.report.json import inspect_document

        with inspected(model, signature, right_padding) as (found, units):
            document = inspect_document(found, units, arguments)
            if output_format is Format.json:
                return document, None
            from rnnprune_cli.report.table import inspect_table

            return document, inspect_table(found, units)

    _finish(work, arguments, output_format)


@app.command()
def methods(output_format: OutputFormat = Format.table) -> None:
    """List every method, granularity, scope and export form, with its paper."""

    def work() -> tuple[dict[str, Any], RenderableType | None]:
        from rnnprune_cli import methods as registry
        from rnnprune_cli.options import EXPORTS, GRANULARITIES, scopes_of
        from rnnprune_cli.report.json import methods_document

        known = registry.methods().values()
        examples = {"weight": "weight", "bank:N": "bank:2", "unit": "unit", "layer": "layer"}
        scopes = {name: scopes_of(example) for name, example in examples.items()}
        document = methods_document(known, GRANULARITIES, scopes, EXPORTS)
        if output_format is Format.json:
            return document, None
        from rnnprune_cli.report.table import methods_table

        return document, methods_table(known, GRANULARITIES, scopes, EXPORTS)

    _finish(work, {}, output_format)


def _finish(
    work: Callable[[], tuple[dict[str, Any], RenderableType | None]],
    arguments: dict[str, Any],
    output_format: Format,
) -> None:
    """Runs a command's work and prints its result; errors carry the arguments to the end."""
    try:
        document, drawing = work()
    except Exception as error:
        error.__dict__["arguments"] = arguments
        raise
    if output_format is Format.json:
        from rnnprune_cli.report.json import render

        print(render(document))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(drawing)


def main() -> None:
    """Entry point: runs the command line and maps every ending to an exit code."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no arrows
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except BrokenPipeError:
        # Whoever read stdout has seen enough; what was asked for is done.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.OK))
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            RnnpruneError("interrupted; no model was written", code=ExitCode.INTERRUPTED),
            arguments={"argv": sys.argv[1:]},
        )
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
