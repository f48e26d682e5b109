"""Keeps the copying of a stream going after a link or a server was away.

JetStream looks after the sources of a stream itself, but slowly: it asks into a link that is down, waits 30 s for the
answer, and 10 s longer each time before it asks again; that the link stands again cuts this short only sometimes.

Who makes a stream says its *pulse* every second. A link keeps the order, and a source has a heartbeat every second:
if a pulse comes over the link and the source was silent for longer, nobody copies, however slow the link is. Then the
source is taken out of the stream's configuration and put in again. The server goes on at once, from where the copy ends.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from fednats.errors import BusError
from fednats.transport.connection import Connection
from fednats.transport.streams import NANOSECONDS, Origin, StreamSpec

PULSE_INTERVAL_S = 1.0
SILENT_S = 3.0
PAUSE_S = 1.0
"""Between two looks at a stream, however many pulses come."""


class Copying:
    """The sources of one stream."""

    def __init__(self, connection: Connection, spec: StreamSpec) -> None:
        self._connection = connection
        self._spec = spec
        self._heard: set[Origin] = set()
        self._silences = dict.fromkeys(spec.sources, 0)

    async def run(self) -> None:
        """Look after them for ever; raises BusError when the connection is closed for good."""
        near = {origin for origin in self._spec.sources if origin.pulse is None}
        subscriptions = [await self._listen(origin, origin.pulse) for origin in self._spec.sources if origin.pulse]
        try:
            await self._look_again(near)
        finally:
            for subscription in subscriptions:
                await self._connection.unsubscribe(subscription)

    async def _look_again(self, near: set[Origin]) -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            await self._connection.wait_connected()
            heard, self._heard = self._heard | near, set()
            if heard:
                try:
                    await self._look(heard)
                except BusError as error:
                    self._connection.log.debug("copying_not_seen", stream=self._spec.name, error=str(error))

    async def _listen(self, origin: Origin, pulse: str) -> Subscription:
        async def note(_message: Msg) -> None:
            self._heard.add(origin)

        return await self._connection.subscribe(pulse, note)

    async def _look(self, heard: set[Origin]) -> None:
        """Set up sources that are silent although their side is heard: at the second look, then ever more seldom."""
        info = await self._connection.api(f"STREAM.INFO.{self._spec.name}")
        for origin in heard:
            if _active(info.get("sources") or (), origin):
                self._silences[origin] = 0
                continue
            self._silences[origin] += 1
            if self._silences[origin] & (self._silences[origin] - 1) == 0 and self._silences[origin] > 1:
                await self._set_up(origin, info["config"])

    async def _set_up(self, origin: Origin, config: Mapping[str, Any]) -> None:
        self._connection.log.info("copying_set_up", stream=self._spec.name, origin=origin.stream)
        without = [other.config() for other in self._spec.sources if other != origin]
        for sources in (without, [each.config() for each in self._spec.sources]):
            await self._connection.api(f"STREAM.UPDATE.{self._spec.name}", {**config, "sources": sources})


def _active(states: Sequence[Mapping[str, Any]], origin: Origin) -> bool:
    for state in states:
        if (state["name"], (state.get("external") or {}).get("api")) == (origin.stream, origin.api):
            return bool(0 <= state["active"] < SILENT_S * NANOSECONDS)  # -1: nothing heard yet
    return False
