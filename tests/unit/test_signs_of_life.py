"""What says again and again that a side is alive goes on after the bus has refused it once."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import structlog
from nats.aio.msg import Msg

from fednats.errors import BusError
from fednats.transport import consumer, upkeep
from fednats.transport.connection import Connection
from fednats.transport.streams import Limits, StreamSpec


class Refusing:
    """A connection that refuses the first message to each subject, and keeps what it is asked to listen for."""

    def __init__(self) -> None:
        self.log = structlog.get_logger()
        self.client = self
        self.max_payload = 2**20
        self.api_prefix = "$JS.API"
        self.wakers: set[Callable[[], None]] = set()
        self.emitted: Counter[str] = Counter()
        self.refused_and_said_again = asyncio.Event()
        self.deliver: Callable[[Msg], Awaitable[None]]

    def new_inbox(self) -> str:
        return "_INBOX"

    async def subscribe(self, _subject: str, callback: Callable[[Msg], Awaitable[None]]) -> None:
        self.deliver = callback

    async def unsubscribe(self, _subscription: None) -> None:
        pass

    async def wait_connected(self) -> None:
        await asyncio.sleep(0)

    async def api(self, _verb: str, _body: object = None, prefix: str = "") -> dict[str, Any]:  # noqa: ARG002
        consumer = {"ack_floor": {"stream_seq": 0}, "num_pending": 0, "num_ack_pending": 0}
        return {"config": SPEC.config(self.max_payload), **consumer}

    async def emit(self, subject: str, _data: bytes, reply: str = "") -> None:
        self.emitted[subject] += 1
        if reply:
            return  # of the consumer that asks for a batch
        if self.emitted[subject] == 1:
            raise BusError(f"{subject}: outbound buffer limit exceeded")
        self.refused_and_said_again.set()


SPEC = StreamSpec("S", Limits(1, 1, 1, 1), "new", ("s",), pulse="pulse.north")
IN_WORK = "$JS.ACK.S.durable.1.7.1.1.0"


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    monkeypatch.setattr(consumer, "IN_WORK_INTERVAL_S", 0.001)
    monkeypatch.setattr(upkeep, "PULSE_INTERVAL_S", 0.001)
    return Refusing()


async def test_a_delivery_is_in_work_also_after_that_could_not_be_said(refusing: Refusing) -> None:
    connection = cast("Connection", refusing)
    deliveries = consumer.Consumer(connection, "S", "durable", ["s"]).run()
    first = asyncio.ensure_future(anext(deliveries))
    async with asyncio.timeout(5):
        while not refusing.emitted:  # noqa: ASYNC110 - until it has asked
            await asyncio.sleep(0)
        await refusing.deliver(Msg(_client=cast("Any", None), subject="s", reply=IN_WORK, data=b"update"))
        assert (await first).data == b"update"
        await refusing.refused_and_said_again.wait()
    await deliveries.aclose()
    assert refusing.emitted[IN_WORK] >= 2


async def test_a_side_is_heard_also_after_its_pulse_could_not_be_sent(refusing: Refusing) -> None:
    async with upkeep.Upkeep(cast("Connection", refusing)) as kept, asyncio.timeout(5):
        await kept.ensure(SPEC)
        await refusing.refused_and_said_again.wait()
    assert refusing.emitted["pulse.north"] >= 2
