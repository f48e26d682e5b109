"""The site's outbox: updates with their chunks, and the residual that belongs to them, in one SQLite file.

Chunks and the residual that their quantisation left are written as they are made, under the number of an update that
does not exist yet; storing the head makes both valid at once. A site that is killed before that has neither, so what was
rounded away is never lost and never counted twice, and no write keeps the daemon's side waiting.

An update waits until the bus has all of it in writing. When more than a few wait, the oldest whose sending has not begun
is dropped and what it said goes back into the residual, in the same transaction in which the newest is stored: so its
content is in exactly one update at any time. One whose sending has begun is never dropped, it may be at the bus already.
"""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray

from fednats import wire
from fednats.codec.layout import Layout
from fednats.errors import LocalDataError, LocalStorageError
from fednats.messages import Update
from fednats.storage.journal import open_database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outgoing (sequence INTEGER PRIMARY KEY, update_id TEXT UNIQUE NOT NULL,
    base_version INTEGER NOT NULL, head BLOB NOT NULL, steps BLOB NOT NULL, claimed INTEGER NOT NULL DEFAULT 0,
    epsilon REAL, sent_chunks INTEGER NOT NULL DEFAULT 0, offered_at TEXT, sent_at TEXT, dropped_at TEXT);
CREATE TABLE IF NOT EXISTS chunk (update_id TEXT NOT NULL, position INTEGER NOT NULL, start INTEGER NOT NULL,
    data BLOB NOT NULL, quantised BLOB NOT NULL, PRIMARY KEY (update_id, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chunk_start ON chunk (update_id, start);
CREATE TABLE IF NOT EXISTS residual (sequence INTEGER NOT NULL, start INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (sequence, start)) WITHOUT ROWID;
"""

_WAITING = "sent_at IS NULL AND dropped_at IS NULL"


@dataclass(frozen=True)
class Dropped:
    """An update that makes room: what it said goes into the next one."""

    update_id: str
    steps: tuple[float, ...]
    """Of the grid it is on."""


@dataclass(frozen=True)
class ChunkKey:
    """Which chunk of which update."""

    update_id: str
    sequence: int
    position: int
    start: int
    """First parameter in it."""


def first_number(now_s: float) -> int:
    """Return the number of the first update of an outbox that is made at ``now_s``, in seconds since the epoch.

    No site makes a hundred updates a second, so one that begins anew, with another key or without what it remembered,
    goes on above its earlier numbers, and is not taken for a replay of itself.
    """
    return int(100 * now_s)


class Outbox:
    """Updates on their way out, numbered from ``first`` on. One process writes (the worker), one sends (the daemon)."""

    def __init__(self, path: Path, first: int = 1) -> None:
        self._path = path
        self._first = first
        self._connection = open_database(path, _SCHEMA)
        self._connection.execute("PRAGMA secure_delete = OFF")  # else removing a chunk takes as much room as it frees

    # --- the worker's side --------------------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """Return the sequence number of the next update."""
        return self._newest() + 1 if self.n_made() else self._first

    def n_made(self) -> int:
        """Return how many updates were stored."""
        return self._read("SELECT COUNT(*) FROM outgoing")[0]

    def begin(self, max_waiting: int) -> Dropped | None:
        """Begin an update, dropping what an unfinished one left.

        Returns the update that it takes the place of, if ``max_waiting`` wait already: the oldest whose sending has not
        begun. Until the new one is stored, or given up by `release`, that one is neither sent nor dropped.
        """
        newest = self._newest()
        with self._transaction() as connection:
            self._sweep(connection, newest)
            connection.execute("UPDATE outgoing SET claimed = 0 WHERE claimed = 1")
            (n_waiting,) = connection.execute(f"SELECT COUNT(*) FROM outgoing WHERE {_WAITING}").fetchone()  # noqa: S608 - as above
            row = None
            if n_waiting >= max_waiting:
                row = connection.execute(
                    f"UPDATE outgoing SET claimed = 1 WHERE sequence = (SELECT MIN(sequence) FROM outgoing"  # noqa: S608 - as above
                    f" WHERE {_WAITING} AND offered_at IS NULL) RETURNING update_id, steps"
                ).fetchone()
        with self._writing() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what was deleted is room for the chunks to come
        return None if row is None else Dropped(row[0], tuple(msgpack.unpackb(row[1])))

    def check_room(self, n_bytes: int) -> None:
        """Refuse an update of ``n_bytes``, residual included, that the disk has no room for; it is not begun.

        Raises:
            LocalStorageError: with what is free.
        """
        with self._transaction() as connection:
            self._sweep(connection, self._newest())
        (n_pages,), (page_bytes,) = self._read("PRAGMA freelist_count"), self._read("PRAGMA page_size")
        free = shutil.disk_usage(self._path.parent).free + n_pages * page_bytes
        if free < n_bytes:
            raise LocalStorageError(
                f"{self._path}: {free} bytes are free, an update needs {n_bytes}; nothing was trained. Make room on its disk"
            )

    def residual(self, layout: Layout, dropped: Dropped | None) -> "Residual":
        """Return what the next update has to make up for."""
        return Residual(self, self._newest(), layout, dropped)

    def add_chunk(self, key: ChunkKey, data: bytes, values: NDArray[np.int8], residual: NDArray[np.float32]) -> None:
        """Store one chunk of an update: what is sent, what it says (int8[n]) and the residual it leaves (float32[n]).

        Raises:
            LocalStorageError: the disk is full, or would be with this chunk; nothing of it was written.
        """
        quantised = zstandard.compress(values.tobytes(), level=1)
        left = residual.astype("<f4", copy=False).tobytes()
        self._leave_room(len(data) + len(quantised) + len(left))
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO chunk VALUES (?, ?, ?, ?, ?)", (key.update_id, key.position, key.start, data, quantised)
            )
            connection.execute("INSERT INTO residual VALUES (?, ?, ?)", (key.sequence, key.start, left))

    def add_update(
        self, update: Update, steps: tuple[float, ...], dropped: Dropped | None, epsilon: float | None = None
    ) -> None:
        """Store the head of an update on a grid of ``steps``: its chunks and its residual count from now on.

        ``epsilon`` is what was spent of any one record's privacy with it; None without differential privacy.
        """
        named = (update.sequence, update.update_id, update.base_version)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO outgoing (sequence, update_id, base_version, head, steps, epsilon) VALUES (?, ?, ?, ?, ?, ?)",
                (*named, wire.pack(update), msgpack.packb(steps), epsilon),
            )
            if dropped is not None:
                connection.execute(
                    "UPDATE outgoing SET dropped_at = CURRENT_TIMESTAMP WHERE update_id = ?", (dropped.update_id,)
                )
                connection.execute("DELETE FROM chunk WHERE update_id = ?", (dropped.update_id,))

    def begin_run(self, first_version: int) -> int:
        """Drop what is of versions before ``first_version``: updates whose sending has not begun, and the residual.

        One whose sending has begun is sent to its end, and refused by its region. Returns how many updates were dropped.
        """
        with self._transaction() as connection:
            dropped = connection.execute(
                f"UPDATE outgoing SET claimed = 0, dropped_at = CURRENT_TIMESTAMP WHERE {_WAITING}"  # noqa: S608 - a constant
                " AND offered_at IS NULL AND base_version < ? RETURNING update_id",
                (first_version,),
            ).fetchall()
            connection.executemany("DELETE FROM chunk WHERE update_id = ?", dropped)
            connection.execute(
                "DELETE FROM residual WHERE sequence <= (SELECT MAX(sequence) FROM outgoing WHERE base_version < ?)",
                (first_version,),
            )
        return len(dropped)

    # --- the daemon's side --------------------------------------------------------------------------------------------

    def last_trained(self) -> int:
        """Return the base version of the newest update, -1 for none."""
        (newest,) = self._read("SELECT COALESCE(MAX(base_version), -1) FROM outgoing")
        return int(newest)

    def release(self) -> None:
        """No update is in the making: one that was to make room for it is sent like the others."""
        with self._transaction() as connection:
            connection.execute("UPDATE outgoing SET claimed = 0 WHERE claimed = 1")

    def pending(self) -> list[Update]:
        """Return the updates that are not yet acknowledged by the bus, oldest first."""
        query = f"SELECT head FROM outgoing WHERE {_WAITING} ORDER BY sequence"  # noqa: S608 - a constant
        return [wire.unpack(head, Update) for (head,) in self._connection.execute(query).fetchall()]

    def counts(self) -> dict[str, int]:
        """Return how many updates wait, were sent and were dropped."""
        waiting, sent, dropped = self._read(
            f"SELECT COUNT(*) FILTER (WHERE {_WAITING}), COUNT(sent_at), COUNT(dropped_at) FROM outgoing"  # noqa: S608 - a constant
        )
        return {"waiting": int(waiting), "sent": int(sent), "dropped": int(dropped)}

    def offer(self, update_id: str) -> int | None:
        """Note that sending begins; return how many chunks the bus has already, None if the update makes room instead."""
        with self._transaction() as connection:
            row = connection.execute(
                "UPDATE outgoing SET offered_at = COALESCE(offered_at, CURRENT_TIMESTAMP)"
                " WHERE update_id = ? AND claimed = 0 AND dropped_at IS NULL RETURNING sent_chunks",
                (update_id,),
            ).fetchone()
        return None if row is None else int(row[0])

    def chunks(self, update_id: str, first: int = 0) -> Iterator[bytes]:
        """Yield the chunks of an update in order, from number ``first`` on."""
        query = "SELECT data FROM chunk WHERE update_id = ? AND position = ?"
        position = first  # one query each: no statement stays open while the worker writes
        while (row := self._connection.execute(query, (update_id, position)).fetchone()) is not None:
            yield row[0]
            position += 1

    def epsilon(self, update_id: str) -> float | None:
        """Return what was spent when an update was made; None without differential privacy."""
        query = "SELECT epsilon FROM outgoing WHERE update_id = ?"
        (epsilon,) = self._connection.execute(query, (update_id,)).fetchone()
        return None if epsilon is None else float(epsilon)

    def n_bytes(self, update_id: str, first: int = 0) -> int:
        """Return the size of the chunks of an update from number ``first`` on."""
        query = "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM chunk WHERE update_id = ? AND position >= ?"
        (n_bytes,) = self._connection.execute(query, (update_id, first)).fetchone()
        return int(n_bytes)

    def note_sent_chunks(self, update_id: str, n_chunks: int) -> None:
        """The bus has the first ``n_chunks`` in writing."""
        with self._transaction() as connection:
            connection.execute("UPDATE outgoing SET sent_chunks = ? WHERE update_id = ?", (n_chunks, update_id))

    def mark_sent(self, update_id: str) -> None:
        """The bus has the whole update in writing: keep the head as a record, drop the chunks."""
        with self._transaction() as connection:
            connection.execute("UPDATE outgoing SET sent_at = CURRENT_TIMESTAMP WHERE update_id = ?", (update_id,))
            connection.execute("DELETE FROM chunk WHERE update_id = ?", (update_id,))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _sweep(connection: sqlite3.Connection, newest: int) -> None:
        """Remove what an unfinished update left, and residuals that a newer one replaced."""
        connection.execute(
            f"DELETE FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing WHERE {_WAITING})"  # noqa: S608 - a constant
        )
        connection.execute("DELETE FROM residual WHERE sequence <> ?", (newest,))

    def stored_residual(self, sequence: int, part: slice) -> NDArray[np.float32] | None:
        """Return what update ``sequence`` left of ``part``, float32, None if it left nothing there."""
        query = "SELECT start, data FROM residual WHERE sequence = ? AND start < ? ORDER BY start DESC"
        return self._part(query, (sequence, part.stop), part, lambda data: np.frombuffer(data, "<f4"))

    def quantised(self, update_id: str, part: slice) -> NDArray[np.float32] | None:
        """Return what an update says of ``part`` in steps of its grid, float32 of integers."""
        query = "SELECT start, quantised FROM chunk WHERE update_id = ? AND start < ? ORDER BY start DESC"
        return self._part(
            query,
            (update_id, part.stop),
            part,
            lambda data: np.frombuffer(zstandard.decompress(data), np.int8).astype(np.float32),
        )

    def _part(
        self,
        query: str,
        key: tuple[int | str, int],
        part: slice,
        decode: Callable[[bytes], NDArray[np.float32]],
    ) -> NDArray[np.float32] | None:
        values = np.zeros(part.stop - part.start, np.float32)
        found = 0
        for start, data in self._connection.execute(query, key):
            stored = decode(data)
            stop = start + len(stored)
            if stop <= part.start:
                break
            low, high = max(start, part.start), min(stop, part.stop)
            values[low - part.start : high - part.start] = stored[low - start : high - start]
            found += high - low
        if found not in {0, len(values)}:
            raise LocalDataError(
                f"{self._path} covers {found} of the parameters {part.start} to {part.stop}: it belongs to another model;"
                " give the new run a state_dir of its own"
            )
        return values if found else None

    def _newest(self) -> int:
        (newest,) = self._read("SELECT COALESCE(MAX(sequence), 0) FROM outgoing")
        return int(newest)

    def _read(self, query: str) -> tuple[int, ...]:
        row: tuple[int, ...] = self._connection.execute(query).fetchone()
        return row

    def _leave_room(self, n_bytes: int) -> None:
        """Refuse to fill the disk with half an update: what is in the log must fit into the file, or it stays for ever."""
        log = self._path.with_name(f"{self._path.name}-wal").stat().st_size
        free = shutil.disk_usage(self._path.parent).free
        if free < log + 2 * n_bytes:
            raise LocalStorageError(
                f"{self._path}: {free} bytes are free, the next chunk of an update needs {log + 2 * n_bytes}; nothing was"
                " written. Make room on its disk"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all or nothing; durable at the end. Raises as `_writing`."""
        with self._writing():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Name the file and the remedy.

        Raises:
            LocalStorageError: the disk is full or broken; nothing of it was written.
        """
        try:
            yield self._connection
        except sqlite3.OperationalError as error:
            raise LocalStorageError(f"{self._path}: {error}; nothing was written. Make room on its disk") from error


class Residual:
    """What rounding and dropping left out so far, float32[n], added up where it is read."""

    def __init__(self, outbox: Outbox, sequence: int, layout: Layout, dropped: Dropped | None) -> None:
        self._outbox = outbox
        self._sequence = sequence
        self._layout = layout
        self._dropped = dropped

    def __len__(self) -> int:
        return self._layout.n_parameters

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Return values ``part.start`` to ``part.stop``; raises LocalDataError if the outbox is another model's."""
        stored = self._outbox.stored_residual(self._sequence, part)
        values = np.zeros(part.stop - part.start, np.float32) if stored is None else stored
        if self._dropped is not None:
            quantised = self._outbox.quantised(self._dropped.update_id, part)
            if quantised is not None:
                values = values + quantised * self._layout.steps(self._dropped.steps, part.start, part.stop)
        return values


def outbox_file(state_dir: Path) -> Path:
    """Return where a site keeps its outbox."""
    return state_dir / "outbox.sqlite"
