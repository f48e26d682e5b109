"""A region's sums, over a link that takes them when the test says so."""

import asyncio

import structlog

from fednats import subjects
from fednats.errors import BusError
from fednats.services.aggregator.above import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Above
from fednats.services.aggregator.sent_sums import KEPT_BYTES, KEPT_SUMS, SentSums
from fednats.transport.bus import StoredMessage

RUN, REGION, ABOVE = "run", "north", "hub"
PREFIX = subjects.aggregate(RUN, REGION)
HEAD = subjects.head(PREFIX)


class Uplink:
    """A region's stream of sums, what the node above has copied of it, and whether the link to it stands."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.payloads: set[str] = set()
        self.n_taken = 0
        self.linked = True

    def publish(self, name: str) -> None:
        self.sent.append(name)
        self.payloads.add(name)

    async def last(self, stream: str, subject: str, *, domain: str | None = None) -> StoredMessage | None:
        assert subject == HEAD
        if domain is None:
            assert stream == subjects.aggregates_stream(RUN, REGION)
            heads = self.sent
        else:
            assert (stream, domain) == (subjects.inbox_stream(RUN, ABOVE, REGION), ABOVE)
            if not self.linked:
                raise BusError("nobody there")
            heads = self.sent[: self.n_taken]
        return StoredMessage(subject, heads[-1].encode(), len(heads)) if heads else None

    async def purge(self, stream: str, subject: str) -> None:
        assert stream == subjects.aggregates_stream(RUN, REGION)
        self.payloads = {name for name in self.payloads if subjects.chunks(PREFIX, name) != subject}

    def take(self) -> None:
        """Copy the next sum, as the link does; what is gone cannot be copied any more."""
        assert self.sent[self.n_taken] in self.payloads
        self.n_taken += 1


def sums(uplink: Uplink, stopping: asyncio.Event | None = None) -> SentSums:
    log = structlog.get_logger()
    above = Above(uplink, RUN, REGION, ABOVE, stopping or asyncio.Event(), log)  # type: ignore[arg-type]
    return SentSums(uplink, RUN, REGION, above, log)  # type: ignore[arg-type]


async def send(sent: SentSums, uplink: Uplink, name: str, n_bytes: int = 1) -> None:
    assert await sent.all_taken()
    await sent.make_room()
    uplink.publish(name)
    sent.add(name, n_bytes)


async def test_the_next_sum_waits_until_the_node_above_has_the_one_before() -> None:
    uplink = Uplink()
    sent = sums(uplink)
    await send(sent, uplink, "s0")
    uplink.linked = False
    sending = asyncio.create_task(send(sent, uplink, "s1"))
    await asyncio.sleep(3 * SHORTEST_PAUSE_S)
    uplink.linked = True
    await asyncio.sleep(3 * SHORTEST_PAUSE_S)
    assert uplink.sent == ["s0"]
    uplink.take()
    await asyncio.wait_for(sending, LONGEST_PAUSE_S)
    assert uplink.sent == ["s0", "s1"]


async def test_a_slow_link_finds_every_sum_whole_and_old_ones_are_dropped() -> None:
    uplink = Uplink()
    sent = sums(uplink)
    for number in range(3 * KEPT_SUMS):
        await send(sent, uplink, f"s{number}")
        uplink.take()
    assert uplink.payloads == set(uplink.sent[-KEPT_SUMS - 1 :])


async def test_after_a_restart_the_same_are_dropped() -> None:
    uplink = Uplink()
    before = sums(uplink)
    for number in range(KEPT_SUMS + 1):
        await send(before, uplink, f"s{number}")
        uplink.take()
    after = sums(uplink)
    for name in uplink.sent:  # as its journal says
        after.add(name, 1)
    await send(after, uplink, "next")
    assert uplink.payloads == {*uplink.sent[-KEPT_SUMS - 1 :]}


async def test_large_sums_leave_room_for_the_next() -> None:
    uplink = Uplink()
    sent = sums(uplink)
    for number in range(5):
        await send(sent, uplink, f"s{number}", KEPT_BYTES // 2)
        uplink.take()
    assert uplink.payloads == {"s2", "s3", "s4"}


async def test_sums_that_the_server_lost_are_not_waited_for() -> None:
    uplink = Uplink()
    sent = sums(uplink)
    await send(sent, uplink, "s0")
    uplink.sent.clear()
    await send(sent, uplink, "s1")
    assert uplink.sent == ["s1"]


async def test_a_daemon_that_is_told_to_stop_does_not_wait() -> None:
    uplink, stopping = Uplink(), asyncio.Event()
    sent = sums(uplink, stopping)
    await send(sent, uplink, "s0")
    stopping.set()
    assert not await sent.all_taken()
