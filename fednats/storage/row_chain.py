"""Detects missing or altered rows: a table's row count and a hash over all its rows, kept in the same file.

A daemon that starts on a table with deleted, altered or partly restored rows would decide on half of the facts. Each
new row extends the hash (BLAKE2b-128 of the hash so far and the row), so the chain costs one more row per transaction.
It detects accidents, not attacks: anyone who can write the file can recompute the hash.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack

CHAIN_BYTES = 16

CHAIN_SCHEMA = """
CREATE TABLE IF NOT EXISTS row_chain (name TEXT PRIMARY KEY, n_rows INTEGER NOT NULL, chain BLOB NOT NULL);
"""

_START = bytes(CHAIN_BYTES)


@dataclass
class RowChain:
    """The count and the hash of the rows of one table."""

    n_rows: int = 0
    chain: bytes = _START

    def extended(self, rows: Iterable[tuple[Any, ...]]) -> "RowChain":
        """Return the chain with ``rows`` appended."""
        n_rows, chain = self.n_rows, self.chain
        for row in rows:
            n_rows += 1
            chain = hashlib.blake2b(chain + msgpack.packb(row, use_bin_type=True), digest_size=CHAIN_BYTES).digest()
        return RowChain(n_rows, chain)


def read_chain(connection: sqlite3.Connection, name: str) -> RowChain | None:
    """Return the chain of table ``name``; None if it has none."""
    row = connection.execute("SELECT n_rows, chain FROM row_chain WHERE name = ?", (name,)).fetchone()
    return None if row is None else RowChain(int(row[0]), bytes(row[1]))


def extend(connection: sqlite3.Connection, name: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Append ``rows`` to the chain of table ``name``; call this in the transaction that writes them."""
    now = (read_chain(connection, name) or RowChain()).extended(rows)
    connection.execute("INSERT OR REPLACE INTO row_chain VALUES (?, ?, ?)", (name, now.n_rows, now.chain))


def difference(kept: RowChain | None, found: RowChain) -> str | None:
    """Return what is wrong with the rows ``found``; None if they match the chain that was ``kept``."""
    if (kept or RowChain()) == found:
        return None
    if kept is None:
        return f"it has {found.n_rows} rows and no count of them"
    if kept.n_rows != found.n_rows:
        return f"{kept.n_rows} rows were written, {found.n_rows} are there"
    return f"of its {found.n_rows} rows at least one was altered"
