"""Warn before the servers' certificates expire, because nobody can connect from then on."""

import asyncio
import math
import time
from collections.abc import Sequence

from fednats.config import BusSettings
from fednats.errors import BusError
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.notices import What
from fednats.transport.tls import certificates_end_at

WARNED_DAYS = (30, 7, 1)
"""Days before the end: one warning at each, and one more after the end."""
LOOK_S = 3600.0
DAY_S = 86400.0


def stage(left_s: float) -> int | None:
    """Return the smallest of `WARNED_DAYS` not below ``left_s`` seconds; 0 after the end, None while there is time.

    >>> stage(31 * DAY_S), stage(29 * DAY_S), stage(6 * DAY_S), stage(60), stage(-1)
    (None, 30, 7, 1, 0)
    """
    if left_s <= 0:
        return 0
    return min((days for days in WARNED_DAYS if left_s <= days * DAY_S), default=None)


async def watch_certificates(daemon: Daemon, buses: Sequence[BusSettings]) -> None:
    """Watch the certificates of the servers that ``buses`` name, and warn before they end; forever."""
    said: dict[str, int | None] = {}
    while True:
        ends: dict[str, float] = {}
        for url, settings in {bus.url: bus for bus in buses}.items():
            try:
                ends[url] = await certificates_end_at(settings)
            except BusError as error:
                daemon.log.debug("certificate_not_seen", server=url, error=str(error))
                continue
            left_s = ends[url] - time.time()
            if (days := stage(left_s)) is not None and said.get(url) != days:
                remedy = "run `fednats provision`, hand out server.pem, reload the server"
                fields = {"server": url, "ends_in_days": max(0, math.floor(left_s / DAY_S))}
                daemon.log.warning("certificate_ending", **fields, remedy=remedy)
                daemon.notices.add(What.CERTIFICATE_ENDING, fields)
            said[url] = days
        if ends:
            daemon.metrics.certificate_ends_at(min(ends.values()))
        await asyncio.sleep(LOOK_S)
