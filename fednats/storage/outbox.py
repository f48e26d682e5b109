"""The site's outbox: updates with their chunks, and the residual that belongs to them, in one SQLite file.

Chunks and the residual that their quantisation left are written as they are made, under the number of an update that
does not exist yet; storing the head makes both valid at once. A site that is killed before that has neither, so what was
rounded away is never lost and never counted twice, and no write keeps the daemon's side waiting.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.errors import LocalDataError
from fednats.messages import Update
from fednats.storage.journal import open_database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outgoing (sequence INTEGER PRIMARY KEY, update_id TEXT UNIQUE NOT NULL,
    base_version INTEGER NOT NULL, head BLOB NOT NULL, sent_at TEXT);
CREATE TABLE IF NOT EXISTS chunk (update_id TEXT NOT NULL, position INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (update_id, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS residual (sequence INTEGER NOT NULL, start INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (sequence, start)) WITHOUT ROWID;
"""


class Outbox:
    """Updates on their way out. One process writes (the worker), one marks as sent (the daemon)."""

    def __init__(self, path: Path) -> None:
        self._connection = open_database(path, _SCHEMA)

    # --- the worker's side --------------------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """Return the sequence number of the next update, from 1, and drop what an unfinished one left."""
        newest = self._newest()
        self._connection.execute(
            "DELETE FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing WHERE sent_at IS NULL)"
        )
        self._connection.execute("DELETE FROM residual WHERE sequence <> ?", (newest,))
        return newest + 1

    def add_chunk(self, update_id: str, position: int, data: bytes) -> None:
        """Store one chunk of an update."""
        self._connection.execute("INSERT INTO chunk VALUES (?, ?, ?)", (update_id, position, data))

    def add_update(self, update: Update) -> None:
        """Store the head of an update: its chunks and its residual, stored before, count from now on."""
        self._connection.execute(
            "INSERT INTO outgoing (sequence, update_id, base_version, head) VALUES (?, ?, ?, ?)",
            (update.sequence, update.update_id, update.base_version, wire.pack(update)),
        )

    def residual(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the residual of parameters ``start`` to ``stop``, float32[stop - start]; zeros at first.

        Raises:
            LocalDataError: the stored residual is of another model.
        """
        row = self._connection.execute(
            "SELECT data FROM residual WHERE sequence = ? AND start = ?", (self._newest(), start)
        ).fetchone()
        if row is None:
            return np.zeros(stop - start, np.float32)
        stored = np.frombuffer(row[0], "<f4")
        if len(stored) != stop - start:
            raise LocalDataError(
                f"the residual in the outbox covers {len(stored)} parameters from {start}, the model has {stop - start};"
                " it belongs to another model: give the new run a state_dir of its own"
            )
        return stored

    def add_residual(self, sequence: int, start: int, values: NDArray[np.float32]) -> None:
        """Store what update ``sequence`` leaves of the parameters from ``start``, float32[n]."""
        self._connection.execute(
            "INSERT INTO residual VALUES (?, ?, ?)", (sequence, start, values.astype("<f4", copy=False).tobytes())
        )

    # --- the daemon's side --------------------------------------------------------------------------------------------

    def last_trained(self) -> int:
        """Return the base version of the newest update, -1 for none."""
        (newest,) = self._connection.execute("SELECT COALESCE(MAX(base_version), -1) FROM outgoing").fetchone()
        return int(newest)

    def pending(self) -> list[Update]:
        """Return the updates that are not yet acknowledged by the bus, oldest first."""
        rows = self._connection.execute("SELECT head FROM outgoing WHERE sent_at IS NULL ORDER BY sequence").fetchall()
        return [wire.unpack(head, Update) for (head,) in rows]

    def chunks(self, update_id: str) -> Iterator[bytes]:
        """Yield the chunks of an update in order."""
        query = "SELECT data FROM chunk WHERE update_id = ? AND position = ?"
        position = 0  # one query each: no statement stays open while the worker writes
        while (row := self._connection.execute(query, (update_id, position)).fetchone()) is not None:
            yield row[0]
            position += 1

    def mark_sent(self, update_id: str) -> None:
        """The bus has the whole update in writing: keep the head as a record, drop the chunks."""
        self._connection.execute("UPDATE outgoing SET sent_at = CURRENT_TIMESTAMP WHERE update_id = ?", (update_id,))
        self._connection.execute("DELETE FROM chunk WHERE update_id = ?", (update_id,))

    def _newest(self) -> int:
        (newest,) = self._connection.execute("SELECT COALESCE(MAX(sequence), 0) FROM outgoing").fetchone()
        return int(newest)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
