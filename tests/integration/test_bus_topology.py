"""Models go down and aggregates go up: over leaf links, without leaves, over three tiers, and after an outage."""

import asyncio
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest

from fednats import subjects
from fednats.errors import BusError
from fednats.permissions import user_name
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.bus_servers import bus_servers
from fednats.transport import streams
from fednats.transport.bus import Bus
from fednats.wire import digest
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
MODEL = subjects.model(RUN)
HEAD = subjects.head(MODEL)
CHUNKS = [bytes([index]) * 50_000 for index in range(20)]
DIGESTS = [digest(chunk) for chunk in CHUNKS]

TWO_REGIONS = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c",)))
THREE_TIERS = (RegionPlan("europe", ("a",)), RegionPlan("north", ("b",), parent="europe"))


async def publish_model(bus: Bus, version: int) -> None:
    payload_id = f"model-{version}"
    await bus.publish_payload(MODEL, payload_id, CHUNKS)
    await bus.publish(HEAD, payload_id.encode(), message_id=payload_id)


async def assert_model_arrives(bus: Bus, region: str, version: int) -> None:
    """Do as a site does: follow the heads of its region's copy until ``version`` arrives, then read its payload."""
    stream = subjects.models_stream(RUN, region)
    async with asyncio.timeout(30), aclosing(bus.follow(stream, [HEAD])) as heads:
        async for head in heads:
            if head.data == f"model-{version}".encode():
                break
    assert [chunk async for chunk in bus.read_payload(stream, MODEL, f"model-{version}", DIGESTS)] == CHUNKS


async def publish_aggregate(bus: Bus, region: str, number: int) -> None:
    prefix, payload_id = subjects.aggregate(RUN, region), f"{region}-{number}"
    await bus.publish_payload(prefix, payload_id, CHUNKS)
    await bus.publish(subjects.head(prefix), payload_id.encode(), message_id=payload_id)


async def assert_aggregates_arrive(bus: Bus, node: str, expected: set[str]) -> None:
    """Assert that the ``expected`` aggregates, of any regions, reach ``node``, each from its region's stream."""
    for region in {name.partition("-")[0] for name in expected}:
        of_region = {name for name in expected if name.startswith(f"{region}-")}
        await assert_aggregates_of(region, bus, node, of_region)


async def assert_aggregates_of(region: str, bus: Bus, node: str, expected: set[str]) -> None:
    stream = subjects.inbox_stream(RUN, node, region)
    heads = [subjects.head(subjects.aggregate(RUN, region))]
    arrived: set[str] = set()
    deliveries = bus.consume(stream, subjects.durable(node, stream), heads)
    async with asyncio.timeout(30), aclosing(deliveries):
        async for delivery in deliveries:
            name = delivery.data.decode()
            if name not in expected:  # a killed server forgot the ack; a service would know
                await delivery.ack()
                continue
            prefix = delivery.subject.removesuffix(".head")
            assert [chunk async for chunk in bus.read_payload(stream, prefix, name, DIGESTS)] == CHUNKS
            await delivery.ack()
            arrived.add(name)
            if arrived == expected:
                break
    assert arrived == expected


async def assert_both_ways(bus: ConnectedBus, version: int) -> None:
    await publish_model(bus.coordinator, version)
    for region in bus.servers.plan.values():
        for site in region.sites:
            await assert_model_arrives(bus.sites[site], region.name, version)
        await publish_aggregate(bus.uplinks[region.name], region.name, version)
    nodes = {HUB: bus.coordinator} | {region.name: bus.uplinks[region.name] for region in bus.servers.plan.values()}
    for node, reader in nodes.items():
        above = None if node == HUB else node
        expected = {f"{region.name}-{version}" for region in bus.servers.plan.values() if region.parent == above}
        if expected:
            await assert_aggregates_arrive(reader, node, expected)


async def assert_presence_at_the_hub(bus: ConnectedBus) -> None:
    bucket = subjects.presence_bucket(RUN)
    for region, uplink in bus.uplinks.items():
        await uplink.put(bucket, subjects.presence_key("aggregator", region), b"here", domain=HUB)
    expected = {subjects.presence_key("aggregator", region): b"here" for region in bus.uplinks}
    async with asyncio.timeout(10), aclosing(bus.observer.watch(bucket)) as states:
        async for state in states:
            if state == expected:
                break


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "no-leaves"])
async def test_models_reach_every_site_and_aggregates_reach_the_hub(tmp_path: Path, leaves: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    async with connected_bus(tmp_path, RUN, TWO_REGIONS, leaves=leaves) as bus:
        await assert_both_ways(bus, 1)
        await assert_presence_at_the_hub(bus)


async def test_three_tiers_pass_models_down_and_aggregates_up_one_tier(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, THREE_TIERS) as bus:
        await assert_both_ways(bus, 1)
        await assert_presence_at_the_hub(bus)


async def test_a_region_is_seen_by_the_one_above_it(tmp_path: Path) -> None:
    bucket, key = subjects.presence_bucket(RUN), subjects.presence_key("aggregator", "north")
    async with connected_bus(tmp_path, RUN, THREE_TIERS) as bus:

        async def seen() -> bool:
            await bus.uplinks["north"].put(bucket, key, b"here", domain="europe")
            return await bus.uplinks["europe"].entries(bucket) == {key: b"here"}

        await until(seen)
        with pytest.raises(BusError):
            await bus.uplinks["north"].put(bucket, subjects.presence_key("aggregator", "europe"), b"x", domain="europe")


async def test_a_region_that_was_away_catches_up_both_ways(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a",)),)) as bus:
        await assert_both_ways(bus, 1)
        leaf = bus.servers.leaves["north"]
        await leaf.kill()
        await publish_model(bus.coordinator, 2)
        await leaf.start()
        await publish_aggregate(bus.uplinks["north"], "north", 2)
        await assert_model_arrives(bus.sites["a"], "north", 2)
        await assert_aggregates_arrive(bus.coordinator, HUB, {"north-2"})


async def test_a_hub_that_was_away_catches_up_and_takes_nothing_twice(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a",)),)) as bus:
        await assert_both_ways(bus, 1)
        inbox = subjects.inbox_stream(RUN, HUB, "north")
        await bus.coordinator.purge(inbox, subjects.chunks(subjects.aggregate(RUN, "north"), "north-1"))
        await bus.servers.hub.kill()
        await publish_aggregate(bus.uplinks["north"], "north", 2)
        await bus.servers.hub.start()
        await assert_aggregates_arrive(bus.coordinator, HUB, {"north-2"})
        assert await bus.coordinator.last(inbox, subjects.chunk(subjects.aggregate(RUN, "north"), "north-1", 0)) is None


async def test_the_leaf_link_shows_in_the_monitoring_and_interest_crosses_it(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a",)),)) as bus:

        async def linked() -> bool:
            return (await bus.servers.hub.monitor("/leafz"))["leafnodes"] == 1

        await until(linked)
        status = subjects.status(RUN, "aggregator", "north")
        await bus.uplinks["north"].serve("aggregator", "1.0.0", "", {}, status, lambda: {"buffered": 3})

        async def answered() -> bool:
            # The first requests may arrive before the endpoint's interest has crossed the link.
            return b'"buffered": 3' in await bus.observer.ask(status)

        await until(answered)


async def test_a_region_that_joins_late_has_all_its_aggregates_copied(tmp_path: Path) -> None:
    """By itself, JetStream would start at the time of the newest message from other regions."""
    plan = (RegionPlan("north"), RegionPlan("south"))
    async with (
        bus_servers(tmp_path, RUN, plan, leaves=False) as servers,
        Bus.connect(servers.coordinator(), user_name("coordinator", HUB)) as coordinator,
        Bus.connect(servers.uplink("north"), user_name("uplink", "north")) as north,
        Bus.connect(servers.uplink("south"), user_name("uplink", "south")) as south,
    ):
        for spec in streams.at_hub(RUN, ["north"], leaves=False):
            await coordinator.ensure_stream(spec)
        inbox = subjects.inbox_stream(RUN, HUB, "north")

        async def arrived(number: int) -> bool:
            record = await coordinator.last(inbox, subjects.head(subjects.aggregate(RUN, "north")))
            return record is not None and record.data == f"north-{number}".encode()

        await south.ensure_stream(streams.at_uplink(RUN, "south", leaves=False)[0])
        await publish_aggregate(south, "south", 1)
        await north.ensure_stream(streams.at_uplink(RUN, "north", leaves=False)[0])
        for number in (1, 2):
            await publish_aggregate(north, "north", number)
            await until(partial(arrived, number))
        await coordinator.ensure_stream(streams.inbox(RUN, HUB, "south", leaves=False))
        await assert_aggregates_arrive(coordinator, HUB, {"north-1", "north-2", "south-1"})
