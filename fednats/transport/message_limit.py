"""How large the messages of a run are, against what the servers on their way take.

A server ends a link over which a message larger than its ``max_payload`` comes, and again each time it is sent. So whoever
makes the streams that others copy says with its pulse how large the messages are, and nothing is copied to a server that
takes less: its link stands, and its services say why they do not take part.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import NamedTuple

from fednats.transport.connection import Connection
from fednats.wire import MAX_MESSAGE_BYTES

HEADER_ROOM_BYTES = 4096
"""Kept free in each message for headers, also those that a copying server adds."""
_MAX_DIGITS = 10


class SizeLimit(NamedTuple):
    """Both sides of the comparison."""

    needed_bytes: int
    """Largest message of the run with its headers; 0 as long as that is not known."""
    taken_bytes: int
    """``max_payload`` of the server connected to."""

    @property
    def too_small(self) -> bool:
        """Whether the server does not take what the run needs."""
        return self.needed_bytes > self.taken_bytes

    @property
    def remedy(self) -> str:
        """What is wrong, and what the server's operator can do."""
        return (
            f"server_limit_too_small: the server takes messages of {self.taken_bytes} bytes (max_payload), the run needs"
            f" {self.needed_bytes}; raise max_payload in its configuration and start it again"
        )


class MessageLimit:
    """What one connection knows of both."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._needed_bytes = 0
        self._changed = asyncio.Event()

    @property
    def now(self) -> SizeLimit:
        """The two as they are."""
        return SizeLimit(self._needed_bytes, self._connection.client.max_payload)

    @property
    def pulse(self) -> bytes:
        """What a pulse says of it."""
        return str(self._needed_bytes).encode() if self._needed_bytes else b""

    def need(self, n_bytes: int) -> None:
        """Note how large messages are, headers included."""
        if n_bytes != self._needed_bytes:
            self._needed_bytes = n_bytes
            self._changed.set()

    def hear(self, pulse: bytes) -> None:
        """Take over what the pulse of the node above says; what cannot be true is ignored."""
        if pulse.isdigit() and len(pulse) <= _MAX_DIGITS:
            self.need(min(int(pulse), MAX_MESSAGE_BYTES + HEADER_ROOM_BYTES))

    async def changes(self) -> AsyncGenerator[SizeLimit, None]:
        """Yield the two now, whenever either has changed, and after reconnections."""
        self._connection.wakers.add(self._changed.set)
        try:
            while True:
                self._changed.clear()
                yield self.now
                await self._changed.wait()
        finally:
            self._connection.wakers.discard(self._changed.set)
