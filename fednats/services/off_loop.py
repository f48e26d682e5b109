"""What reads or writes files, kept off the event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from fednats.storage.chunk_file import ChunkFile

T = TypeVar("T")

_END = object()


async def off_loop(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield ``items``, each of them produced in a thread."""
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item  # type: ignore[misc]  # it is not the sentinel


@asynccontextmanager
async def chunk_file(path: Path) -> AsyncIterator[ChunkFile]:
    """Open a file of chunks to append to; closing it waits for the disk, seconds for a large one, in a thread."""
    file = await asyncio.to_thread(ChunkFile, path)
    try:
        yield file
    finally:
        await asyncio.to_thread(file.close)
