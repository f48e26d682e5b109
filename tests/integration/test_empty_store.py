"""A server comes back without its store: streams are created again, and all listeners go on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from fednats import subjects
from fednats.errors import BusError
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.nats_server import NatsServer
from fednats.transport import consumer, streams
from fednats.transport.bus import Bus, StoredMessage
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a",)),)
MODEL = subjects.head(subjects.model(RUN))
MODELS = subjects.models_stream(RUN, "north")
UPDATE = subjects.head(subjects.update(RUN, "north", "a"))
UPDATES = subjects.updates_stream(RUN, "north", "a")
AGGREGATE = subjects.head(subjects.aggregate(RUN, "north"))
AGGREGATES = subjects.aggregates_stream(RUN, "north")
INBOX = subjects.inbox_stream(RUN, HUB, "north")
PRESENCE = subjects.presence_bucket(RUN)
PRESENCE_KEY = subjects.presence_key("aggregator", "north")


async def say(bus: Bus, subject: str, name: str) -> None:
    """Publish as a service does, again and again until the stream exists again."""

    async def said() -> bool:
        try:
            await bus.publish(subject, name.encode(), message_id=name)
        except BusError:
            return False
        return True

    await until(said)


async def heard(records: AsyncIterator[StoredMessage], name: str) -> None:
    async with asyncio.timeout(30):
        while (await anext(records)).data != name.encode():
            pass


async def consumed(bus: Bus, stream: str, subject: str, expected: set[str]) -> list[str]:
    """Settle deliveries until all that are expected have come; return them in order."""
    arrived: list[str] = []
    async with asyncio.timeout(30), aclosing(bus.consume(stream, subjects.durable("x", stream), [subject])) as found:
        async for delivery in found:
            arrived.append(delivery.data.decode())
            await delivery.ack()
            if set(arrived) >= expected:
                break
    return arrived


async def made_anew(bus: Bus, names: set[str]) -> None:
    left = set(names)
    async with asyncio.timeout(30), aclosing(bus.recreated()) as recreated:
        async for name in recreated:
            left.discard(name)
            if not left:
                break


async def lose_everything(server: NatsServer) -> None:
    await server.kill()
    await server.wipe()
    await server.start()


async def one_round(bus: ConnectedBus) -> None:
    await say(bus.coordinator, MODEL, "m1")
    await say(bus.uplinks["north"], AGGREGATE, "a1")
    await say(bus.sites["a"], UPDATE, "u1")
    await bus.uplinks["north"].put(PRESENCE, PRESENCE_KEY, b"1", domain=HUB)
    assert await consumed(bus.coordinator, INBOX, AGGREGATE, {"a1"}) == ["a1"]


async def test_a_hub_that_lost_its_store_gets_again_what_the_regions_have(tmp_path: Path) -> None:
    async with (
        connected_bus(tmp_path, RUN, PLAN) as bus,
        aclosing(bus.sites["a"].follow(MODELS, [MODEL])) as models,
        aclosing(bus.observer.watch(PRESENCE)) as presence,
    ):
        await one_round(bus)
        await heard(models, "m1")
        await bus.servers.hub.kill()
        await say(bus.uplinks["north"], AGGREGATE, "a2")
        await bus.servers.hub.wipe()
        await bus.servers.hub.start()
        await made_anew(
            bus.coordinator, {subjects.models_stream(RUN, HUB), INBOX, PRESENCE, subjects.state_bucket(RUN)}
        )
        await say(bus.coordinator, MODEL, "m2")
        await say(bus.uplinks["north"], AGGREGATE, "a3")
        await heard(models, "m2")
        assert await consumed(bus.coordinator, INBOX, AGGREGATE, {"a1", "a2", "a3"}) == ["a1", "a2", "a3"]

        async def put() -> bool:
            try:
                await bus.uplinks["north"].put(PRESENCE, PRESENCE_KEY, b"2", domain=HUB)
            except BusError:
                return False
            return True

        await until(put)
        async with asyncio.timeout(10):
            while await anext(presence) != {PRESENCE_KEY: b"2"}:
                pass


async def test_a_region_that_lost_its_store_gets_the_models_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "ACK_WAIT_S", 1.5)
    monkeypatch.setattr(consumer, "IN_WORK_INTERVAL_S", 0.4)
    async with connected_bus(tmp_path, RUN, PLAN) as bus, aclosing(bus.sites["a"].follow(MODELS, [MODEL])) as models:
        await one_round(bus)
        await heard(models, "m1")
        private = bus.aggregators["north"]
        durable = subjects.durable("x", UPDATES)
        async with asyncio.timeout(60), aclosing(private.consume(UPDATES, durable, [UPDATE])) as updates:
            held = await anext(updates)
            assert held.data == b"u1"
            await lose_everything(bus.servers.leaves["north"])
            await made_anew(bus.uplinks["north"], {MODELS, AGGREGATES})
            await made_anew(private, {MODELS, UPDATES, PRESENCE, subjects.state_bucket(RUN)})

            async def first_model() -> bool:
                record = await bus.sites["a"].last(MODELS, MODEL)
                return record is not None and record.data == b"m1"

            await until(first_model)
            await say(bus.coordinator, MODEL, "m2")
            await heard(models, "m2")
            await say(bus.sites["a"], UPDATE, "u2")
            assert (await anext(updates)).data == b"u2"
            await held.ack()  # its message is gone; it settles no other
        assert await consumed(private, UPDATES, UPDATE, {"u2"}) == ["u2"]
        await say(bus.uplinks["north"], AGGREGATE, "a2")
        assert await consumed(bus.coordinator, INBOX, AGGREGATE, {"a2"}) == ["a2"]


async def test_who_makes_a_stream_is_told_whether_it_was_there(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False) as bus:
        spec, bucket = streams.at_hub(RUN, ["north"], leaves=False)[0], streams.buckets(RUN)[0]
        assert not await bus.coordinator.ensure_stream(spec)
        await bus.coordinator._connection.client.close()
        for is_new in (True, False):
            if is_new:
                await lose_everything(bus.servers.hub)
            async with Bus.connect(bus.servers.coordinator(), "coordinator.hub") as coordinator:
                assert await coordinator.ensure_stream(spec) is is_new
                assert await coordinator.ensure_bucket(bucket) is is_new


async def test_sequence_numbers_of_a_stream_made_anew_are_above_all_earlier_ones(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False) as bus:
        await say(bus.sites["a"], UPDATE, "u1")
        before = await bus.aggregators["north"].last(UPDATES, UPDATE)
        await lose_everything(bus.servers.hub)
        await say(bus.sites["a"], UPDATE, "u1")
        after = await bus.aggregators["north"].last(UPDATES, UPDATE)
        assert before is not None
        assert after is not None
        assert after.sequence > before.sequence
