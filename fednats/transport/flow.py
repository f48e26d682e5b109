"""Payloads in one direction of a connection: chunks go in order of request, as many at once as the window allows."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fednats.transport.window import Window

FIRST_CHUNK_BYTES = 2**18

T = TypeVar("T")


class Flow:
    """One direction; all its payloads share it, so that together they fill the link without flooding it."""

    def __init__(self) -> None:
        self.window = Window()
        self.chunk_bytes = FIRST_CHUNK_BYTES
        """Size of the last chunk read; the next is assumed to be as large."""
        self._waiting: deque[tuple[int, asyncio.Future[Window]]] = deque()

    def start_anew(self) -> None:
        """Forget what was learned about the link; a new connection may take another route."""
        self.window = Window()
        self._admit()

    async def carry(self, n_bytes: int, ask: Callable[[float], Awaitable[T]]) -> T:
        """Await ``ask(timeout_s)`` once the window has room for ``n_bytes``; adapt the window to the answer time."""
        window = await self._turn(n_bytes)
        now = asyncio.get_running_loop().time
        started = now()
        try:
            answer = await ask(window.timeout_s)
        except BaseException:
            window.lost(n_bytes)
            raise
        else:
            window.answered(n_bytes, now() - started, now())
            return answer
        finally:
            self._admit()

    async def _turn(self, n_bytes: int) -> Window:
        """Wait for room; return the window that has counted ``n_bytes`` as sent."""
        turn: asyncio.Future[Window] = asyncio.get_running_loop().create_future()
        self._waiting.append((n_bytes, turn))
        self._admit()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                turn.result().lost(n_bytes)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            n_bytes, turn = self._waiting[0]
            if not turn.done():
                if not self.window.fits(n_bytes):
                    return
                self.window.sent(n_bytes)
                turn.set_result(self.window)
            self._waiting.popleft()
