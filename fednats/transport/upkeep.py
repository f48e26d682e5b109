"""Keep the streams and buckets of a bus in existence and copied, even after a server lost its store."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import replace
from types import TracebackType
from typing import Self

from fednats.errors import BusError
from fednats.transport.answer import AwayError, NoRoomError, NoStreamError
from fednats.transport.cancellation import end
from fednats.transport.connection import Connection
from fednats.transport.copying import PULSE_INTERVAL_S, Copying
from fednats.transport.message_limit import MessageLimit
from fednats.transport.streams import BucketSpec, StreamSpec

RETRY_S = 1.0


class Upkeep:
    """Streams and buckets that were ensured on one connection; an async context manager."""

    def __init__(self, connection: Connection) -> None:
        self.recreated: asyncio.Queue[str] = asyncio.Queue()
        """Names of streams and buckets that were created again after a reconnection."""
        self.limit = MessageLimit(connection)
        self._connection = connection
        self._specs: dict[str, StreamSpec | BucketSpec] = {}
        self._reconnected = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._connection.wakers.add(self._reconnected.set)
        self._start("restore streams", self._restore())
        self._start("pulse", self._pulse())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.wakers.discard(self._reconnected.set)
        await end(*self._tasks.values())

    async def ensure(self, spec: StreamSpec | BucketSpec) -> bool:
        """Create or update ``spec``, now and after every reconnection; return whether it was created now."""
        created = await self._make(spec)
        self._specs[spec.name] = spec
        if isinstance(spec, StreamSpec) and spec.sources:
            self._start(f"copy {spec.name}", Copying(self._connection, spec, self.limit).run())
        return created

    async def _make(self, spec: StreamSpec | BucketSpec) -> bool:
        try:
            return await self._made(spec)
        except NoRoomError as error:
            raise BusError(
                f"{error}: {spec.name} may take up to {spec.n_bytes / 2**30:.1f} GiB, and with the other streams that is more"
                " than the server may store; raise bus_max_store in its server.conf (bus/README.md says how much its"
                " streams need) and start it again: it is a limit, and takes no disk by itself"
            ) from error

    async def _made(self, spec: StreamSpec | BucketSpec) -> bool:
        if isinstance(spec, StreamSpec) and self.limit.now.too_small:
            spec = replace(spec, sources=())
        wanted = spec.config(self._connection.client.max_payload)
        name, api = wanted["name"], spec.api if isinstance(spec, StreamSpec) else None
        try:
            current = (await self._connection.api(f"STREAM.INFO.{name}", prefix=api))["config"]
        except NoStreamError:
            # Begin above all sequence numbers that a stream of this name ever had, so that old numbers mislead nobody.
            await self._connection.api(f"STREAM.CREATE.{name}", {**wanted, "first_seq": time.time_ns() // 1000}, api)
            self._connection.log.info("stream_created", stream=name)
            return True
        if any(
            value != current.get(key, type(value)()) for key, value in wanted.items()
        ):  # the server leaves out empty values
            await self._connection.api(f"STREAM.UPDATE.{name}", {**current, **wanted}, api)
            self._connection.log.info("stream_updated", stream=name)
        return False

    async def _restore(self) -> None:
        while True:
            await self._reconnected.wait()
            self._reconnected.clear()
            for spec in tuple(self._specs.values()):
                await self._restore_one(spec)

    async def _restore_one(self, spec: StreamSpec | BucketSpec) -> None:
        while True:
            try:
                if await self._make(spec):
                    self._connection.log.warning("stream_recreated", stream=spec.name)
                    self.recreated.put_nowait(spec.name)
            except BusError as error:
                self._connection.log.warning("stream_not_restored", stream=spec.name, error=str(error))
                await asyncio.sleep(RETRY_S)
                await self._connection.wait_connected()
            else:
                return

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_INTERVAL_S)
            await self._connection.wait_connected()
            pulses = {spec.pulse for spec in self._specs.values() if isinstance(spec, StreamSpec) and spec.pulse}
            try:
                for pulse in pulses:
                    await self._connection.emit(pulse, self.limit.pulse)
            except AwayError:
                pass  # the connection logs it
            except BusError as error:
                self._connection.log.warning("pulse_not_sent", error=str(error))

    def _start(self, name: str, body: Awaitable[None]) -> None:
        async def live() -> None:
            try:
                await body
            except BusError as error:  # closed for good; callers of the bus get the error themselves
                self._connection.log.debug("upkeep_ended", task=name, error=str(error))

        if name in self._tasks:
            self._tasks[name].cancel()
        self._tasks[name] = asyncio.create_task(live(), name=name)
