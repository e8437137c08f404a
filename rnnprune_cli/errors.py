"""The one error type that reaches the user, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; scripts and CI lines depend on these."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    UNSUPPORTED = 3
    NOT_EQUIVALENT = 4
    DEFECT = 70
    INTERRUPTED = 130


class RnnpruneError(Exception):
    """A failure that the user can act on.

    Args:
        message: What is wrong, and where; one line.
        hint: What to do about it; one line, or empty.
        code: The exit code of the process.
    """

    def __init__(self, message: str, hint: str = "", code: ExitCode = ExitCode.UNSUPPORTED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class UsageError(RnnpruneError):
    """An option, a name or an output path that cannot be used (exit code 2)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.USAGE)


class NothingRemovedError(RnnpruneError):
    """What was asked for rounds to nothing; more of it might not."""


class HelpedError(RnnpruneError):
    """Not a failure: this process has done its part, and another one writes the result."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=ExitCode.OK)


class NotEquivalentError(RnnpruneError):
    """The rewritten model does not compute what was asked for (exit code 4)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.NOT_EQUIVALENT)


def closest(name: str, valid: Iterable[str]) -> str:
    """Returns a hint that names the valid words nearest to a misspelt one.

    Args:
        name: What the user typed.
        valid: The words that would have been accepted.

    Returns:
        ``did you mean 'magnitude'?`` if something is near, otherwise ``valid: …``.
    """
    words = list(valid)
    near = difflib.get_close_matches(name, words, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(word) for word in near) + "?"
    shown = ", ".join(words[:12]) + (", …" if len(words) > 12 else "")
    return f"valid: {shown}" if words else ""


def printable(text: str) -> str:
    """Returns a text without control characters, which names in model files may hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.replace("\n", " "))
