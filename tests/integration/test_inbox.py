"""Contributions over a real server: read by subject, settled however often they are delivered, refused for good."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog

from fednats import subjects, wire
from fednats.crypto.signing import unsigned
from fednats.errors import BusError, Reason, RefusedError
from fednats.messages import Message, Payload, Reject, Update
from fednats.protocol.events import ContributionArrived
from fednats.provision.plan import RegionPlan
from fednats.services.tier.inbox import Arrived, Inbox, VanishedError
from fednats.services.tier.rejects import MAX_DATA_BYTES, MAX_DETAIL, Rejects
from fednats.transport.bus import Bus, Delivery
from tests.makers import update
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "r"
STREAM = subjects.updates_stream(RUN, "north", "a")
DURABLE = subjects.durable("north", STREAM)
PREFIX = subjects.update(RUN, "north", "a")
HEADS = [subjects.head(PREFIX)]
CHUNKS = (b"first chunk", b"second chunk")
REJECTS = subjects.rejects_stream(RUN, "north")

LOG = structlog.get_logger()


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a", "b")),), leaves=False) as connected:
        yield connected


@pytest.fixture
def inbox(bus: ConnectedBus) -> Inbox:
    return Inbox(
        bus.aggregators["north"],
        lambda site: subjects.updates_stream(RUN, "north", site),
        RUN,
        bus.servers.identity("aggregator", "north"),
        LOG,
    )


@pytest.fixture
def rejects(bus: ConnectedBus) -> Rejects:
    return Rejects(bus.aggregators["north"], RUN, "north", LOG)


def head_of(identity: str) -> Update:
    digests = tuple(wire.digest(chunk) for chunk in CHUNKS)
    payload = Payload(payload_id=identity, n_bytes=sum(map(len, CHUNKS)), digests=digests)
    return update("a").model_copy(update={"update_id": identity, "payload": payload})


async def send(bus: ConnectedBus, head: Update, *, chunks: tuple[bytes, ...] = CHUNKS) -> None:
    await bus.sites["a"].publish_payload(PREFIX, head.payload.payload_id, chunks)
    await announce(bus, head, head.update_id)


async def is_sent(bus: ConnectedBus, head: Update) -> bool:
    """Send a contribution; return whether the stream was there."""
    try:
        await send(bus, head)
    except BusError:
        return False
    return True


async def announce(bus: ConnectedBus, message: Message | bytes, message_id: str) -> None:
    subject = subjects.head(PREFIX)
    data = message if isinstance(message, bytes) else bus.servers.identity("site", "a").sign(subject, message)
    await bus.sites["a"].publish(subject, data, message_id)


async def take(inbox: Inbox, count: int = 1) -> list[Arrived]:
    """Open the next ``count`` deliveries, and leave them unsettled."""
    return [inbox.open(delivery) for delivery in await deliver(inbox, count)]


async def deliver(inbox: Inbox, count: int) -> list[Delivery]:
    """Return ``count`` deliveries of a consumer, which goes on until the test ends, like a daemon's."""
    consuming = inbox.bus.consume(STREAM, DURABLE, HEADS)
    _kept.append(consuming)
    async with asyncio.timeout(30):
        return [await anext(consuming) for _ in range(count)]


_kept: list[Any] = []


@pytest_asyncio.fixture(autouse=True)
async def consumers() -> AsyncIterator[None]:
    yield
    while _kept:
        await _kept.pop().aclose()


async def read(inbox: Inbox, head: Update) -> list[bytes]:
    async with asyncio.timeout(30), aclosing(inbox.chunks(head)) as chunks:
        return [chunk async for chunk in chunks]


async def figures(bus: ConnectedBus) -> dict[str, Any]:
    async with Bus.connect(bus.servers.observer("north"), "observer.north") as observer:
        return await observer._connection.api(f"CONSUMER.INFO.{STREAM}.{DURABLE}")


async def kept(bus: ConnectedBus, sender: str, reason: Reason) -> Reject:
    """Read the newest reject of one sender for one reason, as the region's operator does."""
    async with Bus.connect(bus.servers.observer("north"), "observer.north") as observer:
        record = await observer.last(REJECTS, subjects.reject(RUN, "north", sender, reason.value))
    assert record is not None
    return wire.unpack(record.data, Reject)


async def test_chunks_are_read_without_a_delivery(bus: ConnectedBus, inbox: Inbox) -> None:
    """After a restart, it does not matter when, or whether, a contribution is delivered again."""
    head = head_of("u1")
    await send(bus, head)
    assert await read(inbox, head) == list(CHUNKS)


async def test_a_chunk_that_was_never_sent_is_the_senders_fault(bus: ConnectedBus, inbox: Inbox) -> None:
    head = head_of("u1")
    await send(bus, head, chunks=CHUNKS[:1])
    await take(inbox)
    with pytest.raises(RefusedError, match="missing") as raised:
        await read(inbox, head)
    assert raised.value.reason is Reason.CHECKSUM


async def test_a_chunk_that_differs_is_refused(bus: ConnectedBus, inbox: Inbox) -> None:
    head = head_of("u1")
    await send(bus, head, chunks=(CHUNKS[0], b"another"))
    await take(inbox)
    with pytest.raises(RefusedError, match="differs"):
        await read(inbox, head)


async def test_nothing_is_refused_before_it_is_delivered_here(bus: ConnectedBus, inbox: Inbox) -> None:
    head = head_of("u1")
    await send(bus, head, chunks=CHUNKS[:1])
    with pytest.raises(VanishedError, match="u1"):
        await read(inbox, head)


async def test_what_a_lost_store_had_is_not_refused(bus: ConnectedBus, inbox: Inbox) -> None:
    head = head_of("u1")
    await send(bus, head)
    (arrived,) = await take(inbox)
    assert isinstance(arrived, ContributionArrived)
    await bus.servers.hub.kill()
    await bus.servers.hub.wipe()
    await bus.servers.hub.start()  # the connected services create the streams again
    with pytest.raises(VanishedError, match="u1"):
        await read(inbox, head)
    await until(lambda: is_sent(bus, head_of("u2")))
    with pytest.raises(VanishedError, match="u1"):
        await read(inbox, head)
    await until(lambda: is_sent(bus, head))
    assert await read(inbox, head) == list(CHUNKS)


async def test_every_delivery_of_a_contribution_is_settled(bus: ConnectedBus, inbox: Inbox) -> None:
    head = head_of("u1")
    await send(bus, head)
    await announce(bus, head, "again")
    await announce(bus, head, "and again")
    await take(inbox, 3)
    assert (await figures(bus))["num_ack_pending"] == 3
    await inbox.settle("u1")
    assert (await figures(bus))["num_ack_pending"] == 0
    assert await bus.aggregators["north"].last(STREAM, subjects.chunk(PREFIX, "u1", 0)) is None
    await inbox.settle("u1")  # nothing is left to settle
    await inbox.settle("never heard of")


async def test_what_is_refused_is_kept_with_sender_and_reason_and_never_comes_again(
    bus: ConnectedBus, inbox: Inbox, rejects: Rejects
) -> None:
    garbage = bus.servers.identity("site", "a").signer.sign(subjects.head(PREFIX), b"garbage")
    await announce(bus, garbage, "m1")
    (delivery,) = await deliver(inbox, 1)
    with pytest.raises(RefusedError) as raised:
        inbox.open(delivery)
    identity = inbox.unreadable_id(delivery)
    await inbox.refuse(identity, rejects, raised.value.reason, raised.value.detail)
    assert await kept(bus, "a", Reason.MALFORMED) == Reject(
        run=RUN,
        node="north",
        subject=subjects.head(PREFIX),
        sender="a",
        reason="malformed",
        detail="7 bytes, shorter than a header",
        n_bytes=len(garbage),
        data=garbage,
    )
    found = await figures(bus)
    assert (found["num_ack_pending"], found["num_redelivered"], found["num_pending"]) == (0, 0, 0)


async def test_a_refused_contribution_loses_its_chunks(bus: ConnectedBus, inbox: Inbox, rejects: Rejects) -> None:
    head = head_of("u1")
    await send(bus, head)
    await take(inbox)
    await inbox.refuse("u1", rejects, Reason.TOO_STALE, "version 0 at 30")
    assert await bus.aggregators["north"].last(STREAM, subjects.chunk(PREFIX, "u1", 0)) is None
    assert wire.unpack(unsigned((await kept(bus, "a", Reason.TOO_STALE)).data), Update) == head
    assert (await figures(bus))["num_ack_pending"] == 0


async def test_rejects_are_cut_to_size_and_kept_once(bus: ConnectedBus, rejects: Rejects) -> None:
    data = bytes(MAX_DATA_BYTES + 1000)
    for _ in range(2):  # a daemon that is killed before the delivery is terminated refuses it again
        await rejects.add("s.1", subjects.head(PREFIX), data, Reason.OVERSIZED, "x" * 5000)
    reject = await kept(bus, "a", Reason.OVERSIZED)
    assert (reject.n_bytes, len(reject.data), len(reject.detail)) == (len(data), MAX_DATA_BYTES, MAX_DETAIL)
    info = await bus.aggregators["north"]._connection.api(f"STREAM.INFO.{REJECTS}")
    assert info["state"]["messages"] == 1
    assert (info["config"]["max_bytes"], info["config"]["discard"]) == (2**30, "old")


async def test_only_the_aggregator_writes_rejects_and_no_site_reads_them(bus: ConnectedBus, rejects: Rejects) -> None:
    await rejects.add("s.1", subjects.head(PREFIX), b"garbage", Reason.MALFORMED, "")
    subject = subjects.reject(RUN, "north", "a", "malformed")
    for other in (bus.sites["a"], bus.coordinator, bus.uplinks["north"]):
        with pytest.raises(BusError, match="may not publish"):
            await other.publish(subject, b"forged", "forged")
        with pytest.raises(BusError, match="may not publish"):
            await other.last(REJECTS, subject)
