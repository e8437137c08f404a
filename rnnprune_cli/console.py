"""What is drawn on the terminal besides reports: progress and errors, all on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rnnprune_cli.errors import RnnpruneError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextlib.contextmanager
def progress(quiet: bool, verbose: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows what is being done now.

    On a terminal the current step is a spinner; with ``--verbose`` every step is a line with the
    seconds since the start. Otherwise nothing is shown.
    """
    begin = time.perf_counter()
    if verbose:
        yield lambda step: print(f"[{time.perf_counter() - begin:6.2f} s] {step}", file=sys.stderr)
    elif quiet or not sys.stderr.isatty():
        yield lambda step: None
    else:
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda step: status.update(step)


def show(drawing: RenderableType | None) -> None:
    """Prints a result to stdout.

    Raises:
        BrokenPipeError: If whoever reads it has gone.
    """
    from rich.console import Console

    class Out(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process, with exit code 1
            raise BrokenPipeError

    Out(width=None if sys.stdout.isatty() else 160).print(drawing)


def show_error(error: RnnpruneError) -> None:
    """Prints an error: what is wrong on one line, what to do on the next."""
    print(f"rnnprune: {printable(' '.join(error.message.split()))}", file=sys.stderr)
    if error.hint:
        print(f"          {printable(' '.join(error.hint.split()))}", file=sys.stderr)
