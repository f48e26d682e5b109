"""What is sent or asked until the bus takes it: through outages, full streams and streams that are made anew."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fednats.errors import BusError, BusFullError
from fednats.transport.answer import NobodyError
from fednats.transport.bus import Bus, Record

RETRY_S = 2.0
"""Pause after the bus refused something, before it is offered or asked again."""


async def persist(log: Any, publish: Callable[[], Awaitable[object]]) -> None:
    """Publish, and again while the stream is full or not there."""
    while True:
        try:
            await publish()
        except (BusFullError, NobodyError) as error:
            log.warning("publishing_waits", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
        else:
            return


async def newest(bus: Bus, stream: str, subject: str, log: Any) -> Record | None:
    """Return the newest message of ``subject``, or None; waits while the bus or the stream is away."""
    while True:
        try:
            return await bus.last(stream, subject)
        except BusError as error:
            log.warning("bus_waits", stream=stream, error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
