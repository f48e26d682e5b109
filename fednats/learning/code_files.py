"""The files of a task's code, and the hash by which a hospital's policy knows them.

A task is a Python file, a folder that is a Python package, or a wheel. It is read once, so the bytes that are hashed
are also the bytes that a kit gets and that run.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fednats.errors import ConfigError

MAX_BYTES = 2**28
"""Largest total size of a task's files, also for an unpacked wheel."""

_NOT_READABLE = {".pyc", ".pyo", ".pyd", ".so", ".dylib", ".dll"}
"""Suffixes of compiled code, which nobody can read."""


@dataclass(frozen=True)
class CodeFiles:
    """A task's code as read from ``path``, which is absolute."""

    path: Path
    files: Mapping[str, bytes]
    """Content by name below the parent folder of ``path``: ``own.py``, ``mine-1.0-py3-none-any.whl``, or
    ``mine/__init__.py`` and so on."""
    sha256: str
    """Hexadecimal SHA-256 of a file's bytes, or `tree_sha256` of a folder."""


def read_code(path: Path) -> CodeFiles:
    """Read a ``.py`` file, a ``.whl`` file, or a folder with an ``__init__.py``.

    Raises:
        ConfigError: it is none of these, cannot be read, is too large, has a file that `check_name` refuses, or has a
            link that leads out of the folder.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100 - keeps a link's name, which is the package's
    try:
        if place.is_dir():
            files = _read_folder(place)
            return CodeFiles(place, files, tree_sha256(files))
        if place.suffix not in {".py", ".whl"}:
            raise ConfigError(f"task {path}: give a Python file (.py), a folder with an __init__.py, or a wheel (.whl)")
        data = _read(place, MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"task {path}: no such file or folder (looked in {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"task {path}: {error.filename or place} cannot be read ({error.strerror})") from error
    return CodeFiles(place, {place.name: data}, hashlib.sha256(data).hexdigest())


def tree_sha256(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of the lines that ``sha256sum`` prints for these files, ordered by the UTF-8 of their names.

    >>> tree_sha256({"mine/b.py": b"", "mine/a.py": b"x"}) == tree_sha256({"mine/a.py": b"x", "mine/b.py": b""})
    True
    >>> tree_sha256({"mine/a.py": b"x"}) == tree_sha256({"other/a.py": b"x"})
    False
    """
    names = sorted(files, key=str.encode)
    listing = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()


def names_in(folder: Path) -> Iterator[str]:
    """Yield the names of a task's files below ``folder``.

    Names that begin with a dot and ``__pycache__`` are left out, with everything in them.
    """
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _left_out(name))
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted((*files, *links)):
            if not _left_out(name):
                yield Path(parent, name).relative_to(folder).as_posix()


def check_name(where: Path, name: str) -> None:
    """Raise ConfigError if a task may not contain the file ``name``."""
    if not name.isprintable() or "\\" in name:
        raise ConfigError(f"task {where}: {name!r} is no name of a file that all systems know; rename it")
    if PurePosixPath(name).suffix.lower() in _NOT_READABLE:
        raise ConfigError(
            f"task {where}: {name} is compiled code, which nobody can read before it runs; remove it, or install it as a package"
        )


def too_large(where: Path) -> ConfigError:
    """Return the error for more than `MAX_BYTES`."""
    return ConfigError(
        f"task {where}: more than {MAX_BYTES // 2**20} MiB; leave data and weights out, and name them in the task's options"
    )


def _raise(error: OSError) -> None:
    raise error


def _left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.name.isidentifier():
        raise ConfigError(f"task {folder}: {folder.name!r} cannot be the name of a Python package; rename the folder")
    if not (folder / "__init__.py").is_file():
        raise ConfigError(f"task {folder}: the folder has no __init__.py, so it is no Python package; add one")
    files: dict[str, bytes] = {}
    room = MAX_BYTES
    for name in names_in(folder):
        check_name(folder, name)
        file = folder / name
        _refuse_link(folder, name)
        data = _read(file, room)
        files[f"{folder.name}/{name}"] = data
        room -= len(data)
    return files


def _refuse_link(folder: Path, name: str) -> None:
    file = folder / name
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"task {folder}: {name} is a link to something outside the folder; put a copy there")
    if not file.is_file():
        raise ConfigError(f"task {folder}: {name} is no file, or a link to none; remove it, or put a copy there")


def _read(file: Path, room: int) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(room + 1)
    if len(data) > room:
        raise too_large(file)
    return data
