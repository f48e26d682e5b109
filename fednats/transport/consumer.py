"""A durable pull consumer that survives restarts of its server.

nats-py's own pull subscription goes silent when the server restarts while a fetch is under way (nats.py issue 504).
Here the server sends a heartbeat while it has no messages. When heartbeats stop, after a reconnection, and when the
server ends the request, this creates the consumer again if need be and sends a new request.

The server delivers a message again unless it hears for `ACK_WAIT_S` that the message is in progress. This consumer
reports progress for everything it has delivered, so a delivery may stay unsettled for hours, yet comes again seconds
after a crash.

The server delivers at most `MAX_UNSETTLED` messages before some are settled. With a consumer per sender, this bounds
the work that one sender can cause, and no sender waits for another. Settled messages, except the newest, are purged
from the stream now and then; otherwise they would fill a stream with a message limit.
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
"""A fast site that waits for others has one unsettled message per version; the rest wait in its stream, in order."""

DROPPED_AT_ONCE = 256
"""How far, in sequence numbers, the settled part of a stream grows before it is purged."""

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
    """One message of a durable consumer; after a restart it comes again, until `ack` or `term`."""

    def __init__(self, consumer: "Consumer", message: Msg) -> None:
        self.data: bytes = message.data
        self.subject: str = message.subject
        self.stream: str = message.metadata.stream
        self.stream_sequence: int = message.metadata.sequence.stream
        self.redelivered: bool = message.metadata.num_delivered > 1
        self._consumer = consumer
        self._reply: str = message.reply

    async def ack(self) -> None:
        """Settle the message as done, and wait until the server has recorded that.

        Raises:
            BusError: the bus is away for 30 s; the message comes again, as after a crash.
        """
        await self._settle(b"+ACK")

    async def term(self) -> None:
        """Settle the message as refused; it never comes again. Raises like `ack`."""
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
        """Tell the server that the message is still in progress."""
        await self._consumer.connection.emit(self._reply, b"+WPI")

    def renew(self, message: Msg) -> None:
        """Take the newer reply subject of a message that came again while in progress."""
        self._reply = message.reply


class Consumer:
    """The state of one iteration over a durable consumer; `Bus.consume` makes it."""

    def __init__(self, connection: Connection, stream: str, durable: str, filters: Sequence[str]) -> None:
        self.connection = connection
        self.unsettled: dict[int, Delivery] = {}
        self.n_unsettled: int | None = None
        """Unsettled messages, delivered or not, at the last request; None while the server does not answer."""
        self._stream = stream
        self._durable = durable
        self._filters = list(filters)
        self._ready: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._left = 0
        self._inbox = connection.client.new_inbox()
        self._asked = 0
        self._heard = 0.0
        self._dropped_below = 0
        self._newest: dict[str, int] = {}
        """By subject, the number of its newest message that was delivered here."""

    async def run(self) -> AsyncGenerator[Delivery, None]:
        """Yield deliveries without end."""
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
        """Return the next delivery, or None when the caller should check whether a new request is due."""
        try:
            async with asyncio.timeout(_HEARTBEAT_S):
                return await self._ready.get()
        except TimeoutError:
            if asyncio.get_running_loop().time() - self._heard > _SILENCE_S:
                self._left = 0
            return None

    async def _ask(self) -> None:
        """Create the consumer if need be and request a batch; repeat until that succeeds."""
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
        """Purge the messages before ``floor``, up to which all are settled; keep the newest message of each subject.

        A region looks for its newest sum in the inbox of the node above before it sends the next one.
        """
        if floor - self._dropped_below < DROPPED_AT_ONCE:
            return
        for subject, newest in self._newest.items():
            body = {"filter": subject, "seq": min(floor, newest)}
            await self.connection.api(f"STREAM.PURGE.{self._stream}", body)
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
        self._newest[message.subject] = sequence
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
                pass  # the connection logs it
            except BusError as error:
                self.connection.log.warning("not_said_to_be_in_work", stream=self._stream, error=str(error))
