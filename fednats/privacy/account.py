"""The privacy account of a hospital's data, over all runs and restarts, in one SQLite file.

A charge is durable before the pass it pays for begins and is never refunded. So if a site is killed in between, the
account shows too much, never too little. Two runs at one hospital may share the file.

A charge names the number of the update it pays for. If the account has not paid for a site's newest number, it is older
than what the site has sent: it was restored from a backup and has forgotten what was spent since.
"""

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

from fednats.errors import BudgetSpentError, ConfigError
from fednats.privacy import rdp
from fednats.privacy.policy import Budget
from fednats.storage.database import open_database, storage_error
from fednats.storage.row_chain import CHAIN_SCHEMA, RowChain, difference, extend, read_chain

Level = Literal["record", "site"]
"""Whose presence the noise hides: one record of the hospital, or the whole hospital."""

CHARGES_TABLE = "charge"

_SCHEMA = f"""
{CHAIN_SCHEMA}
CREATE TABLE IF NOT EXISTS charge (number INTEGER PRIMARY KEY, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    federation TEXT NOT NULL, version INTEGER NOT NULL, level TEXT NOT NULL, mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, parameter REAL NOT NULL, n_steps INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS unfinished (federation TEXT NOT NULL, site TEXT NOT NULL, n_updates INTEGER NOT NULL,
    n_passes INTEGER NOT NULL, PRIMARY KEY (federation, site)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS paid (federation TEXT NOT NULL, site TEXT NOT NULL, sequence INTEGER NOT NULL,
    version INTEGER NOT NULL, n_unseen INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (federation, site)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS charge_level ON charge (level, mechanism, noise_multiplier, parameter, n_steps);
"""


_CHARGED = "federation, version, level, mechanism, noise_multiplier, parameter, n_steps"


@dataclass(frozen=True)
class Charge:
    """``n_steps`` releases of one mechanism."""

    level: Level
    mechanism: Literal["gaussian", "skellam"]
    noise_multiplier: float
    parameter: float
    """The sample rate for `rdp.sampled_gaussian`, the smallest variance for `rdp.skellam`."""
    n_steps: int = 1

    def cost(self) -> rdp.Rdp:
        """Return the cost of all its steps."""
        of_one = rdp.sampled_gaussian if self.mechanism == "gaussian" else rdp.skellam
        return self.n_steps * of_one(self.noise_multiplier, self.parameter)


@dataclass(frozen=True)
class Place:
    """Where a site stands in a federation: it has stored ``n_updates``, and its charges pay for update ``sequence``."""

    federation: str
    site: str
    n_updates: int
    sequence: int = 0


@dataclass(frozen=True)
class Paid:
    """How far a site has paid in a federation."""

    sequence: int
    """Newest update that was paid for."""
    version: int
    """Model version of the newest charge."""
    n_unseen: int = 0
    """Updates charged later, at the most they can have cost, because the account that knew of them was lost."""


class PrivacyAccount:
    """All charges on one hospital's data."""

    def __init__(self, path: Path) -> None:
        """Open or begin the account at ``path``.

        Raises:
            ConfigError: it cannot be opened, an earlier release made it, or charges were deleted or altered, which
                would understate what was spent.
            LocalStorageError: it cannot be read.
        """
        self._path = path
        self._connection = open_database(path, _SCHEMA)
        self._refuse_older()
        self._refuse_deleted()

    def charge(
        self,
        federation: str,
        version: int,
        charges: Sequence[Charge],
        budget: Budget | None,
        at: Place | None = None,
        n_unseen: int = 0,
    ) -> None:
        """Book ``charges`` for a pass on ``version`` of a run of ``federation``; durable on return.

        They pay for the update in ``at``; ``n_unseen`` is added to that of `Paid`.

        Raises:
            BudgetSpentError: the records' epsilon would exceed ``budget``; nothing was booked.
            LocalStorageError: the disk is full or broken; nothing was booked, so nothing may be released.
        """
        with self._transaction():
            self._book(federation, version, charges, budget)
            if at is not None:
                self._note_paid(at, version, n_unseen)

    def charge_pass(self, at: "Place", version: int, charge: Charge, budget: Budget | None) -> None:
        """Book a pass that begins now, as `charge` does; it is unfinished until the site has stored another update."""
        with self._transaction() as connection:
            self._book(at.federation, version, [charge], budget)
            self._note_paid(at, version)
            connection.execute(
                "INSERT INTO unfinished VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET n_updates = excluded.n_updates,"
                " n_passes = CASE WHEN n_updates = excluded.n_updates THEN n_passes + 1 ELSE 1 END",
                (at.federation, at.site, at.n_updates),
            )

    def n_unfinished(self, at: "Place") -> int:
        """Return how many passes were charged since the site stored its newest update, number ``at.n_updates``."""
        query = "SELECT n_passes FROM unfinished WHERE federation = ? AND site = ? AND n_updates = ?"
        with self._reading():
            row = self._connection.execute(query, (at.federation, at.site, at.n_updates)).fetchone()
        return 0 if row is None else int(row[0])

    def paid(self, federation: str, site: str) -> Paid | None:
        """Return how far ``site`` has paid in ``federation``; None if it has paid nothing there."""
        with self._reading():
            query = "SELECT sequence, version, n_unseen FROM paid WHERE federation = ? AND site = ?"
            row = self._connection.execute(query, (federation, site)).fetchone()
        return None if row is None else Paid(*row)

    def costliest(self, federation: str, since_version: int, like: Charge) -> Charge:
        """Return ``like`` with the least noise and the highest sample rate among similar charges in ``federation``.

        The charges for passes on ``since_version`` or later count, and ``like`` itself.
        """
        query = (
            "SELECT MIN(noise_multiplier), MAX(parameter) FROM charge"
            " WHERE federation = ? AND version >= ? AND level = ? AND mechanism = ?"
        )
        with self._reading():
            row = self._connection.execute(query, (federation, since_version, like.level, like.mechanism)).fetchone()
        noise, rate = row if row[0] is not None else (like.noise_multiplier, 0.0)
        costlier = replace(like, noise_multiplier=min(like.noise_multiplier, noise))
        return costlier if like.mechanism == "skellam" else replace(costlier, parameter=max(like.parameter, rate))

    def check(self, charges: Sequence[Charge], budget: Budget | None) -> None:
        """Raise BudgetSpentError if booking ``charges`` now would exceed ``budget``."""
        with self._reading():
            self._check(charges, budget)

    def epsilon(self, level: Level, delta: float) -> float:
        """Return the epsilon spent so far; 0 for nothing, infinite if a release had no noise."""
        with self._reading():
            return rdp.epsilon(self._cost(level), delta)

    def n_charges(self, level: Level) -> int:
        """Return the number of charges at ``level``."""
        with self._reading():
            (found,) = self._connection.execute("SELECT COUNT(*) FROM charge WHERE level = ?", (level,)).fetchone()
        return int(found)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _refuse_older(self) -> None:
        with self._reading():
            columns = {row[1] for row in self._connection.execute("PRAGMA table_info(charge)")}
        if "run" in columns:
            renamed = " ".join(
                f"ALTER TABLE {table} RENAME COLUMN run TO federation;" for table in ("charge", "unfinished")
            )
            raise ConfigError(
                f"{self._path}: an earlier release made this privacy account, whose column run holds the federation's name. Keep"
                f" it, with a copy beside it, and rename the column: sqlite3 {self._path} '{renamed}'"
            )

    def _refuse_deleted(self) -> None:
        query = f"SELECT {_CHARGED} FROM charge ORDER BY number"  # noqa: S608 - a constant
        with self._transaction() as connection:  # other runs may be charging at the same time
            found = RowChain().extended(connection.execute(query).fetchall())
            wrong = difference(read_chain(connection, CHARGES_TABLE), found)
        if wrong:
            raise ConfigError(
                f"{self._path}: charges were deleted or altered: {wrong}. Restore the privacy account from a backup; with a"
                " new one, what was spent before would not count"
            )

    def _book(self, federation: str, version: int, charges: Sequence[Charge], budget: Budget | None) -> None:
        self._check(charges, budget)
        rows = [(federation, version, *astuple(one)) for one in charges]
        insert = f"INSERT INTO charge ({_CHARGED}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - a constant
        self._connection.executemany(insert, rows)
        extend(self._connection, CHARGES_TABLE, rows)

    def _note_paid(self, at: Place, version: int, n_unseen: int = 0) -> None:
        self._connection.execute(
            "INSERT INTO paid VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET version = excluded.version,"
            " sequence = MAX(sequence, excluded.sequence), n_unseen = n_unseen + excluded.n_unseen",
            (at.federation, at.site, at.sequence, version, n_unseen),
        )

    def _check(self, charges: Sequence[Charge], budget: Budget | None) -> None:
        if budget is None:
            return
        cost = self._cost("record")
        before = rdp.epsilon(cost, budget.delta)
        after = rdp.epsilon(sum((one.cost() for one in charges if one.level == "record"), start=cost), budget.delta)
        if after > budget.max_epsilon:
            costs = "has no bound" if math.isinf(after) else f"would make it {after:.3f}"
            raise BudgetSpentError(
                f"epsilon is {before:.3f} of {budget.max_epsilon:g} at delta {budget.delta:g}, and the next pass {costs};"
                " this site trains no more, unless budget.max_epsilon is raised or the run takes more noise"
            )

    def _cost(self, level: Level) -> rdp.Rdp:
        rows = self._connection.execute(
            "SELECT level, mechanism, noise_multiplier, parameter, SUM(n_steps) FROM charge WHERE level = ?"
            " GROUP BY mechanism, noise_multiplier, parameter",
            (level,),
        ).fetchall()
        return sum((Charge(*row).cost() for row in rows), start=rdp.nothing())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Read and write all or nothing, with no other process in between; durable at the end."""
        with self._reading():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            remedy = (
                "the privacy account cannot be used: make room on its disk or restore it. Without it nothing is trained"
            )
            raise storage_error(self._path, error, remedy) from error
