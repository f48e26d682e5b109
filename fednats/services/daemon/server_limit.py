"""Check that a daemon's server accepts messages as large as the run's."""

from fednats.services.daemon.lifecycle import Daemon
from fednats.transport.bus import Bus

OBSTACLE = "server limit"


async def follow_server_limit(daemon: Daemon, bus: Bus) -> None:
    """Hold the daemon unready, and say why, while its server does not accept messages of the run's size; forever."""
    async for limit in bus.limits():
        if limit.too_small:
            daemon.hinder(OBSTACLE, limit.remedy, "server_limit_too_small", **limit._asdict())
        else:
            daemon.unhinder(OBSTACLE)
