"""The journal of a machine: every event it was given, in order, in SQLite."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgpack

from fednats.errors import ConfigError
from fednats.protocol.events import EVENTS, Event

BUSY_TIMEOUT_S = 10.0


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


class Journal:
    """Append-only; an appended event survives the process."""

    def __init__(self, path: Path) -> None:
        self._connection = open_database(
            path,
            "CREATE TABLE IF NOT EXISTS event"
            " (sequence INTEGER PRIMARY KEY, at TEXT DEFAULT CURRENT_TIMESTAMP, kind TEXT NOT NULL, body BLOB NOT NULL)",
        )

    def append(self, event: Event) -> None:
        """Write ``event``; durable on return."""
        body = msgpack.packb(event.model_dump(mode="python"), use_bin_type=True)
        self._connection.execute("INSERT INTO event (kind, body) VALUES (?, ?)", (event.kind, body))

    def replay(self) -> Iterator[Event]:
        """Yield all events in the order they were appended."""
        for kind, body in self._connection.execute("SELECT kind, body FROM event ORDER BY sequence"):
            fields = msgpack.unpackb(body, use_list=False, raw=False)
            yield EVENTS[kind].model_validate(fields)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
