"""An SQLite file that several threads of one process use in turn over one connection.

An SQLite connection has one transaction at a time. Without turns, a thread that begins a transaction during another
thread's would fail, or would join that transaction and be rolled back with it.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fednats.storage.database import open_database, storage_error


class SharedDatabase:
    """One connection to the file at ``path``."""

    def __init__(self, path: Path, schema: str, remedy: str) -> None:
        """Open or create the file; ``remedy`` goes into the error text when something cannot be written.

        Raises:
            ConfigError: the file cannot be opened.
            DatabaseLockedError: another process holds it.
        """
        self.path = path
        self.connection = open_database(path, schema)
        self._remedy = remedy
        self._turn = threading.RLock()

    def rows(self, query: str, *parameters: str | int) -> list[tuple[Any, ...]]:
        """Return the rows that ``query`` selects. Raises as `transaction`."""
        with self.reading() as connection:
            return connection.execute(query, parameters).fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Take a turn: no other thread uses the connection meanwhile. Raises as `transaction`."""
        with self._turn:
            try:
                yield self.connection
            except sqlite3.OperationalError as error:
                raise storage_error(self.path, error, self._remedy) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Read and write all or nothing, with no other thread or process in between; durable on return.

        Raises:
            DatabaseLockedError: another process holds the file; nothing was written.
            LocalStorageError: the disk is full or broken; nothing was written.
        """
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file after the transaction in progress."""
        with self._turn:
            self.connection.close()
