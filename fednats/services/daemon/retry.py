"""Retry bus requests through outages, full streams and streams that are made anew."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from fednats.errors import BusError, BusFullError
from fednats.transport.answer import AwayError, NobodyError, NoStreamError
from fednats.transport.bus import Bus
from fednats.transport.streams import BucketSpec, StreamSpec

Answer = TypeVar("Answer")

RETRY_S = 2.0
"""Pause before a request is tried again."""


async def persist(log: Any, publish: Callable[[], Awaitable[object]]) -> None:
    """Publish; retry while the stream is full or missing."""
    while True:
        try:
            await publish()
        except (BusFullError, NobodyError) as error:
            log.warning("publishing_waits", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
        else:
            return


async def ask(log: Any, question: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return the bus's answer; ask again after any BusError."""
    while True:
        try:
            return await question()
        except BusError as error:
            log.warning("bus_waits", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)


async def find(log: Any, question: Callable[[], Awaitable[Answer | None]]) -> Answer | None:
    """Return the bus's answer, None if there is no stream yet; ask again while the bus is away. Raises BusError."""
    while True:
        try:
            return await question()
        except (NobodyError, NoStreamError) as error:
            log.debug("stream_is_not_there", error=str(error))
            return None
        except AwayError as error:
            log.warning("bus_waits", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)


async def ensure(log: Any, bus: Bus, streams: Iterable[StreamSpec], buckets: Iterable[BucketSpec] = ()) -> None:
    """Make streams and buckets on the bus, in order; retry while it is away.

    Raises:
        BusError: not permitted, or an incompatible change (the text names it).
    """
    for stream in streams:
        await _made(log, partial(bus.ensure_stream, stream))
    for bucket in buckets:
        await _made(log, partial(bus.ensure_bucket, bucket))


async def _made(log: Any, make: Callable[[], Awaitable[object]]) -> None:
    while True:
        try:
            await make()
        except (AwayError, NobodyError) as error:
            log.warning("bus_waits", error=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
        else:
            return
