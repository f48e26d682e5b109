"""Connect every user of a federation to its servers, with the streams that the services make."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fednats import permissions
from fednats.config import BusSettings
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.testbed.wan import WanSettings
from fednats.transport import streams
from fednats.transport.bus import Bus

PATIENCE_S = 30.0

T = TypeVar("T")


@dataclass
class ConnectedBus:
    """One bus for each user of a federation."""

    servers: BusServers
    coordinator: Bus
    observer: Bus
    uplinks: dict[str, Bus] = field(default_factory=dict)
    aggregators: dict[str, Bus] = field(default_factory=dict)
    sites: dict[str, Bus] = field(default_factory=dict)


@asynccontextmanager
async def connected_bus(
    directory: Path,
    run: str,
    plan: Sequence[RegionPlan],
    *,
    leaves: bool = True,
    links: Mapping[str, WanSettings] | None = None,
) -> AsyncIterator[ConnectedBus]:
    """Start the servers, connect all users, and make all streams and buckets."""
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(bus_servers(directory, run, plan, leaves=leaves, links=links))

        async def connect(settings: BusSettings, role: str, node: str) -> Bus:
            return await stack.enter_async_context(Bus.connect(settings, permissions.user_name(role, node)))

        coordinator = await connect(servers.coordinator(), "coordinator", HUB)
        observer = await connect(servers.observer(HUB), "observer", HUB)
        connected = ConnectedBus(servers, coordinator, observer)
        await _ensure(coordinator, streams.at_hub(run, _children(plan, None), leaves=leaves), streams.buckets(run))
        for region in plan:
            name = region.name
            connected.uplinks[name] = uplink = await connect(servers.uplink(name), "uplink", name)
            connected.aggregators[name] = private = await connect(servers.aggregator(name), "aggregator", name)
            children = _children(plan, name)
            above = streams.at_uplink(run, name, region.parent, children, leaves=leaves)
            await _ensure(uplink, above, (streams.presence(run),) if children else ())
            await _ensure(private, streams.in_region(run, name, region.sites, leaves=leaves), streams.buckets(run))
            for site in region.sites:
                connected.sites[site] = await connect(servers.site(name, site), "site", site)
        yield connected


async def until(probe: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """Return the first true result of ``probe``; raise TimeoutError after ``patience_s``."""
    async with asyncio.timeout(patience_s):
        while not (result := await probe()):  # noqa: ASYNC110 -- a server has no event to wait for
            await asyncio.sleep(0.02)
        return result


async def _ensure(bus: Bus, specs: Sequence[streams.StreamSpec], buckets: Sequence[streams.BucketSpec]) -> None:
    for spec in specs:
        await bus.ensure_stream(spec)
    for bucket in buckets:
        await bus.ensure_bucket(bucket)


def _children(plan: Sequence[RegionPlan], node: str | None) -> list[str]:
    return [region.name for region in plan if region.parent == node]
