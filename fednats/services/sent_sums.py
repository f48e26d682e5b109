"""The sums that a region has sent: one is on its way at a time, and the newest few are kept for a node that loses them."""

import asyncio
from collections import deque
from typing import Any

from fednats import subjects
from fednats.errors import BusError
from fednats.services.persist import ask
from fednats.transport.bus import Bus
from fednats.transport.streams import AGGREGATES

KEPT_SUMS = 16
KEPT_BYTES = AGGREGATES.max_bytes // 2
"""Kept, about; the other half of the stream is for the sum that is sent."""

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
"""Between two looks at what the node above has."""


class SentSums:
    """What is in the region's stream of sums, and whether the node above has copied all of it.

    A sum is published only when the one before has been copied. So all but the newest may be dropped, also after a
    crash, and what a slow link cannot take waits in the region's buffer, for a sum of more updates.
    """

    def __init__(self, uplink: Bus, run: str, region: str, above: str, stopping: asyncio.Event, log: Any) -> None:
        self._uplink = uplink
        self._prefix = subjects.aggregate(run, region)
        self._stream = subjects.aggregates_stream(run, region)
        self._above = above
        self._inbox = subjects.inbox_stream(run, above)
        self._stopping = stopping
        self._log = log
        self._kept: deque[tuple[str, int]] = deque()

    def add(self, combination_id: str, n_bytes: int) -> None:
        """Count a sum of about ``n_bytes`` that was published, now or before a restart, after `make_room`."""
        while self._too_much():
            self._kept.popleft()
        self._kept.append((combination_id, n_bytes))

    async def all_taken(self) -> bool:
        """Wait until the node above has all that was published; False if the daemon is told to stop before that."""
        pause_s = SHORTEST_PAUSE_S
        while not await self._is_taken():
            if pause_s == SHORTEST_PAUSE_S:
                self._log.info("sum_waits", until="the node above has the one before", node=self._above)
            try:
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            except TimeoutError:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return False
        return True

    async def make_room(self) -> None:
        """Drop the payloads of old sums; all have been taken."""
        while self._too_much():
            chunks = subjects.chunks(self._prefix, self._kept[0][0])
            await ask(self._log, lambda: self._uplink.purge(self._stream, chunks))  # noqa: B023 - it is awaited here
            self._kept.popleft()

    async def _is_taken(self) -> bool:
        """Whether the newest head has arrived above: a copy keeps the order, so all that was sent before it has, too."""
        head = subjects.head(self._prefix)
        sent = await ask(self._log, lambda: self._uplink.last(self._stream, head))
        if sent is None:
            return True  # nothing was sent, or the server lost it with its store
        try:
            taken = await self._uplink.last(self._inbox, head, domain=self._above)
        except BusError as error:
            self._log.debug("not_seen_above", node=self._above, error=str(error))
            return False
        return taken is not None and taken.data == sent.data

    def _too_much(self) -> bool:
        return len(self._kept) > KEPT_SUMS or sum(n_bytes for _, n_bytes in self._kept) > KEPT_BYTES
