"""One authenticated connection to one account of a nats-server: all that the services see of NATS."""

import asyncio
import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import nats.errors
from nats.aio.msg import Msg
from nats.micro.request import Request
from nats.micro.service import Service, ServiceConfig

from fednats import subjects as names
from fednats.config import BusSettings
from fednats.transport import bucket as buckets
from fednats.transport import payload
from fednats.transport.answer import AwayError, NobodyError, answer
from fednats.transport.cancellation import cancellable
from fednats.transport.connection import Connection, connection
from fednats.transport.consumer import Consumer, Delivery
from fednats.transport.fence import Fence
from fednats.transport.message_limit import HEADER_ROOM_BYTES, SizeLimit
from fednats.transport.streams import BucketSpec, StreamSpec
from fednats.transport.upkeep import Upkeep

__all__ = ["Bus", "Delivery", "StoredMessage"]

POLL_INTERVAL_S = 5.0
"""How often `Bus.follow` looks although nothing was announced."""


@dataclass(frozen=True)
class StoredMessage:
    """One stored message."""

    subject: str
    data: bytes
    sequence: int


class Usage(NamedTuple):
    """How full a stream is."""

    share: float
    """Of its bytes or its messages, whichever is more: 0 to 1."""
    newest: int
    """The newest sequence number."""


class Bus:
    """One connection; `Bus.connect` opens it, leaving its context closes it."""

    def __init__(self, opened: Connection, upkeep: Upkeep) -> None:
        self._connection = opened
        self._upkeep = upkeep
        self._consumers: dict[str, Consumer] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: BusSettings, name: str) -> AsyncIterator["Bus"]:
        """Connect; reconnects for ever afterwards.

        ``name`` must be ``permissions.user_name(role, node)``: it names the connection and is the inbox prefix that
        the user may listen on.

        Raises:
            UnreachableError: not reachable within 10 s, or refused (authorization).
            ConfigError: the nkey seed file is missing or not a seed, or ``ca_file`` is no certificate.
        """
        async with connection(settings, name) as opened, Upkeep(opened) as upkeep:
            yield cls(opened, upkeep)

    @property
    def connected(self) -> bool:
        """Whether the connection stands right now."""
        return self._connection.connected

    @property
    def refusal(self) -> str | None:
        """Why the server does not let this user in any more, None as long as it does."""
        return self._connection.refusal

    async def wait_connected(self) -> None:
        """Wait until the connection stands. Raises BusError if it was closed for good."""
        await self._connection.wait_connected()

    async def wait_away(self) -> None:
        """Wait until the connection breaks, also if it stands again at once; return at once while it is broken.

        A dead link is noticed after at most 25 s. Raises BusError if the connection was closed for good.
        """
        await self._connection.wait_away()

    @property
    def max_payload_bytes(self) -> int:
        """Largest ``data`` that may be published: what this server takes in a message, less room for headers."""
        return self._connection.client.max_payload - HEADER_ROOM_BYTES

    def need(self, n_bytes: int) -> SizeLimit:
        """Say how large a ``data`` the run publishes; it goes on with the pulse. Return it beside what the server takes."""
        self._upkeep.limit.need(n_bytes + HEADER_ROOM_BYTES)
        return self._upkeep.limit.now

    def limits(self) -> AsyncGenerator[SizeLimit, None]:
        """Yield what the run needs and what the server takes, now, whenever either has changed, and after reconnections.

        What is needed is what `need` was told, or what the node above says. Nothing is copied from there while the server
        takes less.
        """
        return self._upkeep.limit.changes()

    @property
    def sent(self) -> tuple[int, int]:
        """Messages published over this connection since it was opened, and bytes of their payload, whatever they were."""
        counted = self._connection.client.stats
        return counted["out_msgs"], counted["out_bytes"]

    # --- making

    async def ensure_stream(self, spec: StreamSpec) -> bool:
        """Create the stream, or apply what changed; return whether it was created, as on a server that lost its store.

        From now on the bus makes it anew after a reconnection, should it have vanished (see `recreated`), and keeps the
        copying of its sources going.

        Raises:
            BusError: the bus is away, not permitted, or an incompatible change (the text names it).
        """
        return await self._upkeep.ensure(spec)

    async def ensure_bucket(self, spec: BucketSpec) -> bool:
        """Create the KV bucket, or apply what changed; returns and raises as `ensure_stream` does."""
        return await self._upkeep.ensure(spec)

    async def recreated(self) -> AsyncGenerator[str, None]:
        """Yield the names of ensured streams and buckets that were gone after a reconnection and were made anew, empty.

        For one reader, that puts back what others need of them.
        """
        while True:
            yield await self._upkeep.recreated.get()

    # --- sending

    async def publish(self, subject: str, data: bytes, message_id: str, *, fence: Fence | None = None) -> bool:
        """Store a message in the stream of ``subject``; waits, for ever, while the bus is away.

        A ``message_id`` that the stream has seen within its duplicate window is not stored again: this returns False.

        Raises:
            BusFullError: the stream is at its limit; nothing is stored.
            FencedError: the lease in ``fence`` is not the newest any more; nothing is stored.
            BusError: not permitted, too large, no stream takes the subject, or the connection was closed for good.
        """
        headers = {"Nats-Msg-Id": message_id, **(fence.headers if fence else {})}
        while True:
            try:
                message = await self._connection.request(subject, data, headers)
            except AwayError:
                await self._connection.wait_connected()
            else:
                return not answer(message.data, subject).get("duplicate", False)

    async def emit(self, subject: str, data: bytes) -> None:
        """Tell whoever listens now; nothing is stored, nobody acknowledges. Raises BusError while the bus is away."""
        await self._connection.emit(subject, data)

    async def ask(self, subject: str, question: bytes = b"", timeout_s: float | None = None) -> bytes:
        """Return a service's answer, such as its `subjects.status`; empty if nobody is there. Raises BusError."""
        try:
            return bytes((await self._connection.request(subject, question, timeout_s=timeout_s)).data)
        except NobodyError:
            return b""

    async def publish_payload(
        self,
        prefix: str,
        payload_id: str,
        chunks: Iterable[bytes] | AsyncIterable[bytes],
        *,
        first: int = 0,
        stored: Callable[[int], Awaitable[None]] | None = None,
        fence: Fence | None = None,
    ) -> None:
        """Store chunks, as many unacknowledged as fill the link (at most 16 MiB); returns when all are acknowledged.

        The last one is stored after all others: where it is, the payload is whole.

        ``chunks`` begin with number ``first``; ``stored`` is told how many of all are acknowledged without a gap, as they
        come. Call it again with the same chunks to resume. Raises as `publish` does.
        """
        await payload.publish(self._connection, prefix, payload_id, chunks, first, stored, fence)

    async def has_chunk(self, prefix: str, payload_id: str, index: int, chunk: bytes) -> bool:
        """Offer one chunk again: whether the stream knew it. If not it is stored now. Raises as `publish` does."""
        return not await self.publish(
            names.chunk(prefix, payload_id, index), chunk, payload.chunk_id(payload_id, index)
        )

    # --- reading

    def read_payload(
        self,
        stream: str,
        prefix: str,
        payload_id: str,
        digests: Sequence[bytes],
        window: int | None = None,
        *,
        first: int = 0,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the chunks from number ``first`` on in order, each checked. Waits while the bus is away.

        As many are in memory as fill the link (at most 16 MiB), but no more than ``window`` chunks.

        Raises:
            RefusedError: (CHECKSUM) a chunk is missing or differs from its digest.
        """
        return payload.read(self._connection, stream, prefix, payload_id, digests, window, first)

    def consume(self, stream: str, durable: str, filters: Sequence[str]) -> AsyncGenerator[Delivery, None]:
        """Yield each message matching ``filters`` that is not settled yet, in order, for ever.

        A delivery that is neither acked nor termed is not repeated while this iteration runs (unless the server lost
        the consumer); a new iteration, in this or another process, gets it again after at most 8 s. A server that is
        killed may forget the acks of its last moments: look whether a message is known before reading its payload.
        Close the iteration (``contextlib.aclosing``) when leaving it early.
        """
        consumer = self._consumers[stream] = Consumer(self._connection, stream, durable, filters)
        return consumer.run()

    def n_unsettled(self, stream: str) -> int | None:
        """Return how many messages that `consume` takes of ``stream`` were not settled half a minute ago; None: not known."""
        return self._consumers[stream].n_unsettled if stream in self._consumers else None

    async def last(self, stream: str, subject: str, *, domain: str | None = None) -> StoredMessage | None:
        """Return the newest message of ``subject``, or None; ``stream`` is in another ``domain`` if given.

        Raises:
            BusError: the stream, the link to its domain, or the bus is away.
        """
        message = await self._connection.direct(stream, subject, domain=domain)
        if message is None:
            return None
        return StoredMessage(subject, message.data, int((message.headers or {}).get("Nats-Sequence", 0)))

    async def first_sequence(self, stream: str) -> int:
        """Return the number that ``stream`` began with; those of a lost stream of its name are below it.

        Raises:
            BusError: the stream or the bus is away.
        """
        info = await self._connection.api(f"STREAM.INFO.{stream}")
        return int(info["config"].get("first_seq", 1))

    async def usage(self, stream: str) -> Usage:
        """Return how full ``stream`` is. Raises BusError."""
        info = await self._connection.api(f"STREAM.INFO.{stream}")
        config, state = info["config"], info["state"]
        of_bytes = state["bytes"] / config["max_bytes"] if config["max_bytes"] > 0 else 0.0
        of_messages = state["messages"] / config["max_msgs"] if config["max_msgs"] > 0 else 0.0
        return Usage(max(of_bytes, of_messages), int(state["last_seq"]))

    async def follow(self, stream: str, subjects: Sequence[str]) -> AsyncGenerator[StoredMessage, None]:
        """Yield the newest message of each of ``subjects`` (no wildcards), and again whenever there is a newer one.

        Messages overtaken by a newer one of the same subject may be skipped. Survives restarts by itself.

        Raises:
            BusError: not permitted, or the connection was closed for good.
        """
        seen: dict[str, tuple[int, bytes]] = {}
        async for _ in self._wakes(subjects, POLL_INTERVAL_S):
            for subject in subjects:
                try:
                    record = await self.last(stream, subject)
                except (AwayError, NobodyError) as error:
                    self._connection.log.debug("follow_waits", stream=stream, error=str(error))
                    break
                if record is not None and seen.get(subject) != (record.sequence, record.data):
                    seen[subject] = (record.sequence, record.data)
                    yield record

    async def purge(self, stream: str, subject: str, *, up_to: int | None = None) -> int:
        """Delete the messages of ``subject`` (wildcards allowed) from ``stream``, up to that number; return how many.

        Raises BusError.

        In an inbox purge the chunks and leave the heads: by the newest message of each region a server that starts
        again knows how far it had come.
        """
        until = {} if up_to is None else {"seq": up_to + 1}
        return int((await self._connection.api(f"STREAM.PURGE.{stream}", {"filter": subject, **until}))["purged"])

    # --- buckets

    async def put(self, bucket: str, key: str, value: bytes, *, domain: str | None = None) -> None:
        """Set ``key``, in the bucket of another ``domain`` if given. Raises BusError, at once while the bus is away."""
        subject = f"$KV.{bucket}.{key}"
        message = await self._connection.request(subject if domain is None else f"$JS.{domain}.API.{subject}", value)
        answer(message.data, f"{bucket}.{key}")

    async def get(self, bucket: str, key: str) -> bytes | None:
        """Return the value of ``key``, or None. Raises BusError."""
        return await buckets.read(self._connection, bucket, key)

    async def entries(self, bucket: str) -> Mapping[str, bytes]:
        """Return all keys with their values. Raises BusError."""
        return await buckets.entries(self._connection, bucket)

    def watch(self, bucket: str) -> AsyncGenerator[Mapping[str, bytes], None]:
        """Yield the whole bucket, and again whenever something in it was set, deleted or has expired."""
        return buckets.Watch(self._connection, bucket).run()

    # --- being seen

    async def serve(
        self,
        name: str,
        version: str,
        description: str,
        metadata: Mapping[str, str],
        subject: str,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Be a NATS micro service until the connection closes; its endpoint ``status`` on ``subject`` answers JSON.

        ``subject`` is `subjects.status` of the service; ``version`` is a semantic version.
        """

        async def respond(request: Request) -> None:
            await request.respond(json.dumps(status(), default=str).encode())

        config = ServiceConfig(name=name, version=version, description=description, metadata=dict(metadata))
        service = Service(self._connection.client, config)
        try:
            await cancellable(service.start())
        except nats.errors.FlushTimeoutError:  # the link broke meanwhile: what it subscribed to is renewed
            self._connection.log.debug("service_not_confirmed", name=name)
        await cancellable(service.add_endpoint(name="status", subject=subject, handler=respond))

    async def answer(self, subject: str, respond: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        """Answer questions on ``subject``, one after the other, until the connection closes.

        Nothing is said where ``respond`` returns None.
        """

        async def heard(message: Msg) -> None:
            answered = await respond(message.data)
            if answered is not None and message.reply:
                await self._connection.emit(message.reply, answered)

        await self._connection.subscribe(subject, heard)

    # --- inside

    async def _wakes(self, subjects: Sequence[str], interval_s: float) -> AsyncIterator[None]:
        """Yield now, whenever something is announced on ``subjects``, after reconnections, and every ``interval_s``."""
        event = asyncio.Event()
        event.set()

        async def wake(_message: Msg) -> None:
            event.set()

        subscriptions = [await self._connection.subscribe(subject, wake) for subject in subjects]
        self._connection.wakers.add(event.set)
        try:
            while True:
                try:
                    async with asyncio.timeout(interval_s):
                        await event.wait()
                except TimeoutError:
                    await self._connection.wait_connected()
                event.clear()
                yield
        finally:
            self._connection.wakers.discard(event.set)
            for subscription in subscriptions:
                await self._connection.unsubscribe(subscription)
