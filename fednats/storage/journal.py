"""The journal of a machine: every event it was given, in order, in SQLite."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

from fednats.errors import ConfigError, LocalStorageError, RefusedError
from fednats.protocol.events import EVENTS, Event
from fednats.wire import unpack_values

BUSY_TIMEOUT_S = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS event
    (sequence INTEGER PRIMARY KEY, at_s REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL)
"""


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open an SQLite file in WAL mode with full durability, creating ``schema`` if it is new.

    Raises:
        ConfigError: the file cannot be opened or is no database.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(schema)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(
            f"{path}: cannot be used as a database ({error}); check its owner, disk and state_dir"
        ) from error
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open an SQLite file that a daemon may be writing to, or had open when it was killed.

    Raises:
        ConfigError: there is none.
    """
    try:
        return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=BUSY_TIMEOUT_S, uri=True)
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: cannot be read as a database ({error}); is this the folder of a run?") from error


class Entry(NamedTuple):
    """One event as it was journalled."""

    sequence: int
    """From 1 on, without gaps."""
    at_s: float
    """Seconds since the epoch, by the clock of the daemon."""
    event: Event


class Journal:
    """Append-only; an appended event survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = open_database(path, _SCHEMA)
        self._using = threading.Lock()

    def append(self, events: Sequence[Event], at_s: float) -> None:
        """Write ``events`` in one transaction; all are durable on return. Called from any thread.

        Raises:
            LocalStorageError: the disk is full or broken; none of ``events`` is in the journal.
        """
        rows = [(at_s, event.kind, msgpack.packb(event.model_dump(), use_bin_type=True)) for event in events]
        try:
            with self._using, self._connection:
                self._connection.execute("BEGIN")
                self._connection.executemany("INSERT INTO event (at_s, kind, body) VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise LocalStorageError(
                f"{self._path}: the journal cannot be written ({error}); make room on its disk or mend it, then start"
                " again: nothing is lost, what was not written is delivered again"
            ) from error

    def replay(self) -> Iterator[Entry]:
        """Yield all entries in the order they were appended.

        Raises:
            ConfigError: one of them cannot be read.
        """
        yield from _entries(self._connection, self._path)

    def close(self) -> None:
        """Close the file, once a write under way is over."""
        with self._using:
            self._connection.close()


def read_journal(path: Path) -> list[Entry]:
    """Return all entries of the journal of a daemon that may be running.

    Raises:
        ConfigError: there is no journal, or one of its entries cannot be read.
    """
    connection = open_read_only(path)
    try:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'event'").fetchone()
        return list(_entries(connection, path)) if made else []  # its daemon is just making it
    finally:
        connection.close()


def _entries(connection: sqlite3.Connection, path: Path) -> Iterator[Entry]:
    sequence = 0
    try:
        for sequence, at_s, kind, body in connection.execute(
            "SELECT sequence, at_s, kind, body FROM event ORDER BY sequence"
        ):
            fields = unpack_values(body)
            yield Entry(sequence, at_s, EVENTS[kind].model_validate(fields))
    except (sqlite3.Error, ValueError, TypeError, KeyError, RefusedError) as error:  # pydantic's are ValueErrors
        raise ConfigError(
            f"{path}: event {sequence} cannot be read ({type(error).__name__}: {error}); restore the journal"
        ) from error
