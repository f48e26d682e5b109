"""Servers with smaller limits than the run needs: the limit is noticed and named, and no link breaks."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from nats.aio.msg import Msg

from fednats import subjects
from fednats.errors import BusError
from fednats.provision.plan import RegionPlan
from fednats.services.aggregator import service
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.retry import ensure
from fednats.subjects import HUB
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.testbed.nats_server import NatsServer
from fednats.transport import streams
from fednats.transport.bus import Bus
from fednats.transport.message_limit import HEADER_ROOM_BYTES
from tests.support.connected_bus import until

RUN = "run"
CHUNK_BYTES = 256 * 1024
SMALL_BYTES, USUAL_BYTES = 65536, 1048576
N_PULSES = 14
"""Pulses, four a second, that must cross the link after a message too large for it; else it breaks every 2.5 s."""


def replace_in(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


async def restarted_with(server: NatsServer, config: Path, old: str, new: str) -> None:
    await asyncio.to_thread(replace_in, config, old, new)
    await server.stop()
    await server.start()


@asynccontextmanager
async def aggregating(servers: BusServers, state_dir: Path) -> AsyncIterator[Daemon]:
    """Run the region's real daemon in this process."""
    settings = servers.aggregator_settings("north").model_copy(update={"state_dir": state_dir})
    await asyncio.to_thread(state_dir.mkdir)
    daemon = Daemon("aggregator", "north", RUN, structlog.get_logger())
    living = asyncio.create_task(service.aggregator(daemon, settings))
    try:
        yield daemon
    finally:
        daemon.stopping.set()
        await living


async def presence_at_hub(coordinator: Bus) -> Mapping[str, Any]:
    value = await coordinator.get(subjects.presence_bucket(RUN), subjects.presence_key("aggregator", "north"))
    return {} if value is None else json.loads(value)


async def test_a_leaf_that_takes_smaller_messages_is_named_and_its_link_stands(tmp_path: Path) -> None:
    async with bus_servers(tmp_path, RUN, (RegionPlan("north", ("a", "b")),)) as servers:
        leaf, config = servers.leaves["north"], servers.kits.server("north") / "leaf.conf"
        await restarted_with(leaf, config, "max_payload: 1MB", "max_payload: 64KB")
        async with (
            Bus.connect(servers.coordinator(), f"coordinator.{HUB}") as coordinator,
            aggregating(servers, tmp_path / "state") as daemon,
        ):
            await ensure(structlog.get_logger(), coordinator, streams.at_hub(RUN, ["north"]), streams.buckets(RUN))
            assert not coordinator.need(CHUNK_BYTES).too_small

            async def named() -> bool:
                return "server limit" in daemon.obstacles

            await until(named)
            why = daemon.not_ready()
            assert why is not None
            assert f"takes messages of {SMALL_BYTES} bytes" in why
            assert f"needs {CHUNK_BYTES + HEADER_ROOM_BYTES}" in why
            said = await until(lambda: presence_at_hub(coordinator))
            while "aggregator.north" not in said["declined"]:
                await asyncio.sleep(0.1)
                said = await presence_at_hub(coordinator)
            assert why in said["declined"]["aggregator.north"]
            assert said["waits"]

            pid_of_link = (await leaf.monitor("/leafz"))["leafs"]
            async with Bus.connect(servers.uplink("north"), "uplink.north") as below:
                pulses: asyncio.Queue[Msg] = asyncio.Queue()
                await below._connection.subscribe(subjects.pulse(RUN, HUB), pulses.put)
                await coordinator.publish(subjects.chunk(subjects.model(RUN), "k", 0), bytes(CHUNK_BYTES), "k.0")
                async with asyncio.timeout(60):
                    for _ in range(N_PULSES):
                        await pulses.get()
            still = (await leaf.monitor("/leafz"))["leafs"]
            assert [link["id"] for link in still] == [link["id"] for link in pid_of_link]  # type: ignore[attr-defined]

            await restarted_with(leaf, config, "max_payload: 64KB", "max_payload: 1MB")

            async with Bus.connect(servers.site("north", "a"), "site.a") as site:

                async def copied() -> bool:
                    models, chunk = subjects.models_stream(RUN, "north"), subjects.chunk(subjects.model(RUN), "k", 0)
                    try:
                        return await site.last(models, chunk) is not None
                    except BusError:
                        return False

                await until(copied)
            assert daemon.not_ready() is None


async def test_a_server_with_too_small_a_store_is_named_with_the_remedy(tmp_path: Path) -> None:
    async with bus_servers(tmp_path, RUN, (RegionPlan("north", ("a", "b")),)) as servers:
        conf = servers.kits.server(HUB) / "server.conf"
        await restarted_with(servers.hub, conf, "bus_max_store: 1TB", "bus_max_store: 20GB")
        made = streams.at_hub(RUN, ["north"])
        async with Bus.connect(servers.coordinator(), f"coordinator.{HUB}") as coordinator:
            with pytest.raises(BusError, match=r"fed_run_inbox_hub_north may take up to 16.0 GiB.*raise bus_max_store"):
                await ensure(structlog.get_logger(), coordinator, made, streams.buckets(RUN))
        enough = -(-streams.needed_bytes((*made, *streams.buckets(RUN))) // streams.GIB)
        await restarted_with(servers.hub, conf, "bus_max_store: 20GB", f"bus_max_store: {enough}GB")
        async with Bus.connect(servers.coordinator(), f"coordinator.{HUB}") as coordinator:
            await ensure(structlog.get_logger(), coordinator, made, streams.buckets(RUN))
