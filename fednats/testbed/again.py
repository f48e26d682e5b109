"""Send again what a site or a region has sent: the bus may deliver everything more than once."""

import asyncio

from fednats import subjects
from fednats.permissions import user_name
from fednats.storage.outbox import outbox_file
from fednats.testbed.launch import Running
from fednats.testbed.sent import read_outbox
from fednats.transport.bus import Bus

NEWEST = 20
"""Updates of a site that are sent again."""


async def send_site_again(running: Running, site: str, mark: str) -> None:
    """Publish the newest heads of ``site`` once more, in its name; ``mark`` makes their message ids new.

    Raises:
        BusError: its region's server cannot be reached.
    """
    servers = running.servers
    region = next(name for name, plan in servers.plan.items() if site in plan.sites)
    outbox = await asyncio.to_thread(read_outbox, outbox_file(running.output / f"site-{site}"))
    subject = subjects.head(subjects.update(servers.run, region, site))
    identity = servers.identity("site", site)
    async with Bus.connect(servers.site(region, site), user_name("site", site)) as bus:
        for head in [item.head for item in outbox or () if item.is_sent][-NEWEST:]:
            await bus.publish(subject, identity.sign(subject, head), f"{head.update_id}.{mark}")


async def send_region_again(running: Running, region: str, mark: str) -> None:
    """Publish the newest sum's head of ``region`` once more, in its name; see `send_site_again`."""
    servers = running.servers
    subject = subjects.head(subjects.aggregate(servers.run, region))
    async with Bus.connect(servers.uplink(region), user_name("uplink", region)) as bus:
        newest = await bus.last(subjects.aggregates_stream(servers.run, region), subject)
        if newest is not None:
            await bus.publish(subject, newest.data, f"{newest.sequence}.{mark}")
