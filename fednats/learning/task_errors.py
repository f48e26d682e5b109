"""Errors in a task's code: complete for the hospital, without data for everybody else."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import FednatsError, HospitalError, TaskError

_shown_as: dict[str, str] = {}

_LIBRARIES = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def show_as(copy: Path, original: Path) -> None:
    """Show paths below ``copy``, the code that runs, as paths below ``original``, which people know."""
    _shown_as[str(copy)] = str(original)


def shown(text: str) -> str:
    """Return ``text`` with copies' paths replaced by the originals'."""
    for copy, original in _shown_as.items():
        text = text.replace(copy, original)
    return text


@contextmanager
def task_code(doing: str) -> Iterator[None]:
    """Turn any exception of a task's code into a `TaskError` that says what failed and where.

    Its text and traceback quote the exception, for the hospital. An exception may quote a record, so ``public`` names
    only its class and place. A `HospitalError` keeps its text and gets ``public`` in the same form.
    """
    try:
        yield
    except HospitalError as error:
        if error.traceback:  # an inner block has already handled it
            raise
        error.public = f"{doing} failed: {error.public} ({_place(error)})"
        error.traceback = _written(error)
        raise
    except FednatsError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever foreign code raises, reported as one error
        name = type(error).__name__
        place = _place(error)
        text = shown(" ".join([str(error), *getattr(error, "__notes__", ())]))
        told = TaskError(
            f"{doing} failed: {name}{text and ': '}{text} ({place})", public=f"{doing} failed: {name} ({place})"
        )
        told.traceback = _written(error)
        raise told from None


def _place(error: Exception) -> str:
    """Return the innermost line outside libraries; of its path only the file name, which is the same everywhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame for frame in reversed(frames) if not _is_library(frame.filename)), frames[-1])
    return f"in {own.name}, {Path(own.filename).name} line {own.lineno}"


def _is_library(file: str) -> bool:
    return file.startswith((*_LIBRARIES, "<frozen"))


def _written(error: Exception) -> str:
    return shown("".join(traceback.format_exception(error)))
