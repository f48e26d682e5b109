"""Take in the messages of a node's senders: each has its own stream, its own consumer and its own pace.

So a sender that floods fills only its own stream, waits for its own settlements and spends its own allowance. The
excess waits in its stream; when that is full, the server refuses what it publishes. Other senders are not held up.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fednats import subjects
from fednats.errors import BusError
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.retry import RETRY_S
from fednats.services.tier.inbox import Inbox
from fednats.services.tier.orphans import Orphans
from fednats.services.tier.pace import OF_REGION, OF_SITE, Pace
from fednats.transport import streams
from fednats.transport.bus import Delivery
from fednats.transport.consumer import MAX_UNSETTLED
from fednats.transport.streams import StreamSpec

POLL_S = 0.25
"""Pause between two checks whether a sender may go on."""

WEIGHED_EVERY_S = 5.0
"""Interval between two looks at how full the senders' streams are."""

NEARLY_FULL = 0.9


@dataclass(frozen=True)
class Senders:
    """What one kind of sender to a node, sites or regions, has in common."""

    per_version: int
    """Messages that each version earns a sender, see `Pace`."""
    stream_of: Callable[[str], StreamSpec]
    """Returns the stream of a sender."""
    heads_of: Callable[[str], list[str]]
    """Returns the subjects to take in from that stream."""
    chunks_of: Callable[[str], str] | None = None
    """Returns the subject filter of a sender's chunks, to drop orphans (`Orphans`). None to drop none, where the stream
    is a copy that may continue later.
    """


def of_sites(run: str, region: str) -> Senders:
    """Describe the sites of a region."""
    return Senders(
        OF_SITE,
        lambda site: streams.updates(run, region, site),
        lambda site: [subjects.head(subjects.update(run, region, site)), subjects.evaluation(run, region, site)],
        lambda site: subjects.all_chunks(subjects.update(run, region, site)),
    )


def of_regions(run: str, node: str, *, leaves: bool) -> Senders:
    """Describe the regions directly below a node."""
    return Senders(
        OF_REGION,
        lambda region: streams.inbox(run, node, region, leaves=leaves),
        lambda region: [subjects.head(subjects.aggregate(run, region)), subjects.evaluation_sum(run, region)],
    )


class Intake:
    """Receives from all senders to one inbox. ``take`` gets each delivery; ``version`` returns the current version."""

    def __init__(
        self,
        daemon: Daemon,
        inbox: Inbox,
        node: str,
        senders: Senders,
        take: Callable[[Inbox, Delivery], None],
        version: Callable[[], int],
    ) -> None:
        self._daemon = daemon
        self._log: Any = daemon.log
        self._inbox = inbox
        self._node = node
        self._senders = senders
        self._take = take
        self._version = version
        self._names: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._paces: dict[str, Pace] = {}
        self._held_back: set[str] = set()
        self._crowded: set[str] = set()
        self._full: dict[str, float] = {}
        self._orphans = Orphans(inbox.bus, daemon.log)

    def expect(self, names: Collection[str]) -> None:
        """Expect ``names`` from now on. Earlier senders are still received; the machine refuses what they send."""
        self._names = frozenset(names)
        self._changed.set()

    async def run(self) -> None:
        """Receive from all expected senders, forever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._weigh(), name="weigh streams")
            while True:
                self._changed.clear()
                for name in sorted(self._names - self._paces.keys()):
                    self._paces[name] = Pace(self._senders.per_version)
                    group.create_task(self._receive(name), name=f"receive from {name}")
                await self._changed.wait()

    @property
    def status(self) -> Mapping[str, Any]:
        """Senders held back for sending too much, unsettled messages of each, and streams that are nearly full."""
        unsettled = {name: self._inbox.n_unsettled(name) for name in sorted(self._paces)}
        held_back = [
            name
            for name, count in unsettled.items()
            if count >= MAX_UNSETTLED or (name in self._held_back and self._paces[name].is_low)
        ]
        return {"held_back": held_back, "unsettled": unsettled, "streams_nearly_full": dict(self._full)}

    async def _receive(self, name: str) -> None:
        await self._make_stream(name)
        stream = self._senders.stream_of(name).name
        consuming = self._inbox.bus.consume(stream, subjects.durable(self._node, stream), self._senders.heads_of(name))
        async with aclosing(consuming) as deliveries:
            async for delivery in deliveries:
                await self._keep_pace(name, len(delivery.data))
                self._take(self._inbox, delivery)
                await asyncio.sleep(0)  # checking a signature takes time: let other tasks run

    async def _make_stream(self, name: str) -> None:
        """Make the stream of a sender, retrying until the server permits it: it may not know a new sender yet."""
        while True:
            try:
                await self._inbox.bus.ensure_stream(self._senders.stream_of(name))
            except BusError as error:
                self._log.warning("stream_not_made", sender=name, error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _keep_pace(self, name: str, n_bytes: int) -> None:
        pace = self._paces[name]
        if pace.allows(n_bytes, self._version()):
            if name in self._held_back and not pace.is_low:
                self._held_back.discard(name)
                self._log.info("sender_goes_on", sender=name)
            return
        self._daemon.metrics.held_back.labels(source=name).inc()
        if name not in self._held_back:
            self._held_back.add(name)
            remedy = "it sends more than one update and one evaluation of a version: ask who runs it"
            self._log.warning("sender_held_back", sender=name, remedy=remedy)
        while not pace.allows(n_bytes, self._version()):  # noqa: ASYNC110 - time passes, and versions come, without an event
            await asyncio.sleep(POLL_S)

    async def _weigh(self) -> None:
        """Watch how full the streams are, forever. What a full stream refuses waits at its sender."""
        while True:
            for name in sorted(self._paces):
                try:
                    await self._look(name, self._senders.stream_of(name).name)
                except BusError as error:
                    self._log.debug("stream_not_seen", sender=name, error=str(error))
                    continue
                self._note_crowded(name)
            await asyncio.sleep(WEIGHED_EVERY_S)

    async def _look(self, name: str, stream: str) -> None:
        usage = await self._inbox.bus.usage(stream)
        self._note_used(name, usage.share)
        if self._senders.chunks_of is not None:
            said = self._daemon.sources.get("site", {})
            is_there = name in (*said.get("present", ()), *said.get("waiting", ()))
            chunks, now = self._senders.chunks_of(name), asyncio.get_running_loop().time()
            await self._orphans.look(name, stream, chunks, usage.newest, now, is_there=is_there)

    def _note_crowded(self, name: str) -> None:
        """Warn once when a sender has `MAX_UNSETTLED` messages unsettled: it floods, or nothing is made of them."""
        if self._inbox.n_unsettled(name) < MAX_UNSETTLED:
            self._crowded.discard(name)
        elif name not in self._crowded:
            self._crowded.add(name)
            self._log.warning("sender_has_all_places", sender=name, unsettled=MAX_UNSETTLED)

    def _note_used(self, name: str, used: float) -> None:
        self._daemon.metrics.stream_used.labels(source=name).set(used)
        if used < NEARLY_FULL:
            self._full.pop(name, None)
            return
        if name not in self._full:
            remedy = "what it has sent is not settled, or it has sent chunks that no head names: ask who runs it"
            self._log.warning("stream_nearly_full", sender=name, used=round(used, 3), remedy=remedy)
        self._full[name] = round(used, 3)
