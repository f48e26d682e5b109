"""Record what a daemon accepts and publishes in its ledger, before anything leaves."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fednats import wire
from fednats.crypto.signing import SIGNATURE_BYTES
from fednats.ledger.records import EgressLedger, LedgerEntry
from fednats.messages import Aggregate, Message, Opening, Payload, Update
from fednats.permissions import user_name
from fednats.protocol import admission
from fednats.protocol.events import contribution_id
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.transport.bus import Bus

INTERVAL_S = 60.0
"""Interval between records of traffic that is only summed up."""

SUMMED_UP = f"presence, status answers, notices, requests to the bus and acknowledgements are summed up as 'other' every {INTERVAL_S:.0f} s"


class Traffic(NamedTuple):
    """An amount of traffic sent."""

    n_messages: int
    n_bytes: int
    """Bytes of payload."""

    def less(self, other: "Traffic") -> "Traffic":
        """Return the difference to ``other``."""
        return Traffic(self.n_messages - other.n_messages, self.n_bytes - other.n_bytes)

    def more(self, other: "Traffic") -> "Traffic":
        """Return the sum with ``other``."""
        return Traffic(self.n_messages + other.n_messages, self.n_bytes + other.n_bytes)


class Recorder:
    """Records what one daemon accepts and publishes. A record is on disk when the call returns."""

    def __init__(self, daemon: Daemon, identity: Identity, path: Path) -> None:
        """Open the ledger at ``path``. Raises as `EgressLedger`."""
        self._daemon = daemon
        self._ledger = EgressLedger(path, identity.signer, identity.name, daemon.run)
        self._covered = Traffic(0, 0)
        self._summed = Traffic(0, 0)

    @property
    def head(self) -> str:
        """Hash of the newest record."""
        return self._ledger.head

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    async def begin(self, detail: str = "") -> None:
        """Record that the daemon has started, and whether a half-written record was removed. Raises as `record`."""
        removed = self._ledger.removed_bytes
        cut = (
            f"a record that was cut short after {removed} bytes was removed, nothing had left for it" if removed else ""
        )
        await self.record(LedgerEntry("started", detail="; ".join(filter(None, (detail, cut)))))

    async def record(self, *entries: LedgerEntry) -> None:
        """Write ``entries``. Raises LocalStorageError: they are not on disk, so what they record must not be sent."""
        await asyncio.to_thread(self._ledger.append, *entries)
        self._daemon.metrics.ledger_records.set(self._ledger.n_records)
        self._daemon.metrics.ledger_bytes.set(self._ledger.n_bytes)

    @asynccontextmanager
    async def sending(self, bus: Bus, entry: LedgerEntry) -> AsyncIterator[None]:
        """Record ``entry``; in the context, count traffic up to its amount as recorded. Raises as `record`."""
        await self.record(entry)
        before = Traffic(*bus.sent)
        try:
            yield
        finally:
            sent = Traffic(*bus.sent).less(before)
            self._covered = self._covered.more(
                Traffic(min(sent.n_messages, entry.n_messages), min(sent.n_bytes, entry.n_bytes))
            )

    async def sum_up(self, bus: Bus) -> None:
        """Record the traffic on ``bus`` since the last call that has no record of its own. Never call while `sending`.

        It is the connection's total minus everything recorded individually. Raises as `record`.
        """
        rest = Traffic(*bus.sent).less(self._covered).less(self._summed)
        if rest.n_messages > 0 or rest.n_bytes > 0:
            rest = Traffic(max(0, rest.n_messages), max(0, rest.n_bytes))
            await self.record(LedgerEntry("other", n_messages=rest.n_messages, n_bytes=rest.n_bytes, detail=SUMMED_UP))
            self._summed = self._summed.more(rest)


def entry_of(
    what: str,
    message: Message,
    *,
    version: int,
    name: str = "",
    payload: Payload | None = None,
    epsilon: float | None = None,
    detail: str = "",
) -> LedgerEntry:
    """Return the entry for a signed message and, if it is a head, for its ``payload``."""
    packed = wire.pack(message)
    return LedgerEntry(
        what,
        version=version,
        name=name,
        n_messages=1 + (len(payload.digests) if payload else 0),
        n_bytes=len(packed) + SIGNATURE_BYTES + (payload.n_bytes if payload else 0),
        digest=hashlib.sha256(packed).hexdigest(),
        epsilon=epsilon,
        detail=detail,
    )


def run_begins(opening: Opening) -> LedgerEntry:
    """Return the entry that marks the first version of a run. Nothing is sent with it."""
    return LedgerEntry("run", version=opening.first_version, name=opening.name)


def accepted(head: Update | Aggregate) -> LedgerEntry:
    """Return the entry for a contribution that goes into a sum or a version."""
    sender = user_name("site" if isinstance(head, Update) else "aggregator", admission.source(head))
    entry = entry_of(
        "accepted",
        head,
        version=admission.version(head),
        name=contribution_id(head),
        payload=head.payload,
        detail=f"from {sender}",
    )
    return replace(entry, anchors=head.ledger_head) if isinstance(head, Update) else entry
