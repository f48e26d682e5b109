"""Cancel tasks that call nats-py, which may lose a cancellation.

``asyncio.wait_for`` swallows a cancellation that arrives together with a result (Python 3.11), and nats-py catches one
while it waits for a full buffer or for a reconnection. A loop would then never end, nor would anyone waiting for it.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar, cast

CANCEL_AGAIN_S = 0.5

T = TypeVar("T")


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks repeatedly until all have ended; ignore what they raise."""
    while running := {task for task in tasks if not task.done()}:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def within(timeout_s: float, call: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``call``, which has always ended when this returns or raises.

    Raises:
        TimeoutError: ``call`` took longer than ``timeout_s``.
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
    """Return the result of ``call``, but raise CancelledError if this task was cancelled meanwhile."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    before = task.cancelling()
    try:
        return await call
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError
