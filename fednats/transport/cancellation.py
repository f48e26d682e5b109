"""Cancelling what calls nats-py, which may lose a cancellation.

``asyncio.wait_for`` returns a result that is there when the cancellation comes (Python 3.11), and nats-py catches a cancellation
while it waits for a full buffer or for a reconnection. A loop goes on for ever then, and whoever waits for its end waits for ever.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar, cast

CANCEL_AGAIN_S = 0.5

T = TypeVar("T")


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, again and again until all have ended; what they raised is dropped."""
    while running := {task for task in tasks if not task.done()}:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def within(timeout_s: float, call: Coroutine[Any, Any, T]) -> T:
    """Return what ``call`` returns; when this returns, ``call`` has ended.

    Raises:
        TimeoutError: it has not ended by itself after ``timeout_s``.
    """
    calling = asyncio.create_task(call)
    try:
        await asyncio.wait({calling}, timeout=timeout_s)
        if not calling.done():
            raise TimeoutError
        return calling.result()
    finally:
        await end(calling)


async def cancellable(call: Awaitable[T]) -> T:
    """Return what ``call`` returns, but raise CancelledError if this task was cancelled while it ran."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    before = task.cancelling()
    try:
        return await call
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError
