"""Payloads in chunks, pipelined both ways: waiting one round trip for each chunk makes a long link slow."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from fednats import subjects
from fednats.errors import Reason, RefusedError
from fednats.transport.connection import AwayError, Connection, NobodyError
from fednats.wire import digest

WINDOW = 16
"""Chunks under way at once: with chunks of 512 KiB, 8 MiB, which fills 40 MB/s at 200 ms round trip."""

PAUSE_S = 0.2

T = TypeVar("T")


async def publish(
    publish_one: Callable[[str, bytes, str], Awaitable[None]],
    prefix: str,
    payload_id: str,
    chunks: Iterable[bytes] | AsyncIterable[bytes],
    window: int,
) -> None:
    """Publish chunk i as `subjects.chunk` with the message id ``<payload_id>.<i>``; returns when all are stored."""

    async def calls() -> AsyncIterator[Awaitable[None]]:
        index = 0
        async for chunk in _each(chunks):
            yield publish_one(subjects.chunk(prefix, payload_id, index), chunk, f"{payload_id}.{index}")
            index += 1

    async for _ in _pipelined(calls(), window):
        pass


async def read(
    connection: Connection, stream: str, prefix: str, payload_id: str, digests: Sequence[bytes], window: int
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks in order, each checked against its digest."""

    async def calls() -> AsyncIterator[Awaitable[bytes]]:
        for index, expected in enumerate(digests):
            yield _chunk(connection, stream, subjects.chunk(prefix, payload_id, index), expected)

    async for chunk in _pipelined(calls(), window):
        yield chunk


async def _chunk(connection: Connection, stream: str, subject: str, expected: bytes) -> bytes:
    while True:
        try:
            message = await connection.direct(stream, subject)
        except AwayError:
            await connection.wait_connected()
            continue
        except NobodyError:  # the server is back, the stream is not yet
            await asyncio.sleep(PAUSE_S)
            continue
        if message is None:
            raise RefusedError(Reason.CHECKSUM, f"{subject} is missing in {stream}")
        if digest(message.data) != expected:
            raise RefusedError(Reason.CHECKSUM, f"{subject} differs from its digest")
        return message.data


async def _pipelined(calls: AsyncIterator[Awaitable[T]], window: int) -> AsyncIterator[T]:
    """Yield the results in order with at most ``window`` calls under way; the first failure ends it."""
    under_way: deque[asyncio.Future[T]] = deque()
    try:
        async for call in calls:
            under_way.append(asyncio.ensure_future(call))
            if len(under_way) >= window:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for future in under_way:
            future.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _each(chunks: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    else:
        for chunk in chunks:
            yield chunk
