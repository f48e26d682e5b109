"""Send and read payloads in chunks, pipelined: a round trip for each chunk would make a long link slow."""

import asyncio
from collections import deque
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
from functools import partial
from typing import TypeVar

from fednats import subjects
from fednats.errors import Reason, RefusedError
from fednats.transport.answer import AwayError, NobodyError, answer
from fednats.transport.cancellation import end
from fednats.transport.connection import Connection
from fednats.transport.fence import Fence
from fednats.wire import digest

PAUSE_S = 0.2
"""Pause between two attempts to read from a stream that does not exist yet."""

T = TypeVar("T")


async def publish(
    connection: Connection,
    prefix: str,
    payload_id: str,
    chunks: Iterable[bytes] | AsyncIterable[bytes],
    first: int,
    stored: Callable[[int], Awaitable[None]] | None,
    fence: Fence | None = None,
) -> None:
    """Publish chunk i to its `subjects.chunk` with the message id `chunk_id`; return when all are stored.

    Sends the last chunk once all others are stored, so a stream that holds it holds the whole payload.
    """
    chunk_bytes = 1
    n_stored = index = first
    last: bytes | None = None

    def store(chunk: bytes) -> Awaitable[None]:
        headers = {"Nats-Msg-Id": chunk_id(payload_id, index), **(fence.headers if fence else {})}
        return _store(connection, subjects.chunk(prefix, payload_id, index), chunk, headers)

    async def calls() -> AsyncIterator[Awaitable[None]]:
        nonlocal chunk_bytes, index, last
        async for chunk in _each(chunks):
            chunk_bytes = max(chunk_bytes, len(chunk))
            if last is not None:
                yield store(last)
                index += 1
            last = chunk

    async for _ in _pipelined(calls(), lambda: connection.up.window.size_bytes / chunk_bytes + 0.5):
        n_stored += 1
        if stored is not None:
            await stored(n_stored)
    if last is not None:
        await store(last)
        if stored is not None:
            await stored(n_stored + 1)


def chunk_id(payload_id: str, index: int) -> str:
    """Return the message id of a chunk, by which the stream recognises a duplicate."""
    return f"{payload_id}.{index}"


async def read(
    connection: Connection,
    stream: str,
    prefix: str,
    payload_id: str,
    digests: Sequence[bytes],
    most: int | None,
    first: int,
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks in order, each checked against its digest."""
    flow = connection.down

    async def calls() -> AsyncIterator[Awaitable[bytes]]:
        for index, expected in enumerate(digests[first:], first):
            yield _fetch(connection, stream, subjects.chunk(prefix, payload_id, index), expected)

    def room() -> float:
        n_chunks = flow.window.size_bytes / flow.chunk_bytes + 0.5  # rounds like `Window.fits`
        return n_chunks if most is None else min(n_chunks, most)

    left = len(digests) - first
    async for chunk in _pipelined(calls(), room):
        left -= 1
        if left:  # the last chunk may be shorter
            flow.chunk_bytes = max(1, len(chunk))
        yield chunk


async def _store(connection: Connection, subject: str, chunk: bytes, headers: Mapping[str, str]) -> None:
    ask = partial(connection.request, subject, chunk, headers)
    while True:
        try:
            message = await connection.up.carry(len(chunk), ask)
        except AwayError:
            await connection.wait_connected()
        else:
            answer(message.data, subject)
            return


async def _fetch(connection: Connection, stream: str, subject: str, expected: bytes) -> bytes:
    ask = partial(connection.direct, stream, subject)
    while True:
        try:
            message = await connection.down.carry(connection.down.chunk_bytes, ask)
        except AwayError:
            await connection.wait_connected()
            continue
        except NobodyError:  # the server is back, but its stream is not yet
            await asyncio.sleep(PAUSE_S)
            continue
        if message is None:
            raise RefusedError(Reason.CHECKSUM, f"{subject} is missing in {stream}")
        if digest(message.data) != expected:
            raise RefusedError(Reason.CHECKSUM, f"{subject} differs from its digest")
        return message.data


async def _pipelined(calls: AsyncIterator[Awaitable[T]], room: Callable[[], float]) -> AsyncIterator[T]:
    """Yield the results in order, with at most ``room()`` calls under way; the first failure ends it."""
    under_way: deque[asyncio.Future[T]] = deque()
    try:
        async for call in calls:
            under_way.append(asyncio.ensure_future(call))
            while len(under_way) >= max(1, room()):
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        await end(*under_way)


async def _each(chunks: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    else:
        for chunk in chunks:
            yield chunk
