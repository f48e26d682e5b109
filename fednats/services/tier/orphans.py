"""Drop chunks that no head will name: their site was killed, restored or told to begin another run while sending.

The stream would keep them for a week. Meanwhile they would use up the site's quota and keep its later updates out. A
present site does not pause while sending. So the chunks are dropped once all heads of the site are settled and, for
longer than the server remembers message ids, the site was present and stored nothing. If the site resumes later, its
message ids are forgotten, and it sends the whole update again.
"""

from typing import Any

from fednats.transport.bus import Bus
from fednats.transport.streams import UPDATES

ORPHANED_AFTER_S = UPDATES.duplicate_window_s + 300.0


class Orphans:
    """Drops the orphaned chunks of one region's sites."""

    def __init__(self, bus: Bus, log: Any) -> None:
        self._bus = bus
        self._log = log
        self._quiet: dict[str, tuple[int, float]] = {}
        """By site: the newest sequence number of its stream, and when that number was first seen."""
        self._dropped: dict[str, int] = {}
        """By site: the newest sequence number when its chunks were last dropped."""

    async def look(self, site: str, stream: str, chunks: str, newest: int, now: float, *, is_there: bool) -> None:
        """Drop the orphans of ``site`` in ``stream``, under the filter ``chunks``, if they are due.

        Call it every few seconds. ``newest`` is the stream's newest sequence number, ``now`` a monotonic time in
        seconds. Raises BusError.
        """
        at, since = self._quiet.get(site, (-1, now))
        if at != newest or not is_there or self._bus.n_unsettled(stream) != 0:
            self._quiet[site] = (newest, now)
        elif now - since >= ORPHANED_AFTER_S and self._dropped.get(site) != newest:
            n_chunks = await self._bus.purge(stream, chunks, up_to=newest)
            self._dropped[site] = newest
            if n_chunks:
                self._log.warning("orphan_chunks_dropped", sender=site, n_chunks=n_chunks)
