"""A machine's journal: every event it was given, in order, in SQLite."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

from fednats import __version__
from fednats.errors import ConfigError, RefusedError
from fednats.protocol.events import EVENTS, Event
from fednats.storage.database import open_database, open_read_only, storage_error
from fednats.storage.row_chain import CHAIN_SCHEMA, RowChain, difference, extend, read_chain
from fednats.wire import unpack_values

EVENTS_TABLE = "event"

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS event
    (sequence INTEGER PRIMARY KEY, at_s REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS written_by (first_sequence INTEGER PRIMARY KEY, release TEXT NOT NULL);
{CHAIN_SCHEMA}
"""


class JournalEntry(NamedTuple):
    """One journalled event."""

    sequence: int
    """From 1, without gaps."""
    at_s: float
    """Seconds since the epoch, by the daemon's clock."""
    event: Event


class Journal:
    """Append-only; an appended event survives the process."""

    def __init__(self, path: Path) -> None:
        """Open or begin the journal at ``path``. Raises as `open_database`."""
        self._path = path
        self._connection = open_database(path, _SCHEMA)
        self._using = threading.Lock()
        self._release_noted = False

    def append(self, events: Sequence[Event], at_s: float) -> None:
        """Write ``events`` in one transaction; all are durable on return. May be called from any thread.

        Raises:
            DatabaseLockedError: another process holds the journal; none of ``events`` was written, so they may be
                retried.
            LocalStorageError: the disk is full or broken; none of ``events`` was written.
        """
        rows = [(at_s, event.kind, msgpack.packb(event.model_dump(), use_bin_type=True)) for event in events]
        try:
            with self._using:
                self._write(rows)
        except sqlite3.Error as error:
            remedy = (
                "the journal cannot be written: make room on its disk or mend it, then start again. Nothing is lost, what"
                " was not written is delivered again"
            )
            raise storage_error(self._path, error, remedy) from error

    def replay(self) -> Iterator[JournalEntry]:
        """Yield all entries in the order they were appended.

        Raises:
            ConfigError: an entry cannot be read, or, found after the last one, entries were deleted or altered.
        """
        yield from _entries(self._connection, self._path)

    def close(self) -> None:
        """Close the file after the write in progress."""
        with self._using:
            self._connection.close()

    def _write(self, rows: Sequence[tuple[float, str, bytes]]) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._release_noted:
                _note_release(connection)
            connection.executemany("INSERT INTO event (at_s, kind, body) VALUES (?, ?, ?)", rows)
            extend(connection, EVENTS_TABLE, rows)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._release_noted = True


def read_journal(path: Path) -> list[JournalEntry]:
    """Return all entries of a journal; its daemon may be running.

    Raises:
        ConfigError: there is no journal, one of its entries cannot be read, or entries were deleted or altered.
    """
    entries, problem = read_readable(path)
    if problem is not None:
        raise problem
    return entries


def read_readable(path: Path) -> tuple[list[JournalEntry], ConfigError | None]:
    """Return the entries of a journal up to the first unreadable one, and the problem, if there is one.

    Raises:
        ConfigError: there is no journal.
    """
    connection = open_read_only(path)
    entries: list[JournalEntry] = []
    try:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "event" in names and "row_chain" not in names:
            old = f"{path}: an older release wrote it, which kept no count of events; use that release for this run"
            return entries, ConfigError(old)
        connection.execute("BEGIN")  # rows and chain as of one moment
        try:
            for entry in _entries(connection, path) if "event" in names else ():  # else its daemon is creating it
                entries.append(entry)  # noqa: PERF402 - entries before a bad one are kept
        except ConfigError as problem:
            return entries, problem
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: cannot be read as a journal ({error})") from error
    finally:
        connection.close()
    return entries, None


def _entries(connection: sqlite3.Connection, path: Path) -> Iterator[JournalEntry]:
    sequence, found = 0, RowChain()
    try:
        for sequence, at_s, kind, body in connection.execute(
            "SELECT sequence, at_s, kind, body FROM event ORDER BY sequence"
        ):
            found = found.extended([(at_s, kind, body)])
            yield JournalEntry(sequence, at_s, EVENTS[kind].model_validate(unpack_values(body)))
        wrong = difference(read_chain(connection, EVENTS_TABLE), found)
    except (sqlite3.Error, ValueError, TypeError, KeyError, RefusedError) as error:  # pydantic's are ValueErrors
        raise ConfigError(
            f"{path}: event {sequence} cannot be read ({type(error).__name__}: {error}). {_remedy(connection, sequence)}"
        ) from error
    if wrong:
        raise ConfigError(f"{path}: events were deleted or altered: {wrong}. Restore the journal from a backup of it")


def _note_release(connection: sqlite3.Connection) -> None:
    """Record which release appends from here on."""
    newest = connection.execute("SELECT release FROM written_by ORDER BY first_sequence DESC LIMIT 1").fetchone()
    if newest != (__version__,):
        connection.execute(
            "INSERT OR REPLACE INTO written_by SELECT COALESCE(MAX(sequence), 0) + 1, ? FROM event", (__version__,)
        )


def _remedy(connection: sqlite3.Connection, sequence: int) -> str:
    """Return the remedy for an unreadable event, depending on the release that wrote it."""
    query = "SELECT release FROM written_by WHERE first_sequence <= ? ORDER BY first_sequence DESC LIMIT 1"
    try:
        row = connection.execute(query, (sequence,)).fetchone()
    except sqlite3.Error:
        row = None
    if row is not None and row[0] != __version__:
        return f"Release {row[0]} wrote it, this is release {__version__}: use release {row[0]} for this run"
    return f"This release, {__version__}, wrote it: restore the journal from a backup of it"
