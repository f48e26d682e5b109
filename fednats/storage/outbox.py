"""The site's outbox: updates with their chunks and the residual that belongs to them, in one SQLite file.

Chunks and their quantisation residual are written as they are made, under the number of an update that does not exist
yet. Storing the head makes both valid at once. A site that is killed before that has neither, so nothing rounded away
is lost or counted twice, and no long write keeps the daemon waiting.

An update waits until the bus has acknowledged all of it. When too many wait, the oldest whose sending has not begun is
dropped, and its content goes back into the residual in the transaction that stores the newest. So its content is in
exactly one update at any time. An update whose sending has begun is never dropped, because the bus may have it already.

An outbox restored from a backup does not know what was sent since. Updates that wait in it are not sent, its residual
is void, and the next update gets a number above all that its region may know (`Outbox.go_above`).
"""

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray

from fednats import wire
from fednats.codec.layout import Layout
from fednats.errors import ConfigError, LocalStorageError, RefusedError
from fednats.messages import NO_RECORD, Update
from fednats.storage.residual import Dropped, Residual
from fednats.storage.row_chain import CHAIN_SCHEMA, RowChain, difference, extend, read_chain
from fednats.storage.shared_database import SharedDatabase

UPDATES_TABLE = "outgoing"

_SCHEMA = f"""
{CHAIN_SCHEMA}
CREATE TABLE IF NOT EXISTS outgoing (sequence INTEGER PRIMARY KEY, update_id TEXT UNIQUE NOT NULL,
    base_version INTEGER NOT NULL, head BLOB NOT NULL, steps BLOB NOT NULL, claimed INTEGER NOT NULL DEFAULT 0,
    epsilon REAL, sent_chunks INTEGER NOT NULL DEFAULT 0, offered_at TEXT, sent_at TEXT, dropped_at TEXT);
CREATE TABLE IF NOT EXISTS chunk (update_id TEXT NOT NULL, position INTEGER NOT NULL, start INTEGER NOT NULL,
    data BLOB NOT NULL, quantised BLOB NOT NULL, PRIMARY KEY (update_id, position)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chunk_start ON chunk (update_id, start);
CREATE TABLE IF NOT EXISTS residual (sequence INTEGER NOT NULL, start INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (sequence, start)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS restored (first INTEGER PRIMARY KEY, own INTEGER NOT NULL, signed INTEGER NOT NULL,
    known INTEGER NOT NULL, base_version INTEGER NOT NULL, cost_nothing INTEGER NOT NULL DEFAULT 0,
    at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
"""

_RESTORED = "first, own, signed, known, base_version, cost_nothing"
_WAITING = "sent_at IS NULL AND dropped_at IS NULL AND sequence > (SELECT COALESCE(MAX(own), 0) FROM restored)"


@dataclass(frozen=True)
class RestoredOutbox:
    """What was found when this outbox was restored from a backup older than the site's updates in its region."""

    first: int
    """Number of the next update."""
    own: int
    """Newest number in the restored outbox; 0 for none."""
    signed: int
    """Newest number in the region's stream with the site's valid signature; 0 for none."""
    known: int
    """Newest number that the region has named, or that carries the site's signature."""
    base_version: int
    """Version that update ``signed`` was trained on; -1 for none."""
    cost_nothing: bool = False
    """Whether the updates since the backup belong to a run without noise, so that they cost no privacy budget."""


@dataclass(frozen=True)
class Offered:
    """An update whose sending begins or continues."""

    update: Update
    n_chunks: int
    """Chunks that the bus already has."""


@dataclass(frozen=True)
class ChunkKey:
    """The place of one chunk in its update."""

    update_id: str
    sequence: int
    position: int
    start: int
    """Index of its first parameter."""


def first_number(now_s: float) -> int:
    """Return the number of the first update of an outbox created at ``now_s``, in seconds since the epoch.

    No site makes a hundred updates a second. A site that starts over, with a new key or without its state, therefore
    numbers its updates above its earlier ones, and is not refused for replaying them.
    """
    return int(100 * now_s)


class Outbox:
    """Updates on their way out, numbered from ``first``. One process writes (the worker), one sends (the daemon)."""

    def __init__(self, path: Path, first: int = 1) -> None:
        """Open or begin the outbox at ``path``.

        Raises:
            ConfigError: it cannot be opened, or updates in it were deleted or altered.
        """
        self._path = path
        self._first = first
        self._database = SharedDatabase(path, _SCHEMA, "nothing was written. Make room on its disk")
        self._refuse_deleted()
        self._database.rows("PRAGMA secure_delete = OFF")  # otherwise removing a chunk needs as much room as it frees

    # --- after a backup was restored ----------------------------------------------------------------------------------

    def go_above(self, found: RestoredOutbox) -> None:
        """Continue numbering at ``found.first``, and give up waiting updates: they may have been sent since the backup.

        The residual is discarded as well, because updates sent since the backup have made up for it.
        """
        values = astuple(found)
        with self._database.transaction() as connection:
            connection.execute(f"INSERT INTO restored ({_RESTORED}) VALUES (?, ?, ?, ?, ?, ?)", values)  # noqa: S608 - a constant
            connection.execute("DELETE FROM chunk")
            connection.execute("DELETE FROM residual")

    def restored(self) -> RestoredOutbox | None:
        """Return what was found when this outbox was last restored from a backup; None if it never was."""
        rows = self._database.rows(f"SELECT {_RESTORED} FROM restored ORDER BY first DESC LIMIT 1")  # noqa: S608 - a constant
        return RestoredOutbox(*rows[0]) if rows else None

    def note_cost_nothing(self, first_version: int) -> None:
        """Note that the run from ``first_version`` on adds no noise.

        If the newest update in the restored outbox is of that run, the updates since the backup cost nothing.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE restored SET cost_nothing = 1 WHERE (SELECT MAX(base_version) FROM outgoing WHERE sequence <= own) >= ?",
                (first_version,),
            )

    def newest_number(self) -> int:
        """Return the newest number in use; 0 for none."""
        found = self.restored()
        return max(self._newest(), 0 if found is None else found.first - 1)

    def newest_charged(self) -> int:
        """Return the number of the newest update charged to the privacy account; 0 for none."""
        return self._read("SELECT COALESCE(MAX(sequence), 0) FROM outgoing WHERE epsilon IS NOT NULL")[0]

    # --- the worker's side --------------------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """Return the sequence number of the next update."""
        newest = self.newest_number()
        return newest + 1 if newest else self._first

    def n_made(self) -> int:
        """Return the number of updates stored."""
        return self._read("SELECT COUNT(*) FROM outgoing")[0]

    def begin(self, max_waiting: int) -> Dropped | None:
        """Begin an update, removing the remains of an unfinished one.

        If ``max_waiting`` updates already wait, returns the one that the new update replaces: the oldest whose sending
        has not begun. It is neither sent nor dropped until the new one is stored, or given up with `release`.
        """
        newest = self._newest()
        with self._database.transaction() as connection:
            self._sweep(connection, newest)
            connection.execute("UPDATE outgoing SET claimed = 0 WHERE claimed = 1")
            (n_waiting,) = connection.execute(f"SELECT COUNT(*) FROM outgoing WHERE {_WAITING}").fetchone()  # noqa: S608 - as above
            row = None
            if n_waiting >= max_waiting:
                row = connection.execute(
                    f"UPDATE outgoing SET claimed = 1 WHERE sequence = (SELECT MIN(sequence) FROM outgoing"  # noqa: S608 - as above
                    f" WHERE {_WAITING} AND offered_at IS NULL) RETURNING update_id, steps"
                ).fetchone()
        self._database.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # makes the room of deleted chunks available
        return None if row is None else Dropped(row[0], tuple(msgpack.unpackb(row[1])))

    def check_room(self, n_bytes: int) -> None:
        """Refuse to begin an update of ``n_bytes``, residual included, if the disk has no room for it.

        Raises:
            LocalStorageError: with the number of free bytes.
        """
        with self._database.transaction() as connection:
            self._sweep(connection, self._newest())
        (n_pages,), (page_bytes,) = self._read("PRAGMA freelist_count"), self._read("PRAGMA page_size")
        free = shutil.disk_usage(self._path.parent).free + n_pages * page_bytes
        if free < n_bytes:
            raise LocalStorageError(
                f"{self._path}: {free} bytes are free, an update needs {n_bytes}; nothing was trained. Make room on its disk"
            )

    def residual(self, layout: Layout, dropped: Dropped | None) -> Residual:
        """Return what the next update must make up for."""
        return Residual(self._database, self._newest(), layout, dropped)

    def add_chunk(self, key: ChunkKey, data: bytes, values: NDArray[np.int8], residual: NDArray[np.float32]) -> None:
        """Store one chunk of an update: the bytes to send, the quantised values (int8[n]), the residual (float32[n]).

        Raises:
            LocalStorageError: the disk is full, or would be with this chunk; nothing of it was written.
        """
        quantised = zstandard.compress(values.tobytes(), level=1)
        left = residual.astype("<f4", copy=False).tobytes()
        self._leave_room(len(data) + len(quantised) + len(left))
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO chunk VALUES (?, ?, ?, ?, ?)", (key.update_id, key.position, key.start, data, quantised)
            )
            connection.execute("INSERT INTO residual VALUES (?, ?, ?)", (key.sequence, key.start, left))

    def add_update(
        self, update: Update, steps: tuple[float, ...], dropped: Dropped | None, epsilon: float | None = None
    ) -> None:
        """Store the head of an update on a grid of ``steps``. Its chunks and its residual become valid.

        ``epsilon`` is the privacy budget that any one record has spent with it; None without differential privacy.
        """
        named = (update.sequence, update.update_id, update.base_version)
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO outgoing (sequence, update_id, base_version, head, steps, epsilon) VALUES (?, ?, ?, ?, ?, ?)",
                (*named, wire.pack(update), msgpack.packb(steps), epsilon),
            )
            extend(connection, UPDATES_TABLE, [(update.sequence, update.update_id)])
            if dropped is not None:
                connection.execute(
                    "UPDATE outgoing SET dropped_at = CURRENT_TIMESTAMP WHERE update_id = ?", (dropped.update_id,)
                )
                connection.execute("DELETE FROM chunk WHERE update_id = ?", (dropped.update_id,))

    def begin_run(self, first_version: int) -> int:
        """Drop updates for versions before ``first_version`` whose sending has not begun, and their residual.

        An update whose sending has begun is sent to the end, and its region refuses it. Returns the number of dropped
        updates.
        """
        with self._database.transaction() as connection:
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
        """Return the newest version that was trained on; -1 for none."""
        query = (
            "SELECT MAX(base_version) FROM (SELECT base_version FROM outgoing UNION SELECT base_version FROM restored)"
        )
        ((newest,),) = self._database.rows(query)
        return -1 if newest is None else int(newest)

    def release(self) -> None:
        """Give up the update in the making, so that the one it would have replaced is sent after all."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE outgoing SET claimed = 0 WHERE claimed = 1")

    def pending(self) -> list[Update]:
        """Return the updates that the bus has not fully acknowledged, oldest first."""
        query = f"SELECT head FROM outgoing WHERE {_WAITING} ORDER BY sequence"  # noqa: S608 - a constant
        return [self._unpacked(head) for (head,) in self._database.rows(query)]

    def newest(self, count: int) -> list[Update]:
        """Return the newest ``count`` updates stored, newest first."""
        query = "SELECT head FROM outgoing ORDER BY sequence DESC LIMIT ?"
        return [self._unpacked(head) for (head,) in self._database.rows(query, count)]

    def newest_ledger_head(self) -> str:
        """Return the egress ledger record named by the newest update whose sending has begun; `NO_RECORD` for none."""
        query = "SELECT head FROM outgoing WHERE offered_at IS NOT NULL ORDER BY sequence DESC LIMIT 1"
        return next((self._unpacked(head).ledger_head for (head,) in self._database.rows(query)), NO_RECORD)

    def counts(self) -> dict[str, int]:
        """Return the numbers of updates that wait, were sent and were dropped."""
        waiting, sent, dropped = self._read(
            f"SELECT COUNT(*) FILTER (WHERE {_WAITING}), COUNT(sent_at), COUNT(dropped_at) FROM outgoing"  # noqa: S608 - a constant
        )
        return {"waiting": int(waiting), "sent": int(sent), "dropped": int(dropped)}

    def offer(self, update_id: str, ledger_head: str = NO_RECORD) -> Offered | None:
        """Record that sending begins; return None if the update was dropped or is being replaced.

        ``ledger_head`` is the newest record of the egress ledger. It goes into the head on the first offer and stays
        there, so that a repeated send is identical to the bit.
        """
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT head, sent_chunks, offered_at FROM outgoing"
                " WHERE update_id = ? AND claimed = 0 AND dropped_at IS NULL",
                (update_id,),
            ).fetchone()
            if row is None:
                return None
            update = self._unpacked(row[0])
            if row[2] is None:
                update = update.model_copy(update={"ledger_head": ledger_head})
                connection.execute(
                    "UPDATE outgoing SET offered_at = CURRENT_TIMESTAMP, head = ? WHERE update_id = ?",
                    (wire.pack(update), update_id),
                )
        return Offered(update, int(row[1]))

    def chunks(self, update_id: str, first: int = 0) -> Iterator[bytes]:
        """Yield the chunks of an update in order, starting with number ``first``."""
        query = "SELECT data FROM chunk WHERE update_id = ? AND position = ?"
        position = first  # one query per chunk: no statement stays open while the worker writes
        while rows := self._database.rows(query, update_id, position):
            yield rows[0][0]
            position += 1

    def epsilon(self, update_id: str) -> float | None:
        """Return the privacy budget spent on an update; None without differential privacy."""
        query = "SELECT epsilon FROM outgoing WHERE update_id = ?"
        ((epsilon,),) = self._database.rows(query, update_id)
        return None if epsilon is None else float(epsilon)

    def n_bytes(self, update_id: str, first: int = 0) -> int:
        """Return the size in bytes of an update's chunks, starting with number ``first``."""
        query = "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM chunk WHERE update_id = ? AND position >= ?"
        ((n_bytes,),) = self._database.rows(query, update_id, first)
        return int(n_bytes)

    def note_sent_chunks(self, update_id: str, n_chunks: int) -> None:
        """Record that the bus has stored the first ``n_chunks``."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE outgoing SET sent_chunks = ? WHERE update_id = ?", (n_chunks, update_id))

    def mark_sent(self, update_id: str) -> None:
        """Record that the bus has stored the whole update. The head stays as a record, the chunks are removed."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE outgoing SET sent_at = CURRENT_TIMESTAMP WHERE update_id = ?", (update_id,))
            connection.execute("DELETE FROM chunk WHERE update_id = ?", (update_id,))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # --- internals ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _sweep(connection: sqlite3.Connection, newest: int) -> None:
        """Remove chunks that belong to no waiting update, and all residuals but that of ``newest``."""
        connection.execute(
            f"DELETE FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing WHERE {_WAITING})"  # noqa: S608 - a constant
        )
        connection.execute("DELETE FROM residual WHERE sequence <> ?", (newest,))

    def _refuse_deleted(self) -> None:
        """Refuse an outbox with missing updates: their numbers would be used again, and refused by the region."""
        with self._database.transaction() as connection:  # the other process may be storing an update
            rows = connection.execute("SELECT sequence, update_id FROM outgoing ORDER BY sequence").fetchall()
            wrong = difference(read_chain(connection, UPDATES_TABLE), RowChain().extended(rows))
        if wrong:
            raise ConfigError(
                f"{self._path}: updates were deleted or altered: {wrong}. Restore the outbox from a backup, or move it away:"
                " the numbers of updates then begin anew, and what waits in it is lost"
            )

    def _unpacked(self, head: bytes) -> Update:
        try:
            return wire.unpack(head, Update)
        except RefusedError as error:
            raise ConfigError(
                f"{self._path}: an update in it cannot be read ({error.detail}); start the release that made it until it is"
                " sent, or move the file away: the numbers of updates then begin anew, and what waits in it is lost"
            ) from error

    def _newest(self) -> int:
        (newest,) = self._read("SELECT COALESCE(MAX(sequence), 0) FROM outgoing")
        return int(newest)

    def _read(self, query: str) -> tuple[int, ...]:
        found: tuple[int, ...] = self._database.rows(query)[0]
        return found

    def _leave_room(self, n_bytes: int) -> None:
        """Refuse a chunk that could fill the disk: the log must fit into the file, or it can never be removed."""
        log = self._path.with_name(f"{self._path.name}-wal").stat().st_size
        free = shutil.disk_usage(self._path.parent).free
        if free < log + 2 * n_bytes:
            raise LocalStorageError(
                f"{self._path}: {free} bytes are free, the next chunk of an update needs {log + 2 * n_bytes}; nothing was"
                " written. Make room on its disk"
            )


def outbox_file(state_dir: Path) -> Path:
    """Return the file of a site's outbox."""
    return state_dir / "outbox.sqlite"
