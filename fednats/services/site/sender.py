"""Send a site's updates and evaluations, each recorded in the egress ledger before it leaves."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from fednats import subjects, wire
from fednats.config import SiteSettings
from fednats.errors import BusError, LocalStorageError
from fednats.ledger.records import LedgerEntry
from fednats.messages import Evaluation, Opening, Update
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.off_loop import off_loop, paced
from fednats.services.daemon.recorder import INTERVAL_S, SUMMED_UP, Recorder, entry_of, run_begins
from fednats.services.daemon.retry import RETRY_S
from fednats.storage.outbox import Outbox
from fednats.transport.bus import Bus

NOTED_CHUNKS = 32
"""Chunks between two notes of progress in the outbox, so a restart sends about this many again at most."""


class Sender:
    """Sends for one site. ``max_mbit`` limits the rate of updates, in 1e6 bits per second; None for no limit."""

    def __init__(
        self,
        daemon: Daemon,
        settings: SiteSettings,
        identity: Identity,
        bus: Bus,
        outbox: Outbox,
        recorder: Recorder,
        max_mbit: float | None,
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._identity = identity
        self._bus = bus
        self._outbox = outbox
        self._recorder = recorder
        self._max_mbit = max_mbit
        self._prefix = subjects.update(settings.run, settings.region, settings.site)
        self._evaluation = subjects.evaluation(settings.run, settings.region, settings.site)
        self._to_send = asyncio.Event()
        self._sending = asyncio.Lock()
        self.evaluations: asyncio.Queue[tuple[Evaluation, tuple[bytes, ...]]] = asyncio.Queue()
        """Heads with their chunks. One that cannot be sent is dropped: the next version brings another."""
        self.figures: dict[str, Any] = {"updates": 0, "outbox": {}, "sent_bytes": 0}
        """Shown in ``/status``."""

    async def begin(self) -> None:
        """Record that the daemon has started, and queue updates that wait from before. Raises LocalStorageError."""
        await self._recorder.begin(SUMMED_UP)
        await asyncio.to_thread(self._outbox.release)
        self._to_send.set()

    async def record(self, entry: LedgerEntry) -> None:
        """Write ``entry`` to the egress ledger. Raises LocalStorageError."""
        await self._recorder.record(entry)

    async def begin_run(self, opening: Opening) -> None:
        """Record in the egress ledger that this run begins. Raises LocalStorageError."""
        await self._recorder.record(run_begins(opening))
        await self.look()

    async def look(self) -> None:
        """Check the outbox for updates to send."""
        self.figures["outbox"] = await asyncio.to_thread(self._outbox.counts)
        self._to_send.set()

    async def send_waiting(self) -> None:
        """Send the updates that wait in the outbox, if the bus is connected. Others wait there for the next start."""
        if self._bus.connected:
            try:
                await self._send_pending()
            except (BusError, LocalStorageError) as error:
                self._log.warning("update_not_sent", error=str(error))

    async def record_rest(self) -> None:
        """Record what was sent besides updates and evaluations since the last such record."""
        if not self._sending.locked():  # otherwise this would wait for an update that waits for the bus
            await self._record_rest()

    def close(self) -> None:
        """Close the outbox and the ledger."""
        self._outbox.close()
        self._recorder.close()

    # --- updates -----------------------------------------------------------------------------------------------------

    async def send_updates(self) -> None:
        """Send updates from the outbox, forever."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            try:
                await self._send_pending()
            except (BusError, LocalStorageError) as error:
                self._log.warning("update_not_sent", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
                self._to_send.set()

    async def _send_pending(self) -> None:
        async with self._sending:
            for update in await asyncio.to_thread(self._outbox.pending):
                offered = await asyncio.to_thread(self._outbox.offer, update.update_id, self._recorder.head)
                if offered is not None:
                    await self._send(offered.update, offered.n_chunks)

    async def _send(self, update: Update, first: int) -> None:
        """Send the chunks of an update from index ``first`` on, then its head."""

        async def note(n_chunks: int) -> None:
            if n_chunks % NOTED_CHUNKS == 0:
                await asyncio.to_thread(self._outbox.note_sent_chunks, update.update_id, n_chunks)

        head = self._identity.sign(subjects.head(self._prefix), update)
        if first:
            await self._bus.wait_connected()
            # a bus that has lost its store keeps the chunk offered below: that must not vouch for the chunks before it
            await asyncio.to_thread(self._outbox.note_sent_chunks, update.update_id, 0)
            async with self._recorder.sending(self._bus, await self._entry(update, first - 1)):
                if await self._has(update.update_id, first - 1):
                    await asyncio.to_thread(self._outbox.note_sent_chunks, update.update_id, first)
                    await self._publish(update, first, head, note)
                else:
                    first = 0  # the bus has lost its store or forgotten the message ids: send everything again
        if not first:
            async with self._recorder.sending(self._bus, await self._entry(update, 0)):
                await self._publish(update, 0, head, note)
        await asyncio.to_thread(self._outbox.mark_sent, update.update_id)
        n_bytes = update.payload.n_bytes + len(head)
        self._daemon.metrics.sent_bytes.inc(n_bytes)
        self.figures["sent_bytes"] += n_bytes
        self.figures["updates"] += 1
        self.figures["outbox"] = await asyncio.to_thread(self._outbox.counts)
        self._log.info("update_sent", update_id=update.update_id, bytes=n_bytes)

    async def _publish(self, update: Update, first: int, head: bytes, note: Callable[[int], Awaitable[None]]) -> None:
        chunks = paced(off_loop(self._outbox.chunks(update.update_id, first)), self._max_mbit)
        await self._bus.publish_payload(self._prefix, update.update_id, chunks, first=first, stored=note)
        await self._bus.publish(subjects.head(self._prefix), head, wire.message_id(head))

    async def _entry(self, update: Update, first: int) -> LedgerEntry:
        """Return the ledger entry for an attempt to send an update from chunk ``first`` on."""
        n_bytes = await asyncio.to_thread(self._outbox.n_bytes, update.update_id, first)
        left = update.payload.model_copy(update={"n_bytes": n_bytes, "digests": update.payload.digests[first:]})
        epsilon = await asyncio.to_thread(self._outbox.epsilon, update.update_id)
        entry = entry_of(
            "update", update, version=update.base_version, name=update.update_id, payload=left, epsilon=epsilon
        )
        return replace(entry, detail=f"from chunk {first} on") if first else entry

    async def _has(self, update_id: str, index: int) -> bool:
        chunk = await asyncio.to_thread(next, self._outbox.chunks(update_id, index))
        return await self._bus.has_chunk(self._prefix, update_id, index, chunk)

    async def send_evaluations(self) -> None:
        """Send each evaluation's counts, then the head that names them, forever."""
        while True:
            head, chunks = await self.evaluations.get()
            entry = entry_of("evaluation", head, version=head.version, payload=head.payload)
            signed = self._identity.sign(self._evaluation, head)
            try:
                async with self._recorder.sending(self._bus, entry):
                    await self._bus.publish_payload(self._prefix, head.payload.payload_id, chunks)
                    await self._bus.publish(self._evaluation, signed, wire.message_id(signed))
            except (BusError, LocalStorageError) as error:
                self._log.warning("evaluation_not_sent", version=head.version, error=str(error))
            else:
                self._daemon.metrics.sent_bytes.inc(entry.n_bytes)
                self.figures["sent_bytes"] += entry.n_bytes

    # --- on record ----------------------------------------------------------------------------------------------------

    async def sum_up(self) -> None:
        """Record every `INTERVAL_S` what was sent besides updates and evaluations, forever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._record_rest()

    async def _record_rest(self) -> None:
        """Record the rest, but never while an update is being sent."""
        async with self._sending:
            try:
                await self._recorder.sum_up(self._bus)
            except LocalStorageError as error:
                self._log.warning("rest_not_recorded", error=str(error))
