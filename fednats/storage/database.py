"""Opening a daemon's SQLite files, and the errors for one that is locked, full or broken."""

import os
import sqlite3
from pathlib import Path

from fednats.errors import ConfigError, DatabaseLockedError, LocalStorageError

BUSY_TIMEOUT_S = 10.0
"""How long SQLite waits for another process's lock before it gives up. The caller may try again."""

_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PRIMARY = 0xFF
"""Mask of an error code's primary part."""

_FILES = ("", "-wal", "-shm")


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open an SQLite file in WAL mode with full durability, creating ``schema`` if it is new.

    Raises:
        ConfigError: the file cannot be opened or is no database.
        DatabaseLockedError: another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(schema)
    except (sqlite3.Error, OSError) as error:
        if _is_locked(error):
            raise _locked(path) from error
        raise ConfigError(
            f"{path}: cannot be used as a database ({error}); check its owner, disk and state_dir"
        ) from error
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open an SQLite file that a daemon may be writing to, or had open when it was killed.

    Raises:
        ConfigError: the file does not exist or cannot be opened.
    """
    try:
        return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=BUSY_TIMEOUT_S, uri=True)
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: cannot be read as a database ({error}); is this the folder of a run?") from error


def storage_error(path: Path, error: sqlite3.Error, remedy: str) -> LocalStorageError:
    """Return the error for an SQLite failure on ``path``: that it is locked, or the disk's error with ``remedy``."""
    return _locked(path) if _is_locked(error) else LocalStorageError(f"{path}: {error}; {remedy}")


def _is_locked(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & _PRIMARY in _LOCKED


def _locked(path: Path) -> DatabaseLockedError:
    who = holders(path)
    by = f"by {', '.join(who)}" if who else "by another process, which this machine does not name"
    return DatabaseLockedError(
        f"{path}: locked for {BUSY_TIMEOUT_S:.0f} s {by}; nothing was written. End what holds it, such as a backup or an"
        " open sqlite3 shell"
    )


def holders(path: Path) -> list[str]:
    """Return the other processes that hold a lock on an SQLite file, as ``process 12 (sqlite3)``; Linux only."""
    inodes = set()
    for suffix in _FILES:
        try:
            inodes.add(path.with_name(path.name + suffix).stat().st_ino)
        except OSError:
            continue
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    pids = {int(fields[4]) for fields in map(str.split, lines) if int(fields[5].rpartition(":")[2]) in inodes}
    return [f"process {pid} ({_name(pid)})" for pid in sorted(pids) if pid not in {os.getpid(), -1}]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended meanwhile"
