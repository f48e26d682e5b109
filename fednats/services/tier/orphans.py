"""Chunks that no head will name: their site was killed, restored or told to begin another run while it was sending.

They would fill the site's own quota for as long as its stream keeps them, a week, and keep its later updates out. A site
that is there sends without a pause what it has begun to send. So the chunks are dropped when all heads of the site are settled
and it has been there, and has stored nothing, for longer than the server remembers message ids. A site that goes on after
all finds its ids forgotten, and sends the whole update again.
"""

from typing import Any

from fednats.transport.bus import Bus
from fednats.transport.streams import UPDATES

ORPHANED_AFTER_S = UPDATES.duplicate_window_s + 300.0


class Orphans:
    """Drops those of the sites of one region."""

    def __init__(self, bus: Bus, log: Any) -> None:
        self._bus = bus
        self._log = log
        self._quiet: dict[str, tuple[int, float]] = {}
        """By site: the newest sequence number of its stream, and since when it is that one."""
        self._dropped: dict[str, int] = {}
        """By site: the newest sequence number when its chunks were dropped."""

    async def look(self, site: str, stream: str, chunks: str, newest: int, now: float, *, is_there: bool) -> None:
        """Drop what ``site`` has left in ``stream`` under the filter ``chunks``, if it is time to; call it every few seconds.

        ``newest`` is the stream's newest sequence number, ``now`` is of a clock that does not jump. Raises BusError.
        """
        at, since = self._quiet.get(site, (-1, now))
        if at != newest or not is_there or self._bus.n_unsettled(stream) != 0:
            self._quiet[site] = (newest, now)
        elif now - since >= ORPHANED_AFTER_S and self._dropped.get(site) != newest:
            n_chunks = await self._bus.purge(stream, chunks, up_to=newest)
            self._dropped[site] = newest
            if n_chunks:
                self._log.warning("orphan_chunks_dropped", sender=site, n_chunks=n_chunks)
