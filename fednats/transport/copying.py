"""Resume the copying of a stream soon after its link or server was away.

JetStream resumes by itself, but slowly: it sends its request into a link that is down, waits 30 s for the answer, and
waits 10 s longer before each further request. When the link comes back, that only sometimes ends the wait.

The maker of a stream publishes its *pulse* four times a second. A link keeps messages in order, and a source sends a
heartbeat every second. So if a pulse arrives while the source has been silent for longer, copying has stopped, however
slow the link is. Then the source is removed from the stream's configuration and added again. The server resumes at
once, where the copy ends.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from nats.aio.msg import Msg

from fednats.errors import BusError
from fednats.transport.connection import Connection
from fednats.transport.message_limit import MessageLimit
from fednats.transport.streams import NANOSECONDS, Origin, StreamSpec

PULSE_INTERVAL_S = 0.25
SILENT_S = 3.0
PAUSE_S = 0.5
"""Pause between two looks at a stream, however many pulses come."""
PATIENCE_S = 4.0
"""Wait before a source is set up again; it doubles each time while the link is up and the source stays silent."""


class Copying:
    """The sources of one stream; it has none while their messages are too large for this server."""

    def __init__(self, connection: Connection, spec: StreamSpec, limit: MessageLimit) -> None:
        self._connection = connection
        self._spec = spec
        self._limit = limit
        self._heard = asyncio.Event()
        self._sources = [Source(origin, self._heard, limit) for origin in spec.sources]

    async def run(self) -> None:
        """Keep the sources going; ends with BusError when the connection is closed for good."""
        subscriptions = [
            await self._connection.subscribe(source.origin.pulse, source.hear)
            for source in self._sources
            if source.origin.pulse is not None
        ]
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_S):  # wait_for may lose a cancellation (Python 3.11)
                        await self._heard.wait()
                self._heard.clear()
                await self._connection.wait_connected()
                if heard := [source for source in self._sources if source.was_heard()]:
                    await self._look(heard)
                    await asyncio.sleep(PAUSE_S)
        finally:
            for subscription in subscriptions:
                await self._connection.unsubscribe(subscription)

    async def _look(self, heard: Sequence["Source"]) -> None:
        name = self._spec.name
        try:
            info = await self._connection.api(f"STREAM.INFO.{name}", prefix=self._spec.api)
            if self._limit.now.too_small:
                await self._stop(info["config"])
                return
            for source in heard:
                if source.to_be_set_up(info.get("sources") or ()):
                    self._connection.log.info("copying_set_up", stream=name, origin=source.origin.stream)
                    await self._set_up(source.origin, info["config"])
        except BusError as error:
            self._connection.log.debug("copying_not_seen", stream=name, error=str(error))

    async def _set_up(self, origin: Origin, config: Mapping[str, Any]) -> None:
        without = [other.config() for other in self._spec.sources if other != origin]
        for sources in (without, [each.config() for each in self._spec.sources]):
            await self._update({**config, "sources": sources})

    async def _stop(self, config: Mapping[str, Any]) -> None:
        """Remove all sources; `_set_up` adds them again once the limit allows it."""
        if config.get("sources"):
            await self._update({**config, "sources": []})
            self._connection.log.warning("copying_stopped", stream=self._spec.name, **self._limit.now._asdict())

    async def _update(self, config: Mapping[str, Any]) -> None:
        await self._connection.api(f"STREAM.UPDATE.{self._spec.name}", config, self._spec.api)


class Source:
    """One origin: when its pulse was last heard, and when copying from it was set up."""

    def __init__(self, origin: Origin, any_heard: asyncio.Event, limit: MessageLimit) -> None:
        self.origin = origin
        self._limit = limit
        self._any_heard = any_heard
        self._heard = False
        self._heard_at = self._set_up_at = asyncio.get_running_loop().time()  # the server has just set it up itself
        self._patience_s = PATIENCE_S

    async def hear(self, message: Msg) -> None:
        """Note a pulse; after a silence, the link is new and the source may be set up at once."""
        if self.origin.says_limit:
            self._limit.hear(message.data)
        now = asyncio.get_running_loop().time()
        if now - self._heard_at > SILENT_S:
            self._patience_s = 0.0
        self._heard, self._heard_at = True, now
        self._any_heard.set()

    def was_heard(self) -> bool:
        """Whether a pulse was heard since the last call; always true for an origin on the same server."""
        heard, self._heard = self._heard, False
        return heard or self.origin.pulse is None

    def to_be_set_up(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether copying has stopped and a new setup is due; ``states`` are the sources as the server reports them."""
        now = asyncio.get_running_loop().time()
        if _active(states, self.origin):
            self._patience_s = 0.0
            return False
        if now - self._set_up_at < self._patience_s:
            return False
        self._set_up_at, self._patience_s = now, max(PATIENCE_S, 2 * self._patience_s)
        return True


def _active(states: Sequence[Mapping[str, Any]], origin: Origin) -> bool:
    for state in states:
        if (state["name"], (state.get("external") or {}).get("api")) == (origin.stream, origin.api):
            return bool(0 <= state["active"] < SILENT_S * NANOSECONDS)  # -1: nothing heard yet
    return False
