"""One authenticated connection to one account of a nats-server; services use NATS only through it."""

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
"""How often `Bus.follow` looks for new messages without an announcement."""


@dataclass(frozen=True)
class StoredMessage:
    """One stored message."""

    subject: str
    data: bytes
    sequence: int


class Usage(NamedTuple):
    """How full a stream is."""

    share: float
    """The larger of bytes used and messages used, as a share of the stream's limit: 0 to 1."""
    newest: int
    """The newest sequence number."""


class Bus:
    """One connection; `Bus.connect` opens it, and leaving the context closes it."""

    def __init__(self, opened: Connection, upkeep: Upkeep) -> None:
        self._connection = opened
        self._upkeep = upkeep
        self._consumers: dict[str, Consumer] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: BusSettings, name: str) -> AsyncIterator["Bus"]:
        """Connect; from then on, reconnect for as long as it takes.

        ``name`` must be ``permissions.user_name(role, node)``. It names the connection, and the user's permitted inbox
        prefix follows from it.

        Raises:
            UnreachableError: the server is not reachable within 10 s, or refuses the key.
            ConfigError: the nkey seed file is missing or holds no seed, or ``ca_file`` is not a certificate.
        """
        async with connection(settings, name) as opened, Upkeep(opened) as upkeep:
            yield cls(opened, upkeep)

    @property
    def connected(self) -> bool:
        """Whether the connection is up right now."""
        return self._connection.connected

    @property
    def refusal(self) -> str | None:
        """Why the server now refuses this user; None while it does not."""
        return self._connection.refusal

    async def wait_connected(self) -> None:
        """Wait until the connection is up. Raises BusError if it was closed for good."""
        await self._connection.wait_connected()

    async def wait_away(self) -> None:
        """Wait until the connection breaks, even briefly; return at once while it is down.

        A dead link is noticed within 25 s. Raises BusError if the connection was closed for good.
        """
        await self._connection.wait_away()

    @property
    def max_payload_bytes(self) -> int:
        """Largest ``data`` that may be published: the server's ``max_payload`` less room for headers."""
        return self._connection.client.max_payload - HEADER_ROOM_BYTES

    def need(self, n_bytes: int) -> SizeLimit:
        """Announce, with the pulse, the largest ``data`` that the run publishes; return it with the server's limit."""
        self._upkeep.limit.need(n_bytes + HEADER_ROOM_BYTES)
        return self._upkeep.limit.now

    def limits(self) -> AsyncGenerator[SizeLimit, None]:
        """Yield the size the run needs and the server's limit: now, after each change, and after reconnections.

        The needed size comes from `need`, or from the pulse of the node above. While the server's limit is smaller,
        nothing is copied from the node above.
        """
        return self._upkeep.limit.changes()

    @property
    def sent(self) -> tuple[int, int]:
        """Messages of any kind published since the connection was opened, and the bytes of their payload."""
        counted = self._connection.client.stats
        return counted["out_msgs"], counted["out_bytes"]

    # --- making

    async def ensure_stream(self, spec: StreamSpec) -> bool:
        """Create the stream, or apply changes to it; return whether it was created.

        From now on, if the stream is gone after a reconnection, the bus creates it again (see `recreated`). It also
        keeps copying from the stream's sources.

        Raises:
            BusError: the bus is away, the user lacks permission, or the change is incompatible (the text names it).
        """
        return await self._upkeep.ensure(spec)

    async def ensure_bucket(self, spec: BucketSpec) -> bool:
        """Create the KV bucket, or apply changes to it; returns and raises like `ensure_stream`."""
        return await self._upkeep.ensure(spec)

    async def recreated(self) -> AsyncGenerator[str, None]:
        """Yield the names of ensured streams and buckets that a server lost and that were created again, empty.

        Only one caller may iterate; it restores the content that others need.
        """
        while True:
            yield await self._upkeep.recreated.get()

    # --- sending

    async def publish(self, subject: str, data: bytes, message_id: str, *, fence: Fence | None = None) -> bool:
        """Store a message in the stream of ``subject``; wait, without limit, while the bus is away.

        Return False, and store nothing, if the stream has seen ``message_id`` within its duplicate window.

        Raises:
            BusFullError: the stream is at its limit; nothing is stored.
            FencedError: the lease in ``fence`` is no longer the newest; nothing is stored.
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
        """Publish to current listeners, unstored and unacknowledged. Raises BusError while the bus is away."""
        await self._connection.emit(subject, data)

    async def ask(self, subject: str, question: bytes = b"", timeout_s: float | None = None) -> bytes:
        """Return a service's answer, for example on its `subjects.status`; empty if nobody listens. Raises BusError."""
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
        """Store chunks and return when all are acknowledged.

        Keeps enough unacknowledged to fill the link (at most 16 MiB). Stores the last chunk after all others, so a
        stream that holds it holds the whole payload.

        ``chunks`` begin at number ``first``. ``stored`` is called with the number of chunks acknowledged without a gap,
        counted from 0. To resume, call again with the same chunks. Raises like `publish`.
        """
        await payload.publish(self._connection, prefix, payload_id, chunks, first, stored, fence)

    async def has_chunk(self, prefix: str, payload_id: str, index: int, chunk: bytes) -> bool:
        """Publish one chunk again; return whether the stream already had it. Raises like `publish`."""
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
        """Yield the chunks from number ``first`` on, in order, each checked; wait while the bus is away.

        Holds enough chunks in memory to fill the link (at most 16 MiB), but no more than ``window``.

        Raises:
            RefusedError: (CHECKSUM) a chunk is missing or differs from its digest.
        """
        return payload.read(self._connection, stream, prefix, payload_id, digests, window, first)

    def consume(self, stream: str, durable: str, filters: Sequence[str]) -> AsyncGenerator[Delivery, None]:
        """Yield each unsettled message that matches ``filters``, in order, without end.

        A delivery that is neither acked nor termed is not repeated while this iteration runs (unless the server lost
        the consumer). A new iteration, in this or another process, gets it again within 8 s. A killed server may
        forget its latest acks, so check whether a message is known before reading its payload. When leaving early,
        close the iteration (``contextlib.aclosing``).
        """
        consumer = self._consumers[stream] = Consumer(self._connection, stream, durable, filters)
        return consumer.run()

    def n_unsettled(self, stream: str) -> int | None:
        """Return how many messages of ``stream`` `consume` has not settled, as of up to 30 s ago; None if unknown."""
        return self._consumers[stream].n_unsettled if stream in self._consumers else None

    async def last(self, stream: str, subject: str, *, domain: str | None = None) -> StoredMessage | None:
        """Return the newest message of ``subject``, or None; ``domain`` is that of ``stream`` if it is another one.

        Raises:
            BusError: the stream is missing, or the bus or the link to the domain is away.
        """
        message = await self._connection.direct(stream, subject, domain=domain)
        if message is None:
            return None
        return StoredMessage(subject, message.data, int((message.headers or {}).get("Nats-Sequence", 0)))

    async def first_sequence(self, stream: str) -> int:
        """Return the first sequence number of ``stream``; a lost stream of the same name had only lower numbers.

        Raises:
            BusError: the stream is missing or the bus is away.
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
        """Yield the newest message of each of ``subjects`` (no wildcards), and each newer one.

        May skip a message when a newer one of its subject follows at once. Goes on by itself after a server restart.

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
        """Delete messages of ``subject`` (wildcards allowed) from ``stream`` up to number ``up_to``; return how many.

        Raises BusError.

        In an inbox, purge the chunks and leave the heads: a restarted server resumes copying from the newest message
        of each region.
        """
        until = {} if up_to is None else {"seq": up_to + 1}
        return int((await self._connection.api(f"STREAM.PURGE.{stream}", {"filter": subject, **until}))["purged"])

    # --- buckets

    async def put(self, bucket: str, key: str, value: bytes, *, domain: str | None = None) -> None:
        """Set ``key``, in the bucket of another ``domain`` if given. Raises BusError; does not wait for the bus."""
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
        """Yield the whole bucket now, and again whenever a key is set, deleted or expires."""
        return buckets.Watch(self._connection, bucket).run()

    # --- answering

    async def serve(
        self,
        name: str,
        version: str,
        description: str,
        metadata: Mapping[str, str],
        subject: str,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Run a NATS micro service until the connection closes; its endpoint ``status`` on ``subject`` answers JSON.

        ``subject`` is `subjects.status` of the service; ``version`` is a semantic version.
        """

        async def respond(request: Request) -> None:
            await request.respond(json.dumps(status(), default=str).encode())

        config = ServiceConfig(name=name, version=version, description=description, metadata=dict(metadata))
        service = Service(self._connection.client, config)
        try:
            await cancellable(service.start())
        except nats.errors.FlushTimeoutError:  # the link broke meanwhile; nats-py renews the subscriptions
            self._connection.log.debug("service_not_confirmed", name=name)
        await cancellable(service.add_endpoint(name="status", subject=subject, handler=respond))

    async def answer(self, subject: str, respond: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        """Answer requests on ``subject``, one at a time, until the connection closes.

        No answer is sent when ``respond`` returns None.
        """

        async def heard(message: Msg) -> None:
            answered = await respond(message.data)
            if answered is not None and message.reply:
                await self._connection.emit(message.reply, answered)

        await self._connection.subscribe(subject, heard)

    # --- internals

    async def _wakes(self, subjects: Sequence[str], interval_s: float) -> AsyncIterator[None]:
        """Yield now, after each message on ``subjects``, after reconnections, and at least every ``interval_s``."""
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
