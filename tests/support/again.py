"""Send messages again, since the bus may deliver any message more than once."""

import asyncio
import signal

from fednats import subjects
from fednats.messages import Aggregate
from fednats.permissions import user_name
from fednats.protocol.events import ContributionArrived
from fednats.storage.journal import read_journal
from fednats.storage.outbox import outbox_file
from fednats.subjects import HUB
from fednats.testbed.launch import COORDINATOR, Running
from fednats.transport.bus import Bus
from fednats.verify.sent import read_outbox

NEWEST = 20
"""How many updates of a site, or sums of a region, are sent again; of all other messages, only the newest."""


async def send_site_again(running: Running, site: str, mark: str) -> int:
    """Publish the newest heads of ``site`` once more, in its name; return how many.

    ``mark`` makes their message ids new.

    Raises:
        BusError: its region's server cannot be reached.
    """
    servers = running.servers
    region = next(name for name, plan in servers.plan.items() if site in plan.sites)
    outbox = await asyncio.to_thread(read_outbox, outbox_file(running.output / f"site-{site}"))
    updates = [item.head for item in outbox or () if item.head and item.is_sent][-NEWEST:]
    subject = subjects.head(subjects.update(servers.run, region, site))
    identity = servers.identity("site", site)
    async with (
        Bus.connect(servers.site(region, site), user_name("site", site)) as bus,
        Bus.connect(servers.aggregator(region), user_name("aggregator", region)) as reader,
    ):
        for head in updates:
            await bus.publish(subject, identity.sign(subject, head), f"{head.update_id}.{mark}")
        evaluation = subjects.evaluation(servers.run, region, site)
        n_evaluations = await _send_newest(
            reader, bus, subjects.updates_stream(servers.run, region, site), evaluation, mark
        )
    return len(updates) + n_evaluations


async def send_region_again(running: Running, region: str, mark: str) -> int:
    """Publish once more the newest heads of ``region`` that the node above has taken in; see `send_site_again`.

    The count returned includes the sums before the newest `NEWEST`, which are not sent.
    """
    servers = running.servers
    parent = servers.plan[region].parent
    journal = running.output / (COORDINATOR if parent is None else f"aggregator-{parent}") / "journal.sqlite"
    events = [entry.event for entry in await asyncio.to_thread(read_journal, journal)]
    arrived = [event.head for event in events if isinstance(event, ContributionArrived)]
    sums = {head.aggregate_id: head for head in arrived if isinstance(head, Aggregate) and head.region == region}
    subject = subjects.head(subjects.aggregate(servers.run, region))
    identity = servers.identity("aggregator", region)
    async with Bus.connect(servers.uplink(region), user_name("uplink", region)) as bus:
        for name, head in list(sums.items())[-NEWEST:]:
            await bus.publish(subject, identity.sign(subject, head), f"{name}.{mark}")
        evaluation = subjects.evaluation_sum(servers.run, region)
        n_evaluations = await _send_newest(bus, bus, subjects.aggregates_stream(servers.run, region), evaluation, mark)
    return len(sums) + n_evaluations


async def send_coordinator_again(running: Running, mark: str) -> int:
    """Publish the newest manifest and the newest control message once more; see `send_site_again`.

    Stops the coordinator meanwhile, since it would never publish a version again after the next one.
    """
    run = running.servers.run
    stream = subjects.models_stream(run, HUB)
    heads = (subjects.head(subjects.model(run)), subjects.control(run))
    running.daemons[COORDINATOR].send(signal.SIGSTOP)
    try:
        async with Bus.connect(running.servers.coordinator(), user_name("coordinator", HUB)) as bus:
            return sum([await _send_newest(bus, bus, stream, subject, mark) for subject in heads])
    finally:
        running.daemons[COORDINATOR].send(signal.SIGCONT)


async def _send_newest(reader: Bus, bus: Bus, stream: str, subject: str, mark: str) -> int:
    newest = await reader.last(stream, subject)
    if newest is None:
        return 0
    await bus.publish(subject, newest.data, f"{newest.sequence}.{mark}")
    return 1
