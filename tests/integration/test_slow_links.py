"""Payloads over long and slow links fill the link, are sent once, and take no more memory than the window."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from fednats import subjects
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.wan import Wan, WanSettings
from fednats.transport.bus import Bus
from fednats.transport.window import MOST_BYTES
from fednats.wire import digest
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a",)),)
UPDATES = subjects.updates_stream(RUN, "north", "a")
UPDATE = subjects.update(RUN, "north", "a")
CHUNK_BYTES = 2**18

SHORT = pytest.param(20, 8)
LONG = pytest.param(100, 40, marks=pytest.mark.long)
"""Rate in Mbit/s of a link with a delay of 150 ms one way, and MB to send over it."""


def random_chunks(megabytes: float) -> list[bytes]:
    return [os.urandom(CHUNK_BYTES) for _ in range(int(megabytes * 1e6 / CHUNK_BYTES))]


def share_used(chunks: list[bytes], mbit: float, seconds: float) -> float:
    return sum(map(len, chunks)) * 8 / mbit / 1e6 / seconds


@asynccontextmanager
async def slow_clients(directory: Path, wan: WanSettings) -> AsyncIterator[tuple[ConnectedBus, Wan, Wan]]:
    """Yield a bus with a site and an aggregator that each have their own link to the same server, and the links."""
    links = {"site-a": wan, "aggregator-north": wan}
    async with connected_bus(directory, RUN, PLAN, leaves=False, links=links) as bus:
        yield bus, bus.servers.links["site-a"], bus.servers.links["aggregator-north"]


async def read_back(bus: Bus, stream: str, prefix: str, payload_id: str, chunks: list[bytes]) -> None:
    """Read a payload and assert that it is the one sent."""
    expected = iter(chunks)
    async with aclosing(bus.read_payload(stream, prefix, payload_id, list(map(digest, chunks)))) as read:
        async for chunk in read:
            assert chunk == next(expected)
    assert next(expected, None) is None


async def arrived(bus: Bus, stream: str, subject: str) -> None:
    async def there() -> bool:
        return await bus.last(stream, subject) is not None

    await until(there, patience_s=60)


@pytest.mark.parametrize(("mbit", "megabytes"), [SHORT, LONG])
async def test_most_of_a_long_link_is_used_both_ways(tmp_path: Path, mbit: float, megabytes: float) -> None:
    chunks, most = random_chunks(megabytes), 0
    now = asyncio.get_running_loop().time
    async with slow_clients(tmp_path, WanSettings(delay_ms=150, mbit=mbit)) as (bus, uplink, downlink):

        def drawn() -> Iterator[bytes]:
            nonlocal most
            for index, chunk in enumerate(chunks):
                most = max(most, index * CHUNK_BYTES - uplink.bytes_up)
                yield chunk

        started = now()
        await bus.sites["a"].publish_payload(UPDATE, "u1", drawn())
        assert share_used(chunks, mbit, now() - started) >= 0.8
        assert most <= MOST_BYTES + CHUNK_BYTES
        started = now()
        await read_back(bus.aggregators["north"], UPDATES, UPDATE, "u1", chunks)
        assert share_used(chunks, mbit, now() - started) >= 0.8
        for crossed in (uplink.bytes_up, downlink.bytes_down):
            assert crossed < 1.05 * megabytes * 1e6


async def test_on_a_slow_link_nothing_is_sent_twice_and_other_words_get_through(tmp_path: Path) -> None:
    """At 1 Mbit/s, the last of these chunks is answered after 7 s; a fixed timeout of 5 s would send it again."""
    chunks, model, models = random_chunks(0.8), subjects.model(RUN), subjects.models_stream(RUN, "north")
    async with slow_clients(tmp_path, WanSettings(delay_ms=150, mbit=1)) as (bus, uplink, downlink):
        site, reader = bus.sites["a"], bus.aggregators["north"]
        await bus.coordinator.publish_payload(model, "m1", chunks)
        await arrived(reader, models, subjects.chunk(model, "m1", len(chunks) - 1))
        up, down = uplink.bytes_up, downlink.bytes_down
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(site.publish_payload(UPDATE, "u1", chunks))
            reading = group.create_task(read_back(reader, models, model, "m1", chunks))
            await asyncio.sleep(0)
            await site.publish(subjects.head(UPDATE), b"said beside it", message_id="head")
            assert not sending.done()
            assert await reader.last(models, subjects.control(RUN)) is None
            assert not reading.done()
        payload_bytes = sum(map(len, chunks))
        assert uplink.bytes_up - up < 1.15 * payload_bytes
        assert downlink.bytes_down - down < 1.15 * payload_bytes


async def test_a_reader_that_takes_its_time_holds_no_more_than_the_window(tmp_path: Path) -> None:
    chunks = random_chunks(30)
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False, links={"aggregator-north": WanSettings()}) as bus:
        await bus.sites["a"].publish_payload(UPDATE, "u1", chunks)
        wan = bus.servers.links["aggregator-north"]
        before, taken = wan.bytes_down, 0
        digests = [digest(chunk) for chunk in chunks]
        async with aclosing(bus.aggregators["north"].read_payload(UPDATES, UPDATE, "u1", digests)) as read:
            async for chunk in read:
                taken += len(chunk)
                await asyncio.sleep(0.001)
                assert wan.bytes_down - before - taken <= 1.02 * (MOST_BYTES + CHUNK_BYTES)
        before = wan.bytes_down
        async with aclosing(bus.aggregators["north"].read_payload(UPDATES, UPDATE, "u1", digests, window=2)) as read:
            taken = len(await anext(read))
            await asyncio.sleep(0.1)
            assert wan.bytes_down - before - taken <= 2.1 * CHUNK_BYTES


@pytest.mark.parametrize(("mbit", "megabytes"), [SHORT, LONG])
async def test_most_of_a_leaf_link_is_used_both_ways(tmp_path: Path, mbit: float, megabytes: float) -> None:
    chunks = random_chunks(megabytes)
    now = asyncio.get_running_loop().time
    wan = WanSettings(delay_ms=150, mbit=mbit)
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": wan}) as bus:
        above, below = bus.coordinator, bus.uplinks["north"]
        ways = (
            (above, subjects.model(RUN), below, subjects.models_stream(RUN, "north")),
            (below, subjects.aggregate(RUN, "north"), above, subjects.inbox_stream(RUN, HUB, "north")),
        )
        for sender, prefix, reader, stream in ways:
            await sender.publish(subjects.head(prefix), b"the copying goes on", message_id="first")
            await arrived(reader, stream, subjects.head(prefix))
            started = now()
            await sender.publish_payload(prefix, "p1", chunks)
            await arrived(reader, stream, subjects.chunk(prefix, "p1", len(chunks) - 1))
            assert share_used(chunks, mbit, now() - started) >= 0.8
