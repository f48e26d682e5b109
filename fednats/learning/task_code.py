"""Find a task's code and load it.

`make_task` takes the name of a shipped task or ``path:ClassName``, and the options of its constructor. The path names a
Python file, a folder that is a package, or a wheel.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fednats.errors import ConfigError
from fednats.learning.code_files import read_code
from fednats.learning.code_import import import_code
from fednats.learning.task import Task
from fednats.learning.task_errors import task_code


def _heart() -> type[Task]:
    from fednats.learning.tasks.heart import HeartDisease  # noqa: PLC0415 - a task loads only what it needs

    return HeartDisease


def _breast_cancer() -> type[Task]:
    from fednats.learning.tasks.breast_cancer import BreastCancer  # noqa: PLC0415 - as above

    return BreastCancer


def _ct_nodule() -> type[Task]:
    from fednats.learning.tasks.ct_nodule import CTNodule  # noqa: PLC0415 - as above

    return CTNodule


SHIPPED: Mapping[str, Callable[[], type[Task]]] = {
    "heart": _heart,
    "breast-cancer": _breast_cancer,
    "ct-nodule": _ct_nodule,
}


Check = Callable[[Path, str], None]
"""Gets the path of a task's code and its SHA-256 before any of it runs; raises ConfigError if it must not run."""


def make_task(
    path: str,
    options: Mapping[str, Any],
    check: Check | None = None,
    *,
    copy_in: Path | None = None,
    alone: bool = True,
) -> Task:
    """Construct the task named by ``path`` with ``options``.

    Raises:
        ConfigError: as `load_task`, or the options do not fit the constructor.
        TaskError: as `load_task`, or the constructor fails.
    """
    cls = load_task(path, check, copy_in=copy_in, alone=alone)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ConfigError(f"task {path}: options do not fit: {error}; {cls.__name__} takes: {known}") from None
    with task_code("making the task"):
        return cls(**options)


def code_path(path: str) -> Path:
    """Return the path of the code of a task, given with or without a class; runs nothing of it."""
    if path in SHIPPED:
        return Path(__file__).parent / "tasks" / f"{path.replace('-', '_')}.py"
    code, colon, _ = path.rpartition(":")
    return Path(code if colon else path)


def load_task(path: str, check: Check | None = None, *, copy_in: Path | None = None, alone: bool = True) -> type[Task]:
    """Find a task class: a shipped task's name, or ``path:ClassName`` (see `fednats.learning.code_files.read_code`).

    Args:
        path: the task.
        check: called before any of the code runs.
        copy_in: folder for the copy that runs, see `fednats.learning.code_import.import_code`.
        alone: whether, with ``check``, the code may import nothing that lies beside it, because that was not checked.

    Raises:
        ConfigError: no such name, code or class, the class is not a complete `Task`, or ``check`` refuses the code.
        TaskError: the code does not import.
    """
    _, colon, name = path.rpartition(":")
    if path not in SHIPPED and (not colon or not name.isidentifier()):
        shipped = ", ".join(SHIPPED)
        raise ConfigError(
            f"task {path!r}: give a shipped task ({shipped}), or path/to/file.py:ClassName; a folder or a wheel has its"
            " place before the colon, too"
        )
    code = read_code(code_path(path))
    if check is not None:
        check(code_path(path), code.sha256)
    if path in SHIPPED:
        return SHIPPED[path]()
    return _checked(import_code(code, copy_in=copy_in, alone=alone and check is not None), name, path)


def _checked(module: ModuleType, name: str, path: str) -> type[Task]:
    found = getattr(module, name, None)
    if found is None:
        there = ", ".join(key for key, value in vars(module).items() if _is_own_task(value, module)) or "none"
        raise ConfigError(f"task {path}: no class {name} in it; tasks there: {there}")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task {path}: {name} is no task; derive it from fednats.learning.task.Task")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"task {path}: {name} lacks {', '.join(missing)}")
    return found


def _is_own_task(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and value.__module__.partition(".")[0] == module.__name__
