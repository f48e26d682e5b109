"""Print errors of the command line: one line each, without a traceback."""

import os
import tempfile
import traceback
from collections.abc import Iterator

from rich.console import Console

from fednats.errors import FednatsError, HospitalError, InterruptedRunError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def report(error: Exception) -> int:
    """Print ``error`` to standard error, a line for each error in a group; return the exit code.

    The traceback of an error in a task's code, or of an unexpected one, goes to a file that only its owner may read,
    because it may quote a patient record.
    """
    console = Console(stderr=True, soft_wrap=True)
    found = list(dict.fromkeys(leaves(error)))
    for one in found:
        console.print(f"fednats: {_text(one)}", markup=False, highlight=False)
    return INTERRUPTED if any(isinstance(one, InterruptedRunError) for one in found) else 1


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield all errors in a group and its nested groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


def _text(error: BaseException) -> str:
    if isinstance(error, HospitalError):
        return f"{error}; the traceback is in {_kept(error.traceback)}" if error.traceback else str(error)
    if isinstance(error, FednatsError):
        return str(error)
    written = "".join(traceback.format_exception(error))
    return f"unexpected {type(error).__name__}: {error}; the traceback is in {_kept(written)}"


def _kept(written: str) -> str:
    file, path = tempfile.mkstemp(prefix="fednats-", suffix=".log", text=True)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        stream.write(written)
    return path
