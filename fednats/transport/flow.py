"""One direction of one connection for payloads: chunks go in the order of asking, as many at once as the window takes."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fednats.transport.window import Window

FIRST_CHUNK_BYTES = 2**18

T = TypeVar("T")


class Flow:
    """All payloads of one direction share it, so that together they fill the link and do not swamp it."""

    def __init__(self) -> None:
        self.window = Window()
        self.chunk_bytes = FIRST_CHUNK_BYTES
        """Size of the chunk read last; the next is taken to be as large."""
        self._waiting: deque[tuple[int, asyncio.Future[Window]]] = deque()

    def start_anew(self) -> None:
        """Forget what was learned of the link: the connection is a new one and may go another way."""
        self.window = Window()
        self._admit()

    async def carry(self, n_bytes: int, ask: Callable[[float], Awaitable[T]]) -> T:
        """Await ``ask(timeout_s)`` when there is room for ``n_bytes``, and learn from how long it took."""
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
        """Return the window in which ``n_bytes`` are counted as sent."""
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
