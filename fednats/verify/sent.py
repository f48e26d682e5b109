"""Reads what a site has sent from its outbox."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from fednats import wire
from fednats.errors import ConfigError, RefusedError
from fednats.messages import Update
from fednats.storage.database import open_read_only


@dataclass(frozen=True, slots=True)
class SentUpdate:
    """One update that a site made."""

    update_id: str
    sequence: int
    head: Update | None
    """None if this release cannot read it."""
    is_sent: bool
    """Whether the bus has acknowledged all of it."""
    is_dropped: bool
    """Whether a full outbox dropped it unsent; its content went back into the site's residual."""
    is_given_up: bool = False
    """Whether it waited in an outbox restored from a backup; it may have been sent since the backup."""
    problem: str = ""
    """Why it cannot be read."""


def read_outbox(file: Path) -> list[SentUpdate] | None:
    """Return the updates in a site's outbox, in order; None if there is no outbox. The site may be running.

    Raises:
        ConfigError: the outbox cannot be read.
    """
    if not file.exists():
        return None
    connection = open_read_only(file)
    connection.row_factory = sqlite3.Row
    try:
        (own,) = connection.execute("SELECT COALESCE(MAX(own), 0) FROM restored").fetchone()
        rows = connection.execute("SELECT * FROM outgoing ORDER BY sequence").fetchall()
        return [_sent(row, own) for row in rows]
    except sqlite3.Error as error:
        raise ConfigError(f"{file}: cannot be read as an outbox ({error}); restore it") from error
    finally:
        connection.close()


def read_gaps(file: Path) -> list[range]:
    """Return the update numbers that a restored outbox skipped. Raises as `read_outbox`."""
    connection = open_read_only(file)
    try:
        rows = connection.execute("SELECT own, first FROM restored ORDER BY first").fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"{file}: cannot be read as an outbox ({error}); restore it") from error
    finally:
        connection.close()
    return [range(own + 1, first) for own, first in rows]


def _sent(row: sqlite3.Row, own: int) -> SentUpdate:
    head, problem = None, ""
    try:
        head = wire.unpack(row["head"], Update)
    except RefusedError as error:
        problem = error.detail
    return SentUpdate(
        update_id=row["update_id"],
        sequence=row["sequence"],
        head=head,
        is_sent=row["sent_at"] is not None,
        is_dropped=row["dropped_at"] is not None,
        is_given_up=row["sent_at"] is None and row["dropped_at"] is None and row["sequence"] <= own,
        problem=problem,
    )
