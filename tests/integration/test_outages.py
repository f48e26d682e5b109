"""Links are cut, vanish silently, or come and go: services notice soon, and go on within seconds."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fednats import subjects
from fednats.errors import BusError
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.wan import Wan, WanSettings
from fednats.transport import connection
from fednats.transport.bus import Bus
from fednats.wire import digest
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a",)),)
MODEL, MODELS = subjects.model(RUN), subjects.models_stream(RUN, "north")
AGGREGATE, INBOX = subjects.aggregate(RUN, "north"), subjects.inbox_stream(RUN, HUB, "north")
UPDATE, UPDATES = subjects.update(RUN, "north", "a"), subjects.updates_stream(RUN, "north", "a")
CHUNKS = [os.urandom(2**16) for _ in range(8)]
DIGESTS = [digest(chunk) for chunk in CHUNKS]


async def sent(bus: Bus, prefix: str, payload_id: str) -> None:
    await bus.publish_payload(prefix, payload_id, CHUNKS)
    await bus.publish(subjects.head(prefix), payload_id.encode(), message_id=payload_id)


async def arrives(bus: Bus, stream: str, prefix: str, payload_id: str, within_s: float) -> None:
    async def there() -> bool:
        head = await bus.last(stream, subjects.head(prefix))
        return head is not None and head.data == payload_id.encode()

    await until(there, within_s)
    assert [chunk async for chunk in bus.read_payload(stream, prefix, payload_id, DIGESTS)] == CHUNKS


async def both_ways(bus: ConnectedBus, payload_id: str, within_s: float) -> None:
    """Assert that a model published now reaches the site, and an aggregate the hub, within ``within_s``."""
    await sent(bus.coordinator, MODEL, payload_id)
    await sent(bus.uplinks["north"], AGGREGATE, payload_id)
    async with asyncio.TaskGroup() as group:
        group.create_task(arrives(bus.sites["a"], MODELS, MODEL, payload_id, within_s))
        group.create_task(arrives(bus.coordinator, INBOX, AGGREGATE, payload_id, within_s))


@pytest.mark.parametrize(
    "cut_s", [4, *(pytest.param(seconds, marks=pytest.mark.long) for seconds in (20, 60))], ids=lambda s: f"{s}s"
)
async def test_a_leaf_link_that_was_cut_goes_on_within_seconds(tmp_path: Path, cut_s: float) -> None:
    wan = WanSettings(delay_ms=50, mbit=50)
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": wan}) as bus:
        await both_ways(bus, "before", 10)
        link = bus.servers.links["region-north"]
        link.cut()
        await sent(bus.coordinator, MODEL, "meanwhile")
        await sent(bus.uplinks["north"], AGGREGATE, "meanwhile")
        await asyncio.sleep(cut_s)
        link.restore()
        await both_ways(bus, "after", 6)


async def test_a_leaf_link_that_comes_and_goes_every_two_seconds_makes_progress(tmp_path: Path) -> None:
    wan = WanSettings(delay_ms=20, mbit=50)
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": wan}) as bus:
        await both_ways(bus, "before", 10)
        link = bus.servers.links["region-north"]

        async def is_cut() -> bool:
            return link.is_cut

        flapping = asyncio.create_task(come_and_go(link))
        for number in range(3):
            await until(is_cut)
            await both_ways(bus, f"v{number}", 30)
        flapping.cancel()


async def come_and_go(link: Wan) -> None:
    while True:
        link.cut()
        await asyncio.sleep(2)
        link.restore()
        await asyncio.sleep(2)


@pytest.mark.long
async def test_both_servers_notice_a_leaf_link_that_vanished_without_a_word(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, PLAN, links={"region-north": WanSettings()}) as bus:
        bus.servers.links["region-north"].cut()

        async def noticed() -> bool:
            servers = (bus.servers.hub, bus.servers.leaves["north"])
            return not any([(await server.monitor("/leafz"))["leafnodes"] for server in servers])

        await until(noticed, patience_s=55)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_S", 0.2)
    monkeypatch.setattr(connection, "DEAD_AFTER_S", 1.0)


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_vanished_without_a_word_is_noticed_while_sending_and_gone_on_with(
    tmp_path: Path,
) -> None:
    """Data that is unsent when the link dies would delay an orderly close by a quarter of an hour."""
    chunks = [os.urandom(2**18) for _ in range(40)]
    wan = WanSettings(delay_ms=20, mbit=40)
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False, links={"site-a": wan}) as bus:
        link, site = bus.servers.links["site-a"], bus.sites["a"]
        some_sent = asyncio.Event()

        async def drawn() -> AsyncIterator[bytes]:
            for index, chunk in enumerate(chunks):
                if index == 20:
                    some_sent.set()
                yield chunk

        async with asyncio.timeout(30):
            sending = asyncio.create_task(site.publish_payload(UPDATE, "u1", drawn()))
            await some_sent.wait()
            link.cut()
            await site.wait_away()
            assert not site.connected
            link.restore()
            await site.wait_connected()
            await sending
            digests = [digest(chunk) for chunk in chunks]
            reading = bus.aggregators["north"].read_payload(UPDATES, UPDATE, "u1", digests)
            assert [chunk async for chunk in reading] == chunks
        assert link.bytes_up < 2 * sum(map(len, chunks))


async def test_a_dead_link_with_a_full_buffer_is_left_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-py loses a cancellation while it waits for room in its buffer, and its close waits for a dead link."""
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT_S", 1.0)
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False, links={"site-a": WanSettings()}) as bus:
        link, settings = bus.servers.links["site-a"], bus.servers.site("north", "a")
        async with connection.connection(settings, "site.a") as site:

            async def go_on() -> None:
                while True:
                    await site.emit(subjects.event(RUN, "site", "a"), bytes(2**16))

            async def is_full() -> bool:
                emitted = site.client.stats["out_bytes"]
                await asyncio.sleep(0.2)
                return bool(0 < emitted == site.client.stats["out_bytes"])

            link.cut()
            emitting = asyncio.create_task(go_on())
            await until(is_full)
            emitting.cancel()
            async with asyncio.timeout(5):
                await asyncio.wait({emitting})
            assert emitting.cancelled()
            left_s = time.monotonic()
        assert time.monotonic() - left_s < 5


@pytest.mark.usefixtures("impatient")
async def test_who_waits_is_told_of_a_connection_that_breaks_for_a_moment(tmp_path: Path) -> None:
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False, links={"site-a": WanSettings()}) as bus:
        link, site = bus.servers.links["site-a"], bus.sites["a"]
        waiting = asyncio.create_task(site.wait_away())
        await asyncio.sleep(0)
        assert not waiting.done()
        link.cut()
        link.restore()
        async with asyncio.timeout(10):
            await waiting
            await site.wait_connected()
        await site.publish(subjects.head(UPDATE), b"on it goes", message_id="on")


@pytest.mark.long
async def test_a_service_begun_over_a_dead_link_is_there_once_the_link_is(tmp_path: Path) -> None:
    status = subjects.status(RUN, "site", "a")
    async with connected_bus(tmp_path, RUN, PLAN, links={"site-a": WanSettings()}) as bus:
        link = bus.servers.links["site-a"]
        link.cut()
        await bus.sites["a"].serve("site", "1.2.3", "trains", {"run": RUN}, status, lambda: {"version": 7})
        link.restore()
        async with Bus.connect(bus.servers.observer("north"), "observer.north") as observer:

            async def answers() -> bool:
                try:
                    answered = await observer.ask(status)  # empty until its subscription is renewed
                    return bool(answered) and json.loads(answered) == {"version": 7}
                except BusError:
                    return False

            await until(answers)
