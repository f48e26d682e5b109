"""An SQLite file that several threads of one process use over one connection: one after the other.

SQLite lets a connection have one transaction at a time. Without turns, a thread that begins one while another thread is in
the middle of its own fails, or becomes a part of that one and is undone with it.
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
        """Open or create it; ``remedy`` is what is said when the disk does not take something.

        Raises:
            ConfigError: it cannot be opened.
            DatabaseLockedError: another process holds it.
        """
        self.path = path
        self.connection = open_database(path, schema)
        self._remedy = remedy
        self._turn = threading.RLock()

    def rows(self, query: str, *parameters: str | int) -> list[tuple[Any, ...]]:
        """Return what ``query`` finds. Raises as `transaction`."""
        with self.reading() as connection:
            return connection.execute(query, parameters).fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Have a turn. Raises as `transaction`."""
        with self._turn:
            try:
                yield self.connection
            except sqlite3.OperationalError as error:
                raise storage_error(self.path, error, self._remedy) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Read and write all or nothing, with no other thread or process between; durable at the end.

        Raises:
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
        """Close the file, once a transaction under way is over."""
        with self._turn:
            self.connection.close()
