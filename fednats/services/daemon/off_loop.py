"""Read and write files off the event loop, and limit the rate of sending."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from fednats.storage.chunk_file import ChunkFile

T = TypeVar("T")

_END = object()


async def off_loop(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield ``items``, each produced in a thread."""
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item  # type: ignore[misc]  # not the sentinel


async def paced(chunks: AsyncIterator[bytes], max_mbit: float | None) -> AsyncIterator[bytes]:
    """Yield ``chunks`` at no more than ``max_mbit`` (1e6 bits per second); None for no limit."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    async for chunk in chunks:
        yield chunk
        if max_mbit is not None:
            due = max(due, loop.time()) + len(chunk) * 8 / (max_mbit * 1e6)
            await asyncio.sleep(due - loop.time())


@asynccontextmanager
async def chunk_file(path: Path) -> AsyncIterator[ChunkFile]:
    """Open a file of chunks to append to. Closing it waits for the disk in a thread; a large file takes seconds."""
    file = await asyncio.to_thread(ChunkFile, path)
    try:
        yield file
    finally:
        await asyncio.to_thread(file.close)
