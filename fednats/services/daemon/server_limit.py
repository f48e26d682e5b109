"""Whether the server that a daemon is connected to takes messages as large as the run's."""

from fednats.services.daemon.lifecycle import Daemon
from fednats.transport.bus import Bus

OBSTACLE = "server limit"


async def follow_server_limit(daemon: Daemon, bus: Bus) -> None:
    """Keep the daemon from being ready, and say why, while its server takes smaller messages than the run's; for ever."""
    async for limit in bus.limits():
        if limit.too_small:
            daemon.hinder(OBSTACLE, limit.remedy, "server_limit_too_small", **limit._asdict())
        else:
            daemon.unhinder(OBSTACLE)
