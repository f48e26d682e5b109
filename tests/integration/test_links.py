"""Links of real servers are slow, cut and restored, directly and from another process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fednats import subjects
from fednats.errors import BusError, ConfigError, FednatsError
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.bus_servers import bus_servers, link_names
from fednats.testbed.links import ask, serving_links
from fednats.testbed.wan import Wan, WanSettings
from fednats.transport.bus import Bus
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a", "b")),)
HEAD = subjects.head(subjects.model(RUN))
SIZE = 50_000


async def publish(bus: ConnectedBus, version: int) -> None:
    await bus.coordinator.publish(HEAD, bytes([version]) * SIZE, message_id=str(version))


async def assert_arrives(bus: ConnectedBus, version: int) -> None:
    heads = bus.sites["a"].follow(subjects.models_stream(RUN, "north"), [HEAD])
    async with asyncio.timeout(40), aclosing(heads):
        async for head in heads:
            if head.data == bytes([version]) * SIZE:
                return


async def test_a_region_stays_on_its_link_over_cuts_and_catches_up(tmp_path: Path) -> None:
    """A leaf must not use the address that the server above tells it, which would bypass the link."""
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": WanSettings()}) as bus:
        link = bus.servers.links["region-north"]
        await publish(bus, 1)
        await assert_arrives(bus, 1)
        for version in (2, 3):
            crossed = link.bytes_down
            link.cut()
            await publish(bus, version)
            link.restore()
            await assert_arrives(bus, version)
            assert link.bytes_down > crossed


async def test_a_leaf_link_s_delay_is_on_the_way(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": WanSettings(delay_ms=100)}) as bus:
        await publish(bus, 1)
        await assert_arrives(bus, 1)

        async def linked() -> bool:
            leafs: Any = (await bus.servers.hub.monitor("/leafz"))["leafs"]
            rtt = [leaf["rtt"] for leaf in leafs]
            return len(rtt) == 1 and rtt[0].endswith("ms") and float(rtt[0].removesuffix("ms")) >= 200

        await until(linked)


async def assert_cut_is_felt(link: Wan, client: Bus, role: str, name: str, domain: str | None = None) -> None:
    """Assert that a request over a cut link has no answer until the link is restored and the client reconnects."""

    async def put() -> bool:
        try:
            await client.put(subjects.presence_bucket(RUN), subjects.presence_key(role, name), b"here", domain=domain)
        except BusError:
            return False
        return True

    assert await until(put)
    link.cut()
    pending = asyncio.create_task(put())
    done, _ = await asyncio.wait({pending}, timeout=0.3)
    assert not done
    link.restore()
    assert not await pending
    assert await until(put)


async def test_any_participant_s_connection_can_be_cut(tmp_path: Path) -> None:
    names = link_names(PLAN, leaves=True)
    assert set(names) == {"region-north", "coordinator", "aggregator-north", "uplink-north", "site-a", "site-b"}
    async with connected_bus(tmp_path, RUN, PLAN, links=dict.fromkeys(names, WanSettings())) as bus:
        links = bus.servers.links
        assert set(links) == set(names)
        assert all(link.bytes_up and link.bytes_down for link in links.values())
        await assert_cut_is_felt(links["coordinator"], bus.coordinator, "coordinator", HUB)
        await assert_cut_is_felt(links["aggregator-north"], bus.aggregators["north"], "aggregator", "north")
        await assert_cut_is_felt(links["uplink-north"], bus.uplinks["north"], "aggregator", "north", HUB)
        await assert_cut_is_felt(links["site-a"], bus.sites["a"], "site", "a")
        assert bus.sites["b"].connected


async def test_a_link_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no link 'region-east'; there are coordinator, region-north, aggregator"):
        async with bus_servers(tmp_path, RUN, PLAN, links={"region-east": WanSettings()}):
            pass
    with pytest.raises(ConfigError, match="no link 'region-north'"):
        async with bus_servers(tmp_path, RUN, PLAN, leaves=False, links={"region-north": WanSettings()}):
            pass


@asynccontextmanager
async def served(output: Path) -> AsyncIterator[dict[str, Wan]]:
    settings = WanSettings(delay_ms=5)
    async with (
        Wan(settings, "127.0.0.1", 1, name="region-a") as region,
        Wan(settings, "127.0.0.1", 1, name="site-b") as b,
    ):
        links = {"region-a": region, "site-b": b}
        async with serving_links(links, output):
            yield links


async def test_links_are_shown_and_cut_from_outside(tmp_path: Path) -> None:
    output = tmp_path / ("a-long-name" * 10) / "out"
    async with served(output) as links:
        assert await ask(output, "show") == [
            {"link": name, "state": "up", "bytes_up": 0, "bytes_down": 0, "delay_ms": 5} for name in links
        ]
        (row,) = await ask(output, "cut", "a")
        assert (row["link"], row["state"]) == ("region-a", "cut")
        assert [link.is_cut for link in links.values()] == [True, False]
        await ask(output, "cut", "site-b")
        (row,) = await ask(output, "restore", "region-a")
        assert row["state"] == "up"
        assert [link.is_cut for link in links.values()] == [False, True]
        with pytest.raises(FednatsError, match="no link 'c'; there are region-a, site-b"):
            await ask(output, "cut", "c")
    with pytest.raises(FednatsError, match="no federation runs there"):
        await ask(output, "show")


async def test_what_a_killed_run_left_is_no_federation_and_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "links.sock").symlink_to(tmp_path / "gone" / "links.sock")
    with pytest.raises(FednatsError, match="no federation runs there"):
        await ask(tmp_path, "show")
    async with served(tmp_path):
        assert len(await ask(tmp_path, "show")) == 2
