"""Errors of a task's code, in full for the hospital and without data for everybody else."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import FednatsError, HospitalError, TaskError

_shown_as: dict[str, str] = {}

_LIBRARIES = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def show_as(copy: Path, original: Path) -> None:
    """Show what lies below ``copy``, which runs, as what lies below ``original``, which people know."""
    _shown_as[str(copy)] = str(original)


def shown(text: str) -> str:
    """Return ``text`` with the paths that people know."""
    for copy, original in _shown_as.items():
        text = text.replace(copy, original)
    return text


@contextmanager
def task_code(doing: str) -> Iterator[None]:
    """Turn whatever a task's code raises into a `TaskError` that says what was done and where it failed.

    Text and traceback quote the exception: they are for the hospital. An exception may quote a record, so ``public``
    names only its class and its place. An error of ours keeps its text and gets the same ``public``.
    """
    try:
        yield
    except HospitalError as error:
        if error.traceback:  # it was told on by such a block inside this one
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
    """Return the innermost line that belongs to no library; of its path only the name, which is the same everywhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame for frame in reversed(frames) if not _is_library(frame.filename)), frames[-1])
    return f"in {own.name}, {Path(own.filename).name} line {own.lineno}"


def _is_library(file: str) -> bool:
    return file.startswith((*_LIBRARIES, "<frozen"))


def _written(error: Exception) -> str:
    return shown("".join(traceback.format_exception(error)))
