"""Compare a run's message size with the ``max_payload`` of the servers on the way.

A server that receives a message larger than its ``max_payload`` over a link ends the link, and does so again each time
the message is sent. So the maker of a stream announces with its pulse how large messages get, and nothing is copied to
a server with a smaller limit. Its link stays up, and its services report why they take no part.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import NamedTuple

from fednats.transport.connection import Connection
from fednats.wire import MAX_MESSAGE_BYTES

HEADER_ROOM_BYTES = 4096
"""Kept free in each message for headers, including those that a copying server adds."""
_MAX_DIGITS = 10


class SizeLimit(NamedTuple):
    """The size that a run needs and the server's limit."""

    needed_bytes: int
    """Largest message of the run including headers; 0 while unknown."""
    taken_bytes: int
    """``max_payload`` of the connected server."""

    @property
    def too_small(self) -> bool:
        """Whether the run's messages are too large for the server."""
        return self.needed_bytes > self.taken_bytes

    @property
    def remedy(self) -> str:
        """Say what is wrong and what the server's operator can do."""
        return (
            f"server_limit_too_small: the server takes messages of {self.taken_bytes} bytes (max_payload), the run needs"
            f" {self.needed_bytes}; raise max_payload in its configuration and start it again"
        )


class MessageLimit:
    """The needed size and the server's limit, as one connection knows them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._needed_bytes = 0
        self._changed = asyncio.Event()

    @property
    def now(self) -> SizeLimit:
        """Both values as they are now."""
        return SizeLimit(self._needed_bytes, self._connection.client.max_payload)

    @property
    def pulse(self) -> bytes:
        """The needed size as the content of a pulse; empty while unknown."""
        return str(self._needed_bytes).encode() if self._needed_bytes else b""

    def need(self, n_bytes: int) -> None:
        """Note the largest message size, headers included."""
        if n_bytes != self._needed_bytes:
            self._needed_bytes = n_bytes
            self._changed.set()

    def hear(self, pulse: bytes) -> None:
        """Take over the needed size from a pulse of the node above, capped at the protocol's limit; ignore nonsense."""
        if pulse.isdigit() and len(pulse) <= _MAX_DIGITS:
            self.need(min(int(pulse), MAX_MESSAGE_BYTES + HEADER_ROOM_BYTES))

    async def changes(self) -> AsyncGenerator[SizeLimit, None]:
        """Yield both values now, after each change, and after reconnections."""
        self._connection.wakers.add(self._changed.set)
        try:
            while True:
                self._changed.clear()
                yield self.now
                await self._changed.wait()
        finally:
            self._connection.wakers.discard(self._changed.set)
