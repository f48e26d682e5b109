"""A durable pull consumer that survives what happens to its server.

nats-py's own pull subscription goes silent when the server restarts while a fetch is under way (nats.py issue 504).
Here the server sends a heartbeat while it has nothing; when that stays away, after a reconnection, and when the server
says that it gave the request up, the consumer is ensured again and asked again.

An unsettled delivery comes again when nobody says for `ACK_WAIT_S` that it is still in work. This says so for all that
it has handed out, so a delivery may stay unsettled for hours, and comes again seconds after a crash.

The server hands out no more than `MAX_UNSETTLED` that are not settled. With a consumer for each sender that is a bound on
what one sender can have in work here, and no sender waits for another's. What was settled is dropped from the stream now and
then, all but the newest: a stream whose messages are counted would fill up with it.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence

from nats.aio.msg import Msg
from nats.errors import NotJSMessageError

from fednats.errors import BusError
from fednats.transport.answer import AwayError
from fednats.transport.cancellation import end
from fednats.transport.connection import Connection

ACK_WAIT_S = 8.0
IN_WORK_INTERVAL_S = 2.5
MAX_UNSETTLED = 64
"""A quick site that waits for others has one for each version; more wait in its stream, in order."""

DROPPED_AT_ONCE = 256
"""Sequence numbers by which the settled part of a stream grows before it is dropped."""

SETTLE_TIMEOUT_S = 30.0

_BATCH = MAX_UNSETTLED
_EXPIRES_S = 30.0
_HEARTBEAT_S = 2.0
_SILENCE_S = 5.0
_PAUSE_S = 0.2
_NANOSECONDS = 10**9
_RENEW = {"404", "408"}
_HEARTBEAT = "100"


class Delivery:
    """One message of a durable consumer; it comes again, after a restart, until `ack` or `term`."""

    def __init__(self, consumer: "Consumer", message: Msg) -> None:
        self.data: bytes = message.data
        self.subject: str = message.subject
        self.stream: str = message.metadata.stream
        self.stream_sequence: int = message.metadata.sequence.stream
        self.redelivered: bool = message.metadata.num_delivered > 1
        self._consumer = consumer
        self._reply: str = message.reply

    async def ack(self) -> None:
        """Settle it, and wait until the server has written that down.

        Raises:
            BusError: the bus is away for 30 s; the message comes again, as it would have after a crash.
        """
        await self._settle(b"+ACK")

    async def term(self) -> None:
        """Settle it as refused: it never comes again. Raises as `ack` does."""
        await self._settle(b"+TERM")

    async def _settle(self, verb: bytes) -> None:
        if self._consumer.unsettled.get(self.stream_sequence) is not self:
            return
        connection = self._consumer.connection
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while True:
                    try:
                        await connection.request(self._reply, verb)
                        break
                    except AwayError:
                        await connection.wait_connected()
        except TimeoutError:
            raise BusError(f"{self.subject}: not settled, the bus is away") from None
        self._consumer.unsettled.pop(self.stream_sequence, None)

    async def in_work(self) -> None:
        """Say that it is still being worked on."""
        await self._consumer.connection.emit(self._reply, b"+WPI")

    def renew(self, message: Msg) -> None:
        """Take the newest reply subject of a delivery that came again although it is still in work."""
        self._reply = message.reply


class Consumer:
    """The state of one iteration over a durable consumer; made by `consume`."""

    def __init__(self, connection: Connection, stream: str, durable: str, filters: Sequence[str]) -> None:
        self.connection = connection
        self.unsettled: dict[int, Delivery] = {}
        self.n_unsettled: int | None = None
        """Messages that are not settled, delivered or not, when the server was asked last; None while it does not answer."""
        self._stream = stream
        self._durable = durable
        self._filters = list(filters)
        self._ready: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._left = 0
        self._inbox = connection.client.new_inbox()
        self._asked = 0
        self._heard = 0.0
        self._dropped_below = 0

    async def run(self) -> AsyncGenerator[Delivery, None]:
        """Yield deliveries for ever."""
        subscription = await self.connection.subscribe(f"{self._inbox}.*", self._on_message)
        self.connection.wakers.add(self._restart)
        in_work = asyncio.create_task(self._keep_in_work(), name=f"in_work {self._durable}")
        try:
            while True:
                if self._left <= 0:
                    await self._ask()
                delivery = await self._next()
                if delivery is not None and self.unsettled.get(delivery.stream_sequence) is delivery:
                    yield delivery
        finally:
            self.connection.wakers.discard(self._restart)
            await end(in_work)
            await self.connection.unsubscribe(subscription)

    async def _next(self) -> Delivery | None:
        """Return the next delivery, or None when it is time to see whether to ask again."""
        try:
            async with asyncio.timeout(_HEARTBEAT_S):
                return await self._ready.get()
        except TimeoutError:
            if asyncio.get_running_loop().time() - self._heard > _SILENCE_S:
                self._left = 0
            return None

    async def _ask(self) -> None:
        """Make sure that the consumer is there, and ask it for a batch; again until that went well."""
        while True:
            try:
                await self._ensure()
                request = {
                    "batch": _BATCH,
                    "expires": int(_EXPIRES_S * _NANOSECONDS),
                    "idle_heartbeat": int(_HEARTBEAT_S * _NANOSECONDS),
                }
                self._asked += 1
                self._left = _BATCH
                self._heard = asyncio.get_running_loop().time()
                subject = f"{self.connection.api_prefix}.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}"
                await self.connection.emit(subject, json.dumps(request).encode(), reply=f"{self._inbox}.{self._asked}")
            except BusError as error:
                self.n_unsettled = None
                await self.connection.wait_connected()
                self.connection.log.warning("consumer_waits", stream=self._stream, error=str(error))
                await asyncio.sleep(_PAUSE_S)
            else:
                return

    async def _ensure(self) -> None:
        config = {
            "durable_name": self._durable,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(ACK_WAIT_S * _NANOSECONDS),
            "max_ack_pending": MAX_UNSETTLED,
            "max_deliver": -1,
            "replay_policy": "instant",
            "filter_subjects": self._filters,
        }
        info = await self.connection.api(
            f"CONSUMER.CREATE.{self._stream}.{self._durable}", {"stream_name": self._stream, "config": config}
        )
        self.n_unsettled = int(info["num_pending"]) + int(info["num_ack_pending"])
        await self._drop_settled(int(info["ack_floor"]["stream_seq"]))

    async def _drop_settled(self, floor: int) -> None:
        """Drop what was settled before the message ``floor``, which stays: all up to it are settled."""
        if floor - self._dropped_below < DROPPED_AT_ONCE:
            return
        for subject in self._filters:
            await self.connection.api(f"STREAM.PURGE.{self._stream}", {"filter": subject, "seq": floor})
        self._dropped_below = floor

    async def _on_message(self, message: Msg) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            sequence = message.metadata.sequence.stream
        except NotJSMessageError:
            if message.subject == f"{self._inbox}.{self._asked}":
                self._on_status(message.headers or {})
            return
        self._left -= 1
        known = self.unsettled.get(sequence)
        if known is not None:
            known.renew(message)
            return
        delivery = Delivery(self, message)
        self.unsettled[sequence] = delivery
        self._ready.put_nowait(delivery)

    def _on_status(self, headers: Mapping[str, str]) -> None:
        status = headers.get("Status")
        if status == _HEARTBEAT:
            return
        if status not in _RENEW:
            self.connection.log.info(
                "consumer_asks_again", stream=self._stream, status=status, text=headers.get("Description")
            )
        self._restart()

    def _restart(self) -> None:
        self._left = 0
        self._ready.put_nowait(None)

    async def _keep_in_work(self) -> None:
        while True:
            await asyncio.sleep(IN_WORK_INTERVAL_S)
            try:
                for delivery in tuple(self.unsettled.values()):
                    await delivery.in_work()
            except AwayError:
                pass  # the connection says so
            except BusError as error:
                self.connection.log.warning("not_said_to_be_in_work", stream=self._stream, error=str(error))
