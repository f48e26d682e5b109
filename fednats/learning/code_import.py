"""Import a task's code from a private copy of the bytes that were read.

Python imports the copy like any package, so relative imports, data files beside the code and child processes of the
task work as usual. Later changes to the original have no effect.
"""

import atexit
import hashlib
import importlib
import io
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PurePosixPath
from types import ModuleType

from fednats.errors import ConfigError
from fednats.learning.code_files import MAX_BYTES, CodeFiles, check_name, too_large
from fednats.learning.task_errors import show_as, shown, task_code

COPIES = "task-code"
COPY = "fednats-task-"
"""Prefix of the name of a folder with a copy; the rest is the hash of the code."""


def import_code(code: CodeFiles, *, copy_in: Path | None = None, alone: bool = False) -> ModuleType:
    """Import ``code`` and return its module or package; the same code gives the same module again.

    Args:
        code: the files to import.
        copy_in: folder for the copy; its subfolder `COPIES` is replaced. None uses a temporary folder.
        alone: whether the code may import only itself and installed packages, nothing else that lies beside it.

    Raises:
        ConfigError: not a wheel of one package; another package of that name is installed or was imported before; or
            the copy cannot be written.
        TaskError: the import fails.
    """
    name, files = _importable(code)
    if alone:
        sys.meta_path.insert(0, _NothingBeside(code))
    if name in sys.modules:
        return _same(sys.modules[name], code)
    _refuse_other(name, code)
    copy = _write(code, files, copy_in)
    if code.path.suffix != ".py":
        show_as(copy, code.path if code.path.suffix == ".whl" else code.path.parent)
    sys.path.insert(0, str(copy))  # child processes of the task inherit it
    importlib.invalidate_caches()
    try:
        with task_code("importing the task"):
            return importlib.import_module(name)
    except BaseException:
        sys.path.remove(str(copy))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
        raise


def _importable(code: CodeFiles) -> tuple[str, Mapping[str, bytes]]:
    """Return the name to import, and the files that hold it."""
    if code.path.suffix == ".whl":
        return _unpacked(code)
    if code.path.suffix == ".py":
        return _single(code)
    return code.path.name, code.files


def _single(code: CodeFiles) -> tuple[str, Mapping[str, bytes]]:
    """Give a single file a module name that no package has. It keeps its own ``__file__``: data may lie beside it."""
    stem = re.sub(r"\W", "_", code.path.stem)
    name = f"fednats_task_{stem}_{hashlib.sha256(f'{code.path}:{code.sha256}'.encode()).hexdigest()[:16]}"
    read = "__import__('pathlib').Path(__file__).with_name('code').read_bytes()"
    runs = f"exec(compile({read}, (__file__ := {str(code.path)!r}), 'exec', dont_inherit=True))\n"
    return name, {f"{name}.py": runs.encode(), "code": code.files[code.path.name]}


def _unpacked(code: CodeFiles) -> tuple[str, Mapping[str, bytes]]:
    """Return the name of a wheel's one package, and all files of the wheel except compiled copies."""
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(code.files[code.path.name])) as wheel:
            entries = [entry for entry in wheel.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise too_large(code.path)
            for entry in entries:
                parts = PurePosixPath(entry.filename).parts
                if "__pycache__" in parts:
                    continue
                check_name(code.path, entry.filename)
                if entry.filename != "/".join(parts) or ".." in parts or parts[0] == "/" or entry.filename in files:
                    raise ConfigError(
                        f"task {code.path}: {entry.filename} is there twice, or no name below the wheel; build it anew"
                    )
                files[entry.filename] = wheel.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ConfigError(f"task {code.path}: no wheel ({error}); build it with `pip wheel --no-deps .`") from None
    tops = {PurePosixPath(name).parts[0] for name in files}
    names = sorted({top.removesuffix(".py") for top in tops if not top.endswith(".dist-info")})
    if len(names) != 1 or not {f"{names[0]}.py", f"{names[0]}/__init__.py"} & set(files):
        found = ", ".join(names) or "none"
        raise ConfigError(f"task {code.path}: a wheel of one package is expected, this one has {found}")
    return names[0], files


def _same(loaded: ModuleType, code: CodeFiles) -> ModuleType:
    """Return the module ``loaded`` earlier if it is the same code."""
    origin = str(loaded.__spec__ and loaded.__spec__.origin)
    if f"{COPY}{code.sha256}" in (place.name for place in Path(origin).parents):
        return loaded
    raise ConfigError(
        f"task {code.path}: this process has imported another {loaded.__name__}, from {shown(origin)}; start the process"
        " again, or rename the package"
    )


def _refuse_other(name: str, code: CodeFiles) -> None:
    """Refuse a task whose name is also that of another package."""
    found = PathFinder.find_spec(name, [entry for entry in sys.path if not Path(entry).name.startswith(COPY)])
    is_namespace = found is not None and found.origin is None  # a folder that happens to have the name
    others = [] if is_namespace else [place for place in _places(found) if place != code.path.resolve()]
    if name in sys.stdlib_module_names or others:
        where = others[0] if others else "Python's standard library"
        raise ConfigError(f"task {code.path}: there is another package {name} ({where}); rename the task's")


def _places(spec: ModuleSpec | None) -> list[Path]:
    if spec is None:
        return []
    return [Path(place).resolve() for place in spec.submodule_search_locations or [str(spec.origin)]]


def _write(code: CodeFiles, files: Mapping[str, bytes], copy_in: Path | None) -> Path:
    try:
        if copy_in is None:
            copy_in = Path(tempfile.mkdtemp(prefix="fednats-"))
            atexit.register(shutil.rmtree, copy_in, ignore_errors=True)
        elif (copy_in / COPIES).exists():
            shutil.rmtree(copy_in / COPIES)
        copy = copy_in / COPIES / f"{COPY}{code.sha256}"
        for name, data in files.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"task {code.path}: no copy can be written to {error.filename} ({error.strerror})") from error
    return copy.resolve()


class _NothingBeside(MetaPathFinder):
    """Refuses, at any time, imports of modules and packages that lie beside a task's code or in its folder."""

    def __init__(self, code: CodeFiles) -> None:
        self._path = code.path
        self._folder = code.path.resolve().parent

    def find_spec(self, fullname: str, path: Sequence[str] | None, _target: object = None) -> ModuleSpec | None:
        """Return None, so that later finders are asked. Raises ImportError: the module lies beside the code."""
        if path is None:
            for place in _places(PathFinder.find_spec(fullname)):
                if place.parent == self._folder or place.is_relative_to(self._path.resolve()):
                    raise ImportError(
                        f"{fullname} lies beside {self._path.name}, and only that was checked; put all code into one package, and"
                        " import it relative to that, or install the rest"
                    )
        return None
