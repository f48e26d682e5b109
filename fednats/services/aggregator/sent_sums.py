"""The sums that a region has sent: one in transit at a time, the newest few kept for a node that loses them."""

from collections import deque
from typing import Any

from fednats import subjects
from fednats.services.aggregator.above import Above
from fednats.services.daemon.retry import ask
from fednats.transport.bus import Bus
from fednats.transport.streams import AGGREGATES

KEPT_SUMS = 16
KEPT_BYTES = AGGREGATES.max_bytes // 2
"""Approximate limit on the kept sums. The other half of the stream is for the sum being sent."""


class SentSums:
    """Tracks which sums are in the region's stream, and whether the node above has copied them.

    A sum is published only when the one before has been copied. So all but the newest may be dropped, even after a
    crash. On a slow link, updates wait in the region's buffer and go into a larger sum.
    """

    def __init__(self, uplink: Bus, run: str, region: str, above: Above, log: Any) -> None:
        self._uplink = uplink
        self._prefix = subjects.aggregate(run, region)
        self._stream = subjects.aggregates_stream(run, region)
        self._above = above
        self._log = log
        self._kept: deque[tuple[str, int]] = deque()

    def add(self, combination_id: str, n_bytes: int) -> None:
        """Count a published sum of about ``n_bytes``, live or in a replay. Call after `make_room`."""
        while self._too_much():
            self._kept.popleft()
        self._kept.append((combination_id, n_bytes))

    async def all_taken(self) -> bool:
        """Wait until the node above has copied everything; return False if the daemon is told to stop first."""
        return await self._above.has_newest(subjects.head(self._prefix), "sum_waits")

    async def make_room(self) -> None:
        """Drop the payloads of old sums. Call only after `all_taken`."""
        while self._too_much():
            chunks = subjects.chunks(self._prefix, self._kept[0][0])
            await ask(self._log, lambda: self._uplink.purge(self._stream, chunks))  # noqa: B023 - it is awaited here
            self._kept.popleft()

    def _too_much(self) -> bool:
        return len(self._kept) > KEPT_SUMS or sum(n_bytes for _, n_bytes in self._kept) > KEPT_BYTES
