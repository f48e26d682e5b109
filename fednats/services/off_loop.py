"""What reads or writes files, kept off the event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


async def off_loop(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield ``items``, each of them produced in a thread."""
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item  # type: ignore[misc]  # it is not the sentinel
