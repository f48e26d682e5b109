"""Find a task's code and load it.

`make_task` takes the name of a shipped task or ``path/to/file.py:ClassName``, and the options of its constructor.

A task's file is read once, and what was read is what is checked and run: never a compiled copy beside it.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fednats.errors import ConfigError, TaskError
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


Check = Callable[[Path, bytes], None]
"""Given a file of code and its bytes before any of it runs; raises ConfigError if it must not."""


def make_task(path: str, options: Mapping[str, Any], check: Check | None = None) -> Task:
    """Construct the task that ``path`` names with ``options``.

    Raises:
        ConfigError: as `load_task`, or the options do not fit the constructor.
        TaskError: as `load_task`, or the constructor fails.
    """
    cls = load_task(path, check)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ConfigError(f"task {path}: options do not fit: {error}; {cls.__name__} takes: {known}") from None
    with task_code("making the task"):
        return cls(**options)


def task_file(path: str) -> Path:
    """Return the file that holds the code of the task that ``path`` names; nothing of it is run."""
    if path in SHIPPED:
        return Path(__file__).parent / "tasks" / f"{path.replace('-', '_')}.py"
    return Path(path.rpartition(":")[0])


def load_task(path: str, check: Check | None = None) -> type[Task]:
    """Find a task class: the name of a shipped one, or ``path/to/file.py:ClassName``.

    With a ``check`` the file may import nothing that lies beside it: that was not checked.

    Raises:
        ConfigError: no such name, file or class, the class is no complete `Task`, or ``check`` refuses the code.
        TaskError: the code does not import.
    """
    if path in SHIPPED:
        if check is not None:
            check(task_file(path), _read(task_file(path)))
        return SHIPPED[path]()
    file, colon, name = path.rpartition(":")
    if not colon or not name.isidentifier():
        shipped = ", ".join(SHIPPED)
        raise ConfigError(f"task {path!r}: give a shipped task ({shipped}) or path/to/file.py:ClassName")
    return _checked(_import(Path(file), check), name, path)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"task file {file}: no such file (looked in {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"task file {file}: cannot be read ({error.strerror})") from error


def _import(file: Path, check: Check | None) -> ModuleType:
    if file.suffix != ".py":
        raise ConfigError(f"task file {file}: not a Python file; its name must end in .py")
    code = _read(file)
    if check is not None:
        check(file, code)
        sys.meta_path.insert(0, _NothingBeside(file))
    module = ModuleType(f"fednats_task_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        with task_code("importing the task"):
            exec(compile(code, file, "exec", dont_inherit=True), vars(module))  # noqa: S102 - what a task's file is for
    except TaskError:
        del sys.modules[module.__name__]
        raise
    return module


class _NothingBeside(MetaPathFinder):
    """Refuses to import modules and packages from the folder of a task's file, also later on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._folder = file.resolve().parent

    def find_spec(self, fullname: str, path: object, _target: object = None) -> ModuleSpec | None:
        """Return nothing, so that the finders after this one are asked. Raises ImportError: it lies beside the file."""
        found = PathFinder.find_spec(fullname) if path is None else None
        if found is not None:
            places = found.submodule_search_locations or [str(found.origin)]
            if any(Path(place).resolve().parent == self._folder for place in places):
                raise ImportError(
                    f"{fullname} lies beside {self._file.name}, and only that file was checked; put all code into it,"
                    " or install the rest as a package"
                )
        return None


def _checked(module: ModuleType, name: str, path: str) -> type[Task]:
    found = getattr(module, name, None)
    if found is None:
        there = ", ".join(key for key, value in vars(module).items() if _is_own_task(value, module)) or "none"
        raise ConfigError(f"task {path}: no class {name} in the file; tasks there: {there}")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task {path}: {name} is no task; derive it from fednats.learning.task.Task")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"task {path}: {name} lacks {', '.join(missing)}")
    return found


def _is_own_task(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
