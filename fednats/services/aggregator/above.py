"""Track how far the node above has copied a region's stream."""

import asyncio
from typing import Any

from fednats import subjects
from fednats.errors import BusError
from fednats.services.daemon.retry import ask
from fednats.transport.bus import Bus

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
"""Pause between two looks at the node above; it doubles from the shortest to the longest."""


class Above:
    """The node above a region, which copies the region's stream of sums in order.

    What the link cannot take at once waits in the region: updates gather for a larger sum, evaluations give way to
    those of a newer version.
    """

    def __init__(self, uplink: Bus, run: str, region: str, node: str, stopping: asyncio.Event, log: Any) -> None:
        self._uplink = uplink
        self._stream = subjects.aggregates_stream(run, region)
        self._node = node
        self._inbox = subjects.inbox_stream(run, node, region)
        self._stopping = stopping
        self._log = log

    async def has_newest(self, subject: str, event: str) -> bool:
        """Wait until the newest message on ``subject``, and all before it, have been copied; log ``event`` if not yet.

        Returns:
            False if the daemon is told to stop first.
        """
        pause_s = SHORTEST_PAUSE_S
        while not await self._has(subject):
            if pause_s == SHORTEST_PAUSE_S:
                self._log.info(event, until="the node above has the one before", node=self._node)
            try:
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            except TimeoutError:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return False
        return True

    async def _has(self, subject: str) -> bool:
        sent = await ask(self._log, lambda: self._uplink.last(self._stream, subject))
        if sent is None:
            return True  # nothing was sent, or the server has lost its store
        try:
            copied = await self._uplink.last(self._inbox, subject, domain=self._node)
        except BusError as error:
            self._log.debug("not_seen_above", node=self._node, error=str(error))
            return False
        return copied is not None and copied.data == sent.data
